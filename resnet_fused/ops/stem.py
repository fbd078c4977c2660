"""The stem of a ResNet: convolution, scale and shift, ReLU, max pooling."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import plan
from ..errors import InputError
from ..kernels import reference
from ..kernels.native import library
from ..settings import resolve_backend
from ..shapes import Stem
from . import _common as common
from ._common import Spec, optional_spec, spec
from .conv_bn_act import layer_runner

library.define(
    "stem(Tensor x, Tensor weight, Tensor? scale, Tensor shift, *, int stride=2, int padding=3, int pool_kernel=3, "
    "int pool_stride=2, int pool_padding=1, str backend='auto', str accuracy='strict') -> Tensor"
)


@common.typed
def stem(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    *,
    stride: int = 2,
    padding: int = 3,
    pool_kernel: int = 3,
    pool_stride: int = 2,
    pool_padding: int = 1,
    backend: str = "auto",
    accuracy: str = "strict",
) -> Tensor:
    """`max_pool(relu(conv(x, weight) * scale + shift))`, the stem of a ResNet.

    Args:
        x: [N, C, H, W], float32, bfloat16, float16 or float64, any strides.
        weight: [K, C, R, S], dtype and device of x.
        scale: float32 [K], None for ones.
        shift: float32 [K].
        stride: of the convolution.
        padding: zeros around the image.
        pool_kernel: size of the pooling window.
        pool_stride: its stride.
        pool_padding: its padding, at most half the window.
        backend: `"auto"`, or one by name: an error if it is missing or cannot run this.
        accuracy: as for the other ops; changes nothing here.

    Returns:
        [N, K, P, Q] of x's dtype, channels_last if x is, else contiguous. Differentiable.

    Raises:
        InputError: an argument does not fit the others.
        BackendError: the backend asked for by name cannot run this.
    """
    return torch.ops.resnet_fused.stem.default(
        x,
        weight,
        scale,
        shift,
        stride=stride,
        padding=padding,
        pool_kernel=pool_kernel,
        pool_stride=pool_stride,
        pool_padding=pool_padding,
        backend=resolve_backend(backend),
        accuracy=accuracy,
    )


def _check(
    x: Spec,
    weight: Spec,
    scale: Spec | None,
    shift: Spec,
    stride: int,
    padding: int,
    pool_kernel: int,
    pool_stride: int,
    pool_padding: int,
    backend: str,
    accuracy: str,
) -> Stem:
    common.check_choices(backend, accuracy)
    common.check_input(x)
    common.check_number(1, stride=stride, pool_kernel=pool_kernel, pool_stride=pool_stride)
    common.check_number(0, padding=padding, pool_padding=pool_padding)
    if 2 * pool_padding > pool_kernel:
        raise InputError(f"pool_padding must be at most half of pool_kernel, {pool_kernel}, got {pool_padding}")
    n, c, h, w = x[0]
    common.check_weight("weight", weight, x, c, 1)
    k, _, r, s = weight[0]
    common.check_vector("scale", scale, x, k)
    common.check_vector("shift", shift, x, k)
    common.check_window("weight", (h, w), (r, s), (stride,) * 2, (padding,) * 2)
    shape = Stem(n, c, h, w, k, r, s, stride, padding, pool_kernel, pool_stride, pool_padding)
    _, _, p, q = shape.layers()[0].output_shape
    common.check_window("pool_kernel", (p, q), (pool_kernel,) * 2, (pool_stride,) * 2, (pool_padding,) * 2)
    return shape


@functools.lru_cache(maxsize=4096)
def _prepare(x: Spec, *arguments: Any) -> plan.Choice:
    *checked, state = arguments
    return plan.choose(_check(x, *checked), x[1], x[2], *checked[-2:], state)


def _run(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    *,
    stride: int = 2,
    padding: int = 3,
    pool_kernel: int = 3,
    pool_stride: int = 2,
    pool_padding: int = 1,
    backend: str = "auto",
    accuracy: str = "strict",
) -> Tensor:
    tensors = (spec(x), spec(weight), optional_spec(scale), spec(shift))
    pool = (pool_kernel, pool_stride, pool_padding)
    choice = _prepare(*tensors, stride, padding, *pool, backend, accuracy, plan.state(x.device))
    plan.note(choice)
    if choice.empty:
        return common.empty_like_format(choice.shape.output_shape, x)
    if not choice.composed:
        y = common.KERNELS[choice.backend].stem(
            x,
            weight,
            scale,
            shift,
            stride=stride,
            padding=padding,
            pool_kernel=pool_kernel,
            pool_stride=pool_stride,
            pool_padding=pool_padding,
            algorithm=choice.algorithm,
        )
    else:
        layer, image = layer_runner(choice, x, accuracy)
        y = layer(image, weight, scale, shift, stride=(stride, stride), padding=(padding, padding))
        y = torch.max_pool2d(y, *pool)
    return common.like_format(y, x)


def _shape(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    *,
    stride: int = 2,
    padding: int = 3,
    pool_kernel: int = 3,
    pool_stride: int = 2,
    pool_padding: int = 1,
    backend: str = "auto",
    accuracy: str = "strict",
) -> Stem:
    tensors = (spec(x), spec(weight), optional_spec(scale), spec(shift))
    return _check(*tensors, stride, padding, pool_kernel, pool_stride, pool_padding, backend, accuracy)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    names = ("stride", "padding", "pool_kernel", "pool_stride", "pool_padding")
    ctx.geometry = [keyword_only_inputs[name] for name in names]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    stride, padding, *pool = ([value, value] for value in ctx.geometry)
    geometry: dict[str, Any] = {"stride": stride, "padding": padding}
    x, weight, scale, shift = ctx.saved_tensors
    y = reference.conv_bn_act(x, weight, scale, shift, **geometry)
    rest = (*pool, [1, 1], False)
    _, indices = torch.ops.aten.max_pool2d_with_indices(y, *rest)
    grad = torch.ops.aten.max_pool2d_with_indices_backward(grad, y, *rest, indices)
    layer = (x, weight, scale, shift, y)
    return reference.conv_bn_act_backward(grad, *layer, needs=ctx.needs_input_grad, **geometry)[:4]


common.register("stem", _run, _shape, _setup_context, _backward)
