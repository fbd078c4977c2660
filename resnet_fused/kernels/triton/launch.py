"""Host side of a launch that all kernels share: device, precision, outputs, tensor descriptors."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import fields

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..packing import wait_for
from ..precision import allow_tf32

DESCRIPTOR_ROUNDS = "round_f32_to_tf32" in {field.name for field in fields(TensorDescriptor)}
"""Whether a descriptor's loads can round float32 to TF32 (Triton 3.9); where not, the kernels do."""


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Launches inside go to x's GPU, on its current stream."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def precision(x: Tensor) -> str:
    """`input_precision` of the products of x's convolution: "tf32" where torch's own switch allows it, else "ieee"."""
    return "tf32" if x.dtype == torch.float32 and allow_tf32(x.device) else "ieee"


def empty_output(shape: Sequence[int], x: Tensor) -> Tensor:
    """An uninitialised channels_last tensor of x's dtype and device."""
    return torch.empty(tuple(shape), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def aligned(t: Tensor, pitch: int) -> bool:
    """Whether tensor descriptors can describe `t`: base and every stride a multiple of 16 bytes."""
    return t.data_ptr() % 16 == 0 and pitch * t.element_size() % 16 == 0


def descriptor(
    t: Tensor, shape: Sequence[int], strides: Sequence[int], box: Sequence[int], tf32: bool = False
) -> TensorDescriptor:
    """Describe memory from `t`'s first element on for loads and stores of boxes.

    Args:
        t: owner of the memory.
        shape: extents; loads past them (or before 0) give zero, stores there are dropped.
        strides: in elements; the last is 1, the others multiples of 16 bytes.
        box: sizes of a box, powers of two.
        tf32: loads round float32 to TF32 (where `DESCRIPTOR_ROUNDS`).
    """
    rounds = {"round_f32_to_tf32": True} if tf32 and DESCRIPTOR_ROUNDS else {}
    return TensorDescriptor(t, list(shape), list(strides), list(box), **rounds)


@functools.lru_cache(maxsize=64)
def ones(channels: int, device: torch.device) -> Tensor:
    """float32 ones: the scale of a layer that has none."""
    made = torch.ones(channels, device=device)
    wait_for(device)
    return made
