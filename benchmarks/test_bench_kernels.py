"""pytest-benchmark form of the kernel benchmark, on a GPU: `pytest benchmarks/test_bench_kernels.py`.

Every run includes the host's work, unlike `python benchmarks/kernels.py`; the L2 cache stays warm.
"""

import kernels
import pytest
import torch

from resnet_fused.samples import describe, sample

BATCH = 32
DTYPE = torch.bfloat16

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def pytest_generate_tests(metafunc):
    """One test for every distinct shape of the models and every contender; nothing is built where there is no GPU."""
    cases = []
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        shapes = [s for name, size in kernels.MODELS.items() for s in kernels.model_shapes(name, BATCH, size)]
        for shape in dict.fromkeys(shapes):
            names = kernels.contenders(sample(shape, DTYPE, device), DTYPE, device, compiled=True)
            cases += [pytest.param(shape, name, id=f"{describe(shape)}-{name}") for name in names]
    metafunc.parametrize(("shape", "name"), cases)


def test_kernel(shape, name, benchmark):
    device = torch.device("cuda", torch.cuda.current_device())
    call = kernels.contenders(sample(shape, DTYPE, device), DTYPE, device, compiled=True)[name]

    def run():
        call()
        torch.cuda.synchronize()

    benchmark.group = describe(shape)
    with torch.inference_mode():
        benchmark.pedantic(run, rounds=20, warmup_rounds=3)
