"""DenseNet without concatenation: each layer reads the channels so far of one buffer and writes its own behind them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...shapes import DenseBlock, Transition
from ..layers import DenseLayer
from .bands import band_end, band_start, conv3x3_sum, factor, hidden, pixel_tile, store_tile, weight_tile
from .block_configs import BandConfig, TransitionConfig, configuration
from .common import relu, vector
from .launch import empty_output, on_device, precision
from .layer_configs import power_of_two
from .matrices import image, matrix, programs, vectors, weights


@triton.jit
def activated(v, in_scale, in_shift, c, C, BC: tl.constexpr):
    """relu(v * in_scale + in_shift) in float32, by the channels from `c` (columns)."""
    rc = c + tl.arange(0, BC)
    return relu(v.to(tl.float32) * vector(in_scale, rc, C)[None, :] + vector(in_shift, rc, C)[None, :])


@triton.jit(do_not_specialize=["N", "H", "W", "capacity"])
def dense_layer_kernel(
    x, in_scale, in_shift, w1, s1, b1, h1, w2, y,
    N, H, W, C, MID, K, pitch, capacity,
    RAGGED: tl.constexpr, MB: tl.constexpr, TILES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """y [N*H*W, K] = conv3x3(h1, w2) for h1 = relu(s1 * conv1x1(relu(x * in_scale + in_shift), w1) + b1) [N*H*W, MID].

    x [N*H*W, C] and y are channels of one buffer, `pitch` elements a pixel, and do not overlap. h1: `capacity` pixels
    of MB >= MID channels for each program. TMA: x (boxes [BM, BC]), y ([BM, BN]) and the weights are descriptors.
    """
    dtype: tl.constexpr = h1.dtype.element_ty
    pixels = N * H * W
    rm = tl.arange(0, BM)
    rc = tl.arange(0, MB)
    scratch = h1 + tl.program_id(0).to(tl.int64) * capacity * MB
    for band in tl.range(tl.program_id(0), tl.cdiv(pixels, TILES * BM), tl.num_programs(0)):
        p0 = band * (TILES * BM)
        p1 = tl.minimum(p0 + TILES * BM, pixels)
        first = band_start(p0, H, W, H, W, 1)
        end = tl.minimum(band_end(p1 - 1, H, W, H, W, 1), pixels)
        tl.debug_barrier()  # every warp has read the previous band's h1
        for p in tl.range(first, end, BM):
            q = p + rm
            rows = x + q.to(tl.int64) * pitch if not TMA else q
            total = tl.zeros((BM, MB), tl.float32)
            for c in tl.range(0, C, BC):
                a = pixel_tile(x, p, rows, q < end, c, C, BC, TMA)
                a = activated(a, in_scale, in_shift, c, C, BC).to(dtype)
                w = weight_tile(w1, 0, 0, c, MID, C, 1, MB, BC, TMA)
                total = tl.dot(factor(a, PREC), w.T, total, input_precision=PREC)
            h = hidden(total, s1, b1, rc, MID, RAGGED).to(dtype)
            tl.store(scratch + (q - first)[:, None] * MB + rc[None, :], h, mask=(q < end)[:, None])
        tl.debug_barrier()  # bar.sync orders writes to global memory too, for the threads of this program
        for p in tl.range(p0, p1, BM):
            total = conv3x3_sum(
                scratch, w2, p, 0, first, pixels, H, W, H, W, MID, K, MB, 1, BM, BN, BK, True, TMA, PREC
            )
            store_tile(y, p, 0, total.to(dtype), pixels, K, pitch, BM, BN, TMA)


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q"])
def transition_kernel(
    x, in_scale, in_shift, w, y, N, H, W, P, Q, C, K, x_pitch,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, TMA: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """x [N, H, W, C] -> y [N*P*Q, K], the 1x1 convolution of the 2x2 means of relu(x * in_scale + in_shift).

    A mean of four pixels and a 1x1 convolution commute, and this way round the products are a quarter. TMA: w (boxes
    [1, BN, BC]) and y ([BM, BN]) are descriptors.
    """
    pixels = N * P * Q
    columns = tl.cdiv(K, BN)
    for t in tl.range(tl.program_id(0), tl.cdiv(pixels, BM) * columns, tl.num_programs(0)):
        n = t % columns * BN
        p = t // columns * BM
        q = p + tl.arange(0, BM)
        corner = (q // (P * Q) * H + q // Q % P * 2) * W + q % Q * 2
        rows = x + corner.to(tl.int64) * x_pitch
        total = tl.zeros((BM, BN), tl.float32)
        for c in tl.range(0, C, BC):
            mean = tl.zeros((BM, BC), tl.float32)
            for tap in tl.static_range(4):
                v = pixel_tile(x, p, rows + (tap // 2 * W + tap % 2) * x_pitch, q < pixels, c, C, BC, False)
                mean += activated(v, in_scale, in_shift, c, C, BC)
            a = (mean * 0.25).to(x.dtype.element_ty)
            b = weight_tile(w, 0, n, c, K, C, 1, BN, BC, TMA)
            total = tl.dot(factor(a, PREC), b.T, total, input_precision=PREC)
        store_tile(y, p, n, total.to(x.dtype.element_ty), pixels, K, K, BM, BN, TMA)


def dense_layer(x: Tensor, layer: DenseLayer, out: Tensor, *, config: BandConfig | None = None) -> None:
    """One layer of a dense block, 1x1 and 3x3, in one launch.

    Args:
        x: [N, C, H, W], channels of an NHWC buffer.
        layer: with a 1x1.
        out: [N, growth, H, W], other channels of the buffer; written.
        config: None for the one that `configs.choose` gives.
    """
    assert layer.w1 is not None and layer.b1 is not None
    n, c, h, w = x.shape
    mid, growth = layer.w1.shape[0], out.shape[1]
    config = configuration("dense_block", DenseBlock(n, c, h, w, growth, 1, mid), x, config)
    m, bn, bc, tma = config.block_m, config.block_n, config.block_c, config.tma
    prec = precision(x)
    _, pitch = image(x)
    mb = power_of_two(mid)
    bk = min(config.block_k, mb)
    run = config.tiles * m
    capacity = min(run + 2 * w + 2, n * h * w)  # a row and a pixel more on either side
    grid = programs(triton.cdiv(n * h * w, run), config.programs, x.device)
    scratch = torch.empty(grid * capacity * mb, dtype=x.dtype, device=x.device)
    with on_device(x):
        dense_layer_kernel[(grid,)](
            matrix(x, pitch, (m, bc), tma),
            layer.in_scale.contiguous(), layer.in_shift.contiguous(),
            weights(layer.w1, (mb, bc), tma, prec), *vectors(layer.s1, layer.b1),
            scratch,
            weights(layer.w2, (bn, bk), tma, prec),
            matrix(out, pitch, (m, bn), tma),
            n, h, w, c, mid, growth, pitch, capacity,
            RAGGED=mb != mid, MB=mb, TILES=config.tiles, BM=m, BN=bn, BC=bc, BK=bk, TMA=tma, PREC=prec,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip


def dense_block(x: Tensor, layers: Sequence[DenseLayer], *, config: BandConfig | None = None) -> Tensor:
    """A dense block in one buffer, a launch a layer; see `block_configs.why_not_whole` for what it takes.

    Args:
        x: [N, C, H, W], float32, bfloat16 or float16.
        layers: each with a 1x1; the i-th reads C + i * growth channels.
        config: of every layer's launch; None for the one that `configs.choose` gives.

    Returns:
        [N, C + len(layers) * growth, H, W] of x's dtype, channels_last: x, then what each layer appends.
    """
    n, c, h, w = x.shape
    growth = layers[0].w2.shape[0]
    buffer = empty_output((n, c + len(layers) * growth, h, w), x)
    buffer[:, :c].copy_(x)
    for layer in layers:
        dense_layer(buffer[:, :c], layer, buffer[:, c : c + growth], config=config)
        c += growth
    return buffer


def transition(
    x: Tensor, in_scale: Tensor, in_shift: Tensor, weight: Tensor, *, config: TransitionConfig | None = None
) -> Tensor:
    """Prologue, 2x2 average pooling of stride 2, 1x1 convolution, in one launch.

    Args:
        x: [N, C, H, W], float32, bfloat16 or float16.
        in_scale: float32 [C], as in_shift.
        in_shift: see in_scale.
        weight: [K, C, 1, 1] of x's dtype.
        config: None for the one that `configs.choose` gives.

    Returns:
        [N, K, H // 2, W // 2] of x's dtype, channels_last.
    """
    n, c, h, w = x.shape
    out = weight.shape[0]
    shape = Transition(n, c, h, w, out)
    config = configuration("transition", shape, x, config)
    m, bn, bc, tma = config.block_m, config.block_n, config.block_c, config.tma
    prec = precision(x)
    x, pitch = image(x)
    y = empty_output(shape.output_shape, x)
    _, _, p, q = y.shape
    with on_device(x):
        grid = programs(triton.cdiv(n * p * q, m) * triton.cdiv(out, bn), config.programs, x.device)
        transition_kernel[(grid,)](
            x, in_scale.contiguous(), in_shift.contiguous(), weights(weight, (bn, bc), tma, prec),
            matrix(y, out, (m, bn), tma),
            n, h, w, p, q, c, out, pitch,
            BM=m, BN=bn, BC=bc, TMA=tma, PREC=prec,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return y
