"""The end of a classifier: global average pooling and a linear layer."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import plan
from ..errors import InputError
from ..kernels import reference
from ..kernels.native import library
from ..kernels.packing import packed
from ..settings import resolve_backend
from ..shapes import Head
from . import _common as common
from ._common import Spec, optional_spec, spec
from .conv_bn_act import conv_bn_act, layer_runner

library.define(
    "head(Tensor x, Tensor weight, Tensor? bias=None, *, str backend='auto', str accuracy='strict') -> Tensor"
)


@common.typed
def head(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto", accuracy: str = "strict"
) -> Tensor:
    """`linear(x.mean((2, 3)), weight, bias)`: the mean is summed in float32 and rounded at most once, the product once.

    Args:
        x: [N, C, H, W], float32, bfloat16, float16 or float64, any strides, at least one pixel.
        weight: [K, C], dtype and device of x.
        bias: [K], of x's dtype or float32, on its device; None for zeros.
        backend: `"auto"`, or one by name: an error if it is missing or cannot run this.
        accuracy: as for the other ops; changes nothing here.

    Returns:
        [N, K] of x's dtype. Differentiable.

    Raises:
        InputError: an argument does not fit the others.
        BackendError: the backend asked for by name cannot run this.
    """
    return torch.ops.resnet_fused.head.default(x, weight, bias, backend=resolve_backend(backend), accuracy=accuracy)


def _check(x: Spec, weight: Spec, bias: Spec | None, backend: str, accuracy: str) -> Head:
    common.check_choices(backend, accuracy)
    common.check_input(x)
    n, c, h, w = x[0]
    common.check_kind("weight", weight, x)
    if len(weight[0]) != 2 or weight[0][1] != c or weight[0][0] < 1:
        raise InputError(f"weight.shape must be (K, {c}), got {tuple(weight[0])}")
    if bias is not None and bias[1] == x[1]:
        common.check_like("bias", bias, x, weight[0][:1])
    else:
        common.check_vector("bias", bias, x, weight[0][0])
    return Head(n, c, h, w, weight[0][0])


@functools.lru_cache(maxsize=4096)
def _prepare(x: Spec, *arguments: Any) -> plan.Choice:
    *checked, state = arguments
    return plan.choose(_check(x, *checked), x[1], x[2], *checked[-2:], state)


def _run(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto", accuracy: str = "strict"
) -> Tensor:
    choice = _prepare(spec(x), spec(weight), optional_spec(bias), backend, accuracy, plan.state(x.device))
    plan.note(choice)
    if choice.empty:
        return x.new_empty(x.shape[0], weight.shape[0])
    if not choice.composed:
        return common.KERNELS[choice.backend].head(x, weight, bias, algorithm=choice.algorithm)
    mean = reference.mean(x)
    layer, mean = layer_runner(choice, mean, accuracy)
    # The same view at every call, so that what is packed of it is found again; detached, so as not to keep the weight.
    kernel = packed(weight, "linear", lambda: weight.detach()[:, :, None, None])
    return layer(mean, kernel, None, _shift(weight, bias), activation="none").flatten(1)


def _shift(weight: Tensor, bias: Tensor | None) -> Tensor:
    """The bias as the shift of a layer."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.new_zeros(weight.shape[0], dtype=wide) if bias is None else bias.to(wide)


def _shape(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto", accuracy: str = "strict"
) -> Head:
    return _check(spec(x), spec(weight), optional_spec(bias), backend, accuracy)


def _compose(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto", accuracy: str = "strict"
) -> Tensor:
    _check(spec(x), spec(weight), optional_spec(bias), backend, accuracy)
    kernel, shift = weight[:, :, None, None], _shift(weight, bias)
    y = conv_bn_act(reference.mean(x), kernel, None, shift, activation="none", backend=backend, accuracy=accuracy)
    return y.flatten(1)


common.register_composed("head", _run, _shape, _compose)
