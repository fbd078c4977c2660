"""Which backend and algorithm computes a layer or block, and why.

On a CPU the candidates are this package's kernel with each algorithm that `accuracy` allows, its layers one by one, and
oneDNN's layer-fused chain; the native library's cost model prices them and the cheapest is taken. On a GPU they are the
Triton and CUDA kernels, whole or layer by layer, and cuDNN's fused layers, priced by what `resnet-fused tune` measured
on that GPU; where nothing was measured, cuDNN is taken. What none can run (another dtype or device) goes to the
reference.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch

from .errors import BackendError
from .kernels import cpu, cuda, cudnn, native, triton, vendor
from .kernels.precision import allow_tf32
from .kernels.triton import tuned
from .shapes import BottleneckChain, Conv, DenseBlock, Head, Shape, Transition

State = tuple[int, str, bool]
"""Number of threads, instruction set, TF32 allowed: what a choice depends on beside the call's arguments."""

GPU_KERNELS: dict[str, ModuleType] = {"cuda": cuda, "triton": triton}


def state(device: torch.device) -> State:
    """The state that a call made now on this device is planned for."""
    if device.type == "cpu":
        return torch.get_num_threads(), native.isa(), False
    return 0, "none", allow_tf32(device)


@dataclass(frozen=True)
class Choice:
    """What the plan decided for one layer or block at one shape.

    Attributes:
        shape: of the layer or block.
        backend: `"cpu"`, `"triton"`, `"cuda"`, `"vendor"` or `"reference"`.
        algorithm: of that backend: of the cpu kernels `"direct"`, `"winograd2"`, `"winograd4"`; of the GPU kernels
            which of them; `"layers"` for a block computed by one kernel a layer; `"onednn"` or `"cudnn"`; `"torch"`.
        reason: why, in a phrase.
        seconds: (candidate, predicted seconds) of everything that was considered and could be priced, best first.
        config: of a GPU kernel: its tile, warps and stages.
        composed: whether a block is computed layer by layer.
        empty: whether the output has no elements, so that nothing runs at all.
    """

    shape: Shape
    backend: str
    algorithm: str
    reason: str
    seconds: tuple[tuple[str, float], ...] = ()
    config: str = ""
    composed: bool = False
    empty: bool = False


@dataclass(frozen=True)
class _Candidate:
    backend: str
    algorithm: str
    composed: bool
    seconds: float | None
    note: str = ""
    config: str = ""

    @property
    def name(self) -> str:
        return f"{self.backend} {self.algorithm}"


def algorithms(shape: Shape, dtype: torch.dtype, accuracy: str) -> tuple[str, ...]:
    """The algorithms of this package's kernel that `accuracy` allows.

    In float32, F(2x2, 3x3) adds up no more rounding than a direct convolution, F(4x4, 3x3) some ten times as much. In
    bfloat16 both are computed in float32 and the rounding of the output hides them. Where F(2x2, 3x3) multiplies
    bfloat16, though, a layer errs up to 1.8 times as much as unfused torch's (root mean square), a basic block 1.4, a
    bottleneck 1.0. At `"strict"` a layer by itself does without. Dense blocks always do: one errs 1.3 times as much,
    but nothing is added to what its layers give out, and the 58 of DenseNet-121 together err up to 2.3 times as much.
    """
    if not shape.winograd:
        return ("direct",)
    left_out = set()
    if accuracy == "strict" and dtype == torch.float32:
        left_out.add("winograd4")
    exact = isinstance(shape, DenseBlock) or (accuracy == "strict" and isinstance(shape, Conv))
    if exact and dtype == torch.bfloat16 and cpu.winograd_rounds():
        left_out.add("winograd2")
    return tuple(name for name in cpu.ALGORITHMS if name not in left_out)


MAX_VENDOR_SUM = 128
"""Products that oneDNN's layer-fused convolution may add up at `accuracy="strict"` in float32. It adds them in one
chain, whose error reached 3.4 times eager's on the 256 products of a 1x1 layer, 6 times on the 4608 of a late 3x3."""


CALL_SECONDS = 100e-6
"""Of one more op for the CPU, dispatched from Python: 20 us alone, 50 to 100 after a kernel that filled the caches. And
what runs layer by layer is not recorded, and cuts in two what could be one call."""


