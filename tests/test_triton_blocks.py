"""The Triton kernels of whole blocks, run by Triton's interpreter on CPU tensors, with and without descriptors."""

import contextlib
import dataclasses
import itertools
import os
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from support import (
    CL,
    FORMULAS,
    Case,
    assert_parity,
    basic_block_case,
    bottleneck_case,
    image,
    integers,
    layer,
    scale,
    shift,
    stem_case,
    weight,
)
from torch.nn import functional

triton = pytest.importorskip("triton")

from resnet_fused.errors import BackendError  # noqa: E402
from resnet_fused.kernels import triton as kernels  # noqa: E402
from resnet_fused.kernels.layers import DenseLayer  # noqa: E402
from resnet_fused.kernels.triton import (  # noqa: E402
    block_configs,
    configs,
    dense,
    interpreter,
    matrices,
    pooled_head,
    rotated,
    whole_basic_block,
    whole_bottleneck,
    whole_stem,
)
from resnet_fused.kernels.triton.block_configs import (  # noqa: E402
    BandConfig,
    RotatedConfig,
    StemConfig,
    TransitionConfig,
    why_not_whole,
)
from resnet_fused.kernels.triton.configs import SM80, SM90, SM100  # noqa: E402
from resnet_fused.shapes import (  # noqa: E402
    BasicBlock,
    Bottleneck,
    BottleneckChain,
    Conv,
    DenseBlock,
    Head,
    Stem,
    Transition,
)

pytestmark = pytest.mark.skipif(not interpreter.INTERPRETED, reason="Triton was imported without TRITON_INTERPRET=1")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ARCHITECTURES = (SM80, SM90, SM100)
CPU = torch.device("cpu")

BAND = BandConfig(block_m=64, block_n=32, block_c=32, block_k=32, tiles=1, programs=1, tma=True, warps=4, stages=3)
ROTATED = RotatedConfig(block_m=64, block_n=32, block_k=32, programs=1, tma=True, warps=4, stages=3)
STEM = StemConfig(block_m=32, block_n=32, block_k=64, segment=2, tma=True, warps=4, stages=3)
TRANSITION = TransitionConfig(block_m=16, block_n=32, block_c=16, programs=1, tma=True, warps=4, stages=2)


@contextlib.contextmanager
def tf32(allowed):
    """Torch's switch, as it stands for convolutions on the device of these tests."""
    conv = torch.backends.mkldnn.conv
    previous, conv.fp32_precision = conv.fp32_precision, "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        conv.fp32_precision = previous


@contextlib.contextmanager
def multiprocessors(count):
    """A GPU of so few that every program of a persistent grid computes several tiles."""
    small = dataclasses.replace(SM90, sms=count)
    with mock.patch.object(matrices, "architecture", lambda device: small):
        yield


def two_channels_more(t):
    """The image as a slice of one with 8 channels more before it and 8 behind it, which are NaN."""
    n, c, h, w = t.shape
    wide = torch.full((n, c + 16, h, w), float("nan"), dtype=t.dtype).contiguous(memory_format=CL)
    wide[:, 8:-8] = t
    return wide[:, 8:-8]


# --- how each block is called, and what it computes in plain torch ------------------------------------------------


def run_bottleneck(case, config):
    options = dict(case.options)
    stride, in_1x1 = options.pop("stride"), options.pop("stride_in_1x1", False)
    args = [*case.args, None, None][:9]
    scales = [options.get(name) for name in ("s1", "s2", "s3", "sd")]
    strides = {"stride1": stride if in_1x1 else 1, "stride2": 1 if in_1x1 else stride}
    return whole_bottleneck.bottleneck(*args, *scales, **strides, config=config)


def run_basic_block(case, config):
    args = [*case.args, None, None][:7]
    scales = [case.options.get(name) for name in ("s1", "s2", "sd")]
    return whole_basic_block.basic_block(*args, *scales, stride=case.options["stride"], config=config)


def run_stem(case, config):
    defaults = {"stride": 2, "padding": 3, "pool_kernel": 3, "pool_stride": 2, "pool_padding": 1}
    return whole_stem.stem(*case.args, **{**defaults, **case.options}, config=config)


