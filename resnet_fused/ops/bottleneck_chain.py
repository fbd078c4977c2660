"""A chain of identity bottlenecks: what follows the first block of a stage of ResNet-50 and larger."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import plan
from ..errors import InputError
from ..kernels.native import library
from ..settings import resolve_backend
from ..shapes import BottleneckChain
from . import _common as common
from ._common import Spec, optional_spec, spec

library.define(
    "bottleneck_chain(Tensor x, Tensor[] weights, Tensor?[] scales, Tensor[] shifts, *, str backend='auto', "
    "str accuracy='strict') -> Tensor"
)


@common.typed
def bottleneck_chain(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    shifts: Sequence[Tensor],
    *,
    backend: str = "auto",
    accuracy: str = "strict",
) -> Tensor:
    """`ops.bottleneck` with an identity shortcut, stride 1 and one group, several times over.

    As a kernel of its own (backends `"cuda"` and `"triton"`) every launch but the first computes one block's 3x3 and
    last 1x1 and the next block's first 1x1, which needs no pixel's neighbours. Elsewhere the blocks run one after the
    other.

    Args:
        x: [N, C, H, W], float32, bfloat16, float16 or float64, any strides.
        weights: three of each block in order, dtype and device of x: [M, C, 1, 1], [M, M, 3, 3] and [C, M, 1, 1], with
            one M for all blocks.
        scales: float32, one of the output channels of each weight; None for ones.
        shifts: float32, alike.
        backend: `"auto"`, or one by name: an error if it is missing or cannot run this.
        accuracy: `"strict"`, or `"fast"` to allow float32 Winograd F(4x4, 3x3).

    Returns:
        [N, C, H, W] of x's dtype, channels_last if x is, else contiguous. Differentiable.

    Raises:
        InputError: an argument does not fit the others.
        BackendError: the backend asked for by name cannot run this.
    """
    op = torch.ops.resnet_fused.bottleneck_chain.default
    return op(x, weights, scales, shifts, backend=resolve_backend(backend), accuracy=accuracy)


def _check(
    x: Spec,
    weights: Sequence[Spec],
    scales: Sequence[Spec | None],
    shifts: Sequence[Spec],
    backend: str,
    accuracy: str,
) -> BottleneckChain:
    common.check_choices(backend, accuracy)
    common.check_input(x)
    n, c, h, w = x[0]
    count = len(weights)
    if not count or count % 3:
        raise InputError(f"weights must be 3 for each of one or more blocks, got {count}")
    for name, values in (("scales", scales), ("shifts", shifts)):
        if len(values) != count:
            raise InputError(f"{name} must be one for each of the {count} weights, got {len(values)}")
    mid = weights[0][0][0]
    for i, weight in enumerate(weights):
        middle, last = i % 3 == 1, i % 3 == 2
        channels = c if last else mid
        size = (3, 3) if middle else (1, 1)
        common.check_weight(f"weights[{i}]", weight, x, mid if middle or last else c, 1, size)
        common.check_outputs(f"weights[{i}]", weight, channels)
        common.check_vector(f"scales[{i}]", scales[i], x, channels)
        common.check_vector(f"shifts[{i}]", shifts[i], x, channels)
    return BottleneckChain(n, c, h, w, mid, count // 3)


@functools.lru_cache(maxsize=4096)
def _prepare(x: Spec, *arguments: Any) -> plan.Choice:
    *checked, state = arguments
    return plan.choose(_check(x, *checked), x[1], x[2], *checked[-2:], state)


def _specs(
    x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor | None], shifts: Sequence[Tensor]
) -> tuple[Spec, tuple[Spec, ...], tuple[Spec | None, ...], tuple[Spec, ...]]:
    return spec(x), tuple(map(spec, weights)), tuple(map(optional_spec, scales)), tuple(map(spec, shifts))


def _one_by_one(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    shifts: Sequence[Tensor],
    backend: str,
    accuracy: str,
) -> Tensor:
    """The chain out of single blocks."""
    block = torch.ops.resnet_fused.bottleneck.default
    for i in range(0, len(weights), 3):
        w1, w2, w3 = weights[i : i + 3]
        b1, b2, b3 = shifts[i : i + 3]
        x = block(x, w1, b1, w2, b2, w3, b3, None, None, *scales[i : i + 3], backend=backend, accuracy=accuracy)
    return x


def _run(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    shifts: Sequence[Tensor],
    *,
    backend: str = "auto",
    accuracy: str = "strict",
) -> Tensor:
    choice = _prepare(*_specs(x, weights, scales, shifts), backend, accuracy, plan.state(x.device))
    plan.note(choice)
    if choice.empty:
        return common.empty_like_format(choice.shape.output_shape, x)
    if choice.composed:
        return _one_by_one(x, weights, scales, shifts, backend, accuracy)
    y = common.KERNELS[choice.backend].bottleneck_chain(x, weights, scales, shifts, algorithm=choice.algorithm)
    return common.like_format(y, x)


def _shape(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    shifts: Sequence[Tensor],
    *,
    backend: str = "auto",
    accuracy: str = "strict",
) -> BottleneckChain:
    return _check(*_specs(x, weights, scales, shifts), backend, accuracy)


def _compose(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    shifts: Sequence[Tensor],
    *,
    backend: str = "auto",
    accuracy: str = "strict",
) -> Tensor:
    _check(*_specs(x, weights, scales, shifts), backend, accuracy)
    return _one_by_one(x, weights, scales, shifts, backend, accuracy)


common.register_composed("bottleneck_chain", _run, _shape, _compose)
