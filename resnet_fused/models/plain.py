"""Plain nets: ResNets without shortcuts (He et al., 2015, https://arxiv.org/abs/1512.03385, section 3.3)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..nn import plain
from .registry import register
from .resnet import ResNet


class PlainBlock(plain.BasicBlock):
    """Two 3x3 convolutions, each with BatchNorm and ReLU: a `BasicBlock` without the addition."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] to [N, planes, ceil(H / stride), ceil(W / stride)]."""
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)))


@register(image=224)
def plain18(**kwargs: Any) -> ResNet:
    """ResNet-18 without shortcuts: 11.5 million parameters; keyword arguments as in `ResNet`."""
    return ResNet(PlainBlock, (2, 2, 2, 2), shortcut=None, **kwargs)


@register(image=224)
def plain34(**kwargs: Any) -> ResNet:
    """ResNet-34 without shortcuts: 21.6 million parameters; keyword arguments as in `ResNet`."""
    return ResNet(PlainBlock, (3, 4, 6, 3), shortcut=None, **kwargs)
