"""Pre-activation ResNets (He et al., 2016, "Identity Mappings in Deep Residual Networks", https://arxiv.org/abs/1603.05027).

The paper's appendix: a net's first unit takes the activated output of the first convolution on both of its paths, units
that change the shape share their activation with the shortcut, and one more activation follows the last addition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..nn.plain import Norm
from ..nn.preact import PreActBasicBlock, PreActBottleneck
from .cifar import blocks_per_stage
from .registry import register
from .stage import initialize, make_stage

STAGES = 4
"""At most; ImageNet nets have as many, CIFAR nets three."""


class PreActResNet(nn.Module):
    """A ResNet of pre-activation units.

    Args:
        block: `nn.preact.PreActBasicBlock`, `PreActBottleneck`, or a class with the same arguments.
        layers: units in each of one to four stages.
        widths: planes of each stage, one for each of `layers`.
        num_classes: width of the classifier.
        small_images: first convolution 3x3 without pooling, as for CIFAR, instead of 7x7/2 and 3x3/2 max pooling.
        shortcut: option "A", "B" or "C", as in `make_shortcut`; projections have no BatchNorm of their own.
        in_channels: channels of the images.
        norm_layer: makes a BatchNorm from a number of channels, `nn.BatchNorm2d` by default.

    Raises:
        InputError: more than four stages or none, layers and widths differ in length, or an unknown shortcut.
    """

    def __init__(
        self,
        block: Any,
        layers: Sequence[int],
        widths: Sequence[int],
        num_classes: int = 1000,
        *,
        small_images: bool = False,
        shortcut: str = "B",
        in_channels: int = 3,
        norm_layer: Norm | None = None,
    ) -> None:
        super().__init__()
        if len(layers) != len(widths):
            raise InputError(f"widths must have as many numbers as layers ({len(layers)}), got {len(widths)}")
        if not 1 <= len(layers) <= STAGES:
            raise InputError(f"layers must have 1 to {STAGES} numbers, got {len(layers)}")
        norm = norm_layer or nn.BatchNorm2d
        channels = widths[0]
        kernel, stride = (3, 1) if small_images else (7, 2)
        self.conv1 = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False)
        self.bn1 = norm(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_images else nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        stages: list[nn.Module] = []
        for index, (planes, count) in enumerate(zip(widths, layers, strict=True)):
            first = {"preactivate": index > 0}
            stage = make_stage(
                block, channels, planes, count, 1 if index == 0 else 2, shortcut, None, first, norm_layer=norm
            )
            stages.append(stage)
            channels = planes * block.expansion
        stages += [nn.Identity() for _ in range(len(layers), STAGES)]
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.norm = norm(channels)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_channels, H, W] to logits [N, num_classes]."""
        # Without a loop, and each module once: `fuse` then knows that every call does the same (matchers/straight.py).
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = torch.relu(self.norm(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def preact_resnet_cifar(
    depth: int, block: Any, num_classes: int = 10, widths: Sequence[int] = (16, 32, 64), **kwargs: Any
) -> PreActResNet:
    """A pre-activation ResNet for 32x32 images, of three stages.

    Args:
        depth: 6n + 2 with `PreActBasicBlock`, 9n + 2 with `PreActBottleneck`.
        block: as in `PreActResNet`.
        num_classes: width of the classifier.
        widths: planes of the three stages.
        kwargs: as in `PreActResNet`.

    Raises:
        InputError: no net has that depth, or what `PreActResNet` refuses.
    """
    layers = (blocks_per_stage(depth, block.expansion),) * 3
    return PreActResNet(block, layers, widths, num_classes, small_images=True, **kwargs)


@register(image=32)
def preact_resnet110_cifar(**kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-110 of basic units: 1.7 million parameters; arguments as in `preact_resnet_cifar`."""
    return preact_resnet_cifar(110, PreActBasicBlock, **{"shortcut": "A", **kwargs})


@register(image=32)
def preact_resnet164_cifar(**kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-164 of bottlenecks: 1.7 million parameters; arguments as in `preact_resnet_cifar`."""
    return preact_resnet_cifar(164, PreActBottleneck, **kwargs)


@register(image=32)
def preact_resnet1001_cifar(**kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-1001 of bottlenecks: 10.3 million parameters; arguments as in `preact_resnet_cifar`."""
    return preact_resnet_cifar(1001, PreActBottleneck, **kwargs)


@register(image=224)
def preact_resnet200(**kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-200 for ImageNet: 64.7 million parameters; keyword arguments as in `PreActResNet`."""
    return PreActResNet(PreActBottleneck, (3, 24, 36, 3), (64, 128, 256, 512), **kwargs)
