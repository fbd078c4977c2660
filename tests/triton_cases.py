"""Small calls of every Triton kernel with awkward sizes, and what they must give: what the guard and the mutants run.

A call is checked with small integers, which must come out bit for bit, with random numbers by the parity rule, and with
a NaN and an infinity, which must reach what they reach in torch and nothing else. Batches, images and channels leave
ragged tiles; grids have several programs, and persistent ones several tiles each. Calls on more than 2**31 elements run
one program, in virtual memory.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")

import interpreter_guard
import torch
from torch import Tensor

from resnet_fused import samples
from resnet_fused.kernels import triton as kernels
from resnet_fused.kernels.triton import configs
from resnet_fused.kernels.triton.block_configs import (
    BandConfig,
    HeadConfig,
    RotatedConfig,
    StemConfig,
    TransitionConfig,
)
from resnet_fused.kernels.triton.layer_configs import ImplicitGemmConfig, PointwiseConfig, TmaConvConfig
from resnet_fused.samples import Sample
from resnet_fused.shapes import (
    BasicBlock,
    Bottleneck,
    BottleneckChain,
    Conv,
    DenseBlock,
    Head,
    Shape,
    Stem,
    Transition,
)

CPU = torch.device("cpu")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


class _Integers(samples._Random):
    """Tensors in the place of the random ones for which no sum and no intermediate needs rounding, in bfloat16 too."""

    def __init__(self, dtype: torch.dtype, scales: tuple[float, ...]) -> None:
        super().__init__(dtype, CPU)
        self.scales = torch.tensor(scales)

    def _whole(self, low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high + 1, size, generator=self.generator).float()

    def image(self, *size: int) -> Tensor:
        return self._whole(-2, 2, *size).to(self.dtype).contiguous(memory_format=torch.channels_last)

    def weight(self, k: int, c: int, r: int, s: int) -> Tensor:
        """Two of the weights of an output channel are 1 or -1."""
        flat = torch.zeros(k, c * r * s)
        for _ in range(2):
            at = torch.randint(c * r * s, (k, 1), generator=self.generator)
            flat.scatter_(1, at, self._whole(0, 1, k, 1) * 2 - 1)
        return flat.view(k, c, r, s).to(self.dtype)

    def scale(self, k: int) -> Tensor:
        return self.scales[torch.randint(len(self.scales), (k,), generator=self.generator)]

    def shift(self, k: int) -> Tensor:
        return self._whole(-1, 1, k)


@dataclass(frozen=True)
class Case:
    """A call of a kernel.

    Attributes:
        kernel: algorithm.
        shape: of the layer or block.
        config: of the kernel.
        dtype: of the images.
        capability: of the GPU that the CPU is taken for.
        scales: for the integers; a chain of layers grows with them.
        channels_before: makes x (and the output) a slice of channels behind so many others.
        tf32: whether float32 products are of TF32.
        isolated: whether a NaN reaches only what it reaches in torch; groups that are computed as one share it.
    """

    kernel: str
    shape: Shape
    config: configs.Config
    dtype: torch.dtype = BF16
    capability: tuple[int, int] = (9, 0)
    scales: tuple[float, ...] = (1.0, 2.0, -1.0)
    channels_before: int = 0
    tf32: bool = False
    isolated: bool = True
    run: Callable[[Case, Sample], tuple[Tensor, ...]] | None = field(default=None, compare=False)
    exact: Callable[[Sample], tuple[Tensor, ...]] | None = field(default=None, compare=False)

    def __str__(self) -> str:
        name = f"{self.kernel} {str(self.dtype)[6:]} sm_{self.capability[0]}{self.capability[1]}"
        return f"{name} {self.shape}".replace(", ", " ").replace(" False", "").replace("=", "")


@contextlib.contextmanager
def on_gpu(case: Case, multiprocessors: int = 3) -> Iterator[None]:
    """Have the CPU taken for a GPU of the case's kind with few multiprocessors, so that programs get several tiles."""
    arch = configs.Architecture("test", case.capability, multiprocessors, 2**30, 50 << 20)
    switch = torch.backends.mkldnn.conv
    before, switch.fp32_precision = switch.fp32_precision, "tf32" if case.tf32 else "ieee"
    few = mock.Mock(return_value=multiprocessors)
    with (
        mock.patch.object(configs, "SM90", arch),
        mock.patch.object(PointwiseConfig, "resident_blocks", few),
        mock.patch.object(TmaConvConfig, "resident_blocks", few),
    ):
        configs.architecture.cache_clear()
        try:
            yield
        finally:
            configs.architecture.cache_clear()
            switch.fp32_precision = before


