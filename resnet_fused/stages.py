"""Chains of identity bottlenecks in an nn.Sequential, which run as one op where a kernel may take them together.

The blocks stay fused each on its own. At every call it is looked at anew which of them form a chain: a hook on a block,
its train mode or another module in its place cut the chain there, and calling a block by itself gives its own output.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from . import ops
from .fusion import BottleneckFusion, Fusion, hook_stores, is_image
from .mixins import Fused
from .settings import resolve_backend


class FusedStage(Fused):
    """Runs neighbouring identity bottlenecks of an nn.Sequential as `ops.bottleneck_chain` where it may pay.

    That is on a GPU, where the plan then decides by measured times, and with the backend `"triton"`. On a CPU the
    blocks run one by one: no kernel there takes more than a block.
    """

    def fusions(self) -> Sequence[Fusion]:
        """None of its own: its blocks have theirs."""
        return ()

    def forward(self, input: Any) -> Any:
        """Each child or chain of them in turn."""
        if not is_image(input):
            return super(Fused, self).forward(input)  # type: ignore[misc]
        children: list[nn.Module] = list(self._modules.values())  # type: ignore[attr-defined]
        i = 0
        while i < len(children):
            chain = [*_chain(children[i:], input)]
            input = _run(chain, input) if len(chain) > 1 else children[i](input)
            i += max(1, len(chain))
        return input


def is_stage(fusions: Sequence[Fusion | None]) -> bool:
    """Whether two neighbours can be a chain, by what the children of an nn.Sequential run as, in order."""
    pairs = itertools.pairwise(fusions)
    return any(_is_identity(a) and _is_identity(b) and _width(a) == _width(b) for a, b in pairs)


def _is_identity(fusion: Fusion | None) -> TypeGuard[BottleneckFusion]:
    """Whether a block is a bottleneck that adds its input and keeps its size."""
    if type(fusion) is not BottleneckFusion or len(fusion.layers) != 3:
        return False
    options = fusion.options
    return options["stride"] == options["dilation"] == options["groups"] == 1


def _width(fusion: BottleneckFusion) -> tuple[int, ...]:
    """The shape of the first weight: channels between and around the 1x1 convolutions."""
    return fusion.convs[0].weight.shape


def _chain(children: Sequence[nn.Module], x: Tensor) -> list[BottleneckFusion]:
    """The blocks from the first child on that can run together now."""
    found: list[BottleneckFusion] = []
    for child in children:
        fusion = child._fused_op if isinstance(child, Fused) else None
        if not _is_identity(fusion) or not _together(found[0] if found else fusion, fusion, x):
            break
        if _watched(child) or fusion.why_unfused(x) is not None:
            break
        found.append(fusion)
    return found


def _together(first: BottleneckFusion, other: BottleneckFusion, x: Tensor) -> bool:
    """Whether a kernel may take the two, alike in width and settings, in one op."""
    settings = first.settings
    backend = resolve_backend(settings.backend)
    if backend != "triton" and not (backend == "auto" and x.is_cuda):
        return False
    return settings == other.settings and _width(first) == _width(other)


def _watched(block: nn.Module) -> bool:
    """Whether something looks at a block's input or output, or replaces its forward."""
    return any(hook_stores(block)) or "forward" in block.__dict__


def _run(chain: Sequence[BottleneckFusion], x: Tensor) -> Tensor:
    settings = chain[0].settings
    if settings.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weights, scales, shifts = zip(*(layer for fusion in chain for layer in fusion.arguments()), strict=True)
    options = {"backend": settings.backend, "accuracy": settings.accuracy}
    return ops.bottleneck_chain(x, weights, scales, shifts, **options)