def run_rotated(case, config):
    x, h1, w2, b2, w3, b3, *after = case.args
    return torch.cat(
        [y for y in rotated.rotated(h1, w2, case.options["s2"], b2, w3, case.options["s3"], b3, x, *_next(case, after),
                                    config=config) if y is not None], 1
    )  # fmt: skip


def _next(case, after):
    return (after[0], case.options["s1"], after[1]) if after else ()


def rotated_formula(x, h1, w2, b2, w3, b3, w1=None, b1=None, *, s2, s3, s1=None):
    y = layer(layer(h1, w2, s2, b2, padding=1), w3, s3, b3, x)
    return y if w1 is None else torch.cat([y, layer(y, w1, s1, b1)], 1)


def rotated_case(n=2, mid=24, h=7, w=9, out=40, after=0, dtype=torch.float32):
    args = [image(n, out, h, w, dtype, "nhwc"), image(n, mid, h, w, dtype, "nhwc").relu()]
    args += [weight(mid, mid, 3, 3, dtype), shift(mid), weight(out, mid, 1, 1, dtype), shift(out)]
    scales = {"s2": scale(mid), "s3": scale(out)}
    if after:
        args += [weight(after, out, 1, 1, dtype), shift(after)]
        scales["s1"] = scale(after)
    case = Case("rotated", args, scales)
    return case


def activated(x, in_scale, in_shift):
    """BatchNorm and ReLU, each rounded to x's dtype."""
    mean, var = torch.zeros_like(in_shift), torch.ones_like(in_shift)
    return functional.batch_norm(x, mean, var, in_scale, in_shift, eps=0).relu()


def dense_formula(x, *tensors):
    for in_scale, in_shift, w1, s1, b1, w2 in zip(*[iter(tensors)] * 6, strict=True):
        h = layer(activated(x, in_scale, in_shift), w1, s1, b1)
        x = torch.cat([x, functional.conv2d(h, w2, padding=1)], 1)
    return x


def dense_case(n=2, c=24, h=7, w=9, growth=16, mid=40, depth=2, dtype=torch.float32):
    args = [image(n, c, h, w, dtype, "nhwc")]
    for i in range(depth):
        channels = c + i * growth
        args += [scale(channels), shift(channels), weight(mid, channels, 1, 1, dtype), scale(mid), shift(mid)]
        args.append(weight(growth, mid, 3, 3, dtype))
    return Case("dense_block", args)


def run_dense(case, config):
    x, *tensors = case.args
    layers = [DenseLayer(*each) for each in zip(*[iter(tensors)] * 6, strict=True)]
    return dense.dense_block(x, layers, config=config)


def transition_formula(x, in_scale, in_shift, w):
    return functional.avg_pool2d(functional.conv2d(activated(x, in_scale, in_shift), w), 2)


def transition_case(n=2, c=24, h=9, w=7, k=40, dtype=torch.float32):
    return Case("transition", [image(n, c, h, w, dtype, "nhwc"), scale(c), shift(c), weight(k, c, 1, 1, dtype)])


def run_transition(case, config):
    return dense.transition(*case.args, config=config)


FORMULAS.update({"rotated": rotated_formula, "dense_block": dense_formula, "transition": transition_formula})
RUN = {
    "bottleneck": run_bottleneck,
    "basic_block": run_basic_block,
    "stem": run_stem,
    "rotated": run_rotated,
    "dense_block": run_dense,
    "transition": run_transition,
}


def run(case, config):
    return RUN[case.op](case, config)


