"""The stem of a ResNet as a module that is one fused op in eval mode."""

from __future__ import annotations

from torch import Tensor, nn

from ._drop_in import DropIn
from .plain import Norm


class _Stem(nn.Module):
    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, padding: int | None, norm: Norm | None
    ) -> None:
        super().__init__()
        padding = kernel_size // 2 if padding is None else padding
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn1 = (norm or nn.BatchNorm2d)(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))


class Stem(DropIn, _Stem):
    """Convolution, BatchNorm, ReLU and 3x3/2 max pooling; one fused op in eval mode.

    The attributes and state_dict keys are those of torchvision's ResNet: conv1, bn1, relu, maxpool.

    Args:
        in_channels: channels in.
        out_channels: channels out.
        kernel_size: of the convolution.
        stride: of the convolution.
        padding: of the convolution, half of the kernel by default.
        norm_layer: makes a BatchNorm from a number of channels, `nn.BatchNorm2d` by default.
        backend: as in `resnet_fused.fuse`.
        accuracy: as in `resnet_fused.fuse`.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 64,
        kernel_size: int = 7,
        stride: int = 2,
        padding: int | None = None,
        norm_layer: Norm | None = None,
        *,
        backend: str = "auto",
        accuracy: str = "strict",
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, norm_layer)
        self._configure(backend, accuracy)
