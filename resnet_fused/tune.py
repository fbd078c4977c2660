"""Tuning: measure every configuration of every kernel that can run a shape, keep the fastest in a file.

Nothing is kept that is not right on this GPU: each contender's output is compared with a float64 reference first.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import itertools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from . import plan, settings
from .attempts import Attempts
from .errors import BackendError, InputError
from .gpu_timer import Measure, check_gpu, cudnn_measures, interleave
from .kernels import cudnn, triton
from .kernels.triton import configs, tuned
from .kernels.triton.configs import Config
from .samples import Sample, sample
from .shapes import BottleneckChain, DenseBlock, Shape

FINALISTS = 1.2
"""A contender slower than the fastest of its kernel by more than this factor is not measured a second time."""

Progress = Callable[[str, float], None]  # what is going on, and the share of the whole job that is done


@dataclass(frozen=True)
class Contender:
    """One way to compute a shape.

    Attributes:
        backend: `"triton"`, `"cuda"` or `"vendor"`.
        algorithm: of the backend.
        config: of a Triton kernel that has several; else None.
        run: computes it.
    """

    backend: str
    algorithm: str
    config: Config | None
    run: Callable[[], Tensor]

    @property
    def candidate(self) -> str:
        """Its name in the plan."""
        return f"{self.backend} {self.algorithm}"

    def __str__(self) -> str:
        return self.candidate if self.config is None else f"{self.candidate}, {self.config}"


@dataclass(frozen=True)
class Tuned:
    """What was found for one shape.

    Attributes:
        shape: of the layer or block.
        seconds: median time of the best contender of every candidate, as in "triton pointwise", fastest first.
        configs: of the best contender, by Triton kernel.
        rejected: (contender, why) of those that failed or were not accurate.
    """

    shape: Shape
    seconds: dict[str, float]
    configs: dict[str, Config]
    rejected: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Result:
    """What a tuning run found, and where it was written.

    Attributes:
        gpu: name that the driver gives.
        dtype: of the images.
        path: of the file.
        shapes: one for each shape, in the order they were given.
    """

    gpu: str
    dtype: torch.dtype
    path: Path
    shapes: tuple[Tuned, ...]


def shapes_of(model: nn.Module, x: Tensor) -> list[Shape]:
    """The shapes of the ops that a fused model runs on an input, and of their parts, each once, parts first."""
    with torch.inference_mode(), plan.record() as choices:
        model(x)
    return list(dict.fromkeys(shape for choice in choices if not choice.empty for shape in parts_of(choice.shape)))


def parts_of(shape: Shape) -> list[Shape]:
    """The layers of a block, the dense layers of a dense block, the block that a chain repeats, and itself."""
    inner: list[Shape] = []
    if isinstance(shape, DenseBlock):  # its layers have configurations of their own
        inner = [replace(shape, c=shape.c + i * shape.growth, depth=1) for i in range(shape.depth)]
    if isinstance(shape, BottleneckChain):
        inner = [shape.block]
    return [*shape.layers(), *inner, shape]


def contenders(call: Sample, dtype: torch.dtype, device: torch.device, most: int | None = None) -> Iterator[Contender]:
    """Every way to compute a sample on this device: each configuration of each kernel, and the vendor's library.

    With `most`, only so many configurations of a kernel, those that the heuristic ranks first.
    """
    shape, arch = call.shape, configs.architecture(device)
    for backend, kernels in plan.GPU_KERNELS.items():
        if kernels.unsupported(shape, dtype, device):
            continue
        for candidate in kernels.candidates(shape, dtype, device):
            run = functools.partial(call.run_kernel, kernels, candidate.algorithm)
            if kernels is triton and not (isinstance(shape, DenseBlock) and shape.depth > 1):
                for config in configs.alternatives(candidate.algorithm, shape, dtype, arch)[:most]:
                    yield Contender(backend, candidate.algorithm, config, functools.partial(run, config=config))
            else:
                yield Contender(backend, candidate.algorithm, None, run)
    if not cudnn.unsupported(shape, dtype, device):
        yield Contender("vendor", "cudnn", None, functools.partial(call.run, "vendor"))


def tune(
    shapes: Iterable[Shape],
    dtype: torch.dtype,
    device: torch.device,
    seconds: float = 2.0,
    progress: Progress = lambda what, share: None,
    measure: Measure | None = None,
    folder: Path | None = None,
    most: int | None = None,
    workers: int = 0,
    missing: bool = False,
    timeout: float = 120.0,
) -> Result:
    """Measure shapes on this GPU and add what is found to the user's tuning file, which every later call reads.

    A kernel that hangs, or that costs this process its GPU, ends it; what was running then is in a file beside the
    tuning file, with the suffix `.attempts`, and the next call leaves it out.

    Args:
        shapes: see `shapes_of`.
        dtype: of the images: float32, bfloat16 or float16.
        device: a CUDA device.
        seconds: to spend on timing each shape; compiling comes on top.
        progress: called before each shape.
        measure: how to time; by CUDA events and graphs by default.
        folder: where to write; the user's cache folder by default.
        most: configurations of a kernel to try, those that the heuristic ranks first; all by default.
        workers: processes that compile a shape's kernels before it is measured; 0 for none but this one.
        missing: leave out the shapes that the file has already.
        timeout: seconds after which a kernel counts as hung; compiling is in them.

    Raises:
        InputError: the dtype is another one.
        BackendError: the device is no CUDA device and no `measure` is given, or a kernel cost this process its GPU.
        OSError: the folder cannot be written.
    """
    if dtype not in tuned.DTYPES.values():
        raise InputError(f"dtype must be one of {', '.join(tuned.DTYPES)}, got {dtype}")
    if measure is None:
        if device.type != "cuda":
            raise BackendError(f"tuning needs a CUDA GPU, the device is {device}")
        measure = functools.partial(interleave, device=device)
    gpu = configs.architecture(device).name
    file = tuned.path(gpu, folder or settings.cache_folder())
    known = tuned.read(file, gpu) if missing else {}
    wanted = [shape for shape in shapes if (shape, dtype) not in known]
    found: list[Tuned] = []
    attempts = Attempts(file.with_suffix(".attempts"), timeout)
    with compilers(wanted, dtype, device, most, workers) as wait_for, cudnn_measures():
        for done, shape in enumerate(wanted):
            progress(str(shape), done / len(wanted))
            wait_for(shape)
            found.append(tune_one(shape, dtype, device, seconds, measure, most, attempts))
            best = {kernel: config.to_dict() for kernel, config in found[-1].configs.items()}
            # After every shape: an interrupted run keeps what it has.
            tuned.write(gpu, {(shape, dtype): tuned.Entry(best, found[-1].seconds)}, folder)
    plan.choose.cache_clear()
    progress("done", 1.0)
    return Result(gpu, dtype, file, tuple(found))


@contextlib.contextmanager
def compilers(
    shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device, most: int | None, workers: int
) -> Iterator[Callable[[Shape], None]]:
    """Processes that compile, shape after shape; what is given waits until they are done with a shape.

    They leave kernels in Triton's cache on disk. Compiling takes longer than measuring, and one process compiles on one
    core. What fails here fails again, and is reported, where it is measured.
    """
    if not workers:
        yield lambda shape: None
        return
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_only_compile)
    try:
        parts = {
            shape: [pool.submit(_compile_part, shape, dtype, device, most, i, workers) for i in range(workers)]
            for shape in shapes
        }
        yield lambda shape: _wait(parts[shape])
    finally:
        pool.shutdown(cancel_futures=True)


COMPILE_SECONDS = 600.0
"""A shape's compilation is not waited for longer than this; what is left of it is done where it is measured."""


