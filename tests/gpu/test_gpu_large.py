"""Tensors of more than 2**31 elements: offsets in 64 bits. Needs some 24 GB of GPU memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from resnet_fused import plan
from resnet_fused.samples import Sample, sample
from resnet_fused.shapes import BasicBlock, Bottleneck, Conv, DenseBlock, Shape, Transition

ENDS = 8
"""Images at each end that hold numbers; the others are zeros."""
SHAPES: list[Shape] = [
    Conv(2**15, 1024, 9, 9, 16, 1, 1),
    Conv(2**15, 16, 9, 9, 1024, 1, 1, residual=True),
    Conv(2**15, 1024, 9, 9, 16, 3, 3, padding=(1, 1)),
    Conv(2**15, 32, 9, 9, 1024, 3, 3, padding=(1, 1)),
    Bottleneck(2**15, 1024, 9, 9, 16, 1024),
    BasicBlock(2**15, 1024, 9, 9, 1024, 1024),
    DenseBlock(2**15, 1008, 9, 9, 16, 1, 64),
    Transition(2**15, 1024, 9, 9, 32),
]


def large(shape: Shape, device: torch.device) -> tuple[Sample, Sample]:
    """A call on zeros but for the images at both ends, and the call on those images alone."""
    small = sample(replace(shape, n=2 * ENDS), torch.bfloat16, device)

    def spread(image: Tensor) -> Tensor:
        whole = torch.zeros(shape.n, *image.shape[1:], dtype=image.dtype, device=device)
        whole = whole.contiguous(memory_format=torch.channels_last)
        whole[:ENDS], whole[-ENDS:] = image[:ENDS], image[ENDS:]
        return whole

    images = [isinstance(t, Tensor) and t.dim() == 4 and t.shape[0] == 2 * ENDS for t in small.args]
    args = [spread(t) if image else t for t, image in zip(small.args, images, strict=True)]
    return replace(small, shape=shape, args=tuple(args)), small


@pytest.mark.large
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_more_than_2_to_the_31_elements(shape: Shape, backend: str, gpu: torch.device) -> None:
    if torch.cuda.mem_get_info(gpu)[0] < 24 << 30:
        pytest.skip("needs 24 GB of free GPU memory")
    kernels = plan.GPU_KERNELS.get(backend)
    if kernels is None:
        pytest.skip("cuDNN's kernels are not ours to test")
    if why := kernels.unsupported(shape, torch.bfloat16, gpu):
        pytest.skip(why)
    call, small = large(shape, gpu)
    with torch.inference_mode():
        exact = small.to(torch.float64).run("reference")
        allowed = 2 * (small.run("reference").double() - exact).abs().max() + 2.0**-8 * exact.abs().max()
        for algorithm in kernels.candidates(shape, torch.bfloat16, gpu):
            y = call.run_kernel(kernels, algorithm.algorithm)
            ends = torch.cat([y[:ENDS], y[-ENDS:]]).double()
            error = (ends - exact).abs().max()
            assert error <= allowed, f"{algorithm.algorithm}: error {error:.3g}, allowed {allowed:.3g}"
            assert torch.equal(y[ENDS], y[shape.n // 2]), f"{algorithm.algorithm}: images of zeros differ"
            del y
    torch.cuda.empty_cache()
