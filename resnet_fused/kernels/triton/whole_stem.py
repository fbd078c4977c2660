"""The stem, convolution -> scale, shift, ReLU -> max pool, without the convolution's output in memory.

A picture of 3 channels cannot be loaded in vectors: a first small launch copies it, from any memory format, to 4 (or 8)
channels with its padding around, so that a row of a window is one run of memory. Images of a multiple of 8 channels are
read where they are, in one launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...shapes import Stem
from ..packing import packed
from .bands import factor, hidden, weight_tile
from .block_configs import StemConfig, configuration, direct, padded_row
from .launch import empty_output, on_device, precision
from .matrices import image, vectors, weights


@triton.jit(do_not_specialize=["pixels", "H", "W", "PADDED_H", "PADDED_W"])
def pad_image_kernel(
    x, padded, pixels, C, H, W, stride_n, stride_c, stride_h, stride_w, PADDED_H, PADDED_W, padding,
    CP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """x [N, C, H, W], any strides -> padded [N, PADDED_H, PADDED_W, CP]: x, and `padding` and more zeros around it."""
    q = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.arange(0, CP)
    h = q // PADDED_W % PADDED_H - padding
    w = q % PADDED_W - padding
    inside = (q < pixels) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    at = (
        x + (q // (PADDED_W * PADDED_H)).to(tl.int64) * stride_n + h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w
    )
    v = tl.load(at[:, None] + c.to(tl.int64)[None, :] * stride_c, mask=inside[:, None] & (c < C)[None, :], other=0.0)
    tl.store(padded + q.to(tl.int64)[:, None] * CP + c[None, :], v, mask=(q < pixels)[:, None])


@triton.jit
def padded_window_sum(
    x, w, n, image, u, v, K, image_pitch, row_pitch,
    R: tl.constexpr, STRIDE: tl.constexpr, CP: tl.constexpr, ROW: tl.constexpr, STEPS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """float32 [BM, BN]: the convolution at row u and columns v of a padded image.

    A step takes BK // ROW rows of the window, each a run of memory, filled up with zeros to ROW elements.
    """
    rk = tl.arange(0, BK)
    rows = x + (image * image_pitch + u.to(tl.int64) * STRIDE * row_pitch)[:, None] + (v * (STRIDE * CP))[:, None]
    rows += (rk // ROW * row_pitch + rk % ROW)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for step in tl.range(0, STEPS):
        # Not left to weights of 0: NaN and infinity reach only the windows that hold them.
        mask = (step * (BK // ROW) + rk // ROW < R) & (rk % ROW < R * CP)
        a = tl.load(rows + step * (BK // ROW) * row_pitch, mask=mask[None, :], other=0.0)
        b = weight_tile(w, 0, n, step * BK, K, STEPS * BK, 1, BN, BK, TMA)
        acc = tl.dot(factor(a, PREC), b.T, acc, input_precision=PREC)
    return acc


@triton.jit
def window_sum(
    x, w, n, image, u, v, H, W, C, K, image_pitch, row_pitch, pixel_pitch,
    R: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """float32 [BM, BN]: the convolution at row u and columns v of images [H, W, C], tap by tap."""
    rk = tl.arange(0, BK)
    h = u * STRIDE - PADDING
    c0 = v * STRIDE - PADDING
    inside = tl.zeros((BM,), tl.int32)
    for column in tl.static_range(R):
        inside |= ((c0 + column >= 0) & (c0 + column < W)).to(tl.int32) << column
    start = x + image * image_pitch + h.to(tl.int64) * row_pitch + c0.to(tl.int64) * pixel_pitch
    blocks = tl.cdiv(C, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for i in tl.range(0, R * R * blocks):
        tap = i // blocks
        c = i % blocks * BK
        r = tap // R
        s = tap % R
        row = tl.where((h + r >= 0) & (h + r < H), inside, 0)
        at = start[:, None] + (r.to(tl.int64) * row_pitch + s * pixel_pitch + c + rk)[None, :]
        a = tl.load(at, mask=((row >> s) & 1 != 0)[:, None] & (c + rk < C)[None, :], other=0.0)
        b = weight_tile(w, tap, n, c, K, C, R * R, BN, BK, TMA)
        acc = tl.dot(factor(a, PREC), b.T, acc, input_precision=PREC)
    return acc


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q", "PH", "PW"])
def stem_kernel(
    x, w, scale, shift, y,
    N, C, H, W, P, Q, PH, PW, K, image_pitch, row_pitch, pixel_pitch,
    R: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    POOL: tl.constexpr, POOL_STRIDE: tl.constexpr, POOL_PADDING: tl.constexpr,
    PADDED: tl.constexpr, CP: tl.constexpr, ROW: tl.constexpr, STEPS: tl.constexpr,
    SEGMENT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """y [N, PH, PW, K] = max pool of relu(scale * conv(x, w) + shift), the latter [N, P, Q, K] and never stored.

    A program walks down SEGMENT pooled rows at BM consecutive (image, pooled column) pairs. A convolution row that two
    windows share is computed once and its maximum carried, which needs POOL <= 2 * POOL_STRIDE where SEGMENT > 1; a
    shared column is computed twice. w: [1, K, STEPS * BK] of a PADDED image, else
    [R * R, K, C]; TMA: a descriptor.
    """
    OVERLAP: tl.constexpr = POOL - POOL_STRIDE if POOL > POOL_STRIDE else 0
    tiles = tl.cdiv(N * PW, BM)
    columns = tl.cdiv(K, BN)
    t = tl.program_id(0)
    n = t % columns * BN
    first = t // columns // tiles * SEGMENT
    m = t // columns % tiles * BM + tl.arange(0, BM)
    valid = m < N * PW
    image = (m // PW).to(tl.int64)
    j = m % PW
    rn = n + tl.arange(0, BN)
    carry = tl.zeros((BM, BN), tl.float32)  # after a ReLU, 0 does for minus infinity
    for i in tl.range(first, tl.minimum(first + SEGMENT, PH), num_stages=1):
        best = carry
        carry = tl.zeros((BM, BN), tl.float32)
        for dy in tl.range(tl.where(i == first, 0, OVERLAP), POOL, num_stages=1):
            u = i * POOL_STRIDE - POOL_PADDING + dy
            row = tl.zeros((BM, BN), tl.float32)
            for dx in tl.range(0, POOL, num_stages=1):
                v = j * POOL_STRIDE - POOL_PADDING + dx
                ok = valid & (u >= 0) & (u < P) & (v >= 0) & (v < Q)
                # Outside, any pixel inside is computed and dropped.
                near_u = tl.minimum(tl.maximum(u, 0), P - 1)
                near_v = tl.where(ok, v, 0)
                near_image = tl.where(valid, image, 0)
                if PADDED:
                    total = padded_window_sum(
                        x, w, n, near_image, near_u, near_v, K, image_pitch, row_pitch,
                        R, STRIDE, CP, ROW, STEPS, BM, BN, BK, TMA, PREC,
                    )  # fmt: skip
                else:
                    total = window_sum(
                        x, w, n, near_image, near_u, near_v, H, W, C, K, image_pitch, row_pitch, pixel_pitch,
                        R, STRIDE, PADDING, BM, BN, BK, TMA, PREC,
                    )  # fmt: skip
                h = tl.where(ok[:, None], hidden(total, scale, shift, rn, K, False), 0.0)
                row = tl.maximum(row, h, propagate_nan=tl.PropagateNan.ALL)
            best = tl.maximum(best, row, propagate_nan=tl.PropagateNan.ALL)
            if dy >= POOL_STRIDE:
                carry = tl.maximum(carry, row, propagate_nan=tl.PropagateNan.ALL)
        at = y + ((image * PH + i) * PW + j)[:, None] * K + rn[None, :]
        tl.store(at, best.to(y.dtype.element_ty), mask=valid[:, None] & (rn < K)[None, :])


class _Padded(NamedTuple):
    """How a padded image and the weights for it are laid out.

    Attributes:
        channels: of the padded image.
        row: elements of a row of a window, filled up to a power of two.
        steps: of the sum.
        block_k: elements of a step: `block_k // row` rows of a window.
        height: of the padded image.
        width: of the padded image.
    """

    channels: int
    row: int
    steps: int
    block_k: int
    height: int
    width: int


def _padded(shape: Stem, block_k: int) -> _Padded:
    channels, row = padded_row(shape)
    rows = block_k // row
    steps = triton.cdiv(shape.r, rows)
    _, _, p, q = shape.layers()[0].output_shape
    across = (q - 1) * shape.stride + row // channels
    # Rows of a multiple of 16 elements: Triton then knows how loads are aligned.
    return _Padded(channels, row, steps, block_k, (p - 1) * shape.stride + steps * rows, triton.cdiv(across, 4) * 4)


def _pad(x: Tensor, layout: _Padded, padding: int) -> Tensor:
    n, c, h, w = x.shape
    padded = torch.empty(n, layout.height, layout.width, layout.channels, dtype=x.dtype, device=x.device)
    pixels = n * layout.height * layout.width
    block = 256
    pad_image_kernel[(triton.cdiv(pixels, block),)](
        x, padded, pixels, c, h, w, *x.stride(), layout.height, layout.width, padding, CP=layout.channels, BM=block,
        enable_fp_fusion=True,
    )  # fmt: skip
    return padded


def _pack(weight: Tensor, layout: _Padded) -> Tensor:
    """[K, C, R, R] -> [K, steps * block_k, 1, 1], which the matrix form of weights takes on."""
    k, c, r, s = weight.shape
    taps = weight.new_zeros(k, r, s, layout.channels)
    taps[..., :c] = weight.permute(0, 2, 3, 1)
    rows = weight.new_zeros(k, layout.steps * (layout.block_k // layout.row), layout.row)
    rows[:, :r, : s * layout.channels] = taps.flatten(2)
    return rows.reshape(k, -1, 1, 1)


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
    config: StemConfig | None = None,
) -> Tensor:
    """`max_pool(relu(conv(x, weight) * scale + shift))` (`ops.stem`).

    Args:
        x: [N, C, H, W], float32, bfloat16 or float16, any memory format.
        weight: [K, C, R, R] of x's dtype.
        scale: float32 [K], as shift; None is ones.
        shift: see scale.
        stride: of the convolution.
        padding: of the convolution.
        pool_kernel: of the pooling, square.
        pool_stride: of the pooling.
        pool_padding: of the pooling, at most half its kernel.
        config: None for the one that `configs.choose` gives.

    Returns:
        [N, K, P, Q] of x's dtype, channels_last.
    """
    n, c, h, w = x.shape
    k, _, r, s = weight.shape
    shape = Stem(n, c, h, w, k, r, s, stride, padding, pool_kernel, pool_stride, pool_padding)
    config = configuration("stem", shape, x, config)
    _, _, p, q = shape.layers()[0].output_shape
    _, _, pooled_h, pooled_w = shape.output_shape
    m, bn, bk, tma = config.block_m, config.block_n, config.block_k, config.tma
    prec = precision(x)
    y = empty_output(shape.output_shape, x)
    grid = triton.cdiv(n * pooled_w, m) * triton.cdiv(k, bn) * triton.cdiv(pooled_h, config.segment)
    with on_device(x):
        if direct(shape):
            layout = _Padded(1, 1, 1, bk, 0, 0)
            x, pixel_pitch = image(x)
            image_pitch, row_pitch = h * w * pixel_pitch, w * pixel_pitch
            by_tap = weight
        else:
            layout = _padded(shape, bk)
            x = _pad(x, layout, padding)
            image_pitch, row_pitch, pixel_pitch = x.stride()[:3]
            by_tap = packed(weight, ("triton", "stem", layout), lambda: _pack(weight, layout))
        stem_kernel[(grid,)](
            x, weights(by_tap, (bn, bk), tma, prec), *vectors(scale, shift), y,
            n, c, h, w, p, q, pooled_h, pooled_w, k, image_pitch, row_pitch, pixel_pitch,
            R=r, STRIDE=stride, PADDING=padding, POOL=pool_kernel, POOL_STRIDE=pool_stride, POOL_PADDING=pool_padding,
            PADDED=not direct(shape), CP=layout.channels, ROW=layout.row, STEPS=layout.steps, SEGMENT=config.segment,
            BM=m, BN=bn, BK=bk, TMA=tma, PREC=prec,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return y