def _run(case: Case, call: Sample) -> tuple[Tensor, ...]:
    more: dict[str, Any] = {"config": case.config}
    if case.channels_before:
        first, *rest = call.args
        call = replace(call, args=(_slice(first, case.channels_before), *rest))
        more["out"] = _slice(torch.empty(case.shape.output_shape, dtype=case.dtype), case.channels_before)
    return (call.run_kernel(kernels, case.kernel, **more),)


def _slice(x: Tensor, before: int) -> Tensor:
    """x's values in the channels from `before` on of a wider image, NaN around them."""
    n, c, h, w = x.shape
    wide = torch.full((n, before + c + 8, h, w), float("nan"), dtype=x.dtype)
    wide = wide.contiguous(memory_format=torch.channels_last)
    wide[:, before : before + c] = x
    return wide[:, before : before + c]


def _reference(call: Sample) -> tuple[Tensor, ...]:
    return (call.run("reference"),)


VALUES = ("integers", "random", "special")


def make(case: Case, values: str) -> Sample:
    """The case's arguments: small integers, random numbers, or the latter with a NaN and an infinity in the image."""
    random = _Integers(case.dtype, case.scales) if values == "integers" else samples._Random(case.dtype, CPU)
    call = samples._MAKERS[type(case.shape)](case.shape, random)
    if values == "special":
        x = call.args[0]
        x[0, 0, x.shape[2] // 2, x.shape[3] // 2 + 1] = float("nan")
        x[-1, -1, 0, 0] = float("inf")
        carrier = -1
        for w in _weights(call):
            # Of every intermediate only channel 0 becomes infinite: sums of several would be NaN in any case.
            if w is not None and w.shape[1] > 1:
                w[:, carrier] = -w[:, carrier].abs()
                w[0, carrier] = w[0, carrier].abs()
                carrier = 0
    return call


def _weights(call: Sample) -> Sequence[Tensor | None]:
    """The weights on the path of a residual block."""
    if isinstance(call.shape, BottleneckChain):
        return call.args[1]
    return call.args[1:6:2] if isinstance(call.shape, Bottleneck | BasicBlock) else ()


def check(case: Case, values: str) -> None:
    """Run the case and compare.

    Raises:
        AssertionError: it is wrong.
    """
    call = make(case, values)
    exact_call, reference = call.to(torch.float64), case.exact or _reference
    with on_gpu(case), torch.inference_mode():
        given = (case.run or _run)(case, call)
    with torch.inference_mode():
        exact, rounded = reference(exact_call), reference(call)
    for y, e, r in zip(given, exact, rounded, strict=True):
        assert y.dtype == case.dtype
        assert y.shape == e.shape
        if values == "integers":
            assert torch.equal(e.to(case.dtype).double(), e), "the case is not exact"
            assert torch.equal(y.double(), e), f"{(y.double() != e).sum()} of {e.numel()} wrong"
        elif values == "special":
            assert (y.isnan() >= r.isnan()).all(), "a NaN was lost"
            if not case.isolated:
                continue
            assert torch.equal(y.isnan(), r.isnan()), f"{y.isnan().sum()} NaN, the reference has {r.isnan().sum()}"
            assert torch.equal(y.isinf(), r.isinf()), f"{y.isinf().sum()} infinite, in the reference {r.isinf().sum()}"
        else:
            error, allowed = (y.double() - e).abs().max().item(), (r.double() - e).abs().max().item()
            tiny = (torch.finfo(case.dtype).eps / 2 + 2.0**-9 * case.tf32) * e.abs().max().item()
            assert error <= 2 * allowed + tiny, f"error {error:.3g}, the reference's {allowed:.3g}"


# --- runs that are not one op -------------------------------------------------------------------------------------


def _project(case: Case, call: Sample) -> tuple[Tensor, ...]:
    """The end of the bottleneck, its last convolution and its projection in one accumulator; h is some of x."""
    x, *_, w3, b3, wd, bd = call.args
    h = x[:, : w3.shape[1]].contiguous(memory_format=torch.channels_last)
    stride = call.options["stride"]
    h = h[:, :, ::stride, ::stride].contiguous(memory_format=torch.channels_last)
    s3, sd = call.options["s3"], _with_zero(call.options["sd"])
    y = kernels.project(h, w3, s3, b3, x, wd, sd, bd, stride=stride, algorithm=case.kernel, config=case.config)
    return (y,)


def _with_zero(scale: Tensor) -> Tensor:
    """The projection's scale, zero in one channel, where the sums cannot be divided by it."""
    return torch.cat([torch.zeros_like(scale[:1]), scale[1:]])


def _project_reference(call: Sample) -> tuple[Tensor, ...]:
    x, *_, w3, b3, wd, bd = call.args
    stride = call.options["stride"]
    h = x[:, : w3.shape[1], ::stride, ::stride]
    conv = torch.nn.functional.conv2d
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    vectors = [v[:, None, None] for v in (call.options["s3"], b3, _with_zero(call.options["sd"]), bd)]
    y = conv(h.to(wide), w3.to(wide)) * vectors[0] + vectors[1]
    y = y + conv(x.to(wide), wd.to(wide), stride=stride) * vectors[2] + vectors[3]
    return (y.relu().to(x.dtype),)


# --- the cases ----------------------------------------------------------------------------------------------------

gemm = partial(ImplicitGemmConfig, block_m=32, block_n=16, block_k=16, warps=4, stages=2)
pointwise = partial(
    PointwiseConfig, block_m=32, block_n=32, block_k=16, parts=1, persistent=True, flatten=False, warps=4, stages=2
)
boxes = partial(TmaConvConfig, block_n=32, block_k=16, warps=4, stages=2)
band = partial(
    BandConfig, block_m=32, block_n=32, block_c=16, block_k=16, tiles=2, programs=1, tma=True, warps=4, stages=2
)
OLD = {"capability": (8, 0)}
SAME = {"padding": (1, 1)}

LAYERS = [
    Case("implicit_gemm", Conv(2, 24, 5, 7, 40, 3, 3, (2, 1), (1, 2), (2, 3), residual=True), gemm()),
    Case("implicit_gemm", Conv(2, 24, 5, 7, 40, 1, 1, residual=True, prologue=True), gemm(), channels_before=8),
    Case("implicit_gemm", Conv(1, 24, 5, 7, 20, 3, 3, **SAME, prologue=True), gemm(), FP32),
    Case("implicit_gemm", Conv(2, 3, 9, 7, 20, 5, 3, (2, 2), (2, 1)), gemm(block_k=32), FP16),
    Case("implicit_gemm", Conv(1, 36, 5, 5, 24, 3, 3, **SAME, groups=2), gemm(), isolated=False),
    Case("implicit_gemm", Conv(1, 144, 3, 3, 144, 3, 3, **SAME, groups=2), gemm(block_n=64, block_k=64)),
    Case("implicit_gemm", Conv(1, 40, 5, 5, 24, 3, 3, **SAME, residual=True), gemm(split=4)),
    Case("implicit_gemm", Conv(1, 40, 3, 5, 24, 1, 1, padding=(1, 0)), gemm(), FP32, tf32=True),
    Case(
        "implicit_gemm", Bottleneck(2, 24, 5, 5, 16, 40, stride2=2, projection=True), gemm(), BF16,
        run=_project, exact=_project_reference,
    ),
    Case("pointwise", Conv(3, 40, 5, 7, 72, 1, 1, residual=True), pointwise()),
    Case("pointwise", Conv(2, 40, 5, 7, 72, 1, 1, prologue=True), pointwise(block_n=64, parts=4), channels_before=16),
    Case("pointwise", Conv(2, 24, 5, 7, 200, 1, 1), pointwise(block_n=64, parts=2, persistent=False), FP16),
    Case("pointwise", Conv(2, 24, 5, 7, 40, 1, 1), pointwise(flatten=True), FP32, tf32=True),
    Case("tma_conv", Conv(3, 24, 7, 5, 40, 3, 3, **SAME, residual=True), boxes(box=(2, 4, 4))),
    Case("tma_conv", Conv(2, 24, 7, 5, 40, 3, 3, **SAME), boxes(box=(1, 4, 8)), channels_before=8),
    Case("tma_conv", Conv(17, 24, 3, 4, 24, 3, 3, **SAME), boxes(box=(16, 1, 1))),
    Case("tma_conv", Conv(2, 48, 6, 8, 40, 3, 3, (2, 2), (1, 1)), boxes(box=(2, 2, 4)), FP16),
    Case("tma_conv", Conv(17, 32, 6, 4, 24, 3, 3, (2, 2), (1, 1)), boxes(box=(16, 1, 1))),
    Case("tma_conv", Conv(2, 24, 7, 5, 40, 1, 1, (2, 2)), boxes(box=(2, 4, 4))),
    Case("tma_conv", Conv(2, 24, 6, 6, 24, 3, 3, (1, 1), (2, 2), (2, 2)), boxes(box=(2, 4, 4)), FP32, tf32=True),
    Case(
        "tma_conv", Bottleneck(2, 24, 6, 6, 16, 40, stride2=2, projection=True), boxes(box=(2, 4, 4)),
        run=_project, exact=_project_reference,
    ),
]  # fmt: skip

BLOCKS = [
    Case("bottleneck", Bottleneck(3, 40, 7, 5, 24, 40), band(tiles=1)),
    Case("bottleneck", Bottleneck(2, 24, 8, 6, 16, 40, 1, 2, projection=True), band()),
    Case("bottleneck", Bottleneck(2, 24, 7, 9, 16, 40, 2, 1, projection=True), band(), FP16),
    Case("bottleneck", Bottleneck(2, 40, 7, 5, 24, 40), band(tma=False), **OLD),
    Case("bottleneck", Bottleneck(2, 24, 7, 5, 16, 40, 1, 2, projection=True), band(tma=False), **OLD),
    Case("basic_block", BasicBlock(3, 24, 7, 5, 24, 24), band(tiles=1)),
    Case("basic_block", BasicBlock(2, 16, 8, 6, 40, 40, 2, projection=True), band(), FP16),
    Case("basic_block", BasicBlock(2, 40, 7, 5, 24, 40), band(tma=False), **OLD),
    Case(
        "bottleneck_chain", BottleneckChain(3, 40, 7, 5, 24, 2),
        RotatedConfig(block_m=32, block_n=16, block_k=16, programs=1, tma=True, warps=4, stages=2), scales=(1.0,),
    ),
    Case(
        "bottleneck_chain", BottleneckChain(2, 40, 5, 5, 24, 2),
        RotatedConfig(block_m=32, block_n=16, block_k=16, programs=1, tma=False, warps=4, stages=2), FP16,
        scales=(1.0,), **OLD,
    ),
    Case("head", Head(3, 40, 2, 4, 24), HeadConfig(block_m=16, block_n=16, warps=4, stages=2)),
    Case("head", Head(2, 20, 4, 8, 9), HeadConfig(block_m=16, block_n=32, warps=4, stages=2), FP32),
    Case(
        "stem", Stem(3, 3, 21, 19, 24, 7, 7),
        StemConfig(block_m=16, block_n=32, block_k=64, segment=2, tma=True, warps=4, stages=2),
    ),
    Case(
        "stem", Stem(1, 24, 4, 7, 16, 3, 3, 1, 1),
        StemConfig(block_m=16, block_n=16, block_k=32, segment=1, tma=False, warps=4, stages=2), FP16, **OLD,
    ),
    Case("dense_block", DenseBlock(3, 24, 7, 5, 16, 2, 40), band(block_n=16, tiles=1), scales=(1.0,)),
    Case("dense_block", DenseBlock(2, 24, 5, 5, 8, 2, 24), band(block_n=16, tma=False), scales=(1.0,), **OLD),
    Case(
        "transition", Transition(3, 40, 7, 6, 24),
        TransitionConfig(block_m=16, block_n=16, block_c=16, programs=1, tma=True, warps=4, stages=2),
    ),
    Case(
        "transition", Transition(2, 40, 6, 7, 40),
        TransitionConfig(block_m=16, block_n=32, block_c=16, programs=1, tma=False, warps=4, stages=2), FP16, **OLD,
    ),
]  # fmt: skip
CASES = [*LAYERS, *BLOCKS]


# --- more than 2**31 elements -------------------------------------------------------------------------------------


_empty = torch.empty


def fresh(
    *size: Any, dtype: torch.dtype = torch.float32, memory_format: Any = torch.contiguous_format, **_: Any
) -> Tensor:
    """`torch.empty`, zeros, and no memory until it is touched: malloc may hand out pages that were in use."""
    shape = size if isinstance(size[0], int) else size[0]
    like = _empty(shape, dtype=dtype, device="meta", memory_format=memory_format)
    pages = mmap.mmap(-1, like.numel() * like.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).as_strided(like.shape, like.stride())


class _Untouched(samples._Random):
    """Tensors whose pages only one program touches; the last pixel of an image and all weights are ones."""

    def image(self, *size: int) -> Tensor:
        x = fresh(size, dtype=self.dtype, memory_format=torch.channels_last)
        x[-1, :, -1, -1] = 1
        return x

    def weight(self, k: int, c: int, r: int, s: int) -> Tensor:
        return torch.ones(k, c, r, s, dtype=self.dtype)

    def scale(self, k: int) -> Tensor:
        return torch.full((k,), 0.5)

    def shift(self, k: int) -> Tensor:
        return torch.ones(k)


_far_band = partial(band, block_m=16, block_n=1024, block_c=1024, tiles=1)
FAR = [
    Case("implicit_gemm", Conv(2**15, 1024, 9, 9, 16, 1, 1), gemm(block_m=16, block_k=1024)),
    Case("implicit_gemm", Conv(2**15, 1024, 9, 9, 16, 3, 3, **SAME), gemm(block_m=16, block_k=1024)),
    Case("implicit_gemm", Conv(2**15, 16, 9, 9, 1024, 1, 1, residual=True), gemm(block_m=16, block_n=1024)),
    Case(
        "pointwise", Conv(2**15, 1024, 9, 9, 1024, 1, 1, residual=True),
        pointwise(block_m=16, block_n=1024, block_k=1024, persistent=False),
    ),
    Case("tma_conv", Conv(2**15, 16, 9, 9, 1024, 3, 3, **SAME, residual=True), boxes(box=(1, 2, 8), block_n=1024)),
    Case("bottleneck", Bottleneck(2**15, 1024, 9, 9, 16, 1024), _far_band()),
    Case("bottleneck", Bottleneck(2**15, 1024, 9, 9, 16, 1024), _far_band(tma=False), **OLD),
]  # fmt: skip


def check_far(case: Case) -> None:
    """Run the last program alone, in virtual memory: no offset of it may overflow, and its last pixel must be right.

    Raises:
        AssertionError: it is wrong. A launch may also raise, or touch memory that is not there.
    """
    shape = case.shape
    assert max(shape.n * shape.c * shape.h * shape.w, torch.Size(shape.output_shape).numel()) > 2**31
    call = samples._MAKERS[type(shape)](shape, _Untouched(case.dtype, CPU))
    with (
        on_gpu(case, multiprocessors=2**30),  # a program for every tile
        interpreter_guard.overflow_checked(),
        interpreter_guard.as_program((-1, 0, 0)),
        mock.patch.object(torch, "empty", fresh),
        torch.inference_mode(),
    ):
        y = call.run_kernel(kernels, case.kernel, config=case.config)
    if isinstance(shape, Conv):
        expected = 0.5 * shape.c + 1 + shape.residual
    else:  # the window of the last pixel holds three others, whose h1 is relu(0 * 0.5 + 1)
        h1, others = 0.5 * shape.c + 1, 3.0
        expected = (0.5 * shape.mid * (h1 + others) + 1) * 0.5 * shape.mid + 1 + 1
    assert torch.equal(y[-1, :, -1, -1], torch.full((shape.output_shape[1],), expected).to(case.dtype))
    assert not y[0].any(), f"the first image was written: {y[0].flatten()[:8].tolist()}"
