"""pytest-benchmark form of the kernel benchmark: `pytest benchmarks/test_bench_kernels.py`.

On a GPU every run includes the host's work, unlike `python benchmarks/kernels.py`, and the L2 cache stays warm. Without
one, the CPU kernels are timed on the convolutions of ResNet-18 and ResNet-50. Every result names its contender, and
those of the package their reference, so that baseline.py can compare ratios.
"""

from collections.abc import Callable
from functools import partial

import kernels
import pytest
import torch
from torch import Tensor

from resnet_fused import plan
from resnet_fused.kernels import cpu
from resnet_fused.samples import describe, sample
from resnet_fused.shapes import Conv, Shape

ON_GPU = torch.cuda.is_available()
BATCH = 32 if ON_GPU else 4
DTYPES = {"bf16": torch.bfloat16} if ON_GPU else {"fp32": torch.float32, "bf16": torch.bfloat16}
MODELS = kernels.MODELS if ON_GPU else {"resnet18": 224, "resnet50": 224}
VENDOR = "vendor onednn"


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if ON_GPU else torch.device("cpu")


def on_gpu(shape: Shape, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Everyone who computes a shape on a GPU, by name."""
    return kernels.contenders(sample(shape, dtype, device()), dtype, device(), compiled=True)


def names(shape: Shape, dtype: torch.dtype) -> list[str]:
    """Of everyone who computes a shape."""
    if ON_GPU:
        return list(on_gpu(shape, dtype))
    mine = plan.algorithms(shape, dtype, "fast") if cpu.unsupported(dtype, device()) is None else ()
    return [kernels.EAGER, VENDOR, *(f"cpu {algorithm}" for algorithm in mine)]


def contender(shape: Shape, dtype: torch.dtype, name: str) -> Callable[[], Tensor]:
    """One of them, as a call."""
    if ON_GPU:
        return on_gpu(shape, dtype)[name]
    call = sample(shape, dtype, device())
    if name == kernels.EAGER:
        return partial(kernels.eager, call)
    return partial(call.run, "vendor") if name == VENDOR else partial(call.run_kernel, cpu, name.removeprefix("cpu "))


def pytest_generate_tests(metafunc):
    """One test for every distinct shape of the models, dtype and contender; a shape's run side by side."""
    shapes = [s for name, size in MODELS.items() for s in kernels.model_shapes(name, BATCH, size)]
    cases = [
        pytest.param(shape, dtype, name, id=f"{describe(shape)}-{dtype}-{name}")
        for shape in dict.fromkeys(s for s in shapes if ON_GPU or isinstance(s, Conv))
        for dtype in DTYPES
        for name in names(shape, DTYPES[dtype])
    ]
    metafunc.parametrize(("shape", "dtype", "name"), cases)


def test_kernel(shape, dtype, name, benchmark):
    call = contender(shape, DTYPES[dtype], name)

    def run():
        call()
        if ON_GPU:
            torch.cuda.synchronize()

    benchmark.group = f"{describe(shape)} {dtype}"
    reference = None if name in (kernels.EAGER, kernels.COMPILED) else kernels.EAGER
    benchmark.extra_info.update(contender=name, reference=reference)
    with torch.inference_mode():
        benchmark.pedantic(run, rounds=20, warmup_rounds=3)
