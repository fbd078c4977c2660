"""What the tests of the ops compare with: the formulas in plain torch, at any dtype, and the parity rule."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import resnet_fused as rf
from resnet_fused.kernels import vendor
from resnet_fused.shapes import Conv

CL = torch.channels_last
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(repr=False)
class Case:
    """A call of an op: its name, positional arguments and options."""

    op: str
    args: list[Tensor | None]
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, **options: Any) -> Tensor:
        return getattr(rf.ops, self.op)(*self.args, **{**self.options, **options})

    def to(self, dtype: torch.dtype) -> Case:
        """The same call with its images and weights in another dtype, and its vectors in float64 beside float64."""

        def cast(t: Any) -> Any:
            if not isinstance(t, Tensor) or (t.dim() == 1 and dtype != torch.float64):
                return t
            return t.detach().to(dtype)

        options = {name: cast(value) for name, value in self.options.items()}
        return Case(self.op, [cast(t) for t in self.args], options)

    def formula(self) -> Tensor:
        """The same call, every operation by torch, one after another."""
        return FORMULAS[self.op](*self.args, **self.options)

    def reliable(self) -> bool:
        """Whether torch's own convolutions, which are oneDNN's, compute this correctly."""
        _unreliable.clear()
        self.formula()
        return not _unreliable

    def exact(self) -> Tensor:
        """The float64 reference."""
        return self.to(torch.float64).formula()

    def magnitude(self) -> float:
        """The largest sum of absolute terms in an output: what the rounding errors of float32 sums are relative to."""
        args = [None if t is None else t.detach().double().abs() for t in self.args]
        options = {name: t.double().abs() if isinstance(t, Tensor) else t for name, t in self.options.items()}
        return FORMULAS[self.op](*args, **options).max().item()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # hypothesis would print every element

    def __repr__(self) -> str:
        def short(t: Any) -> Any:
            return f"{str(t.dtype)[6:]}{list(t.shape)}{list(t.stride())}" if isinstance(t, Tensor) else t

        args = ", ".join(map(str, map(short, self.args)))
        return f"{self.op}({args}, {', '.join(f'{name}={short(value)}' for name, value in self.options.items())})"


_unreliable: list[Conv] = []


@contextlib.contextmanager
def _without_onednn(shape: Conv) -> Iterator[None]:
    _unreliable.append(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about TF32 on Intel's GPUs
        with torch.backends.mkldnn.flags(enabled=False):
            yield


def layer(x, weight, scale, shift, residual=None, *, activation="relu", **geometry):
    """A layer as an unfused model computes it: convolution, BatchNorm, add, ReLU, each rounded to x's dtype."""
    values = map(geometry.get, ("stride", "padding", "dilation"), (1, 0, 1))
    pairs = [(value, value) if isinstance(value, int) else tuple(value) for value in values]
    k, _, r, s = weight.shape
    shape = Conv(*x.shape, k, r, s, *pairs, geometry.get("groups", 1))
    with _without_onednn(shape) if vendor.unreliable(shape) else contextlib.nullcontext():
        y = functional.conv2d(x, weight, None, **geometry)
    mean, var = torch.zeros(k, dtype=shift.dtype), torch.ones(k, dtype=shift.dtype)
    if 0 not in y.shape:
        y = functional.batch_norm(y, mean, var, scale, shift, eps=1e-30)
    if residual is not None:
        y = y + residual
    return y.relu() if activation == "relu" else y


def _bottleneck(
    x, w1, b1, w2, b2, w3, b3, wd=None, bd=None, *, s1=None, s2=None, s3=None, sd=None, stride=1, dilation=1, groups=1,
    stride_in_1x1=False
):  # fmt: skip
    h = layer(x, w1, s1, b1, stride=stride if stride_in_1x1 else 1)
    stride2 = 1 if stride_in_1x1 else stride
    h = layer(h, w2, s2, b2, stride=stride2, padding=dilation, dilation=dilation, groups=groups)
    return layer(h, w3, s3, b3, x if wd is None else layer(x, wd, sd, bd, stride=stride, activation="none"))


def _basic_block(x, w1, b1, w2, b2, wd=None, bd=None, *, s1=None, s2=None, sd=None, stride=1, dilation=1):
    h = layer(x, w1, s1, b1, stride=stride, padding=dilation, dilation=dilation)
    side = x if wd is None else layer(x, wd, sd, bd, stride=stride, activation="none")
    return layer(h, w2, s2, b2, side, padding=dilation, dilation=dilation)


def _stem(x, weight, scale, shift, *, stride=2, padding=3, pool_kernel=3, pool_stride=2, pool_padding=1):
    y = layer(x, weight, scale, shift, stride=stride, padding=padding)
    return functional.max_pool2d(y, pool_kernel, pool_stride, pool_padding)


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "conv_bn_act": layer,
    "bottleneck": _bottleneck,
    "basic_block": _basic_block,
    "stem": _stem,
}


