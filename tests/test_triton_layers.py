"""The Triton layer kernels, run by Triton's interpreter on CPU tensors: every kernel and class of configuration."""

import contextlib
import os
import subprocess
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from support import CL, FORMULAS, Case, assert_parity, conv_case, image, integers, layer, scale, shift, weight
from torch.nn import functional

triton = pytest.importorskip("triton")

from resnet_fused.errors import BackendError, InputError  # noqa: E402
from resnet_fused.kernels import triton as kernels  # noqa: E402
from resnet_fused.kernels.triton import configs, interpreter, layer_configs  # noqa: E402
from resnet_fused.kernels.triton.configs import SM80, SM90, SM100, Architecture  # noqa: E402
from resnet_fused.kernels.triton.layer_configs import ImplicitGemmConfig, PointwiseConfig, TmaConvConfig  # noqa: E402
from resnet_fused.shapes import Conv  # noqa: E402

pytestmark = pytest.mark.skipif(not interpreter.INTERPRETED, reason="Triton was imported without TRITON_INTERPRET=1")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")


def _prologue(x, weight, scale, shift, residual, in_scale, in_shift, **options):
    """A layer after BatchNorm and ReLU, each rounded to x's dtype."""
    mean, var = torch.zeros_like(in_shift), torch.ones_like(in_shift)
    x = functional.batch_norm(x, mean, var, in_scale, in_shift, eps=0).relu()
    return layer(x, weight, scale, shift, residual, **options)


def _projected(h, weight, scale, shift, x, wd, sd, bd, *, stride, **options):
    """A layer plus the projection of another image."""
    return layer(h, weight, scale, shift, layer(x, wd, sd, bd, stride=stride, activation="none"), **options)


FORMULAS["prologue layer"] = _prologue
FORMULAS["projected layer"] = _projected


def run(case, algorithm, config=None, out=None):
    """A layer, with or without prologue, by one kernel."""
    options = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "activation": "relu", **case.options}
    for name in ("stride", "padding", "dilation"):
        value = options[name]
        options[name] = (value, value) if isinstance(value, int) else value
    args = [*case.args, None, None, None][:7]
    return kernels.conv_bn_act(*args, algorithm=algorithm, config=config, out=out, **options)


def with_prologue(case):
    """The same layer behind a BatchNorm and ReLU of its input."""
    c = case.args[0].shape[1]
    return Case("prologue layer", [*[*case.args, None][:5], scale(c), shift(c)], case.options)


def exact(case):
    """The case with integers whose sums need no rounding."""
    prologue = case.args[5:]
    case = integers(Case("conv_bn_act", case.args[:5], case.options))
    if not prologue:
        return case
    c = case.args[0].shape[1]
    powers, whole = 2.0 ** torch.randint(-1, 1, (c,)), torch.randint(-2, 3, (c,)).float()
    return Case("prologue layer", [*[*case.args, None][:5], powers, whole], case.options)


def assert_exact(y, case):
    assert torch.equal(y.double(), case.exact().to(y.dtype).double())


@contextlib.contextmanager
def tf32(allowed):
    """Torch's switch, as it stands for convolutions on the device of these tests."""
    conv = torch.backends.mkldnn.conv
    previous, conv.fp32_precision = conv.fp32_precision, "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        conv.fp32_precision = previous


GEMM = ImplicitGemmConfig(block_m=64, block_n=64, block_k=32, warps=4, stages=3)
POINTWISE = PointwiseConfig(
    block_m=64, block_n=64, block_k=32, parts=1, persistent=True, flatten=False, warps=4, stages=3
)
TMA = TmaConvConfig(box=(2, 4, 8), block_n=64, block_k=32, warps=4, stages=3)
COLUMN = TmaConvConfig(box=(16, 1, 1), block_n=32, block_k=16, warps=4, stages=3)

