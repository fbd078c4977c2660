"""Any convolution as one matrix product (implicit GEMM), by pointer loads, on any GPU.

Rows are output pixels, columns output channels, the sum runs over taps and input channels. Around it: a prologue on the
input (scale, shift, ReLU; padding stays zero), a second product into the same accumulator (the projection shortcut of a
block), the epilogue (scale, shift, residual, ReLU), and for grids too small for the GPU a sum cut into parts (split-K),
which a second kernel adds up in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .common import affine, relu, round_to_tf32, tiny_scale, vector
from .configs import architecture
from .layer_configs import FEW_CHANNELS, IEEE, ImplicitGemmConfig, merged_groups
from .layers import Layer, pack, pack_projection


@triton.jit
def finish(acc, scale, shift, residual_ptr, rows, columns, in_rows, N, pitch, RELU: tl.constexpr):
    """The epilogue: acc [rows, columns] * scale + shift + residual, ReLU. `rows` are int64; `in_rows` masks them."""
    v = affine(acc, scale, shift, 1)
    if residual_ptr is not None:
        mask = in_rows[:, None] & (columns < N)[None, :]
        v += tl.load(residual_ptr + rows[:, None] * pitch + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if RELU:
        v = relu(v)
    return v


@triton.jit
def implicit_gemm_kernel(
    x_ptr, w_ptr, scale_ptr, shift_ptr, residual_ptr, in_scale_ptr, in_shift_ptr,
    x2_ptr, w2_ptr, scale2_ptr, shift2_ptr, y_ptr,
    M, H, W, P, Q, H2, W2, c_units, k_units, w_units, x_units, r_units, y_units, c2_units, w2_units, x2_units,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr,
    PAD_W: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, STRIDE2: tl.constexpr, RELU: tl.constexpr,
    GATHER: tl.constexpr, C_BLOCKS: tl.constexpr, IN_VEC: tl.constexpr, OUT_VEC: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """One [BM pixels, BN channels] tile of one group; program ids: tile (channels fastest), group, part of the sum.

    Sizes and pitches (elements from pixel to pixel) come in units of IN_VEC or OUT_VEC elements: the compiler learns
    from it that addresses are multiples of 16 bytes. w: [groups * K, w_units * 8], of one output channel tap by tap the
    input channels, padded with zeros. C_BLOCKS: BK blocks in a tap's channels, a constant where there is more than one
    tap. GATHER: a block of the sum runs across taps, for few input channels. With SPLIT > 1 y is float32
    [SPLIT, M, groups * K] and takes bare sums. SWAP: the product is computed transposed.
    """
    C = c_units * IN_VEC
    K = k_units * OUT_VEC
    x_pitch = x_units * IN_VEC
    w_pitch = w_units * 8
    w_tap = tl.cdiv(C, 8) * 8
    group = tl.program_id(1)
    # Channels run fastest, so that blocks running at one time share pixels: 132 of them cover 8 x 16 tiles even at 2048
    # channels, and need no other order to be near square.
    tiles_n = tl.cdiv(K, BN)
    rm = tl.program_id(0) // tiles_n * BM + tl.arange(0, BM)
    rn = tl.program_id(0) % tiles_n * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    in_rows = rm < M
    if R * S * STRIDE_H * STRIDE_W == 1 and PAD_H + PAD_W == 0:
        pixel = rm.to(tl.int64)
    else:
        h0 = rm // Q % P * STRIDE_H - PAD_H
        w0 = rm % Q * STRIDE_W - PAD_W
        pixel = ((rm // (P * Q)).to(tl.int64) * H + h0) * W + w0
    x_rows = x_ptr + pixel[:, None] * x_pitch + group * C
    w_rows = w_ptr + (group * K + rn).to(tl.int64)[:, None] * w_pitch
    in_columns = (rn < K)[:, None]

    if GATHER:
        blocks = tl.cdiv(R * S * C, BK)
    elif R * S == 1:
        blocks = tl.cdiv(C, BK)
    else:
        blocks = R * S * C_BLOCKS
    first = 0
    last = blocks
    if SPLIT > 1:
        share = tl.cdiv(blocks, SPLIT)
        first = tl.program_id(2) * share
        last = tl.minimum(first + share, blocks)
    acc = tl.zeros((BN, BM) if SWAP else (BM, BN), tl.float32)
    for i in tl.range(first, last):
        if GATHER:
            k = i * BK + rk
            c = k % C
            tap = k // C
            h = h0[:, None] + (tap // S * DIL_H)[None, :]
            v = w0[:, None] + (tap % S * DIL_W)[None, :]
            in_image = (h >= 0) & (h < H) & (v >= 0) & (v < W) & (tap < R * S)[None, :]
            offsets = (tap // S * DIL_H * W + tap % S * DIL_W).to(tl.int64) * x_pitch + c
        elif R * S == 1:
            k = i * BK + rk
            c = k
            offsets = k
            if PAD_H + PAD_W == 0:
                in_image = (c < C)[None, :]
            else:
                in_image = ((h0 >= 0) & (h0 < H) & (w0 >= 0) & (w0 < W))[:, None] & (c < C)[None, :]
        else:
            tap = i // C_BLOCKS
            c = i % C_BLOCKS * BK + rk
            r = tap // S
            s = tap % S
            h = h0 + r * DIL_H
            v = w0 + s * DIL_W
            in_image = ((h >= 0) & (h < H) & (v >= 0) & (v < W))[:, None] & (c < C)[None, :]
            offsets = (r * DIL_H * W + s * DIL_W).to(tl.int64) * x_pitch + c
            k = tap * w_tap + c
        mask = in_rows[:, None] & in_image
        a = tl.load(x_rows + offsets[None, :], mask=mask, other=0.0)
        if in_scale_ptr is not None:
            scale = vector(in_scale_ptr + group * C, c, C)
            shift = vector(in_shift_ptr + group * C, c, C)
            a = tl.where(mask, relu(affine(a, scale, shift, 1)), 0.0).to(x_ptr.dtype.element_ty)
        if PRECISION == "tf32":
            a = round_to_tf32(a)
        in_sum = k < w_pitch if GATHER else c < w_tap
        b = tl.load(w_rows + k[None, :], mask=in_columns & in_sum[None, :], other=0.0)
        acc = tl.dot(b if SWAP else a, a.T if SWAP else b.T, acc, input_precision=PRECISION)

    if SWAP:
        acc = acc.T
    rows = rm.to(tl.int64)
    columns = group * K + rn
    mask = in_rows[:, None] & (rn < K)[None, :]
    channels = tl.num_programs(1) * K
    if SPLIT > 1:
        rows += tl.program_id(2).to(tl.int64) * M
        tl.store(y_ptr + rows[:, None] * channels + columns[None, :], acc, mask=mask)
    else:
        scale = vector(scale_ptr, columns, channels)
        shift = vector(shift_ptr, columns, channels)
        if x2_ptr is not None:
            acc, scale, shift = add_projection(
                acc, scale, shift, x2_ptr, w2_ptr, scale2_ptr, shift2_ptr, rm, rn, in_rows, P, Q, H2, W2, K,
                c2_units * IN_VEC, w2_units * 8, x2_units * IN_VEC, STRIDE2, PRECISION, BK,
            )  # fmt: skip
        v = finish(acc, scale, shift, residual_ptr, rows, columns, in_rows, channels, r_units * OUT_VEC, RELU)
        tl.store(
            y_ptr + rows[:, None] * (y_units * OUT_VEC) + columns[None, :], v.to(y_ptr.dtype.element_ty), mask=mask
        )


@triton.jit
def add_projection(
    acc, scale, shift, x_ptr, w_ptr, scale2_ptr, shift2_ptr, rm, rn, in_rows, P, Q, H, W, K, C, w_pitch, x_pitch,
    STRIDE: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Add a 1x1 convolution of another image to acc [BM, BN].

    Returns:
        Accumulator, scale and shift that give acc * scale + shift + conv * scale2 + shift2.
    """
    wanted = vector(scale2_ptr, rn, K)
    out = tl.where(tiny_scale(wanted), 1.0, wanted)  # there the packed weights are zero
    acc = acc * (scale / out)[None, :]
    rk = tl.arange(0, BK)
    pixel = ((rm // (P * Q)).to(tl.int64) * H + rm // Q % P * STRIDE) * W + rm % Q * STRIDE
    x_rows = x_ptr + pixel[:, None] * x_pitch
    w_rows = w_ptr + rn.to(tl.int64)[:, None] * w_pitch
    for c in tl.range(0, C, BK):
        k = c + rk
        a = tl.load(x_rows + k[None, :], mask=in_rows[:, None] & (k < C)[None, :], other=0.0)
        if PRECISION == "tf32":
            a = round_to_tf32(a)
        b = tl.load(w_rows + k[None, :], mask=(rn < K)[:, None] & (k < w_pitch)[None, :], other=0.0)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    return acc, out, shift + vector(shift2_ptr, rn, K)


@triton.jit
def reduce_kernel(
    partial_ptr, scale_ptr, shift_ptr, residual_ptr, y_ptr, M, k_units, r_units, y_units,
    RELU: tl.constexpr, OUT_VEC: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Add up SPLIT float32 partial sums [M, K] in their order, then the epilogue."""
    K = k_units * OUT_VEC
    tiles_n = tl.cdiv(K, BN)
    rm = tl.program_id(0) // tiles_n * BM + tl.arange(0, BM)
    rn = tl.program_id(0) % tiles_n * BN + tl.arange(0, BN)
    in_rows = rm < M
    mask = in_rows[:, None] & (rn < K)[None, :]
    rows = rm.to(tl.int64)
    at = rows
    acc = tl.zeros((BM, BN), tl.float32)
    for _ in tl.range(0, SPLIT):
        acc += tl.load(partial_ptr + at[:, None] * K + rn[None, :], mask=mask, other=0.0)
        at += M
    scale = vector(scale_ptr, rn, K)
    shift = vector(shift_ptr, rn, K)
    v = finish(acc, scale, shift, residual_ptr, rows, rn, in_rows, K, r_units * OUT_VEC, RELU)
    target = y_ptr + rows[:, None] * (y_units * OUT_VEC) + rn[None, :]
    tl.store(target, v.to(y_ptr.dtype.element_ty), mask=mask)


def run(layer: Layer, config: ImplicitGemmConfig) -> Tensor:
    """Compute a layer.

    Args:
        layer: its tensors; prologue, projection (at groups=1, in place of a residual) and unaligned images are allowed.
        config: float32 without TF32 has one of its own, and with a projection the sum is not cut into parts.

    Returns:
        layer.y.
    """
    shape = layer.shape
    if layer.x.dtype == torch.float32 and layer.precision == "ieee":
        config = IEEE
    merged = merged_groups(shape)
    groups = shape.groups // merged
    c, k = shape.c // groups, shape.k // groups
    gather = c < FEW_CHANNELS and shape.r * shape.s > 1
    weight = pack(layer.weight, layer.precision, groups=shape.groups, merged=merged, across_taps=gather)
    # A prologue's result stays in registers as the first factor, and ptxas then serialises wgmma; as the second factor
    # it goes through shared memory.
    swap = layer.prologue is not None and config.block_n >= 64 and architecture(layer.x.device).warpgroups
    split = 1 if layer.projection is not None else config.split
    n, _, p, q = shape.output_shape
    pixels = n * p * q
    side_c = side_h = side_w = side_units = 0
    side_stride = 1
    side: tuple[Tensor | None, ...] = (None, None, None, None)
    if layer.projection is not None:
        side_weight = pack_projection(layer.projection, layer.precision)
        side = (layer.projection.x, side_weight, layer.projection.scale, layer.projection.shift)
        _, side_c, side_h, side_w = layer.projection.x.shape
        side_units, side_stride = side_weight.shape[1] // 8, layer.projection.stride
    in_vec = layer.unit(c, layer.x_pitch, side_c, layer.x2_pitch)
    out_vec = layer.unit(k, layer.y_pitch, layer.residual_pitch)
    target = layer.y if split == 1 else torch.empty(split, pixels, shape.k, device=layer.x.device)
    in_scale, in_shift = layer.prologue or (None, None)
    with launch.on_device(layer.x):
        tiles = triton.cdiv(pixels, config.block_m) * triton.cdiv(k, config.block_n)
        implicit_gemm_kernel[(tiles, groups, split)](
            layer.x, weight, layer.scale, layer.shift, layer.residual, in_scale, in_shift, *side, target,
            pixels, shape.h, shape.w, p, q, side_h, side_w, c // in_vec, k // out_vec, weight.shape[1] // 8,
            layer.x_pitch // in_vec, layer.residual_pitch // out_vec, layer.y_pitch // out_vec,
            side_c // in_vec, side_units, layer.x2_pitch // in_vec,
            R=shape.r, S=shape.s, STRIDE_H=shape.stride[0], STRIDE_W=shape.stride[1], PAD_H=shape.padding[0],
            PAD_W=shape.padding[1], DIL_H=shape.dilation[0], DIL_W=shape.dilation[1], STRIDE2=side_stride,
            RELU=layer.relu, GATHER=gather,
            C_BLOCKS=triton.cdiv(c, config.block_k) if shape.r * shape.s > 1 and not gather else 0,
            IN_VEC=in_vec, OUT_VEC=out_vec, PRECISION=layer.precision,
            BM=config.block_m, BN=config.block_n, BK=config.block_k, SPLIT=split, SWAP=swap,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip
        if split > 1:
            block_n = min(64, triton.next_power_of_2(shape.k))
            reduce_kernel[(triton.cdiv(pixels, 16) * triton.cdiv(shape.k, block_n),)](
                target, layer.scale, layer.shift, layer.residual, layer.y, pixels, shape.k // out_vec,
                layer.residual_pitch // out_vec, layer.y_pitch // out_vec,
                RELU=layer.relu, OUT_VEC=out_vec, SPLIT=split, BM=16, BN=block_n, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return layer.y
