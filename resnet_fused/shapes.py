"""The geometry of a layer or block: what the planner prices, and where its output shape comes from."""

from __future__ import annotations

from dataclasses import dataclass

Pair = tuple[int, int]


def conv_out(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    """Output size of a convolution or pooling along one axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


@dataclass(frozen=True)
class Conv:
    """One layer: convolution, scale and shift, optional residual, activation. `k` output channels, `r` x `s` taps.

    With `prologue`, scale, shift and ReLU of the input come first.
    """

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    residual: bool = False
    prologue: bool = False

    op = "conv"

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """(n, k, output height, output width)."""
        return (
            self.n,
            self.k,
            conv_out(self.h, self.r, self.stride[0], self.padding[0], self.dilation[0]),
            conv_out(self.w, self.s, self.stride[1], self.padding[1], self.dilation[1]),
        )

    @property
    def flops(self) -> int:
        """Floating-point operations of the convolution, a multiply and an add being two."""
        n, k, p, q = self.output_shape
        return 2 * n * k * p * q * (self.c // self.groups) * self.r * self.s

    @property
    def winograd(self) -> bool:
        """Whether Winograd applies: 3x3, stride 1, dilation 1, one group."""
        return (self.r, self.s) == (3, 3) and self.stride == (1, 1) and self.dilation == (1, 1) and self.groups == 1

    def dims(self) -> dict[str, int]:
        """The geometry as the cost model takes it."""
        return {
            **{name: getattr(self, name) for name in "nchwkrs"},
            "stride_h": self.stride[0],
            "stride_w": self.stride[1],
            "pad_h": self.padding[0],
            "pad_w": self.padding[1],
            "dil_h": self.dilation[0],
            "dil_w": self.dilation[1],
            "groups": self.groups,
            "residual": int(self.residual),
            "prologue": int(self.prologue),
        }

    def layers(self) -> list[Conv]:
        """The layers it is made of: itself."""
        return [self]


class _Layers:
    """What follows from a block's layers."""

    def layers(self) -> list[Conv]:
        """The layers it is made of, in the order they run."""
        raise NotImplementedError

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """(n, out, output height, output width)."""
        return self.layers()[-1].output_shape

    @property
    def flops(self) -> int:
        """Floating-point operations of its convolutions."""
        return sum(layer.flops for layer in self.layers())


@dataclass(frozen=True)
class Bottleneck(_Layers):
    """1x1 (stride1), 3x3 (stride2, dilation, groups), 1x1, plus the input or its 1x1 projection."""

    n: int
    c: int
    h: int
    w: int
    mid: int
    out: int
    stride1: int = 1
    stride2: int = 1
    dilation: int = 1
    groups: int = 1
    projection: bool = False

    op = "bottleneck"

    @property
    def winograd(self) -> bool:
        """Whether Winograd applies to the 3x3."""
        return self.stride2 == 1 and self.dilation == 1 and self.groups == 1

    def dims(self) -> dict[str, int]:
        """The geometry as the cost model takes it."""
        names = ("n", "c", "h", "w", "mid", "out", "stride1", "stride2", "dilation", "projection")
        return {name: int(getattr(self, name)) for name in names}

    def layers(self) -> list[Conv]:
        """The layers it is made of, in the order they run."""
        n, c, h, w = self.n, self.c, self.h, self.w
        stride = self.stride1 * self.stride2
        first = Conv(n, c, h, w, self.mid, 1, 1, (self.stride1,) * 2)
        d = (self.dilation,) * 2
        second = Conv(*first.output_shape, self.mid, 3, 3, (self.stride2,) * 2, d, d, self.groups)
        third = Conv(*second.output_shape, self.out, 1, 1, residual=True)
        shortcut = [Conv(n, c, h, w, self.out, 1, 1, (stride, stride))] if self.projection else []
        return [first, second, *shortcut, third]


@dataclass(frozen=True)
class BasicBlock(_Layers):
    """3x3 (stride, dilation), 3x3 (dilation), plus the input or its 1x1 projection."""

    n: int
    c: int
    h: int
    w: int
    mid: int
    out: int
    stride: int = 1
    dilation: int = 1
    projection: bool = False

    op = "basic_block"

    @property
    def winograd(self) -> bool:
        """Whether Winograd applies to the second 3x3 (to the first as well if stride is 1)."""
        return self.dilation == 1

    def dims(self) -> dict[str, int]:
        """The geometry as the cost model takes it."""
        names = ("n", "c", "h", "w", "mid", "out", "stride", "dilation", "projection")
        return {name: int(getattr(self, name)) for name in names}

    def layers(self) -> list[Conv]:
        """The layers it is made of, in the order they run."""
        n, c, h, w = self.n, self.c, self.h, self.w
        d = (self.dilation,) * 2
        first = Conv(n, c, h, w, self.mid, 3, 3, (self.stride,) * 2, d, d)
        second = Conv(*first.output_shape, self.out, 3, 3, padding=d, dilation=d, residual=True)
        shortcut = [Conv(n, c, h, w, self.out, 1, 1, (self.stride,) * 2)] if self.projection else []
        return [first, *shortcut, second]


@dataclass(frozen=True)
class Stem:
    """A layer (r x s taps, ReLU) followed by max pooling."""

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    stride: int = 2
    padding: int = 3
    pool_kernel: int = 3
    pool_stride: int = 2
    pool_padding: int = 1

    op = "stem"
    winograd = False

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """(n, k, pooled height, pooled width)."""
        n, k, p, q = self.layers()[0].output_shape
        pooled = (conv_out(size, self.pool_kernel, self.pool_stride, self.pool_padding) for size in (p, q))
        return (n, k, *pooled)  # type: ignore[return-value]

    @property
    def flops(self) -> int:
        """Floating-point operations of the convolution."""
        return self.layers()[0].flops

    def dims(self) -> dict[str, int]:
        """The geometry as the cost model takes it."""
        names = ("n", "c", "h", "w", "k", "r", "s", "stride", "pool_kernel", "pool_stride", "pool_padding")
        return {name: getattr(self, name) for name in names} | {"pad": self.padding}

    def layers(self) -> list[Conv]:
        """The layers it is made of: the convolution, without the pooling."""
        stride, padding = (self.stride,) * 2, (self.padding,) * 2
        return [Conv(self.n, self.c, self.h, self.w, self.k, self.r, self.s, stride, padding)]


@dataclass(frozen=True)
class PreActBlock(_Layers):
    """Scale, shift and ReLU of the input, then two 3x3 or 1x1-3x3-1x1, plus the input or the projected activations.

    The full pre-activation block of "Identity Mappings in Deep Residual Networks" (He et al., 2016): nothing follows
    the addition, and a projection starts from the prologue's result.
    """

    n: int
    c: int
    h: int
    w: int
    mid: int
    out: int
    stride1: int = 1
    stride2: int = 1
    dilation: int = 1
    groups: int = 1
    projection: bool = False
    bottleneck: bool = False
    prologue: bool = True

    op = "preact_block"

    @property
    def winograd(self) -> bool:
        """Whether Winograd applies to a 3x3: the middle one of a bottleneck, the second one of a basic block."""
        return self.dilation == 1 and self.groups == 1 and self.stride2 == 1

    def dims(self) -> dict[str, int]:
        """The geometry as the cost model takes it."""
        names = ("n", "c", "h", "w", "mid", "out", "stride1", "stride2", "dilation")
        flags = ("projection", "bottleneck", "prologue")
        return {name: int(getattr(self, name)) for name in (*names, *flags)}

    def layers(self) -> list[Conv]:
        """The layers it is made of, in the order they run."""
        n, c, h, w = self.n, self.c, self.h, self.w
        d = (self.dilation,) * 2
        stride1, stride2 = (self.stride1,) * 2, (self.stride2,) * 2
        if self.bottleneck:
            first = Conv(n, c, h, w, self.mid, 1, 1, stride1, prologue=self.prologue)
            middle = Conv(*first.output_shape, self.mid, 3, 3, stride2, d, d, self.groups)
            path = [first, middle, Conv(*middle.output_shape, self.out, 1, 1, residual=True)]
        else:
            first = Conv(n, c, h, w, self.mid, 3, 3, stride1, d, d, prologue=self.prologue)
            path = [first, Conv(*first.output_shape, self.out, 3, 3, (1, 1), d, d, residual=True)]
        stride = self.stride1 * self.stride2
        shortcut = (
            [Conv(n, c, h, w, self.out, 1, 1, (stride, stride), prologue=self.prologue)] if self.projection else []
        )
        return [*path[:-1], *shortcut, path[-1]]


@dataclass(frozen=True)
class DenseBlock(_Layers):
    """Layers that each append `growth` channels to what they read: (prologue, 1x1 to `mid`, ReLU,) prologue, 3x3.

    `depth` layers; `mid` is 0 where they have no 1x1 (DenseNet without B).
    """

    n: int
    c: int
    h: int
    w: int
    growth: int
    depth: int
    mid: int = 0

    op = "dense_block"
    winograd = True

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """(n, c + depth * growth, h, w)."""
        return (self.n, self.c + self.depth * self.growth, self.h, self.w)

    def dims(self) -> dict[str, int]:
        """The geometry as the cost model takes it."""
        return {name: getattr(self, name) for name in ("n", "c", "h", "w", "growth", "depth", "mid")}

    def layers(self) -> list[Conv]:
        """The layers it is made of, in the order they run."""
        n, h, w = self.n, self.h, self.w
        found = []
        for i in range(self.depth):
            c = self.c + i * self.growth
            if self.mid:
                found.append(Conv(n, c, h, w, self.mid, 1, 1, prologue=True))
            found.append(Conv(n, self.mid or c, h, w, self.growth, 3, 3, padding=(1, 1), prologue=not self.mid))
        return found


@dataclass(frozen=True)
class Transition:
    """Scale, shift and ReLU of the input, 1x1 convolution, 2x2 average pooling of stride 2 (done before the 1x1)."""

    n: int
    c: int
    h: int
    w: int
    k: int

    op = "transition"
    winograd = False

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """(n, k, h // 2, w // 2)."""
        return (self.n, self.k, self.h // 2, self.w // 2)

    @property
    def flops(self) -> int:
        """Floating-point operations of the 1x1 as it stands in the network, before the pooling."""
        return 2 * self.n * self.h * self.w * self.c * self.k

    def dims(self) -> dict[str, int]:
        """The geometry as the cost model takes it."""
        return {name: getattr(self, name) for name in ("n", "c", "h", "w", "k")}

    def layers(self) -> list[Conv]:
        """The 1x1 convolution on the pooled image."""
        return [Conv(self.n, self.c, self.h // 2, self.w // 2, self.k, 1, 1)]


@dataclass(frozen=True)
class BottleneckChain(_Layers):
    """`depth` bottlenecks, one after the other: identity shortcuts, stride 1, one group."""

    n: int
    c: int
    h: int
    w: int
    mid: int
    depth: int

    op = "bottleneck_chain"
    winograd = False

    @property
    def block(self) -> Bottleneck:
        """The shape of each block."""
        return Bottleneck(self.n, self.c, self.h, self.w, self.mid, self.c)

    def dims(self) -> dict[str, int]:
        """The geometry by name."""
        return {name: getattr(self, name) for name in ("n", "c", "h", "w", "mid", "depth")}

    def layers(self) -> list[Conv]:
        """The layers it is made of, in the order they run."""
        return self.block.layers() * self.depth


@dataclass(frozen=True)
class Head(_Layers):
    """The mean over the pixels, and a linear layer to `k` outputs."""

    n: int
    c: int
    h: int
    w: int
    k: int

    op = "head"
    winograd = False

    def dims(self) -> dict[str, int]:
        """The geometry by name."""
        return {name: getattr(self, name) for name in ("n", "c", "h", "w", "k")}

    def layers(self) -> list[Conv]:
        """The linear layer, as a 1x1 convolution of one pixel."""
        return [Conv(self.n, self.c, 1, 1, self.k, 1, 1)]


Shape = Conv | Bottleneck | BasicBlock | Stem | PreActBlock | DenseBlock | Transition | BottleneckChain | Head
