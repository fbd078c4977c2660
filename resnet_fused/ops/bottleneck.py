"""A whole bottleneck block: 1x1, 3x3, 1x1, and the shortcut."""

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
from ..shapes import Bottleneck
from . import _common as common
from ._common import Layer, Spec, optional_spec
from .conv_bn_act import layer_runner

# The scales follow the shifts as positional arguments because autograd takes no keyword-only tensors.
library.define(
    "bottleneck(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor w3, Tensor b3, Tensor? wd=None, "
    "Tensor? bd=None, Tensor? s1=None, Tensor? s2=None, Tensor? s3=None, Tensor? sd=None, *, int stride=1, "
    "int dilation=1, int groups=1, bool stride_in_1x1=False, str backend='auto', str accuracy='strict') -> Tensor"
)


@common.typed
def bottleneck(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    wd: Tensor | None = None,
    bd: Tensor | None = None,
    *,
    s1: Tensor | None = None,
    s2: Tensor | None = None,
    s3: Tensor | None = None,
    sd: Tensor | None = None,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    stride_in_1x1: bool = False,
    backend: str = "auto",
    accuracy: str = "strict",
) -> Tensor:
    """`relu(conv1x1(h2, w3) * s3 + b3 + shortcut)`, the bottleneck block of ResNet, Wide ResNet and ResNeXt.

    `h1 = relu(conv1x1(x, w1) * s1 + b1)`, `h2 = relu(conv3x3(h1, w2, padding=dilation) * s2 + b2)`, and the shortcut is
    x, or `conv1x1(x, wd, stride) * sd + bd`.

    Args:
        x: [N, C, H, W], float32, bfloat16, float16 or float64, any strides.
        w1: [M, C, 1, 1], dtype and device of x, as are the other weights.
        b1: float32 [M], as are s1, b2 and s2. A scale of None is ones.
        w2: [M, M / groups, 3, 3].
        b2: float32 [M].
        w3: [K, M, 1, 1].
        b3: float32 [K], as are s3, bd and sd.
        wd: [K, C, 1, 1], the projection; None if the input is added as it is.
        bd: float32 [K], with wd.
        s1: scale of the first convolution.
        s2: scale of the second.
        s3: scale of the third.
        sd: scale of the projection.
        stride: of the block.
        dilation: of the 3x3.
        groups: of the 3x3.
        stride_in_1x1: the stride is the first 1x1's instead of the 3x3's.
        backend: `"auto"`, or one by name: an error if it is missing or cannot run this.
        accuracy: `"strict"`, or `"fast"` to allow float32 Winograd F(4x4, 3x3).

    Returns:
        [N, K, P, Q] of x's dtype, channels_last if x is, else contiguous. Differentiable.

    Raises:
        InputError: an argument does not fit the others.
        BackendError: the backend asked for by name cannot run this.
    """
    return torch.ops.resnet_fused.bottleneck.default(
        x,
        w1,
        b1,
        w2,
        b2,
        w3,
        b3,
        wd,
        bd,
        s1,
        s2,
        s3,
        sd,
        stride=stride,
        dilation=dilation,
        groups=groups,
        stride_in_1x1=stride_in_1x1,
        backend=resolve_backend(backend),
        accuracy=accuracy,
    )


def _check(
    tensors: Sequence[Spec | None],
    stride: int,
    dilation: int,
    groups: int,
    stride_in_1x1: bool,
    backend: str,
    accuracy: str,
) -> Bottleneck:
    x, w1, b1, w2, b2, w3, b3, wd, bd, s1, s2, s3, sd = tensors
    assert x and w1 and w2 and w3  # the schema sees to it
    common.check_choices(backend, accuracy)
    common.check_input(x)
    common.check_number(1, stride=stride, dilation=dilation, groups=groups)
    n, c, h, w = x[0]
    common.check_weight("w1", w1, x, c, 1, (1, 1))
    mid = w1[0][0]
    common.check_weight("w2", w2, x, mid, groups, (3, 3))
    if w2[0][0] != mid:
        raise InputError(f"w2.shape[0] must be w1's {mid} output channels, got {w2[0][0]}")
    common.check_weight("w3", w3, x, mid, 1, (1, 1))
    out = w3[0][0]
    for name, vector, channels in (("b1", b1, mid), ("b2", b2, mid), ("b3", b3, out)):
        common.check_vector(name, vector, x, channels)
    for name, vector, channels in (("s1", s1, mid), ("s2", s2, mid), ("s3", s3, out)):
        common.check_vector(name, vector, x, channels)
    common.check_projection(x, wd, bd, sd, out, stride)
    strides = (stride, 1) if stride_in_1x1 else (1, stride)
    return Bottleneck(n, c, h, w, mid, out, *strides, dilation, groups, wd is not None)


