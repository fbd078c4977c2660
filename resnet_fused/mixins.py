"""Mixins that let a module run as one op in eval mode, and go back to its own forward whenever it has to.

A fused module is the module it was before: the same object with the same children, parameters and hooks, whose class is
now a subclass with one of these mixins in front. Nothing is renamed, and giving the class back unfuses it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import replay
from .fusion import Fusion
from .route import Mark, Route, through

FUSED_ATTRIBUTES = ("_fused_op", "_fused_steps", "_fused_route", "_fused_whole")  # what fusing adds to a module


class Fused:
    """Runs `_fused_op` in place of the forward of the class behind it."""

    _fused_op: Fusion | None = None
    _fused_route: Route | Mark | None = None

    def fusions(self) -> Sequence[Fusion]:
        """What of this module runs as fused ops."""
        return () if self._fused_op is None else (self._fused_op,)

    def pieces(self) -> list[tuple[Fusion, nn.Module]] | None:
        """What it runs as, with the modules that are not called then; None if that is not fused ops alone."""
        alone = type(self)._fused_output is Fused._fused_output and type(self).forward is Fused.forward
        return [(self._fused_op, self)] if alone and self._fused_op is not None else None  # type: ignore[list-item]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The fused op in eval mode, the original forward otherwise."""
        if args and isinstance(args[0], fx.Proxy) and getattr(args[0].tracer, "root", None) is not self:
            return call_module(self, args, kwargs)
        fusion = self._fused_op
        if fusion is not None and not kwargs and len(args) == 1:
            output = through(self, args[0])  # type: ignore[arg-type]
            if output is None:
                output = self._fused_output(fusion, args[0])
            if output is not None:
                return output
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def _fused_output(self, fusion: Fusion, x: Any) -> Any:
        """None if the original forward has to run."""
        return run_fused(fusion, x)

    # What may change a tensor without a trace on it: fold again afterwards.

    def train(self, mode: bool = True) -> nn.Module:
        """As in torch.nn.Module; `eval()` folds the BatchNorms again."""
        self._refold()
        return super().train(mode)  # type: ignore[misc]

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        self._refold()
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._refold()
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]

    def _refold(self) -> None:
        for fusion in self.fusions():
            fusion.refold()

    def extra_repr(self) -> str:
        """As in torch.nn.Module, with the fused ops."""
        own = super().extra_repr()  # type: ignore[misc]
        return ", ".join([*filter(None, [own]), *(f"fused={fusion.op}" for fusion in self.fusions())])


class Skipped(Fused):
    """Passes its input on where the module at the head of its chain has computed the output already."""

    def fusions(self) -> Sequence[Fusion]:
        """None of its own."""
        return ()

    def pieces(self) -> list[tuple[Fusion, nn.Module]]:
        """None of its own."""
        return []

    def _fused_output(self, fusion: Fusion, x: Any) -> Any:
        return x if fusion.why_unfused(x) is None else None


class Whole:
    """Runs its whole forward as one call where that is a route (see route.py), the original one otherwise.

    It has no fusion of its own. It may be a whole model, with methods and children of any name: it adds none to them.
    """

    _fused_whole: Route | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The route's output in eval mode, the original forward otherwise."""
        route = self._fused_whole
        if route is not None and len(args) == 1 and not kwargs and not torch.compiler.is_compiling():
            output = route.run_whole(self, args[0])  # type: ignore[arg-type]
            if output is not None:
                return output
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def run_fused(fusion: Fusion, x: Any) -> Any:
    """The output of a piece, None if its original modules have to run now."""
    if not isinstance(x, Tensor):
        return None  # they say what they expect
    output, count = replay.run((fusion,), x)
    if count:
        return output
    return fusion.run(x) if fusion.why_unfused(x) is None else None


def call_module(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of `module` in the graph that torch.fx traces: fused modules stay whole there, and fused."""
    tracer = args[0].tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)


@functools.cache
def fused_class(mixin: type[Fused | Whole], original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `original` that `mixin` makes run fused; always the same one for the same two."""

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so pickle and copy have to make it again, from its two parents, for what they
        # make as one of the second.
        make, args, *state = super(cls, self).__reduce_ex__(protocol)
        return (_rebuild, (mixin, original, make, *(original if arg is cls else arg for arg in args)), *state)

    body = {"__reduce_ex__": reduce, "__module__": __name__, "__doc__": original.__doc__, "original_class": original}
    cls: Any = type(f"Fused{original.__name__}", (mixin, original), body)
    if mixin is Whole:  # it may be a whole model, whose name and arguments people and torch.fx look up

        @functools.wraps(original.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return Whole.forward(self, *args, **kwargs)

        # Not in the body: what the original class does to its subclasses is not for these.
        cls.forward = forward
        cls.__name__, cls.__qualname__, cls.__module__ = original.__name__, original.__qualname__, original.__module__
    return cls


def _rebuild(mixin: type[Fused | Whole], original: type[nn.Module], make: Any, *args: Any) -> nn.Module:
    module: nn.Module = make(*args)
    if type(module) is original:
        module.__class__ = fused_class(mixin, original)  # type: ignore[arg-type]
    return module
