"""One layer through oneDNN: torch's own fused convolution operators, on weights prepacked with the scale folded in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..shapes import Conv, Shape
from . import reference
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
    for layer in shape.layers():
        if layer.residual and layer.groups > 1:
            return f"it fuses a residual only into a convolution of groups=1, got {layer.groups}"
        if unreliable(layer):
            return (
                f"it is wrong or crashes on windows of {layer.r}x{layer.s}, stride {layer.stride}, padding "
                f"{layer.padding} and dilation {layer.dilation} in an image of {layer.h}x{layer.w}"
            )
    return None


def unreliable(layer: Conv) -> bool:
    """Whether oneDNN, as of torch 2.13, reads memory that is not its own on this shape, in unfused models as well.

    Seen, from random shapes: garbage where a strided output is one pixel wide and several high, and in bfloat16 where a
    dilated window begins with a single pixel of the image under its taps (1x2, stride 2x1, dilation 2, padding 2); a
    segmentation fault where some window has no pixel under its taps. The conditions here are a little wider than that.
    """
    _, _, height, width = layer.output_shape
    if width == 1 and height > 1 and layer.stride[1] > 1 and layer.s > 1:
        return True
    axes = zip((layer.h, layer.w), (layer.r, layer.s), layer.padding, layer.dilation, strict=True)
    return any(
        p > d * (k - 1) or (d > 1 and (size < max(p, d) or (k > 1 and p == d * (k - 1)))) for size, k, p, d in axes
    )


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
