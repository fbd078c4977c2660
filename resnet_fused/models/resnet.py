"""ResNet-18 to -152 (He et al., 2015, https://arxiv.org/abs/1512.03385), with torchvision's arguments and names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..nn.plain import BasicBlock, Bottleneck, Norm
from .registry import register
from .stage import initialize, make_stage

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
        stride_in_1x1: bottlenecks with the stride in their first 1x1 ("v1", the paper's) instead of their 3x3 ("v1.5",
            torchvision's).
        shortcut: option "A", "B" or "C" of the paper's section 3.3, as in `make_shortcut`; None for a block without.

    Raises:
        InputError: stages are not four, replace_stride_with_dilation not three, or an unknown shortcut.
    """

    def __init__(
        self,
        block: Any,
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Norm | None = None,
        *,
        stride_in_1x1: bool = False,
        shortcut: str | None = "B",
    ) -> None:
        super().__init__()
        dilate = (False, False, False) if replace_stride_with_dilation is None else replace_stride_with_dilation
        if len(layers) != 4:
            raise InputError(f"layers must have 4 numbers, got {len(layers)}")
        if len(dilate) != 3:
            raise InputError(f"replace_stride_with_dilation must have 3 values, got {len(dilate)}")
        norm = norm_layer or nn.BatchNorm2d
        kwargs: dict[str, Any] = {"groups": groups, "base_width": width_per_group, "norm_layer": norm}
        if stride_in_1x1:
            kwargs["stride_in_1x1"] = True
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        inplanes, dilation = 64, 1
        stages = []
        for index, (planes, count) in enumerate(zip((64, 128, 256, 512), layers, strict=True)):
            stride, first = (1 if index == 0 else 2), {"dilation": dilation}
            if index > 0 and dilate[index - 1]:
                dilation, stride = 2 * dilation, 1
            stage = make_stage(
                block, inplanes, planes, count, stride, shortcut, norm, first, dilation=dilation, **kwargs
            )
            stages.append(stage)
            inplanes = planes * block.expansion
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inplanes, num_classes)

        initialize(self)
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, (BasicBlock, Bottleneck)):
                    last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                    nn.init.zeros_(last.weight)  # type: ignore[arg-type]

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


@register(image=224)
def resnet18(**kwargs: Any) -> ResNet:
    """ResNet-18: 11.7 million parameters; keyword arguments as in `ResNet`."""
    return ResNet(BasicBlock, (2, 2, 2, 2), **kwargs)


@register(image=224)
def resnet34(**kwargs: Any) -> ResNet:
    """ResNet-34: 21.8 million parameters; keyword arguments as in `ResNet`."""
    return ResNet(BasicBlock, (3, 4, 6, 3), **kwargs)


@register(image=224)
def resnet50(**kwargs: Any) -> ResNet:
    """ResNet-50: 25.6 million parameters; keyword arguments as in `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **kwargs)


@register(image=224)
def resnet101(**kwargs: Any) -> ResNet:
    """ResNet-101: 44.5 million parameters; keyword arguments as in `ResNet`."""
    return ResNet(Bottleneck, (3, 4, 23, 3), **kwargs)


@register(image=224)
def resnet152(**kwargs: Any) -> ResNet:
    """ResNet-152: 60.2 million parameters; keyword arguments as in `ResNet`."""
    return ResNet(Bottleneck, (3, 8, 36, 3), **kwargs)
