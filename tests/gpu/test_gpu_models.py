"""Whole models on a GPU, fused with every backend: parity block by block, graphs, torch.compile."""

from __future__ import annotations

import pytest
import torch
from nets import tiny

import resnet_fused as rf

NO_FIRST_LAYER = ("resnet56_cifar", "preact_resnet164_cifar")
"""Models whose first layer, of 3 channels and without a pooling behind it, no CUDA kernel takes."""
MODELS = {"resnet18": 64, "resnet50": 64, "densenet121": 64, "resnet56_cifar": 32, "preact_resnet164_cifar": 32}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def made(name: str, dtype: torch.dtype, device: torch.device) -> tuple[torch.nn.Module, torch.Tensor]:
    model = rf.models.randomize_batchnorms(rf.models.build(name)).eval().to(device, dtype)
    x = torch.randn(4, 3, MODELS[name], MODELS[name], device=device).to(dtype)
    return model, x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_parity(name: str, dtype: str, backend: str, gpu: torch.device, request: pytest.FixtureRequest) -> None:
    if not {dtype, "tf32" if dtype == "fp32" else dtype} & set(request.config.getoption("--dtypes").split(",")):
        pytest.skip(f"{dtype} was not asked for")
    if backend == "cuda" and name in NO_FIRST_LAYER:
        pytest.skip("its first layer has no CUDA kernel")
    model, x = made(name, DTYPES[dtype], gpu)
    report = rf.verify(model, rf.fuse(model, backend=backend), x)
    assert report.ok, f"\n{report}"


def test_parity_of_a_small_model(backend: str, device: torch.device) -> None:
    model, x = tiny().to(device), torch.randn(2, 3, 32, 32, device=device)
    report = rf.verify(model, rf.fuse(model, backend=backend), x)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("name", MODELS)
def test_auto_takes_what_there_is(name: str, gpu: torch.device) -> None:
    model, x = made(name, torch.bfloat16, gpu)
    fused = rf.fuse(model)
    report = rf.verify(model, fused, x)
    assert report.ok, f"\n{report}"
    assert {row.kernel for row in rf.explain(fused, x).rows} != {"unfused"}


@pytest.mark.parametrize("name", ["resnet50", "densenet121"])
def test_cuda_graph_and_compile(name: str, backend: str, gpu: torch.device) -> None:
    model, x = made(name, torch.bfloat16, gpu)
    fused = rf.fuse(model, backend=backend)
    with torch.inference_mode():
        expected = fused(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            fused(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = fused(x)
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected)
        torch.compiler.reset()
        compiled = torch.compile(fused, fullgraph=True)(x)
        error = (compiled.double() - expected.double()).abs().max()
        assert error <= 2.0**-6 * expected.double().abs().max()