def exact(case):
    """The case with integers and powers of two, whose sums need no rounding."""

    def whole(t):
        """Sparse weights, small images and shifts, in their places by shape alone."""
        if t.dim() == 4 and t.stride(1) == 1 and t.shape[2] > 3:
            return torch.randint(-2, 3, t.shape).to(t.dtype).contiguous(memory_format=CL)
        if t.dim() == 4:
            return (torch.randint(-1, 2, t.shape) * (torch.rand(t.shape) < 4 / t[0].numel())).to(t.dtype)
        return torch.randint(-2, 3, t.shape).to(t.dtype)

    if case.op in ("bottleneck", "basic_block", "stem"):
        return integers(case)
    case.args = [whole(t) for t in case.args]
    if case.op == "rotated":
        case.args[1] = case.args[1].relu()
    case.options = {name: 2.0 ** torch.randint(-1, 2, t.shape) for name, t in case.options.items()}
    scales = {"dense_block": range(1, len(case.args), 3), "transition": (1,)}.get(case.op, ())
    for i in scales:
        if case.args[i].dim() == 1:
            case.args[i] = 2.0 ** torch.randint(0, 2, case.args[i].shape)
    assert case.exact().abs().max() <= 256
    return case


BLOCKS = {  # ragged channels, several tiles, tiles across images, none of them full
    "bottleneck": (bottleneck_case, BAND, dict(n=3, c=40, h=7, w=5, mid=24, out=40)),
    "bottleneck, projection": (bottleneck_case, BAND, dict(n=2, c=24, h=5, w=7, mid=16, out=40)),
    "bottleneck, stride 2": (bottleneck_case, BAND, dict(n=2, c=24, h=9, w=8, mid=24, out=40, stride=2)),
    "bottleneck, stride 2 in the 1x1": (
        bottleneck_case, BAND, dict(n=2, c=24, h=9, w=8, mid=16, out=24, stride=2, stride_in_1x1=True),
    ),
    "bottleneck, stride 3": (bottleneck_case, BAND, dict(n=2, c=16, h=11, w=7, mid=16, out=16, stride=3)),
    "bottleneck, 1x1 pixels": (bottleneck_case, BAND, dict(n=37, c=16, h=1, w=1, mid=8, out=16)),
    "basic block": (basic_block_case, BAND, dict(n=3, c=24, h=5, w=7, mid=24, out=24)),
    "basic block, projection": (basic_block_case, BAND, dict(n=2, c=16, h=5, w=7, mid=40, out=48)),
    "basic block, stride 2": (basic_block_case, BAND, dict(n=2, c=16, h=8, w=9, mid=40, out=40, stride=2)),
    "basic block, 1x1 pixels": (basic_block_case, BAND, dict(n=37, c=8, h=1, w=1, mid=8, out=8)),
    "stem": (stem_case, STEM, dict(n=2, h=17, w=15, k=24)),
    "stem, long segment": (stem_case, dataclasses.replace(STEM, segment=7), dict(n=1, h=29, w=9, k=24)),
    "stem, 3x3": (stem_case, STEM, dict(n=2, h=9, w=11, k=16, r=3, stride=1, padding=1, layout="nchw")),
    "stem, 16 channels": (
        stem_case, dataclasses.replace(STEM, block_k=16, segment=1),
        dict(n=2, c=16, h=5, w=4, k=24, r=3, stride=1, padding=1, pool_kernel=2, pool_stride=1),
    ),
    "stem, pooling without overlap": (
        stem_case, STEM, dict(n=2, c=5, h=13, w=11, k=8, r=4, stride=1, padding=2, pool_kernel=2, pool_padding=0),
    ),
    "stem, 1 channel": (
        stem_case, dataclasses.replace(STEM, segment=1),
        dict(n=1, c=1, h=12, w=13, k=8, r=5, stride=3, padding=1, pool_kernel=3, pool_stride=1),
    ),
    "rotated": (rotated_case, ROTATED, dict(n=3, h=5, after=40)),
    "rotated, last": (rotated_case, ROTATED, dict(mid=16)),
    "dense block": (dense_case, dataclasses.replace(BAND, block_n=16), dict(n=3, h=5)),
    "dense block, ragged growth": (dense_case, BAND, dict(growth=24, depth=1)),
    "transition": (transition_case, TRANSITION, dict(n=3)),
}  # fmt: skip


ONE_OF_A_KIND = ("bottleneck, projection", "basic block", "stem", "rotated", "dense block", "transition")
OTHERS = list(itertools.product(ONE_OF_A_KIND, (torch.float32, torch.float16)))


