"""What the layers of a fused piece read: convolution weights, and BatchNorms folded into a scale and a shift."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

Arguments = tuple[Tensor, Tensor, Tensor]
"""Weight, scale and shift of a layer as its op takes them. A layer without BatchNorm has None for scale, a prologue
None for weight; the types overlook both: what is there depends on the kind of layer, not on the call."""


class Layer(NamedTuple):
    """A convolution and the BatchNorm after it; one of the two may be missing.

    Attributes:
        conv: None for a prologue, a BatchNorm (and ReLU) that comes before every convolution; of a head, the linear
            layer.
        norm: a module with the four tensors of a BatchNorm, None for a convolution without.
        eps: only if the BatchNorm has none of its own to read.
        relu: whether the BatchNorm's module ends in a ReLU of its own.
    """

    conv: nn.Conv2d | None
    norm: Any = None
    eps: float | None = None
    relu: bool = False

    def sources(self) -> list[tuple[dict[str, Tensor], str]]:
        """Where the tensors that scale and shift depend on are kept, as (dictionary, key)."""
        stores = () if self.norm is None else (self.norm._parameters, self.norm._buffers)
        kept = [
            (store, name)
            for name in ("weight", "bias", "running_mean", "running_var")
            for store in stores
            if store.get(name) is not None
        ]
        if self.conv is not None and self.conv.bias is not None:
            kept.append((self.conv._parameters, "bias"))
        return kept

    def weight(self, like: Tensor) -> Tensor:
        """The convolution's weight, None without one."""
        return None if self.conv is None else self.conv._parameters["weight"]  # type: ignore[return-value]

    def forget(self) -> Tensor | None:
        """The weight whose packs have to go when it may have changed without a trace."""
        return None if self.conv is None else self.conv._parameters.get("weight")

    def fold(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Scale (None without BatchNorm) and shift, [K], in float32 (float64 for a float64 module); differentiable."""
        norm, conv = self.norm, self.conv
        if norm is None:
            assert conv is not None
            dtype = torch.promote_types(conv.weight.dtype, torch.float32)
            bias = conv.bias
            shift = conv.weight.new_zeros(conv.weight.shape[0], dtype=dtype) if bias is None else bias.to(dtype)
            return None, shift  # type: ignore[return-value]
        dtype = torch.promote_types(norm.running_var.dtype, torch.float32)
        eps = norm.eps if self.eps is None else self.eps
        deviation = (norm.running_var.to(dtype) + eps).sqrt()
        scale = deviation.reciprocal() if norm.weight is None else norm.weight.to(dtype) / deviation
        mean = norm.running_mean.to(dtype)
        if conv is not None and conv.bias is not None:
            mean = mean - conv.bias.to(dtype)
        shift = -mean * scale
        if norm.bias is not None:
            shift = norm.bias.to(dtype) + shift
        return scale, shift


@dataclass(frozen=True, eq=False)
class Selection:
    """The parameter-free shortcut of ResNet's option A as a 1x1 convolution: the input's channels between zeros.

    Attributes:
        channels: of the input.
        out: channels of the output.
        first: the output channel that the input's first one becomes.
        made: the weights made so far, by dtype and device.
    """

    channels: int
    out: int
    first: int
    made: dict[tuple[torch.dtype, torch.device], Tensor] = field(default_factory=dict)

    conv: ClassVar[None] = None
    norm: ClassVar[None] = None
    eps: ClassVar[None] = None

    def sources(self) -> list[tuple[dict[str, Tensor], str]]:
        """None: nothing in it is a model's."""
        return []

    def weight(self, like: Tensor) -> Tensor:
        """The selecting weight [out, channels, 1, 1], of the dtype and device of another layer's."""
        if torch.compiler.is_compiling():  # a tensor that is kept would get dynamic sizes, and tie the image's to them
            return self._weight(like)
        key = (like.dtype, like.device)
        if key not in self.made:
            with torch.inference_mode(False), torch.no_grad():
                self.made[key] = self._weight(like)
        return self.made[key]

    def _weight(self, like: Tensor) -> Tensor:
        eye = torch.eye(self.out, self.channels, dtype=like.dtype, device=like.device)
        return eye.roll(self.first, 0)[:, :, None, None].contiguous()

    def forget(self) -> Tensor | None:
        """Nothing."""
        return None

    def fold(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """No scale, and a shift of zeros in float32, on the device of another layer's weight."""
        return None, torch.zeros(self.out, device=like.device)  # type: ignore[return-value]
