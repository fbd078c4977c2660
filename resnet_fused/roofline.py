"""The roofline: what this machine can do at most, and the least time that a layer or block can take on it.

A block must read its input and its weights and write its output, each once, and do its multiplications. Its time is at
least the longer of the two, at the rate of a large copy and at that of a large matrix product (Williams, Waterman,
Patterson, "Roofline", CACM 2009). Two things can pass that bound: Winograd needs fewer multiplications than are counted
here, those of the direct convolution, and what a cache still holds need not come from memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from . import environment
from .errors import BackendError, InputError
from .kernels.precision import allow_tf32
from .settings import one_of
from .shapes import Conv, DenseBlock, Head, Shape, Stem, Transition

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""The dtypes that a machine is measured with, and their names."""


@dataclass(frozen=True)
class Machine:
    """What a machine reached.

    Attributes:
        device: `"cpu"` or `"cuda"`.
        device_name: the processor's or GPU's own name.
        threads: that torch computes with on a CPU.
        copy_gb_s: GB/s of the best copy of a buffer well over the last-level cache, bytes read and bytes written.
        matmul_tflop_s: TFLOP/s of the best large matrix product, by dtype.
        launch_us: microseconds from one operator on one element to the next, on a GPU; None on a CPU.
    """

    device: str
    device_name: str
    threads: int
    copy_gb_s: float
    matmul_tflop_s: Mapping[str, float]
    launch_us: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The machine as plain values."""
        return asdict(self) | {"matmul_tflop_s": dict(self.matmul_tflop_s)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Machine:
        """The machine that `to_dict` gave these values.

        Raises:
            InputError: they are not the fields of a machine.
        """
        expected = [field.name for field in fields(cls)]
        if sorted(values) != sorted(expected):
            raise InputError(f"a machine must have the fields {', '.join(expected)}, got {', '.join(values)}")
        return cls(**values)

    def seconds(self, flops: float, bytes_moved: float, dtype: torch.dtype | str) -> tuple[float, float]:
        """The least seconds for so many operations, and for so many bytes.

        Raises:
            InputError: the machine was not measured with this dtype.
        """
        name = dtype_name(dtype)
        if name not in self.matmul_tflop_s:
            known = ", ".join(self.matmul_tflop_s)
            raise InputError(f"dtype must be one that the machine was measured with, {known}, got {name}")
        return flops / (self.matmul_tflop_s[name] * 1e12), bytes_moved / (self.copy_gb_s * 1e9)

    def __str__(self) -> str:
        rates = ", ".join(f"{name} {rate:.3g} TFLOP/s" for name, rate in self.matmul_tflop_s.items())
        launch = "" if self.launch_us is None else f", launch {self.launch_us:.1f} us"
        return f"copy {self.copy_gb_s:.1f} GB/s, matmul {rates}{launch}"


@dataclass(frozen=True)
class Placement:
    """Where a layer, a block or a whole model stands on a machine's roofline.

    Attributes:
        flops: that must be done, a multiply and an add being two, by direct convolution; a transition pools first.
        bytes: that must move if every op is one kernel: input, output and weights, each once.
        layer_bytes: that must move if every layer is one kernel: what lies between them is written and read too.
        bound_seconds: the least time for `flops` and `bytes`.
        bound: `"memory"` or `"compute"`: which of the two takes longer.
    """

    flops: int
    bytes: int
    layer_bytes: int
    bound_seconds: float
    bound: str

    @property
    def intensity(self) -> float:
        """FLOPs for each byte that must move."""
        return self.flops / self.bytes if self.bytes else 0.0


def dtype_name(dtype: torch.dtype | str) -> str:
    """`"fp32"` for float32 and so on; names stay as they are, and so do the dtypes that have none here."""
    return dtype if isinstance(dtype, str) else DTYPES.get(dtype, str(dtype).removeprefix("torch."))


# --- what must be done --------------------------------------------------------------------------------------------


def flops(shape: Shape) -> int:
    """Operations that must be done; those of a transition follow its pooling."""
    return sum(layer.flops for layer in shape.layers())


def weights(shape: Shape) -> int:
    """Elements of the weights."""
    return sum(layer.k * (layer.c // layer.groups) * layer.r * layer.s for layer in shape.layers())


def traffic(shape: Shape, itemsize: int) -> int:
    """Bytes that must move if the whole of it is one kernel: input, residual, weights, output. Vectors do not count."""
    n, k, p, q = shape.output_shape
    image = (shape.n, shape.c, shape.h, shape.w)
    if isinstance(shape, Transition):
        read = 4 * shape.n * shape.c * p * q  # 2x2 averages: an odd last row or column is never read
    elif isinstance(shape, Head):
        read = math.prod(image)
    else:
        read = max(_read(layer) for layer in shape.layers() if (layer.n, layer.c, layer.h, layer.w) == image)
    residual = n * k * p * q if isinstance(shape, Conv) and shape.residual else 0
    return (read + residual + weights(shape) + n * k * p * q) * itemsize


def layer_traffic(shape: Shape, itemsize: int) -> int:
    """Bytes that must move if every layer is one kernel, BatchNorm, ReLU and the addition within it."""
    moved = sum(traffic(layer, itemsize) for layer in shape.layers())
    elements = 0
    n, k, p, q = shape.output_shape
    if isinstance(shape, Stem):  # the pooling reads what the layer wrote
        elements = math.prod(shape.layers()[0].output_shape) + n * k * p * q
    elif isinstance(shape, Transition):  # the pooling comes first, as it does in a head
        elements = 5 * shape.n * shape.c * p * q
    elif isinstance(shape, Head):
        elements = shape.n * shape.c * (shape.h * shape.w + 1)
    elif isinstance(shape, DenseBlock):  # its input is copied into the buffer that the layers append to
        elements = 2 * shape.n * shape.c * shape.h * shape.w
    return moved + elements * itemsize


def _read(layer: Conv) -> int:
    """Elements of the input that a layer reads: a 1x1 of stride 2 takes every other row and column."""
    _, _, p, q = layer.output_shape
    rows, columns = (
        min(size, out * taps) if stride >= taps else size
        for size, out, taps, stride in (
            (layer.h, p, layer.r, layer.stride[0]),
            (layer.w, q, layer.s, layer.stride[1]),
        )
    )
    return layer.n * layer.c * rows * columns


def place(shape: Shape, dtype: torch.dtype, machine: Machine) -> Placement:
    """Place a layer or block.

    Args:
        shape: of the layer or block, any of `resnet_fused.shapes`.
        dtype: of its tensors.
        machine: from `measure`.

    Raises:
        InputError: the machine was not measured with this dtype.
    """
    size = dtype.itemsize
    return placement(flops(shape), traffic(shape, size), layer_traffic(shape, size), dtype, machine)


def placement(work: int, moved: int, layer_moved: int, dtype: torch.dtype | str, machine: Machine) -> Placement:
    """Place what does so much work and moves so many bytes; see `place`."""
    compute, memory = machine.seconds(work, moved, dtype)
    return Placement(work, moved, layer_moved, max(compute, memory), "memory" if memory > compute else "compute")


def total(placements: Sequence[Placement]) -> Placement:
    """Place a model: what its blocks must do one after the other, so the bound is the sum of theirs."""
    by_bound = {"memory": 0.0, "compute": 0.0}
    for placed in placements:
        by_bound[placed.bound] += placed.bound_seconds
    return Placement(
        sum(placed.flops for placed in placements),
        sum(placed.bytes for placed in placements),
        sum(placed.layer_bytes for placed in placements),
        sum(by_bound.values()),
        max(by_bound, key=lambda bound: by_bound[bound]),
    )


def standing(roof: Placement | None, milliseconds: float | None) -> dict[str, Any]:
    """Where a model stands that took so long, as the fields of a benchmark's row; each None if it is not known."""
    if roof is None:
        return dict.fromkeys(("flop_per_byte", "bound", "bound_ms", "share_of_bound"))
    bound_ms = roof.bound_seconds * 1e3
    return {
        "flop_per_byte": roof.intensity,
        "bound": roof.bound,
        "bound_ms": bound_ms,
        "share_of_bound": bound_ms / milliseconds if milliseconds else None,
    }


