"""The whole bottleneck, 1x1 -> 3x3 -> 1x1 + shortcut, in one launch: h1 in a band's scratch, h2 in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...shapes import Bottleneck
from .bands import (
    band_end,
    band_start,
    conv1x1_sum,
    conv3x3_sum,
    factor,
    hidden,
    pixel_tile,
    scaled,
    source_pixels,
    store_tile,
    weight_tile,
)
from .block_configs import BandConfig, configuration
from .common import relu
from .launch import empty_output, on_device, precision
from .layer_configs import power_of_two
from .matrices import image, matrix, programs, vectors, weights


@triton.jit(do_not_specialize=["N", "H", "W", "P1", "Q1", "P", "Q", "capacity"])
def bottleneck_kernel(
    x, side, x_ptr, w1, s1, b1, h1, w2, s2, b2, w3, s3, b3, wd, sd, bd, y,
    N, H, W, P1, Q1, P, Q, C, MID, K, x_pitch, capacity,
    STRIDE1: tl.constexpr, STRIDE2: tl.constexpr, PROJECTION: tl.constexpr, RAGGED: tl.constexpr,
    MB: tl.constexpr, TILES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    SIDE_STAGES: tl.constexpr, TMA: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """x [N*H*W, C] -> y [N*P*Q, K]; h1: `capacity` pixels of MB >= MID channels for each program.

    h1 = relu(s1 * conv1x1(x, w1, STRIDE1) + b1) is [N*P1*Q1, MID], h2 = relu(s2 * conv3x3(h1, w2, STRIDE2) + b2).
    TMA: x (boxes [BM, BC]), side (x again, boxes [BM, BC] of a projection, else [BM, BN]), y ([BM, BN]) and the weights
    are descriptors. A band is TILES * BM output pixels.
    """
    STRIDE: tl.constexpr = STRIDE1 * STRIDE2
    X_TMA: tl.constexpr = TMA and STRIDE1 == 1
    SIDE_TMA: tl.constexpr = TMA and STRIDE == 1
    pixels = N * P * Q
    rm = tl.arange(0, BM)
    rc = tl.arange(0, MB)
    scratch = h1 + tl.program_id(0).to(tl.int64) * capacity * MB
    for band in tl.range(tl.program_id(0), tl.cdiv(pixels, TILES * BM), tl.num_programs(0)):
        p0 = band * (TILES * BM)
        p1 = tl.minimum(p0 + TILES * BM, pixels)
        first = band_start(p0, P1, Q1, P, Q, STRIDE2)
        end = tl.minimum(band_end(p1 - 1, P1, Q1, P, Q, STRIDE2), N * P1 * Q1)
        tl.debug_barrier()  # every warp has read the previous band's h1
        for p in tl.range(first, end, BM):
            q = p + rm
            rows = x_ptr + source_pixels(q, H, W, P1, Q1, STRIDE1).to(tl.int64) * x_pitch
            total = conv1x1_sum(x, w1, p, rows, q < end, 0, C, MID, BM, MB, BC, X_TMA, TMA, PREC)
            h = hidden(total, s1, b1, rc, MID, RAGGED).to(h1.dtype.element_ty)
            tl.store(scratch + (q - first)[:, None] * MB + rc[None, :], h, mask=(q < end)[:, None])
        tl.debug_barrier()  # bar.sync orders writes to global memory too, for the threads of this program
        for p in tl.range(p0, p1, BM):
            total = conv3x3_sum(
                scratch, w2, p, 0, first, pixels, P1, Q1, P, Q, MID, MID, MB, STRIDE2, BM, MB, BK, True, TMA, PREC
            )
            h2 = hidden(total, s2, b2, rc, MID, RAGGED).to(h1.dtype.element_ty)
            q = p + rm
            rows = x_ptr + source_pixels(q, H, W, P, Q, STRIDE).to(tl.int64) * x_pitch
            # A stated num_stages also prefetches loads that feed no product: the shortcut's.
            for n in tl.range(0, K, BN, num_stages=SIDE_STAGES):
                rn = n + tl.arange(0, BN)
                out = tl.dot(factor(h2, PREC), weight_tile(w3, 0, n, 0, K, MID, 1, BN, MB, TMA).T, input_precision=PREC)
                out = scaled(out, s3, b3, rn, K)
                if PROJECTION:
                    shortcut = conv1x1_sum(side, wd, p, rows, q < pixels, n, C, K, BM, BN, BC, SIDE_TMA, TMA, PREC)
                    out += scaled(shortcut, sd, bd, rn, K)
                else:
                    out += pixel_tile(side, p, rows, q < pixels, n, C, BN, SIDE_TMA).to(tl.float32)
                store_tile(y, p, n, relu(out).to(h1.dtype.element_ty), pixels, K, K, BM, BN, TMA)


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
    dilation: int = 1,
    config: BandConfig | None = None,
) -> Tensor:
    """The whole bottleneck (`ops.bottleneck`, groups and dilation 1) in one launch.

    Args:
        x: [N, C, H, W], float32, bfloat16 or float16; other memory formats than NHWC are copied.
        w1: [M, C, 1, 1], as w2 [M, M, 3, 3], w3 [K, M, 1, 1] and wd [K, C, 1, 1] of x's dtype.
        b1: float32 [M], as b2, s1 and s2.
        w2: see w1.
        b2: see b1.
        w3: see w1.
        b3: float32 [K], as bd, s3 and sd.
        wd: the projection, None to add x itself.
        bd: see b3; None without wd.
        s1: see b1; a scale of None is ones.
        s2: see s1.
        s3: see s1.
        sd: see s1.
        stride1: of the first 1x1.
        stride2: of the 3x3.
        dilation: of the 3x3; `why_not_whole` asks for 1.
        config: None for the one that `configs.choose` gives.

    Returns:
        [N, K, P, Q] of x's dtype, channels_last.
    """
    n, c, h, w = x.shape
    mid, out = w1.shape[0], w3.shape[0]
    shape = Bottleneck(n, c, h, w, mid, out, stride1, stride2, projection=wd is not None)
    config = configuration("bottleneck", shape, x, config)
    m, bn, bc, tma = config.block_m, config.block_n, config.block_c, config.tma
    _, _, p1, q1 = shape.layers()[0].output_shape
    _, _, p, q = shape.output_shape
    prec = precision(x)
    x, pitch = image(x)
    y = empty_output(shape.output_shape, x)
    mb = power_of_two(mid)
    bk = min(config.block_k, mb)
    run = config.tiles * m
    # One past the last pixel that a run's windows touch, minus the first: see `band_start` and `band_end`.
    capacity = min(stride2 * (run - 1 + ((run - 1) // q + 1) * (q1 - q)) + 2 * q1 + 3, n * p1 * q1)
    grid = programs(triton.cdiv(n * p * q, run), config.programs, x.device)
    scratch = torch.empty(grid * capacity * mb, dtype=x.dtype, device=x.device)
    projection = wd is not None
    if wd is None or bd is None:  # the kernel looks at none of them
        wd, bd, sd = w3, b3, s3
    with on_device(x):
        bottleneck_kernel[(grid,)](
            matrix(x, pitch, (m, bc), tma and stride1 == 1),
            matrix(x, pitch, (m, bc if projection else bn), tma and stride1 * stride2 == 1),
            x,
            weights(w1, (mb, bc), tma, prec), *vectors(s1, b1),
            scratch,
            weights(w2, (mb, bk), tma, prec), *vectors(s2, b2),
            weights(w3, (bn, mb), tma, prec), *vectors(s3, b3),
            weights(wd, (bn, bc), tma, prec), *vectors(sd, bd),
            matrix(y, out, (m, bn), tma),
            n, h, w, p1, q1, p, q, c, mid, out, pitch, capacity,
            STRIDE1=stride1, STRIDE2=stride2, PROJECTION=projection, RAGGED=mb != mid, MB=mb, TILES=config.tiles,
            BM=m, BN=bn, BC=bc, BK=bk, SIDE_STAGES=2, TMA=tma, PREC=prec,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return y
