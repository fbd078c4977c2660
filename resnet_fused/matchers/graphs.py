"""Blocks that no op computes as a whole: their layers, with the addition and the ReLU that follow.

The forward of a block is traced once by torch.fx, with its children as opaque calls, but for those that end in a layer
whose output is added to something. If a convolution and BatchNorm feed an addition, the block is to run step by step as
it was traced, with that layer, addition and ReLU as one op. The probe then runs both.
"""

from __future__ import annotations

import operator
import pickle
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional

from ..folding import Layer
from ..fusion import Settings, original_class
from ..graph import GraphFusion, Step, Value
from .blocks import Parts
from .layers import (
    Model,
    Refused,
    activation,
    check_inside,
    conv_geometry,
    has_own_tensors,
    is_norm,
    leaves,
    make_layer,
    norm_channels,
    places_within,
)
from .tracing import trace

ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
RELUS = (functional.relu, functional.relu_, torch.relu, torch.relu_, "relu", "relu_")


class Found(NamedTuple):
    """A layer in a graph.

    Attributes:
        layer: its convolution and BatchNorm.
        options: of `conv_bn_act`.
        start: the convolution's node.
        inner: the nodes that the op replaces, but for the last.
        end: the last of them: the op's output takes the place of its.
        residual: the node whose output is added, None for none.
    """

    layer: Layer
    options: dict[str, Any]
    start: fx.Node
    inner: tuple[fx.Node, ...]
    end: fx.Node
    residual: fx.Node | None


def match_graph(block: nn.Module, model: Model, settings: Settings, refused: dict[nn.Module, str]) -> list[GraphFusion]:
    """The block with its layers as single ops, if there is one among them that an addition follows.

    Args:
        block: the module.
        model: that it is part of.
        settings: how to run.
        refused: gets the convolutions that have to stay as they are, with the reason.

    Raises:
        Refused: its forward cannot be traced, or it has such a layer but cannot be run step by step.
    """
    graph = trace(block, model)
    opened = set(to_open(block, graph))
    if opened:
        graph = trace(block, model, opened)
    match = _Match(block, graph, model, refused)
    found = list(match.layers())
    if not any(each.residual for each in found):
        return []
    if any(module.training for module in block.modules()):
        raise Refused(f"a module in {model.name(block)} is in train mode")  # the probe would change its statistics
    left_out = [*opened, *match.left_out]
    for module in left_out:
        check_inside(module, model)
    parents = [block, *opened]
    program, result = write_program(block, graph, found)
    return [
        GraphFusion(
            [each.layer for each in found],
            program,
            result,
            block,
            left_out,
            input_channels(block, graph),
            [each.options for each in found],
            inside=[
                *((parent._modules, name) for parent in parents for name in parent._modules),
                *(place for module in match.left_out for place in places_within(module)),
            ],
            whole=[parent._modules for parent in parents],
            settings=settings,
        )
    ]


