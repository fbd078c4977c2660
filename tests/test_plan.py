"""The choice of backend and algorithm."""

import dataclasses

import pytest
import torch
from support import EXAMPLES, bottleneck_case, conv_case

from resnet_fused import plan, settings
from resnet_fused.errors import BackendError
from resnet_fused.kernels import cpu, cuda, native
from resnet_fused.shapes import BasicBlock, Bottleneck, Conv, DenseBlock, Stem

CPU = torch.device("cpu")
STAGE_1 = Bottleneck(16, 256, 56, 56, 64, 256)
SHAPES = {
    "layer": Conv(16, 64, 56, 56, 64, 3, 3, padding=(1, 1)),
    "bottleneck": STAGE_1,
    "basic block": BasicBlock(16, 64, 56, 56, 64, 64),
    "stem": Stem(16, 3, 224, 224, 64, 7, 7),
    "dense block": DenseBlock(16, 64, 56, 56, 32, 6, 128),
}
needs_native = pytest.mark.skipif(not native.available(), reason="the native library is not built")


def choose(shape, dtype=torch.float32, backend="auto", accuracy="strict", device=CPU):
    return plan.choose(shape, dtype, device, backend, accuracy, plan.state(device))


@pytest.fixture
def no_native(monkeypatch):
    """As where the native library is missing."""
    monkeypatch.setattr(native, "bindings", None)
    monkeypatch.setattr(native, "_reason", "it is not there")
    plan.choose.cache_clear()
    yield
    plan.choose.cache_clear()


@needs_native
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", SHAPES)
def test_auto_takes_the_lowest_prediction(name, dtype):
    choice = choose(SHAPES[name], dtype, accuracy="fast")
    assert choice.reason == "lowest predicted time"
    names, seconds = zip(*choice.seconds, strict=True)
    assert list(seconds) == sorted(seconds)
    assert names[0] == f"{choice.backend} {choice.algorithm}"
    assert {"cpu direct", "vendor onednn"} <= set(names)
    assert all(s > 0 for s in seconds)


@needs_native
def test_accuracy_decides_about_winograd():
    def names(dtype, accuracy):
        return {name for name, _ in choose(STAGE_1, dtype, "cpu", accuracy).seconds}

    assert names(torch.float32, "strict") == {"cpu direct", "cpu winograd2", "cpu layers"}
    assert names(torch.float32, "fast") == {"cpu direct", "cpu winograd2", "cpu winograd4", "cpu layers"}
    assert names(torch.bfloat16, "strict") == names(torch.float32, "fast")


@needs_native
def test_layers_and_dense_blocks_do_not_round_what_they_transform(isa):
    """A residual block rounds its output, and unfused each layer's, as well."""
    rounds = {"winograd2"} if isa == "avx512_bf16" else set()
    for name, accuracy in (("layer", "strict"), ("dense block", "strict"), ("dense block", "fast")):
        assert set(cpu.ALGORITHMS) - set(plan.algorithms(SHAPES[name], torch.bfloat16, accuracy)) == rounds
    assert plan.algorithms(SHAPES["layer"], torch.bfloat16, "fast") == cpu.ALGORITHMS
    for name in ("bottleneck", "basic block"):
        assert plan.algorithms(SHAPES[name], torch.bfloat16, "strict") == cpu.ALGORITHMS


@needs_native
def test_strict_leaves_onednn_out_of_long_float32_sums():
    short, long = Conv(1, 128, 9, 9, 8, 1, 1), Conv(1, 64, 9, 9, 8, 3, 3, padding=(1, 1))
    for shape, dtype, accuracy, considered in (
        (short, torch.float32, "strict", True),
        (long, torch.float32, "strict", False),
        (long, torch.float32, "fast", True),
        (long, torch.bfloat16, "strict", True),
    ):
        choice = choose(shape, dtype, accuracy=accuracy)
        assert ("vendor onednn" in dict(choice.seconds)) == considered
        assert ("128 products, here are 576" in choice.reason) != considered
    assert choose(long, backend="vendor").backend == "vendor"


@needs_native
@pytest.mark.parametrize("name", SHAPES)
def test_workspace_does_not_grow_with_batch_and_height(name):
    shape = SHAPES[name]
    for algorithm in plan.algorithms(shape, torch.float32, "fast"):
        sizes = [shape, *(dataclasses.replace(shape, **change) for change in ({"n": 256}, {"h": 8 * shape.h}))]
        costs = [native.bindings.cost(shape.op, size.dims(), "float32", algorithm, 2) for size in sizes]
        assert len({cost["workspace_bytes"] for cost in costs}) == 1
        assert costs[0]["workspace_bytes"] < 2**21


