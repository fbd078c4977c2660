"""What tests/gpu runs: shapes of every op, every way to compute each of them, and what must come out.

The shapes are small, but large enough for several tiles, ragged ones among them, and for programs that compute more
than one tile.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import triton_cases
from torch import Tensor
from triton_cases import Case

from resnet_fused import plan
from resnet_fused.errors import BackendError
from resnet_fused.kernels import cuda, cudnn, native
from resnet_fused.kernels import triton as triton_kernels
from resnet_fused.kernels.layers import DenseLayer
from resnet_fused.kernels.precision import allow_tf32
from resnet_fused.kernels.triton import configs, layer_configs
from resnet_fused.samples import Sample, describe
from resnet_fused.shapes import (
    BasicBlock,
    Bottleneck,
    BottleneckChain,
    Conv,
    DenseBlock,
    Head,
    PreActBlock,
    Shape,
    Stem,
    Transition,
)

CPU = torch.device("cpu")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
"""By the name of an option: "tf32" is float32 with products of TF32, "fp32" without."""

SAME, TWO = {"padding": (1, 1)}, (2, 2)
SHAPES: dict[str, list[Shape]] = {
    "conv_bn_act": [
        Conv(2, 64, 14, 14, 256, 1, 1, residual=True),
        Conv(2, 64, 15, 13, 64, 3, 3, **SAME),
        Conv(3, 64, 16, 14, 128, 3, 3, TWO, (1, 1)),
        Conv(5, 40, 9, 7, 72, 1, 1, residual=True, prologue=True),
        Conv(2, 3, 37, 35, 64, 7, 7, TWO, (3, 3)),
        Conv(4, 512, 7, 7, 512, 3, 3, **SAME, residual=True),
        Conv(2, 128, 9, 9, 128, 3, 3, **SAME, groups=32),
        Conv(3, 256, 15, 15, 64, 1, 1),
        Conv(2, 256, 14, 14, 512, 1, 1, TWO),
        Conv(2, 24, 9, 11, 40, 5, 3, (2, 1), (2, 1), (1, 2)),
        Conv(2, 64, 14, 14, 64, 3, 3, (1, 1), TWO, TWO),
        Conv(2, 40, 9, 9, 24, 3, 3, **SAME, prologue=True),
        Conv(2, 36, 9, 9, 24, 3, 3, **SAME, groups=2),
        Conv(2, 20, 7, 7, 12, 3, 3, **SAME),
        Conv(300, 32, 3, 3, 32, 3, 3, **SAME),
        Conv(1, 2048, 7, 7, 512, 1, 1),
        Conv(17, 64, 1, 1, 1000, 1, 1),
    ],
    "bottleneck": [
        Bottleneck(2, 256, 14, 14, 64, 256),
        Bottleneck(3, 64, 15, 13, 64, 256, projection=True),
        Bottleneck(2, 256, 14, 14, 128, 512, 1, 2, projection=True),
        Bottleneck(2, 256, 14, 14, 64, 256, 2, 1, projection=True),
        Bottleneck(2, 40, 9, 7, 24, 40),
        Bottleneck(2, 64, 14, 14, 64, 64, dilation=2),
        Bottleneck(2, 128, 14, 14, 128, 128, groups=32),
        Bottleneck(2, 1024, 7, 7, 512, 1024),
    ],
    "basic_block": [
        BasicBlock(2, 64, 14, 14, 64, 64),
        BasicBlock(2, 16, 32, 32, 16, 16),
        BasicBlock(3, 64, 15, 13, 128, 128, 2, projection=True),
        BasicBlock(2, 24, 9, 7, 40, 40, 1, projection=True),
        BasicBlock(2, 32, 16, 16, 32, 32, dilation=2),
    ],
    "stem": [
        Stem(2, 3, 61, 67, 64, 7, 7),
        Stem(2, 3, 32, 32, 64, 3, 3, 1, 1),
        Stem(2, 24, 20, 18, 40, 3, 3, 1, 1, 2, 2, 0),
    ],
    "preact_block": [
        PreActBlock(2, 64, 14, 14, 64, 64),
        PreActBlock(2, 64, 14, 14, 32, 128, 1, 2, projection=True, bottleneck=True),
    ],
    "dense_block": [
        DenseBlock(2, 64, 14, 14, 32, 3, 128),
        DenseBlock(3, 24, 9, 7, 16, 1, 40),
        DenseBlock(2, 24, 9, 9, 12, 2),
    ],
    "transition": [Transition(2, 256, 14, 14, 128), Transition(3, 40, 9, 7, 24)],
    "project": [
        Bottleneck(2, 256, 14, 14, 64, 256, projection=True),
        Bottleneck(3, 64, 14, 14, 32, 256, stride2=2, projection=True),
    ],
    "bottleneck_chain": [
        BottleneckChain(2, 256, 14, 14, 64, 2),
        BottleneckChain(3, 40, 9, 7, 24, 3),
        BottleneckChain(5, 512, 9, 7, 128, 3),
        BottleneckChain(90, 256, 14, 14, 64, 2),  # 138 tiles of 128 pixels, more than an H100 has multiprocessors
    ],
    "head": [Head(3, 40, 2, 4, 24), Head(65, 512, 4, 4, 1000)],  # powers of two: exact means
}
"""By op, and "project": the end of a bottleneck and its projection in one accumulator, a part of that op."""

TINY: dict[str, list[Shape]] = {
    "conv_bn_act": [
        Conv(2, 24, 5, 7, 40, 3, 3, **SAME, residual=True),
        Conv(2, 40, 5, 5, 24, 1, 1, prologue=True),
        Conv(1, 3, 9, 9, 16, 5, 5, TWO, TWO),
        Conv(1, 32, 5, 5, 32, 3, 3, **SAME, groups=4),
    ],
    "bottleneck": [Bottleneck(2, 24, 6, 6, 16, 40, stride2=2, projection=True), Bottleneck(1, 64, 9, 8, 64, 64)],
    "basic_block": [BasicBlock(2, 16, 6, 5, 16, 16)],
    "stem": [Stem(1, 3, 21, 19, 16, 7, 7)],
    "preact_block": [PreActBlock(1, 16, 5, 5, 16, 16)],
    "dense_block": [DenseBlock(1, 24, 5, 5, 16, 2, 40)],
    "transition": [Transition(2, 24, 6, 6, 16)],
    "project": [Bottleneck(2, 24, 5, 5, 16, 40, projection=True)],
    "bottleneck_chain": [BottleneckChain(1, 24, 5, 5, 16, 2), BottleneckChain(1, 256, 5, 5, 64, 2)],
    "head": [Head(3, 40, 2, 4, 24)],
}
"""One or a few of every op, as small as they get: what a sanitizer can execute, and Triton's interpreter."""

