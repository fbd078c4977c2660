"""A whole forward as one call: the stem, the stages and what lies between them, where each only feeds the next.

What a module's forward calls one after another is known from torch.fx, where its source shows that it does so on every
call (see matchers/straight.py). On a CPU the first of those modules runs as many of them as can be recorded as one, and
the others, when the forward comes to them, pass their input on. CIFAR ResNet-56 in bfloat16 at batch 1 is then one call
instead of four, of 20 to 60 us each. Where the forward does nothing else at all, it need not run either.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from . import replay
from .fusion import CALL_ATTRIBUTES, Fusion, Watched, cover, hook_stores, original_class, uncover

Place = tuple[dict[str, nn.Module | None], str]
"""The children of a module, and one of their names."""


@runtime_checkable
class Member(Protocol):
    """A module that a route may go through: one of the mixins'."""

    def pieces(self) -> list[tuple[Fusion, nn.Module]] | None:
        """What it runs as, and the modules that are not called then; None: not of fused ops alone."""


MOST_FRAMES = 32
"""Between a member's forward and its owner's: those of nn.Module's calls, of hooks, of methods of the owner."""


class Mark:
    """What the members of a route carry, all but the first: a part alone does not hold the whole."""


class Candidate(NamedTuple):
    """What a route may be made of.

    Attributes:
        owner: the module whose forward it is; it gets the hooks `enter` and `leave`.
        members: the modules; those without a mixin do nothing in eval mode.
        places: where each is looked up on the way from the owner to it.
        methods: of the owner, that its forward is made of.
        ending: what the forward gives, if it does nothing but call the members: the last one's `"output"`, or that
            `"flattened"` and passed on by the linear layer of a head; None: it does more.
    """

    owner: nn.Module
    members: Sequence[nn.Module]
    places: Sequence[Sequence[Place]]
    methods: dict[str, Callable[..., Any]]
    ending: str | None


class Route:
    """Modules that `owner`'s forward calls in this order, each once, with the output of the one before, on every call.

    Args:
        candidate: the modules, fused by now.
    """

    def __init__(self, candidate: Candidate) -> None:
        owner, members, places, self.methods, self.ending = candidate
        self.owner = owner
        self.mark = Mark()
        self.members: list[nn.Module] = []
        self.fused: list[nn.Module] = []  # those with a mixin
        self.fusions: list[Fusion] = []
        self.blocks: list[nn.Module] = []
        self.stops: dict[int, int] = {}  # after how many pieces how many members are done
        containers: list[nn.Module] = []  # what is passed by with its own hooks
        inside: list[Place] = []
        for module, path in zip(members, places, strict=True):
            pieces = module.pieces() if isinstance(module, Member) else []
            if pieces is None:
                break
            self.members.append(module)
            self.fused += [module] if isinstance(module, Member) else []
            inside += path
            for fusion, block in pieces:
                self.fusions.append(fusion)
                self.blocks.append(block)
            if not any(block is module for _, block in pieces):
                containers.append(module)
                inside += [(module._modules, name) for name in module._modules] if pieces else []
            self.stops[len(self.fusions)] = len(self.members)
        self.reaches_end = len(self.members) == len(members)
        self.order = list(owner._modules.values()) if self._is_sequential() else []
        stages = [module._modules for module in containers if module._modules]
        self.watched = Watched(
            present=containers,
            hooks=[hooks for module in containers for hooks in hook_stores(module)],
            inside=inside,
            modules=[children[name] for children, name in inside],
            whole=stages,
            size=sum(map(len, stages)),
            owners=[owner],
            attributes=[],
            contents=[],
            norms=[],
            sources=[],
            weights=[],
            plain=[],
        )

    def __getstate__(self) -> dict[str, Any]:
        # Functions may have no name by which pickle finds them, and another body where they are read back.
        return {**self.__dict__, "methods": {name: _body(method) for name, method in self.methods.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        cls = original_class(self.owner)
        now = {name: getattr(cls, name, _gone) for name in self.methods}
        self.methods = {name: now[name] if _body(now[name]) == body else _gone for name, body in self.methods.items()}

    def entries(self) -> list[tuple[dict[str, Any], str, Any]]:
        """What shows that the members are still this route's and called as they were, as (dictionary, key, value)."""
        return [
            *((m.__dict__, "_fused_route", self.of(m)) for m in self.fused),
            *((m.__dict__, name, None) for m in (self.owner, *self.members) for name in CALL_ATTRIBUTES),
        ]

    def of(self, member: nn.Module) -> Route | Mark:
        """What a member carries."""
        return self if member is self.members[0] else self.mark

    def is_whole(self) -> bool:
        """Whether the owner's forward does nothing else."""
        return self.ending is not None and self.reaches_end

    def has_methods(self) -> bool:
        """Whether the owner's forward is still the one that was read."""
        # A subclass that was made of the fused class is another one.
        cls, own = type(self.owner), self.owner.__dict__
        cls = cls.__dict__.get("original_class", cls)
        if not all([getattr(cls, name, None) is method and name not in own for name, method in self.methods.items()]):
            return False
        return not self.order or list(self.owner._modules.values()) == self.order

    def _is_sequential(self) -> bool:
        """Whether the owner's children are what its forward is made of."""
        return self.methods["forward"] is nn.Sequential.forward

    def is_called(self) -> bool:
        """Whether it is the owner's forward that has called the first member, and not a hook or anybody else."""
        if not self.has_methods():
            return False
        frame: FrameType | None = sys._getframe(1)
        code = self.methods["forward"].__code__
        for _ in range(MOST_FRAMES):
            if frame is None:
                return False
            if frame.f_code is code:
                return any(value is self.owner for value in frame.f_locals.values())
            frame = frame.f_back
        return False

    def run(self, x: Tensor) -> Tensor | None:
        """The output of as many members as are one call, which the others then pass on; None: call them."""
        if x.device.type != "cpu" or not self.is_called():  # the latter looks at frames
            return None
        output, count = replay.run(self.fusions, x, self.blocks, self)
        if not count:
            return None
        cover(self.owner, self.members[1 : self.stops[count]], output)
        return output

    def run_whole(self, owner: nn.Module, x: Any) -> Tensor | None:
        """What `owner`'s forward, which was called with `x`, gives; None: it has to run."""
        # The owner's shallow copy has the same route.
        if owner is not self.owner or not isinstance(x, Tensor) or not self.has_methods():
            return None
        output, count = replay.run(self.fusions, x, self.blocks, self, whole=True)
        if not count:
            return None
        return output.flatten(1) if self.ending == "flattened" else output


def _gone() -> None:
    """Stands for a method that is not what it was."""


def _body(method: Any) -> tuple[Any, ...]:
    """What a function does, to compare with."""
    code = getattr(method, "__code__", None)
    return () if code is None else (code.co_code, code.co_consts, code.co_names, code.co_varnames)


def through(module: nn.Module, x: Any) -> Any:
    """The output of a module that a route goes through: what its first member computed, or what the input became.

    None if the module has to compute it itself.
    """
    if torch.compiler.is_compiling():
        return None
    route: Route | Mark | None = module._fused_route  # type: ignore[assignment]
    if route is None:
        return None
    if isinstance(route, Route):
        return route.run(x) if isinstance(x, Tensor) else None
    return x if uncover(module, x) else None
