"""The full pre-activation residual block, basic or bottleneck."""

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
from ..shapes import PreActBlock
from . import _common as common
from ._common import Spec, optional_spec, spec
from .conv_bn_act import conv_bn_act, layer_runner

library.define(
    "preact_block(Tensor x, Tensor? in_scale, Tensor? in_shift, Tensor[] weights, Tensor?[] scales, Tensor[] shifts, "
    "Tensor? wd=None, *, int stride=1, int dilation=1, int groups=1, bool stride_in_1x1=False, str backend='auto', "
    "str accuracy='strict') -> Tensor"
)


@common.typed
def preact_block(
    x: Tensor,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    shifts: Sequence[Tensor],
    wd: Tensor | None = None,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    stride_in_1x1: bool = False,
    backend: str = "auto",
    accuracy: str = "strict",
) -> Tensor:
    """The full pre-activation block of "Identity Mappings in Deep Residual Networks" (He et al., 2016, figure 4e).

    With `z = relu(x * in_scale + in_shift)` it is `conv2(relu(conv1(z) * scale + shift)) + shortcut`, or the same with
    three convolutions, 1x1, 3x3 and 1x1. The shortcut is x, or z through the 1x1 projection `wd`.

    Args:
        x: [N, C, H, W], float32, bfloat16, float16 or float64, any strides.
        in_scale: float32 [C]; None where x is activated already, as in the first block of a network: z is x then.
        in_shift: float32 [C], or None.
        weights: [M, C, 3, 3] and [K, M, 3, 3], or [M, C, 1, 1], [M, M / groups, 3, 3] and [K, M, 1, 1].
        scales: float32, one of the output channels of each convolution, None for ones.
        shifts: float32, alike. ReLU follows each but the last.
        wd: [K, C, 1, 1], None for an identity shortcut.
        stride: of the first 3x3 and of the projection.
        dilation: of every 3x3, which is padded by as much.
        groups: of a bottleneck's 3x3.
        stride_in_1x1: a bottleneck's stride is in its first 1x1 instead.
        backend: `"auto"`, or one by name: an error if it is missing or cannot run this.
        accuracy: `"strict"`, or `"fast"` to allow float32 Winograd F(4x4, 3x3).

    Returns:
        [N, K, P, Q] of x's dtype, channels_last if x is, else contiguous. Differentiable.

    Raises:
        InputError: an argument does not fit the others.
        BackendError: the backend asked for by name cannot run this.
    """
    return torch.ops.resnet_fused.preact_block.default(
        x,
        in_scale,
        in_shift,
        weights,
        scales,
        shifts,
        wd,
        stride=stride,
        dilation=dilation,
        groups=groups,
        stride_in_1x1=stride_in_1x1,
        backend=resolve_backend(backend),
        accuracy=accuracy,
    )


def _check(
    x: Spec,
    in_scale: Spec | None,
    in_shift: Spec | None,
    weights: Sequence[Spec],
    scales: Sequence[Spec | None],
    shifts: Sequence[Spec],
    wd: Spec | None,
    stride: int,
    dilation: int,
    groups: int,
    stride_in_1x1: bool,
    backend: str,
    accuracy: str,
) -> PreActBlock:
    common.check_choices(backend, accuracy)
    common.check_input(x)
    common.check_number(1, stride=stride, dilation=dilation, groups=groups)
    n, c, h, w = x[0]
    common.check_prologue(x, in_scale, in_shift)
    count = len(weights)
    if count not in (2, 3):
        raise InputError(f"weights must be 2 (basic block) or 3 (bottleneck), got {count}")
    for name, values in (("scales", scales), ("shifts", shifts)):
        if len(values) != count:
            raise InputError(f"{name} must be one for each of the {count} weights, got {len(values)}")
    bottleneck = count == 3
    if not bottleneck and (groups > 1 or stride_in_1x1):
        what = f"groups={groups}" if groups > 1 else "stride_in_1x1=True"
        raise InputError(f"weights must be 3 for {what}, got 2")
    channels = c
    for i, weight in enumerate(weights):
        middle = bottleneck and i == 1
        size = (1, 1) if bottleneck and not middle else (3, 3)
        common.check_weight(f"weights[{i}]", weight, x, channels, groups if middle else 1, size)
        channels = weight[0][0]
        if middle:
            common.check_outputs("weights[1]", weight, weights[0][0][0])
        common.check_vector(f"scales[{i}]", scales[i], x, channels)
        common.check_vector(f"shifts[{i}]", shifts[i], x, channels)
    common.check_shortcut(x, wd, channels, stride)
    strides = (1, stride) if bottleneck and not stride_in_1x1 else (stride, 1)
    sizes = (n, c, h, w, weights[0][0][0], channels)
    return PreActBlock(*sizes, *strides, dilation, groups, wd is not None, bottleneck, in_scale is not None)


