"""Memory formats: how torch tells them, and tensors brought into one with exactly its strides."""

from __future__ import annotations

import torch
from torch import Tensor


def channels_last(x: Tensor) -> bool:
    """Whether outputs made from `x` are channels_last: torch's suggest_memory_format."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    if last != x.is_contiguous():
        return last
    # Neither, or both because of sizes of 1: the strides decide, innermost first, as in c10's
    # is_strides_like_channels_last_4d.
    least = 0
    if x.stride(1) == 0:
        return False
    for d in (1, 3, 2, 0):
        size, stride = x.shape[d], x.stride(d)
        if size == 0 or stride < least or (d == 0 and least == x.stride(1)):
            return False
        least = stride * size if size > 1 else stride
    return True


def nhwc(x: Tensor) -> Tensor:
    """`x` itself or a copy, dense in channels_last, also where sizes of 1 would leave strides free."""
    _, c, h, w = x.shape
    strides = (h * w * c, 1, w * c, c)
    if x.stride() == strides:
        return x
    return x.contiguous(memory_format=torch.channels_last).as_strided(x.shape, strides)


def nchw(x: Tensor) -> Tensor:
    """`x` itself or a copy, contiguous, also where sizes of 1 would leave strides free."""
    _, c, h, w = x.shape
    strides = (c * h * w, h * w, w, 1)
    if x.stride() == strides:
        return x
    return x.contiguous().as_strided(x.shape, strides)


def pixel_pitch(x: Tensor) -> int | None:
    """Elements from one pixel to the next if `x` is NHWC in memory, dense or a slice of its channels; else None.

    That is strides (H * W * pitch, 1, W * pitch, pitch) with pitch >= C; sizes of 1 leave their strides free.
    """
    n, c, h, w = x.shape
    sn, sc, sh, sw = x.stride()
    pitch = sw if w > 1 else sh if h > 1 else sn if n > 1 else c
    fits = (
        (c == 1 or sc == 1)
        and pitch >= c
        and (w == 1 or sw == pitch)
        and (h == 1 or sh == w * pitch)
        and (n == 1 or sn == h * w * pitch)
    )
    return pitch if fits else None


def nhwc_slice(x: Tensor) -> Tensor:
    """`x` itself if it is NHWC in memory, dense or a slice of its channels (see `pixel_pitch`), else a dense copy."""
    return x if pixel_pitch(x) is not None else nhwc(x)
