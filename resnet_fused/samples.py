"""Shapes as calls and as words: random arguments for an op, which tuning and the kernel benchmark run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import ops
from .kernels.layers import DenseLayer
from .shapes import (
    BasicBlock,
    Bottleneck,
    BottleneckChain,
    Conv,
    DenseBlock,
    Head,
    PreActBlock,
    Shape,
    Stem,
    Transition,
)


@dataclass(frozen=True)
class Sample:
    """A call of an op.

    Attributes:
        shape: of the layer or block.
        args: positional arguments, of the op and of a backend's function for it alike.
        options: the op's.
        kernel_options: those of the backend's function, beside `algorithm`.
    """

    shape: Shape
    args: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    kernel_options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the op."""
        return "conv_bn_act" if isinstance(self.shape, Conv) else self.shape.op

    def run(self, backend: str) -> Tensor:
        """The op on a backend."""
        y: Tensor = getattr(ops, self.name)(*self.args, **self.options, backend=backend)
        return y

    def run_kernel(self, kernels: ModuleType, algorithm: str, **more: Any) -> Tensor:
        """One algorithm of a backend's kernels, without the op around it; `more` options go to its function."""
        y: Tensor = getattr(kernels, self.name)(*self.args, **self.kernel_options, algorithm=algorithm, **more)
        return y

    def to(self, dtype: torch.dtype) -> Sample:
        """The same call with every tensor in another dtype."""
        return Sample(*(_cast(value, dtype) for value in (self.shape, self.args, self.options, self.kernel_options)))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {name: _cast(item, dtype) for name, item in value.items()}
    if isinstance(value, DenseLayer):
        return DenseLayer(*(_cast(item, dtype) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_cast(item, dtype) for item in value)
    return value.to(dtype) if isinstance(value, Tensor) else value


class _Random:
    """Seeded tensors on a device; outputs stay of the order of 1 from layer to layer."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(0)

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator, device=self.device)

    def image(self, *size: int) -> Tensor:
        return self._normal(*size).to(self.dtype).contiguous(memory_format=torch.channels_last)

    def weight(self, k: int, c: int, r: int, s: int) -> Tensor:
        return (self._normal(k, c, r, s) / (c * r * s) ** 0.5).to(self.dtype)

    def scale(self, k: int) -> Tensor:
        return 0.5 + torch.rand(k, generator=self.generator, device=self.device)

    def shift(self, k: int) -> Tensor:
        return self._normal(k) / 2

    def affine(self, k: int) -> tuple[Tensor, Tensor]:
        return self.scale(k), self.shift(k)

    def weight_and_shift(self, k: int, c: int, r: int = 1) -> tuple[Tensor, Tensor]:
        return self.weight(k, c, r, r), self.shift(k)


class _Uninitialised(_Random):
    """Memory only: nothing runs on the device for it."""

    def _normal(self, *size: int) -> Tensor:
        return torch.empty(size, device=self.device)

    def image(self, *size: int) -> Tensor:
        return torch.empty(size, dtype=self.dtype, device=self.device, memory_format=torch.channels_last)

    def weight(self, k: int, c: int, r: int, s: int) -> Tensor:
        return torch.empty(k, c, r, s, dtype=self.dtype, device=self.device)

    def scale(self, k: int) -> Tensor:
        return self._normal(k)

    def shift(self, k: int) -> Tensor:
        return self._normal(k)


def sample(shape: Shape, dtype: torch.dtype, device: torch.device, values: bool = True) -> Sample:
    """Arguments of the op for a shape: images channels_last, every scale and shift given.

    Args:
        shape: of the layer or block.
        dtype: of images and weights.
        device: of all tensors.
        values: random ones; without, the tensors hold whatever their memory does.
    """
    return _MAKERS[type(shape)](shape, (_Random if values else _Uninitialised)(dtype, device))


def _conv(shape: Conv, random: _Random) -> Sample:
    args = [
        random.image(shape.n, shape.c, shape.h, shape.w),
        random.weight(shape.k, shape.c // shape.groups, shape.r, shape.s),
        *random.affine(shape.k),
        random.image(*shape.output_shape) if shape.residual else None,
        *(random.affine(shape.c) if shape.prologue else (None, None)),
    ]
    names = ("stride", "padding", "dilation", "groups")
    options = {name: getattr(shape, name) for name in names} | {"activation": "relu"}
    return Sample(shape, tuple(args), options, options)


def _bottleneck(shape: Bottleneck, random: _Random) -> Sample:
    c, mid, out = shape.c, shape.mid, shape.out
    args = [
        random.image(shape.n, c, shape.h, shape.w),
        *random.weight_and_shift(mid, c),
        *random.weight_and_shift(mid, mid // shape.groups, 3),
        *random.weight_and_shift(out, mid),
        *(random.weight_and_shift(out, c) if shape.projection else (None, None)),
    ]
    scales: dict[str, Any] = {"s1": random.scale(mid), "s2": random.scale(mid), "s3": random.scale(out)}
    scales["sd"] = random.scale(out) if shape.projection else None
    stride, dilation = shape.stride1 * shape.stride2, shape.dilation
    options = {"stride": stride, "dilation": dilation, "groups": shape.groups, "stride_in_1x1": shape.stride1 > 1}
    kernel_options = {"stride1": shape.stride1, "stride2": shape.stride2, "dilation": dilation}
    return Sample(shape, tuple(args), scales | options, scales | kernel_options)


def _basic_block(shape: BasicBlock, random: _Random) -> Sample:
    c, mid, out = shape.c, shape.mid, shape.out
    args = [
        random.image(shape.n, c, shape.h, shape.w),
        *random.weight_and_shift(mid, c, 3),
        *random.weight_and_shift(out, mid, 3),
        *(random.weight_and_shift(out, c) if shape.projection else (None, None)),
    ]
    scales: dict[str, Any] = {"s1": random.scale(mid), "s2": random.scale(out)}
    scales["sd"] = random.scale(out) if shape.projection else None
    options = scales | {"stride": shape.stride, "dilation": shape.dilation}
    return Sample(shape, tuple(args), options, options)


def _stem(shape: Stem, random: _Random) -> Sample:
    args = random.image(shape.n, shape.c, shape.h, shape.w), random.weight(shape.k, shape.c, shape.r, shape.s)
    names = ("stride", "padding", "pool_kernel", "pool_stride", "pool_padding")
    options = {name: getattr(shape, name) for name in names}
    return Sample(shape, (*args, *random.affine(shape.k)), options, options)


def _preact_block(shape: PreActBlock, random: _Random) -> Sample:
    c, mid, out = shape.c, shape.mid, shape.out
    if shape.bottleneck:
        sizes = [(mid, c, 1), (mid, mid // shape.groups, 3), (out, mid, 1)]
    else:
        sizes = [(mid, c, 3), (out, mid, 3)]
    args = (
        random.image(shape.n, c, shape.h, shape.w),
        *(random.affine(c) if shape.prologue else (None, None)),
        [random.weight(k, i, r, r) for k, i, r in sizes],
        [random.scale(k) for k, _, _ in sizes],
        [random.shift(k) for k, _, _ in sizes],
        random.weight(out, c, 1, 1) if shape.projection else None,
    )
    options = {
        "stride": shape.stride1 * shape.stride2,
        "dilation": shape.dilation,
        "groups": shape.groups,
        "stride_in_1x1": shape.bottleneck and shape.stride1 > 1,
    }
    return Sample(shape, args, options, options)


def _dense_block(shape: DenseBlock, random: _Random) -> Sample:
    layers = []
    for i in range(shape.depth):
        c = shape.c + i * shape.growth
        in_scale, in_shift = random.affine(c)
        w1 = random.weight(shape.mid, c, 1, 1) if shape.mid else None
        s1, b1 = random.affine(shape.mid) if shape.mid else (None, None)
        w2 = random.weight(shape.growth, shape.mid or c, 3, 3)
        layers.append(DenseLayer(in_scale, in_shift, w1, s1, b1, w2))
    return Sample(shape, (random.image(shape.n, shape.c, shape.h, shape.w), layers))


def _transition(shape: Transition, random: _Random) -> Sample:
    image = random.image(shape.n, shape.c, shape.h, shape.w)
    return Sample(shape, (image, *random.affine(shape.c), random.weight(shape.k, shape.c, 1, 1)))


def _bottleneck_chain(shape: BottleneckChain, random: _Random) -> Sample:
    c, mid = shape.c, shape.mid
    sizes = [(mid, c, 1), (mid, mid, 3), (c, mid, 1)] * shape.depth
    args = (
        random.image(shape.n, c, shape.h, shape.w),
        [random.weight(k, i, r, r) for k, i, r in sizes],
        [random.scale(k) for k, _, _ in sizes],
        [random.shift(k) for k, _, _ in sizes],
    )
    return Sample(shape, args)


def _head(shape: Head, random: _Random) -> Sample:
    x = random.image(shape.n, shape.c, shape.h, shape.w)
    weight = random.weight(shape.k, shape.c, 1, 1).flatten(1)
    return Sample(shape, (x, weight, random.shift(shape.k).to(x.dtype)))


_MAKERS: dict[type, Callable[[Any, _Random], Sample]] = {
    Conv: _conv,
    Bottleneck: _bottleneck,
    BasicBlock: _basic_block,
    Stem: _stem,
    PreActBlock: _preact_block,
    DenseBlock: _dense_block,
    Transition: _transition,
    BottleneckChain: _bottleneck_chain,
    Head: _head,
}


def describe(shape: Shape) -> str:
    """A shape in few words."""
    image = f"{shape.n}x{shape.c}x{shape.h}x{shape.w}"
    if isinstance(shape, Conv):
        notes = [f"/{shape.stride[0]}"] if shape.stride != (1, 1) else []
        notes += [f"groups {shape.groups}"] if shape.groups > 1 else []
        notes += ["prologue"] if shape.prologue else []
        notes += ["+ residual"] if shape.residual else []
        return " ".join([f"conv {shape.r}x{shape.s} {image} -> {shape.k}", *notes])
    if isinstance(shape, Stem | Transition | Head):
        return f"{shape.op} {image} -> {shape.k}"
    if isinstance(shape, DenseBlock):
        return f"{shape.op} {image}, {shape.depth} x {shape.growth}"
    if isinstance(shape, BottleneckChain):
        return f"{shape.op} {image} -> {shape.mid} -> {shape.c}, {shape.depth} blocks"
    projection = " projection" if shape.projection else ""
    kind = "preact_bottleneck" if isinstance(shape, PreActBlock) and shape.bottleneck else shape.op
    return f"{kind} {image} -> {shape.mid} -> {shape.out}{projection}"
