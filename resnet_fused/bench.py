"""The benchmark: is the fused model equal to the original, how much faster is it, and how much memory does it take?

Everything that is timed or weighed runs in a fresh Python process (a worker: this file run as a module), out of reach
of what the allocator and the caches kept from earlier work. One worker times all contenders of a dtype, interleaved:
one call of each in turn, in an order that changes from round to round. It runs twice: with the allocator's defaults,
and with memory reused (see `REUSE`); on a GPU, whose memory torch manages itself, once.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import importlib.util
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from . import blocks, environment, models
from .errors import InputError, WorkerError
from .explain import explain
from .fuse import fuse
from .gpu_timer import cudnn_measures
from .kernels import native
from .settings import ACCURACIES, one_of
from .verify import verify

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICES = ("cpu", "cuda")
SCHEMA = 1  # of the results as JSON; a reader refuses any other
SEED = 0
BASELINE = "eager channels_last"

# glibc gives large tensors back to the system when they are freed, and every fresh page costs a fault on first touch:
# for eager that can be half of the time. With these settings it keeps and reuses them, as tuned servers do.
REUSE = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}

MEMORY = {"cpu": ("default", "reused"), "cuda": ("default",)}

Progress = Callable[[str, float], None]  # what is going on, and the share of the whole job that is done


@dataclass(frozen=True)
class Contender:
    """One row of the benchmark: a model in one memory format, fused (at an accuracy) or not (accuracy None)."""

    name: str
    accuracy: str | None = None


@dataclass(frozen=True)
class Job:
    """What to measure; `accuracy=None` means strict, and in fp32, where they differ, fast as well.

    `model` is one of `resnet_fused.models`, or a block of one as `explain` names it: `"resnet50/layer1.1"`.

    Raises:
        InputError: a name is unknown, a number is out of range, the device or a package is missing.
    """

    model: str = "resnet50"
    batch: int = 16
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    device: str = "cpu"
    accuracy: str | None = None
    seconds: float = 15.0  # of timing, for each worker

    def __post_init__(self) -> None:
        models.find(self.network)
        one_of("device", self.device, DEVICES)
        for dtype in self.dtypes:
            one_of("dtype", dtype, tuple(DTYPES))
        if self.accuracy is not None:
            one_of("accuracy", self.accuracy, ACCURACIES)
        if self.batch < 1:
            raise InputError(f"batch must be at least 1, got {self.batch}")
        if not 0 <= self.seconds < math.inf:
            raise InputError(f"seconds must be a number of at least 0, got {self.seconds}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError(
                f"device must be one that torch can use: 'cuda' was given, torch {torch.__version__} sees no GPU"
            )
        require("skimage", "scikit-image", "real pictures")

    @property
    def network(self) -> str:
        """The model; if a block is measured, the one that it is of."""
        return blocks.split(self.model)[0]

    @property
    def block(self) -> str:
        """The block's path in the network; empty for the whole."""
        return blocks.split(self.model)[1]

    def accuracies(self, dtype: str) -> tuple[str, ...]:
        """Those at which the model is fused for one dtype."""
        if self.accuracy is not None:
            return (self.accuracy,)
        return ACCURACIES if dtype == "fp32" else ("strict",)

    def contenders(self, dtype: str) -> list[Contender]:
        """The rows to measure for one dtype, the baseline among them."""
        fused = [
            Contender("fused" if accuracy == "strict" else "fused fast", accuracy)
            for accuracy in self.accuracies(dtype)
        ]
        return [Contender("eager"), Contender(BASELINE), *fused]


def require(module: str, distribution: str, purpose: str) -> None:
    """Raise InputError unless `module` can be imported."""
    if importlib.util.find_spec(module) is None:
        raise InputError(f"{purpose} need {distribution}: pip install resnet_fused[bench]")


PICTURES = """
    astronaut chelsea coffee rocket hubble_deep_field immunohistochemistry retina stereo_motorcycle
    camera coins moon page clock text brick grass
""".split()  # noqa: SIM905 (one line a name would be long)


