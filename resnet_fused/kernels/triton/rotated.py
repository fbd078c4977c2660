"""A bottleneck cut before its 3x3, not before its first 1x1: [3x3 -> 1x1 + shortcut -> next block's 1x1] in one launch.

In a chain of identity blocks nothing is computed twice that way: no tile needs another's h1, h2 stays in registers, and
each 1x1 reads the output's tile where it was made.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ...shapes import BottleneckChain
from ..layout import nhwc
from .bands import conv3x3_sum, factor, hidden, pixel_tile, scaled, store_tile, weight_tile
from .block_configs import RotatedConfig, configuration
from .common import relu
from .launch import empty_output, on_device, precision
from .layer_configs import power_of_two
from .matrices import image, matrix, pointwise_layer, programs, vectors, weights


@triton.jit(do_not_specialize=["pixels", "H", "W"])
def rotated_kernel(
    h1, w2, s2, b2, w3, s3, b3, x, y, w1, s1, b1, h1_next,
    pixels, H, W, MID, K, NEXT_MID, x_pitch,
    NEXT: tl.constexpr, RAGGED: tl.constexpr, RAGGED_K: tl.constexpr, MB: tl.constexpr, NEXT_MB: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """h1 [pixels, MID], x [pixels, K] -> y [pixels, K], and with NEXT h1_next [pixels, NEXT_MID].

    h2 = relu(s2 * conv3x3(h1, w2) + b2), y = relu(s3 * conv1x1(h2, w3) + b3 + x),
    h1_next = relu(s1 * conv1x1(y, w1) + b1).
    TMA: x, y (boxes [BM, BN]), h1_next ([BM, NEXT_MB]) and the weights are descriptors. MB >= MID, NEXT_MB >= NEXT_MID.
    """
    dtype: tl.constexpr = h1.dtype.element_ty
    rc = tl.arange(0, MB)
    for tile in tl.range(tl.program_id(0), tl.cdiv(pixels, BM), tl.num_programs(0)):
        p = tile * BM
        q = p + tl.arange(0, BM)
        total = conv3x3_sum(h1, w2, p, 0, 0, pixels, H, W, H, W, MID, MID, MID, 1, BM, MB, BK, False, TMA, PREC)
        h2 = hidden(total, s2, b2, rc, MID, RAGGED).to(dtype)
        rows = x + q.to(tl.int64) * x_pitch if not TMA else q
        reduced = tl.zeros((BM, NEXT_MB), tl.float32)
        for n in tl.range(0, K, BN):
            rn = n + tl.arange(0, BN)
            out = tl.dot(factor(h2, PREC), weight_tile(w3, 0, n, 0, K, MID, 1, BN, MB, TMA).T, input_precision=PREC)
            out = scaled(out, s3, b3, rn, K) + pixel_tile(x, p, rows, q < pixels, n, K, BN, TMA).to(tl.float32)
            out = relu(out).to(dtype)
            store_tile(y, p, n, out, pixels, K, K, BM, BN, TMA)
            if NEXT:
                if RAGGED_K:  # past the last channel an infinite h2 times a weight of 0 left NaN
                    out = tl.where((rn < K)[None, :], out, 0.0)
                w = weight_tile(w1, 0, 0, n, NEXT_MID, K, 1, NEXT_MB, BN, TMA)
                reduced = tl.dot(factor(out, PREC), w.T, reduced, input_precision=PREC)
        if NEXT:
            h = hidden(reduced, s1, b1, tl.arange(0, NEXT_MB), NEXT_MID, False).to(dtype)
            store_tile(h1_next, p, 0, h, pixels, NEXT_MID, NEXT_MID, BM, NEXT_MB, TMA)


def rotated(
    h1: Tensor,
    w2: Tensor,
    s2: Tensor | None,
    b2: Tensor,
    w3: Tensor,
    s3: Tensor | None,
    b3: Tensor,
    x: Tensor,
    w1: Tensor | None = None,
    s1: Tensor | None = None,
    b1: Tensor | None = None,
    *,
    config: RotatedConfig,
) -> tuple[Tensor, Tensor | None]:
    """The rest of an identity bottleneck after its first 1x1, and the next block's first 1x1, in one launch.

    Args:
        h1: [N, M, H, W], what the block's first 1x1 gave.
        w2: [M, M, 3, 3], as w3 [K, M, 1, 1] and w1 [M', K, 1, 1] of h1's dtype.
        s2: float32 [M], as b2; a scale of None is ones.
        b2: see s2.
        w3: see w2.
        s3: float32 [K], as b3.
        b3: see s3.
        x: [N, K, H, W], the block's input.
        w1: of the next block; None at the end of a chain.
        s1: float32 [M'], as b1.
        b1: see s1; None without w1.
        config: of `bottleneck_chain`.

    Returns:
        The block's output [N, K, H, W] and the next block's h1 [N, M', H, W] (None without w1), channels_last.
    """
    n, mid, h, w = h1.shape
    out = w3.shape[0]
    m, bn, tma = config.block_m, config.block_n, config.tma
    prec = precision(x)
    h1 = nhwc(h1)
    x, pitch = image(x)
    y = empty_output(x.shape, x)
    mb = power_of_two(mid)
    if w1 is None or b1 is None:
        last, h1_next, next_mid = True, None, mid
        next_weights, next_vectors, next_matrix = weights(w3, (bn, mb), tma, prec), vectors(s2, b2), h1
    else:
        last, next_mid = False, w1.shape[0]
        h1_next = empty_output((n, next_mid, h, w), x)
        box = (power_of_two(next_mid), bn)
        next_weights, next_vectors = weights(w1, box, tma, prec), vectors(s1, b1)
        next_matrix = matrix(h1_next, next_mid, (m, power_of_two(next_mid)), tma)
    with on_device(x):
        rotated_kernel[(programs(triton.cdiv(n * h * w, m), config.programs, x.device),)](
            h1,
            weights(w2, (mb, config.block_k), tma, prec), *vectors(s2, b2),
            weights(w3, (bn, mb), tma, prec), *vectors(s3, b3),
            matrix(x, pitch, (m, bn), tma),
            matrix(y, out, (m, bn), tma),
            next_weights, *next_vectors, next_matrix,
            n * h * w, h, w, mid, out, next_mid, pitch,
            NEXT=not last, RAGGED=mb != mid, RAGGED_K=out % bn != 0, MB=mb, NEXT_MB=power_of_two(next_mid),
            BM=m, BN=bn, BK=config.block_k, TMA=tma, PREC=prec,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return y, h1_next


def stage(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    shifts: Sequence[Tensor],
    *,
    config: RotatedConfig | None = None,
) -> Tensor:
    """A chain of identity bottlenecks (`ops.bottleneck_chain`): the first 1x1 as a layer, then one launch a block.

    Args:
        x: [N, K, H, W], float32, bfloat16 or float16; other memory formats than NHWC are copied.
        weights: three of each block in order: [M, K, 1, 1], [M, M, 3, 3] and [K, M, 1, 1], of x's dtype.
        scales: float32, one of the output channels of each weight; None for ones.
        shifts: float32, alike.
        config: None for the one that `configs.choose` gives.

    Returns:
        [N, K, H, W] of x's dtype, channels_last.

    Raises:
        BackendError: the kernel cannot run these channels.
    """
    n, c, h, w = x.shape
    shape = BottleneckChain(n, c, h, w, weights[0].shape[0], len(weights) // 3)
    config = configuration("bottleneck_chain", shape, x, config)
    layers = list(zip(weights, scales, shifts, strict=True))
    h1: Tensor | None = pointwise_layer(x, *layers[0], "relu")
    for i in range(0, len(layers), 3):
        assert h1 is not None
        following = layers[i + 3] if i + 3 < len(layers) else (None, None, None)
        x, h1 = rotated(h1, *layers[i + 1], *layers[i + 2], x, *following, config=config)
    return x
