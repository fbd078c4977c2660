"""The native kernels that read through a prologue, and those that read and write slices of channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import support
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import CL, DTYPES, channels, dtypes, layer, sizes
from torch import Tensor
from torch.nn import functional

from resnet_fused.kernels import cpu
from resnet_fused.kernels.layers import DenseLayer

batches = st.sampled_from((1, 2, 5))
layouts = st.sampled_from(("nchw", "nhwc", "view", "nhwc view"))


# Formulas: every operation by torch, one after another, at the dtype of x.
def prologue(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if scale is None or shift is None:
        return x
    mean = torch.zeros_like(scale)
    return functional.batch_norm(x, mean, mean + 1, scale, shift, eps=0).relu()


def conv_bn_act(x, weight, scale, shift, residual, in_scale, in_shift, **options):
    return layer(prologue(x, in_scale, in_shift), weight, scale, shift, residual, **options)


def preact_block(x, in_scale, in_shift, weights, scales, shifts, wd, *, stride, dilation):
    z = h = prologue(x, in_scale, in_shift)
    strides = (stride, 1) if len(weights) == 2 else (1, stride, 1)
    for i, (w, s, b) in enumerate(zip(weights, scales, shifts, strict=True)):
        d = dilation if w.shape[2] == 3 else 1
        padding = d if w.shape[2] == 3 else 0
        last = i == len(weights) - 1
        activation = "none" if last else "relu"
        s = torch.ones_like(b) if s is None else s
        h = layer(h, w, s, b, stride=strides[i], padding=padding, dilation=d, activation=activation)
    return h + (x if wd is None else layer(z, wd, *plain(h), stride=stride, activation="none"))


def plain(y: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift of a convolution without a norm."""
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    return torch.ones(y.shape[1], dtype=dtype), torch.zeros(y.shape[1], dtype=dtype)


def dense_block(x, layers):
    for in_scale, in_shift, w1, s1, b1, w2 in layers:
        h = prologue(x, in_scale, in_shift)
        if w1 is not None:
            h = layer(h, w1, s1, b1)
        x = torch.cat([x, functional.conv2d(h, w2, padding=1)], 1)
    return x


def transition(x, in_scale, in_shift, weight):
    return functional.avg_pool2d(functional.conv2d(prologue(x, in_scale, in_shift), weight), 2)


def mapped(f: Callable[[Tensor], Tensor], arguments: Any) -> Any:
    """The arguments with `f` applied to every tensor."""
    if isinstance(arguments, Tensor):
        return f(arguments)
    if isinstance(arguments, list | tuple):
        return [mapped(f, a) for a in arguments]
    return arguments


def check(y: Tensor, formula: Callable[..., Tensor], *arguments: Any, **options: Any) -> None:
    """The parity rule."""
    unfused = formula(*arguments, **options)
    exact = formula(*mapped(Tensor.double, arguments), **options)
    magnitude = formula(*mapped(lambda t: t.double().abs(), arguments), **options).max().item()
    assert y.dtype == unfused.dtype
    assert y.shape == exact.shape
    error, allowed = ((t.double() - exact).abs().max().item() for t in (y, unfused))
    tiny = torch.finfo(y.dtype).eps / 2 * exact.abs().max().item() + 2**-24 * magnitude
    assert error <= 2 * allowed + tiny, f"error {error:.3g}, unfused torch {allowed:.3g}, tiny {tiny:.3g}"


def vectors(c: int) -> tuple[Tensor, Tensor]:
    return support.scale(c), support.shift(c)


def slice_of(n: int, c: int, h: int, w: int, dtype: torch.dtype, before: int, behind: int) -> tuple[Tensor, Tensor]:
    """A buffer full of NaN, and a slice of its channels."""
    buffer = torch.full((n, h, w, before + c + behind), float("nan"), dtype=dtype).permute(0, 3, 1, 2)
    return buffer, buffer[:, before : before + c]