BY_OP = "op"
"""In the place of an algorithm: through the op, with whatever the plan of that backend takes."""


@dataclass(frozen=True)
class Variant:
    """One way to compute a shape.

    Attributes:
        op: key of `SHAPES`.
        backend: `"triton"`, `"cuda"` or `"vendor"`.
        shape: of the layer or block.
        precision: key of `DTYPES`.
        algorithm: of the backend, the name of a compiled kernel, or `BY_OP`.
        config: of a Triton kernel.
    """

    op: str
    backend: str
    shape: Shape
    precision: str
    algorithm: str
    config: configs.Config | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the images."""
        return DTYPES[self.precision]

    def __str__(self) -> str:
        told = ("n", "c", "h", "w", "k", "r", "s", "mid", "out", "groups", "residual", "prologue", "projection")
        more = [
            f"{field.name}={getattr(self.shape, field.name)}"
            for field in fields(self.shape)
            if field.name not in told and getattr(self.shape, field.name) != field.default
        ]
        words = [self.backend, self.algorithm, self.precision, describe(self.shape), *more]
        text = " ".join(words if self.config is None else [*words, str(self.config)])
        return text.translate(str.maketrans("", "", ",[]()"))

    @property
    def by_name(self) -> bool:
        """Whether it is a compiled CUDA kernel by its name, which may be made for other shapes."""
        return self.backend == "cuda" and any(letter.isdigit() for letter in self.algorithm)

    @property
    def case(self) -> Case:
        """The same for the functions of `triton_cases`."""
        chain = self.op in ("dense_block", "bottleneck_chain", "preact_block")
        config: Any = self.config or layer_configs.IEEE
        scales = (1.0,) if chain else (1.0, 2.0, -1.0)
        # Groups that are computed as one share a NaN, and what a vendor's library does with its padding is its own.
        merged = isinstance(self.shape, Conv | Bottleneck) and self.shape.groups > 1
        return Case(
            self.algorithm, self.shape, config, self.dtype, scales=scales, tf32=self.precision == "tf32",
            isolated=not merged and self.backend != "vendor",
        )  # fmt: skip

    def run(self, call: Sample, **more: Any) -> tuple[Tensor, ...]:
        """Compute a call of the shape; `more` goes to the backend's function."""
        if self.op == "project":
            return (_project(self, call),)
        if self.algorithm == BY_OP:
            return (call.run(self.backend),)
        if self.config is not None:
            more["config"] = self.config
        return (call.run_kernel(plan.GPU_KERNELS[self.backend], self.algorithm, **more),)

    def reference(self, call: Sample) -> tuple[Tensor, ...]:
        """The same in plain torch, in the dtype of the call, on its device."""
        return (_project_reference(call) if self.op == "project" else call.run("reference"),)


