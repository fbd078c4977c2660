"""The package's own CPU kernels: the private ops of the native library, on weights prepacked for them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..shapes import Bottleneck, PreActBlock, Shape
from . import native
from .layers import DenseLayer
from .layout import nhwc_slice
from .packing import packed

DTYPES = (torch.float32, torch.bfloat16)
ALGORITHMS = ("direct", "winograd2", "winograd4")
"""How a 3x3 convolution of stride and dilation 1 is computed; any other is always direct."""

_CONV = (
    "Tensor x, Tensor packed, Tensor scale, Tensor shift, Tensor? residual, Tensor? in_scale, Tensor? in_shift, "
    "int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, bool relu, str algorithm"
)
for _schema in (
    "_cpu_pack(Tensor weight, int groups, str layout) -> Tensor",
    f"_cpu_conv({_CONV}) -> Tensor",
    f"_cpu_conv_out(Tensor(a!) out, {_CONV}) -> ()",
    "_cpu_bottleneck(Tensor x, Tensor w1, Tensor s1, Tensor b1, Tensor w2, Tensor s2, Tensor b2, Tensor w3, Tensor s3, "
    "Tensor b3, Tensor? wd, Tensor? sd, Tensor? bd, int stride1, int stride2, int dilation, str algorithm) -> Tensor",
    "_cpu_basic_block(Tensor x, Tensor w1, Tensor s1, Tensor b1, Tensor w2, Tensor s2, Tensor b2, Tensor? wd, "
    "Tensor? sd, Tensor? bd, int stride, int dilation, str algorithm) -> Tensor",
    "_cpu_stem(Tensor x, Tensor packed, Tensor scale, Tensor shift, int[] kernel, int[] stride, int[] padding, "
    "int pool_kernel, int pool_stride, int pool_padding) -> Tensor",
    "_cpu_preact(Tensor x, Tensor? in_scale, Tensor? in_shift, Tensor[] w, Tensor[] s, Tensor[] b, Tensor? wd, "
    "int stride1, int stride2, int dilation, str algorithm) -> Tensor",
    "_cpu_dense_block(Tensor x, Tensor[] in_scale, Tensor[] in_shift, Tensor[] w1, Tensor[] s1, Tensor[] b1, "
    "Tensor[] w2, int growth, str algorithm) -> Tensor",
    "_cpu_transition(Tensor x, Tensor in_scale, Tensor in_shift, Tensor packed) -> Tensor",
    "_cpu_head(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "_cpu_record(Tensor x) -> ()",
    "_cpu_recorded(Tensor y) -> Tensor",
    "_cpu_link(Tensor[] recordings) -> Tensor",
    "_cpu_replay(Tensor x, Tensor linked) -> Tensor",
    "_watch(Tensor[] tensors) -> Tensor",
    "_unchanged(Tensor watched) -> bool",
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


def winograd_rounds() -> bool:
    """Whether F(2x2, 3x3) of bfloat16 multiplies bfloat16 on the instruction set in use.

    Transformed pixels and weights are then rounded; else they are float32.
    """
    return _winograd_rounds(native.isa())


@functools.lru_cache
def _winograd_rounds(isa: str) -> bool:
    rows = native.bindings.kernel_table() if native.bindings is not None else []
    return any((row["isa"], row["kernel"], row["dtype"]) == (isa, "winograd2", "bfloat16") for row in rows)


def only_by_layers(shape: Shape) -> str | None:
    """Why there is no kernel for the whole of this block, None if there is one (always for a layer)."""
    if isinstance(shape, Bottleneck | PreActBlock) and shape.groups > 1:
        return f"the {shape.op} kernel takes groups=1, got {shape.groups}"
    if isinstance(shape, PreActBlock) and shape.bottleneck and shape.stride1 > 1:
        return "the preact_block kernel strides in the 3x3, not in the first 1x1"
    return None


def _pack(weight: Tensor, layout: str = "direct", groups: int = 1) -> Tensor:
    key = ("cpu", native.isa(), layout, groups)
    return packed(weight, key, lambda: torch.ops.resnet_fused._cpu_pack.default(weight.contiguous(), groups, layout))


@functools.lru_cache(maxsize=64)
def _ones(channels: int) -> Tensor:
    return torch.ones(channels)


def _scale(scale: Tensor | None, shift: Tensor) -> Tensor:
    return _ones(shift.shape[0]) if scale is None else scale.contiguous()


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    residual: Tensor | None,
    in_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    algorithm: str,
    out: Tensor | None = None,
) -> Tensor:
    """`activation(conv(z, weight) * scale + shift + residual)`; z is x, or `relu(x * in_scale + in_shift)`.

    Args:
        x: [N, C, H, W], float32 or bfloat16; NHWC in memory and slices of its channels are read as they are.
        weight: [K, C / groups, R, S].
        scale: float32 [K], None for ones.
        shift: float32 [K].
        residual: of the output's shape, as x in memory.
        in_scale: float32 [C], together with in_shift.
        in_shift: float32 [C].
        stride: (vertical, horizontal), as are padding and dilation.
        padding: zeros around z.
        dilation: distance between taps.
        groups: of the convolution.
        activation: `"relu"` or `"none"`.
        algorithm: one of ALGORITHMS.
        out: what to write into, NHWC in memory, or a slice of the channels of such an image.

    Returns:
        out, or a new tensor in channels_last.
    """
    arguments = (
        nhwc_slice(x),
        _pack(weight, algorithm, groups),
        _scale(scale, shift),
        shift.contiguous(),
        None if residual is None else nhwc_slice(residual),
        _dense(in_scale),
        _dense(in_shift),
        weight.shape[2:],
        stride,
        padding,
        dilation,
        groups,
        activation == "relu",
        algorithm,
    )
    if out is None:
        return torch.ops.resnet_fused._cpu_conv.default(*arguments)
    torch.ops.resnet_fused._cpu_conv_out.default(out, *arguments)
    return out


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
        nhwc_slice(x),
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
        nhwc_slice(x),
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
    algorithm: str,
) -> Tensor:
    """Layer and max pooling; the output is channels_last."""
    return torch.ops.resnet_fused._cpu_stem.default(
        nhwc_slice(x),
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


def preact_block(
    x: Tensor,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    shifts: Sequence[Tensor],
    wd: Tensor | None,
    *,
    stride: int,
    dilation: int,
    algorithm: str,
) -> Tensor:
    """A whole pre-activation block, basic (two weights) or bottleneck (three); the output is channels_last.

    Args:
        x: [N, C, H, W].
        in_scale: float32 [C], together with in_shift; None where x is activated already.
        in_shift: float32 [C].
        weights: of the convolutions.
        scales: float32, one for each weight, None for ones.
        shifts: float32, one for each weight; ReLU follows each but the last.
        wd: [K, C, 1, 1], from the prologue's result; None: x is added as it is.
        stride: of the first 3x3 and of the projection.
        dilation: of every 3x3.
        algorithm: of every 3x3 of stride and dilation 1.
    """
    strides = (stride, 1) if len(weights) == 2 else (1, stride, 1)
    fits = [w.shape[2] == 3 and s == dilation == 1 for w, s in zip(weights, strides, strict=True)]
    return torch.ops.resnet_fused._cpu_preact.default(
        nhwc_slice(x),
        _dense(in_scale),
        _dense(in_shift),
        [_pack(weight, algorithm if winograd else "direct") for weight, winograd in zip(weights, fits, strict=True)],
        [_scale(scale, shift) for scale, shift in zip(scales, shifts, strict=True)],
        [shift.contiguous() for shift in shifts],
        None if wd is None else _pack(wd),
        *strides[:2],
        dilation,
        algorithm,
    )


@functools.cache
def _nothing() -> Tensor:
    return torch.empty(0)


def dense_block(x: Tensor, layers: Sequence[DenseLayer], *, algorithm: str = "direct") -> Tensor:
    """All layers of a dense block in one buffer, without a concatenation.

    Args:
        x: [N, C, H, W], float32 or bfloat16.
        layers: at least one, all with a 1x1 or all without.
        algorithm: of the 3x3 convolutions.

    Returns:
        [N, C + len(layers) * growth, H, W]: x, then each layer's output; channels_last.
    """
    nothing = _nothing()
    return torch.ops.resnet_fused._cpu_dense_block.default(
        nhwc_slice(x),
        [layer.in_scale.contiguous() for layer in layers],
        [layer.in_shift.contiguous() for layer in layers],
        [nothing if layer.w1 is None else _pack(layer.w1) for layer in layers],
        [nothing if layer.b1 is None else _scale(layer.s1, layer.b1) for layer in layers],
        [nothing if layer.b1 is None else layer.b1.contiguous() for layer in layers],
        [_pack(layer.w2, algorithm) for layer in layers],
        layers[0].w2.shape[0],
        algorithm,
    )


def transition(x: Tensor, in_scale: Tensor, in_shift: Tensor, weight: Tensor, *, algorithm: str = "direct") -> Tensor:
    """`conv(avg_pool2d(relu(x * in_scale + in_shift), 2), weight)`, the average rounded to x's dtype; channels_last."""
    return torch.ops.resnet_fused._cpu_transition.default(
        nhwc_slice(x), in_scale.contiguous(), in_shift.contiguous(), _pack(weight)
    )


def head(x: Tensor, weight: Tensor, bias: Tensor | None, *, algorithm: str = "direct") -> Tensor:
    """`linear(x.mean((2, 3)), weight, bias)`, the mean not rounded to x's dtype; reads the weight as it is."""
    bias = None if bias is None else bias.float().contiguous()
    return torch.ops.resnet_fused._cpu_head.default(nhwc_slice(x), weight.contiguous(), bias).flatten(1)
