"""VGG with BatchNorm (Simonyan and Zisserman, 2014, https://arxiv.org/abs/1409.1556); torchvision's state_dict keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .registry import register
from .stage import initialize


class VGG(nn.Module):
    """3x3 convolutions with BatchNorm and ReLU, 2x2 max pooling after each stage, and three linear layers.

    Args:
        stages: convolutions in each of the five stages, of 64, 128, 256, 512 and 512 channels (table 1).
        num_classes: width of the classifier.
        dropout: in the classifier, in training.
        hidden: width of the classifier's hidden layers.
    """

    def __init__(
        self, stages: Sequence[int], num_classes: int = 1000, dropout: float = 0.5, hidden: int = 4096
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, count in zip((64, 128, 256, 512, 512), stages, strict=True):
            for _ in range(count):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )
        initialize(self)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] to logits [N, num_classes]."""
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


@register(image=224)
def vgg16_bn(**kwargs: Any) -> VGG:
    """VGG-16 with BatchNorm: 138.4 million parameters; keyword arguments as in `VGG`."""
    return VGG((2, 2, 3, 3, 3), **kwargs)


@register(image=224)
def vgg19_bn(**kwargs: Any) -> VGG:
    """VGG-19 with BatchNorm: 143.7 million parameters; keyword arguments as in `VGG`."""
    return VGG((2, 2, 4, 4, 4), **kwargs)
