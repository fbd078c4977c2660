"""Tuning files: round trip, damaged, foreign, by several writers; what tuning makes of times, with a fake timer."""

import contextlib
import json
import multiprocessing
import re
import warnings
from dataclasses import dataclass

import pytest
import torch
from nets import images, tiny

import resnet_fused as rf
from resnet_fused import gpu_timer, plan, settings, tune
from resnet_fused.errors import BackendError, InputError
from resnet_fused.kernels.triton import configs, tuned
from resnet_fused.samples import Sample, sample
from resnet_fused.shapes import (
    BasicBlock,
    Bottleneck,
    BottleneckChain,
    Conv,
    DenseBlock,
    Head,
    PreActBlock,
    Stem,
    Transition,
)

GPU = "NVIDIA Imaginary 9000"
ARCH = configs.Architecture(GPU, (9, 0), 132, 227 * 1024, 50 << 20)
CONV = Conv(2, 8, 5, 5, 16, 1, 1)
SHAPES = [
    CONV,
    Conv(2, 8, 5, 5, 16, 3, 3, (2, 1), (1, 1), (1, 2), 2, True, True),
    Bottleneck(2, 8, 5, 5, 8, 16, 1, 2, projection=True),
    Bottleneck(2, 16, 5, 5, 8, 16),
    BasicBlock(2, 8, 5, 5, 8, 8),
    BasicBlock(2, 8, 5, 5, 8, 16, 2, projection=True),
    Stem(2, 3, 21, 21, 8, 7, 7),
    PreActBlock(2, 8, 5, 5, 8, 8),
    PreActBlock(2, 8, 5, 5, 8, 16, 1, 2, projection=True, bottleneck=True),
    DenseBlock(2, 8, 5, 5, 4, 2, 8),
    DenseBlock(2, 8, 5, 5, 4, 2),
    Transition(2, 8, 5, 5, 4),
    BottleneckChain(2, 16, 5, 5, 8, 2),
    Head(2, 8, 5, 5, 4),
]


@dataclass(frozen=True, kw_only=True)
class Config(configs.Config):
    block: int


