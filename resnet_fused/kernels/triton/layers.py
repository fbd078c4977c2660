"""Host side of the layer kernels: memory layout, packed weights, outputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import InputError
from ...shapes import Conv
from ..layout import nhwc_slice, pixel_pitch
from ..packing import packed
from . import launch
from .common import TINY_SCALE


class Prologue(NamedTuple):
    """The convolution's input is relu(x * scale + shift); float32 [C] each."""

    scale: Tensor
    shift: Tensor


class Projection(NamedTuple):
    """A 1x1 convolution of another image, scaled and shifted, that is added before the activation.

    Attributes:
        x: [N, C2, H2, W2].
        weight: [K, C2, 1, 1].
        scale: float32 [K], None for ones.
        shift: float32 [K].
        stride: vertical and horizontal.
    """

    x: Tensor
    weight: Tensor
    scale: Tensor | None
    shift: Tensor
    stride: int


class Layer(NamedTuple):
    """A layer's tensors as the kernels take them: images NHWC in memory with their pitches, float32 vectors."""

    shape: Conv
    x: Tensor
    x_pitch: int
    weight: Tensor
    scale: Tensor
    shift: Tensor
    residual: Tensor | None
    residual_pitch: int
    prologue: Prologue | None
    projection: Projection | None
    x2_pitch: int
    y: Tensor
    y_pitch: int
    relu: bool
    precision: str

    def describable(self) -> bool:
        """Whether tensor descriptors can describe the images: aligned, and dense if a tap reads every second pixel."""
        if self.shape.stride != (1, 1) and self.shape.r * self.shape.s > 1 and self.x_pitch != self.shape.c:
            return False
        images = [(self.x, self.x_pitch), (self.y, self.y_pitch)]
        if self.projection is not None:
            images.append((self.projection.x, self.x2_pitch))
        return all(launch.aligned(image, pitch) for image, pitch in images)

    def unit(self, *counts: int) -> int:
        """8 if all of these numbers of elements are multiples of 8, else 1: the unit that a kernel is told them in."""
        return 1 if any(count % 8 for count in counts) else 8


def _image(x: Tensor) -> tuple[Tensor, int]:
    x = nhwc_slice(x)
    pitch = pixel_pitch(x)
    assert pitch is not None
    return x, pitch


def prepare(
    shape: Conv,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    residual: Tensor | None,
    prologue: Prologue | None,
    projection: Projection | None,
    activation: str,
    out: Tensor | None,
) -> Layer:
    """Bring a layer's tensors into the form of the kernels, and make its output.

    Raises:
        InputError: `out` is neither dense channels_last nor a slice of such channels.
    """
    x, x_pitch = _image(x)
    residual_pitch = x2_pitch = 0
    if residual is not None:
        residual, residual_pitch = _image(residual)
    if projection is not None:
        x2, x2_pitch = _image(projection.x)
        scale2 = launch.ones(shape.k, x.device) if projection.scale is None else projection.scale.contiguous()
        projection = projection._replace(x=x2, scale=scale2, shift=projection.shift.contiguous())
    if prologue is not None:
        prologue = Prologue(prologue.scale.contiguous(), prologue.shift.contiguous())
    y = launch.empty_output(shape.output_shape, x) if out is None else out
    y_pitch = pixel_pitch(y)
    if y_pitch is None:
        raise InputError(f"out must be channels_last or a slice of its channels, got strides {y.stride()}")
    scale = launch.ones(shape.k, x.device) if scale is None else scale.contiguous()
    return Layer(
        shape, x, x_pitch, weight, scale, shift.contiguous(), residual, residual_pitch, prologue, projection, x2_pitch,
        y, y_pitch, activation == "relu", launch.precision(x),
    )  # fmt: skip


def _round_to_tf32(weight: Tensor) -> Tensor:
    """Round float32 half away from zero to TF32."""
    bits = weight.contiguous().view(torch.int32)
    return torch.where(weight.isnan(), weight, ((bits + 0x1000) & -0x2000).view(torch.float32))


def _merge_groups(weight: Tensor, groups: int, merged: int) -> Tensor:
    """Weights of `groups // merged` dense groups: [K, merged * C / groups, R, S], zero between the groups in one."""
    k, c, r, s = weight.shape
    each = weight.view(groups // merged, merged, k // groups, c, r, s)
    dense = weight.new_zeros(groups // merged, merged, k // groups, merged, c, r, s)
    at = torch.arange(merged, device=weight.device)
    dense[:, at, :, at] = each.transpose(0, 1)
    return dense.view(k, merged * c, r, s)


def _by_taps(weight: Tensor, across_taps: bool, precision: str) -> Tensor:
    """[K, C, R, S] to [K, R * S * C], a tap's channels (`across_taps`: the whole) zero-padded to a multiple of 8."""
    k, c, r, s = weight.shape
    taps = weight.permute(0, 2, 3, 1).contiguous()  # the memory itself if the weight is channels_last
    flat = taps.view(k, 1, r * s * c) if across_taps else taps.view(k, r * s, c)
    if flat.shape[2] % 8:
        flat = torch.nn.functional.pad(flat, (0, -flat.shape[2] % 8))
    flat = flat.view(k, -1)
    return _round_to_tf32(flat) if precision == "tf32" else flat


def pack(weight: Tensor, precision: str, *, groups: int = 1, merged: int = 1, across_taps: bool = False) -> Tensor:
    """The weight as the kernels read it, kept with it: [K, taps * channels], see `_by_taps`.

    Args:
        weight: [K, C / groups, R, S].
        precision: "tf32" rounds it.
        groups: of the convolution.
        merged: how many of them are computed as one.
        across_taps: whether the sum runs across taps without gaps.
    """

    def make() -> Tensor:
        whole = weight.detach() if merged == 1 else _merge_groups(weight.detach().contiguous(), groups, merged)
        return _by_taps(whole, across_taps, precision)

    return packed(weight, ("triton", merged, across_taps, precision), make)


def pack_projection(projection: Projection, precision: str) -> Tensor:
    """The projection's weight [K, C2], zero where its scale is too small to divide by."""
    scale = projection.scale
    assert scale is not None

    def make() -> Tensor:
        kept = (
            projection.weight.detach()
            * (scale.abs() >= TINY_SCALE.value).to(projection.weight.dtype)[:, None, None, None]
        )
        return _by_taps(kept, False, precision)

    return packed(projection.weight, ("triton projection", precision), make, scale)
