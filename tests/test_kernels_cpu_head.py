"""The native kernel of a classifier's end: pooling and linear layer."""

from __future__ import annotations

import pytest
import support
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import CL, DTYPES, dtypes
from torch import Tensor
from torch.nn import functional

import resnet_fused as rf
from resnet_fused import plan
from resnet_fused.errors import BackendError
from resnet_fused.kernels import cpu, native

pytestmark = pytest.mark.skipif(not native.available(), reason="there are no native kernels")

layouts = st.sampled_from(("nchw", "nhwc", "view", "nhwc view", "expanded"))
batches = st.sampled_from((1, 2, 3, 4, 5, 16))
channels = st.one_of(st.integers(1, 9), st.sampled_from((15, 16, 17, 33, 64, 127, 130, 513, 2048)))
outputs = st.one_of(st.integers(1, 9), st.sampled_from((10, 63, 100)))
sizes = st.sampled_from(((1, 1), (7, 7), (8, 8), (1, 5), (3, 2), (56, 56), (17, 4)))


def head(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As an unfused model computes it."""
    return functional.linear(functional.adaptive_avg_pool2d(x, 1).flatten(1), weight, bias)


def tensors(n, c, h, w, k, dtype, layout="nhwc") -> tuple[Tensor, Tensor, Tensor]:
    return support.image(n, c, h, w, dtype, layout), (torch.randn(k, c) / c**0.5).to(dtype), torch.randn(k).to(dtype)


def check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The parity rule."""
    y, unfused = cpu.head(x, weight, bias), head(x, weight, bias)
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    exact, magnitude = head(*wide), head(*(None if t is None else t.abs() for t in wide)).max().item()
    assert (y.dtype, y.shape) == (x.dtype, exact.shape)
    error, allowed = ((t.double() - exact).abs().max().item() for t in (y, unfused))
    tiny = torch.finfo(y.dtype).eps / 2 * exact.abs().max().item() + 2**-24 * magnitude
    assert error <= 2 * allowed + tiny, f"error {error:.3g}, unfused torch {allowed:.3g}, tiny {tiny:.3g}"


@settings(max_examples=40)
@given(n=batches, c=channels, size=sizes, k=outputs, dtype=dtypes, layout=layouts, bias=st.booleans())
@example(n=1, c=2048, size=(7, 7), k=1000, dtype=torch.float32, layout="nhwc", bias=True)
@example(n=3, c=512, size=(7, 7), k=1001, dtype=torch.bfloat16, layout="nhwc", bias=True)
def test_parity(isa, n, c, size, k, dtype, layout, bias):
    x, weight, shift = tensors(n, c, *size, k, dtype, layout)
    check(x, weight, shift if bias else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c", [1, 3, 17, 64, 777, 2048])
def test_integers_are_exact(isa, dtype, c):
    """16 pixels, few weights that are not zero: no sum needs rounding, but for the output."""
    for n, k in ((1, 9), (3, 4), (6, 13)):
        x = torch.randint(-3, 4, (n, c, 2, 8)).to(dtype).to(memory_format=CL)
        weight = (torch.randint(-1, 2, (k, c)) * (torch.rand(k, c) < 8 / c)).to(dtype)
        bias = torch.randint(-4, 5, (k,)).float()
        exact = head(x.double(), weight.double(), bias.double())
        assert torch.equal(cpu.head(x, weight, bias), exact.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pixel_channel_and_weight_counts_once(isa, dtype):
    """One weight and one pixel are not zero: wherever they are, in a tile, a tail or at the end of a chain."""
    for n, c, h, w, k in ((5, 150, 5, 5, 6), (1, 19, 3, 7, 5)):
        for _ in range(40):
            i, j, y, z, o = (int(torch.randint(size, ())) for size in (n, c, h, w, k))
            x, weight = torch.zeros(n, c, h, w), torch.zeros(k, c)
            x[i, j, y, z], weight[o, j] = h * w, 3
            out = cpu.head(x.to(dtype).to(memory_format=CL), weight.to(dtype), None)
            assert out.nonzero().tolist() == [[i, o]] and out[i, o] == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64, 8, 8, 10), (1, 512, 7, 7, 1000), (5, 300, 9, 9, 33), (16, 2048, 7, 7, 100)])
def test_the_same_bits_in_any_number_of_threads_and_for_each_image_alone(isa, shape, dtype):
    x, weight, bias = tensors(*shape, dtype)
    threads = torch.get_num_threads()
    try:
        ys = []
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            ys.append(cpu.head(x, weight, bias))
    finally:
        torch.set_num_threads(threads)
    ys.append(torch.cat([cpu.head(image[None], weight, bias) for image in x]))
    assert all(torch.equal(y, ys[0]) for y in ys)


def test_what_lies_in_the_workspace_does_not_count(isa):
    x, weight, bias = tensors(3, 21, 4, 4, 5, torch.float32)
    expected = cpu.head(x, weight, bias)
    native.bindings.poison_workspaces()
    assert torch.equal(cpu.head(x, weight, bias), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity(isa, value, dtype):
    for c in (17, 64):
        x, weight, bias = tensors(3, c, 5, 5, 6, dtype)
        weight[4] = 0
        x[1, c - 1, 4, 4] = value
        for _ in range(2):
            expected = head(x, weight, bias)
            torch.testing.assert_close(cpu.head(x, weight, bias), expected, rtol=3e-2, atol=3e-2, equal_nan=True)
            weight[2, 0] = value


def test_batch_0(isa):
    assert cpu.head(torch.empty(0, 8, 3, 3), torch.ones(4, 8), None).shape == (0, 4)


def test_the_op_takes_it():
    x, weight, bias = tensors(2, 300, 7, 7, 10, torch.float32, "nchw")
    with plan.record() as choices:
        y = rf.ops.head(x, weight, bias)
    (choice,) = choices
    assert (choice.backend, choice.composed) == ("cpu", False)
    assert torch.equal(y, cpu.head(x, weight, bias))
    assert torch.equal(y, rf.ops.head(x, weight.T.contiguous().T, bias, backend="cpu"))
    with pytest.raises(BackendError, match=r"it takes torch.float32 or torch.bfloat16, x.dtype is torch.float64"):
        rf.ops.head(x.double(), weight.double(), bias.double(), backend="cpu")


def test_the_plan_knows_what_it_costs():
    x, weight, bias = tensors(2, 64, 7, 7, 10, torch.float32)
    with plan.record() as choices:
        rf.ops.head(x, weight, bias)
    assert [name for name, _ in choices[0].seconds] == ["cpu direct", "vendor onednn"]


X = torch.zeros(1, 8, 3, 3).to(memory_format=CL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, torch.zeros(4, 7), None), "weight: expected a contiguous CPU tensor of x's dtype and 8 columns"),
        ((X, torch.zeros(8, 4).T, None), "weight: expected a contiguous CPU tensor"),
        ((X, torch.zeros(4, 8, dtype=torch.bfloat16), None), "weight: expected a contiguous CPU tensor of x's dtype"),
        ((X, torch.zeros(4, 8), torch.zeros(3)), "bias: expected 4 channels, got 3"),
        ((X, torch.zeros(4, 8), torch.zeros(4).double()), "bias: expected a contiguous float32 CPU vector"),
        ((X[:, :, :0], torch.zeros(4, 8), None), "x: expected at least one pixel, got 0x3"),
        ((torch.zeros(2, 8, 3, 3), torch.zeros(4, 8), None), "x: expected channels_last memory format"),
    ],
)
def test_bad_arguments_of_the_private_op(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.resnet_fused._cpu_head.default(*arguments)
