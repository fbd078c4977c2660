"""The residual units that He et al. (2016, https://arxiv.org/abs/1603.05027) compare: activations and shortcuts.

Figure 4 and table 2 move BatchNorm and ReLU around the addition; figure 2 and table 1 put something on the shortcut.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..nn.plain import conv1x1, conv3x3
from ..nn.preact import PreActBasicBlock, PreActBottleneck
from ..settings import one_of
from .cifar import CifarResNet
from .preact import PreActResNet, preact_resnet_cifar
from .registry import register

PLACEMENTS = ("original", "bn_after_add", "relu_before_add", "relu_preact", "full_preact")


class Add(nn.Module):
    """The identity shortcut: the sum of both paths."""

    def forward(self, shortcut: Tensor, residual: Tensor) -> Tensor:
        """Two images of one shape to one."""
        return shortcut + residual


class ConstantScaling(nn.Module):
    """Constant factors on the shortcut and on the residual path."""

    def __init__(self, channels: int, shortcut: float = 0.5, residual: float = 0.5) -> None:
        super().__init__()
        self.shortcut, self.residual = shortcut, residual

    def forward(self, shortcut: Tensor, residual: Tensor) -> Tensor:
        """Two images of one shape to one."""
        return self.shortcut * shortcut + self.residual * residual


class ShortcutOnlyGating(nn.Module):
    """A gate g in 0 to 1, computed from the shortcut by a 1x1 convolution: (1 - g) on the shortcut.

    Args:
        channels: of both paths.
        bias: the gate's bias to start with; negative lets the shortcut through.
    """

    def __init__(self, channels: int, bias: float = -6.0) -> None:
        super().__init__()
        self.gate = nn.Conv2d(channels, channels, 1)
        nn.init.constant_(self.gate.bias, bias)  # type: ignore[arg-type]

    def forward(self, shortcut: Tensor, residual: Tensor) -> Tensor:
        """Two images of one shape to one."""
        return (1 - torch.sigmoid(self.gate(shortcut))) * shortcut + residual


class ExclusiveGating(ShortcutOnlyGating):
    """The gate of `ShortcutOnlyGating` on both paths, as in Highway Networks: 1 - g on the shortcut, g on the other."""

    def forward(self, shortcut: Tensor, residual: Tensor) -> Tensor:
        """Two images of one shape to one."""
        gate = torch.sigmoid(self.gate(shortcut))
        return (1 - gate) * shortcut + gate * residual


class DropoutShortcut(nn.Module):
    """Dropout on the shortcut."""

    def __init__(self, channels: int, rate: float = 0.5) -> None:
        super().__init__()
        self.dropout = nn.Dropout(rate)

    def forward(self, shortcut: Tensor, residual: Tensor) -> Tensor:
        """Two images of one shape to one."""
        return self.dropout(shortcut) + residual


JOINS: dict[str, Callable[[int], nn.Module]] = {
    "identity": lambda channels: Add(),
    "constant_scaling": ConstantScaling,
    "exclusive_gating": ExclusiveGating,
    "shortcut_only_gating": ShortcutOnlyGating,
    "dropout": DropoutShortcut,
}


class ResidualUnit(nn.Module):
    """A residual unit after(join(shortcut(x), residual(x))), whose activations are where `placement` says.

    Args:
        inplanes: channels in.
        planes: channels out, or a quarter of them in a `BottleneckUnit`.
        stride: of the first convolution.
        downsample: the shortcut's module where the shape changes, None for the input itself.
        norm_layer: makes a BatchNorm from a number of channels.
        placement: one of figure 4's (a) to (d): "original", "bn_after_add", "relu_before_add", "relu_preact".
        join: how the paths meet: a key of `JOINS`.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        *,
        placement: str = "original",
        join: str = "identity",
    ) -> None:
        super().__init__()
        convs = self.convolutions(inplanes, planes, stride)
        channels = convs[-1].out_channels
        residual: list[nn.Module] = []
        for index, conv in enumerate(convs):
            if index > 0 or placement == "relu_preact":
                residual.append(nn.ReLU())
            residual.append(conv)
            if index < len(convs) - 1 or placement != "bn_after_add":
                residual.append(norm_layer(conv.out_channels))
        after: list[nn.Module] = []
        if placement == "bn_after_add":
            after.append(norm_layer(channels))
        if placement in ("original", "bn_after_add"):
            after.append(nn.ReLU())
        if placement == "relu_before_add":
            residual.append(nn.ReLU())
        self.residual = nn.Sequential(*residual)
        self.downsample = downsample
        self.join = JOINS[join](channels)
        self.after = nn.Sequential(*after)

    @staticmethod
    def convolutions(inplanes: int, planes: int, stride: int) -> list[nn.Conv2d]:
        """Two 3x3."""
        return [conv3x3(inplanes, planes, stride), conv3x3(planes, planes)]

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] to [N, expansion * planes, ceil(H / stride), ceil(W / stride)]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.after(self.join(shortcut, self.residual(x)))


class BottleneckUnit(ResidualUnit):
    """A `ResidualUnit` of 1x1, 3x3 and 1x1 convolutions."""

    expansion = 4

    @staticmethod
    def convolutions(inplanes: int, planes: int, stride: int) -> list[nn.Conv2d]:
        """1x1, 3x3 and 1x1 to four times the channels."""
        return [conv1x1(inplanes, planes, stride), conv3x3(planes, planes), conv1x1(planes, 4 * planes)]


@register(image=32)
def identity_mappings_cifar(
    depth: int = 110, *, placement: str = "original", join: str = "identity", bottleneck: bool = False, **kwargs: Any
) -> CifarResNet | PreActResNet:
    """A net of the paper's comparisons on CIFAR: ResNet-110, or ResNet-164 of bottlenecks.

    Args:
        depth: 6n + 2, or 9n + 2 with bottlenecks.
        placement: of BatchNorm and ReLU, one of `PLACEMENTS`: figure 4's (a) to (e).
        join: what is on the shortcut, one of `JOINS`: figure 2's; its 1x1 convolutional shortcut is `shortcut="C"`.
        bottleneck: units of three convolutions instead of two.
        kwargs: as in `CifarResNet`.

    Raises:
        InputError: an unknown name, full pre-activation with something on the shortcut, or what the net refuses.
    """
    one_of("placement", placement, PLACEMENTS)
    one_of("join", join, tuple(JOINS))
    kwargs = {"shortcut": "B" if bottleneck else "A", **kwargs}
    if placement == "full_preact":
        if join != "identity":
            raise InputError(f"join must be 'identity' with placement 'full_preact', got {join!r}")
        return preact_resnet_cifar(depth, PreActBottleneck if bottleneck else PreActBasicBlock, **kwargs)
    unit = BottleneckUnit if bottleneck else ResidualUnit
    block: Any = partial(unit, placement=placement, join=join)
    block.expansion = unit.expansion
    final = nn.ReLU() if placement == "relu_preact" else None  # its last unit ends with the addition
    return CifarResNet(depth, block=block, final=final, **kwargs)
