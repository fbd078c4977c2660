"""One layer through cuDNN: torch's own fused convolution operators, on weights with the scale folded in."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ..shapes import Shape
from . import reference
from .layout import nhwc
from .packing import packed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NO_ENGINE = ("unable to find an engine", "valid cuDNN algorithm", "CUDNN_STATUS_NOT_SUPPORTED")
"""What torch says where cuDNN cannot run a fused call at all."""

_without_engine: set[tuple[object, ...]] = set()  # calls for which it said so


def unsupported(shape: Shape, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why cuDNN cannot run this as a chain of fused layers, None if it can."""
    if device.type != "cuda":
        return f"it runs on CUDA GPUs, x.device is {device}"
    if not torch.backends.cudnn.is_available():
        return "this torch was built without cuDNN"
    if dtype not in DTYPES:
        return f"it takes {', '.join(map(str, DTYPES))}, x.dtype is {dtype}"
    return None


def _pack(weight: Tensor, scale: Tensor | None) -> Tensor:
    if scale is not None:  # cuDNN takes a shift, but no scale
        weight = (weight.float() * scale[:, None, None, None]).to(weight.dtype)
    return nhwc(weight)


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    residual: Tensor | None,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> Tensor:
    """`activation(conv(x, weight) * scale + shift + residual)`; the output is channels_last."""
    if in_scale is not None and in_shift is not None:
        x = reference.prologue(x, in_scale, in_shift)  # a pass of its own
    x = nhwc(x)
    weight = packed(weight, "cudnn", lambda: _pack(weight, scale), scale)
    if shift.dtype != x.dtype:
        shift = packed(weight, "cudnn shift", functools.partial(shift.to, x.dtype), shift)
    sizes = (tuple(stride), tuple(padding), tuple(dilation), groups)
    if activation == "none":
        y = torch.conv2d(x, weight, shift, *sizes)
        return y if residual is None else y.add_(nhwc(residual))
    residual = None if residual is None else nhwc(residual)
    call = (x.device, x.dtype, x.shape, weight.shape, *sizes, residual is None)
    if call not in _without_engine:
        try:
            if residual is None:
                return torch.cudnn_convolution_relu(x, weight, shift, *sizes)
            return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, shift, *sizes)
        except RuntimeError as problem:
            if not any(word in str(problem) for word in NO_ENGINE):
                raise
            _without_engine.add(call)
            words = (
                f"cuDNN has no fused kernel for a convolution of {tuple(x.shape)} with {tuple(weight.shape)}, stride "
            )
            words += f"{sizes[0]}, groups {groups} in {x.dtype}: its operators run one by one"
            warnings.warn(words, stacklevel=2)
    y = torch.conv2d(x, weight, shift, *sizes)
    return (y if residual is None else y.add_(residual)).relu_()