def assert_parity(y: Tensor, case: Case) -> None:
    """The parity rule: twice the error of unfused torch at the same dtype, both against float64.

    Unfused torch may be exact by luck in a small output: one rounding of the output and of the largest sum are added.
    """
    exact, unfused = case.exact(), case.formula()
    assert y.dtype == case.args[0].dtype
    assert y.shape == exact.shape
    if exact.numel() == 0:
        return
    error, allowed = (y.double() - exact).abs().max().item(), (unfused.double() - exact).abs().max().item()
    tiny = torch.finfo(y.dtype).eps / 2 * exact.abs().max().item() + 2**-24 * case.magnitude()
    assert error <= 2 * allowed + tiny, f"error {error:.3g}, unfused torch {allowed:.3g}, tiny {tiny:.3g}"


def assert_close_to_largest(y: Tensor, case: Case, part: float) -> None:
    """Every error at most `part` of the output's largest magnitude."""
    exact = case.exact()
    if exact.numel():
        error, largest = (y.double() - exact).abs().max(), exact.abs().max()
        assert error <= part * largest + 1e-30, (
            f"error {error:.3g} is {error / largest:.3g} of the largest, {largest:.3g}"
        )


def image(n, c, h, w, dtype, layout="nchw", values=torch.randn):
    """An input in one of several memory layouts."""
    if layout == "view":  # every second pixel of every second row, without the first channel
        return values(n, c + 1, 2 * h, 2 * w).to(dtype)[:, 1:, ::2, 1::2]
    if layout == "nhwc view":  # a channel slice, as a split or a concatenation leaves it
        return values(n, c + 3, h, w).to(dtype).contiguous(memory_format=CL)[:, 2:-1]
    if layout == "expanded":  # one channel seen as many
        return values(n, 1, h, w).to(dtype).expand(n, c, h, w)
    x = values(n, c, h, w).to(dtype)
    return x.contiguous(memory_format=CL) if layout == "nhwc" else x


def weight(k, c, r, s, dtype):
    return (torch.randn(k, c, r, s) / (c * r * s) ** 0.5).to(dtype)


def scale(k):
    return torch.rand(k) + 0.5


def shift(k):
    return torch.randn(k) * 0.5


