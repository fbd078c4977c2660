"""Convolution on tensor descriptors (TMA): a tile of pixels is a box of the image, shifted from tap to tap.

What lies outside the image arrives as zeros, so that padding costs nothing. Any kernel size, padding and dilation at
stride 1 and 2, and 1x1 at any stride; one group. A second product into the same accumulator takes the projection
shortcut of a block.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .common import pixel_tile, round_to_tf32, tiny_scale, vector
from .configs import architecture
from .implicit_gemm import finish
from .layer_configs import TmaConvConfig, box_tiles
from .layers import Layer, pack, pack_projection


@triton.jit
def multiply(acc, a, b, SWAP: tl.constexpr, ROUND: tl.constexpr, PRECISION: tl.constexpr):
    """acc += a [pixels, sum] @ b [channels, sum].T, or, swapped, its transpose.

    wgmma takes its second factor from shared memory only, its first also from registers: a reshaped box as the first
    goes there through registers, with a wait in every step; as the second it stays where TMA put it.
    """
    if ROUND:
        a = round_to_tf32(a)
    if SWAP:
        return tl.dot(b, a.T, acc, input_precision=PRECISION)
    else:
        return tl.dot(a, b.T, acc, input_precision=PRECISION)


@triton.jit
def tap_range(at, extent, size, STRIDE: tl.constexpr, TAPS: tl.constexpr, DIL: tl.constexpr, PAD: tl.constexpr):
    """First and last + 1 of the taps along an axis that read more than padding, for outputs at .. at + extent - 1."""
    first = tl.maximum(0, tl.cdiv(PAD - (at + extent - 1) * STRIDE, DIL))
    last = tl.minimum(TAPS, tl.cdiv(tl.maximum(size + PAD - at * STRIDE, 0), DIL))
    return first, last


@triton.jit
def tma_conv_kernel(
    x, w, scale_ptr, shift_ptr, residual_ptr, x2, w2, scale2_ptr, shift2_ptr, y, N, H, W, P, Q, C2, k_units, r_units,
    R: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, C: tl.constexpr, C_BLOCKS: tl.constexpr, RELU: tl.constexpr,
    VEC: tl.constexpr, PRECISION: tl.constexpr, ROUND: tl.constexpr,
    NB: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Tiles of [NB images, TH rows, TW columns] x BN output channels, one after another; channels run fastest.

    Descriptors: x [N, H, W, C] with boxes [NB, TH, TW, BK]; with more than one tap and STRIDE 2 the same memory as
    [N, H / 2, 2, W / 2, 2 * C], where a tap reads one parity of rows and columns, with boxes [NB, TH, 1, TW, BK];
    for tiles of one pixel (TH = TW = 1) with the images moved before the channels. A strided 1x1 has a strided
    descriptor and STRIDE 1 here. w [R * S, K, C], boxes [1, BN, BK]; y [N, P, Q, K], boxes [NB, TH, TW, BN].
    x2, w2 [K, C2]: the projection's.
    """
    K = k_units * VEC
    BM: tl.constexpr = NB * TH * TW
    ONE_PIXEL: tl.constexpr = TH * TW == 1
    SWAP: tl.constexpr = not ONE_PIXEL and BN >= 64  # the first factor has the rows, and wgmma takes 64 at least
    tiles_n = tl.cdiv(K, BN)
    tiles = tl.cdiv(N, NB) * tl.cdiv(P, TH) * tl.cdiv(Q, TW) * tiles_n
    for t in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        k0 = t % tiles_n * BN
        n0, h0, w0 = pixel_tile(t // tiles_n, P, Q, NB, TH, TW)
        r0 = 0
        s0 = 0
        rows = R
        columns = S
        if ONE_PIXEL and PAD_H + PAD_W > 0:  # 18% of the taps of a 3x3 at 7x7
            r0, r1 = tap_range(h0, TH, H, STRIDE, R, DIL_H, PAD_H)
            s0, s1 = tap_range(w0, TW, W, STRIDE, S, DIL_W, PAD_W)
            rows = r1 - r0
            columns = s1 - s0
        acc = tl.zeros((BN, BM) if SWAP else (BM, BN), tl.float32)
        for i in tl.range(0, rows * columns * C_BLOCKS):
            c = i % C_BLOCKS * BK
            tap = i // C_BLOCKS
            r = r0 + tap // columns
            s = s0 + tap % columns
            if STRIDE == 1:
                h = h0 + r * DIL_H - PAD_H
                v = w0 + s * DIL_W - PAD_W
                a = x.load([h, v, n0, c] if ONE_PIXEL else [n0, h, v, c])
            else:
                # Row 2 p + d, for d = r * dilation - padding, is row p + d // 2 of parity d % 2. Twice the padding more
                # keeps d positive, as division truncates.
                h = h0 + (r * DIL_H + PAD_H) // 2 - PAD_H
                v = w0 + (s * DIL_W + PAD_W) // 2 - PAD_W
                row_parity = (r * DIL_H + PAD_H) % 2
                at = (s * DIL_W + PAD_W) % 2 * C + c
                a = x.load([h, row_parity, v, n0, at] if ONE_PIXEL else [n0, h, row_parity, v, at])
            b = w.load([r * S + s, k0, c]).reshape(BN, BK)
            acc = multiply(acc, a.reshape(BM, BK), b, SWAP, ROUND, PRECISION)

        rn = k0 + tl.arange(0, BN)
        scale = vector(scale_ptr, rn, K)
        shift = vector(shift_ptr, rn, K)
        if x2 is not None:  # acc * scale + conv2 * scale2, as (acc * (scale / scale2) + conv2) * scale2
            wanted = vector(scale2_ptr, rn, K)
            out = tl.where(tiny_scale(wanted), 1.0, wanted)  # there the packed weights are zero
            ratio = scale / out
            acc = acc * (ratio[:, None] if SWAP else ratio[None, :])
            for c in tl.range(0, C2, BK):
                a = x2.load([h0, w0, n0, c] if ONE_PIXEL else [n0, h0, w0, c]).reshape(BM, BK)
                acc = multiply(acc, a, w2.load([k0, c]), SWAP, ROUND, PRECISION)
            scale = out
            shift += vector(shift2_ptr, rn, K)
        rm = tl.arange(0, BM)
        image = n0 + rm // (TH * TW)
        h = h0 + rm // TW % TH
        v = w0 + rm % TW
        pixel = (image.to(tl.int64) * P + h) * Q + v
        inside = (image < N) & (h < P) & (v < Q)
        result = finish(acc.T if SWAP else acc, scale, shift, residual_ptr, pixel, rn, inside, K, r_units * VEC, RELU)
        y.store([n0, h0, w0, k0], result.to(y.dtype).reshape(NB, TH, TW, BN))


def _image(
    x: Tensor, pitch: int, stride: tuple[int, int], out: tuple[int, int], config: TmaConvConfig, tf32: bool
) -> Any:
    """Describe the pixels of `x` that a 1x1 convolution of this stride reads, `out` rows and columns of them."""
    n, c, h, w = x.shape
    sizes, strides = (n, *out, c), (h * w * pitch, stride[0] * w * pitch, stride[1] * pitch, 1)
    return _described(x, sizes, strides, (*config.box, config.block_k), config, tf32)


def _described(x: Tensor, sizes: Any, strides: Any, box: Any, config: TmaConvConfig, tf32: bool) -> Any:
    """A descriptor of `x`, images first, or moved before the channels where a tile is one pixel of many images."""
    if config.box[1:] == (1, 1):
        sizes, strides, box = ((*t[1:-1], t[0], t[-1]) for t in (sizes, strides, box))
    return launch.descriptor(x, sizes, strides, box, tf32)


def run(layer: Layer, config: TmaConvConfig) -> Tensor:
    """Compute a layer without prologue on aligned images.

    Args:
        layer: its tensors; a projection is allowed.
        config: its box is of output pixels.

    Returns:
        layer.y.
    """
    shape, x, pitch = layer.shape, layer.x, layer.x_pitch
    n, c, h, w = x.shape
    _, k, p, q = shape.output_shape
    taps = shape.r * shape.s
    tf32 = layer.precision == "tf32"
    nb, th, tw = config.box
    weight = pack(layer.weight, layer.precision)
    tap = weight.shape[1] // taps
    stride = 1
    if taps == 1:
        described = _image(x, pitch, shape.stride, (p, q), config, tf32)
    elif shape.stride == (1, 1):
        described = _image(x, pitch, (1, 1), (h, w), config, tf32)
    else:
        stride = 2
        sizes = (n, h // 2, 2, w // 2, 2 * c)
        strides = (h * w * c, 2 * w * c, w * c, 2 * c, 1)
        described = _described(x, sizes, strides, (nb, th, 1, tw, config.block_k), config, tf32)
    x2 = w2 = scale2 = shift2 = None
    c2 = 0
    if layer.projection is not None:
        side = layer.projection
        c2, scale2, shift2 = side.x.shape[1], side.scale, side.shift
        x2 = _image(side.x, layer.x2_pitch, (side.stride, side.stride), (p, q), config, tf32)
        packed2 = pack_projection(side, layer.precision)
        w2 = launch.descriptor(packed2, packed2.shape, packed2.stride(), (config.block_n, config.block_k))
    unit = layer.unit(k, layer.residual_pitch)
    tiles = box_tiles((n, p, q), config.box) * triton.cdiv(k, config.block_n)
    blocks = min(tiles, config.resident_blocks(x.dtype, architecture(x.device)))
    with launch.on_device(x):
        tma_conv_kernel[(blocks,)](
            described,
            launch.descriptor(weight, (taps, k, tap), (tap, taps * tap, 1), (1, config.block_n, config.block_k)),
            layer.scale, layer.shift, layer.residual, x2, w2, scale2, shift2,
            launch.descriptor(
                layer.y, (n, p, q, k), (p * q * layer.y_pitch, q * layer.y_pitch, layer.y_pitch, 1),
                (nb, th, tw, config.block_n),
            ),
            n, h, w, p, q, c2, k // unit, layer.residual_pitch // unit,
            R=shape.r, S=shape.s, STRIDE=stride, PAD_H=shape.padding[0], PAD_W=shape.padding[1],
            DIL_H=shape.dilation[0], DIL_W=shape.dilation[1], C=c if stride == 2 else 0,
            C_BLOCKS=triton.cdiv(c, config.block_k), RELU=layer.relu,
            VEC=unit, PRECISION=layer.precision, ROUND=tf32 and not launch.DESCRIPTOR_ROUNDS,
            NB=nb, TH=th, TW=tw, BN=config.block_n, BK=config.block_k,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return layer.y
