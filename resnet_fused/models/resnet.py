"""ResNet-18 to -152 (He et al., 2015, https://arxiv.org/abs/1512.03385), with torchvision's arguments and names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..nn.plain import BasicBlock, Bottleneck, Norm, conv1x1

M = TypeVar("M", bound=nn.Module)


class ResNet(nn.Module):
    """A ResNet of plain blocks; a torchvision checkpoint loads as it is.

    Args:
        block: `plain.BasicBlock`, `plain.Bottleneck`, or a class with the same arguments (`resnet_fused.nn`'s).
        layers: blocks in each of the four stages.
        num_classes: width of the classifier.
        zero_init_residual: start with zeros in each block's last BatchNorm.
        groups: of the 3x3 convolutions.
        width_per_group: 64; 128 in a wide ResNet.
        replace_stride_with_dilation: for each of the last three stages.
        norm_layer: makes a BatchNorm from a number of channels.
        stride_in_1x1: bottlenecks with the stride in their first 1x1 ("v1") instead of their 3x3 ("v1.5").

    Raises:
        InputError: stages are not four, or replace_stride_with_dilation not three.
    """

    def __init__(
        self,
        block: type[nn.Module],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Norm | None = None,
        *,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        dilate = (False, False, False) if replace_stride_with_dilation is None else replace_stride_with_dilation
        if len(layers) != 4:
            raise InputError(f"layers must have 4 numbers, got {len(layers)}")
        if len(dilate) != 3:
            raise InputError(f"replace_stride_with_dilation must have 3 values, got {len(dilate)}")
        self._block: Any = block
        self._kwargs: dict[str, Any] = {"groups": groups, "base_width": width_per_group, "norm_layer": norm_layer}
        if stride_in_1x1:
            self._kwargs["stride_in_1x1"] = True
        self.inplanes = 64
        self.dilation = 1
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = (norm_layer or nn.BatchNorm2d)(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(64, layers[0], 1, False)
        self.layer2 = self._make_layer(128, layers[1], 2, dilate[0])
        self.layer3 = self._make_layer(256, layers[2], 2, dilate[1])
        self.layer4 = self._make_layer(512, layers[3], 2, dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inplanes, num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, (BasicBlock, Bottleneck)):
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                nn.init.zeros_(last.weight)  # type: ignore[arg-type]

    def _make_layer(self, planes: int, blocks: int, stride: int, dilate: bool) -> nn.Sequential:
        first_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        out = planes * self._block.expansion
        downsample = None
        if stride != 1 or self.inplanes != out:
            norm = self._kwargs["norm_layer"] or nn.BatchNorm2d
            downsample = nn.Sequential(conv1x1(self.inplanes, out, stride), norm(out))
        first = self._block(self.inplanes, planes, stride, downsample, dilation=first_dilation, **self._kwargs)
        rest = [self._block(out, planes, dilation=self.dilation, **self._kwargs) for _ in range(1, blocks)]
        self.inplanes = out
        return nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] to logits [N, num_classes]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def randomize_batchnorms(model: M) -> M:
    """Draw every BatchNorm's four vectors at random, in place, from torch's generator; return the model.

    A fresh BatchNorm is nearly the identity: on one, a wrong fold could pass for a right one. The scale of a residual
    branch's last one stays below 1, so that activations do not grow from block to block.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for vector, low, high in (
                    (module.weight, 0.3, 0.9),
                    (module.bias, -0.5, 0.5),
                    (module.running_mean, -0.5, 0.5),
                    (module.running_var, 0.5, 2.0),
                ):
                    if vector is not None:
                        vector.uniform_(low, high)
    return model


def resnet18(**kwargs: Any) -> ResNet:
    """ResNet-18: 11.7 million parameters; keyword arguments as in `ResNet`."""
    return ResNet(BasicBlock, (2, 2, 2, 2), **kwargs)


def resnet34(**kwargs: Any) -> ResNet:
    """ResNet-34: 21.8 million parameters; keyword arguments as in `ResNet`."""
    return ResNet(BasicBlock, (3, 4, 6, 3), **kwargs)


def resnet50(**kwargs: Any) -> ResNet:
    """ResNet-50: 25.6 million parameters; keyword arguments as in `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **kwargs)


def resnet101(**kwargs: Any) -> ResNet:
    """ResNet-101: 44.5 million parameters; keyword arguments as in `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 23, 3), **kwargs)


def resnet152(**kwargs: Any) -> ResNet:
    """ResNet-152: 60.2 million parameters; keyword arguments as in `ResNet`."""
    return ResNet(Bottleneck, (3, 8, 36, 3), **kwargs)
