"""The residual blocks of ResNet in plain torch: the eval and training forward that the fused ones stand for."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..errors import InputError

Norm = Callable[[int], nn.Module]


def conv3x3(inplanes: int, planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """3x3 convolution that keeps the image's size at stride 1."""
    return nn.Conv2d(inplanes, planes, 3, stride, dilation, dilation, groups, bias=False)


def conv1x1(inplanes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution."""
    return nn.Conv2d(inplanes, planes, 1, stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut, as in torchvision: same arguments, attributes and state_dict keys.

    Args:
        inplanes: channels in.
        planes: channels out.
        stride: of the first convolution.
        downsample: the shortcut's projection, None for the input itself.
        groups: must be 1.
        base_width: must be 64.
        dilation: must be 1.
        norm_layer: makes a BatchNorm from a number of channels, `nn.BatchNorm2d` by default.

    Raises:
        InputError: groups, base_width or dilation has another value.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Norm | None = None,
    ) -> None:
        super().__init__()
        for name, value, only in (("groups", groups, 1), ("base_width", base_width, 64), ("dilation", dilation, 1)):
            if value != only:
                raise InputError(f"{name} must be {only} in a BasicBlock, got {value}")
        norm = norm_layer or nn.BatchNorm2d
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] to [N, planes, ceil(H / stride), ceil(W / stride)]."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and the shortcut, as in torchvision: same arguments, attributes, state_dict keys.

    Args:
        inplanes: channels in.
        planes: a quarter of the channels out.
        stride: of the block.
        downsample: the shortcut's projection, None for the input itself.
        groups: of the 3x3 convolution.
        base_width: the inner width is `int(planes * base_width / 64) * groups`.
        dilation: of the 3x3 convolution.
        norm_layer: makes a BatchNorm from a number of channels, `nn.BatchNorm2d` by default.
        stride_in_1x1: the stride is the first 1x1's (the paper's ResNet, "v1") instead of the 3x3's ("v1.5").
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Norm | None = None,
        *,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        norm = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv1x1(inplanes, width, stride if stride_in_1x1 else 1)
        self.bn1 = norm(width)
        self.conv2 = conv3x3(width, width, 1 if stride_in_1x1 else stride, groups, dilation)
        self.bn2 = norm(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] to [N, 4 * planes, ceil(H / stride), ceil(W / stride)]."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)
