"""Pre-activation residual units (He et al., 2016, https://arxiv.org/abs/1603.05027, figure 1b)."""

from __future__ import annotations

from torch import Tensor, nn

from .plain import Norm, conv1x1, conv3x3


class PreActBasicBlock(nn.Module):
    """BatchNorm, ReLU and 3x3 convolution, twice, and the shortcut; nothing follows the addition.

    Args:
        inplanes: channels in.
        planes: channels out.
        stride: of the first convolution.
        downsample: the shortcut's projection, which takes the activated input; None for the input itself.
        norm_layer: makes a BatchNorm from a number of channels, `nn.BatchNorm2d` by default.
        preactivate: False where the input is activated already, as in a net's first unit.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        norm_layer: Norm | None = None,
        *,
        preactivate: bool = True,
    ) -> None:
        super().__init__()
        norm = norm_layer or nn.BatchNorm2d
        self.bn1 = norm(inplanes) if preactivate else None
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn2 = norm(planes)
        self.conv2 = conv3x3(planes, planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] to [N, planes, ceil(H / stride), ceil(W / stride)]."""
        active = x if self.bn1 is None else self.relu(self.bn1(x))
        y = self.conv1(active)
        y = self.conv2(self.relu(self.bn2(y)))
        return y + (x if self.downsample is None else self.downsample(active))


class PreActBottleneck(nn.Module):
    """BatchNorm, ReLU and convolution, three times (1x1, 3x3, 1x1), and the shortcut; nothing follows the addition.

    Args:
        inplanes: channels in.
        planes: a quarter of the channels out.
        stride: of the first 1x1 convolution, as in the paper's nets.
        downsample: the shortcut's projection, which takes the activated input; None for the input itself.
        norm_layer: makes a BatchNorm from a number of channels, `nn.BatchNorm2d` by default.
        preactivate: False where the input is activated already, as in a net's first unit.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        norm_layer: Norm | None = None,
        *,
        preactivate: bool = True,
    ) -> None:
        super().__init__()
        norm = norm_layer or nn.BatchNorm2d
        self.bn1 = norm(inplanes) if preactivate else None
        self.conv1 = conv1x1(inplanes, planes, stride)
        self.bn2 = norm(planes)
        self.conv2 = conv3x3(planes, planes)
        self.bn3 = norm(planes)
        self.conv3 = conv1x1(planes, planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] to [N, 4 * planes, ceil(H / stride), ceil(W / stride)]."""
        active = x if self.bn1 is None else self.relu(self.bn1(x))
        y = self.conv1(active)
        y = self.conv2(self.relu(self.bn2(y)))
        y = self.conv3(self.relu(self.bn3(y)))
        return y + (x if self.downsample is None else self.downsample(active))