@pytest.mark.parametrize(
    "shape",
    (
        Conv(1, 8, 9, 9, 8, 3, 3, stride=(1, 2)),
        Conv(1, 8, 9, 9, 8, 3, 3, dilation=(2, 1)),
        Conv(1, 8, 9, 9, 8, 3, 3, groups=2),
        Conv(1, 8, 9, 9, 8, 3, 1),
        Bottleneck(1, 8, 9, 9, 8, 8, stride2=2),
        Bottleneck(1, 8, 9, 9, 8, 8, dilation=2),
        BasicBlock(1, 8, 9, 9, 8, 8, dilation=2),
        Stem(1, 3, 9, 9, 8, 3, 3),
    ),
)
def test_winograd_only_where_it_applies(shape):
    assert plan.algorithms(shape, torch.bfloat16, "fast") == ("direct",)


@needs_native
def test_a_block_without_a_kernel_runs_layer_by_layer_and_says_so():
    choice = choose(Bottleneck(1, 64, 14, 14, 32, 64, groups=4), backend="cpu")
    assert (choice.algorithm, choice.composed) == ("layers", True)
    assert "groups=1, got 4" in choice.reason
    case = bottleneck_case(groups=4, stride=1, mid=8)
    with plan.record() as choices:
        case.run(backend="cpu")
    assert [c.shape.op for c in choices] == ["bottleneck", "conv", "conv", "conv"]
    assert {c.backend for c in choices} == {"cpu"}
    assert [c.shape for c in choices[1:]] == choices[0].shape.layers()


@pytest.mark.parametrize("name", SHAPES)
def test_named_backend(name):
    for backend in ("vendor", "reference"):
        choice = choose(SHAPES[name], backend=backend)
        assert choice.backend == backend
        assert choice.composed == (name != "layer")


def test_without_the_native_library(no_native):
    choice = choose(STAGE_1)
    assert (choice.backend, choice.algorithm) == ("vendor", "onednn")
    assert "cpu: it is not there" in choice.reason
    with pytest.raises(BackendError, match="backend='cpu' cannot run this: it is not there"):
        choose(STAGE_1, backend="cpu")
    for op in EXAMPLES:
        case = EXAMPLES[op]()
        with plan.record() as choices:
            case.run()
        assert {c.backend for c in choices} == {"vendor"}


def test_other_dtypes_and_devices_go_to_the_reference_with_the_reason():
    choice = choose(STAGE_1, torch.float64)
    assert choice.backend == "reference"
    assert "torch.float64" in choice.reason
    choice = choose(STAGE_1, device=torch.device("cuda", 0))
    assert choice.backend == "reference"
    assert "no CUDA GPU" in choice.reason


def test_record_is_of_one_region_and_nests():
    case = conv_case()
    with plan.record() as outer:
        case.run(backend="reference")
        with plan.record() as inner:
            case.run(backend="vendor")
        case.run(backend="reference")
    case.run()
    assert [c.backend for c in outer] == ["reference", "reference"]
    assert [c.backend for c in inner] == ["vendor"]


@pytest.mark.parametrize("op", EXAMPLES)
def test_shapes_agree_with_the_call(op):
    case = EXAMPLES[op]()
    with plan.record() as choices:
        y = case.run(backend="reference")
    shape = choices[0].shape
    assert shape.output_shape == tuple(y.shape)
    assert shape.flops == sum(layer.flops for layer in shape.layers())


def test_flops_of_stage_1():
    assert STAGE_1.flops == 2 * 16 * 56 * 56 * (256 * 64 + 9 * 64 * 64 + 64 * 256)


def test_environment_variable_names_the_backend(monkeypatch):
    monkeypatch.setenv("RESNET_FUSED_BACKEND", "reference")
    monkeypatch.setattr(settings, "_state", settings._State())
    with plan.record() as choices:
        conv_case().run()
        conv_case().run(backend="vendor")
    assert [c.backend for c in choices] == ["reference", "vendor"]


@pytest.mark.skipif(cuda.built() is not None, reason="no CUDA kernels")
def test_stem_on_a_gpu_without_a_kernel_for_its_convolution(monkeypatch):
    """A convolution of 3 channels alone has none: the whole stem is what there is, and no error."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_of", lambda device: cuda.Device(90, 132, 232448))
    monkeypatch.setattr(cuda, "_driver_lack", lambda: "")
    monkeypatch.setattr(plan.tuned, "backend_seconds", lambda *key: None)
    gpu, state = torch.device("cuda", 0), plan.state(CPU)
    found = plan._gpu_candidates("cuda", SHAPES["stem"], torch.bfloat16, gpu, "strict", state)
    assert [candidate.algorithm for candidate in found] == ["whole"]
    plan.choose.cache_clear()