@functools.lru_cache(maxsize=4096)
def _prepare(x: Spec, *arguments: Any) -> plan.Choice:
    *checked, state = arguments
    return plan.choose(_check(x, *checked), x[1], x[2], *checked[-2:], state)


def _geometry(shape: PreActBlock) -> list[dict[str, Any]]:
    """Arguments of the layers, those of the projection last."""
    same = {"padding": (shape.dilation,) * 2, "dilation": (shape.dilation,) * 2}
    first, second = {"stride": (shape.stride1,) * 2}, {"stride": (shape.stride2,) * 2}
    path: list[dict[str, Any]] = [first | same, dict(same)]
    if shape.bottleneck:
        path = [dict(first), second | same | {"groups": shape.groups}, {}]
    path[-1]["activation"] = "none"
    return [*path, {"stride": (shape.stride1 * shape.stride2,) * 2, "activation": "none"}]


def _chain(
    layer: Any,
    shape: PreActBlock,
    x: Tensor,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    shifts: Sequence[Tensor],
    wd: Tensor | None,
) -> Tensor:
    """The block out of single layers, each computed by `layer`."""
    *path, projection = _geometry(shape)
    ends: tuple[Tensor | None, Tensor | None] = (in_scale, in_shift)
    side = x
    if wd is not None:
        side = layer(x, wd, None, shifts[-1].new_zeros(wd.shape[0]), None, *ends, **projection)
    h = x
    for weight, scale, shift, geometry in zip(weights[:-1], scales[:-1], shifts[:-1], path[:-1], strict=True):
        h = layer(h, weight, scale, shift, None, *ends, **geometry)
        ends = (None, None)
    return layer(h, weights[-1], scales[-1], shifts[-1], side, **path[-1])


def _specs(tensors: Sequence[Any]) -> tuple[Any, ...]:
    x, in_scale, in_shift, weights, scales, shifts, wd = common.pad(tensors, 7)
    lists = (tuple(map(spec, weights)), tuple(map(optional_spec, scales)), tuple(map(spec, shifts)))
    return spec(x), optional_spec(in_scale), optional_spec(in_shift), *lists, optional_spec(wd)


def _run(
    *tensors: Any,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    stride_in_1x1: bool = False,
    backend: str = "auto",
    accuracy: str = "strict",
) -> Tensor:
    geometry = (stride, dilation, groups, stride_in_1x1)
    choice = _prepare(*_specs(tensors), *geometry, backend, accuracy, plan.state(tensors[0].device))
    plan.note(choice)
    x, *rest = common.pad(tensors, 7)
    if choice.empty:
        return common.empty_like_format(choice.shape.output_shape, x)
    if not choice.composed:
        kernels = common.KERNELS[choice.backend]
        y = kernels.preact_block(x, *rest, stride=stride, dilation=dilation, algorithm=choice.algorithm)
    else:
        layer, x = layer_runner(choice, x, accuracy)
        assert isinstance(choice.shape, PreActBlock)
        y = _chain(layer, choice.shape, x, *rest)
    return common.like_format(y, tensors[0])


def _shape(
    *tensors: Any,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    stride_in_1x1: bool = False,
    backend: str = "auto",
    accuracy: str = "strict",
) -> PreActBlock:
    arguments = (*_specs(tensors), stride, dilation, groups, stride_in_1x1, backend, accuracy)
    return _check(*arguments)


def _compose(
    *tensors: Any,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    stride_in_1x1: bool = False,
    backend: str = "auto",
    accuracy: str = "strict",
) -> Tensor:
    arguments = (*_specs(tensors), stride, dilation, groups, stride_in_1x1, backend, accuracy)
    shape = _check(*arguments)
    layer = functools.partial(conv_bn_act, backend=backend, accuracy=accuracy)
    return _chain(layer, shape, *common.pad(tensors, 7))


common.register_composed("preact_block", _run, _shape, _compose)