# --- what the machine can do --------------------------------------------------------------------------------------


def measure(device: str = "cpu", dtypes: Sequence[str] = ("fp32", "bf16")) -> Machine:
    """Measure a machine, in one or two seconds.

    Args:
        device: `"cpu"` or `"cuda"`.
        dtypes: names of those whose matrix product is measured. fp32 is TF32 where torch's convolutions use it.

    Raises:
        InputError: a name is unknown.
        BackendError: torch sees no GPU.
    """
    one_of("device", device, ("cpu", "cuda"))
    for name in dtypes:
        one_of("dtype", name, tuple(DTYPES.values()))
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"the roofline of a GPU needs one, torch {torch.__version__} sees none")
    where = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    by_name = {name: dtype for dtype, name in DTYPES.items()}
    with torch.inference_mode():
        return Machine(
            device,
            environment.device_name(device),
            torch.get_num_threads(),
            _copy_rate(where) / 1e9,
            {name: _matmul_rate(by_name[name], where) / 1e12 for name in dtypes},
            _launch_seconds(where) * 1e6 if device == "cuda" else None,
        )


def last_level_cache() -> int:
    """Bytes of the processor's largest cache, 0 where the system does not tell."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    try:
        sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    except OSError:
        return 0
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size and size[-1] in units), default=0)


def best_seconds(call: Callable[[], object], device: torch.device, spend: float = 0.4, rounds: int = 3) -> float:
    """The least seconds of a call: after one to warm up, of so many or of those within `spend` seconds."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    call()
    best, begun, done = float("inf"), time.perf_counter(), 0
    while done < rounds or time.perf_counter() - begun < spend:
        synchronize()
        started = time.perf_counter()
        call()
        synchronize()
        best = min(best, time.perf_counter() - started)
        done += 1
    return best


def _copy_rate(device: torch.device) -> float:
    """Bytes per second of a copy: 1 GiB on a GPU; on a CPU four times the last-level cache, 256 MiB to 1 GiB."""
    size = 1 << 30
    if device.type == "cpu":
        size = min(max(4 * last_level_cache(), 256 << 20), size)
    source = torch.zeros(size // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device)


def _matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a square matrix product: 8192 on a GPU, 2048 on a CPU, 4096 on one with more than 8 threads."""
    size = 8192 if device.type == "cuda" else 2048 if torch.get_num_threads() <= 8 else 4096
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    with _convolution_precision(device):
        return 2 * size**3 / best_seconds(lambda: torch.mm(a, b, out=out), device)


@contextmanager
def _convolution_precision(device: torch.device) -> Iterator[None]:
    """Give float32 products on a GPU the precision that torch's convolutions have: TF32 or not."""
    if device.type != "cuda":
        yield
        return
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "tf32" if allow_tf32(device) else "ieee"
    try:
        yield
    finally:
        switch.fp32_precision = before


def _launch_seconds(device: torch.device, count: int = 1000) -> float:
    """Seconds from one operator on one element to the next, many in a row: what torch and the driver need for it."""
    one = torch.zeros(1, device=device)

    def launches() -> None:
        for _ in range(count):
            one.add_(1.0)

    return best_seconds(launches, device, spend=0.2) / count
