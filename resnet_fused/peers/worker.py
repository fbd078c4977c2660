"""A contender's own process: it is set up and run here, so that thread pools, allocators and crashes stay apart.

The parent sends (method, arguments) through a pipe and gets ("ok", result) or ("failed", reason) back.
"""

from __future__ import annotations

import ctypes
import gc
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy
import torch

from .. import bench
from ..explain import explain
from ..fuse import fusions
from ..roofline import Machine
from .energy import meter
from .peer import Peer, Task

CHUNK = 8  # images at a time through the float64 model, whose activations are twice those of float32
MAX_SAMPLES = 100  # in one turn


class Runner:
    """One contender of one task."""

    def __init__(self, peer: Peer | None, model: Path, task: Task) -> None:
        """Read the model and its input, both float32; `peer` None is the float64 reference."""
        torch.set_num_threads(task.threads)
        if task.device == "cuda":
            torch.backends.cudnn.benchmark = True  # cuDNN measures and chooses, as a server would have it
        dtype = bench.DTYPES[task.dtype]
        self.peer, self.task = peer, task
        self.model, self.x = (part.to(task.device, dtype) for part in torch.load(model, weights_only=False))
        self.synchronize = torch.cuda.synchronize if task.device == "cuda" else lambda: None
        self.flush: torch.Tensor | None = None

    def reference(self) -> numpy.ndarray:
        """The output of the model, as rounded to the dtype, in float64."""
        exact = self.model.double()
        with torch.inference_mode():
            return torch.cat([exact(part.double()) for part in self.x.split(CHUNK)]).cpu().numpy()

    def set_up(self, machine: Machine) -> dict[str, Any]:
        """Set the contender up and run it once; a fused one's plan is placed on the machine's roofline."""
        assert self.peer is not None
        before = self.memory_mb()
        started = time.perf_counter()
        self.ready = self.peer.prepare(self.model, self.x, self.task)
        first = self.call()
        self.synchronize()
        setup_seconds = time.perf_counter() - started
        output = self.ready.output(first).float().cpu().numpy().copy()  # float32 holds every dtype's values
        del first
        after = self.memory_mb()
        kept = None if before is None or after is None else after - before
        extra = self.peak_extra_mb()
        gc.freeze()  # so that the collection before every turn is short
        fused = self.ready.fused
        with torch.inference_mode():
            plan = None
            if fused is not None and self.peer.accuracy:
                plan = explain(fused, self.x, machine, timed=False).to_dict()
        return {
            "output": output,
            "setup_seconds": setup_seconds,
            "settings": self.ready.settings,
            "kept_mb": kept,
            "peak_extra_mb": extra,
            "plan": plan,
            "blocks": len(fusions(fused)) if fused is not None else 0,
        }

    def call(self) -> Any:
        """One forward pass."""
        with torch.inference_mode():
            return self.ready.call()

    def turn(self, seconds: float, warm: bool, tidy: bool) -> list[float]:
        """Time calls until `seconds` have passed, one at least, and return the milliseconds of each.

        Args:
            seconds: to spend.
            warm: make an untimed call first: other processes have had the caches since.
            tidy: give free memory back afterwards.
        """
        if warm:
            self.call()
        samples: list[float] = []
        gc.collect()
        gc.disable()
        try:
            begun = time.perf_counter()
            while not samples or (time.perf_counter() - begun < seconds and len(samples) < MAX_SAMPLES):
                self.cool()
                self.synchronize()
                started = time.perf_counter()
                self.call()
                self.synchronize()
                samples.append((time.perf_counter() - started) * 1e3)
        finally:
            gc.enable()
        if tidy:
            self.release()
        return samples

    def joules(self, seconds: float) -> float | None:
        """Joules that an image takes, from calls without pause for at least `seconds`; None without a counter."""
        read = meter(self.task.device)
        if read is None:
            return None
        self.call()
        self.synchronize()
        calls, begun, before = 0, time.perf_counter(), read()
        while time.perf_counter() - begun < seconds:
            self.call()
            self.synchronize()
            calls += 1
        used = read() - before
        return used / (calls * self.task.batch) if used > 0 else None

    def cool(self) -> None:
        """Drive everything out of a GPU's L2 cache, by writing twice its size."""
        if self.task.device != "cuda":
            return
        if self.flush is None:
            size = 2 * torch.cuda.get_device_properties(self.x.device).L2_cache_size
            self.flush = torch.empty(size, dtype=torch.int8, device=self.x.device)
        self.flush.zero_()

    def release(self) -> None:
        """Give free memory back, to the system or the GPU."""
        bench.release_memory()
        if self.task.device == "cuda":
            torch.cuda.empty_cache()

    def memory_mb(self) -> float | None:
        """Memory in use, in MiB: of this process, or of the whole GPU, where nobody else runs meanwhile."""
        self.release()
        if self.task.device == "cuda":
            free, total = torch.cuda.mem_get_info()
            return (total - free) / 2**20
        try:
            return bench.resident_mb()[0]
        except OSError:
            return None

    def peak_extra_mb(self) -> float | None:
        """Peak of one forward pass above what is in use between passes; None where that cannot be told."""
        if self.task.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.call()
            extra = torch.cuda.max_memory_allocated() - before
            assert self.peer is not None
            own = not {"torch", "resnet_fused"}.isdisjoint(self.peer.distributions)
            return extra / 2**20 if own else None  # others have allocators of their own
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
            before_mb, _ = bench.resident_mb()
            self.call()
            return bench.resident_mb()[1] - before_mb
        except OSError:
            return None


def one_line(error: BaseException) -> str:
    """An exception in one line of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400]


def die_with_parent() -> None:
    """Let Linux kill this process, stopped or not, when its parent dies."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def serve(connection: Connection) -> None:
    """Answer the parent until it hangs up."""
    die_with_parent()
    runner: Runner | None = None
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            if method == "start":
                runner, result = Runner(**arguments), None
            else:
                result = getattr(runner, method)(**arguments)
            connection.send(("ok", result))
        except Exception as error:
            connection.send(("failed", one_line(error)))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
