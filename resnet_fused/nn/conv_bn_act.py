"""Convolution, BatchNorm and ReLU as a module that is one fused op in eval mode."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ._drop_in import DropIn
from .plain import Norm

Size = int | tuple[int, int]


class ConvBNAct(DropIn, nn.Sequential):
    """torchvision's Conv2dNormActivation: convolution "0", BatchNorm "1", activation "2"; one fused op in eval mode.

    Args:
        in_channels: channels in.
        out_channels: channels out.
        kernel_size: one number or (vertical, horizontal), as are stride, padding and dilation.
        stride: of the convolution.
        padding: by default what keeps the image's size at stride 1 (odd kernels).
        groups: of the convolution.
        norm_layer: makes a BatchNorm from a number of channels; None for no BatchNorm, which is then not fused.
        activation_layer: `nn.ReLU`, or None for none; anything else is not fused.
        dilation: of the convolution.
        inplace: given to the activation, unless None.
        bias: of the convolution; by default only if there is no BatchNorm.
        backend: as in `resnet_fused.fuse`.
        accuracy: as in `resnet_fused.fuse`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Size | str | None = None,
        groups: int = 1,
        norm_layer: Norm | None = nn.BatchNorm2d,
        activation_layer: Callable[..., nn.Module] | None = nn.ReLU,
        dilation: Size = 1,
        inplace: bool | None = True,
        bias: bool | None = None,
        *,
        backend: str = "auto",
        accuracy: str = "strict",
    ) -> None:
        if padding is None:
            kernels, dilations = ((v, v) if isinstance(v, int) else v for v in (kernel_size, dilation))
            padding = ((kernels[0] - 1) // 2 * dilations[0], (kernels[1] - 1) // 2 * dilations[1])
        conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias=norm_layer is None if bias is None else bias,
        )
        layers: list[nn.Module] = [conv]
        if norm_layer is not None:
            layers.append(norm_layer(out_channels))
        if activation_layer is not None:
            layers.append(activation_layer() if inplace is None else activation_layer(inplace=inplace))
        super().__init__(*layers)
        self.out_channels = out_channels
        self._configure(backend, accuracy)