def bottleneck_case(
    n=2,
    c=16,
    h=7,
    w=7,
    mid=8,
    out=16,
    dtype=torch.float32,
    layout="nhwc",
    projection=None,
    groups=1,
    stride=1,
    **options,
):
    args = [image(n, c, h, w, dtype, layout)]
    for k, i, r in ((mid, c, 1), (mid, mid // groups, 3), (out, mid, 1)):
        args += [weight(k, i, r, r, dtype), shift(k)]
    scales = {"s1": scale(mid), "s2": scale(mid), "s3": scale(out)}
    if projection or (projection is None and (stride != 1 or c != out)):
        args += [weight(out, c, 1, 1, dtype), shift(out)]
        scales["sd"] = scale(out)
    return Case("bottleneck", args, {**scales, "stride": stride, "groups": groups, **options})


def basic_block_case(
    n=2, c=16, h=7, w=7, mid=16, out=16, dtype=torch.float32, layout="nhwc", projection=None, stride=1, **options
):
    args = [image(n, c, h, w, dtype, layout)]
    for k, i in ((mid, c), (out, mid)):
        args += [weight(k, i, 3, 3, dtype), shift(k)]
    scales = {"s1": scale(mid), "s2": scale(out)}
    if projection or (projection is None and (stride != 1 or c != out)):
        args += [weight(out, c, 1, 1, dtype), shift(out)]
        scales["sd"] = scale(out)
    return Case("basic_block", args, {**scales, "stride": stride, **options})


def stem_case(n=2, c=3, h=23, w=19, k=8, r=7, dtype=torch.float32, layout="nhwc", **options):
    args = [image(n, c, h, w, dtype, layout), weight(k, c, r, r, dtype), scale(k), shift(k)]
    return Case("stem", args, options)


def conv_case(
    n=2, c=8, h=7, w=6, k=12, r=3, s=3, dtype=torch.float32, layout="nhwc", residual=None, groups=1, **options
):
    """`residual` names the layout of one, None is none."""
    args = [image(n, c, h, w, dtype, layout), weight(k, c // groups, r, s, dtype), scale(k), shift(k)]
    options["groups"] = groups
    if residual:
        geometry = {name: value for name, value in options.items() if name != "activation"}
        shape = functional.conv2d(args[0].float(), args[1].float(), None, **geometry).shape
        args.append(image(*shape, dtype, residual))
    return Case("conv_bn_act", args, options)


def integers(case: Case) -> Case:
    """The case with small integers, sparse weights and powers of two as scales: no sum of them needs rounding."""

    def whole(t, low, high):
        return torch.randint(low, high + 1, t.shape).to(t.dtype)

    def sparse(t):
        return whole(t, -1, 1) * (torch.rand(t.shape) < 4 / t[0].numel())

    case.args = [
        None if t is None else sparse(t) if i == 1 or (i % 2 and t.dim() == 4) else whole(t, -3, 3)
        for i, t in enumerate(case.args)
    ]
    powers = {
        name: 2.0 ** torch.randint(-1, 2, t.shape)
        for name, t in case.options.items()
        if name in ("s1", "s2", "s3", "sd")
    }
    case.options = {**case.options, **powers}
    if case.op in ("conv_bn_act", "stem"):
        case.args[2] = 2.0 ** torch.randint(-1, 2, case.args[2].shape)
    assert case.exact().abs().max() <= 256
    return case


# Hypothesis strategies. Sizes stay small: odd ones, single pixels and channels, and a few past a register tile.
layouts = st.sampled_from(("nchw", "nhwc", "view", "nhwc view", "expanded"))
dtypes = st.sampled_from(DTYPES)
batches = st.sampled_from((1, 2, 3, 0))
channels = st.one_of(st.integers(1, 9), st.sampled_from((15, 16, 17, 31, 32, 33, 48, 64, 70)))
sizes = st.one_of(st.integers(1, 9), st.sampled_from((14, 15, 28, 31)))


@st.composite
def conv_cases(draw):
    groups = draw(st.sampled_from((1, 1, 1, 2, 3)))
    c, k = (draw(channels) * groups for _ in range(2))
    r, s, h, w = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(sizes), draw(sizes)
    stride, dilation = ((draw(st.integers(1, 3)), draw(st.integers(1, 3))) for _ in range(2))
    if draw(st.booleans()):  # what Winograd takes
        r = s = 3
        stride = dilation = (1, 1)
        c, k, groups = c // groups, k // groups, 1
    fit = [max(0, -(-(d * (q - 1) + 1 - size) // 2)) for d, q, size in zip(dilation, (r, s), (h, w), strict=True)]
    padding = tuple(least + draw(st.integers(0, 2)) for least in fit)
    torch.manual_seed(draw(st.integers(0, 99)))
    case = conv_case(
        draw(batches), c, h, w, k, r, s, draw(dtypes), draw(layouts),
        draw(st.sampled_from((None, "nchw", "nhwc", "view"))), groups,
        stride=stride, padding=padding, dilation=dilation, activation=draw(st.sampled_from(("relu", "none"))),
    )  # fmt: skip
    if draw(st.booleans()):  # as model.to(memory_format=torch.channels_last) leaves it
        case.args[1] = case.args[1].contiguous(memory_format=CL)
    return case


@st.composite
def bottleneck_cases(draw, groups=(1,)):
    g = draw(st.sampled_from(groups))
    c, mid = draw(channels), draw(channels) * g
    stride = draw(st.sampled_from((1, 1, 2, 3)))
    out = draw(st.one_of(st.just(c), channels))
    torch.manual_seed(draw(st.integers(0, 99)))
    return bottleneck_case(
        draw(batches), c, draw(sizes), draw(sizes), mid, out, draw(dtypes), draw(layouts),
        True if stride != 1 or c != out else draw(st.booleans()), g,
        stride=stride, dilation=draw(st.integers(1, 2)), stride_in_1x1=draw(st.booleans()),
    )  # fmt: skip


@st.composite
def basic_block_cases(draw):
    c, mid = draw(channels), draw(channels)
    stride = draw(st.sampled_from((1, 1, 2, 3)))
    out = draw(st.one_of(st.just(c), channels))
    torch.manual_seed(draw(st.integers(0, 99)))
    return basic_block_case(
        draw(batches), c, draw(sizes), draw(sizes), mid, out, draw(dtypes), draw(layouts),
        True if stride != 1 or c != out else draw(st.booleans()),
        stride=stride, dilation=draw(st.integers(1, 2)),
    )  # fmt: skip


@st.composite
def stem_cases(draw):
    r, pool = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    torch.manual_seed(draw(st.integers(0, 99)))
    return stem_case(
        draw(batches), draw(channels), draw(st.integers(12, 33)), draw(st.integers(12, 33)), draw(channels), r,
        draw(dtypes), draw(layouts), stride=draw(st.integers(1, 3)), padding=draw(st.integers(0, r // 2)),
        pool_kernel=pool, pool_stride=draw(st.integers(1, 3)), pool_padding=draw(st.integers(0, pool // 2)),
    )  # fmt: skip


cases = st.one_of(conv_cases(), bottleneck_cases(groups=(1, 1, 2, 4)), basic_block_cases(), stem_cases())
EXAMPLES = {
    "conv_bn_act": lambda **options: conv_case(**{"residual": "nchw", "stride": 2, "padding": 1, **options}),
    "bottleneck": lambda **options: bottleneck_case(**{"stride": 2, **options}),
    "basic_block": basic_block_case,
    "stem": stem_case,
}
