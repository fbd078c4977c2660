"""What the kernels of whole blocks share: tiles of consecutive pixels, and the sums of a 1x1 and a 3x3 over them.

All images are seen as [pixels, channels] with pixels = N * H * W in order. A tile is BM consecutive pixels whatever the
image size, so no lane is wasted at 14x14 or 7x7 and the input of a 1x1, the shortcut and the output are plain matrices
(TMA boxes on sm_90 and newer). Only the 3x3 looks at neighbours: it loads by pointers and masks what lies outside.

A block whose intermediate h1 is needed by several tiles keeps it in a *band*: a program computes the h1 of a run of
consecutive output pixels, halo included, into its private part of a scratch (which stays in L2), and reads it back
nine times through L1. Nothing but the program itself touches that part, so no grid-wide order is needed.
Not yet run on a GPU, which alone can show that the barriers around the scratch suffice; PTX's memory model says so.
"""

import triton
import triton.language as tl

from .common import affine, relu, round_to_tf32, vector


@triton.jit
def factor(v, PREC: tl.constexpr):
    """`v` as a matrix instruction should get it: it would truncate float32 to TF32."""
    return round_to_tf32(v) if PREC == "tf32" else v


@triton.jit
def scaled(acc, scale, shift, c, count):
    """acc * scale + shift, by channels `c` of `count` (columns)."""
    return affine(acc, vector(scale, c, count), vector(shift, c, count), 1)


@triton.jit
def hidden(acc, scale, shift, c, count, RAGGED: tl.constexpr):
    """relu(acc * scale + shift), and with RAGGED 0 from channel `count` on, where an infinite input leaves NaN."""
    h = relu(scaled(acc, scale, shift, c, count))
    if RAGGED:
        h = tl.where((c < count)[None, :], h, 0.0)
    return h


@triton.jit
def weight_tile(
    w, tap, n, c, N, C, TAPS: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """[BN, BC] of the weights of one tap, 0 outside.

    w: a descriptor of [TAPS, N, C] with boxes [1, BN, BC], or a pointer to [N, TAPS, C]. TF32 ones are rounded already.
    """
    if TMA:
        return w.load([tap, n, c]).reshape(BN, BC)
    else:
        rn = n + tl.arange(0, BN)
        rc = c + tl.arange(0, BC)
        ptrs = w + (rn.to(tl.int64) * TAPS + tap)[:, None] * C + rc[None, :]
        return tl.load(ptrs, mask=(rn < N)[:, None] & (rc < C)[None, :], other=0.0)


@triton.jit
def source_pixels(q, H, W, P, Q, STRIDE: tl.constexpr):
    """The pixels of images [H, W] under the pixels `q` of images [P, Q], one in STRIDE along each axis."""
    if STRIDE == 1:
        return q
    else:
        return (q // (P * Q) * H + q // Q % P * STRIDE) * W + q % Q * STRIDE


@triton.jit
def pixel_tile(x, p, rows, ok, c, C, BK: tl.constexpr, TMA: tl.constexpr):
    """[BM, BK] of an image, channels from `c`, 0 outside.

    x: a descriptor of boxes [BM, BK], read from pixel `p` on; or pointers are read: the pixels `rows`, where `ok`.
    """
    if TMA:
        return x.load([p, c])
    else:
        rc = c + tl.arange(0, BK)
        return tl.load(rows[:, None] + rc[None, :], mask=ok[:, None] & (rc < C)[None, :], other=0.0)


@triton.jit
def store_tile(y, p, n, v, pixels, N, pitch, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr):
    """Write [BM, BN] at pixel `p` and channel `n`, the part that is inside."""
    if TMA:
        y.store([p, n], v)
    else:
        rp = p + tl.arange(0, BM)
        rn = n + tl.arange(0, BN)
        ptrs = y + rp.to(tl.int64)[:, None] * pitch + rn[None, :]
        tl.store(ptrs, v, mask=(rp < pixels)[:, None] & (rn < N)[None, :])


@triton.jit
def conv1x1_sum(
    x, w, p, rows, ok, n, C, N,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, X_TMA: tl.constexpr, W_TMA: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """float32 [BM, BN]: the 1x1 convolution of a tile of pixels, output channels from `n`; see `pixel_tile`."""
    acc = tl.zeros((BM, BN), tl.float32)
    for c in tl.range(0, C, BK):
        a = pixel_tile(x, p, rows, ok, c, C, BK, X_TMA)
        acc = tl.dot(factor(a, PREC), weight_tile(w, 0, n, c, N, C, 1, BN, BK, W_TMA).T, acc, input_precision=PREC)
    return acc


@triton.jit
def conv3x3_sum(
    x, w, p, n, first, pixels, H, W, P, Q, C, N, pitch,
    STRIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DENSE: tl.constexpr,
    W_TMA: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """float32 [BM, BN]: the 3x3 convolution, padding 1, at BM output pixels from `p`, output channels from `n`.

    `x` points at pixel `first` of images [H, W]; the output's are [P, Q]. DENSE: x has a multiple of BK channels, zeros
    from channel C on.
    """
    q = p + tl.arange(0, BM)
    rk = tl.arange(0, BK)
    h = q // Q % P * STRIDE - 1
    v = q % Q * STRIDE - 1
    # One bit a row and a column of the window says whether it is inside: two shifts a tap instead of five comparisons.
    inside_h = (h >= 0).to(tl.int32) | 2 | ((h + 2 < H).to(tl.int32) << 2)
    inside_h = tl.where(q < pixels, inside_h, 0)
    inside_w = (v >= 0).to(tl.int32) | 2 | ((v + 2 < W).to(tl.int32) << 2)
    start = (q // (P * Q) * H + h) * W + v - first
    rows = x + start.to(tl.int64)[:, None] * pitch + rk[None, :]
    blocks = tl.cdiv(C, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for i in tl.range(0, 9 * blocks):
        tap = i // blocks
        c = i % blocks * BK
        r = tap // 3
        s = tap % 3
        mask = ((inside_h >> r) & (inside_w >> s) & 1)[:, None] != 0
        if not DENSE:
            mask = mask & (c + rk < C)[None, :]
        # .ca: the nine taps of a pixel come from L1 after the first.
        a = tl.load(rows + ((r * W + s) * pitch + c), mask=mask, other=0.0, cache_modifier=".ca")
        acc = tl.dot(factor(a, PREC), weight_tile(w, tap, n, c, N, C, 9, BN, BK, W_TMA).T, acc, input_precision=PREC)
    return acc


@triton.jit
def band_start(p, H, W, P, Q, STRIDE: tl.constexpr):
    """The first pixel of images [H, W] that the 3x3 windows of output pixels from `p` on may touch; not below 0."""
    return tl.maximum((p // (P * Q) * H + p // Q % P * STRIDE - 1) * W + p % Q * STRIDE - 1, 0)


@triton.jit
def band_end(p, H, W, P, Q, STRIDE: tl.constexpr):
    """One past the last pixel that the windows of output pixels up to `p` (inclusive) may touch; may pass the end."""
    return (p // (P * Q) * H + p // Q % P * STRIDE + 1) * W + p % Q * STRIDE + 2
