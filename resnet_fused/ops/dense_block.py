"""A whole dense block in one buffer: every layer reads the channels before it and writes its own behind them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import plan
from ..errors import InputError
from ..kernels.layers import DenseLayer
from ..kernels.native import library
from ..settings import resolve_backend
from ..shapes import DenseBlock
from . import _common as common
from ._common import Spec, spec
from .conv_bn_act import conv_bn_act, layer_runner

library.define(
    "dense_block(Tensor x, Tensor[] in_scales, Tensor[] in_shifts, Tensor[] w1, Tensor[] s1, Tensor[] b1, Tensor[] w2, "
    "*, str backend='auto', str accuracy='strict') -> Tensor"
)

NAMES = ("in_scale", "in_shift", "w1", "s1", "b1", "w2")


@common.typed
def dense_block(x: Tensor, layers: Sequence[DenseLayer], *, backend: str = "auto", accuracy: str = "strict") -> Tensor:
    """The dense block of DenseNet (Huang et al., 2017, section 3), without a concatenation.

    Each layer computes `conv3x3(relu(conv1x1(relu(z * in_scale + in_shift), w1) * s1 + b1), w2)` of all channels z so
    far, or `conv3x3(relu(z * in_scale + in_shift), w2)` where it has no 1x1, and appends its output to them.

    Args:
        x: [N, C, H, W], float32, bfloat16, float16 or float64, any strides.
        layers: at least one; all with a 1x1 or none, all of the same growth.
        backend: `"auto"`, or one by name: an error if it is missing or cannot run this.
        accuracy: as for the other ops.

    Returns:
        [N, C + len(layers) * growth, H, W] of x's dtype, x first; channels_last if x is, else contiguous.
        Differentiable.

    Raises:
        InputError: an argument does not fit the others.
        BackendError: the backend asked for by name cannot run this.
    """
    found = [[t for t in column if t is not None] for column in zip(*layers, strict=True)] or [[] for _ in NAMES]
    for name, tensors in zip(NAMES, found, strict=True):
        if len(tensors) not in (0, len(layers)):
            raise InputError(f"{name} must be given for all {len(layers)} layers or for none, got {len(tensors)}")
    return torch.ops.resnet_fused.dense_block.default(x, *found, backend=resolve_backend(backend), accuracy=accuracy)


def _check(x: Spec, lists: Sequence[Sequence[Spec]], backend: str, accuracy: str) -> DenseBlock:
    common.check_choices(backend, accuracy)
    common.check_input(x)
    in_scales, in_shifts, w1, s1, b1, w2 = lists
    depth = len(w2)
    if depth < 1:
        raise InputError("layers must hold at least one layer, got none")
    for name, specs in (("in_scales", in_scales), ("in_shifts", in_shifts)):
        if len(specs) != depth:
            raise InputError(f"{name} must be one for each of the {depth} layers, got {len(specs)}")
    for name, specs in (("w1", w1), ("s1", s1), ("b1", b1)):
        if len(specs) != (depth if w1 else 0):
            raise InputError(
                f"{name} must be one for each of the {depth} layers, or w1, s1 and b1 none, got {len(specs)}"
            )
    n, c, h, w = x[0]
    growth, mid = w2[0][0][0], w1[0][0][0] if w1 else 0
    for i in range(depth):
        channels = c + i * growth
        common.check_vector(f"in_scales[{i}]", in_scales[i], x, channels)
        common.check_vector(f"in_shifts[{i}]", in_shifts[i], x, channels)
        if w1:
            common.check_weight(f"w1[{i}]", w1[i], x, channels, 1, (1, 1))
            common.check_outputs(f"w1[{i}]", w1[i], mid)
            common.check_vector(f"s1[{i}]", s1[i], x, mid)
            common.check_vector(f"b1[{i}]", b1[i], x, mid)
        common.check_weight(f"w2[{i}]", w2[i], x, mid or channels, 1, (3, 3))
        common.check_outputs(f"w2[{i}]", w2[i], growth)
    return DenseBlock(n, c, h, w, growth, depth, mid)


@functools.lru_cache(maxsize=4096)
def _prepare(
    x: Spec, lists: tuple[tuple[Spec, ...], ...], backend: str, accuracy: str, state: plan.State
) -> plan.Choice:
    return plan.choose(_check(x, lists, backend, accuracy), x[1], x[2], backend, accuracy, state)


def _layers(lists: Sequence[Sequence[Tensor]]) -> list[DenseLayer]:
    in_scales, in_shifts, w1, s1, b1, w2 = lists
    nothing = [None] * len(w2)
    first = (w1, s1, b1) if w1 else (nothing, nothing, nothing)
    return [DenseLayer(*layer) for layer in zip(in_scales, in_shifts, *first, w2, strict=True)]


def _run(x: Tensor, *lists: Sequence[Tensor], backend: str = "auto", accuracy: str = "strict") -> Tensor:
    specs = tuple(tuple(map(spec, tensors)) for tensors in lists)
    choice = _prepare(spec(x), specs, backend, accuracy, plan.state(x.device))
    plan.note(choice)
    if choice.empty:
        return common.empty_like_format(choice.shape.output_shape, x)
    if not choice.composed:
        y = common.KERNELS[choice.backend].dense_block(x, _layers(lists), algorithm=choice.algorithm)
    else:
        y = _in_one_buffer(choice, x, _layers(lists), accuracy)
    return common.like_format(y, x)


def _in_one_buffer(choice: plan.Choice, x: Tensor, layers: Sequence[DenseLayer], accuracy: str) -> Tensor:
    """The block layer by layer: each reads a slice of the buffer's channels and fills the next one."""
    layer, x = layer_runner(choice, x, accuracy)
    buffer = torch.empty(choice.shape.output_shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    end = x.shape[1]
    buffer[:, :end] = x
    for in_scale, in_shift, w1, s1, b1, w2 in layers:
        h, growth = buffer[:, :end], w2.shape[0]
        ends: tuple[Tensor | None, Tensor | None] = (in_scale, in_shift)
        if w1 is not None:
            h, ends = layer(h, w1, s1, b1, None, *ends), (None, None)
        new = buffer[:, end : end + growth]
        layer(h, w2, None, in_shift.new_zeros(growth), None, *ends, padding=(1, 1), activation="none", out=new)
        end += growth
    return buffer


def _shape(x: Tensor, *lists: Sequence[Tensor], backend: str = "auto", accuracy: str = "strict") -> DenseBlock:
    return _check(spec(x), [[spec(t) for t in tensors] for tensors in lists], backend, accuracy)


def _compose(x: Tensor, *lists: Sequence[Tensor], backend: str = "auto", accuracy: str = "strict") -> Tensor:
    layer = functools.partial(conv_bn_act, backend=backend, accuracy=accuracy)
    for in_scale, in_shift, w1, s1, b1, w2 in _layers(lists):
        h = x
        ends: tuple[Tensor | None, Tensor | None] = (in_scale, in_shift)
        if w1 is not None:
            assert b1 is not None
            h, ends = layer(h, w1, s1, b1, None, *ends), (None, None)
        new = layer(h, w2, None, in_shift.new_zeros(w2.shape[0]), None, *ends, padding=1, activation="none")
        x = torch.cat([x, new], 1)
    return x


common.register_composed("dense_block", _run, _shape, _compose)
