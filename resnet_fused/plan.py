"""Which backend and algorithm computes a layer or block, and why.

The candidates are this package's kernel with each algorithm that `accuracy` allows, its layers one by one, and oneDNN's
layer-fused chain; the native library's cost model prices them and the cheapest is taken. What neither can run (another
dtype or device) goes to the reference.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .errors import BackendError
from .kernels import cpu, native, vendor
from .shapes import Conv, Shape

State = tuple[int, str]
"""Number of threads and instruction set: what a choice depends on beside the call's arguments."""


def state() -> State:
    """The state that a call made now is planned for."""
    return torch.get_num_threads(), native.isa()


@dataclass(frozen=True)
class Choice:
    """What the plan decided for one layer or block at one shape.

    Attributes:
        shape: of the layer or block.
        backend: `"cpu"`, `"vendor"` or `"reference"`.
        algorithm: of the cpu backend `"direct"`, `"winograd2"`, `"winograd4"`, or `"layers"` for a block computed by
            one kernel a layer; `"onednn"`; `"torch"`.
        reason: why, in a phrase.
        seconds: (candidate, predicted seconds) of everything that was considered and could be priced, best first.
        composed: whether a block is computed layer by layer.
        empty: whether the output has no elements, so that nothing runs at all.
    """

    shape: Shape
    backend: str
    algorithm: str
    reason: str
    seconds: tuple[tuple[str, float], ...] = ()
    composed: bool = False
    empty: bool = False


@dataclass(frozen=True)
class _Candidate:
    backend: str
    algorithm: str
    composed: bool
    seconds: float | None
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.backend} {self.algorithm}"


def algorithms(shape: Shape, dtype: torch.dtype, accuracy: str) -> tuple[str, ...]:
    """The algorithms of this package's kernel that `accuracy` allows.

    In float32, F(2x2, 3x3) adds up no more rounding than a direct convolution, F(4x4, 3x3) some ten times as much. In
    bfloat16 both are computed in float32 and the rounding of the output hides them.
    """
    if not shape.winograd:
        return ("direct",)
    return cpu.ALGORITHMS if dtype == torch.bfloat16 or accuracy == "fast" else ("direct", "winograd2")


MAX_VENDOR_SUM = 512
"""Products that oneDNN's layer-fused convolution may add up at `accuracy="strict"` in float32. It adds them in one
chain, whose error reached 6 times eager's on the 4608 products of a late 3x3 layer of a small image."""


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
    if not isinstance(shape, Conv):
        layers = [choose(layer, dtype, device, "cpu", accuracy, state) for layer in shape.layers()]
        seconds = sum(layer.seconds[0][1] for layer in layers)
        found.append(_Candidate("cpu", "layers", True, seconds, "" if why_not is None else f", {why_not}"))
    return found


def _vendor_candidate(shape: Shape, dtype: torch.dtype, threads: int) -> _Candidate:
    seconds = _price(shape, dtype, "vendor", threads) if native.available() else None
    return _Candidate("vendor", "onednn", not isinstance(shape, Conv), seconds)


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
    empty = 0 in shape.output_shape
    candidates: list[_Candidate] = []
    obstacles: dict[str, str] = {}
    if backend in ("auto", "cpu"):
        if why := cpu.unsupported(dtype, device):
            obstacles["cpu"] = why
        else:
            candidates += _cpu_candidates(shape, dtype, device, accuracy, state)
    if backend in ("auto", "vendor"):
        why = vendor.unsupported(shape, dtype, device)
        if why is None and candidates:
            why = _vendor_inexact(shape, dtype, accuracy)
        if why:
            obstacles["vendor"] = why
        else:
            candidates.append(_vendor_candidate(shape, dtype, state[0]))
    if not candidates and backend in obstacles:
        raise BackendError(f"backend={backend!r} cannot run this: {obstacles[backend]}")
    if not candidates:
        candidates.append(_Candidate("reference", "torch", not isinstance(shape, Conv), None))
    priced = sorted((c for c in candidates if c.seconds is not None), key=lambda c: c.seconds or 0.0)
    best = priced[0] if priced else candidates[0]
    reasons = [f"{name}: {why}" for name, why in obstacles.items()]
    if backend != "auto":
        reasons.insert(0, f"backend={backend!r}")
    elif len(priced) > 1:
        reasons.insert(0, "lowest predicted time")
    reason = "; ".join(reasons) + best.note
    seconds = tuple((c.name, c.seconds) for c in priced if c.seconds is not None)
    return Choice(shape, best.backend, best.algorithm, reason, seconds, best.composed, empty)


class _Recording(threading.local):
    def __init__(self) -> None:
        self.choices: list[Choice] | None = None


_recording = _Recording()


def note(choice: Choice) -> None:
    """Called by every op with what it is about to run."""
    if _recording.choices is not None:
        _recording.choices.append(choice)


@contextmanager
def record() -> Iterator[list[Choice]]:
    """Collect the choices of the ops that this thread runs, in order; a composed block is followed by its layers."""
    previous, _recording.choices = _recording.choices, []
    try:
        yield _recording.choices
    finally:
        _recording.choices = previous