LAYERS = {  # several tiles each way, none of them full
    "3x3": ("implicit_gemm", GEMM, dict(n=2, c=40, h=7, w=9, k=72, padding=1, residual="nhwc")),
    "3x3 stride 2": ("implicit_gemm", GEMM, dict(n=3, c=16, h=9, w=11, k=24, padding=1, stride=2)),
    "3x3 dilation 2": ("implicit_gemm", GEMM, dict(c=24, h=9, w=8, k=16, padding=2, dilation=2, activation="none")),
    "5x2, unequal steps": (
        "implicit_gemm", GEMM,
        dict(c=17, h=9, w=8, k=13, r=5, s=2, stride=(2, 1), padding=(3, 1), dilation=(1, 3), residual="nchw"),
    ),
    "3 channels": ("implicit_gemm", GEMM, dict(n=1, c=3, h=13, w=11, k=16, r=7, s=7, stride=2, padding=3)),
    "1 channel, 1 pixel": ("implicit_gemm", GEMM, dict(n=1, c=1, h=1, w=1, k=1, padding=1)),
    "1x1": ("implicit_gemm", GEMM, dict(n=3, c=72, h=5, w=7, k=72, r=1, s=1, residual="nhwc")),
    "1x1 stride 3": ("implicit_gemm", GEMM, dict(n=2, c=13, h=11, w=7, k=19, r=1, s=1, stride=3)),
    "1x1 padding": ("implicit_gemm", GEMM, dict(n=1, c=16, h=5, w=4, k=16, r=1, s=1, padding=1)),
    "2 wide groups": ("implicit_gemm", GEMM, dict(n=1, c=144, h=5, w=5, k=80, padding=1, groups=2)),
    "12 narrow groups": ("implicit_gemm", GEMM, dict(n=1, c=48, h=6, w=5, k=24, padding=1, groups=12, stride=2)),
    "depthwise": ("implicit_gemm", GEMM, dict(n=1, c=23, h=6, w=5, k=23, padding=1, groups=23)),
    "split": (
        "implicit_gemm", ImplicitGemmConfig(block_m=64, block_n=32, block_k=32, split=4, warps=4, stages=3),
        dict(n=2, c=40, h=5, w=7, k=40, padding=1, residual="nhwc"),
    ),
    "more parts than steps": (
        "implicit_gemm", ImplicitGemmConfig(block_m=32, block_n=16, block_k=32, split=4, warps=4, stages=3),
        dict(n=1, c=33, h=5, w=3, k=17, r=1, s=1),
    ),
    "pointwise": ("pointwise", POINTWISE, dict(n=3, c=72, h=5, w=7, k=72, r=1, s=1, residual="nhwc")),
    "pointwise, 1 pixel": ("pointwise", POINTWISE, dict(n=1, c=8, h=1, w=1, k=8, r=1, s=1, activation="none")),
    "tma": ("tma_conv", TMA, dict(n=3, c=40, h=7, w=7, k=72, padding=1, residual="nhwc")),
    "tma stride 2": ("tma_conv", TMA, dict(n=3, c=32, h=10, w=18, k=40, padding=1, stride=2)),
    "tma dilation": ("tma_conv", TMA, dict(n=1, c=24, h=9, w=7, k=16, r=5, s=3, padding=(4, 2), dilation=2)),
    "tma without padding": ("tma_conv", TMA, dict(n=1, c=16, h=6, w=9, k=16, residual="nhwc", activation="none")),
    "tma 1x1 stride 2": ("tma_conv", TMA, dict(n=3, c=40, h=9, w=7, k=40, r=1, s=1, stride=2)),
    "tma columns": ("tma_conv", COLUMN, dict(n=17, c=24, h=2, w=2, k=24, padding=1, residual="nhwc")),
    "tma columns stride 2": ("tma_conv", COLUMN, dict(n=17, c=16, h=4, w=2, k=24, padding=1, stride=2)),
    "tma columns 1x1": ("tma_conv", COLUMN, dict(n=17, c=24, h=3, w=2, k=40, r=1, s=1, stride=2)),
}  # fmt: skip
PROLOGUES = ("3x3", "3x3 stride 2", "3 channels", "1x1", "1x1 padding", "2 wide groups", "split", "pointwise")