def _wait(parts: Sequence[concurrent.futures.Future[None]]) -> None:
    concurrent.futures.wait(parts, COMPILE_SECONDS)


def _only_compile() -> None:
    """Have Triton's kernels compiled and not run by this process: the GPU is another one's, which measures."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compiled(self: Any, *args: Any, **options: Any) -> Any:
        return run(self, *args, **{**options, "warmup": True})

    JITFunction.run = compiled


@torch.inference_mode()
def _compile_part(
    shape: Shape, dtype: torch.dtype, device: torch.device, most: int | None, part: int, parts: int
) -> None:
    """Compile for every `parts`-th contender of a shape, from number `part` on."""
    call = sample(shape, dtype, device, values=False)
    named = (contender for contender in contenders(call, dtype, device, most) if contender.backend == "triton")
    for contender in itertools.islice(named, part, None, parts):
        with contextlib.suppress(Exception):
            contender.run()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()  # the process that measures needs it


@torch.inference_mode()
def tune_one(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    measure: Measure,
    most: int | None = None,
    attempts: Attempts | None = None,
) -> Tuned:
    """Measure one shape; see `tune`."""
    attempts = attempts or Attempts()
    name = f"{shape}, {dtype}"
    call = sample(shape, dtype, device)
    exact = call.to(torch.float64).run("reference")
    allowed = 2 * _error(call.run("reference"), exact) + torch.finfo(dtype).eps * exact.abs().max().item()
    accepted: dict[str, Contender] = {}
    rejected: list[tuple[str, str]] = []
    for contender in contenders(call, dtype, device, most):
        try:
            with attempts.attempt(f"{name}: {contender}"):
                error = _error(contender.run(), exact)
        except Exception as problem:  # Triton and CUDA raise what they like: it must not end the run
            rejected.append((str(contender), f"{type(problem).__name__}: {problem}".splitlines()[0]))
            check_gpu(str(contender))
            continue
        if error <= allowed:
            accepted[str(contender)] = contender
        else:
            rejected.append((str(contender), f"error {error:.3g} against float64, {allowed:.3g} allowed"))
    del exact
    try:
        with attempts.attempt(f"{name}: timing", more_seconds=seconds + len(accepted)):
            return _fastest(shape, accepted, rejected, seconds, measure)
    except Exception as problem:  # captured and repeated they may fail where one run did not
        check_gpu(name)
        return Tuned(shape, {}, {}, (*rejected, ("timing", f"{type(problem).__name__}: {problem}".splitlines()[0])))


def _fastest(
    shape: Shape,
    accepted: dict[str, Contender],
    rejected: Sequence[tuple[str, str]],
    seconds: float,
    measure: Measure,
) -> Tuned:
    """Time those that are right, and those near the fastest of their kernel a second time."""
    times = {name: median(samples) for name, samples in _measured(accepted, seconds / 2, measure).items()}
    best: dict[str, float] = {}
    for name, contender in accepted.items():
        best[contender.candidate] = min(best.get(contender.candidate, times[name]), times[name])
    finalists = {name: c for name, c in accepted.items() if times[name] <= FINALISTS * best[c.candidate]}
    times = {name: median(samples) for name, samples in _measured(finalists, seconds / 2, measure).items()}
    ranked = sorted(finalists, key=times.__getitem__)
    winners: dict[str, str] = {}
    for name in ranked:
        winners.setdefault(accepted[name].candidate, name)
    chosen = {accepted[name].algorithm: config for name in winners.values() if (config := accepted[name].config)}
    return Tuned(shape, {candidate: times[name] for candidate, name in winners.items()}, chosen, tuple(rejected))


def _measured(entrants: dict[str, Contender], seconds: float, measure: Measure) -> dict[str, list[float]]:
    return measure({name: contender.run for name, contender in entrants.items()}, seconds) if entrants else {}


def _error(y: Tensor, exact: Tensor) -> float:
    """The largest absolute error; infinite where y has a NaN."""
    error: Any = (y.double() - exact).abs().max().item() if exact.numel() else 0.0
    return error if error == error else float("inf")
