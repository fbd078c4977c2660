"""1x1 convolution of stride 1: a persistent matrix product on tensor descriptors (TMA)."""

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .common import affine, relu, round_to_tf32, vector
from .configs import architecture
from .implicit_gemm import finish
from .layer_configs import PointwiseConfig
from .layers import Layer, pack


@triton.jit
def pointwise_kernel(
    x, w, scale_ptr, shift_ptr, residual_ptr, in_scale_ptr, in_shift_ptr, y, M, C, k_units, r_units,
    RELU: tl.constexpr, VEC: tl.constexpr, PRECISION: tl.constexpr, ROUND: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, FLATTEN: tl.constexpr,
    SWAP: tl.constexpr,
):  # fmt: skip
    """y [M, K] = epilogue(prologue(x [M, C]) @ w [K, C].T), tile after tile.

    x, w, y: descriptors with boxes [BM, BK], [BN, BK], [BM, BN / PARTS]; K = k_units * VEC, and the residual's pixels
    are r_units * VEC elements apart: the compiler learns from it that addresses are multiples of 16 bytes.
    PARTS: the epilogue runs on that many column parts (1, 2, 4): in one piece 128 x 256 spills. ROUND: to TF32, here.
    SWAP: the product is computed transposed.
    """
    K = k_units * VEC
    tiles_n = tl.cdiv(K, BN)
    tiles = tl.cdiv(M, BM) * tiles_n
    # Channels run fastest: blocks running at one time share pixels in L2.
    for t in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        m = t // tiles_n * BM
        n = t % tiles_n * BN
        acc = tl.zeros((BN, BM) if SWAP else (BM, BN), tl.float32)
        for c in tl.range(0, C, BK):
            a = x.load([m, c])
            if in_scale_ptr is not None:
                k = c + tl.arange(0, BK)
                a = relu(affine(a, vector(in_scale_ptr, k, C), vector(in_shift_ptr, k, C), 1)).to(x.dtype)
            if ROUND:
                a = round_to_tf32(a)
            b = w.load([n, c])
            acc = tl.dot(b if SWAP else a, a.T if SWAP else b.T, acc, input_precision=PRECISION)
        if SWAP:
            acc = acc.T
        store_parts(acc, scale_ptr, shift_ptr, residual_ptr, y, m, n, M, K, r_units * VEC, RELU, BM, BN, PARTS)


@triton.jit
def store_parts(
    acc, scale_ptr, shift_ptr, residual_ptr, y, m, n, M, K, r_pitch,
    RELU: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Epilogue and store of acc [BM, BN] in PARTS column parts."""
    if PARTS == 1:
        rm = m + tl.arange(0, BM)
        rn = n + tl.arange(0, BN)
        scale = vector(scale_ptr, rn, K)
        shift = vector(shift_ptr, rn, K)
        v = finish(acc, scale, shift, residual_ptr, rm.to(tl.int64), rn, rm < M, K, r_pitch, RELU)
        y.store([m, n], v.to(y.dtype))
    else:
        HALF: tl.constexpr = BN // 2
        left, right = acc.reshape(BM, 2, HALF).permute(0, 2, 1).split()
        store_parts(left, scale_ptr, shift_ptr, residual_ptr, y, m, n, M, K, r_pitch, RELU, BM, HALF, PARTS // 2)
        store_parts(
            right, scale_ptr, shift_ptr, residual_ptr, y, m, n + HALF, M, K, r_pitch, RELU, BM, HALF, PARTS // 2
        )


def run(layer: Layer, config: PointwiseConfig) -> Tensor:
    """Compute a 1x1 layer of stride 1, with or without a prologue, on aligned images.

    Returns:
        layer.y.
    """
    shape = layer.shape
    pixels, c, k = shape.n * shape.h * shape.w, shape.c, shape.k
    weight = pack(layer.weight, layer.precision)
    tf32 = layer.precision == "tf32"
    tiles = triton.cdiv(pixels, config.block_m) * triton.cdiv(k, config.block_n)
    blocks = tiles
    if config.persistent:
        blocks = min(tiles, config.resident_blocks(layer.x.dtype, architecture(layer.x.device)))
    # What a prologue computes stays in registers as the first factor, and ptxas may then serialise wgmma.
    swap = layer.prologue is not None and config.block_n >= 64 and architecture(layer.x.device).warpgroups
    unit = layer.unit(k, layer.residual_pitch)
    in_scale, in_shift = layer.prologue or (None, None)
    with launch.on_device(layer.x):
        pointwise_kernel[(blocks,)](
            launch.descriptor(layer.x, (pixels, c), (layer.x_pitch, 1), (config.block_m, config.block_k), tf32),
            launch.descriptor(weight, (k, weight.shape[1]), (weight.shape[1], 1), (config.block_n, config.block_k)),
            layer.scale, layer.shift, layer.residual, in_scale, in_shift,
            launch.descriptor(
                layer.y, (pixels, k), (layer.y_pitch, 1), (config.block_m, config.block_n // config.parts)
            ),
            pixels, c, k // unit, layer.residual_pitch // unit,
            RELU=layer.relu, VEC=unit, PRECISION=layer.precision,
            ROUND=tf32 and (layer.prologue is not None or not launch.DESCRIPTOR_ROUNDS),
            BM=config.block_m, BN=config.block_n, BK=config.block_k, PARTS=config.parts, FLATTEN=config.flatten,
            SWAP=swap,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return layer.y
