"""DenseNets (Huang et al., 2016, https://arxiv.org/abs/1608.06993) with torchvision's names and state_dict keys."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..nn.dense import DenseBlock, Transition
from .registry import register


class DenseNet(nn.Module):
    """First convolution, dense blocks with transitions between them, BatchNorm, ReLU, classifier.

    Args:
        growth_rate: channels that each layer adds, the paper's k.
        block_config: layers in each dense block.
        num_init_features: channels of the first convolution.
        bn_size: width of the 1x1 convolutions in growth rates; None for layers without them.
        drop_rate: share of each layer's values that are dropped in training.
        num_classes: width of the classifier.
        compression: share of its input's channels that a transition keeps, the paper's theta.
        small_images: start with a 3x3 convolution alone, as for CIFAR, not with 7x7/2, BatchNorm, ReLU and max pooling.
        in_channels: channels of the images.

    Raises:
        InputError: compression is not in (0, 1].
    """

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int | None = 4,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        *,
        compression: float = 0.5,
        small_images: bool = False,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if not 0 < compression <= 1:
            raise InputError(f"compression must be above 0 and at most 1, got {compression}")
        features: OrderedDict[str, nn.Module] = OrderedDict()
        if small_images:
            features["conv0"] = nn.Conv2d(in_channels, num_init_features, kernel_size=3, padding=1, bias=False)
        else:
            features["conv0"] = nn.Conv2d(
                in_channels, num_init_features, kernel_size=7, stride=2, padding=3, bias=False
            )
            features["norm0"] = nn.BatchNorm2d(num_init_features)
            features["relu0"] = nn.ReLU(inplace=True)
            features["pool0"] = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        channels = num_init_features
        for index, num_layers in enumerate(block_config, 1):
            features[f"denseblock{index}"] = DenseBlock(num_layers, channels, bn_size, growth_rate, drop_rate)
            channels += num_layers * growth_rate
            if index < len(block_config):
                features[f"transition{index}"] = Transition(channels, int(channels * compression))
                channels = int(channels * compression)
        features["norm5"] = nn.BatchNorm2d(channels)
        self.features = nn.Sequential(features)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_channels, H, W] to logits [N, num_classes]."""
        x = F.relu(self.features(x), inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


def densenet_cifar(
    depth: int,
    growth_rate: int,
    bc: bool = True,
    num_classes: int = 10,
    compression: float | None = None,
    **kwargs: Any,
) -> DenseNet:
    """A DenseNet for 32x32 images, of three dense blocks (section 3, "Implementation Details"; table 2).

    Args:
        depth: number of layers with weights: 6n + 4 with bottlenecks, 3n + 4 without.
        growth_rate: channels that each layer adds.
        bc: DenseNet-BC: bottleneck layers, compression 0.5, 2 * growth_rate channels at first; else layers of one 3x3
            convolution, no compression, 16 channels at first.
        num_classes: width of the classifier.
        compression: another one.
        kwargs: as in `DenseNet`; `bn_size` overrides what `bc` says of bottlenecks.

    Raises:
        InputError: no net has that depth, or compression is not in (0, 1].
    """
    bn_size = kwargs.pop("bn_size", 4 if bc else None)
    convs = 3 if bn_size is None else 6
    if depth < convs + 4 or (depth - 4) % convs:
        raise InputError(f"depth must be {convs}n + 4 with these layers, got {depth}")
    return DenseNet(
        growth_rate,
        ((depth - 4) // convs,) * 3,
        2 * growth_rate if bc else 16,
        bn_size,
        num_classes=num_classes,
        compression=compression if compression is not None else 0.5 if bc else 1.0,
        small_images=True,
        **kwargs,
    )


@register(image=224)
def densenet121(**kwargs: Any) -> DenseNet:
    """DenseNet-121: 8.0 million parameters; keyword arguments as in `DenseNet`."""
    return DenseNet(32, (6, 12, 24, 16), 64, **kwargs)


@register(image=224)
def densenet169(**kwargs: Any) -> DenseNet:
    """DenseNet-169: 14.1 million parameters; keyword arguments as in `DenseNet`."""
    return DenseNet(32, (6, 12, 32, 32), 64, **kwargs)


@register(image=224)
def densenet201(**kwargs: Any) -> DenseNet:
    """DenseNet-201: 20.0 million parameters; keyword arguments as in `DenseNet`."""
    return DenseNet(32, (6, 12, 48, 32), 64, **kwargs)


@register(image=224)
def densenet264(**kwargs: Any) -> DenseNet:
    """DenseNet-264: 33.3 million parameters; keyword arguments as in `DenseNet`."""
    return DenseNet(32, (6, 12, 64, 48), 64, **kwargs)


@register(image=32)
def densenet40_k12_cifar(**kwargs: Any) -> DenseNet:
    """DenseNet (k = 12, L = 40): 1.0 million parameters; keyword arguments as in `densenet_cifar`."""
    return densenet_cifar(40, 12, bc=False, **kwargs)


@register(image=32)
def densenet100_k12_cifar(**kwargs: Any) -> DenseNet:
    """DenseNet (k = 12, L = 100): 7.0 million parameters; keyword arguments as in `densenet_cifar`."""
    return densenet_cifar(100, 12, bc=False, **kwargs)


@register(image=32)
def densenet100_k24_cifar(**kwargs: Any) -> DenseNet:
    """DenseNet (k = 24, L = 100): 27.2 million parameters; keyword arguments as in `densenet_cifar`."""
    return densenet_cifar(100, 24, bc=False, **kwargs)


@register(image=32)
def densenet_bc100_k12_cifar(**kwargs: Any) -> DenseNet:
    """DenseNet-BC (k = 12, L = 100): 0.8 million parameters; keyword arguments as in `densenet_cifar`."""
    return densenet_cifar(100, 12, **kwargs)


@register(image=32)
def densenet_bc250_k24_cifar(**kwargs: Any) -> DenseNet:
    """DenseNet-BC (k = 24, L = 250): 15.3 million parameters; keyword arguments as in `densenet_cifar`."""
    return densenet_cifar(250, 24, **kwargs)


@register(image=32)
def densenet_bc190_k40_cifar(**kwargs: Any) -> DenseNet:
    """DenseNet-BC (k = 40, L = 190): 25.6 million parameters; keyword arguments as in `densenet_cifar`."""
    return densenet_cifar(190, 40, **kwargs)
