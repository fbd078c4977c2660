"""The model as a graph of ATen operators, for the peers that are built from one operator after the other."""

from __future__ import annotations

import warnings
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

aten = torch.ops.aten


def traced(model: nn.Module, x: Tensor) -> fx.GraphModule:
    """Export a model in eval mode at the input's shape, without operators in place, and fold its BatchNorms.

    Every activation's node has `meta["val"]`, a tensor without data of its shape and dtype.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.export.export(model, (x,)).module(check_guards=False)
        assert isinstance(module, fx.GraphModule)
        make_functional(module.graph)
        fold_batchnorms(module)
    module.recompile()
    return module


def make_functional(graph: fx.Graph) -> None:
    """Turn operators that change their first argument into those that return a result, which later readers get.

    Views of that argument keep what was there before: of a model that writes through a view this makes another one.
    """
    before: set[fx.Node] = set()
    for node in graph.nodes:
        before.add(node)
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            name = node.target.overloadpacket.__name__
            if name.endswith("_"):
                node.target = getattr(getattr(aten, name[:-1]), node.target._overloadname)
                node.args[0].replace_all_uses_with(node, lambda user: user not in before)


def fold_batchnorms(module: fx.GraphModule) -> None:
    """Fold each BatchNorm that alone reads a convolution into its weight and bias, computed in float64."""

    def value(node: fx.Node | None) -> Any:
        return None if node is None else attrgetter(str(node.target))(module).double()

    graph = module.graph
    for norm in list(graph.nodes):
        conv = norm.args[0] if norm.target is aten.batch_norm.default else None
        if conv is None or conv.target is not aten.conv2d.default or len(conv.users) > 1:
            continue
        x, weight, bias, *others = (*conv.args, None)[: max(3, len(conv.args))]
        scale, shift, mean, variance, _training, _momentum, eps, *_ = norm.args[1:]
        folded = fuse_conv_bn_weights(
            value(weight), value(bias), value(mean), value(variance), eps, value(scale), value(shift)
        )
        dtype = attrgetter(weight.target)(module).dtype
        with graph.inserting_before(conv):
            for name, tensor in zip((f"{conv.name}_weight", f"{conv.name}_bias"), folded, strict=True):
                module.register_buffer(name, tensor.detach().to(dtype))
            conv.args = (x, *(graph.get_attr(f"{conv.name}_{part}") for part in ("weight", "bias")), *others)
        norm.replace_all_uses_with(conv)
        graph.erase_node(norm)
    graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
