"""The transition between two dense blocks: scale and shift, ReLU, 1x1 convolution, average pooling."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import plan
from ..kernels import reference
from ..kernels.native import library
from ..settings import resolve_backend
from ..shapes import Transition
from . import _common as common
from ._common import Spec, spec
from .conv_bn_act import conv_bn_act, layer_runner

library.define(
    "transition(Tensor x, Tensor in_scale, Tensor in_shift, Tensor weight, *, str backend='auto', "
    "str accuracy='strict') -> Tensor"
)


@common.typed
def transition(
    x: Tensor, in_scale: Tensor, in_shift: Tensor, weight: Tensor, *, backend: str = "auto", accuracy: str = "strict"
) -> Tensor:
    """`avg_pool2d(conv(relu(x * in_scale + in_shift), weight), 2)`, a transition of DenseNet (section 3).

    The average is taken before the 1x1 convolution, with which it commutes: a quarter of the multiply-adds.

    Args:
        x: [N, C, H, W], float32, bfloat16, float16 or float64, any strides.
        in_scale: float32 [C].
        in_shift: float32 [C].
        weight: [K, C, 1, 1], dtype and device of x.
        backend: `"auto"`, or one by name: an error if it is missing or cannot run this.
        accuracy: as for the other ops; changes nothing here.

    Returns:
        [N, K, H // 2, W // 2] of x's dtype, channels_last if x is, else contiguous. Differentiable.

    Raises:
        InputError: an argument does not fit the others.
        BackendError: the backend asked for by name cannot run this.
    """
    backend = resolve_backend(backend)
    return torch.ops.resnet_fused.transition.default(x, in_scale, in_shift, weight, backend=backend, accuracy=accuracy)


def _check(x: Spec, in_scale: Spec, in_shift: Spec, weight: Spec, backend: str, accuracy: str) -> Transition:
    common.check_choices(backend, accuracy)
    common.check_input(x)
    n, c, h, w = x[0]
    common.check_prologue(x, in_scale, in_shift)
    common.check_weight("weight", weight, x, c, 1, (1, 1))
    common.check_window("pooling window", (h, w), (2, 2), (2, 2), (0, 0))
    return Transition(n, c, h, w, weight[0][0])


@functools.lru_cache(maxsize=4096)
def _prepare(x: Spec, *arguments: Any) -> plan.Choice:
    *checked, state = arguments
    return plan.choose(_check(x, *checked), x[1], x[2], *checked[-2:], state)


def _run(
    x: Tensor, in_scale: Tensor, in_shift: Tensor, weight: Tensor, *, backend: str = "auto", accuracy: str = "strict"
) -> Tensor:
    specs = map(spec, (x, in_scale, in_shift, weight))
    choice = _prepare(*specs, backend, accuracy, plan.state(x.device))
    plan.note(choice)
    if choice.empty:
        return common.empty_like_format(choice.shape.output_shape, x)
    if not choice.composed:
        y = common.KERNELS[choice.backend].transition(x, in_scale, in_shift, weight, algorithm=choice.algorithm)
    else:
        layer, image = layer_runner(choice, x, accuracy)
        pooled = reference.pooled_prologue(image, in_scale, in_shift)
        y = layer(pooled, weight, None, in_shift.new_zeros(weight.shape[0]), activation="none")
    return common.like_format(y, x)


def _shape(
    x: Tensor, in_scale: Tensor, in_shift: Tensor, weight: Tensor, *, backend: str = "auto", accuracy: str = "strict"
) -> Transition:
    return _check(spec(x), spec(in_scale), spec(in_shift), spec(weight), backend, accuracy)


def _compose(
    x: Tensor, in_scale: Tensor, in_shift: Tensor, weight: Tensor, *, backend: str = "auto", accuracy: str = "strict"
) -> Tensor:
    pooled = reference.pooled_prologue(x, in_scale, in_shift)
    shift = in_shift.new_zeros(weight.shape[0])
    return conv_bn_act(pooled, weight, None, shift, activation="none", backend=backend, accuracy=accuracy)


common.register_composed("transition", _run, _shape, _compose)