def config(block):
    return Config(warps=4, stages=2, block=block)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """A GPU with one kernel, "gemm", of three configurations; empty folders for shipped and own files."""
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("RESNET_FUSED_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr(configs, "architecture", lambda device: ARCH)
    monkeypatch.setitem(configs._kernels, "gemm", (Config, lambda *_: [config(16), config(32), config(64)]))
    tuned.forget()
    yield tmp_path
    tuned.forget()


def entry(block=32, **seconds):
    return tuned.Entry({"gemm": config(block).to_dict()}, seconds or {"triton gemm": 2e-5, "vendor cudnn": 3e-5})


def lookup(shape=CONV, dtype=torch.bfloat16):
    return tuned.lookup("gemm", shape, dtype, ARCH)


def file():
    return tuned.path(GPU, settings.cache_folder())


def test_round_trip():
    assert lookup() is None
    assert tuned.backend_seconds(CONV, torch.bfloat16, torch.device("cpu")) is None
    assert configs.choose("gemm", CONV, torch.bfloat16, ARCH) == config(16)
    written = tuned.write(GPU, {(shape, torch.bfloat16): entry() for shape in SHAPES})
    assert written == file()
    assert tuned.read(written, GPU) == {(shape, torch.bfloat16): entry() for shape in SHAPES}
    for shape in SHAPES:
        assert lookup(shape) == config(32)
        found = tuned.backend_seconds(shape, torch.bfloat16, torch.device("cpu"))
        assert found == {"triton gemm": 2e-5, "vendor cudnn": 3e-5}
    assert configs.choose("gemm", CONV, torch.bfloat16, ARCH) == config(32)


def test_another_shape_dtype_or_kernel_gets_nothing():
    tuned.write(GPU, {(CONV, torch.bfloat16): entry()})
    assert lookup(dtype=torch.float16) is None
    assert lookup(Conv(3, 8, 5, 5, 16, 1, 1)) is None
    assert tuned.lookup("other", CONV, torch.bfloat16, ARCH) is None


def test_writing_keeps_other_shapes_and_replaces_the_same():
    tuned.write(GPU, {(shape, torch.bfloat16): entry() for shape in SHAPES[:2]})
    tuned.write(GPU, {(SHAPES[1], torch.bfloat16): entry(64)})
    assert lookup(SHAPES[0]) == config(32)
    assert lookup(SHAPES[1]) == config(64)


def test_own_file_comes_before_the_shipped_one():
    tuned.write(GPU, {(shape, torch.bfloat16): entry(64) for shape in SHAPES[:2]}, tuned.SHIPPED)
    assert lookup(SHAPES[0]) == config(64)
    tuned.write(GPU, {(SHAPES[0], torch.bfloat16): tuned.Entry({"gemm": config(32).to_dict()}, {"cuda gemm": 1e-5})})
    assert lookup(SHAPES[0]) == config(32)
    assert lookup(SHAPES[1]) == config(64)
    found = tuned.backend_seconds(SHAPES[0], torch.bfloat16, torch.device("cpu"))
    assert found == {"triton gemm": 2e-5, "vendor cudnn": 3e-5, "cuda gemm": 1e-5}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "\x00\xff",
        lambda text: text.replace("Imaginary", "Different"),
        lambda text: re.sub('"triton": "[^"]*"', '"triton": "1.0"', text),
        lambda text: text.replace('"generation": 1', '"generation": 0'),
        lambda text: text.replace('"entries"', '"things"'),
        lambda text: text.replace('"op": "conv"', '"op": "pool"'),
        lambda text: text.replace('"c": 8,', ""),
        lambda text: text.replace('"c": 8', '"c": "8"'),
        lambda text: text.replace("bfloat16", "float8"),
        lambda text: text.replace("2e-05", "-2e-05"),
        lambda text: text.replace("2e-05", '"fast"'),
        lambda text: text.replace('"configs": {', '"configs": [{').replace("}, \"seconds\"", "}], \"seconds\""),
    ],
)  # fmt: skip
def test_unusable_file_is_reported_once_and_set_aside(damage):
    tuned.write(GPU, {(CONV, torch.bfloat16): entry()})
    text = file().read_text()
    assert damage(text) != text
    file().write_text(damage(text), encoding="latin-1")
    with pytest.warns(UserWarning, match="is not usable, moved to .*corrupt") as reported:
        assert configs.choose("gemm", CONV, torch.bfloat16, ARCH) == config(16)
    assert len(reported) == 1
    assert file().with_name(file().name + ".corrupt").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.backend_seconds(CONV, torch.bfloat16, torch.device("cpu")) is None
        tuned.forget()
        assert lookup() is None
        tuned.write(GPU, {(CONV, torch.bfloat16): entry()})
    assert lookup() == config(32)


def test_unusable_file_that_cannot_be_moved_stays(monkeypatch):
    tuned.SHIPPED.mkdir()
    tuned.path(GPU, tuned.SHIPPED).write_text("{")

    def refuse(self, target):
        raise PermissionError(f"{self} cannot be moved")

    monkeypatch.setattr(type(tuned.SHIPPED), "replace", refuse)
    with pytest.warns(UserWarning, match="left where it is"):
        assert lookup() is None


@pytest.mark.parametrize("change", [{"block": 48}, {"block": 128}, {"warps": 0}, {"warps": "4"}, {"more": 1}])
def test_configuration_that_the_kernel_does_not_offer(change):
    values = config(32).to_dict() | change
    tuned.write(GPU, {(CONV, torch.bfloat16): tuned.Entry({"gemm": values}, {"triton gemm": 1e-5})})
    with pytest.warns(UserWarning, match="a tuned configuration of 'gemm' is not usable"):
        assert configs.choose("gemm", CONV, torch.bfloat16, ARCH) == config(16)
    assert tuned.backend_seconds(CONV, torch.bfloat16, torch.device("cpu")) == {"triton gemm": 1e-5}


