"""ResNets and plain nets for CIFAR (He et al., 2015, https://arxiv.org/abs/1512.03385, section 4.2 and table 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..nn.plain import BasicBlock, Norm
from .plain import PlainBlock
from .registry import register
from .stage import initialize, make_stage


class CifarResNet(nn.Module):
    """A 3x3 convolution, three stages of basic blocks (depth 6n + 2) or of bottlenecks (depth 9n + 2), a classifier.

    Args:
        depth: number of layers with weights.
        num_classes: width of the classifier.
        block: `plain.BasicBlock`, `plain.Bottleneck`, or a class with the same arguments (`resnet_fused.nn`'s).
        shortcut: option "A" (the paper's), "B" or "C", as in `make_shortcut`; None for a block without.
        in_channels: channels of the images.
        widths: of the three stages.
        norm_layer: makes a BatchNorm from a number of channels, `nn.BatchNorm2d` by default.
        final: what comes between the last block and the pooling.

    Raises:
        InputError: no net has that depth, there are not three widths, or an unknown shortcut.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        *,
        block: Any = BasicBlock,
        shortcut: str | None = "A",
        in_channels: int = 3,
        widths: Sequence[int] = (16, 32, 64),
        norm_layer: Norm | None = None,
        final: nn.Module | None = None,
    ) -> None:
        super().__init__()
        norm = norm_layer or nn.BatchNorm2d
        expansion = block.expansion
        count = blocks_per_stage(depth, expansion)
        if len(widths) != 3:
            raise InputError(f"widths must have 3 numbers, got {len(widths)}")
        self.conv1 = nn.Conv2d(in_channels, widths[0], kernel_size=3, padding=1, bias=False)
        self.bn1 = norm(widths[0])
        self.relu = nn.ReLU(inplace=True)
        kwargs: dict[str, Any] = {"shortcut": shortcut, "norm": norm, "norm_layer": norm}
        self.layer1 = make_stage(block, widths[0], widths[0], count, 1, **kwargs)
        self.layer2 = make_stage(block, widths[0] * expansion, widths[1], count, 2, **kwargs)
        self.layer3 = make_stage(block, widths[1] * expansion, widths[2], count, 2, **kwargs)
        self.final = nn.Identity() if final is None else final
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(widths[2] * expansion, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_channels, H, W] to logits [N, num_classes]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.final(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def blocks_per_stage(depth: int, expansion: int) -> int:
    """Blocks in each of three stages: of two layers without expansion, of three with it.

    Raises:
        InputError: depth is not 6n + 2 or 9n + 2.
    """
    layers = 3 * (2 if expansion == 1 else 3)
    if depth < layers + 2 or (depth - 2) % layers:
        raise InputError(f"depth must be {layers}n + 2 with these blocks, got {depth}")
    return (depth - 2) // layers


@register(image=32)
def resnet20_cifar(**kwargs: Any) -> CifarResNet:
    """ResNet-20: 0.27 million parameters; keyword arguments as in `CifarResNet`."""
    return CifarResNet(20, **kwargs)


@register(image=32)
def resnet32_cifar(**kwargs: Any) -> CifarResNet:
    """ResNet-32: 0.46 million parameters; keyword arguments as in `CifarResNet`."""
    return CifarResNet(32, **kwargs)


@register(image=32)
def resnet44_cifar(**kwargs: Any) -> CifarResNet:
    """ResNet-44: 0.66 million parameters; keyword arguments as in `CifarResNet`."""
    return CifarResNet(44, **kwargs)


@register(image=32)
def resnet56_cifar(**kwargs: Any) -> CifarResNet:
    """ResNet-56: 0.85 million parameters; keyword arguments as in `CifarResNet`."""
    return CifarResNet(56, **kwargs)


@register(image=32)
def resnet110_cifar(**kwargs: Any) -> CifarResNet:
    """ResNet-110: 1.7 million parameters; keyword arguments as in `CifarResNet`."""
    return CifarResNet(110, **kwargs)


@register(image=32)
def resnet1202_cifar(**kwargs: Any) -> CifarResNet:
    """ResNet-1202: 19.4 million parameters; keyword arguments as in `CifarResNet`."""
    return CifarResNet(1202, **kwargs)


@register(image=32)
def plain20_cifar(**kwargs: Any) -> CifarResNet:
    """ResNet-20 without shortcuts; keyword arguments as in `CifarResNet`."""
    return CifarResNet(20, block=PlainBlock, shortcut=None, **kwargs)


@register(image=32)
def plain32_cifar(**kwargs: Any) -> CifarResNet:
    """ResNet-32 without shortcuts; keyword arguments as in `CifarResNet`."""
    return CifarResNet(32, block=PlainBlock, shortcut=None, **kwargs)


@register(image=32)
def plain44_cifar(**kwargs: Any) -> CifarResNet:
    """ResNet-44 without shortcuts; keyword arguments as in `CifarResNet`."""
    return CifarResNet(44, block=PlainBlock, shortcut=None, **kwargs)


@register(image=32)
def plain56_cifar(**kwargs: Any) -> CifarResNet:
    """ResNet-56 without shortcuts; keyword arguments as in `CifarResNet`."""
    return CifarResNet(56, block=PlainBlock, shortcut=None, **kwargs)


@register(image=32)
def plain110_cifar(**kwargs: Any) -> CifarResNet:
    """ResNet-110 without shortcuts; keyword arguments as in `CifarResNet`."""
    return CifarResNet(110, block=PlainBlock, shortcut=None, **kwargs)