@functools.lru_cache(maxsize=4096)
def _prepare(
    tensors: tuple[Spec, ...],
    stride: int,
    dilation: int,
    groups: int,
    stride_in_1x1: bool,
    backend: str,
    accuracy: str,
    state: plan.State,
) -> plan.Choice:
    shape = _check(tensors, stride, dilation, groups, stride_in_1x1, backend, accuracy)
    _, dtype, device = tensors[0]
    return plan.choose(shape, dtype, device, backend, accuracy, state)


def _layers(
    tensors: Sequence[Any], stride: int, dilation: int, groups: int, stride_in_1x1: bool
) -> tuple[list[Layer], Layer | None]:
    _, w1, b1, w2, b2, w3, b3, wd, bd, s1, s2, s3, sd = tensors
    first, second = (stride, 1) if stride_in_1x1 else (1, stride)
    d = (dilation, dilation)
    path = [
        Layer(w1, s1, b1, {"stride": (first, first)}),
        Layer(w2, s2, b2, {"stride": (second, second), "padding": d, "dilation": d, "groups": groups}),
        Layer(w3, s3, b3, {}),
    ]
    return path, None if wd is None else Layer(wd, sd, bd, {"stride": (stride, stride)})


def _run(
    *tensors: Any,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    stride_in_1x1: bool = False,
    backend: str = "auto",
    accuracy: str = "strict",
) -> Tensor:
    tensors = common.pad(tensors, 13)
    geometry = (stride, dilation, groups, stride_in_1x1)
    choice = _prepare(tuple(map(optional_spec, tensors)), *geometry, backend, accuracy, plan.state(tensors[0].device))
    plan.note(choice)
    x = tensors[0]
    if choice.empty:
        return common.empty_like_format(choice.shape.output_shape, x)
    if not choice.composed:
        stride1, stride2 = (stride, 1) if stride_in_1x1 else (1, stride)
        y = common.KERNELS[choice.backend].bottleneck(
            *tensors, stride1=stride1, stride2=stride2, dilation=dilation, algorithm=choice.algorithm
        )
    else:
        y = common.residual_block(*layer_runner(choice, x, accuracy), *_layers(tensors, *geometry))
    return common.like_format(y, x)


def _shape(
    *tensors: Any,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    stride_in_1x1: bool = False,
    backend: str = "auto",
    accuracy: str = "strict",
) -> Bottleneck:
    tensors = common.pad(tensors, 13)
    specs = tuple(map(optional_spec, tensors))
    return _check(specs, stride, dilation, groups, stride_in_1x1, backend, accuracy)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)
    ctx.geometry = [keyword_only_inputs[name] for name in ("stride", "dilation", "groups", "stride_in_1x1")]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, y = ctx.saved_tensors
    need_x, w1, b1, w2, b2, w3, b3, wd, bd, s1, s2, s3, sd = common.pad(ctx.needs_input_grad, 13, False)
    grad_x, path, side = common.residual_block_backward(
        grad,
        tensors[0],
        y,
        *_layers(tensors, *ctx.geometry),
        need_x,
        [(w1, s1, b1), (w2, s2, b2), (w3, s3, b3)],
        (wd, sd, bd),
    )
    (w1, s1, b1), (w2, s2, b2), (w3, s3, b3), (wd, sd, bd) = *path, side
    return grad_x, w1, b1, w2, b2, w3, b3, wd, bd, s1, s2, s3, sd


common.register("bottleneck", _run, _shape, _setup_context, _backward)
