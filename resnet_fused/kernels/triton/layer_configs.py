"""Configurations of the layer kernels: which tiles there are, and a model of their times to rank them for a shape."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ...shapes import Conv
from .configs import Architecture, Config, register

FEW_CHANNELS = 16
"""With fewer input channels (of a group), a step of implicit GEMM's sum runs across taps: one would not fill it."""
MERGED_CHANNELS = 64
"""Groups narrower than this are computed several at a time, as one dense group with zeros in its weights."""


@dataclass(frozen=True, kw_only=True)
class ImplicitGemmConfig(Config):
    """A tile of `block_m` pixels and `block_n` channels, its sum in steps of `block_k`, cut into `split` parts."""

    block_m: int
    block_n: int
    block_k: int
    split: int = 1


@dataclass(frozen=True, kw_only=True)
class PointwiseConfig(Config):
    """A tile of `block_m` pixels and `block_n` channels, its sum in steps of `block_k`.

    Attributes:
        parts: column parts of the epilogue, 1, 2 or 4.
        persistent: whether there are only as many blocks as run at a time, each computing several tiles.
        flatten: whether loads for the next tile begin during the epilogue of the last.
    """

    block_m: int
    block_n: int
    block_k: int
    parts: int
    persistent: bool
    flatten: bool

    def resident_blocks(self, dtype: torch.dtype, arch: Architecture) -> int:
        """How many blocks the GPU runs at a time."""
        tile = _Tile(
            self.block_m, self.block_n, self.block_k * dtype.itemsize // 2, self.warps, self.stages, self.parts
        )
        return arch.sms * tile.resident(dtype.itemsize, arch)


