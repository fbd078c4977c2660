"""The basic block, 3x3 -> 3x3 + shortcut, in one launch: h1 in a band's scratch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...shapes import BasicBlock
from .bands import (
    band_end,
    band_start,
    conv1x1_sum,
    conv3x3_sum,
    hidden,
    pixel_tile,
    scaled,
    source_pixels,
    store_tile,
)
from .block_configs import BandConfig, configuration
from .common import relu
from .launch import empty_output, on_device, precision
from .matrices import image, matrix, programs, vectors, weights


@triton.jit(do_not_specialize=["N", "H", "W", "P", "Q", "capacity"])
def basic_block_kernel(
    x, side, w1, s1, b1, h1, w2, s2, b2, wd, sd, bd, y,
    N, H, W, P, Q, C, MID, K, x_pitch, capacity,
    STRIDE: tl.constexpr, PROJECTION: tl.constexpr, RAGGED: tl.constexpr, MB: tl.constexpr, TILES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """x [N*H*W, C] -> y [N*P*Q, K]; h1: `capacity` pixels of MB >= MID channels for each program.

    h1 = relu(s1 * conv3x3(x, w1, STRIDE) + b1) is [N*P*Q, MID]. TMA: side (x, boxes [BM, BC] of a projection, else
    [BM, BN]) unless STRIDE > 1, y ([BM, BN]) and the weights are descriptors. A band is TILES * BM output pixels.
    """
    SIDE_TMA: tl.constexpr = TMA and STRIDE == 1
    dtype: tl.constexpr = h1.dtype.element_ty
    pixels = N * P * Q
    rm = tl.arange(0, BM)
    scratch = h1 + tl.program_id(0).to(tl.int64) * capacity * MB
    for band in tl.range(tl.program_id(0), tl.cdiv(pixels, TILES * BM), tl.num_programs(0)):
        p0 = band * (TILES * BM)
        p1 = tl.minimum(p0 + TILES * BM, pixels)
        first = band_start(p0, P, Q, P, Q, 1)
        end = tl.minimum(band_end(p1 - 1, P, Q, P, Q, 1), pixels)
        tl.debug_barrier()  # every warp has read the previous band's h1
        for p in tl.range(first, end, BM):
            q = p + rm
            for n in tl.range(0, MB, BN):
                total = conv3x3_sum(
                    x, w1, p, n, 0, end, H, W, P, Q, C, MID, x_pitch, STRIDE, BM, BN, BC, False, TMA, PREC
                )
                rn = n + tl.arange(0, BN)
                h = hidden(total, s1, b1, rn, MID, RAGGED).to(dtype)
                tl.store(scratch + (q - first)[:, None] * MB + rn[None, :], h, mask=(q < end)[:, None])
        tl.debug_barrier()  # bar.sync orders writes to global memory too, for the threads of this program
        for p in tl.range(p0, p1, BM):
            q = p + rm
            rows = x + source_pixels(q, H, W, P, Q, STRIDE).to(tl.int64) * x_pitch
            for n in tl.range(0, K, BN):
                total = conv3x3_sum(
                    scratch, w2, p, n, first, pixels, P, Q, P, Q, MID, K, MB, 1, BM, BN, BK, True, TMA, PREC
                )
                rn = n + tl.arange(0, BN)
                out = scaled(total, s2, b2, rn, K)
                if PROJECTION:
                    shortcut = conv1x1_sum(side, wd, p, rows, q < pixels, n, C, K, BM, BN, BC, SIDE_TMA, TMA, PREC)
                    out += scaled(shortcut, sd, bd, rn, K)
                else:
                    out += pixel_tile(side, p, rows, q < pixels, n, C, BN, SIDE_TMA).to(tl.float32)
                store_tile(y, p, n, relu(out).to(dtype), pixels, K, K, BM, BN, TMA)


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
    dilation: int = 1,
    config: BandConfig | None = None,
) -> Tensor:
    """The whole basic block (`ops.basic_block`, dilation 1) in one launch.

    Args:
        x: [N, C, H, W], float32, bfloat16 or float16; other memory formats than NHWC are copied.
        w1: [M, C, 3, 3], as w2 [K, M, 3, 3] and wd [K, C, 1, 1] of x's dtype.
        b1: float32 [M], as s1; a scale of None is ones.
        w2: see w1.
        b2: float32 [K], as bd, s2 and sd.
        wd: the projection, None to add x itself.
        bd: see b2; None without wd.
        s1: see b1.
        s2: see b2.
        sd: see b2.
        stride: of the first 3x3 and the projection.
        dilation: of both; `why_not_whole` asks for 1.
        config: None for the one that `configs.choose` gives.

    Returns:
        [N, K, P, Q] of x's dtype, channels_last.
    """
    n, c, h, w = x.shape
    mid, out = w1.shape[0], w2.shape[0]
    shape = BasicBlock(n, c, h, w, mid, out, stride, projection=wd is not None)
    config = configuration("basic_block", shape, x, config)
    m, bn, bc, bk, tma = config.block_m, config.block_n, config.block_c, config.block_k, config.tma
    _, _, p, q = shape.output_shape
    prec = precision(x)
    x, pitch = image(x)
    y = empty_output(shape.output_shape, x)
    mb = triton.cdiv(mid, max(bn, bk)) * max(bn, bk)
    run = config.tiles * m
    capacity = min(run + 2 * q + 2, n * p * q)  # a row and a pixel more on either side
    grid = programs(triton.cdiv(n * p * q, run), config.programs, x.device)
    scratch = torch.empty(grid * capacity * mb, dtype=x.dtype, device=x.device)
    projection = wd is not None
    if wd is None or bd is None:
        wd, bd, sd = w2, b2, s2
    with on_device(x):
        basic_block_kernel[(grid,)](
            x,
            matrix(x, pitch, (m, bc if projection else bn), tma and stride == 1),
            weights(w1, (bn, bc), tma, prec), *vectors(s1, b1),
            scratch,
            weights(w2, (bn, bk), tma, prec), *vectors(s2, b2),
            weights(wd, (bn, bc), tma, prec), *vectors(sd, bd),
            matrix(y, out, (m, bn), tma),
            n, h, w, p, q, c, mid, out, pitch, capacity,
            STRIDE=stride, PROJECTION=projection, RAGGED=mb != mid, MB=mb, TILES=config.tiles,
            BM=m, BN=bn, BC=bc, BK=bk, TMA=tma, PREC=prec,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return y