def _ends(call: Sample) -> tuple[Tensor, ...]:
    """The last layer's input (some of x), weight, scale and shift; x, the projection's weight, scale and shift.

    The projection's scale is zero in one channel, where the sums cannot be divided by it.
    """
    x, *_, w3, b3, wd, bd = call.args
    stride = call.options["stride"]
    h = x[:, : w3.shape[1], ::stride, ::stride].contiguous(memory_format=torch.channels_last)
    sd = call.options["sd"]
    return h, w3, call.options["s3"], b3, x, wd, torch.cat([torch.zeros_like(sd[:1]), sd[1:]]), bd


def _project(variant: Variant, call: Sample) -> Tensor:
    h, w3, s3, b3, x, wd, sd, bd = _ends(call)
    stride = call.options["stride"]
    if variant.backend == "triton":
        options = {"stride": stride, "algorithm": variant.algorithm, "config": variant.config}
        return triton_kernels.project(h, w3, s3, b3, x, wd, sd, bd, **options)
    geometry = (stride, (1, 1), (0, 0), (1, 1), True, variant.algorithm)
    side = (x, cuda._weight(wd), sd)
    return torch.ops.resnet_fused._cuda_conv.default(
        h, cuda._weight(w3), s3, b3 + bd, None, None, None, *side, *geometry
    )


def _project_reference(call: Sample) -> Tensor:
    h, w3, s3, b3, x, wd, sd, bd = _ends(call)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.conv2d(h.to(wide), w3.to(wide)) * s3[:, None, None] + b3[:, None, None]
    y = y + torch.conv2d(x.to(wide), wd.to(wide), stride=call.options["stride"]) * sd[:, None, None] + bd[:, None, None]
    return y.relu().to(x.dtype)


@contextlib.contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """Set torch's switches for products of float32 convolutions and matrices as a key of `DTYPES` says."""
    on_gpu = device.type == "cuda"
    convolutions = (torch.backends.cudnn if on_gpu else torch.backends.mkldnn).conv
    switches = [convolutions, (torch.backends.cuda if on_gpu else torch.backends.mkldnn).matmul]
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee" if name == "fp32" else "tf32"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def variants(
    device: torch.device,
    backends: Sequence[str],
    op: str | None = None,
    precisions: Sequence[str] = tuple(DTYPES),
    most: int | None = None,
    shapes: int | None = None,
    tiny: bool = False,
) -> Iterator[Variant]:
    """Everything to run on a device.

    Args:
        device: a GPU, or the CPU where Triton's kernels are interpreted.
        backends: to take.
        op: key of `SHAPES`; None for all.
        precisions: keys of `DTYPES`.
        most: configurations of a Triton kernel, best first; all if None.
        shapes: of an op; all if None.
        tiny: those of `TINY` in the place of `SHAPES`.
    """
    known = TINY if tiny else SHAPES
    for name in known if op is None else [op]:
        for backend in backends:
            for shape in known[name][:shapes]:
                for kind in precisions:
                    with precision(kind, device):
                        for algorithm, config in _ways(name, backend, shape, DTYPES[kind], device, most):
                            yield Variant(name, backend, shape, kind, algorithm, config)