@settings(max_examples=15)
@given(data=st.data(), dtype=dtypes, layout=layouts)
def test_conv_bn_act(isa, data, dtype, layout):
    groups = data.draw(st.sampled_from((1, 1, 2)))
    n, h, w = data.draw(batches), data.draw(sizes), data.draw(sizes)
    c, k = data.draw(channels) * groups, data.draw(channels) * groups
    r, stride, dilation = data.draw(st.sampled_from((1, 1, 2, 3, 5))), data.draw(st.integers(1, 2)), 1
    padding = max(r // 2, -(-(r - min(h, w)) // 2))
    x, weight = support.image(n, c, h, w, dtype, layout), support.weight(k, c // groups, r, r, dtype)
    given_prologue = vectors(c) if data.draw(st.integers(0, 3)) else (None, None)
    geometry = {"stride": (stride, stride), "padding": (padding, padding), "dilation": (dilation, dilation)}
    options = {**geometry, "groups": groups, "activation": data.draw(st.sampled_from(("relu", "none")))}
    shape = functional.conv2d(x, weight, None, stride, padding, dilation, groups).shape
    before, behind = data.draw(st.sampled_from(((0, 0), (0, 5), (3, 0), (32, 16))))
    _, residual = slice_of(*shape, dtype, behind, before)
    residual.copy_(torch.randn(shape))
    arguments = (x, weight, *vectors(k), residual if data.draw(st.booleans()) else None, *given_prologue)
    winograd = r == 3 and stride == groups == 1
    for algorithm in ("direct", "winograd2") if winograd else ("direct",):
        y = cpu.conv_bn_act(*arguments, **options, algorithm=algorithm)
        check(y, conv_bn_act, *arguments, **options)
        buffer, out = slice_of(*shape, dtype, before, behind)
        assert cpu.conv_bn_act(*arguments, **options, algorithm=algorithm, out=out) is out
        assert torch.equal(out, y)
        assert buffer[:, :before].isnan().all() and buffer[:, before + k :].isnan().all()


@settings(max_examples=10)
@given(data=st.data(), dtype=dtypes, layout=layouts, bottleneck=st.booleans())
def test_preact_block(isa, data, dtype, layout, bottleneck):
    n, h, w, c, mid = (data.draw(s) for s in (batches, sizes, sizes, channels, channels))
    stride, dilation = data.draw(st.sampled_from((1, 1, 2))), data.draw(st.sampled_from((1, 1, 2)))
    out = data.draw(st.one_of(st.just(c), channels))
    x = support.image(n, c, h, w, dtype, layout)
    taps = ((mid, c, 1), (mid, mid, 3), (out, mid, 1)) if bottleneck else ((mid, c, 3), (out, mid, 3))
    weights = [support.weight(k, i, r, r, dtype) for k, i, r in taps]
    scales: list[Tensor | None] = [support.scale(weight.shape[0]) for weight in weights]
    shifts = [support.shift(weight.shape[0]) for weight in weights]
    scales[-1], shifts[-1] = None, torch.zeros(out)
    projected = stride > 1 or c != out or data.draw(st.booleans())
    wd = support.weight(out, c, 1, 1, dtype) if projected else None
    before = vectors(c) if data.draw(st.integers(0, 3)) else (None, None)
    arguments = (x, *before, weights, scales, shifts, wd)
    for algorithm in ("direct", "winograd2") if dilation == 1 else ("direct",):
        y = cpu.preact_block(*arguments, stride=stride, dilation=dilation, algorithm=algorithm)
        check(y, preact_block, *arguments, stride=stride, dilation=dilation)


def dense_layers(c: int, growth: int, mid: int, depth: int, dtype: torch.dtype) -> list[DenseLayer]:
    layers = []
    for read in range(c, c + depth * growth, growth):
        w1 = support.weight(mid, read, 1, 1, dtype) if mid else None
        s1, b1 = vectors(mid) if mid else (None, None)
        layers.append(DenseLayer(*vectors(read), w1, s1, b1, support.weight(growth, mid or read, 3, 3, dtype)))
    return layers


@settings(max_examples=10)
@given(
    n=batches, c=channels, h=sizes, w=sizes, growth=st.sampled_from((4, 12, 32, 40)), mid=st.sampled_from((0, 16, 48)),
    depth=st.integers(1, 4), dtype=dtypes, layout=layouts,
)  # fmt: skip
def test_dense_block(isa, n, c, h, w, growth, mid, depth, dtype, layout):
    x, layers = support.image(n, c, h, w, dtype, layout), dense_layers(c, growth, mid, depth, dtype)
    for algorithm in ("direct", "winograd2"):
        y = cpu.dense_block(x, layers, algorithm=algorithm)
        assert torch.equal(y[:, :c], x)
        check(y, dense_block, x, layers)


@settings(max_examples=10)
@given(n=batches, c=channels, h=st.integers(2, 17), w=st.integers(2, 17), k=channels, dtype=dtypes, layout=layouts)
def test_transition(isa, n, c, h, w, k, dtype, layout):
    arguments = (support.image(n, c, h, w, dtype, layout), *vectors(c), support.weight(k, c, 1, 1, dtype))
    check(cpu.transition(*arguments), transition, *arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "h", "w"), ((1, 56, 56), (4, 14, 14), (1, 14, 14), (5, 7, 7)))
def test_dense_block_of_densenet121(isa, n, h, w, dtype):
    """Bands, images by turns, shared rows, several images at a time: with growth 32 and a 1x1 to 128."""
    x, layers = support.image(n, 64, h, w, dtype, "nhwc"), dense_layers(64, 32, 128, 2, dtype)
    for algorithm in ("direct", "winograd2"):
        check(cpu.dense_block(x, layers, algorithm=algorithm), dense_block, x, layers)


def whole(arguments: Any) -> Any:
    """Small integers, sparse weights, and powers of two as scales in place of the arguments."""

    def draw(t: Tensor) -> Tensor:
        if t.dim() == 1:
            return 2.0 ** torch.randint(-1, 1, t.shape) if (t > 0).all() else torch.randint(-3, 4, t.shape).float()
        values = torch.randint(-2, 3, t.shape).to(t.dtype)
        return values * (torch.rand(t.shape) < 3 / t[0].numel()) if t.shape[2] in (1, 3) else values

    return mapped(draw, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_come_out_exactly(isa, dtype):
    x = support.image(2, 24, 8, 10, dtype, "nhwc view")
    convolution = (x, support.weight(16, 24, 3, 3, dtype), *vectors(16), None, *vectors(24))
    weights = [support.weight(*shape, dtype) for shape in ((16, 24, 3, 3), (24, 16, 3, 3))]
    block = (x, *vectors(24), weights, *map(list, zip(vectors(16), vectors(24), strict=True)), None)
    options = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, "activation": "none"}
    cases: list[tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]] = [
        (cpu.conv_bn_act, conv_bn_act, convolution, options),
        (cpu.preact_block, preact_block, block, {"stride": 1, "dilation": 1}),
    ]
    for kernel, formula, arguments, options in cases:
        arguments = whole(arguments)
        exact = formula(*mapped(Tensor.double, arguments), **options).to(dtype)
        for algorithm in ("direct", "winograd2"):
            assert torch.equal(kernel(*arguments, **options, algorithm=algorithm), exact)
    arguments = whole((x, *vectors(24), support.weight(16, 24, 1, 1, dtype)))
    assert torch.equal(cpu.transition(*arguments), transition(*mapped(Tensor.double, arguments)).to(dtype))
    x, layers = whole((x, dense_layers(24, 8, 32, 1, dtype)))
    exact = dense_block(*mapped(Tensor.double, (x, layers))).to(dtype)
    for algorithm in ("direct", "winograd2"):
        assert torch.equal(cpu.dense_block(x, [DenseLayer(*layers[0])], algorithm=algorithm), exact)


