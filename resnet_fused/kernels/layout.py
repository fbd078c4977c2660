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