def real_pictures(count: int, size: int = 224) -> Tensor:
    """Return pictures from scikit-image, normalised as for ImageNet: float32 [count, 3, size, size].

    There are 16; further ones are the same mirrored, then crops from other corners.
    """
    from skimage import data

    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    pictures = []
    for index in range(count):
        lap, which = divmod(index, len(PICTURES))
        loaded = getattr(data, PICTURES[which])()
        picture = torch.from_numpy(loaded[0] if isinstance(loaded, tuple) else loaded)  # stereo: the left one
        picture = (picture if picture.dim() == 3 else picture.unsqueeze(2).expand(-1, -1, 3)).permute(2, 0, 1)
        scale = size * 8 / 7 / min(picture.shape[1:])  # short side 256 for a crop of 224
        picture = nn.functional.interpolate(
            picture[None].float(), scale_factor=scale, mode="bilinear", antialias=True, align_corners=False
        )[0]
        # Lap 0 takes the centre; later laps the corners in turn, every other one mirrored.
        part = ((0.5, 0.5), (0.5, 0.5), (0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0))[lap % 6]
        top, left = (int(share * (extent - size)) for share, extent in zip(part, picture.shape[1:], strict=True))
        picture = picture[:, top : top + size, left : left + size]
        pictures.append(((picture.flip(2) if lap % 2 else picture) / 255 - mean) / std)
    return torch.stack(pictures)


def make_model(name: str) -> nn.Module:
    """Return the model `name` of `resnet_fused.models` in eval mode, with seeded random weights and BatchNorms.

    A fresh BatchNorm is nearly the identity, and a parity check on it would prove little: all four of its vectors are
    drawn at random.
    """
    torch.manual_seed(SEED)
    return models.randomize_batchnorms(models.build(name)).eval()


def prepare(job: Job, dtype: str) -> tuple[nn.Module, Tensor]:
    """Return the unfused model and the input pictures, both in `dtype`, on the device, contiguous (NCHW).

    For a block these are the block, and what the pictures are when they get there, computed in float32.

    Raises:
        InputError: the model has no such block.
    """
    model, x = make_model(job.network), real_pictures(job.batch, models.find(job.network).image)
    if job.block:
        model, x = blocks.cut(model, job.block, x)
    return model.to(job.device, DTYPES[dtype]), x.to(job.device, DTYPES[dtype])


def contend(contender: Contender, model: nn.Module, x: Tensor) -> tuple[Callable[[], Tensor], float]:
    """Return a call of one forward pass of the contender, and the seconds it took to fuse (0 when unfused)."""
    if contender.name == "eager":
        return lambda: model(x), 0.0
    x = x.contiguous(memory_format=torch.channels_last)
    if contender.accuracy is None:
        eager: nn.Module = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return lambda: eager(x), 0.0
    started = time.perf_counter()
    fused = fuse(model, accuracy=contender.accuracy)
    return lambda: fused(x), time.perf_counter() - started


def percentile(samples: list[float], share: float) -> float:
    """The sample below which `share` of the samples lie, interpolated."""
    return torch.quantile(torch.tensor(samples, dtype=torch.float64), share).item()


def interleave(
    calls: dict[str, Callable[[], object]],
    seconds: float,
    on_progress: Callable[[float], None] = lambda share: None,
    min_rounds: int = 5,
    max_rounds: int = 200,
) -> dict[str, list[float]]:
    """Time the calls in turn, after two rounds of warm-up, and return the milliseconds of each.

    The order changes from round to round (seeded), so that no call always runs in the wake of the same other one.
    """
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    order = random.Random(SEED)
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for name in names * 2:
        calls[name]()
    gc.collect()
    gc.disable()
    try:
        begun = time.perf_counter()
        for done in range(1, max_rounds + 1):
            order.shuffle(names)
            for name in names:
                synchronize()
                started = time.perf_counter()
                calls[name]()
                synchronize()
                samples[name].append((time.perf_counter() - started) * 1e3)
            spent = time.perf_counter() - begun
            on_progress(min(1.0, spent / max(seconds, 1e-9), done / min_rounds))
            if done >= min_rounds and spent >= seconds:
                break
    finally:
        gc.enable()
    return samples


# --- workers ------------------------------------------------------------------------------------------------------