@pytest.mark.parametrize("name, dtype", [*itertools.product(BLOCKS, (torch.bfloat16,)), *OTHERS])
def test_integers_agree_bit_for_bit(name, dtype):
    make, config, options = BLOCKS[name]
    case = exact(make(dtype=dtype, **options))
    with tf32(True):  # small integers are exact in TF32 too
        y = run(case, config)
    assert torch.equal(y.double(), case.exact().to(dtype).double())


@pytest.mark.parametrize("name, dtype", [*itertools.product(BLOCKS, (torch.bfloat16,)), *OTHERS])
def test_parity(name, dtype):
    make, config, options = BLOCKS[name]
    case = make(dtype=dtype, **options)
    y = run(case, config)
    assert y.is_contiguous(memory_format=CL)
    assert_parity(y, case)


@pytest.mark.parametrize("name", [*ONE_OF_A_KIND, "bottleneck", "bottleneck, stride 2"])
def test_pointers_instead_of_descriptors_give_the_same_bits(name):
    make, config, options = BLOCKS[name]
    case = make(dtype=torch.bfloat16, **options)
    old = dataclasses.replace(config, tma=False)
    assert torch.equal(run(case, config), run(case, old))


@pytest.mark.parametrize(
    "name", ["bottleneck", "bottleneck, stride 2", "basic block", "rotated", "dense block", "transition"]
)
def test_programs_that_compute_several_tiles(name):
    make, config, options = BLOCKS[name]
    case = make(dtype=torch.bfloat16, **options)
    y = run(case, config)
    with multiprocessors(1):
        assert torch.equal(run(case, config), y)


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_the_length_of_a_band_and_the_size_of_a_tile_change_no_bit(name):
    make, config, options = BLOCKS[name]
    case = make(dtype=torch.bfloat16, **options)
    other = dataclasses.replace(config, block_m=32, **({"tiles": 2} if isinstance(config, BandConfig) else {}))
    assert torch.equal(run(case, config), run(case, other))


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_nan_and_infinity_reach_what_depends_on_them(name):
    make, config, options = BLOCKS[name]
    case = make(dtype=torch.float32, **options)
    for t in case.args[:2] if name == "rotated" else case.args[:1]:
        t[0, 1, 2, 3] = float("nan")
        t[-1, 0, -1, -1] = float("inf")
    y, expected = run(case, config), case.formula()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    assert expected.isnan().any()
    assert not expected.isnan().all()


@pytest.mark.parametrize(
    "name", ["bottleneck", "bottleneck, stride 2", "basic block, projection", "transition", "rotated"]
)
def test_input_may_be_a_slice_of_channels(name):
    make, config, options = BLOCKS[name]
    case = make(dtype=torch.bfloat16, **options)
    y = run(case, config)
    case.args[0] = two_channels_more(case.args[0])
    assert torch.equal(run(case, config), y)


@pytest.mark.parametrize("layout", ["nchw", "view", "nhwc view", "expanded"])
def test_any_memory_format(layout):
    for make, name in ((bottleneck_case, "bottleneck"), (stem_case, "stem")):
        _, config, options = BLOCKS[name]
        case = make(dtype=torch.bfloat16, layout=layout, **options)
        assert_parity(run(case, config), case)


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_tf32_only_where_torch_allows_it(name):
    make, config, options = BLOCKS[name]
    case = make(dtype=torch.float32, **options)
    with tf32(False):
        assert_parity(run(case, config), case)
    with tf32(True):
        y = run(case, config)
    error = (y.double() - case.exact()).abs().max() / case.exact().abs().max()
    assert 2**-17 < error < 2**-9


def chain_case(n=2, c=40, mid=24, h=5, w=7, depth=3, dtype=torch.bfloat16):
    sizes = [(mid, c, 1), (mid, mid, 3), (c, mid, 1)] * depth
    weights = [weight(k, i, r, r, dtype) / (1 if k == mid else 4) for k, i, r in sizes]
    scales = [None if k == c else scale(k) for k, _, _ in sizes]
    return Case("stage", [image(n, c, h, w, dtype, "nhwc"), *weights, *scales, *(shift(k) for k, _, _ in sizes)])