@pytest.mark.parametrize("name", LAYERS)
def test_integers_agree_bit_for_bit(name):
    algorithm, config, options = LAYERS[name]
    case = exact(conv_case(dtype=torch.bfloat16, **options))
    assert_exact(run(case, algorithm, config), case)


@pytest.mark.parametrize("name", LAYERS)
def test_parity(name):
    algorithm, config, options = LAYERS[name]
    for dtype in (torch.float16, torch.float32)[: 2 if name in ("3x3", "3 channels", "1x1", "split") else 1]:
        case = conv_case(dtype=dtype, **options)
        assert_parity(run(case, algorithm, config), case)


@pytest.mark.parametrize("name", PROLOGUES)
def test_prologue(name):
    algorithm, config, options = LAYERS[name]
    case = with_prologue(conv_case(dtype=torch.bfloat16, **options))
    assert_parity(run(case, algorithm, config), case)
    case = exact(case)
    assert_exact(run(case, algorithm, config), case)


@pytest.mark.parametrize("algorithm", ["implicit_gemm", "pointwise", "tma_conv"])
def test_every_tile(algorithm):
    r = 1 if algorithm == "pointwise" else 3
    shape = Conv(128, 16, 7, 7, 264, r, r, padding=(r // 2,) * 2)
    tiles = {}  # what else there is (warps, stages, the order of loads) is nothing to the interpreter
    for config in configs.alternatives(algorithm, shape, torch.float16, SM90):
        m = config.block_m if hasattr(config, "block_m") else torch.Size(config.box).numel()
        tiles.setdefault((m, config.block_n, getattr(config, "parts", 1)), config)
    assert len(tiles) >= 8
    for config in tiles.values():  # on an image that takes two tiles
        options = {"n": 2, "h": 2, "w": 1, "c": config.block_k, "k": config.block_n + 8, "r": r, "s": r}
        case = exact(conv_case(dtype=torch.float16, padding=r // 2, residual="nhwc", **options))
        assert torch.equal(run(case, algorithm, config), case.exact().half()), str(config)


SLICED = ("3x3", "1x1", "3 channels", "12 narrow groups", "split", "pointwise", "tma", "tma columns")


@pytest.mark.parametrize("name", SLICED)
def test_reads_and_writes_slices_of_channels(name):
    algorithm, config, options = LAYERS[name]
    case = exact(conv_case(dtype=torch.bfloat16, **{**options, "residual": "nhwc"}))
    x, w, s, b, r = case.args
    buffer = torch.full((x.shape[0], x.shape[1] + 24, *x.shape[2:]), float("nan"), dtype=x.dtype).to(memory_format=CL)
    buffer[:, 8:-16] = x
    residual = torch.full((r.shape[0], r.shape[1] + 8, *r.shape[2:]), float("nan"), dtype=x.dtype).to(memory_format=CL)
    residual[:, :-8] = r
    target = torch.full((r.shape[0], r.shape[1] + 16, *r.shape[2:]), 7.0, dtype=x.dtype).to(memory_format=CL)
    sliced = Case(case.op, [buffer[:, 8:-16], w, s, b, residual[:, :-8]], case.options)
    out = target[:, 8:-8]
    y = run(sliced, algorithm, config, out)
    assert y.data_ptr() == out.data_ptr()
    assert_exact(out, case)
    assert (target[:, :8] == 7).all()
    assert (target[:, -8:] == 7).all()


@pytest.mark.parametrize("algorithm", ["pointwise", "tma_conv"])
def test_unaligned_slices_go_to_implicit_gemm(algorithm):
    case = exact(conv_case(n=2, c=16, h=4, w=6, k=16, r=1, s=1, dtype=torch.bfloat16))
    x, *rest = case.args
    for sliced in (image(2, 19, 4, 6, x.dtype, "nhwc")[:, 1:-2], image(2, 24, 4, 6, x.dtype, "nhwc")[:, 3:-5]):
        sliced.copy_(x)
        assert_exact(run(Case(case.op, [sliced, *rest], case.options), algorithm), case)


@pytest.mark.parametrize("layout", ["nchw", "view", "expanded"])
def test_other_layouts_are_copied(layout):
    case = exact(conv_case(c=16, k=16, h=6, w=6, padding=1, layout=layout, residual=layout, dtype=torch.float16))
    for algorithm in ("implicit_gemm", "tma_conv"):
        y = run(case, algorithm)
        assert_exact(y, case)
        assert y.is_contiguous(memory_format=CL)


@pytest.mark.parametrize("name", ["3x3", "1x1", "3 channels", "split", "pointwise", "tma", "tma columns"])
def test_nan_and_infinity_pass_on(name):
    algorithm, config, options = LAYERS[name]
    case = conv_case(dtype=torch.bfloat16, **{**options, "residual": "nhwc"})
    x, residual = case.args[0], case.args[4]
    x[0, 0, 0, 0], x[0, 1, -1, -1] = float("nan"), float("inf")
    residual[-1, -1, -1, -1] = float("nan")
    expected = case.formula()
    y = run(case, algorithm, config)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    assert y.isnan().any()


def test_nan_of_the_prologue_stays_in_its_window():
    case = with_prologue(conv_case(c=16, h=7, w=7, k=8, padding=1, dtype=torch.float16))
    case.args[0][0, 3, 0, 0] = float("nan")
    y = run(case, "implicit_gemm", GEMM)
    assert torch.equal(y.isnan(), case.formula().isnan())


def projected_case(h, c, c2, k, r, stride, size, dtype):
    n, p, q = size
    args = [
        image(n, c, p, q, dtype, "nhwc"), weight(k, c, r, r, dtype), scale(k), shift(k),
        image(n, c2, (p - 1) * stride + 1 + h, q * stride, dtype, "nhwc"),
        weight(k, c2, 1, 1, dtype), scale(k), shift(k),
    ]  # fmt: skip
    return Case("projected layer", args, {"stride": stride, "padding": r // 2})


@pytest.mark.parametrize(
    ("algorithm", "config", "shape"),
    [
        ("implicit_gemm", GEMM, dict(h=0, c=24, c2=13, k=40, r=1, stride=2, size=(3, 4, 5))),
        ("implicit_gemm", GEMM, dict(h=0, c=8, c2=48, k=72, r=3, stride=1, size=(2, 6, 7))),
        ("tma_conv", TMA, dict(h=1, c=24, c2=40, k=72, r=1, stride=2, size=(3, 5, 9))),
        ("tma_conv", TMA, dict(h=0, c=40, c2=8, k=40, r=3, stride=2, size=(2, 6, 7))),
        ("tma_conv", COLUMN, dict(h=1, c=24, c2=40, k=24, r=1, stride=2, size=(17, 2, 2))),
        ("tma_conv", None, dict(h=0, c=24, c2=40, k=72, r=1, stride=1, size=(2, 5, 7))),
        (None, None, dict(h=0, c=24, c2=12, k=16, r=1, stride=2, size=(2, 5, 7))),
    ],
)
def test_projection_in_the_same_accumulator(algorithm, config, shape):
    case = projected_case(dtype=torch.bfloat16, **shape)
    case.args[2][1] = 0  # a last gamma of 0, as fresh networks have
    case.args[6][0] = 0  # a dead channel of the projection
    case.args[6][2] = 1e-40
    y = kernels.project(*case.args, algorithm=algorithm, config=config, **case.options)
    assert_parity(y, case)
    sparse = [
        image(*t.shape, y.dtype, "nhwc", lambda *s: torch.randint(-2, 3, s)) for t in (case.args[0], case.args[4])
    ]
    weights = [torch.randint(-1, 2, t.shape).to(y.dtype) for t in (case.args[1], case.args[5])]
    powers = [2.0 ** torch.randint(-1, 2, t.shape) for t in (case.args[2], case.args[6])]
    wholes = [torch.randint(-3, 4, t.shape).float() for t in (case.args[3], case.args[7])]
    powers[1][0] = powers[0][1] = 0
    mixed = [t for four in zip(sparse, weights, powers, wholes, strict=True) for t in four]
    case = Case(case.op, mixed, case.options)
    assert_exact(kernels.project(*case.args, algorithm=algorithm, config=config, **case.options), case)


@pytest.mark.parametrize("name", ["3x3", "1x1", "pointwise", "tma", "tma stride 2"])
def test_tf32_exactly_when_torch_allows_it(name):
    algorithm, config, options = LAYERS[name]
    case = conv_case(dtype=torch.float32, **options)

    def rounded(t):
        return ((t.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)

    low = Case(case.op, [rounded(t) if t is not None and t.dim() == 4 else t for t in case.args], case.options)
    low.args[4:] = case.args[4:]
    exact = case.exact()
    in_tf32 = (low.exact() - exact).abs().max().item()
    with tf32(True):
        error = (run(case, algorithm, config).double() - exact).abs().max().item()
    assert in_tf32 / 2 < error <= 2 * in_tf32
    with tf32(False):
        assert_parity(run(case, algorithm, config), case)


def test_no_bias_of_tf32():
    """Truncated factors would make every sum of positive products too small."""
    case = conv_case(n=2, c=64, h=5, w=5, k=32, r=1, s=1, dtype=torch.float32)
    case.args = [t.abs() for t in case.args]
    with tf32(True):
        for algorithm in ("implicit_gemm", "pointwise", "tma_conv"):
            relative = ((run(case, algorithm).double() - case.exact()) / case.exact()).mean().item()
            assert abs(relative) < 2e-5, algorithm


def test_split_sums_have_one_order():
    algorithm, config, options = LAYERS["split"]
    case = conv_case(dtype=torch.float32, **options)
    first, second = run(case, algorithm, config), run(case, algorithm, config)
    assert torch.equal(first, second)


def test_scale_of_none_is_ones():
    case = exact(conv_case(c=16, k=24, padding=1, dtype=torch.float16))
    case.args[2] = torch.ones(24)
    for algorithm in ("implicit_gemm", "tma_conv"):
        bare = Case(case.op, [*case.args[:2], None, *case.args[3:]], case.options)
        assert_exact(run(bare, algorithm), case)


def test_weights_in_any_layout_and_changed_in_place():
    case = exact(conv_case(c=16, k=24, padding=1, dtype=torch.bfloat16))
    for strided in (case.args[1].contiguous(memory_format=CL), case.args[1].repeat(1, 2, 1, 1)[:, ::2]):
        strided.copy_(case.args[1])
        changed = Case(case.op, [case.args[0], strided, *case.args[2:]], case.options)
        assert_exact(run(changed, "tma_conv"), changed)
        strided.mul_(-1)
        assert_exact(run(changed, "tma_conv"), changed)
        assert_exact(run(changed, "implicit_gemm"), changed)


def test_output_of_another_layout_is_an_error():
    case = conv_case(dtype=torch.float16)
    out = torch.empty(2, 12, 5, 4, dtype=torch.float16)
    with pytest.raises(InputError, match="out must be channels_last"):
        run(case, "implicit_gemm", out=out)


def test_algorithm_that_cannot_run_the_layer_is_an_error():
    for algorithm, options in (("pointwise", {}), ("tma_conv", {"c": 9, "padding": 1}), ("winograd", {})):
        with pytest.raises(BackendError, match=f"algorithm '{algorithm}' of backend 'triton' cannot run Conv"):
            run(conv_case(dtype=torch.float16, **options), algorithm)


# What runs where.

RESNET_LAYERS = {
    "1x1": Conv(128, 64, 56, 56, 256, 1, 1, residual=True),
    "3x3": Conv(128, 64, 56, 56, 64, 3, 3, padding=(1, 1)),
    "3x3 stride 2": Conv(128, 128, 56, 56, 128, 3, 3, (2, 2), (1, 1)),
    "projection": Conv(128, 256, 56, 56, 512, 1, 1, (2, 2)),
    "7x7 image": Conv(128, 512, 7, 7, 512, 3, 3, padding=(1, 1)),
    "batch 1": Conv(1, 512, 7, 7, 512, 3, 3, padding=(1, 1)),
    "stem": Conv(128, 3, 224, 224, 64, 7, 7, (2, 2), (3, 3)),
    "ResNeXt": Conv(128, 128, 56, 56, 128, 3, 3, padding=(1, 1), groups=32),
    "DenseNet": Conv(64, 512, 14, 14, 128, 1, 1, prologue=True),
    "CIFAR": Conv(128, 16, 32, 32, 16, 3, 3, padding=(1, 1), residual=True),
    "pre-activation": Conv(64, 64, 28, 28, 64, 3, 3, padding=(1, 1), prologue=True),
    "1000 classes": Conv(1, 2048, 1, 1, 1000, 1, 1),
}


@pytest.mark.parametrize("shape", RESNET_LAYERS.values(), ids=RESNET_LAYERS)
def test_configurations_fit_the_gpu(shape):
    small = Architecture("sm_89", (8, 9), 76, 99 * 1024, 48 << 20)
    for arch in (SM80, SM90, SM100, small, Architecture("sm_120", (12, 0), 170, 99 * 1024, 96 << 20)):
        for dtype in DTYPES:
            names = layer_configs.algorithms(shape, dtype, arch)
            assert "implicit_gemm" in names
            for name in names:
                found = configs.alternatives(name, shape, dtype, arch)
                assert len(found) == len(set(found)) > 0
                for config in found:
                    m = getattr(config, "block_m", None) or torch.Size(config.box).numel()
                    pipeline = config.stages * (m + config.block_n) * config.block_k * dtype.itemsize
                    assert pipeline <= arch.shared_memory
                    assert config.block_k * dtype.itemsize >= 32
                    assert type(config).from_dict(config.to_dict()) == config
                    assert configs.from_dict(name, config.to_dict()) == config


def test_algorithms_by_architecture():
    def first(name, arch, dtype=torch.bfloat16):
        return layer_configs.algorithms(RESNET_LAYERS[name], dtype, arch)[0]

    assert {first(name, SM80) for name in RESNET_LAYERS} == {"implicit_gemm"}
    assert first("1x1", SM90) == first("DenseNet", SM90) == "pointwise"
    assert first("3x3", SM90) == first("3x3 stride 2", SM90) == first("7x7 image", SM90) == "tma_conv"
    assert first("stem", SM90) == first("ResNeXt", SM90) == first("pre-activation", SM90) == "implicit_gemm"


def test_boxes_waste_nothing_at_the_sizes_of_resnet():
    for size in (56, 28, 14, 7):
        box = layer_configs.boxes(128, size, size, 128)[0]
        assert layer_configs.box_tiles((128, size, size), box) * 128 == 128 * size * size


def test_small_grids_are_split():
    config = configs.alternatives("implicit_gemm", RESNET_LAYERS["batch 1"], torch.bfloat16, SM80)[0]
    assert config.split > 1


def test_narrow_groups_are_merged():
    assert layer_configs.merged_groups(RESNET_LAYERS["ResNeXt"]) == 16
    assert layer_configs.merged_groups(RESNET_LAYERS["3x3"]) == 1
    assert layer_configs.merged_groups(Conv(1, 23, 5, 5, 23, 3, 3, groups=23)) == 23


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_m": 48}, "PointwiseConfig.block_m must be a power of two, got 48"),
        ({"block_m": 0}, "PointwiseConfig.block_m must consist of positive integers, got 0"),
        ({"block_m": "64"}, "PointwiseConfig.block_m must be of type int, got '64'"),
        ({"flatten": 1}, "PointwiseConfig.flatten must be of type bool, got 1"),
        ({"block_k": None}, "PointwiseConfig.block_k must be of type int, got None"),
        ({"color": 1}, r"PointwiseConfig must have block_k, "),
    ],
)
def test_configuration_from_bad_json(change, message):
    with pytest.raises(InputError, match=message):
        PointwiseConfig.from_dict({**POINTWISE.to_dict(), **change})


def test_box_from_bad_json():
    for box in ([2, 4], 8, [2, 4, 3], [2, 4, 8.0]):
        with pytest.raises(InputError, match=r"TmaConvConfig\.box must"):
            TmaConvConfig.from_dict({**TMA.to_dict(), "box": box})
    assert TmaConvConfig.from_dict(TMA.to_dict()) == TMA
    with pytest.raises(InputError, match=r"kernel must be one of .*got 'fft'"):
        configs.from_dict("fft", {})


def test_measured_configuration_comes_first(monkeypatch):
    from resnet_fused.kernels.triton import tuned

    measured = ImplicitGemmConfig(block_m=16, block_n=16, block_k=16, warps=1, stages=2)
    monkeypatch.setattr(tuned, "lookup", lambda *call: measured)
    configs.choose.cache_clear()
    try:
        case = exact(conv_case(c=16, k=16, h=3, w=4, r=1, s=1, dtype=torch.float16))
        shape = Conv(2, 16, 3, 4, 16, 1, 1)
        assert configs.choose("implicit_gemm", shape, torch.float16, SM90) is measured
        found = kernels.candidates(shape, torch.float16, CPU)
        assert found[0].config == str(measured) == "16x16x16, 1 warps, 2 stages"
        assert_exact(run(case, "implicit_gemm"), case)
    finally:
        configs.choose.cache_clear()


def test_float32_without_tf32_has_one_candidate():
    shape = RESNET_LAYERS["1x1"]
    with tf32(False):
        assert [c.algorithm for c in kernels.candidates(shape, torch.float32, CPU)] == ["implicit_gemm"]
    with tf32(True):
        assert kernels.candidates(shape, torch.float32, CPU)[0].algorithm == "pointwise"


def test_what_is_unsupported(monkeypatch):
    shape = RESNET_LAYERS["3x3"]
    assert kernels.unsupported(shape, torch.bfloat16, CPU) is None
    assert "x.dtype is torch.float64" in kernels.unsupported(shape, torch.float64, CPU)
    huge = Conv(1 << 17, 8, 128, 128, 8, 1, 1)
    assert "it takes at most" in kernels.unsupported(huge, torch.float16, CPU)
    assert torch.cuda.is_available() or kernels.unsupported(shape, torch.float16, torch.device("cuda", 0)) == (
        "torch sees no CUDA GPU"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "architecture", lambda device: Architecture("T4", (7, 5), 40, 64 << 10, 4 << 20))
    why = kernels.unsupported(shape, torch.float16, torch.device("cuda", 0))
    assert why == "it needs compute capability 8.0 or newer, T4 has 7.5"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    why = kernels.unsupported(shape, torch.float16, CPU)
    assert why == "it needs a CUDA GPU of compute capability 8.0 or newer, x.device is cpu"
    monkeypatch.setattr(kernels, "_installed", lambda: False)
    assert kernels.unsupported(shape, torch.float16, CPU) == "triton is not installed"


def test_importing_the_package_imports_no_triton():
    code = (
        "import sys, torch, resnet_fused\n"
        "from resnet_fused.kernels import triton\n"
        "from resnet_fused.shapes import Conv\n"
        "assert triton.unsupported(Conv(1, 8, 4, 4, 8, 1, 1), torch.bfloat16, torch.device('cpu'))\n"
        "assert not any(name.split('.')[0] == 'triton' for name in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