def time_contenders(job: Job, dtype: str, on_progress: Callable[[float], None]) -> list[dict[str, Any]]:
    """Time every contender of one dtype; runs in a worker."""
    model, x = prepare(job, dtype)
    calls: dict[str, Callable[[], object]] = {}
    rows: list[dict[str, Any]] = []
    for contender in job.contenders(dtype):
        call, fuse_seconds = contend(contender, model, x)
        started = time.perf_counter()
        call()
        first_call_seconds = time.perf_counter() - started
        row: dict[str, Any] = {
            "name": contender.name,
            "kind": "fused" if contender.accuracy else "eager",
            "accuracy": contender.accuracy,
            "status": "ok",
            "setup_seconds": fuse_seconds + first_call_seconds,
        }
        if contender.accuracy:
            row |= {"fuse_seconds": fuse_seconds, "first_call_seconds": first_call_seconds}
        calls[contender.name] = call
        rows.append(row)
    samples = interleave(calls, job.seconds, on_progress)
    return [row | {"ms_samples": samples[row["name"]]} for row in rows]


def weigh_contender(job: Job, dtype: str, name: str) -> dict[str, float | None]:
    """Measure the memory of one contender's forward pass in this (fresh) process; runs in a worker.

    `kept_mb` is what the first call leaves behind (packed weights, compiled kernels, caches), `peak_extra_mb` what the
    second one needs on top of that at its peak, its output included. None where the system does not tell.
    """
    model, x = prepare(job, dtype)
    contender = next(contender for contender in job.contenders(dtype) if contender.name == name)
    call, _ = contend(contender, model, x)
    if job.device == "cuda":
        base = torch.cuda.memory_allocated()
        call()
        kept = torch.cuda.memory_allocated() - base
        torch.cuda.reset_peak_memory_stats()
        call()
        extra = torch.cuda.max_memory_allocated() - base - kept
        return {"kept_mb": kept / 2**20, "peak_extra_mb": extra / 2**20}
    try:
        release_memory()
        before, _ = resident_mb()
        call()
        release_memory()
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        settled, _ = resident_mb()
        call()
        _, peak = resident_mb()
    except OSError:
        return {"kept_mb": None, "peak_extra_mb": None}
    return {"kept_mb": settled - before, "peak_extra_mb": peak - settled}


