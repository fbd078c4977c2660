"""One layer through oneDNN: torch's own fused convolution operators, on weights prepacked with the scale folded in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..shapes import Shape
from .layout import nhwc
from .packing import packed

DTYPES = (torch.float32, torch.bfloat16)


def unsupported(shape: Shape, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why oneDNN cannot run this as a chain of fused layers, None if it can."""
    if device.type != "cpu":
        return f"it runs on the CPU, x.device is {device}"
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    if dtype not in DTYPES:
        return f"it takes {' or '.join(map(str, DTYPES))}, x.dtype is {dtype}"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this processor lacks the instructions that oneDNN needs for x.dtype torch.bfloat16"
    if any(layer.residual and layer.groups > 1 for layer in shape.layers()):
        return "it fuses a residual only into a convolution of groups=1, groups is more"
    return None


def _pack(
    weight: Tensor, scale: Tensor | None, sizes: tuple[Sequence[int], ...], groups: int, shape: torch.Size
) -> Tensor:
    if scale is not None:  # oneDNN takes a shift, but no scale
        weight = (weight.float() * scale[:, None, None, None]).to(weight.dtype)
    padding, stride, dilation = sizes
    # Its layout depends on the input's size; at another one the call would reorder it every time.
    return torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, shape)


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    residual: Tensor | None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> Tensor:
    """`activation(conv(x, weight) * scale + shift + residual)`; the output is channels_last."""
    x = nhwc(x)
    sizes = (padding, stride, dilation)
    key = ("vendor", x.shape, tuple(padding), tuple(stride), tuple(dilation), groups)
    weight = packed(weight, key, lambda: _pack(weight, scale, sizes, groups, x.shape), scale)
    shift = shift.contiguous()
    if residual is None:
        y = torch.ops.mkldnn._convolution_pointwise.default(x, weight, shift, *sizes, groups, "none", [], "")
    else:
        shift = shift.to(x.dtype)  # the form with a residual takes no float32 shift beside bfloat16
        y = torch.ops.mkldnn._convolution_pointwise.binary(
            x, nhwc(residual), weight, shift, *sizes, groups, "add", 1.0, None, [], None
        )
    # A pass of its own, though oneDNN could do it on the way: its ReLU turns NaN into 0.
    return y.relu_() if activation == "relu" else y