def _vendor_inexact(shape: Shape, dtype: torch.dtype, accuracy: str) -> str | None:
    """Why oneDNN is not accurate enough where there is a choice, None if it is."""
    longest = max(layer.c // layer.groups * layer.r * layer.s for layer in shape.layers())
    if accuracy == "fast" or dtype != torch.float32 or longest <= MAX_VENDOR_SUM:
        return None
    return f"accuracy='strict' allows it sums of {MAX_VENDOR_SUM} products, here are {longest}"


def _price(shape: Shape, dtype: torch.dtype, algorithm: str, threads: int) -> float:
    """Predicted seconds."""
    assert native.bindings is not None
    if cpu.only_by_layers(shape):
        return sum(_price(layer, dtype, algorithm, threads) for layer in shape.layers())
    name = str(dtype).removeprefix("torch.")
    return native.bindings.cost(shape.op, shape.dims(), name, algorithm, threads)["seconds"]


def _cpu_candidates(
    shape: Shape, dtype: torch.dtype, device: torch.device, accuracy: str, state: State
) -> list[_Candidate]:
    found = []
    why_not = cpu.only_by_layers(shape)
    if why_not is None:
        for algorithm in algorithms(shape, dtype, accuracy):
            found.append(_Candidate("cpu", algorithm, False, _price(shape, dtype, algorithm, state[0])))
    if not isinstance(shape, Conv | Transition | Head):  # the layer of the last two is not all of them
        layers = [choose(layer, dtype, device, "cpu", accuracy, state) for layer in shape.layers()]
        seconds = sum(layer.seconds[0][1] for layer in layers) + CALL_SECONDS * (len(layers) - 1)
        found.append(_Candidate("cpu", "layers", True, seconds, "" if why_not is None else f", {why_not}"))
    return found


def _gpu_candidates(
    name: str, shape: Shape, dtype: torch.dtype, device: torch.device, accuracy: str, state: State
) -> list[_Candidate]:
    """The kernels of one GPU backend, by measured time where there is one, else in its own order of preference."""
    measured = tuned.backend_seconds(shape, dtype, device) or {}
    found = [
        _Candidate(name, c.algorithm, False, measured.get(f"{name} {c.algorithm}"), config=c.config)
        for c in GPU_KERNELS[name].candidates(shape, dtype, device)
    ]
    if not isinstance(shape, Conv):
        try:
            layers = [choose(layer, dtype, device, name, accuracy, state) for layer in shape.layers()]
        except BackendError:  # a stem's convolution of 3 channels has no kernel of its own
            return found
        known = [layer.seconds[0][1] for layer in layers if layer.seconds]
        # What a pooling takes beside the layers is not known.
        complete = len(known) == len(layers) and not isinstance(shape, Transition | Head)
        found.append(_Candidate(name, "layers", True, sum(known) if complete else None))
    return found


def _vendor_candidate(shape: Shape, dtype: torch.dtype, device: torch.device, threads: int) -> _Candidate:
    composed = not isinstance(shape, Conv)
    if device.type == "cpu":
        seconds = _price(shape, dtype, "vendor", threads) if native.available() else None
        return _Candidate("vendor", "onednn", composed, seconds)
    measured = tuned.backend_seconds(shape, dtype, device) or {}
    return _Candidate("vendor", "cudnn", composed, measured.get("vendor cudnn"))


@functools.lru_cache(maxsize=4096)
def choose(shape: Shape, dtype: torch.dtype, device: torch.device, backend: str, accuracy: str, state: State) -> Choice:
    """Choose how to compute a layer or block. Memoised.

    Args:
        shape: of the layer or block.
        dtype: of its input.
        device: of its input.
        backend: `"auto"`, or the only backend to consider.
        accuracy: `"strict"` or `"fast"`.
        state: from `state()`.

    Raises:
        BackendError: the backend asked for by name cannot run this.
    """
    if isinstance(shape, BottleneckChain):
        return _choose_chain(shape, dtype, device, backend, accuracy, state)
    on_cpu = device.type == "cpu"
    candidates: list[_Candidate] = []
    obstacles: dict[str, str] = {}
    if backend == "cpu" or (backend == "auto" and on_cpu):
        if why := cpu.unsupported(dtype, device):
            obstacles["cpu"] = why
        else:
            candidates += _cpu_candidates(shape, dtype, device, accuracy, state)
    for name, kernels in GPU_KERNELS.items():
        if backend == name or (backend == "auto" and not on_cpu):
            if why := _gpu_unsupported(kernels, shape, dtype, device):
                obstacles[name] = why
            else:
                candidates += _gpu_candidates(name, shape, dtype, device, accuracy, state)
    if backend in ("auto", "vendor"):
        why = (vendor if on_cpu else cudnn).unsupported(shape, dtype, device)
        if why is None and candidates:
            why = _vendor_inexact(shape, dtype, accuracy) if on_cpu else None
        if why:
            obstacles["vendor"] = why
        else:
            candidates.append(_vendor_candidate(shape, dtype, device, state[0]))
    if not candidates and backend in obstacles:
        raise BackendError(f"backend={backend!r} cannot run this: {obstacles[backend]}")
    if not candidates:
        candidates.append(_Candidate("reference", "torch", not isinstance(shape, Conv), None))
    return _best(shape, backend, candidates, obstacles)


def _choose_chain(
    shape: BottleneckChain, dtype: torch.dtype, device: torch.device, backend: str, accuracy: str, state: State
) -> Choice:
    """A chain's own kernel where it was measured faster than its blocks, or is asked for and nothing was measured.

    Of backend `"cuda"`, where nothing was measured, only where its estimates prefer it to the blocks.
    """
    block = choose(shape.block, dtype, device, backend, accuracy, state)
    seconds = shape.depth * block.seconds[0][1] if block.seconds else None
    single = _Candidate(block.backend, "blocks", True, seconds)
    own: list[_Candidate] = []
    obstacles: dict[str, str] = {}
    if backend == "auto" and device.type == "cpu":
        obstacles["cpu"] = "it has no kernel for more than a block"
    for name, kernels in GPU_KERNELS.items():
        if backend != name and (backend != "auto" or device.type == "cpu"):
            continue
        if why := kernels.unsupported(shape, dtype, device):
            obstacles[name] = why
        else:
            # A time says nothing where that of the blocks is not known.
            measured = tuned.backend_seconds(shape, dtype, device) or {} if block.seconds else {}
            own += [
                _Candidate(name, c.algorithm, False, measured.get(f"{name} {c.algorithm}"), config=c.config)
                for c in kernels.candidates(shape, dtype, device)
            ]
    blocks_first = own and backend == "cuda" and not cuda.chain_pays(shape, dtype, device)
    return _best(shape, backend, [single, *own] if blocks_first else [*own, single], obstacles)


def _gpu_unsupported(kernels: ModuleType, shape: Shape, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a GPU backend can run neither a kernel for the whole of it nor one for each of its layers, None if it can."""
    why = kernels.unsupported(shape, dtype, device)
    if why is None or isinstance(shape, Conv):
        return why
    return next((why for layer in shape.layers() if (why := kernels.unsupported(layer, dtype, device))), None)


def _best(shape: Shape, backend: str, candidates: list[_Candidate], obstacles: dict[str, str]) -> Choice:
    """The choice among the candidates: the lowest time if any is known, else the first; for `auto` on a GPU cuDNN."""
    priced = sorted((c for c in candidates if c.seconds is not None), key=lambda c: c.seconds or 0.0)
    best = priced[0] if priced else candidates[0]
    reasons = [f"{name}: {why}" for name, why in obstacles.items()]
    if backend != "auto":
        reasons.insert(0, f"backend={backend!r}")
    elif len(priced) > 1:
        reasons.insert(0, "lowest measured time" if best.backend in GPU_KERNELS else "lowest predicted time")
    elif not priced and len(candidates) > 1:
        best = candidates[-1]
        reasons.insert(0, "nothing was measured for this shape on this GPU: `resnet-fused tune` does")
    reason = "; ".join(reasons) + best.note
    seconds = tuple((c.name, c.seconds) for c in priced if c.seconds is not None)
    empty = 0 in shape.output_shape
    return Choice(shape, best.backend, best.algorithm, reason, seconds, best.config, best.composed, empty)


class _Recording(threading.local):
    def __init__(self) -> None:
        self.choices: list[Choice] | None = None


_recording = _Recording()


def note(*choices: Choice) -> None:
    """Called by every op with what it is about to run."""
    if _recording.choices is not None:
        _recording.choices += choices


@contextmanager
def record() -> Iterator[list[Choice]]:
    """Collect the choices of the ops that this thread runs, in order; a composed block is followed by its layers."""
    previous, _recording.choices = _recording.choices, []
    try:
        yield _recording.choices
    finally:
        _recording.choices = previous