def release_memory() -> None:
    """Give free memory back to the system: Python's, the native library's pool and the C allocator's."""
    gc.collect()
    if native.bindings is not None:
        native.bindings.release_memory()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def resident_mb() -> tuple[float, float]:
    """This process's resident memory and its peak, in MiB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, peak = (int(fields[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM"))
    return now, peak


def run_worker(spec: dict[str, Any], reuse: bool, on_progress: Callable[[float], None]) -> Any:
    """Run one worker in a fresh process and return its result.

    Raises:
        WorkerError: the worker failed or died; the message says how, with the last line that it wrote.
    """
    env = {key: value for key, value in os.environ.items() if key not in REUSE} | (REUSE if reuse else {})
    command = [sys.executable, "-m", "resnet_fused.bench", json.dumps(spec)]
    result = None
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            for line in process.stdout:
                message = json.loads(line)
                if "progress" in message:
                    on_progress(message["progress"])
                result = message.get("result", result)
        except BaseException:
            process.kill()
            raise
        if process.wait() != 0 or result is None:
            errors.seek(0)
            raise WorkerError(f"benchmark worker {spec['task']!r} {how_it_ended(process.returncode, errors.read())}")
    return result


def how_it_ended(status: int, written: str) -> str:
    """How a process ended, in words: the signal, or the exit status and the last line that it wrote."""
    if status < 0:
        name = signal.Signals(-status).name
        return f"was ended by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
    lines = written.strip().splitlines() or ["it wrote nothing"]
    return f"ended with status {status}: {lines[-1][:300]}"


def worker_main(argument: str) -> None:
    """Do what `run_worker` asked for; progress and result go to stdout, one JSON object a line."""

    def say(**message: Any) -> None:
        print(json.dumps(message), flush=True)

    spec = json.loads(argument)
    job = Job(**spec["job"] | {"dtypes": tuple(spec["job"]["dtypes"])})
    # cuDNN measures and chooses, for the unfused model as well, as a server would have it.
    chosen = cudnn_measures() if job.device == "cuda" else nullcontext()
    with torch.inference_mode(), chosen:
        if spec["task"] == "time":
            say(result=time_contenders(job, spec["dtype"], lambda share: say(progress=share)))
        else:
            say(result=weigh_contender(job, spec["dtype"], spec["name"]))


# --- the whole job ------------------------------------------------------------------------------------------------


def check_parity(job: Job, dtype: str, accuracy: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fuse the model and return its parity report and its plan, both as JSON objects."""
    model, x = prepare(job, dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    fused = fuse(model, accuracy=accuracy)
    tags = {"dtype": dtype, "accuracy": accuracy}
    return verify(model, fused, x).to_dict() | tags, explain(fused, x).to_dict() | tags


def run(job: Job, on_progress: Progress = lambda what, share: None) -> dict[str, Any]:
    """Run the whole benchmark and return its result, ready for `json.dump`.

    Every row is one (dtype, contender, allocator): `name`, `kind` ("eager" or "fused"), `dtype`, `accuracy`, `memory`
    ("default" or "reused"), `status` ("ok"), `images_per_s`, `ms_median`, `ms_p20`, `ms_p80`, `ms_samples`, `speedup`
    (over `baseline` at the same dtype and memory), `setup_seconds`; with default memory also `peak_extra_mb` and
    `kept_mb`, see `weigh_contender`; fused rows also `fuse_seconds`, `first_call_seconds`.
    """
    # Stages, each with the share of the whole job's time it is expected to take.
    parity = [(d, c.accuracy) for d in job.dtypes for c in job.contenders(d) if c.accuracy]
    timing = list(itertools.product(job.dtypes, MEMORY[job.device]))
    memory = [(d, c.name) for d in job.dtypes for c in job.contenders(d)]
    total = 8.0 * len(parity) + (job.seconds + 6.0) * len(timing) + 5.0 * len(memory)
    done = 0.0

    @contextmanager
    def stage(what: str, seconds: float) -> Iterator[Callable[[float], None]]:
        """Give a reporter for the share of this stage that is done."""
        nonlocal done
        on_progress(what, done / total)
        yield lambda share: on_progress(what, (done + share * seconds) / total)
        done += seconds

    clocks = environment.clocks(job.device)
    reports, plans = [], []
    for dtype, accuracy in parity:
        with stage(f"parity, {dtype} {accuracy}", 8.0):
            report, plan = check_parity(job, dtype, accuracy)
            reports.append(report)
            plans.append(plan)

    spec: dict[str, Any] = {"job": asdict(job)}
    rows: list[dict[str, Any]] = []
    for dtype, memory_kind in timing:
        with stage(f"timing, {dtype}, {memory_kind} memory", job.seconds + 6.0) as report_share:
            timed = run_worker(spec | {"task": "time", "dtype": dtype}, memory_kind == "reused", report_share)
        medians = {row["name"]: median(row["ms_samples"]) for row in timed}
        rows += [summarise(row, dtype, memory_kind, job.batch, medians[BASELINE]) for row in timed]
    for dtype, name in memory:
        with stage(f"memory, {dtype} {name}", 5.0):
            weight = run_worker(spec | {"task": "weigh", "dtype": dtype, "name": name}, False, lambda share: None)
        row = next(r for r in rows if (r["dtype"], r["name"], r["memory"]) == (dtype, name, "default"))
        row.update(weight)
    on_progress("done", 1.0)

    parity_ok = all(report["ok"] for report in reports)
    return header(job, clocks) | {"rows": rows, "parity": {"ok": parity_ok, "reports": reports}, "plans": plans}


def header(job: Job, clocks: dict[str, Any] | None = None) -> dict[str, Any]:
    """What was measured, on what and with what: the fields that every result has.

    Args:
        job: what was measured.
        clocks: those before the run, from `environment.clocks`; those after it are read now.
    """
    return {
        "schema": SCHEMA,
        "peers": False,
        "interrupted": False,
        "machine": None,
        **environment.conditions(job.device),
        "clocks": {"before": clocks, "after": environment.clocks(job.device)},
        "model": job.model,
        "dtype": ",".join(job.dtypes),
        "batch": job.batch,
        "baseline": BASELINE,
    }


def summarise(row: dict[str, Any], dtype: str, memory: str, batch: int, baseline_ms: float | None) -> dict[str, Any]:
    """Return a timed row with the figures that follow from its samples; without samples they are None."""
    samples = row["ms_samples"]
    middle = median(samples) if samples else None
    return row | {
        "dtype": dtype,
        "memory": memory,
        "images_per_s": batch / middle * 1e3 if middle else None,
        "ms_median": middle,
        "ms_p20": percentile(samples, 0.2) if samples else None,
        "ms_p80": percentile(samples, 0.8) if samples else None,
        "speedup": baseline_ms / middle if middle and baseline_ms else None,
    }


if __name__ == "__main__":
    worker_main(sys.argv[1])