def _ways(
    op: str, backend: str, shape: Shape, dtype: torch.dtype, device: torch.device, most: int | None
) -> Iterator[tuple[str, configs.Config | None]]:
    """(algorithm, configuration) of everything that a backend has for a shape."""
    arch = configs.architecture(device)
    if op == "project":
        end = Conv(shape.n, shape.layers()[-1].c, *shape.output_shape[2:], shape.output_shape[1], 1, 1)
        if backend == "triton" and (dtype != torch.float32 or allow_tf32(device)):
            for name in ("implicit_gemm", "tma_conv"):
                for config in configs.alternatives(name, end, dtype, arch)[:most]:
                    yield name, config
        elif backend == "cuda" and not cuda.unsupported(end, dtype, device):
            yield from ((name, None) for name in _compiled("conv", dtype, device) if "dual" in name)
    else:
        if backend == "triton" and not triton_kernels.unsupported(shape, dtype, device):
            for found in triton_kernels.candidates(shape, dtype, device):
                several = not (isinstance(shape, DenseBlock) and shape.depth > 1)  # a configuration fits one layer
                ranked = configs.alternatives(found.algorithm, shape, dtype, arch)[:most] if several else (None,)
                yield from ((found.algorithm, config) for config in ranked)
        if backend == "cuda" and not cuda.unsupported(shape, dtype, device):
            yield from ((found.algorithm, None) for found in cuda.candidates(shape, dtype, device))
            yield from ((name, None) for name in _compiled(shape.op, dtype, device) if "dual" not in name)
        if _planned(shape, dtype, device, backend):
            yield BY_OP, None


def _compiled(op: str, dtype: torch.dtype, device: torch.device) -> list[str]:
    """The names of the CUDA kernels for an op and dtype that are made for this GPU."""
    assert native.bindings is not None
    arch = cuda.device_of(device).arch
    name = str(dtype).removeprefix("torch.")
    return [
        row["kernel"]
        for row in native.bindings.cuda_kernel_table()
        if row["op"] == op and row["dtype"] == name and (row["arch"] == "sm_80" or arch == 90)
    ]


def _planned(shape: Shape, dtype: torch.dtype, device: torch.device, backend: str) -> bool:
    """Whether the op runs with this backend. That the plan fails where all kernels take the shape is an error."""
    try:
        plan.choose(shape, dtype, device, backend, "strict", plan.state(device))
    except BackendError:
        kernels = plan.GPU_KERNELS.get(backend, cudnn)
        parts = [shape] if isinstance(shape, Conv) else shape.layers()
        if not any(kernels.unsupported(part, dtype, device) for part in parts):
            raise
        return False
    return True


# --- calls --------------------------------------------------------------------------------------------------------


def moved(call: Sample, device: torch.device) -> Sample:
    """The call with every tensor on a device, in its memory format."""
    return Sample(call.shape, *(_moved(value, device) for value in (call.args, call.options, call.kernel_options)))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: _moved(item, device) for name, item in value.items()}
    if isinstance(value, DenseLayer):
        return DenseLayer(*(_moved(item, device) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device) for item in value)
    return value.to(device) if isinstance(value, Tensor) else value


@functools.lru_cache(maxsize=8)
def _call(op: str, shape: Shape, dtype: torch.dtype, values: str) -> Sample:
    """The call on the CPU; see `triton_cases.make`."""
    return triton_cases.make(Variant(op, "", shape, _name(dtype), "").case, values)


def _name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


@functools.lru_cache(maxsize=8)
def _exact(op: str, shape: Shape, dtype: torch.dtype, values: str) -> tuple[Tensor, ...]:
    """What must come out, in float64 on the CPU; "special": in the dtype, where float64 would not overflow."""
    call = _call(op, shape, dtype, values)
    call = call if values == "special" else call.to(torch.float64)
    with torch.inference_mode():
        return Variant(op, "", shape, _name(dtype), "").reference(call)


def poison(device: torch.device) -> None:
    """Leave NaN in the memory that the next outputs and workspaces get: blocks of every size, given back at once."""
    if device.type == "cuda":
        blocks = [torch.full((1 << log,), 0xFF, dtype=torch.uint8, device=device) for log in range(9, 27)]
        del blocks


# --- checks -------------------------------------------------------------------------------------------------------


