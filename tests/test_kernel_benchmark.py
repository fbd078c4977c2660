"""The kernel benchmark without a GPU: shapes, roofline, ratios, what kernels are compared with, the table."""

import faulthandler
import functools
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from test_tune import SHAPES

from resnet_fused import plan
from resnet_fused.samples import describe, sample
from resnet_fused.shapes import Bottleneck, Conv, DenseBlock, Stem, Transition

FOLDER = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def kernels():
    spec = importlib.util.spec_from_file_location("kernel_benchmark", FOLDER / "kernels.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_shapes_of_models(kernels):
    found = {name: kernels.model_shapes(name, 8, size) for name, size in kernels.MODELS.items()}
    assert all(shape.n == 8 for shapes in found.values() for shape in shapes)
    assert all(len(shapes) == len(set(shapes)) for shapes in found.values())
    resnet50 = found["resnet50"]
    assert Stem(8, 3, 224, 224, 64, 7, 7) in resnet50
    assert Bottleneck(8, 256, 56, 56, 64, 256) in resnet50
    assert Bottleneck(8, 1024, 14, 14, 512, 2048, stride2=2, projection=True) in resnet50
    assert Conv(8, 64, 56, 56, 256, 1, 1, residual=True) in resnet50
    assert sum(isinstance(shape, Bottleneck) for shape in resnet50) == 8
    assert DenseBlock(8, 64, 56, 56, 32, 6, 128) in found["densenet121"]
    assert Transition(8, 256, 56, 56, 128) in found["densenet121"]
    assert {shape.c for shape in found["resnet56_cifar"] if shape.op == "basic_block"} == {16, 32, 64}


def test_flops_and_traffic(kernels):
    conv = Conv(2, 64, 56, 56, 256, 1, 1, residual=True)
    assert kernels.flops(conv) == 2 * 2 * 56 * 56 * 64 * 256
    assert kernels.traffic(conv, 2) == 2 * (2 * 56 * 56 * (64 + 256 + 256) + 64 * 256)
    block = Bottleneck(1, 256, 56, 56, 64, 256)
    assert kernels.flops(block) == block.flops
    assert kernels.traffic(block, 2) == 2 * (2 * 56 * 56 * 256 + 64 * 256 * 2 + 9 * 64 * 64)
    assert kernels.flops(Transition(1, 64, 8, 8, 32)) == 2 * 16 * 64 * 32


def test_roofline(kernels):
    ceiling = kernels.Roofline(bytes_per_second=3e12, flops_per_second=8e14)
    pointwise, late = Conv(128, 64, 56, 56, 256, 1, 1), Conv(128, 512, 7, 7, 512, 3, 3, padding=(1, 1))
    assert ceiling.bound(pointwise, 2) == "memory"
    assert ceiling.seconds(pointwise, 2) == pytest.approx(kernels.traffic(pointwise, 2) / 3e12)
    assert ceiling.bound(late, 2) == "compute"
    assert ceiling.seconds(late, 2) == pytest.approx(late.flops / 8e14)
    line = kernels.row(late, "a", [3e-4, 1e-4, 2e-4], ceiling, 2)
    assert line["us"] == pytest.approx(200)
    assert line["tflops"] == pytest.approx(late.flops / 2e-4 / 1e12)
    assert line["roofline"] == pytest.approx(late.flops / 8e14 / 2e-4)


def test_roofline_is_measured_in_the_same_run(kernels, monkeypatch):
    asked = []

    def measure(calls, seconds):
        asked.append(set(calls))
        return {"copy": [1e-3, 2e-3], "product": [2e-3]}

    monkeypatch.setattr(kernels.torch, "empty", lambda *size, **options: SimpleNamespace(numel=lambda: 1 << 30))
    monkeypatch.setattr(kernels.torch, "empty_like", lambda t: t)
    monkeypatch.setattr(kernels.torch, "randn", lambda *size, **options: torch.zeros(1))
    ceiling = kernels.roofline(torch.bfloat16, CPU, measure)
    assert asked == [{"copy", "product"}]
    assert ceiling.bytes_per_second == pytest.approx(2 * 2**30 / 1e-3)
    assert ceiling.flops_per_second == pytest.approx(2 * 8192**3 / 2e-3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eager_computes_the_same(kernels, shape):
    call = sample(shape, torch.float32, CPU)
    assert torch.allclose(kernels.eager(call), call.run("reference"), atol=1e-4, rtol=1e-4)


def test_run_ratios_and_table(kernels, monkeypatch):
    shapes = [SHAPES[0], SHAPES[2]]
    fake = SimpleNamespace(
        unsupported=lambda *_: None,
        candidates=lambda *_: [SimpleNamespace(algorithm="gemm")],
        conv_bn_act=lambda *args, algorithm, **options: torch.zeros(1),
        bottleneck=lambda *args, algorithm, **options: torch.zeros(1),
    )
    monkeypatch.setattr(plan, "GPU_KERNELS", {"triton": fake})
    monkeypatch.setattr(kernels.cudnn, "unsupported", lambda *_: "it runs on CUDA GPUs")
    monkeypatch.setattr(kernels, "roofline", lambda *_: kernels.Roofline(1e12, 1e14))
    monkeypatch.setattr(kernels.torch, "compile", lambda function, dynamic: function)

    def measure(calls, seconds):
        for call in calls.values():
            call()
        return {name: [1e-5 if name == "triton gemm" else 3e-5] for name in calls}

    result = kernels.run(shapes, torch.bfloat16, CPU, 1.0, True, measure)
    assert [(line["name"], line["op"]) for line in result["rows"]] == [
        (name, op) for op in ("conv", "bottleneck") for name in ("eager channels_last", "torch.compile", "triton gemm")
    ]
    assert [line["vs_eager"] for line in result["rows"][:3]] == pytest.approx([1, 1, 3])
    assert result["rows"][2]["vs_compile"] == pytest.approx(3)
    assert result["rows"][2]["vs_cudnn"] is None
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(kernels.table(result, {str(shape): describe(shape) for shape in shapes}))
    text = console.export_text()
    assert "conv 1x1 2x8x5x5 -> 16" in text
    assert "bottleneck 2x8x5x5 -> 8 -> 16 projection" in text
    assert "3.00" in text


def test_a_kernel_that_fails_is_told_and_the_others_are_measured(kernels, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("out of registers\nmore")

    fake = SimpleNamespace(
        unsupported=lambda *_: None, candidates=lambda *_: [SimpleNamespace(algorithm="gemm")], conv_bn_act=fail
    )
    monkeypatch.setattr(plan, "GPU_KERNELS", {"triton": fake})
    monkeypatch.setattr(kernels, "roofline", lambda *_: kernels.Roofline(1e12, 1e14))
    measure = lambda calls, seconds: {name: [1e-5] for name in calls}  # noqa: E731
    result = kernels.run([SHAPES[0]], torch.bfloat16, CPU, 1.0, False, measure)
    assert [line["name"] for line in result["rows"]] == ["eager channels_last"]
    assert result["failed"] == [
        {"shape": str(SHAPES[0]), "name": "triton gemm", "why": "RuntimeError: out of registers"}
    ]


def test_goes_on_with_an_earlier_result(kernels, monkeypatch):
    """After every shape the result is kept; a shape whose timing fails does not end the run."""
    monkeypatch.setattr(plan, "GPU_KERNELS", {})
    monkeypatch.setattr(kernels, "roofline", lambda *_: kernels.Roofline(1e12, 1e14))
    kept = []

    def measure(calls, seconds):
        if len(kept) == 1:
            raise RuntimeError("no graph\nmore")
        return {name: [1e-5] for name in calls}

    def keep(result):
        kept.append(json.loads(json.dumps(result)))

    run = functools.partial(kernels.run, dtype=torch.float32, device=CPU, seconds=0.0, compiled=False, keep=keep)
    result = run(SHAPES[:3], measure=measure)
    assert [len(each["shapes"]) for each in kept] == [1, 2, 3]
    assert [line["shape"] for line in result["rows"]] == [str(SHAPES[0]), str(SHAPES[2])]
    assert result["failed"] == [{"shape": str(SHAPES[1]), "name": "timing", "why": "RuntimeError: no graph"}]
    monkeypatch.setattr(kernels, "roofline", lambda *_: pytest.fail("it was measured before"))
    further = run(SHAPES[:4], measure=lambda calls, seconds: {name: [2e-5] for name in calls}, result=kept[0])
    assert further["shapes"] == [str(shape) for shape in SHAPES[:4]]
    assert [line["us"] for line in further["rows"]] == pytest.approx([10, 20, 20, 20])


def test_a_kernel_that_was_fatal_is_left_out(kernels, monkeypatch, tmp_path):
    fake = SimpleNamespace(
        unsupported=lambda *_: None,
        candidates=lambda *_: [SimpleNamespace(algorithm="gemm")],
        conv_bn_act=lambda *args, algorithm, **options: torch.zeros(1),
    )
    monkeypatch.setattr(plan, "GPU_KERNELS", {"triton": fake})
    calls = kernels.contenders(sample(SHAPES[0], torch.float32, CPU), torch.float32, CPU, compiled=False)
    attempts = kernels.Attempts(tmp_path / "attempts")
    begun = attempts.attempt("here: triton gemm")
    begun.__enter__()  # and the process ends
    good, bad = kernels.split(calls, kernels.Attempts(tmp_path / "attempts"), "here")
    assert "triton gemm" not in good and "hung or died in it" in bad["triton gemm"]
    good, bad = kernels.split(calls, kernels.Attempts(tmp_path / "attempts"), "elsewhere")
    assert "triton gemm" in good and not bad
    faulthandler.cancel_dump_traceback_later()


def test_every_contender_is_called_with_what_it_takes(kernels):
    for shape in SHAPES:
        call = sample(shape, torch.float32, CPU)
        found = kernels.contenders(call, torch.float32, CPU, compiled=False)
        assert isinstance(found[kernels.EAGER], functools.partial)
        assert (*found[kernels.EAGER]().shape, 1, 1)[:4] == shape.output_shape


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_without_a_gpu(kernels, capsys):
    assert kernels.main([]) == 2
    assert "error: the kernel benchmark needs a CUDA GPU" in capsys.readouterr().err


def test_refuses_an_unknown_model(kernels, capsys):
    assert kernels.main(["resnet7"]) == 2
    assert "MODEL must be one of" in capsys.readouterr().err