def chain_arguments(x, *tensors):
    count = len(tensors) // 3
    return x, tensors[:count], tensors[count : 2 * count], tensors[2 * count :]


def chain_formula(*tensors):
    x, *lists = chain_arguments(*tensors)
    for first, second, (w3, s3, b3) in zip(*[iter(zip(*lists, strict=True))] * 3, strict=True):
        s3 = torch.ones_like(b3) if s3 is None else s3
        x = layer(layer(layer(x, *first), *second, padding=1), w3, s3, b3, x)
    return x


FORMULAS["stage"] = chain_formula


@pytest.mark.parametrize("depth", [1, 3])
def test_chain_of_identity_blocks(depth):
    case = chain_case(depth=depth)
    assert_parity(rotated.stage(*chain_arguments(*case.args)), case)


def test_chain_is_the_blocks_one_by_one():
    x, *lists = chain_arguments(*chain_case(n=1, c=32, mid=16, depth=2).args)
    y = rotated.stage(x, *lists, config=ROTATED)
    for i in (0, 3):
        x = rotated.stage(x, *(values[i : i + 3] for values in lists), config=ROTATED)
    assert torch.equal(y, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", [0, 10])
def test_head(out, dtype):
    x = image(3, 40, 7, 5, dtype, "nhwc view" if out else "nhwc")
    args = [x, *([weight(out, 40, 1, 1, dtype)[:, :, 0, 0], shift(out).to(dtype)] if out else [None])]

    def formula(x, *linear):
        mean = functional.adaptive_avg_pool2d(x, 1).flatten(1)
        return functional.linear(mean, *linear) if out else mean

    FORMULAS["head"] = formula
    assert_parity(pooled_head.head(*args), Case("head", args))


def test_head_without_bias_and_of_one_pixel():
    x, w = image(2, 16, 1, 1, torch.float32, "nhwc"), torch.randn(8, 16)
    assert torch.equal(pooled_head.head(x, None), x.flatten(1))
    torch.testing.assert_close(pooled_head.head(x, w), x.flatten(1) @ w.T)


@pytest.mark.parametrize(("convolutions", "matrices", "exact"), [
    ("tf32", "ieee", True), ("tf32", "tf32", False), ("ieee", "tf32", True), ("ieee", "ieee", True),
])  # fmt: skip
def test_head_rounds_to_tf32_only_where_both_switches_allow_it(convolutions, matrices, exact):
    """A linear layer that is not fused has the switch of matrix products; the layer kernels that of convolutions."""
    x, w, b = image(2, 32, 1, 1, torch.float32, "nhwc"), torch.randn(16, 32), torch.randn(16)
    wanted = x.flatten(1).double() @ w.T.double() + b.double()
    switches = (torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch, value in zip(switches, (convolutions, matrices), strict=True):
            switch.fp32_precision = value
        error = (pooled_head.head(x, w, b).double() - wanted).abs().max() / wanted.abs().max()
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value
    assert (error < 1e-6) == exact


# --- what runs, and with which configuration -------------------------------------------------------------------------

SHAPES = (
    Bottleneck(128, 64, 56, 56, 64, 256, projection=True),
    Bottleneck(128, 256, 56, 56, 64, 256),
    Bottleneck(1, 256, 56, 56, 128, 512, stride2=2, projection=True),
    Bottleneck(7, 96, 13, 11, 96, 96),
    BasicBlock(128, 64, 56, 56, 64, 64),
    BasicBlock(128, 256, 14, 14, 512, 512, 2, projection=True),
    BasicBlock(256, 16, 32, 32, 16, 16),
    Stem(128, 3, 224, 224, 64, 7, 7),
    Stem(1, 3, 32, 32, 16, 3, 3, 1, 1),
    Stem(8, 32, 112, 112, 64, 3, 3, 1, 1),
    DenseBlock(128, 64, 56, 56, 32, 6, 128),
    Transition(128, 256, 56, 56, 128),
    BottleneckChain(128, 256, 56, 56, 64, 2),
    Head(128, 2048, 7, 7, 1000),
    Head(1, 16, 7, 7, 10),
)


@pytest.mark.parametrize("arch", ARCHITECTURES, ids=lambda arch: arch.name)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.op)
def test_every_shape_has_distinct_configurations_that_json_keeps(shape, arch):
    for dtype in DTYPES:
        space = configs.alternatives(shape.op, shape, dtype, arch)
        assert space
        assert len(set(space)) == len(space)
        for config in space:
            assert configs.from_dict(shape.op, config.to_dict()) == config
            assert getattr(config, "tma", arch.warpgroups) == arch.warpgroups
            assert str(config)


def test_a_band_is_short_where_there_is_little_work_and_long_where_there_is_much():
    little, much = (
        configs.alternatives("bottleneck", Bottleneck(n, 256, 56, 56, 64, 256), torch.bfloat16, SM90)[0].tiles
        for n in (1, 256)
    )
    assert little == 1
    assert much >= 4


@pytest.mark.parametrize(
    "shape, reason",
    [
        (Bottleneck(1, 64, 7, 7, 64, 64, groups=2), "groups=1 and dilation=1, got 2 and 1"),
        (Bottleneck(1, 64, 7, 7, 64, 64, dilation=2), "got 1 and 2"),
        (Bottleneck(1, 64, 7, 7, 60, 64), "multiples of 8, got 60, 64"),
        (Bottleneck(1, 64, 7, 7, 256, 64), "up to 128 intermediate channels, got 256"),
        (BasicBlock(1, 12, 7, 7, 12, 12), "multiples of 8, got 12"),
        (BasicBlock(1, 16, 7, 7, 16, 16, dilation=2), "dilation=1, got 2"),
        (Stem(1, 3, 32, 32, 8, 11, 11), "up to 7x7, got 11x11"),
        (Stem(1, 3, 32, 32, 8, 3, 5), "got 3x5"),
        (Stem(1, 20, 32, 32, 8, 3, 3), "up to 16 channels or a multiple of 8, got 20"),
        (DenseBlock(1, 24, 8, 8, 12, 3, 48), "multiples of 8, got 12"),
        (DenseBlock(1, 24, 8, 8, 16, 3), "with a 1x1, got none"),
        (Transition(1, 36, 8, 8, 18), "multiples of 8, got 18, 36"),
        (BottleneckChain(1, 36, 8, 8, 16, 2), "multiples of 8, got 16, 36"),
        (BottleneckChain(1, 256, 8, 8, 256, 2), "up to 128 intermediate channels, got 256"),
        (Conv(1, 8, 8, 8, 8, 3, 3), "whole of a conv"),
    ],
)
def test_reasons(shape, reason):
    why = why_not_whole(shape, torch.bfloat16, SM90)
    assert why is not None
    assert reason in why
    if not isinstance(shape, Conv):
        assert kernels.candidates(shape, torch.bfloat16, CPU) == []


def test_a_block_that_no_kernel_runs_is_an_error():
    case = bottleneck_case(c=16, mid=12, out=16)
    with pytest.raises(BackendError, match="the whole of this bottleneck: it takes channels in multiples of 8"):
        run(case, BAND)


def test_heuristic_configurations_run():
    for make, options in (
        (bottleneck_case, dict(n=1, c=32, h=4, w=5, mid=16, out=32)),
        (basic_block_case, dict(n=1, c=16, h=4, w=5, mid=16, out=16)),
        (stem_case, dict(n=1, h=13, w=11, k=16)),
        (dense_case, dict(n=1, h=4, w=5, depth=1)),
        (transition_case, dict(n=1, h=4)),
    ):
        case = make(dtype=torch.bfloat16, **options)
        assert_parity(run(case, None), case)


def test_old_gpus_get_no_descriptors():
    space = block_configs.bottleneck_space(Bottleneck(8, 64, 14, 14, 64, 64), torch.float16, SM80)
    assert not any(config.tma for config in space)
