"""A whole basic block: 3x3, 3x3, and the shortcut."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import plan
from ..kernels.native import library
from ..settings import resolve_backend
from ..shapes import BasicBlock
from . import _common as common
from ._common import Layer, Spec, optional_spec
from .conv_bn_act import layer_runner

# The scales follow the shifts as positional arguments because autograd takes no keyword-only tensors.
library.define(
    "basic_block(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor? wd=None, Tensor? bd=None, "
    "Tensor? s1=None, Tensor? s2=None, Tensor? sd=None, *, int stride=1, int dilation=1, str backend='auto', "
    "str accuracy='strict') -> Tensor"
)


@common.typed
def basic_block(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    wd: Tensor | None = None,
    bd: Tensor | None = None,
    *,
    s1: Tensor | None = None,
    s2: Tensor | None = None,
    sd: Tensor | None = None,
    stride: int = 1,
    dilation: int = 1,
    backend: str = "auto",
    accuracy: str = "strict",
) -> Tensor:
    """`relu(conv3x3(h1, w2) * s2 + b2 + shortcut)`, the basic block of ResNet-18 and -34.

    `h1 = relu(conv3x3(x, w1, stride) * s1 + b1)`, both padded by their dilation, and the shortcut is x, or
    `conv1x1(x, wd, stride) * sd + bd`.

    Args:
        x: [N, C, H, W], float32, bfloat16, float16 or float64, any strides.
        w1: [M, C, 3, 3], dtype and device of x, as are the other weights.
        b1: float32 [M], as is s1. A scale of None is ones.
        w2: [K, M, 3, 3].
        b2: float32 [K], as are s2, bd and sd.
        wd: [K, C, 1, 1], the projection; None if the input is added as it is.
        bd: float32 [K], with wd.
        s1: scale of the first convolution.
        s2: scale of the second.
        sd: scale of the projection.
        stride: of the first 3x3 and of the projection.
        dilation: of both 3x3.
        backend: `"auto"`, or one by name: an error if it is missing or cannot run this.
        accuracy: `"strict"`, or `"fast"` to allow float32 Winograd F(4x4, 3x3).

    Returns:
        [N, K, P, Q] of x's dtype, channels_last if x is, else contiguous. Differentiable.

    Raises:
        InputError: an argument does not fit the others.
        BackendError: the backend asked for by name cannot run this.
    """
    return torch.ops.resnet_fused.basic_block.default(
        x,
        w1,
        b1,
        w2,
        b2,
        wd,
        bd,
        s1,
        s2,
        sd,
        stride=stride,
        dilation=dilation,
        backend=resolve_backend(backend),
        accuracy=accuracy,
    )


def _check(tensors: Sequence[Spec | None], stride: int, dilation: int, backend: str, accuracy: str) -> BasicBlock:
    x, w1, b1, w2, b2, wd, bd, s1, s2, sd = tensors
    assert x and w1 and w2  # the schema sees to it
    common.check_choices(backend, accuracy)
    common.check_input(x)
    common.check_number(1, stride=stride, dilation=dilation)
    n, c, h, w = x[0]
    common.check_weight("w1", w1, x, c, 1, (3, 3))
    mid = w1[0][0]
    common.check_weight("w2", w2, x, mid, 1, (3, 3))
    out = w2[0][0]
    for name, vector, channels in (("b1", b1, mid), ("s1", s1, mid), ("b2", b2, out), ("s2", s2, out)):
        common.check_vector(name, vector, x, channels)
    common.check_projection(x, wd, bd, sd, out, stride)
    return BasicBlock(n, c, h, w, mid, out, stride, dilation, wd is not None)


@functools.lru_cache(maxsize=4096)
def _prepare(
    tensors: tuple[Spec, ...], stride: int, dilation: int, backend: str, accuracy: str, state: plan.State
) -> plan.Choice:
    shape = _check(tensors, stride, dilation, backend, accuracy)
    _, dtype, device = tensors[0]
    return plan.choose(shape, dtype, device, backend, accuracy, state)


def _layers(tensors: Sequence[Any], stride: int, dilation: int) -> tuple[list[Layer], Layer | None]:
    _, w1, b1, w2, b2, wd, bd, s1, s2, sd = tensors
    d = (dilation, dilation)
    path = [
        Layer(w1, s1, b1, {"stride": (stride, stride), "padding": d, "dilation": d}),
        Layer(w2, s2, b2, {"padding": d, "dilation": d}),
    ]
    return path, None if wd is None else Layer(wd, sd, bd, {"stride": (stride, stride)})


def _run(
    *tensors: Any,
    stride: int = 1,
    dilation: int = 1,
    backend: str = "auto",
    accuracy: str = "strict",
) -> Tensor:
    tensors = common.pad(tensors, 10)
    choice = _prepare(
        tuple(map(optional_spec, tensors)), stride, dilation, backend, accuracy, plan.state(tensors[0].device)
    )
    plan.note(choice)
    x = tensors[0]
    if choice.empty:
        return common.empty_like_format(choice.shape.output_shape, x)
    if not choice.composed:
        y = common.KERNELS[choice.backend].basic_block(
            *tensors, stride=stride, dilation=dilation, algorithm=choice.algorithm
        )
    else:
        y = common.residual_block(*layer_runner(choice, x, accuracy), *_layers(tensors, stride, dilation))
    return common.like_format(y, x)


def _shape(
    *tensors: Any,
    stride: int = 1,
    dilation: int = 1,
    backend: str = "auto",
    accuracy: str = "strict",
) -> BasicBlock:
    tensors = common.pad(tensors, 10)
    return _check(tuple(map(optional_spec, tensors)), stride, dilation, backend, accuracy)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)
    ctx.geometry = [keyword_only_inputs[name] for name in ("stride", "dilation")]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, y = ctx.saved_tensors
    need_x, w1, b1, w2, b2, wd, bd, s1, s2, sd = common.pad(ctx.needs_input_grad, 10, False)
    layers = _layers(tensors, *ctx.geometry)
    grad_x, path, side = common.residual_block_backward(
        grad, tensors[0], y, *layers, need_x, [(w1, s1, b1), (w2, s2, b2)], (wd, sd, bd)
    )
    (w1, s1, b1), (w2, s2, b2), (wd, sd, bd) = *path, side
    return grad_x, w1, b1, w2, b2, wd, bd, s1, s2, sd


common.register("basic_block", _run, _shape, _setup_context, _backward)
