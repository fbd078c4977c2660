"""The native kernels themselves, not what the plan makes of them: every instruction set and every algorithm."""

import pytest
import torch
from hypothesis import given
from support import (
    DTYPES,
    EXAMPLES,
    Case,
    assert_close_to_largest,
    assert_parity,
    basic_block_cases,
    bottleneck_cases,
    conv_cases,
    integers,
    stem_cases,
)

from resnet_fused.kernels import cpu, native


def run(case: Case, algorithm: str) -> torch.Tensor:
    """The kernel of a case."""
    options = dict(case.options)
    if case.op == "conv_bn_act":
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)):
            value = options.get(name, default)
            options[name] = (value, value) if isinstance(value, int) else value
        args = [*case.args, None][:5]
        return cpu.conv_bn_act(*args, algorithm=algorithm, **{"activation": "relu", "groups": 1, **options})
    if case.op == "stem":
        geometry = {"stride": 2, "padding": 3, "pool_kernel": 3, "pool_stride": 2, "pool_padding": 1}
        return cpu.stem(*case.args, **{**geometry, **options}, algorithm=algorithm)
    scales = [
        options.pop(name, None)
        for name in (("s1", "s2", "s3", "sd") if case.op == "bottleneck" else ("s1", "s2", "sd"))
    ]
    args = [*case.args, None, None][: 9 if case.op == "bottleneck" else 7]
    options.setdefault("dilation", 1)
    if case.op == "basic_block":
        return cpu.basic_block(*args, *scales, algorithm=algorithm, **options)
    del options["groups"]
    strides = (options.pop("stride"), 1)
    if not options.pop("stride_in_1x1", False):
        strides = strides[::-1]
    return cpu.bottleneck(*args, *scales, stride1=strides[0], stride2=strides[1], algorithm=algorithm, **options)


def algorithms(case: Case) -> tuple[str, ...]:
    """What the kernel of a case can be asked for."""
    if case.op == "stem":
        return ("direct",)
    if case.op == "conv_bn_act":
        window = tuple(case.args[1].shape[2:])
        fits = window == (3, 3) and all(
            case.options.get(name, 1) in (1, (1, 1)) for name in ("stride", "dilation", "groups")
        )
    else:
        stride_of_3x3 = 1 if case.op == "basic_block" or case.options.get("stride_in_1x1") else case.options["stride"]
        fits = stride_of_3x3 == case.options.get("dilation", 1) == 1
    return cpu.ALGORITHMS if fits else ("direct",)


def check(case: Case) -> None:
    for algorithm in algorithms(case):
        y = run(case, algorithm)
        if algorithm == "winograd4" and y.dtype == torch.float32:
            assert_close_to_largest(y, case, 1e-5)
        else:
            assert_parity(y, case)


@given(case=conv_cases())
def test_conv_bn_act(isa, case):
    check(case)


@given(case=bottleneck_cases())
def test_bottleneck(isa, case):
    check(case)


@given(case=basic_block_cases())
def test_basic_block(isa, case):
    check(case)


@given(case=stem_cases())
def test_stem(isa, case):
    check(case)


# Where a tile, a band of rows or a panel of ResNet-50 ends: larger than what is drawn above.
LARGE = {
    "stage 1": EXAMPLES["bottleneck"](n=1, c=256, h=56, w=56, mid=64, out=256, stride=1),
    "stage 2, first": EXAMPLES["bottleneck"](n=1, c=256, h=56, w=56, mid=128, out=512),
    "stage 4, narrower": EXAMPLES["bottleneck"](n=2, c=512, h=7, w=7, mid=128, out=512, stride=1),
    "basic, stage 1": EXAMPLES["basic_block"](n=1, c=64, h=56, w=56, mid=64, out=64),
    "basic, 16 channels": EXAMPLES["basic_block"](n=2, c=16, h=32, w=32, mid=16, out=16, stride=1),
    "basic, from 16 channels": EXAMPLES["basic_block"](n=1, c=16, h=32, w=32, mid=32, out=32, stride=2),
    "16 channels between": EXAMPLES["bottleneck"](n=1, c=64, h=32, w=32, mid=16, out=64, stride=1),
    "stem": EXAMPLES["stem"](n=1, h=112, w=97, k=64),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE)
def test_large(isa, case, dtype):
    native.bindings.poison_workspaces()
    check(case.to(dtype))


@pytest.mark.parametrize("algorithm", ("direct", "winograd2"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", EXAMPLES)
def test_integers_come_out_exactly(isa, op, dtype, algorithm):
    """F(2x2, 3x3) multiplies by halves and quarters only; F(4x4, 3x3) by fifteenths, so it is not here."""
    case = integers(EXAMPLES[op](dtype=dtype, **({"stride": 1} if op != "stem" else {})))
    if algorithm in algorithms(case):
        assert torch.equal(run(case, algorithm), case.exact().to(dtype))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("wide", [False, True])
def test_long_sums_err_less_than_one_chain(isa, kernel, wide):
    """A float32 sum is several chains: rounding grows with a chain's length."""
    products, size = 1152, 7  # 128 channels in a 3x3
    x = torch.randn(1, products // kernel**2, size, size).relu()
    weight = torch.randn(64 if wide else 16, x.shape[1], kernel, kernel) / 50
    columns = torch.nn.functional.unfold(x, kernel, padding=kernel // 2)[0]
    chain = torch.zeros(len(weight), size * size)
    for a, b in zip(weight.flatten(1).T, columns, strict=True):
        chain = (chain.double() + a.double()[:, None] * b.double()).float()
    exact = weight.double().flatten(1) @ columns.double()
    y = cpu.conv_bn_act(
        x.contiguous(memory_format=torch.channels_last), weight, None, torch.zeros(len(weight)), None, stride=(1, 1),
        padding=(kernel // 2,) * 2, dilation=(1, 1), groups=1, activation="none", algorithm="direct",
    )  # fmt: skip

    def error(z):
        return (z.flatten(-2).squeeze(0) - exact).square().mean().sqrt()

    assert error(y) < 0.6 * error(chain.view(1, len(weight), size, size))


@pytest.mark.parametrize("op", EXAMPLES)
def test_nan_spreads_no_further_than_its_window(isa, op):
    case = EXAMPLES[op](h=23, w=23)
    case.args[0][0, 0, 0, 0] = float("nan")
    expected = case.formula().isnan()
    for algorithm in algorithms(case):
        found = run(case, algorithm).isnan()
        assert found[expected].all()  # Winograd's tile may hold a few pixels more
        if algorithm == "direct":
            assert torch.equal(found, expected)
        assert not found[1].any()


@pytest.mark.parametrize("op", EXAMPLES)
def test_same_bits_on_every_run(isa, op):
    """With as many threads; a direct convolution's do not depend on that either, Winograd's tiles follow the split."""
    case = EXAMPLES[op](n=3, h=29, w=31)
    threads = torch.get_num_threads()
    try:
        for algorithm in algorithms(case):
            ys = []
            for count in (1, 2, 3, 2, 1):
                torch.set_num_threads(count)
                ys.append(run(case, algorithm))
            assert torch.equal(ys[0], ys[4])
            assert torch.equal(ys[1], ys[3])
            if algorithm == "direct":
                assert all(torch.equal(y, ys[0]) for y in ys)
    finally:
        torch.set_num_threads(threads)