def check(variant: Variant, values: str, device: torch.device) -> None:
    """Compute a variant on integers, random numbers or a NaN and an infinity, in memory that held NaN, and compare.

    Raises:
        AssertionError: it is wrong.
    """
    at = (variant.op, variant.shape, variant.dtype, values)
    exact = _exact(*at)
    with precision(variant.precision, device), torch.inference_mode():
        call = moved(_call(*at), device)
        poison(device)
        given = tuple(y.cpu() for y in variant.run(call))
        rounded = tuple(y.cpu() for y in variant.reference(call)) if values == "random" else exact
    for y, e, r in zip(given, exact, rounded, strict=True):
        assert y.shape == e.shape, f"shape {tuple(y.shape)}, expected {tuple(e.shape)}"
        assert y.dtype == variant.dtype
        if values == "integers":
            assert torch.equal(e.to(variant.dtype).double(), e), "the case is not exact"
            assert torch.equal(y.double(), e), f"{int((y.double() != e).sum())} of {e.numel()} wrong"
        elif values == "special":
            _check_special(y, e, variant.case.isolated)
        else:
            assert_close(y, e, r, variant)


def assert_close(y: Tensor, exact: Tensor, reference: Tensor, variant: Variant) -> None:
    """The parity rule, against the reference's error at the same dtype; one rounding of the output is added."""
    error, allowed = ((t.double() - exact).abs().max().item() for t in (y, reference))
    rounding = torch.finfo(variant.dtype).eps / 2 + 2.0**-9 * (variant.precision == "tf32")
    tiny = rounding * exact.abs().max().item()
    assert error <= 2 * allowed + tiny, f"error {error:.3g}, the reference's {allowed:.3g}, tiny {tiny:.3g}"


def _check_special(y: Tensor, reference: Tensor, isolated: bool) -> None:
    assert (y.isnan() >= reference.isnan()).all(), "a NaN was lost"
    if isolated:
        counts = f"{int(y.isnan().sum())} NaN, the reference has {int(reference.isnan().sum())}"
        assert torch.equal(y.isnan(), reference.isnan()), counts
        assert torch.equal(y.isinf(), reference.isinf()), "infinities are not where the reference has them"


def check_slices(variant: Variant, device: torch.device) -> None:
    """A convolution that reads and writes slices of the channels of wider images, NaN around them.

    Raises:
        AssertionError: it is wrong, or wrote beside its slice.
    """
    at = (variant.op, variant.shape, variant.dtype, "random")
    (exact,) = _exact(*at)
    with precision(variant.precision, device), torch.inference_mode():
        call = moved(_call(*at), device)
        (reference,) = variant.reference(call)
        x, *rest = call.args
        n, k, p, q = variant.shape.output_shape
        wide = torch.full((n, k + 16, p, q), float("nan"), dtype=variant.dtype, device=device)
        wide = wide.contiguous(memory_format=torch.channels_last)
        sliced = replace(call, args=(_slice(x), *rest))
        variant.run(sliced, out=wide[:, 8 : 8 + k])
    assert wide[:, :8].isnan().all(), "it wrote before its slice"
    assert wide[:, 8 + k :].isnan().all(), "it wrote behind its slice"
    assert_close(wide[:, 8 : 8 + k].cpu(), exact, reference.cpu(), variant)


def _slice(x: Tensor) -> Tensor:
    """x's values in the channels from the 8th on of a wider image, NaN around them."""
    n, c, h, w = x.shape
    wide = torch.full((n, c + 16, h, w), float("nan"), dtype=x.dtype, device=x.device)
    wide = wide.contiguous(memory_format=torch.channels_last)
    wide[:, 8 : 8 + c] = x
    return wide[:, 8 : 8 + c]


def check_repeats(variant: Variant, device: torch.device, times: int) -> None:
    """The same bits again and again.

    Raises:
        AssertionError: a run differed from the first.
    """
    with precision(variant.precision, device), torch.inference_mode():
        call = moved(_call(variant.op, variant.shape, variant.dtype, "random"), device)
        first = variant.run(call)
        different = torch.zeros((), dtype=torch.int64, device=device)
        for _ in range(times):
            for y, wanted in zip(variant.run(call), first, strict=True):
                different += (y != wanted).any()
    assert int(different) == 0, f"{int(different)} of {times} runs differed from the first"
