"""Configurations of the block kernels, from the block's shape, the dtype and the GPU; see `configs`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import BackendError
from ...shapes import BasicBlock, Bottleneck, BottleneckChain, DenseBlock, Head, Shape, Stem, Transition
from .configs import Architecture, Config, architecture, choose, register
from .layer_configs import power_of_two

VECTOR = 8
"""All channels are a multiple of this: 16 bytes of a 16-bit type, which TMA and vector loads need."""


@dataclass(frozen=True, kw_only=True)
class BandConfig(Config):
    """Of a kernel that keeps a band of its intermediate in a private scratch.

    Attributes:
        block_m: pixels of a tile.
        block_n: output channels of a tile.
        block_c: input channels of a step of the first convolution's sum.
        block_k: intermediate channels of a step of the 3x3's sum.
        tiles: tiles of output pixels of a band.
        programs: programs that share a multiprocessor.
        tma: whether weights, output and shortcut go through tensor descriptors.
    """

    block_m: int
    block_n: int
    block_c: int
    block_k: int
    tiles: int
    programs: int
    tma: bool


@dataclass(frozen=True, kw_only=True)
class RotatedConfig(Config):
    """Of the rotated bottleneck, the same for every block of a chain.

    Attributes:
        block_m: pixels of a tile.
        block_n: output channels of a step of the two 1x1 convolutions.
        block_k: intermediate channels of a step of the 3x3's sum.
        programs: programs that share a multiprocessor.
        tma: whether weights, output and shortcut go through tensor descriptors.
    """

    block_m: int
    block_n: int
    block_k: int
    programs: int
    tma: bool


@dataclass(frozen=True, kw_only=True)
class StemConfig(Config):
    """Of the stem.

    Attributes:
        block_m: pooled pixels of a tile.
        block_n: output channels of a tile.
        block_k: elements of a window in a step of the sum.
        segment: pooled rows that a program walks down.
        tma: whether weights go through tensor descriptors.
    """

    block_m: int
    block_n: int
    block_k: int
    segment: int
    tma: bool


@dataclass(frozen=True, kw_only=True)
class TransitionConfig(Config):
    """Of the transition.

    Attributes:
        block_m: pixels of a tile.
        block_n: output channels of a tile.
        block_c: input channels of a step of the sum.
        programs: programs that share a multiprocessor.
        tma: whether weights and output go through tensor descriptors.
    """

    block_m: int
    block_n: int
    block_c: int
    programs: int
    tma: bool


@dataclass(frozen=True, kw_only=True)
class HeadConfig(Config):
    """Of the head's average pooling.

    Attributes:
        block_m: pixels of a step.
        block_n: channels of a program.
    """

    block_m: int
    block_n: int


MAX_RESIDENT = 128
"""Intermediate channels that a bottleneck keeps in registers between its 3x3 and its last 1x1. 256 of them spill on
sm_80 and sm_100; blocks that wide are bound by their products anyway, not by memory."""

MAX_KERNEL = 7
"""Of a stem."""

MAX_PADDED_CHANNELS = 16
"""Stems with more channels than this are read where they are, which takes a multiple of `VECTOR` of them."""


@functools.lru_cache(maxsize=4096)
def why_not_whole(shape: Shape, dtype: torch.dtype, arch: Architecture) -> str | None:
    """Why there is no kernel for the whole of this block, in a phrase; None if there is."""
    if isinstance(shape, Stem):
        return _why_not_stem(shape)
    if isinstance(shape, Bottleneck):
        if shape.groups > 1 or shape.dilation > 1:
            return f"it takes groups=1 and dilation=1, got {shape.groups} and {shape.dilation}"
        channels = {shape.c, shape.mid, shape.out}
        resident = shape.mid
    elif isinstance(shape, BottleneckChain):
        channels, resident = {shape.c, shape.mid}, shape.mid
    elif isinstance(shape, Head):
        return None
    elif isinstance(shape, BasicBlock):
        if shape.dilation > 1:
            return f"it takes dilation=1, got {shape.dilation}"
        channels, resident = {shape.c, shape.mid, shape.out}, 0
    elif isinstance(shape, DenseBlock):
        if not shape.mid:
            return "it takes layers with a 1x1, got none"
        channels, resident = {shape.c, shape.mid, shape.growth}, max(shape.mid, shape.growth)
    elif isinstance(shape, Transition):
        channels, resident = {shape.c, shape.k}, 0
    else:
        return f"there is none for the whole of a {shape.op}"
    if any(c % VECTOR for c in channels):
        return f"it takes channels in multiples of {VECTOR}, got {', '.join(map(str, sorted(channels)))}"
    if resident > MAX_RESIDENT:
        return f"it takes up to {MAX_RESIDENT} intermediate channels, got {resident}"
    return None


def _why_not_stem(shape: Stem) -> str | None:
    if shape.r != shape.s or shape.r > MAX_KERNEL:
        return f"it takes square kernels up to {MAX_KERNEL}x{MAX_KERNEL}, got {shape.r}x{shape.s}"
    if shape.c > MAX_PADDED_CHANNELS and shape.c % VECTOR:
        return f"it takes up to {MAX_PADDED_CHANNELS} channels or a multiple of {VECTOR}, got {shape.c}"
    return None


def configuration(kernel: str, shape: Shape, x: Tensor, config: Any) -> Any:
    """`config`, or the one that `configs.choose` gives for this kernel if it is None.

    Raises:
        BackendError: the kernel cannot run this shape.
    """
    arch = architecture(x.device)
    if why := why_not_whole(shape, x.dtype, arch):
        raise BackendError(f"backend 'triton' cannot run the whole of this {shape.op}: {why}")
    return choose(kernel, shape, x.dtype, arch) if config is None else config


class _Tile(NamedTuple):
    """Pixels, output channels, depth of a step in 16-bit elements, warps, stages, programs that share an SM."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    programs: int = 1

    def step(self, channels: int, dtype: torch.dtype) -> int:
        """Depth of a step: the tile's, in bytes, but no more than the channels need."""
        return min(self.k * 2 // dtype.itemsize, power_of_two(channels))


# What compiles without spills; see tests/test_triton_aot.py. On sm_80 (and sm_120, which has no wgmma either) sums and
# both factors are in registers: smaller steps.
_WARPGROUPS = {
    "bottleneck": (_Tile(128, 64, 64, 8, 3), _Tile(64, 64, 64, 4, 3, 2)),
    "basic_block": (_Tile(128, 64, 64, 8, 3), _Tile(128, 128, 64, 8, 3), _Tile(64, 64, 64, 4, 3, 2)),
    "dense_block": (_Tile(128, 32, 64, 8, 3), _Tile(64, 32, 64, 4, 3, 2)),
    "bottleneck_chain": (_Tile(128, 32, 64, 8, 3), _Tile(64, 32, 64, 8, 3)),
    "transition": (_Tile(128, 128, 64, 8, 2), _Tile(64, 256, 64, 8, 2), _Tile(64, 128, 64, 4, 2, 2)),
    "stem": (_Tile(128, 64, 64, 8, 3), _Tile(64, 64, 64, 4, 3)),
}
_NO_WARPGROUPS = {
    "bottleneck": (_Tile(64, 64, 32, 8, 3),),
    "basic_block": (_Tile(128, 64, 32, 8, 3), _Tile(64, 64, 32, 4, 3, 2)),
    "dense_block": (_Tile(64, 32, 32, 8, 3),),
    "bottleneck_chain": (_Tile(64, 32, 32, 8, 3),),
    "transition": (_Tile(64, 128, 32, 8, 3), _Tile(64, 64, 32, 4, 3, 2)),
    "stem": (_Tile(64, 64, 64, 8, 3),),
}


def _tiles(kernel: str, arch: Architecture) -> tuple[_Tile, ...]:
    return (_WARPGROUPS if arch.warpgroups else _NO_WARPGROUPS)[kernel]


class _Band(NamedTuple):
    """What the length of a band depends on.

    Attributes:
        pixels: of the output.
        width: of the intermediate image.
        area: pixels of the intermediate image for one of the output.
        before: products for a pixel of the intermediate image.
        after: products for a pixel of the output.
    """

    pixels: int
    width: int
    area: int
    before: int
    after: int

    def seconds(self, tile: _Tile, tiles: int, arch: Architecture) -> float:
        """Proportional to the time: waves of bands, each with its halo."""
        run = tiles * tile.m
        waves = max(1.0, -(-self.pixels // run) / (arch.sms * tile.programs))
        before = -(-(run * self.area + 2 * self.width + 2) // tile.m)
        return waves * tile.programs * tile.m * (before * self.before + tiles * self.after)


def _bands(
    tiles_to_try: Sequence[_Tile], band: _Band, channels: tuple[int, int, int], dtype: torch.dtype, arch: Architecture
) -> list[BandConfig]:
    """The six best tiles and lengths of a band, best first. `channels`: in, intermediate, widest of a tile."""
    ranked = []
    for tile in tiles_to_try:
        for tiles in (1, 2, 3, 4, 5, 6, 8, 12, 16):
            config = BandConfig(
                block_m=tile.m,
                block_n=min(tile.n, power_of_two(channels[2])),
                block_c=tile.step(channels[0], dtype),
                block_k=tile.step(channels[1], dtype),
                tiles=tiles,
                programs=tile.programs,
                tma=arch.warpgroups,
                warps=tile.warps,
                stages=tile.stages,
            )
            ranked.append((band.seconds(tile, tiles, arch), config))
    ranked.sort(key=lambda pair: pair[0])
    return list(dict.fromkeys(config for _, config in ranked))[:6]


def bottleneck_space(shape: Bottleneck, dtype: torch.dtype, arch: Architecture) -> list[BandConfig]:
    """Configurations of the whole bottleneck, best first."""
    if why_not_whole(shape, dtype, arch):
        return []
    n, _, p, q = shape.output_shape
    last = shape.mid * shape.out + (shape.c * shape.out if shape.projection else 0)
    band = _Band(n * p * q, q * shape.stride2, shape.stride2**2, shape.c * shape.mid, 9 * shape.mid**2 + last)
    return _bands(_tiles("bottleneck", arch), band, (shape.c, shape.mid, shape.out), dtype, arch)


def basic_block_space(shape: BasicBlock, dtype: torch.dtype, arch: Architecture) -> list[BandConfig]:
    """Configurations of the whole basic block, best first."""
    if why_not_whole(shape, dtype, arch):
        return []
    n, _, p, q = shape.output_shape
    last = 9 * shape.mid * shape.out + (shape.c * shape.out if shape.projection else 0)
    band = _Band(n * p * q, q, 1, 9 * shape.c * shape.mid, last)
    # 128 x 128 beside the sum of a projection spills on sm_90.
    tiles = [tile for tile in _tiles("basic_block", arch) if tile.n < 128 or not shape.projection]
    return _bands(tiles, band, (shape.c, shape.mid, max(shape.mid, shape.out)), dtype, arch)


def dense_layer_space(shape: DenseBlock, dtype: torch.dtype, arch: Architecture) -> list[BandConfig]:
    """Configurations of the first layer of a dense block, best first."""
    if why_not_whole(shape, dtype, arch):
        return []
    band = _Band(shape.n * shape.h * shape.w, shape.w, 1, shape.c * shape.mid, 9 * shape.mid * shape.growth)
    return _bands(_tiles("dense_block", arch), band, (shape.c, shape.mid, shape.growth), dtype, arch)


def chain_space(shape: BottleneckChain, dtype: torch.dtype, arch: Architecture) -> list[RotatedConfig]:
    """Configurations of a chain of identity bottlenecks, best first."""
    if why_not_whole(shape, dtype, arch):
        return []
    return [
        RotatedConfig(
            block_m=tile.m,
            block_n=tile.n,
            block_k=tile.step(shape.mid, dtype),
            programs=tile.programs,
            tma=arch.warpgroups,
            warps=tile.warps,
            stages=tile.stages,
        )
        for tile in _tiles("bottleneck_chain", arch)
        # At 128 channels it spills on sm_100, and in float32 on sm_90 too.
        if tile.m < 128 or shape.mid <= 64 or (arch.capability[0] == 9 and dtype.itemsize == 2)
    ]


def head_space(shape: Head, dtype: torch.dtype, arch: Architecture) -> list[HeadConfig]:
    """Configurations of the head's pooling, best first: 16 bytes a thread and step, for few images on more programs."""
    few = shape.n * shape.c < 2 * 64 * arch.sms
    sizes = ((16, 64), (64, 32), (32, 64), (16, 128)) if not few else ((64, 16), (16, 64), (64, 32))
    found = [HeadConfig(block_m=m, block_n=min(n, power_of_two(shape.c)), warps=4, stages=2) for m, n in sizes]
    return list(dict.fromkeys(found))


def transition_space(shape: Transition, dtype: torch.dtype, arch: Architecture) -> list[TransitionConfig]:
    """Configurations of the transition, best first: as few passes over the image as its output channels need."""
    if why_not_whole(shape, dtype, arch):
        return []
    pixels = shape.output_shape[0] * shape.output_shape[2] * shape.output_shape[3]
    ranked = []
    for tile in _tiles("transition", arch):
        passes = -(-shape.k // tile.n)
        waves = max(1.0, -(-pixels // tile.m) * passes / (arch.sms * tile.programs))
        config = TransitionConfig(
            block_m=tile.m,
            block_n=min(tile.n, power_of_two(shape.k)),
            block_c=tile.step(shape.c, dtype),
            programs=tile.programs,
            tma=arch.warpgroups,
            warps=tile.warps,
            stages=tile.stages,
        )
        ranked.append((waves * tile.programs * tile.m * (4 + tile.n / 128), config))
    ranked.sort(key=lambda pair: pair[0])
    return list(dict.fromkeys(config for _, config in ranked))


def direct(shape: Stem) -> bool:
    """Whether the stem reads the image where it is, tap by tap, instead of a padded copy."""
    return shape.c % VECTOR == 0


def padded_row(shape: Stem) -> tuple[int, int]:
    """Channels of a stem's padded image, and the elements of a window's row, filled up to a power of two.

    The channels are as few as let every window start at a multiple of 8 elements.
    """
    channels = 4 if shape.stride % 2 == 0 and shape.c <= 4 else -(-shape.c // VECTOR) * VECTOR
    return channels, power_of_two(shape.r * channels)


def stem_space(shape: Stem, dtype: torch.dtype, arch: Architecture) -> list[StemConfig]:
    """Configurations of the stem, best first: the longest segments that still give every SM four programs."""
    if why_not_whole(shape, dtype, arch):
        return []
    n, _, height, pooled_width = shape.output_shape
    # A carried row belongs to two windows at most.
    longest = height if shape.pool_kernel <= 2 * shape.pool_stride else 1
    found = []
    for tile in _tiles("stem", arch):
        wide = max(tile.k * 2 // dtype.itemsize, padded_row(shape)[1])
        step = tile.step(shape.c, dtype) if direct(shape) else wide
        block_n = min(tile.n, power_of_two(shape.k))
        across = -(-n * pooled_width // tile.m) * -(-shape.k // block_n)
        segments = [size for size in (14, 7, 4, 2, 1) if size <= longest]
        enough = [size for size in segments if across * -(-height // size) >= 4 * arch.sms]
        for segment in dict.fromkeys((*enough[:2], 1)):
            found.append(
                StemConfig(
                    block_m=tile.m,
                    block_n=block_n,
                    block_k=step,
                    segment=segment,
                    tma=arch.warpgroups,
                    warps=tile.warps,
                    stages=tile.stages,
                )
            )
    return list(dict.fromkeys(found))


register("bottleneck", BandConfig, bottleneck_space)
register("basic_block", BandConfig, basic_block_space)
register("dense_block", BandConfig, dense_layer_space)
register("bottleneck_chain", RotatedConfig, chain_space)
register("transition", TransitionConfig, transition_space)
register("stem", StemConfig, stem_space)
register("head", HeadConfig, head_space)
