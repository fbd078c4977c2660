"""The package's own CPU kernels: the private ops of the native library, on weights prepacked for them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..shapes import Bottleneck, Shape
from . import native
from .layout import nhwc
from .packing import packed

DTYPES = (torch.float32, torch.bfloat16)
ALGORITHMS = ("direct", "winograd2", "winograd4")
"""How a 3x3 convolution of stride and dilation 1 is computed; any other is always direct."""

for _schema in (
    "_cpu_pack(Tensor weight, int groups, str layout) -> Tensor",
    "_cpu_conv(Tensor x, Tensor packed, Tensor scale, Tensor shift, Tensor? residual, int[] kernel, int[] stride, "
    "int[] padding, int[] dilation, int groups, bool relu, str algorithm) -> Tensor",
    "_cpu_bottleneck(Tensor x, Tensor w1, Tensor s1, Tensor b1, Tensor w2, Tensor s2, Tensor b2, Tensor w3, Tensor s3, "
    "Tensor b3, Tensor? wd, Tensor? sd, Tensor? bd, int stride1, int stride2, int dilation, str algorithm) -> Tensor",
    "_cpu_basic_block(Tensor x, Tensor w1, Tensor s1, Tensor b1, Tensor w2, Tensor s2, Tensor b2, Tensor? wd, "
    "Tensor? sd, Tensor? bd, int stride, int dilation, str algorithm) -> Tensor",
    "_cpu_stem(Tensor x, Tensor packed, Tensor scale, Tensor shift, int[] kernel, int[] stride, int[] padding, "
    "int pool_kernel, int pool_stride, int pool_padding) -> Tensor",
):
    native.library.define(_schema)
native.load()


def unsupported(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the native kernels cannot run anything of this dtype on this device, None if they can."""
    if device.type != "cpu":
        return f"it runs on the CPU, x.device is {device}"
    if dtype not in DTYPES:
        return f"it takes {' or '.join(map(str, DTYPES))}, x.dtype is {dtype}"
    return native.reason()


def only_by_layers(shape: Shape) -> str | None:
    """Why there is no kernel for the whole of this block, None if there is one (always for a layer)."""
    if isinstance(shape, Bottleneck) and shape.groups > 1:
        return f"the bottleneck kernel takes groups=1, got {shape.groups}"
    return None


def _pack(weight: Tensor, layout: str = "direct", groups: int = 1) -> Tensor:
    key = ("cpu", native.isa(), layout, groups)
    return packed(weight, key, lambda: torch.ops.resnet_fused._cpu_pack.default(weight.contiguous(), groups, layout))


@functools.lru_cache(maxsize=64)
def _ones(channels: int) -> Tensor:
    return torch.ones(channels)


def _scale(scale: Tensor | None, shift: Tensor) -> Tensor:
    return _ones(shift.shape[0]) if scale is None else scale.contiguous()


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
    algorithm: str,
) -> Tensor:
    """`activation(conv(x, weight) * scale + shift + residual)`; the output is channels_last."""
    return torch.ops.resnet_fused._cpu_conv.default(
        nhwc(x),
        _pack(weight, algorithm, groups),
        _scale(scale, shift),
        shift.contiguous(),
        None if residual is None else nhwc(residual),
        weight.shape[2:],
        stride,
        padding,
        dilation,
        groups,
        activation == "relu",
        algorithm,
    )


def bottleneck(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    wd: Tensor | None,
    bd: Tensor | None,
    s1: Tensor | None,
    s2: Tensor | None,
    s3: Tensor | None,
    sd: Tensor | None,
    *,
    stride1: int,
    stride2: int,
    dilation: int,
    algorithm: str,
) -> Tensor:
    """A whole bottleneck; the output is channels_last."""
    return torch.ops.resnet_fused._cpu_bottleneck.default(
        nhwc(x),
        _pack(w1),
        _scale(s1, b1),
        b1.contiguous(),
        _pack(w2, algorithm),
        _scale(s2, b2),
        b2.contiguous(),
        _pack(w3),
        _scale(s3, b3),
        b3.contiguous(),
        *_projection(wd, sd, bd),
        stride1,
        stride2,
        dilation,
        algorithm,
    )


def basic_block(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    wd: Tensor | None,
    bd: Tensor | None,
    s1: Tensor | None,
    s2: Tensor | None,
    sd: Tensor | None,
    *,
    stride: int,
    dilation: int,
    algorithm: str,
) -> Tensor:
    """A whole basic block; the output is channels_last."""
    return torch.ops.resnet_fused._cpu_basic_block.default(
        nhwc(x),
        _pack(w1, algorithm if stride == 1 else "direct"),
        _scale(s1, b1),
        b1.contiguous(),
        _pack(w2, algorithm),
        _scale(s2, b2),
        b2.contiguous(),
        *_projection(wd, sd, bd),
        stride,
        dilation,
        algorithm,
    )


def _projection(wd: Tensor | None, sd: Tensor | None, bd: Tensor | None) -> tuple[Tensor | None, ...]:
    if wd is None or bd is None:
        return None, None, None
    return _pack(wd), _scale(sd, bd), bd.contiguous()


def stem(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    *,
    stride: int,
    padding: int,
    pool_kernel: int,
    pool_stride: int,
    pool_padding: int,
) -> Tensor:
    """Layer and max pooling; the output is channels_last."""
    return torch.ops.resnet_fused._cpu_stem.default(
        nhwc(x),
        _pack(weight),
        _scale(scale, shift),
        shift.contiguous(),
        weight.shape[2:],
        (stride, stride),
        (padding, padding),
        pool_kernel,
        pool_stride,
        pool_padding,
    )