@dataclass(frozen=True, kw_only=True)
class TmaConvConfig(Config):
    """A tile of `box` (images, rows, columns) output pixels and `block_n` channels, the sum in steps of `block_k`."""

    box: tuple[int, int, int]
    block_n: int
    block_k: int

    def resident_blocks(self, dtype: torch.dtype, arch: Architecture) -> int:
        """How many blocks the GPU runs at a time."""
        tile = _Tile(math.prod(self.box), self.block_n, self.block_k * dtype.itemsize // 2, self.warps, self.stages)
        return arch.sms * tile.resident(dtype.itemsize, arch)

    def _tile(self) -> str:
        return f"{list(self.box)}x{self.block_n}x{self.block_k}"


IEEE = ImplicitGemmConfig(block_m=64, block_n=64, block_k=16, warps=4, stages=3)
"""For float32 without TF32, which has no matrix instructions: the only configuration there, of implicit GEMM."""


@dataclass(frozen=True)
class _Tile:
    """Pixels, channels, depth of a step in 16-bit types (in float32 half), warps, stages, parts of the epilogue."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    parts: int = 1

    def shared_memory(self, itemsize: int) -> int:
        """Bytes: the pipeline, and the tile of the output on its way."""
        return self.stages * (self.m + self.n) * self.k * 2 + self.m * self.n // self.parts * itemsize

    def resident(self, itemsize: int, arch: Architecture) -> int:
        """How many blocks an SM holds, by shared memory and by registers (sums, and about 90 more a thread)."""
        registers = self.m * self.n + 90 * 32 * self.warps
        return max(1, min(arch.shared_memory // self.shared_memory(itemsize), 65536 // registers))


_Ranking = list[tuple[float, Config]]
"""Predicted seconds and configuration, in no order."""

# What compiles without spills on sm_80, sm_90 and sm_100; the pipeline's depth is what fits.
_POINTER_TILES = (
    _Tile(128, 128, 64, 8, 3), _Tile(128, 128, 32, 8, 4), _Tile(128, 64, 64, 4, 3), _Tile(128, 64, 32, 4, 4),
    _Tile(64, 128, 32, 4, 4), _Tile(64, 64, 64, 4, 3), _Tile(64, 64, 32, 4, 4), _Tile(128, 32, 64, 4, 4),
    _Tile(128, 32, 32, 4, 4), _Tile(64, 32, 64, 4, 4), _Tile(128, 16, 32, 4, 4), _Tile(64, 16, 32, 4, 4),
)  # fmt: skip
_TMA_TILES = (
    _Tile(128, 256, 64, 8, 3, 2), _Tile(128, 256, 64, 8, 3, 4), _Tile(256, 128, 64, 8, 3, 2), _Tile(128, 128, 64, 8, 4),
    _Tile(128, 128, 64, 8, 3), _Tile(128, 128, 64, 8, 2), _Tile(256, 64, 64, 8, 3), _Tile(128, 64, 64, 4, 4),
    _Tile(128, 64, 64, 4, 3), _Tile(128, 64, 64, 4, 2), _Tile(64, 128, 64, 4, 4), _Tile(64, 64, 64, 4, 4),
    _Tile(128, 32, 64, 4, 4), _Tile(64, 32, 64, 4, 4), _Tile(128, 16, 64, 4, 4),
)  # fmt: skip


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two from `least` on that is at least n."""
    return max(least, 1 << (n - 1).bit_length())


def boxes(n: int, p: int, q: int, pixels: int) -> list[tuple[int, int, int]]:
    """The boxes of so many output pixels that cover [n, p, q] with the fewest tiles, large areas first."""
    found = []
    for log_h, log_w in itertools.product(range(5), repeat=2):
        th, tw = 1 << log_h, 1 << log_w
        if th * tw <= pixels and pixels // (th * tw) <= 256:
            found.append((pixels // (th * tw), th, tw))
    return sorted(found, key=lambda box: (box_tiles((n, p, q), box), -box[1] * box[2], abs(box[1] - box[2])))


def box_tiles(extents: tuple[int, int, int], box: tuple[int, int, int]) -> int:
    """How many boxes it takes to cover the extents."""
    return math.prod(-(-extent // size) for extent, size in zip(extents, box, strict=True))


def merged_groups(shape: Conv) -> int:
    """How many groups are computed as one."""
    widest = max(shape.c, shape.k) // shape.groups
    divisors = [d for d in range(1, shape.groups + 1) if shape.groups % d == 0 and d * widest <= MERGED_CHANNELS]
    return max(divisors, default=1)


def _seconds(tiles: int, tile: _Tile, depth: int, itemsize: int, arch: Architecture, tma: bool) -> float:
    """Predicted time of `tiles` tiles with a sum of `depth`: waves of blocks, each bound by products or by L2.

    The rates are assumptions (0.75 PFLOP/s dense bf16 and 5.5 TB/s from L2 on an H100); only their ratios matter.
    """
    rate = {8: 2.5e12, 9: 5.7e12, 10: 12e12, 11: 12e12}.get(arch.capability[0], 2.5e12) * 2 / itemsize
    harmonic = 2 / (1 / tile.m + 1 / tile.n)
    rate *= min(1.0, 0.75 * harmonic / 128) * (1.0 if tma or not arch.warpgroups else 0.75)
    products = 2 * tile.m * tile.n * depth / rate
    traffic = ((tile.m + tile.n) * depth + 2 * tile.m * tile.n) * itemsize / 42e9
    if arch.tma and not tma:  # addresses and masks take issue slots
        traffic *= 1.15
    resident = tile.resident(itemsize, arch)
    waves = -(-tiles // (arch.sms * resident))
    busy = min(resident, -(-tiles // arch.sms))
    return waves * (busy * max(products, traffic) + 1e-6)


def _step(tile: _Tile, channels: int, dtype: torch.dtype) -> int:
    """Depth of a step: the tile's, in bytes, but no more than the channels need."""
    return min(tile.k * 2 // dtype.itemsize, power_of_two(channels, 32 // dtype.itemsize))


def _fit(tiles: tuple[_Tile, ...], k: int, dtype: torch.dtype, arch: Architecture) -> Iterator[_Tile]:
    """The tiles that fit the GPU and are no wider than the channels need."""
    for tile in tiles:
        if tile.n <= power_of_two(k) and tile.shared_memory(dtype.itemsize) <= arch.shared_memory:
            yield tile


def _rank_implicit_gemm(shape: Conv, dtype: torch.dtype, arch: Architecture) -> _Ranking:
    merged = merged_groups(shape)
    groups = shape.groups // merged
    c, k = shape.c // groups, shape.k // groups
    n, _, p, q = shape.output_shape
    taps = shape.r * shape.s
    ranked: _Ranking = []
    for tile in _fit(_POINTER_TILES, k, dtype, arch):
        gather = c < FEW_CHANNELS and taps > 1
        step = _step(tile, c * taps if gather else c, dtype)
        if gather:  # every element of a step has a mask and an address of its own: more than 16 a thread spill
            step = min(step, 512 * tile.warps // tile.m)
        blocks = -(-c * taps // step) if gather else taps * -(-c // step)
        tiles = -(-n * p * q // tile.m) * -(-k // tile.n) * groups
        for split in (1, 2, 4, 8, 16):
            if split > 1 and (tiles * split > 2 * arch.sms or blocks < 4 * split):
                break
            seconds = _seconds(tiles * split, tile, -(-blocks // split) * step, dtype.itemsize, arch, False)
            if split > 1:  # the partial sums out and in, and a second launch
                seconds += n * p * q * shape.k * 4 * 2 * split / 3e12 + 3e-6
            config = ImplicitGemmConfig(
                block_m=tile.m, block_n=tile.n, block_k=step, split=split, warps=tile.warps, stages=tile.stages
            )
            ranked.append((seconds, config))
    return ranked


def _why_not_tma(shape: Conv, dtype: torch.dtype, arch: Architecture) -> str | None:
    if not arch.tma:
        return "it needs compute capability 9.0"
    if shape.groups > 1:
        return f"it takes groups=1, got {shape.groups}"
    if shape.c % 8 or shape.k % 8:
        return f"it takes channels in multiples of 8, got {shape.c} and {shape.k}"
    return None


def why_not_pointwise(shape: Conv, dtype: torch.dtype, arch: Architecture) -> str | None:
    """Why the pointwise kernel cannot run this layer, None if it can."""
    if (shape.r, shape.s, shape.stride, shape.padding) != (1, 1, (1, 1), (0, 0)):
        return "it takes 1x1 kernels of stride 1 without padding"
    return _why_not_tma(shape, dtype, arch)


def _rank_pointwise(shape: Conv, dtype: torch.dtype, arch: Architecture) -> _Ranking:
    if why_not_pointwise(shape, dtype, arch):
        return []
    pixels = shape.n * shape.h * shape.w
    ranked: _Ranking = []
    for tile in _fit(_TMA_TILES, shape.k, dtype, arch):
        step = _step(tile, shape.c, dtype)
        tiles = -(-pixels // tile.m) * -(-shape.k // tile.n)
        seconds = _seconds(tiles, tile, -(-shape.c // step) * step, dtype.itemsize, arch, True)
        for persistent, flatten in ((True, False), (True, True), (False, False)):
            spare = arch.shared_memory - tile.shared_memory(dtype.itemsize)
            if flatten and tile.m * tile.n // tile.parts * dtype.itemsize > spare:
                continue  # the last tile's output leaves while the next one's is made
            config = PointwiseConfig(
                block_m=tile.m, block_n=tile.n, block_k=step, parts=tile.parts, persistent=persistent,
                flatten=flatten, warps=tile.warps, stages=tile.stages,
            )  # fmt: skip
            ranked.append((seconds, config))
    return ranked


def why_not_tma_conv(shape: Conv, dtype: torch.dtype, arch: Architecture) -> str | None:
    """Why the TMA convolution cannot run this layer, None if it can."""
    why = _why_not_tma(shape, dtype, arch)
    if why:
        return why
    if shape.prologue:
        return "it has no prologue: the padding would not stay zero"
    if shape.r * shape.s == 1 and shape.padding == (0, 0):
        return None
    if shape.stride == (1, 1):
        return None
    if shape.stride != (2, 2) or shape.h % 2 or shape.w % 2:
        return f"it takes stride 1, or 2 at even sizes, got {shape.stride} at {shape.h}x{shape.w}"
    if shape.c % 16:
        return f"it takes channels in multiples of 16 at stride 2, got {shape.c}"
    return None


def _rank_tma_conv(shape: Conv, dtype: torch.dtype, arch: Architecture) -> _Ranking:
    if why_not_tma_conv(shape, dtype, arch):
        return []
    n, _, p, q = shape.output_shape
    parity = shape.stride != (1, 1) and shape.r * shape.s > 1
    ranked: _Ranking = []
    whole = tuple(dict.fromkeys(dataclasses.replace(tile, parts=1) for tile in _TMA_TILES))  # the epilogue's one part
    for tile in _fit(whole, shape.k, dtype, arch):
        step = _step(tile, shape.c, dtype)
        if parity:  # a box must not reach into the next pixel's channels
            step = math.gcd(step, shape.c)
        staged = tile.m * tile.n * dtype.itemsize // 2 if shape.residual else 0  # the residual's way to its layout
        if tile.shared_memory(dtype.itemsize) + staged > arch.shared_memory or (tile.n == 256 and shape.residual):
            continue  # 256 channels spill beside a residual
        depth = shape.r * shape.s * -(-shape.c // step) * step
        for rank, box in enumerate(boxes(n, p, q, tile.m)[:2]):
            tiles = box_tiles((n, p, q), box) * -(-shape.k // tile.n)
            seconds = _seconds(tiles, tile, depth, dtype.itemsize, arch, True) * (1 + 0.01 * rank)
            config = TmaConvConfig(box=box, block_n=tile.n, block_k=step, warps=tile.warps, stages=tile.stages)
            ranked.append((seconds, config))
    return ranked


_RANKINGS: dict[str, Callable[[Conv, torch.dtype, Architecture], _Ranking]] = {
    "implicit_gemm": _rank_implicit_gemm,
    "pointwise": _rank_pointwise,
    "tma_conv": _rank_tma_conv,
}


def _space(kernel: str, shape: Conv, dtype: torch.dtype, arch: Architecture) -> list[Config]:
    ranked = _RANKINGS[kernel](shape, dtype, arch)
    return list(dict.fromkeys(config for _, config in sorted(ranked, key=lambda pair: pair[0])))


def with_projection(kernel: str, shape: Conv, dtype: torch.dtype, arch: Architecture) -> list[Config]:
    """The configurations of a kernel with which a projection shortcut fits, best first; `shape`: of the last layer.

    The second product takes shared memory as a residual would, and on sm_100 the pointer version has no registers for
    it with more than 32 sums a thread.
    """
    space = _space(kernel, dataclasses.replace(shape, residual=True), dtype, arch)
    few = kernel == "implicit_gemm" and arch.capability[0] >= 10
    return [
        config
        for config in space
        if not (few and isinstance(config, ImplicitGemmConfig))
        or config.block_m * config.block_n <= 32 * 32 * config.warps
    ]


def algorithms(shape: Conv, dtype: torch.dtype, arch: Architecture) -> list[str]:
    """The kernels that can run a layer, the one predicted fastest first."""
    ranked = {kernel: rank(shape, dtype, arch) for kernel, rank in _RANKINGS.items()}
    best = {kernel: min(pairs, key=lambda pair: pair[0])[0] for kernel, pairs in ranked.items() if pairs}
    return sorted(best, key=best.__getitem__)


for _kernel, _config in (
    ("implicit_gemm", ImplicitGemmConfig),
    ("pointwise", PointwiseConfig),
    ("tma_conv", TmaConvConfig),
):
    register(_kernel, _config, functools.partial(_space, _kernel))