def test_padding_is_zero_behind_the_prologue(isa):
    """A shift of one would otherwise come in from every side."""
    x, weight, zeros, ones = torch.zeros(1, 4, 5, 5), torch.ones(8, 4, 3, 3), torch.zeros(4), torch.ones(4)
    options = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, "activation": "none"}
    for algorithm in ("direct", "winograd2"):
        y = cpu.conv_bn_act(x, weight, None, torch.zeros(8), None, zeros, ones, **options, algorithm=algorithm)
        assert torch.equal(y[0, 0], functional.conv2d(torch.ones(1, 4, 5, 5), weight[:1], padding=1)[0, 0])


def test_nan_passes_the_prologue(isa):
    x = torch.zeros(2, 8, 6, 6).to(memory_format=CL)
    x[1, 3, 2, 2] = float("nan")
    y = cpu.transition(x, *vectors(8), support.weight(5, 8, 1, 1, torch.float32))
    assert y.isnan().nonzero()[:, [0, 2, 3]].unique(dim=0).tolist() == [[1, 1, 1]]
    y = cpu.dense_block(x, dense_layers(8, 4, 16, 1, torch.float32))
    assert torch.equal(y[1, 8].isnan().nonzero(), torch.cartesian_prod(torch.arange(1, 4), torch.arange(1, 4)))
    assert not y[0].isnan().any()


def test_same_bits_on_every_run(isa):
    threads = torch.get_num_threads()
    try:
        for n, h in ((1, 14), (3, 20), (4, 7)):
            x, layers = support.image(n, 32, h, h, torch.float32, "nhwc"), dense_layers(32, 16, 64, 3, torch.float32)
            ys = []
            for count in (1, 2, 3, 2):
                torch.set_num_threads(count)
                ys.append(cpu.dense_block(x, layers))
            assert all(torch.equal(y, ys[0]) for y in ys)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("out", "message"),
    (
        (torch.empty(1, 8, 5, 5), "channels_last"),
        (torch.empty(1, 7, 5, 5).to(memory_format=CL), r"expected \[1, 8, 5, 5\] of x's dtype, got \[1, 7, 5, 5\]"),
        (torch.empty(1, 8, 5, 5, dtype=torch.bfloat16).to(memory_format=CL), "x's dtype"),
    ),
)
def test_out_that_does_not_fit(out, message):
    x, weight = support.image(1, 4, 5, 5, torch.float32, "nhwc"), support.weight(8, 4, 3, 3, torch.float32)
    options = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, "activation": "none"}
    with pytest.raises(RuntimeError, match=message):
        cpu.conv_bn_act(x, weight, *vectors(8), None, **options, algorithm="direct", out=out)


def test_vectors_that_do_not_fit():
    x = support.image(1, 4, 6, 6, torch.float32, "nhwc")
    with pytest.raises(RuntimeError, match="in_scale: expected 4 channels, got 5"):
        cpu.transition(x, *vectors(5), support.weight(8, 4, 1, 1, torch.float32))
    layers = dense_layers(4, 8, 16, 2, torch.float32)
    with pytest.raises(RuntimeError, match="in_scale: expected 12 channels, got 4"):
        cpu.dense_block(x, [layers[0], layers[1]._replace(in_scale=layers[0].in_scale)])