def module_of(block: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module that a node calls, None if it calls none."""
    return block.get_submodule(str(node.target)) if node.op == "call_module" else None


def calls(node: fx.Node, functions: tuple[Any, ...]) -> bool:
    """Whether a node calls one of the functions, or of the methods that are given by name."""
    return node.op in ("call_function", "call_method") and node.target in functions


def summands(block: nn.Module, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two values that a node adds, None if it does something else."""
    if calls(node, ADDITIONS) and not node.kwargs and len(node.args) == 2:
        a, b = node.args
        return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else None
    return None


def to_open(block: nn.Module, graph: fx.Graph) -> Iterator[nn.Module]:
    """The children to look into: those that end in a layer whose output is added, that add, or that are a ReLU."""
    for node in graph.nodes:
        module = module_of(block, node)
        if module is not None and is_sum(module, node):
            yield module
        elif summands(block, node) is None:
            continue
        for operand in node.all_input_nodes:
            while (child := module_of(block, operand)) is not None and is_nothing(child, operand):
                operand = operand.all_input_nodes[0]
            if child is not None:
                yield from ends_in_layer(child)
        for user in node.users:
            after = module_of(block, user)
            if isinstance(after, nn.Sequential) and all(activation(leaf) is not None for leaf in leaves(after)):
                yield after


def is_sum(module: nn.Module, node: fx.Node) -> bool:
    """Whether a module takes two values and holds nothing, so that it may be what adds them."""
    return len(node.all_input_nodes) == 2 and not module._modules and not has_own_tensors(module)


def is_nothing(module: nn.Module, node: fx.Node) -> bool:
    """Whether a module gives what it takes, as dropout does in eval mode."""
    return len(node.all_input_nodes) == 1 and not module._modules and activation(module) == "none"


def ends_in_layer(module: nn.Module) -> Iterator[nn.Module]:
    """The module and those in it to look into, so that the layer that it ends in is seen; none if it ends in none."""
    if original_class(module).forward is nn.Sequential.forward:
        children = [child for child in module._modules.values() if child is not None]
        while children and not children[-1]._modules and activation(children[-1]) == "none":
            children.pop()
        last = children[-1] if children else module
        inner = [] if last is module else list(ends_in_layer(last))
        if inner or isinstance(last, nn.Conv2d) or is_norm(last):
            yield from (module, *inner)
    elif module._modules and not isinstance(module, nn.Conv2d) and not is_norm(module):
        parts = Parts.of(module)
        if parts is not None and parts.order == "cn":
            yield module


class _Match:
    """The layers in the graph of a block."""

    def __init__(self, block: nn.Module, graph: fx.Graph, model: Model, refused: dict[nn.Module, str]) -> None:
        self._block = block
        self._graph = graph
        self._model = model
        self._refused = refused
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        self.left_out: list[nn.Module] = []  # modules whose calls the layers replace

    def layers(self) -> Iterator[Found]:
        """Each layer once: first those with an addition, then the others."""
        taken: set[fx.Node] = set()
        for node in self._graph.nodes:
            pair = summands(self._block, node)
            # The later operand first: what it is added to is there already when it is computed.
            for end in sorted(pair or (), key=lambda n: -self._order[n]):
                found = self._ending_at(end, node)
                if found is not None and found.start not in taken:
                    taken.add(found.start)
                    yield self._take(found)
                    break
        for node in self._graph.nodes:
            if node not in taken and self._conv(node) is not None:
                found = self._starting_at(node)
                if found is not None:
                    yield self._take(found)

    def _take(self, found: Found) -> Found:
        nodes = (found.start, *found.inner, found.end)
        self.left_out += [m for node in nodes if (m := module_of(self._block, node)) is not None]
        return found

    def _conv(self, node: fx.Node) -> nn.Conv2d | None:
        """The convolution that a node calls, if it is one and nothing else."""
        module = module_of(self._block, node)
        plain = isinstance(module, nn.Conv2d) and not module._modules
        return module if plain and original_class(module).forward is nn.Conv2d.forward else None  # type: ignore

    def _norm(self, node: fx.Node) -> nn.Module | None:
        module = module_of(self._block, node)
        return module if module is not None and is_norm(module) else None

    def _activation(self, node: fx.Node) -> str | None:
        """`"relu"` or `"none"` if that is all that a node computes and its module may be left out."""
        if calls(node, RELUS) and len(node.all_input_nodes) == 1:
            return "relu"
        module = module_of(self._block, node)
        if module is None or len(node.all_input_nodes) != 1 or any(map(has_own_tensors, module.modules())):
            return None
        return activation(module) if self._free(module) else None

    def _free(self, module: nn.Module) -> bool:
        try:
            for each in module.modules():
                check_inside(each, self._model)
        except Refused:
            return False
        return True

    def _make(self, conv: nn.Conv2d, norm: nn.Module | None) -> tuple[Layer, dict[str, Any]] | None:
        """The layer and its options, None if it cannot be folded."""
        if norm is not None and norm_channels(norm) != conv.out_channels:
            return None
        try:
            return make_layer(conv, norm, self._model), {**conv_geometry(conv), "groups": conv.groups}
        except Refused as error:
            self._refused[conv] = str(error)
            return None

    def _ending_at(self, node: fx.Node, addition: fx.Node) -> Found | None:
        """The layer whose output `addition` adds to something, if `node`, one of its operands, is that output."""
        inner: list[fx.Node] = []
        while only_user(node) is not None and self._activation(node) == "none":
            inner.append(node)
            node = node.all_input_nodes[0]
        norm = self._norm(node)
        if norm is not None and only_user(node) is not None:
            inner.append(node)
            node = node.all_input_nodes[0]
        conv = self._conv(node)
        if conv is None or only_user(node) is None or len(node.all_input_nodes) != 1:
            return None
        made = self._make(conv, norm)
        if made is None or made[0].relu:
            return None
        layer, options = made
        used = {node, *inner}
        residual = [operand for operand in addition.all_input_nodes if operand not in used]
        if len(residual) != 1:  # the output is added to itself
            return None
        end, act = addition, "none"
        after = only_user(addition)
        if after is not None and self._activation(after) == "relu":
            inner.append(addition)
            end, act = after, "relu"
        return Found(layer, options | {"activation": act}, node, tuple(inner), end, residual[0])

    def _starting_at(self, start: fx.Node) -> Found | None:
        """The convolution that `start` calls, and the BatchNorm and perhaps ReLU that follow."""
        conv, end = self._conv(start), only_user(start)
        norm = None if end is None else self._norm(end)
        made = None if conv is None or norm is None else self._make(conv, norm)
        if made is None or end is None:
            return None
        layer, options = made
        nodes, act = [end], "relu" if layer.relu else "none"
        while act == "none" and (after := only_user(nodes[-1])) is not None:
            kind = self._activation(after)
            if kind is None:
                break
            nodes.append(after)
            act = kind
        return Found(layer, options | {"activation": act}, start, tuple(nodes[:-1]), nodes[-1], None)


def only_user(node: fx.Node) -> fx.Node | None:
    """The node that takes another's output, None if there are several or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def input_channels(block: nn.Module, graph: fx.Graph) -> int:
    """How many channels the block's input has, from the modules that take it.

    Raises:
        Refused: no convolution or BatchNorm shows it.
    """
    source = next(node for node in graph.nodes if node.op == "placeholder")
    seen = [source]
    for node in seen:
        for user in node.users:
            module = module_of(block, user)
            for leaf in () if module is None else leaves(module):
                if isinstance(leaf, nn.Conv2d):
                    return leaf.in_channels
                if is_norm(leaf):
                    return norm_channels(leaf)
            seen.append(user)  # an activation or pooling: channels stay; if not, the probe fails
    raise Refused(f"no convolution takes the input of {type(block).__name__}")


def write_program(block: nn.Module, graph: fx.Graph, found: list[Found]) -> tuple[list[Step], int]:
    """The steps of a block, and the index of its output's value.

    Raises:
        Refused: it takes more than an image, or uses what cannot be saved with the model.
    """
    ends = {each.end: i for i, each in enumerate(found)}
    replaced = {node for each in found for node in (each.start, *each.inner)}
    indices: dict[fx.Node, int] = {}
    steps: list[Step] = []
    result: Any = None

    def value(node: fx.Node) -> Any:
        return Value(indices[node])

    for node in graph.nodes:
        if node in replaced:
            continue
        if node.op == "output":
            result = node.args[0]
            continue
        indices[node] = len(indices)
        if node.op == "placeholder":
            if indices[node] > 0:
                raise Refused(f"{type(block).__name__} takes more than one tensor")
            continue
        if node in ends:
            each = found[ends[node]]
            inputs = (each.start.all_input_nodes[0], each.residual)
            args: Any = tuple(None if n is None else value(n) for n in inputs)
            kind, target, kwargs = "layer", ends[node], {}
        else:
            kind, target = kind_and_target(block, node)
            args, kwargs = (plain(fx.map_arg(a, value)) for a in (node.args, node.kwargs))
        steps.append(Step(kind, target, args, kwargs, indices[node], ()))
    if not isinstance(result, fx.Node):
        raise Refused(f"{type(block).__name__} returns no single tensor")
    return with_last(steps, indices[result]), indices[result]


def kind_and_target(block: nn.Module, node: fx.Node) -> tuple[str, Any]:
    """What a step is that does what a node does."""
    if node.op == "call_module":
        parent, _, name = str(node.target).rpartition(".")
        return "module", (block.get_submodule(parent)._modules, name)
    if node.op == "get_attr":
        path = tuple(str(node.target).split("."))
        if not hasattr(block, path[0]):
            raise Refused(f"the forward of {type(block).__name__} makes a tensor of its own")
        return "tensor", path
    if node.op == "call_method":
        return "method", node.target
    try:
        pickle.dumps(node.target)
    except Exception:
        raise Refused(f"the function {node.name} cannot be saved with the model") from None
    return "function", node.target


def plain(value: Any) -> Any:
    """The arguments of a node as plain containers."""
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    if isinstance(value, list):
        return list(map(plain, value))
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    return value


def with_last(steps: list[Step], result: int) -> list[Step]:
    """The steps, each with the values that it takes last."""
    later, done = {result}, []
    for step in reversed(steps):
        taken = set(values_in((step.args, step.kwargs)))
        done.append(Step(step.kind, step.target, step.args, step.kwargs, step.index, tuple(sorted(taken - later))))
        later |= taken
    return done[::-1]


def values_in(value: Any) -> Iterator[int]:
    """The indices of all values in an argument."""
    if isinstance(value, Value):
        yield value.index
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from values_in(each)
    elif isinstance(value, dict):
        yield from values_in(list(value.values()))
    elif isinstance(value, slice):
        yield from values_in([value.start, value.stop, value.step])
