"""Times of GPU work: interleaved, with a cold L2 cache, on the GPU's own clock.

Every call is captured as a CUDA graph and replayed, so that what the host does between its kernels does not count. A
sample is the time between two CUDA events around a replay; the gap from an event to a graph's first kernel, the same
for all calls, is in it. Nothing here has run on a GPU yet.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from .errors import BackendError

Calls = Mapping[str, Callable[[], object]]
Samples = dict[str, list[float]]
Measure = Callable[[Calls, float], Samples]
"""(calls by name, seconds to spend) to the seconds that each run of each call took."""

MIN_ROUNDS = 5
MAX_ROUNDS = 500


def interleave(calls: Calls, seconds: float, device: torch.device) -> Samples:
    """Time calls in turn, in an order that changes from round to round, until `seconds` have passed.

    Args:
        calls: each does its work on the current stream; a call may compile or pack when it is called first.
        seconds: to spend on all of them together, warm-up not counted; at least 5 rounds are run.
        device: a CUDA device.

    Returns:
        Seconds that each run of each call took.
    """
    names, order = list(calls), random.Random(0)
    samples: Samples = {name: [] for name in names}
    with torch.cuda.device(device), cudnn_measures():
        # One pool for all: only one graph runs at a time, and what it computes is not looked at.
        pool = torch.cuda.graph_pool_handle()
        graphs = {name: captured(call, pool) for name, call in calls.items()}
        # Twice the L2 cache: writing it drives everything else out.
        flush = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)
        begun = time.perf_counter()
        for done in range(1, MAX_ROUNDS + 1):
            order.shuffle(names)
            events = {name: [torch.cuda.Event(enable_timing=True) for _ in "be"] for name in names}
            for name in names:
                flush.zero_()
                events[name][0].record()
                graphs[name].replay()
                events[name][1].record()
            torch.cuda.synchronize()
            for name, (start, end) in events.items():
                samples[name].append(start.elapsed_time(end) / 1e3)
            if done >= MIN_ROUNDS and time.perf_counter() - begun > seconds:
                break
    return samples


def check_gpu(culprit: str) -> None:
    """After an error: does the GPU still answer this process? An illegal access leaves it without one.

    Raises:
        BackendError: it does not; nothing that this process does from here on can succeed.
    """
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise BackendError(f"the GPU is lost to this process after {culprit}: {reason}") from error


@contextmanager
def cudnn_measures() -> Iterator[None]:
    """Have cuDNN measure its algorithms at a shape's first call.

    `torch.backends.cudnn.flags` would not do: it also sets what it is not given, and turns cuDNN off.
    """
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def captured(call: Callable[[], object], pool: Any = None) -> torch.cuda.CUDAGraph:
    """The call as a CUDA graph, after three runs in which it compiles, packs and chooses.

    Args:
        call: does its work on the current stream.
        pool: of memory, from `torch.cuda.graph_pool_handle`; None for one of the graph's own.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        call()
    return graph
