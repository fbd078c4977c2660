"""Modules that are one fused op as a whole: residual blocks, stems, and convolution + BatchNorm (+ ReLU) layers.

Names play no part: a block is known by its convolutions and BatchNorms, in the order they were registered, and by their
shapes. What lies between them (activations, additions, order) is left to the probe.
"""

from __future__ import annotations

import itertools
from typing import Any

from torch import nn

from ..fusion import BasicBlockFusion, BottleneckFusion, ConvBNActFusion, Fusion, Layer, Settings, StemFusion
from .layers import (
    Model,
    Refused,
    activation,
    check_inside,
    conv_geometry,
    has_own_tensors,
    is_norm,
    leaves,
    make_layer,
    norm_channels,
    pair,
)


def match_block(block: nn.Module, model: Model, settings: Settings, residual: bool) -> list[Fusion]:
    """What `block` may be: residual blocks if `residual`, else a stem or a single layer. The probe has to choose.

    Raises:
        Refused: it looks like one but cannot be fused.
    """
    convs: list[nn.Conv2d] = []
    norms: list[nn.Module] = []
    others: list[nn.Module] = []
    for leaf in leaves(block):
        if isinstance(leaf, nn.Conv2d):
            convs.append(leaf)
        elif is_norm(leaf):
            norms.append(leaf)
        elif has_own_tensors(leaf):
            return []
        else:
            others.append(leaf)
    if len(convs) != len(norms) or len(convs) not in ((2, 3, 4) if residual else (1,)):
        return []
    if any(norm_channels(norm) != conv.out_channels for conv, norm in zip(convs, norms, strict=True)):
        return []
    if any(has_own_tensors(m) for m in block.modules() if m not in convs and m not in norms):
        return []
    pools = [m for m in others if isinstance(m, nn.MaxPool2d)]
    if len(pools) > (0 if residual else 1) or block in convs:
        return []

    inside = [(parent._modules, name) for parent in block.modules() for name in parent._modules]
    for children, name in inside:
        if (child := children[name]) is not None:
            check_inside(child, model)
    for other in others:
        if other not in pools and activation(other) is None:
            raise Refused(f"{model.name(other)} is a {type(other).__name__}, not ReLU")
    layers = [make_layer(conv, norm, model) for conv, norm in zip(convs, norms, strict=True)]

    common: dict[str, Any] = {
        "steps": (block,),
        "inside": inside,
        "whole": [m._modules for m in block.modules() if m._modules],
        "settings": settings,
    }
    if not residual:
        return single_layer(layers[0], pools[0] if pools else None, **common)
    found: list[Fusion] = []
    for order in orders(layers):
        if (options := basic_block(order)) is not None:
            found.append(BasicBlockFusion(order, options=options, **common))
        if (options := bottleneck(order)) is not None:
            found.append(BottleneckFusion(order, options=options, **common))
    return found


def orders(layers: list[Layer]) -> list[list[Layer]]:
    """The layers as they are, and with the first as the projection, which comes last."""
    return [layers] if len(layers) < 3 else [layers, [*layers[1:], layers[0]]]


def single_layer(layer: Layer, pool: nn.MaxPool2d | None, **common: Any) -> list[Fusion]:
    """A convolution and BatchNorm with or without ReLU, or with ReLU and max pooling."""
    geometry: dict[str, Any] = conv_geometry(layer.conv)
    if pool is None:
        options = geometry | {"groups": layer.conv.groups}
        return [ConvBNActFusion([layer], options=options | {"activation": act}, **common) for act in ("relu", "none")]
    numbers = [*geometry.values(), *(pair(v) for v in (pool.kernel_size, pool.stride, pool.padding))]
    square = all(a == b for a, b in numbers)
    if not square or geometry["dilation"] != (1, 1) or layer.conv.groups != 1:
        raise Refused("a stem needs square strides and windows, dilation 1 and one group")
    if pair(pool.dilation) != (1, 1) or pool.ceil_mode or pool.return_indices:
        raise Refused("its max pooling has dilation, ceil_mode or return_indices")
    names = ("stride", "padding", None, "pool_kernel", "pool_stride", "pool_padding")
    options = {name: a for name, (a, _) in zip(names, numbers, strict=True) if name is not None}
    return [StemFusion([layer], options=options, **common)]


def is_conv(layer: Layer, kernel: int, stride: int = 1, dilation: int = 1, groups: int = 1) -> bool:
    """Whether a layer is a square convolution with just this geometry, padded to keep the image's size at stride 1."""
    same = {"stride": (stride,) * 2, "padding": (dilation * (kernel // 2),) * 2, "dilation": (dilation,) * 2}
    conv = layer.conv
    return pair(conv.kernel_size) == (kernel, kernel) and conv.groups == groups and conv_geometry(conv) == same


def chained(path: list[Layer], projection: list[Layer], stride: int) -> bool:
    """Whether channels and strides fit together: along the path, and between its output and the shortcut."""
    channels, out = path[0].conv.in_channels, path[-1].conv.out_channels
    for before, after in itertools.pairwise(path):
        if before.conv.out_channels != after.conv.in_channels:
            return False
    if not projection:
        return stride == 1 and channels == out
    conv = projection[0].conv
    return (conv.in_channels, conv.out_channels) == (channels, out) and is_conv(projection[0], 1, stride)


def basic_block(layers: list[Layer]) -> dict[str, Any] | None:
    """The options of a basic block: two 3x3 and perhaps a projection. None if the layers are not one."""
    path, projection = layers[:2], layers[2:]
    stride, dilation = pair(path[0].conv.stride)[0], pair(path[0].conv.dilation)[0]
    fits = (
        len(projection) < 2
        and is_conv(path[0], 3, stride, dilation)
        and is_conv(path[1], 3, 1, dilation)
        and chained(path, projection, stride)
    )
    return {"stride": stride, "dilation": dilation} if fits else None


def bottleneck(layers: list[Layer]) -> dict[str, Any] | None:
    """The options of a bottleneck: 1x1, 3x3, 1x1 and perhaps a projection. None if the layers are not one."""
    path, projection = layers[:3], layers[3:]
    if len(path) < 3:
        return None
    first, middle = path[0].conv, path[1].conv
    stride1, stride2, dilation = pair(first.stride)[0], pair(middle.stride)[0], pair(middle.dilation)[0]
    fits = (
        min(stride1, stride2) == 1
        and is_conv(path[0], 1, stride1)
        and is_conv(path[1], 3, stride2, dilation, middle.groups)
        and is_conv(path[2], 1)
        and chained(path, projection, stride1 * stride2)
    )
    if not fits:
        return None
    stride = stride1 * stride2
    return {"stride": stride, "dilation": dilation, "groups": middle.groups, "stride_in_1x1": stride1 > 1}
