"""Pieces that the kernels share: arithmetic, vectors, the order of tiles. Importing it readies the interpreter."""

import triton
import triton.language as tl

from . import interpreter

if interpreter.INTERPRETED:
    interpreter.install()


@triton.jit
def relu(v):
    """max(v, 0); NaN passes on, as torch's ReLU lets it."""
    return tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def vector(pointer, index, count):
    """Elements `index` of a vector of `count` as float32, 0 past its end."""
    return tl.load(pointer + index, mask=index < count, other=0.0).to(tl.float32)


@triton.jit
def round_to_tf32(v):
    """float32 rounded half away from zero to TF32's 10 bits of mantissa, as `cvt.rna.tf32` does.

    Matrix instructions truncate, which doubles the error and biases sums towards zero. NaN is kept as it is: the carry
    would turn 0x7fffffff into -0.
    """
    bits = v.to(tl.int32, bitcast=True)
    return tl.where(v == v, ((bits + 0x1000) & -8192).to(tl.float32, bitcast=True), v)


@triton.jit
def affine(v, scale, shift, CHANNEL_AXIS: tl.constexpr):
    """v * scale + shift in float32; `scale` and `shift` run along CHANNEL_AXIS of the 2-D `v`."""
    if CHANNEL_AXIS == 1:
        return v.to(tl.float32) * scale[None, :] + shift[None, :]
    else:
        return v.to(tl.float32) * scale[:, None] + shift[:, None]


TINY_SCALE = tl.constexpr(2.0**-60)


@triton.jit
def tiny_scale(scale):
    """Where a projection's BatchNorm scale is too small to divide by: what it would add is dropped."""
    return tl.abs(scale) < TINY_SCALE


@triton.jit
def pixel_tile(t, H, W, NB: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr):
    """(image, row, column) where tile t of [NB, TH, TW] pixels starts; columns run fastest."""
    tiles_w = tl.cdiv(W, TW)
    tiles_h = tl.cdiv(H, TH)
    return t // (tiles_w * tiles_h) * NB, t // tiles_w % tiles_h * TH, t % tiles_w * TW
