"""What a block's forward calls, all the way down: the probe tries a few inputs only.

A clamp, a replaced NaN or a branch on the batch size do nothing to most inputs. So a block is one op as a whole only if
torch.fx can trace it without such a branch, to layers, ReLUs, additions, poolings and changes of shape.
"""

from __future__ import annotations

import builtins
import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from .layers import Refused, activation, is_norm
from .tracing import graph_of, unfused_copy

FUNCTIONS: frozenset[Any] = frozenset(
    {
        *(functional.conv2d, functional.batch_norm, functional.relu, functional.relu_, functional.pad),
        *(functional.avg_pool2d, functional.max_pool2d, functional.dropout),
        *(torch.conv2d, torch.batch_norm, torch.relu, torch.relu_, torch.add, torch.mul, torch.cat, torch.concat),
        *(torch.flatten, torch.zeros, torch.zeros_like),
        *(operator.add, operator.iadd, operator.mul, operator.imul, operator.sub, operator.floordiv, operator.getitem),
        *(operator.eq, operator.ne),
        builtins.getattr,
    }
)
METHODS = frozenset(
    {
        *("add", "add_", "mul", "mul_", "relu", "relu_", "contiguous", "clone", "detach", "size"),
        *("view", "reshape", "flatten", "new_zeros", "new_empty", "zero_"),
    }
)


class _Tracer(fx.Tracer):
    """Goes into everything but torch's own modules, and what is known as a BatchNorm or an activation."""

    def __init__(self, block: nn.Module, channels: int) -> None:
        super().__init__()
        self._leaves = {m for m in block.modules() if is_norm(m) or activation(m) is not None}  # tried: not in a trace
        self._channels = channels

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self._leaves or super().is_leaf_module(m, module_qualified_name)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """A branch: only on the number of channels, which the weights tell."""
        node = obj.node
        if node.target in (operator.eq, operator.ne) and isinstance(node.args[1], int) and is_channels(node.args[0]):
            return bool(node.target(self._channels, node.args[1]))
        return super().to_bool(obj)


def is_channels(node: Any) -> bool:
    """Whether a node is `x.shape[1]` or `x.size(1)`, of the block's input."""
    if not isinstance(node, fx.Node) or node.args[1:] != (1,):
        return False
    of = node.args[0]
    if node.target is operator.getitem and isinstance(of, fx.Node) and of.args[1:] == ("shape",):
        of = of.args[0]
    elif node.target != "size":
        return False
    return isinstance(of, fx.Node) and of.op == "placeholder"


def check_forward(block: nn.Module, channels: int) -> None:
    """Refuse a block, of so many input channels, whose forward may compute something else than what the probe has seen.

    Raises:
        Refused: torch.fx cannot trace it, or it calls something that may act on other inputs only.
    """
    tracer = _Tracer(block, channels)
    shadow = unfused_copy(block)
    if tracer.is_leaf_module(block, "") or tracer.is_leaf_module(shadow, ""):
        return
    graph = graph_of(tracer, shadow, "cannot")
    for node in graph.nodes:
        known = METHODS if node.op == "call_method" else FUNCTIONS
        if node.op in ("call_method", "call_function") and node.target not in known:
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            raise Refused(f"calls {name}, which may act on inputs that were not tried")
