"""What a module's forward does, by torch.fx: its graph, with the children as single nodes."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import fx, nn

from ..fusion import original_class, unfused
from .layers import Model, Refused


class _Tracer(fx.Tracer):
    def __init__(self, opened: Collection[nn.Module]) -> None:
        super().__init__()
        self._opened = opened

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self._opened


def trace(owner: nn.Module, model: Model, opened: Collection[nn.Module] = ()) -> fx.Graph:
    """The graph of a module's own forward, with its children as single nodes, but for what is in those that are opened.

    Raises:
        Refused: torch.fx cannot trace it.
    """
    if not opened and owner in model.graphs:
        return model.graphs[owner]
    # A shallow copy, so that what the forward sets on itself does not stay: during the trace those are proxies.
    shadow = copy.copy(owner)
    shadow.__class__ = original_class(owner)
    try:
        with torch.no_grad(), unfused():
            graph = _Tracer(opened).trace(shadow)
    except Exception as error:
        message = " ".join(str(error).split())[:100]
        raise Refused(f"the forward of {type(shadow).__name__} cannot be traced: {message}") from None
    if not opened:
        model.graphs[owner] = graph
    return graph
