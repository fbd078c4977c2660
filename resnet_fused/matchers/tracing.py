"""What a module's forward does, by torch.fx: its graph, with the children as single nodes."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn

from ..fusion import Contents, is_own, original_class, unfused
from ..mixins import Fused
from .layers import Model, Refused


class _Tracer(fx.Tracer):
    def __init__(self, opened: Collection[nn.Module]) -> None:
        super().__init__()
        self._opened = opened

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self._opened


class _Reader:
    """Notes what is looked up on a module while its forward is traced; comes before its class.

    What that class does to its subclasses is not for this one.
    """

    def __init_subclass__(cls) -> None:
        pass

    def __getattribute__(self, name: str) -> Any:
        object.__getattribute__(self, "__dict__")["_fused_names"].add(name)
        return super().__getattribute__(name)


def unfused_copy(owner: nn.Module) -> nn.Module:
    """A shallow copy of a module, with its own forward: what that sets on itself during a trace are proxies."""
    cls = original_class(owner)
    if cls.forward is Fused.forward:  # of a module that fuses itself stands behind the mixin
        cls = next(base for base in cls.__mro__ if issubclass(base, nn.Module) and not issubclass(base, Fused))
    shadow = copy.copy(owner)
    shadow.__class__ = cls
    return shadow


def graph_of(tracer: fx.Tracer, shadow: nn.Module, cannot: str) -> fx.Graph:
    """The graph that a tracer makes of an unfused copy.

    Raises:
        Refused: it cannot; the message begins with `cannot`.
    """
    try:
        with torch.no_grad(), unfused():
            return tracer.trace(shadow)
    except Exception as error:
        message = " ".join(str(error).split())[:100]
        raise Refused(f"{cannot} be traced: {message}") from None


def trace(owner: nn.Module, model: Model, opened: Collection[nn.Module] = ()) -> fx.Graph:
    """The graph of a module's own forward, with its children as single nodes, but for what is in those that are opened.

    Raises:
        Refused: torch.fx cannot trace it.
    """
    if not opened and owner in model.graphs:
        return model.graphs[owner]
    shadow = unfused_copy(owner)
    shadow.__dict__["_fused_names"] = names = set[str]()
    shadow.__class__ = type(type(shadow).__name__, (_Reader, type(shadow)), {})
    contents = {name: Contents.of(value) for name, value in owner.__dict__.items() if is_own(name)}
    try:
        graph = graph_of(_Tracer(opened), shadow, f"the forward of {original_class(owner).__name__} cannot")
    finally:
        changed = {name for name, held in contents.items() if any([content.changed() for content in held])}
        for name in changed:
            for content in contents[name]:
                content.restore()
    if not opened:
        model.graphs[owner] = graph
        before, now = owner.__dict__, shadow.__dict__
        changed |= {name for name in names if now.get(name) is not before.get(name)}
        model.read[owner] = sorted(names - changed)
    return graph
