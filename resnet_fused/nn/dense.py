"""The parts of DenseNet (Huang et al., 2016, https://arxiv.org/abs/1608.06993), with torchvision's names."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .plain import conv1x1, conv3x3


class DenseLayer(nn.Module):
    """The channels that one layer adds: BatchNorm, ReLU, 1x1 convolution, BatchNorm, ReLU, 3x3 convolution.

    Args:
        num_input_features: channels in.
        growth_rate: channels out.
        bn_size: the 1x1 convolution makes `bn_size * growth_rate` channels; None for the layer without a bottleneck,
            which is BatchNorm, ReLU and 3x3 convolution only.
        drop_rate: share of the new channels' values that are dropped in training.
    """

    __constants__ = ("bottleneck",)  # for TorchScript, which then leaves out what is not there

    def __init__(
        self, num_input_features: int, growth_rate: int, bn_size: int | None = 4, drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        self.bottleneck = bn_size is not None
        if bn_size is None:
            self.conv1 = conv3x3(num_input_features, growth_rate)
        else:
            self.conv1 = conv1x1(num_input_features, bn_size * growth_rate)
            self.norm2 = nn.BatchNorm2d(bn_size * growth_rate)
            self.relu2 = nn.ReLU(inplace=True)
            self.conv2 = conv3x3(bn_size * growth_rate, growth_rate)
        self.drop_rate = drop_rate

    def forward(self, x: Tensor) -> Tensor:
        """[N, num_input_features, H, W] to [N, growth_rate, H, W]."""
        y = self.conv1(self.relu1(self.norm1(x)))
        if self.bottleneck:
            y = self.conv2(self.relu2(self.norm2(y)))
        return F.dropout(y, self.drop_rate, self.training) if self.drop_rate > 0 else y


class DenseBlock(nn.ModuleDict):
    """Dense layers, each of which takes the block's input and the channels of every layer before it.

    Args:
        num_layers: how many, named denselayer1, denselayer2 and so on.
        num_input_features: channels in.
        bn_size: as in `DenseLayer`.
        growth_rate: channels that each layer adds.
        drop_rate: as in `DenseLayer`.
    """

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int | None,
        growth_rate: int,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        for index in range(num_layers):
            channels = num_input_features + index * growth_rate
            self[f"denselayer{index + 1}"] = DenseLayer(channels, growth_rate, bn_size, drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """[N, num_input_features, H, W] to [N, num_input_features + num_layers * growth_rate, H, W]."""
        for layer in self.values():
            x = torch.cat((x, layer(x)), 1)
        return x


class Transition(nn.Sequential):
    """Between dense blocks: BatchNorm, ReLU, 1x1 convolution and 2x2 average pooling.

    Args:
        num_input_features: channels in.
        num_output_features: channels out.
    """

    def __init__(self, num_input_features: int, num_output_features: int) -> None:
        super().__init__(
            OrderedDict[str, nn.Module](
                norm=nn.BatchNorm2d(num_input_features),
                relu=nn.ReLU(inplace=True),
                conv=conv1x1(num_input_features, num_output_features),
                pool=nn.AvgPool2d(kernel_size=2, stride=2),
            )
        )