def test_failed_write_leaves_the_file_as_it_was(monkeypatch):
    tuned.write(GPU, {(CONV, torch.bfloat16): entry()})
    before = file().read_bytes()

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(tuned.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tuned.write(GPU, {(CONV, torch.bfloat16): entry(64)})
    assert file().read_bytes() == before
    assert {f.suffix for f in file().parent.iterdir()} == {".json", ".lock"}


def write_many(first):
    for n in range(first, first + 20):
        tuned.write(GPU, {(Conv(n, 8, 5, 5, 16, 1, 1), torch.bfloat16): entry()})


def test_two_processes_write_at_a_time():
    processes = [multiprocessing.get_context("fork").Process(target=write_many, args=(n,)) for n in (1, 21)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert {shape.n for shape, _ in tuned.read(file(), GPU)} == set(range(1, 41))


def test_cache_folder(monkeypatch, tmp_path):
    assert settings.cache_folder() == tmp_path / "own"
    (tmp_path / "own").write_text("")
    with pytest.raises(InputError, match=r"RESNET_FUSED_CACHE must be a folder, .* got the file '.*/own'"):
        settings.cache_folder()
    monkeypatch.delenv("RESNET_FUSED_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(settings.cache_folder()) == "/somewhere/resnet_fused"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert settings.cache_folder().parts[-2:] == (".cache", "resnet_fused")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_have_their_shape(shape, dtype):
    call = sample(shape, dtype, torch.device("cpu"))
    with torch.inference_mode(), plan.record() as choices:
        y = call.run("reference")
        exact = call.to(torch.float64).run("reference")
    assert choices[0].shape == shape
    assert (*y.shape, 1, 1)[:4] == shape.output_shape
    assert (y.double() - exact).abs().max() < 0.1 * exact.abs().max()


class Gemm:
    """Kernels whose algorithms compute what the reference does; "wrong" is off by a little, "broken" raises."""

    def __init__(self, *algorithms):
        self.algorithms = algorithms

    def unsupported(self, shape, dtype, device):
        return None

    def candidates(self, shape, dtype, device):
        return [self.Candidate(name) for name in self.algorithms]

    @dataclass
    class Candidate:
        algorithm: str
        config: str = ""

    def conv_bn_act(self, *args, algorithm, config=None, **options):
        if algorithm == "broken":
            raise RuntimeError("no such instruction\nat line 3")
        y = rf.ops.conv_bn_act(*args, **options, backend="reference")
        if algorithm == "wrong":
            y[0, 0, 0, 0] += y.abs().max() / 8
        return y


@pytest.fixture
def kernels(monkeypatch):
    fake = Gemm("gemm", "wrong", "broken")
    for name in ("wrong", "broken"):
        monkeypatch.setitem(configs._kernels, name, (Config, lambda *_: [config(16)]))
    monkeypatch.setattr(plan, "GPU_KERNELS", {"triton": fake, "cuda": Gemm("implicit_gemm")})
    monkeypatch.setattr(tune, "triton", fake)
    monkeypatch.setattr(tune.cudnn, "unsupported", lambda *_: None)
    run = Sample.run
    monkeypatch.setattr(Sample, "run", lambda self, backend: run(self, "reference"))


def test_tune_keeps_the_fastest_that_are_right(kernels):
    asked = []

    def measure(calls, seconds):
        asked.append((list(calls), seconds))
        for call in calls.values():
            call()
        times = {"16": 9e-5, "32": 2e-5, "64": 2.2e-5}
        return {name: [1.0, times.get(name[13:15], 3e-5), 0.0] for name in calls}

    steps = []
    result = tune.tune(
        [CONV], torch.bfloat16, torch.device("cpu"), 4.0, lambda what, share: steps.append(share), measure
    )
    names = [f"triton gemm, {b}, 4 warps, 2 stages" for b in (16, 32, 64)]
    assert asked[0] == ([*names, "cuda implicit_gemm", "vendor cudnn"], 2.0)
    assert asked[1] == ([*names[1:], "cuda implicit_gemm", "vendor cudnn"], 2.0)
    assert steps == [0.0, 1.0]
    (found,) = result.shapes
    assert found.seconds == {"triton gemm": 2e-5, "cuda implicit_gemm": 3e-5, "vendor cudnn": 3e-5}
    assert found.configs == {"gemm": config(32)}
    (wrong, why), (broken, how) = found.rejected
    assert wrong == "triton wrong, 16, 4 warps, 2 stages"
    assert broken == "triton broken, 16, 4 warps, 2 stages"
    assert how == "RuntimeError: no such instruction"
    assert "error" in why
    assert result.path == file()
    assert lookup() == config(32)
    found = tuned.backend_seconds(CONV, torch.bfloat16, torch.device("cpu"))
    assert found == {"triton gemm": 2e-5, "cuda implicit_gemm": 3e-5, "vendor cudnn": 3e-5}


def test_tuned_times_decide_the_plan(kernels):
    cuda = torch.device("cuda")

    def choice():
        plan.choose.cache_clear()
        return plan.choose(CONV, torch.bfloat16, cuda, "auto", "strict", (0, "none", False))

    assert choice().backend == "vendor"
    tuned.write(GPU, {(CONV, torch.bfloat16): entry(**{"triton gemm": 2e-5, "vendor cudnn": 3e-5})})
    assert (choice().backend, choice().algorithm) == ("triton", "gemm")
    tuned.write(GPU, {(CONV, torch.bfloat16): entry(**{"triton gemm": 4e-5, "vendor cudnn": 3e-5})})
    assert choice().backend == "vendor"
    plan.choose.cache_clear()


def test_only_so_many_configurations_and_only_missing_shapes(kernels):
    asked = []

    def measure(calls, seconds):
        asked.append(list(calls))
        return {name: [1e-5] for name in calls}

    other = Conv(3, 8, 5, 5, 16, 1, 1)
    for shapes in ([CONV], [CONV, other]):
        tune.tune(shapes, torch.bfloat16, torch.device("cpu"), 1.0, measure=measure, most=2, missing=True)
    names = [f"triton gemm, {b}, 4 warps, 2 stages" for b in (16, 32)]
    assert asked[0] == [*names, "cuda implicit_gemm", "vendor cudnn"]
    assert len(asked) == 4  # twice each, CONV once
    assert {shape for shape, _ in tuned.read(file(), GPU)} == {CONV, other}


def test_kernels_are_compiled_in_other_processes_before_they_are_measured(monkeypatch):
    seen = []
    monkeypatch.setattr(tune, "tune_one", lambda shape, *_: seen.append(shape) or tune.Tuned(shape, {}, {}, ()))
    monkeypatch.setattr(tune, "compilers", fake_compilers(seen))
    tune.tune([CONV], torch.bfloat16, torch.device("cpu"), 1.0, measure=lambda *_: {}, workers=3, most=1)
    assert seen == [("compile", [CONV], torch.bfloat16, 1, 3, CONV), CONV]


def fake_compilers(seen):
    @contextlib.contextmanager
    def compilers(shapes, dtype, device, most, workers):
        yield lambda shape: seen.append(("compile", shapes, dtype, most, workers, shape))

    return compilers


def test_parts_of_the_contenders(kernels, monkeypatch):
    """The processes that compile take every Triton kernel once between them, and one that fails stops nothing."""
    ran = []
    named = [
        tune.Contender("triton", f"a{i}", None, lambda i=i: ran.append(i) or (1 / 0 if i == 2 else None))
        for i in range(5)
    ]
    named.insert(1, tune.Contender("cuda", "conv", None, lambda: ran.append("cuda")))
    monkeypatch.setattr(tune, "contenders", lambda *_: iter(named))
    for part in range(2):
        tune._compile_part(CONV, torch.bfloat16, torch.device("cpu"), None, part, 2)
    assert ran == [0, 2, 4, 1, 3]


def test_what_compiles_does_not_run(monkeypatch):
    """On a GPU's own Triton: a kernel is called as ever, and stops before its launch."""
    from triton.runtime.jit import JITFunction

    asked = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **options: asked.append((args, options)))
    tune._only_compile()
    kernel = JITFunction.__new__(JITFunction)
    kernel[(1, 2)]("x", BLOCK=16)
    kernel.run("x", grid=(1,), warmup=False)
    assert asked == [(("x",), {"grid": (1, 2), "warmup": True, "BLOCK": 16}), (("x",), {"grid": (1,), "warmup": True})]


def test_samples_without_values_have_the_same_form():
    for shape in SHAPES:
        one, other = (sample(shape, torch.bfloat16, torch.device("cpu"), values) for values in (True, False))
        assert form(one.args) == form(other.args)
        assert form(one.kernel_options) == form(other.kernel_options)


def form(value):
    """What of a value decides how a kernel is compiled."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.stride()
    if isinstance(value, dict):
        return {name: form(item) for name, item in value.items()}
    return [form(item) for item in value] if isinstance(value, (tuple, list)) else value


@pytest.mark.thorough
def test_compilers_are_processes():
    with tune.compilers([CONV], torch.bfloat16, torch.device("cpu"), 1, 2) as wait_for:
        wait_for(CONV)
        children = multiprocessing.active_children()
        assert len(children) == 2
    assert all(not child.is_alive() for child in children)


def test_tune_leaves_out_what_was_fatal(kernels, tmp_path, monkeypatch):
    measure = lambda calls, seconds: {name: [1e-5] for name in calls}  # noqa: E731
    arguments = ([CONV], torch.bfloat16, torch.device("cpu"), 1.0)

    def lost(culprit):
        if "broken" in culprit:
            raise BackendError("lost")

    with monkeypatch.context() as patch, pytest.raises(BackendError, match="lost"):
        patch.setattr("resnet_fused.attempts.check_gpu", lost)
        patch.setattr(tune, "check_gpu", lost)
        tune.tune(*arguments, measure=measure, folder=tmp_path)
    (found,) = tune.tune(*arguments, measure=measure, folder=tmp_path).shapes
    assert set(found.seconds) == {"triton gemm", "cuda implicit_gemm", "vendor cudnn"}
    assert [why[:42] for name, why in found.rejected if "broken" in name] == [
        "BackendError: an earlier process hung or d"
    ]
    assert not found.seconds.keys() & {"triton broken"}


def test_timing_that_fails_leaves_the_shape_without_times(kernels, tmp_path):
    def measure(calls, seconds):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    (found,) = tune.tune([CONV], torch.bfloat16, torch.device("cpu"), 1.0, measure=measure, folder=tmp_path).shapes
    assert found.seconds == {} and found.configs == {}
    assert found.rejected[-1] == ("timing", "RuntimeError: operation not permitted when stream is capturing")


def test_tune_refuses():
    with pytest.raises(InputError, match="dtype must be one of float32, bfloat16, float16, got"):
        tune.tune([CONV], torch.float64, torch.device("cpu"))
    with pytest.raises(BackendError, match="tuning needs a CUDA GPU, the device is cpu"):
        tune.tune([CONV], torch.float32, torch.device("cpu"))


def test_shapes_of_a_model():
    found = tune.shapes_of(rf.fuse(tiny()), images())
    assert len(found) == len(set(found))
    assert [shape.op for shape in found if shape.op != "conv"] == [
        "stem",
        *["bottleneck"] * 2,
        *["basic_block"] * 2,
        "head",
    ]
    assert Conv(2, 32, 8, 8, 8, 1, 1) in found


def test_dense_layers_have_shapes_of_their_own():
    block = DenseBlock(2, 8, 5, 5, 4, 2, 8)
    layers = [DenseBlock(2, 8, 5, 5, 4, 1, 8), DenseBlock(2, 12, 5, 5, 4, 1, 8)]
    assert [shape for shape in tune.parts_of(block) if shape.op == "dense_block"] == [*layers, block]


def test_shipped_files_are_usable():
    for shipped in (tuned.SHIPPED.parent / "configs").glob("*.json"):
        content = json.loads(shipped.read_text())
        assert tuned.path(content["gpu"], shipped.parent).name == shipped.name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_timer():
    x = torch.zeros(1, device="cuda")
    samples = gpu_timer.interleave({"a": lambda: x.add_(1), "b": lambda: None}, 0.1, torch.device("cuda", 0))
    assert len(samples["a"]) == len(samples["b"]) >= gpu_timer.MIN_ROUNDS
    assert min(samples["a"] + samples["b"]) > 0
    assert x.item() == 3 + len(samples["a"])
