"""Host side of the block kernels: images as [pixels, channels] and weights tap by tap, as descriptors or pointers."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ...shapes import Conv
from ..layout import nhwc, pixel_pitch
from ..packing import wait_for
from .configs import architecture
from .launch import aligned, descriptor, ones
from .layers import pack


def image(x: Tensor) -> tuple[Tensor, int]:
    """`x` in NHWC order, dense or a slice of channels, aligned to 16 bytes, and its pitch; a copy if need be."""
    pitch = pixel_pitch(x)
    if pitch is None:
        x = nhwc(x)
        pitch = x.shape[1]
    if not aligned(x, pitch):
        x = nhwc(x.clone(memory_format=torch.channels_last))
        pitch = x.shape[1]
    return x, pitch


def matrix(x: Tensor, pitch: int, box: tuple[int, int], tma: bool) -> Any:
    """An image as [pixels, channels]: a descriptor of boxes of that size, or the tensor for its pointer."""
    if not tma:
        return x
    n, c, h, w = x.shape
    return descriptor(x, (n * h * w, c), (pitch, 1), box)


def weights(weight: Tensor, box: tuple[int, int], tma: bool, prec: str) -> Any:
    """[K, C, R, S], C a multiple of `block_configs.VECTOR`, packed as for the layer kernels.

    Returns:
        A descriptor of [R * S, K, C] with boxes [1, *box], or the tensor [K, R * S * C].
    """
    k, c, r, s = weight.shape
    taps = pack(weight, prec)
    if taps.data_ptr() % 16:
        taps = taps.clone()
    return descriptor(taps, (r * s, k, c), (c, r * s * c, 1), (1, *box)) if tma else taps


def vectors(scale: Tensor | None, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Scale (ones if there is none) and shift, dense."""
    return (ones(shift.shape[0], shift.device) if scale is None else scale.contiguous()), shift.contiguous()


@functools.lru_cache(maxsize=64)
def zeros(channels: int, device: torch.device) -> Tensor:
    """float32 zeros: the shift of a layer that has none."""
    made = torch.zeros(channels, device=device)
    wait_for(device)
    return made


def pointwise_layer(x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor, activation: str) -> Tensor:
    """A 1x1 convolution by the layer kernel predicted fastest."""
    from . import candidates, conv_bn_act

    n, c, h, w = x.shape
    shape = Conv(n, c, h, w, weight.shape[0], 1, 1)
    one, none = (1, 1), (0, 0)
    return conv_bn_act(
        x, weight, scale, shift, None, stride=one, padding=none, dilation=one, groups=1, activation=activation,
        algorithm=candidates(shape, x.dtype, x.device)[0].algorithm,
    )  # fmt: skip


def programs(tiles: int, per_sm: int, device: torch.device) -> int:
    """Size of a persistent grid: `per_sm` programs on every multiprocessor, not more than there are tiles."""
    return min(tiles, per_sm * architecture(device).sms)
