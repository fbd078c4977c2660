"""Modules that are one fused op as a whole: residual and dense blocks, stems, transitions, single layers.

Names play no part: a block is known by its convolutions and BatchNorms, in the order they were registered, and by their
shapes. What lies between them (activations, additions, order) is left to the probe.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..folding import Layer, Selection
from ..fusion import (
    BasicBlockFusion,
    BottleneckFusion,
    ConvBNActFusion,
    DenseBlockFusion,
    Fusion,
    PreActBlockFusion,
    Settings,
    StemFusion,
    TransitionFusion,
)
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
    places_within,
)


@dataclass
class Parts:
    """What a module is made of.

    Attributes:
        convs: its convolutions, in the order they were registered, as are norms and others.
        norms: its BatchNorms.
        others: its other modules without children.
        order: `"c"` for each convolution and `"n"` for each BatchNorm.
    """

    convs: list[nn.Conv2d] = field(default_factory=list)
    norms: list[nn.Module] = field(default_factory=list)
    others: list[nn.Module] = field(default_factory=list)
    order: str = ""

    @classmethod
    def of(cls, module: nn.Module) -> Parts | None:
        """The parts of a module, None if anything but convolutions and BatchNorms in it holds tensors."""
        parts = cls()
        for leaf in leaves(module):
            if isinstance(leaf, nn.Conv2d):
                parts.convs.append(leaf)
                parts.order += "c"
            elif is_norm(leaf):
                parts.norms.append(leaf)
                parts.order += "n"
            elif has_own_tensors(leaf):
                return None
            else:
                parts.others.append(leaf)
        inside = {m for part in (*parts.convs, *parts.norms) for m in part.modules()}
        return None if any(has_own_tensors(m) for m in module.modules() if m not in inside) else parts


def match_block(block: nn.Module, model: Model, settings: Settings, residual: bool) -> list[Fusion]:
    """What `block` may be: residual and dense blocks if `residual`, else a stem, a transition or a single layer.

    The probe has to choose.

    Raises:
        Refused: it looks like one but cannot be fused.
    """
    parts = Parts.of(block)
    if parts is None:
        return []
    inside = places_within(block)
    common: dict[str, Any] = {
        "steps": (block,),
        "inside": inside,
        "whole": [m._modules for m in block.modules() if m._modules],
        "settings": settings,
    }
    matchers = (post_activation, pre_activation, dense_block) if residual else (one_layer, transition)
    found: list[Fusion] = []
    refused = None
    for matcher in matchers:
        try:
            found += matcher(parts, model, **common)
        except Refused as error:
            refused = error
    if not found and refused is not None:
        raise refused
    if found:
        for children, name in inside:
            if (child := children[name]) is not None:
                check_inside(child, model)
    return found


def check_others(parts: Parts, model: Model, allowed: Sequence[nn.Module] = ()) -> None:
    """Refuse what is neither ReLU, nor nothing at all, nor allowed."""
    for other in parts.others:
        if other not in allowed and activation(other) is None:
            raise Refused(f"{model.name(other)} is a {type(other).__name__}, not ReLU")


def post_activation(parts: Parts, model: Model, **common: Any) -> list[Fusion]:
    """Basic blocks and bottlenecks, a BatchNorm after every convolution."""
    convs, norms = parts.convs, parts.norms
    if len(convs) != len(norms) or len(convs) not in (2, 3, 4):
        return []
    if any(norm_channels(norm) != conv.out_channels for conv, norm in zip(convs, norms, strict=True)):
        return []
    layers = [make_layer(conv, norm, model) for conv, norm in zip(convs, norms, strict=True)]
    found: list[Fusion] = []
    for order in orders(layers):
        if (options := basic_block(order)) is not None:
            found.append(BasicBlockFusion(order, options=options, **common))
        if (options := bottleneck(order)) is not None:
            found.append(BottleneckFusion(order, options=options, **common))
    if found:
        check_others(parts, model)
        return found
    for selection in selections(convs):  # whatever selects may be a module, and is not looked at
        with_it: list[Layer | Selection] = [*layers, selection]
        if len(convs) == 2 and (options := basic_block(with_it)) is not None:
            found.append(BasicBlockFusion(with_it, options=options, **common))
        elif len(convs) == 3 and (options := bottleneck(with_it)) is not None:
            found.append(BottleneckFusion(with_it, options=options, **common))
    return found


def selections(convs: Sequence[nn.Conv2d]) -> list[Selection]:
    """The shortcuts of option A that fit a path of convolutions: zeros behind the channels, or on both sides."""
    channels, out = convs[0].in_channels, convs[-1].out_channels
    return [Selection(channels, out, first) for first in dict.fromkeys((0, (out - channels) // 2)) if out >= channels]


def pre_activation(parts: Parts, model: Model, **common: Any) -> list[Fusion]:
    """Full pre-activation blocks: a BatchNorm before every convolution of the path, none at the projection.

    The first BatchNorm may be missing: it then comes before the block.
    """
    convs, norms = parts.convs, parts.norms
    found: list[Fusion] = []
    for depth, prologue in itertools.product((2, 3), (True, False)):
        if len(norms) != depth - 1 + prologue or len(convs) not in (depth, depth + 1):
            continue
        for path, projection in dict.fromkeys(
            [(tuple(convs[:depth]), tuple(convs[depth:])), (tuple(convs[-depth:]), tuple(convs[:-depth]))]
        ):
            before, after = norms[:prologue], norms[prologue:]
            if [norm_channels(n) for n in before] != [path[0].in_channels] * prologue:
                continue
            if [norm_channels(n) for n in after] != [conv.out_channels for conv in path[:-1]]:
                continue
            order = [*(Layer(*pair) for pair in zip(path, [*after, None], strict=True)), *map(Layer, projection)]
            options = basic_block(order) if depth == 2 else bottleneck(order)
            if options is None:
                continue
            layers = [make_layer(None, norm, model) for norm in before]
            layers += [make_layer(layer.conv, layer.norm, model) for layer in order]
            ends = {"prologue": prologue, "projection": bool(projection)}
            found.append(PreActBlockFusion(layers, options=options, **ends, **common))
    if found:
        check_others(parts, model)
    return found


def dense_block(parts: Parts, model: Model, **common: Any) -> list[Fusion]:
    """A block of two or more dense layers: BatchNorm, 1x1, BatchNorm, 3x3 each, or BatchNorm, 3x3."""
    convs, norms = parts.convs, parts.norms
    each = 2 if "ncnc" in parts.order and pair(convs[0].kernel_size) == (1, 1) else 1
    depth = len(convs) // each
    if depth < 2 or parts.order != "nc" * each * depth:
        return []
    growth, channels, middle = convs[-1].out_channels, convs[0].in_channels, convs[0].out_channels
    widths = [(channels + i * growth, middle) if each == 2 else (channels + i * growth,) for i in range(depth)]
    ins = [width for layer in widths for width in layer]
    if [conv.in_channels for conv in convs] != ins or [norm_channels(norm) for norm in norms] != ins:
        return []
    for i, conv in enumerate(convs):
        last = (i + 1) % each == 0
        if not is_conv(Layer(conv), 3 if last else 1) or conv.out_channels != (growth if last else middle):
            return []
    if any(conv.bias is not None for conv in convs[each - 1 :: each]):
        raise Refused("the 3x3 convolutions of a dense block must have no bias")
    check_others(parts, model)
    layers = []
    for i, (conv, norm) in enumerate(zip(convs, norms, strict=True)):
        if i % each == 0:
            layers.append(make_layer(None, norm, model))
        after = norms[i + 1] if i % each < each - 1 else None
        layers.append(make_layer(conv, after, model))
    return [DenseBlockFusion(layers, options={"convs": each}, **common)]


def transition(parts: Parts, model: Model, **common: Any) -> list[Fusion]:
    """BatchNorm, 1x1 convolution and 2x2 average pooling."""
    pools = [m for m in parts.others if isinstance(m, nn.AvgPool2d)]
    if parts.order != "nc" or len(pools) != 1 or not is_conv(Layer(parts.convs[0]), 1):
        return []
    (conv,), (norm,), (pool,) = parts.convs, parts.norms, pools
    if conv.bias is not None or norm_channels(norm) != conv.in_channels:
        return []
    sizes = [pair(pool.kernel_size), pair(pool.stride), pair(pool.padding)]
    if sizes != [(2, 2), (2, 2), (0, 0)] or pool.ceil_mode:
        return []
    check_others(parts, model, allowed=pools)
    return [TransitionFusion([make_layer(None, norm, model), make_layer(conv, None, model)], options={}, **common)]


def one_layer(parts: Parts, model: Model, **common: Any) -> list[Fusion]:
    """A convolution and BatchNorm, perhaps with ReLU or with ReLU and max pooling."""
    pools = [m for m in parts.others if isinstance(m, nn.MaxPool2d)]
    if (len(parts.convs), len(parts.norms)) != (1, 1) or len(pools) > 1:
        return []
    (conv,), (norm,) = parts.convs, parts.norms
    if norm_channels(norm) != conv.out_channels or (common["steps"] == (conv,) and not conv._modules):
        return []
    check_others(parts, model, allowed=pools)
    return single_layer(make_layer(conv, norm, model), pools[0] if pools else None, **common)


def orders(layers: list[Layer]) -> list[list[Layer]]:
    """The layers as they are, and with the first as the projection, which comes last."""
    return [layers] if len(layers) < 3 else [layers, [*layers[1:], layers[0]]]


def single_layer(layer: Layer, pool: nn.MaxPool2d | None, **common: Any) -> list[Fusion]:
    """A convolution and BatchNorm with or without ReLU, or with ReLU and max pooling."""
    assert layer.conv is not None
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
    conv = layer.conv
    same = {"stride": (stride,) * 2, "padding": (dilation * (kernel // 2),) * 2, "dilation": (dilation,) * 2}
    return (
        conv is not None
        and pair(conv.kernel_size) == (kernel, kernel)
        and conv.groups == groups
        and conv_geometry(conv) == same
    )


def chained(path: Sequence[Layer], shortcut: Sequence[Layer | Selection], stride: int) -> bool:
    """Whether channels and strides fit together: along the path, and between its output and the shortcut."""
    convs = [layer.conv for layer in path if layer.conv is not None]
    channels, out = convs[0].in_channels, convs[-1].out_channels
    if any(before.out_channels != after.in_channels for before, after in itertools.pairwise(convs)):
        return False
    if not shortcut:
        return stride == 1 and channels == out
    last = shortcut[0]
    if isinstance(last, Selection):
        return (last.channels, last.out) == (channels, out)
    conv = last.conv
    return conv is not None and (conv.in_channels, conv.out_channels) == (channels, out) and is_conv(last, 1, stride)


def basic_block(layers: Sequence[Any]) -> dict[str, Any] | None:
    """The options of a basic block: two 3x3 and perhaps a projection. None if the layers are not one."""
    path, shortcut = layers[:2], layers[2:]
    stride, dilation = pair(path[0].conv.stride)[0], pair(path[0].conv.dilation)[0]
    fits = (
        len(shortcut) < 2
        and is_conv(path[0], 3, stride, dilation)
        and is_conv(path[1], 3, 1, dilation)
        and chained(path, shortcut, stride)
    )
    return {"stride": stride, "dilation": dilation} if fits else None


def bottleneck(layers: Sequence[Any]) -> dict[str, Any] | None:
    """The options of a bottleneck: 1x1, 3x3, 1x1 and perhaps a projection. None if the layers are not one."""
    path, shortcut = layers[:3], layers[3:]
    if len(path) < 3 or path[2].conv is None:
        return None
    first, middle = path[0].conv, path[1].conv
    stride1, stride2, dilation = pair(first.stride)[0], pair(middle.stride)[0], pair(middle.dilation)[0]
    fits = (
        min(stride1, stride2) == 1
        and is_conv(path[0], 1, stride1)
        and is_conv(path[1], 3, stride2, dilation, middle.groups)
        and is_conv(path[2], 1)
        and chained(path, shortcut, stride1 * stride2)
    )
    if not fits:
        return None
    stride = stride1 * stride2
    return {"stride": stride, "dilation": dilation, "groups": middle.groups, "stride_in_1x1": stride1 > 1}
