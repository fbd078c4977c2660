"""Neighbours in an nn.Sequential, which run together where that may pay.

The blocks stay fused each on its own. At every call it is looked at anew which of them form a chain: a hook on a block,
its train mode or another module in its place cut the chain there, and calling a block by itself gives its own output.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn

from . import ops, plan, replay
from .fusion import BottleneckFusion, Fusion, is_image, is_watched
from .mixins import Fused, run_fused
from .route import through
from .settings import resolve_backend

Step = tuple[tuple[nn.Module, ...], Fusion | None]
"""Neighbours in an nn.Sequential, and what runs them as one; None: they are called."""


class FusedStage(Fused):
    """Runs neighbouring blocks of an nn.Sequential together where it may pay.

    On a CPU they are recorded once and then are one call (see replay.py). On a GPU, and with the backends `"cuda"` and
    `"triton"`, identity bottlenecks may run as `ops.bottleneck_chain`; the plan then decides by measured times.
    """

    def fusions(self) -> Sequence[Fusion]:
        """None of its own: its blocks have theirs."""
        return ()

    def pieces(self) -> list[tuple[Fusion, nn.Module]] | None:
        """What its children run as, if all are fused."""
        return _pieces([((child,), None) for child in self._modules.values()])  # type: ignore[attr-defined]

    def forward(self, input: Any) -> Any:
        """Each child, or several neighbours at once, in turn."""
        if not is_image(input):
            return super(Fused, self).forward(input)  # type: ignore[misc]
        if (output := through(self, input)) is not None:  # type: ignore[arg-type]
            return output
        children: list[nn.Module] = list(self._modules.values())  # type: ignore[attr-defined]
        i = 0
        while i < len(children):
            input, count = _run(children[i:], input)
            i += count
        return input


class FusedSequential(Fused):
    """Runs neighbours in an nn.Sequential as one op; the children themselves stay as they are.

    On a CPU several such steps, and children that are fused each on its own, are recorded once and then are one call.
    """

    _fused_steps: tuple[list[nn.Module], list[Step]] | None = None

    def fusions(self) -> Sequence[Fusion]:
        """The fused neighbours, in order."""
        return () if self._fused_steps is None else [fusion for _, fusion in self._fused_steps[1] if fusion is not None]

    def pieces(self) -> list[tuple[Fusion, nn.Module]] | None:
        """What its steps run as, if all are fused."""
        return None if self._fused_steps is None else _pieces(self._fused_steps[1])

    def forward(self, input: Any) -> Any:
        """Each child, group of fused ones, or several of those at once, in turn."""
        steps = self._fused_steps
        children = list(self._modules.values())  # type: ignore[attr-defined]
        if isinstance(input, fx.Proxy) or steps is None or children != steps[0]:
            return super(Fused, self).forward(input)  # type: ignore[misc]
        if (output := through(self, input)) is not None:  # type: ignore[arg-type]
            return output
        i = 0
        while i < len(steps[1]):
            input, count = _run_steps(steps[1][i:], input)
            i += count
        return input


def is_stage(fusions: Sequence[Fusion | None]) -> bool:
    """Whether two neighbours may run together, by what the children of an nn.Sequential run as, in order."""
    return any(a is not None and b is not None for a, b in itertools.pairwise(fusions))


def _run(children: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, int]:
    """Run the first child, or as many as may run together; the output, and how many they were."""
    fusions = _leading(map(_fusion, children))
    blocks = children[: len(fusions)]
    if len(blocks) > 1:
        output, count = replay.run(fusions, x, blocks)
        if count:
            return output, count
        chain = _chain(blocks, x)
        if len(chain) > 1:
            return _run_chain(chain, x), len(chain)
    return children[0](x), 1


def _run_steps(steps: Sequence[Step], x: Any) -> tuple[Any, int]:
    """Run the first step, or as many as may run together; the output, and how many they were."""
    fusions = _leading(map(_step_fusion, steps))
    if len(fusions) > 1 and is_image(x):
        heads = [modules[0] for modules, _ in steps[: len(fusions)]]
        output, count = replay.run(fusions, x, heads)
        if count:
            return output, count
    modules, fusion = steps[0]
    if fusion is not None and (fused := run_fused(fusion, x)) is not None:
        return fused, 1
    for module in modules:
        x = module(x)
    return x, 1


def _leading(fusions: Iterable[Fusion | None]) -> list[Fusion]:
    """Those before the first None; not by itertools.takewhile, which torch.compile of torch 2.11 does not know."""
    found = []
    for fusion in fusions:
        if fusion is None:
            break
        found.append(fusion)
    return found


def _step_fusion(step: Step) -> Fusion | None:
    """What a step runs as, if that is one op."""
    modules, fusion = step
    return fusion or (_fusion(modules[0]) if len(modules) == 1 else None)


def _pieces(steps: Sequence[Step]) -> list[tuple[Fusion, nn.Module]] | None:
    """What the steps run as, each with its first module; None if one of them is called."""
    found = [(_step_fusion(step), step[0][0]) for step in steps]
    pieces = [(fusion, module) for fusion, module in found if fusion is not None]
    return pieces if len(pieces) == len(found) else None


def _fusion(child: Any) -> Fusion | None:
    """What a child runs as, if that is one op by itself."""
    alone = getattr(type(child), "_fused_output", None) is Fused._fused_output
    return child._fused_op if alone else None


def _is_identity(fusion: Fusion | None) -> TypeGuard[BottleneckFusion]:
    """Whether a block is a bottleneck that adds its input and keeps its size."""
    if type(fusion) is not BottleneckFusion or len(fusion.layers) != 3:
        return False
    options = fusion.options
    return options["stride"] == options["dilation"] == options["groups"] == 1


def _width(fusion: BottleneckFusion) -> tuple[int, ...]:
    """The shape of the first weight: channels between and around the 1x1 convolutions."""
    return fusion.convs[0].weight.shape


def _chain(children: Sequence[Any], x: Tensor) -> list[BottleneckFusion]:
    """The blocks from the first child on that can run together now."""
    found: list[BottleneckFusion] = []
    for child in children:
        fusion = child._fused_op
        if not _is_identity(fusion) or not _together(found[0] if found else fusion, fusion, x):
            break
        if is_watched(child) or fusion.why_unfused(x) is not None:
            break
        found.append(fusion)
    return found


def _together(first: BottleneckFusion, other: BottleneckFusion, x: Tensor) -> bool:
    """Whether a kernel may take the two, alike in width and settings, in one op."""
    settings = first.settings
    backend = resolve_backend(settings.backend)
    if backend not in plan.GPU_KERNELS and not (backend == "auto" and x.is_cuda):
        return False
    return settings == other.settings and _width(first) == _width(other)


def _run_chain(chain: Sequence[BottleneckFusion], x: Tensor) -> Tensor:
    settings = chain[0].settings
    if settings.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weights, scales, shifts = zip(*(layer for fusion in chain for layer in fusion.arguments()), strict=True)
    options = {"backend": settings.backend, "accuracy": settings.accuracy}
    return ops.bottleneck_chain(x, weights, scales, shifts, **options)
