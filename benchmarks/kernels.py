"""Kernel benchmark: every convolution and block of some models, by every kernel that can run it, on one GPU.

    python benchmarks/kernels.py resnet50 densenet121 --dtype bf16 --batch 128 --json kernels.json

Times are medians of interleaved runs with a cold L2 cache. The roofline is that of the same run: a large copy gives the
bytes per second, a large matrix product the FLOP/s; a shape's least time is the larger of its two shares.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

import resnet_fused as rf
from resnet_fused import environment, plan, tune
from resnet_fused.attempts import Attempts, terminated_as_interrupted
from resnet_fused.bench import DTYPES
from resnet_fused.errors import BackendError, InputError
from resnet_fused.gpu_timer import Measure, check_gpu, cudnn_measures, interleave
from resnet_fused.kernels import cudnn
from resnet_fused.kernels.precision import allow_tf32
from resnet_fused.roofline import flops, traffic
from resnet_fused.samples import Sample, describe, sample
from resnet_fused.shapes import Shape

MODELS = {"resnet18": 224, "resnet50": 224, "densenet121": 224, "resnet56_cifar": 32}
"""The models whose shapes are measured by default, and the size of their images."""
EAGER, COMPILED, CUDNN = "eager channels_last", "torch.compile", "vendor cudnn"


def model_shapes(name: str, batch: int, size: int) -> list[Shape]:
    """The distinct convolutions and blocks of a model of `resnet_fused.models`, in order."""
    model = rf.models.randomize_batchnorms(getattr(rf.models, name)()).eval()
    fused = rf.fuse(model, backend="reference")
    shapes = tune.shapes_of(fused, torch.zeros(1, 3, size, size))
    return list(dict.fromkeys(replace(shape, n=batch) for shape in shapes))


@dataclass(frozen=True)
class Roofline:
    """What the GPU reached in this run: bytes/s of a copy (read and written) and FLOP/s of a matrix product."""

    bytes_per_second: float
    flops_per_second: float

    def seconds(self, shape: Shape, itemsize: int) -> float:
        """The least time for a shape."""
        return max(traffic(shape, itemsize) / self.bytes_per_second, flops(shape) / self.flops_per_second)

    def bound(self, shape: Shape, itemsize: int) -> str:
        """What limits a shape: "memory" or "compute"."""
        by_bytes = traffic(shape, itemsize) / self.bytes_per_second
        return "memory" if by_bytes > flops(shape) / self.flops_per_second else "compute"


def roofline(dtype: torch.dtype, device: torch.device, measure: Measure) -> Roofline:
    """Measure the ceilings: 1 GiB copied, 8192 x 8192 matrices multiplied (float32 in TF32 if convolutions are)."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    calls = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b, out=out)}
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "tf32" if allow_tf32(device) else "ieee"
    try:
        best = {name: min(samples) for name, samples in measure(calls, 1.0).items()}
    finally:
        switch.fp32_precision = before
    return Roofline(2 * source.numel() / best["copy"], 2 * 8192**3 / best["product"])


# --- what the kernels are compared with ---------------------------------------------------------------------------


def _layer(x, w, scale, shift, residual=None, *, activation="relu", **geometry):
    y = _norm(functional.conv2d(x, w, None, **geometry), scale, shift)
    y = y if residual is None else y + residual
    return y.relu_() if activation == "relu" else y


def _norm(x, scale, shift):
    mean, variance = _statistics(shift)
    return functional.batch_norm(x, mean, variance, scale, shift, eps=1e-30)


_made: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}


def _statistics(shift):
    """Mean 0 and variance 1, made once: a model's BatchNorms have theirs."""
    key = (shift.shape[0], shift.device)
    if key not in _made:
        _made[key] = torch.zeros_like(shift), torch.ones_like(shift)
    return _made[key]


def _conv(x, w, scale, shift, residual, in_scale, in_shift, **options):
    return _layer(x if in_scale is None else _norm(x, in_scale, in_shift).relu_(), w, scale, shift, residual, **options)


def _bottleneck(
    x, w1, b1, w2, b2, w3, b3, wd, bd, *, s1, s2, s3, sd, stride, dilation, groups, stride_in_1x1
):  # fmt: skip
    h = _layer(x, w1, s1, b1, stride=stride if stride_in_1x1 else 1)
    middle = {"stride": 1 if stride_in_1x1 else stride, "padding": dilation, "dilation": dilation, "groups": groups}
    h = _layer(h, w2, s2, b2, **middle)
    side = x if wd is None else _layer(x, wd, sd, bd, stride=stride, activation="none")
    return _layer(h, w3, s3, b3, side)


def _basic_block(x, w1, b1, w2, b2, wd, bd, *, s1, s2, sd, stride, dilation):
    h = _layer(x, w1, s1, b1, stride=stride, padding=dilation, dilation=dilation)
    side = x if wd is None else _layer(x, wd, sd, bd, stride=stride, activation="none")
    return _layer(h, w2, s2, b2, side, padding=dilation, dilation=dilation)


def _stem(x, w, scale, shift, *, stride, padding, pool_kernel, pool_stride, pool_padding):
    y = _layer(x, w, scale, shift, stride=stride, padding=padding)
    return functional.max_pool2d(y, pool_kernel, pool_stride, pool_padding)


def _preact_block(
    x, in_scale, in_shift, weights, scales, shifts, wd, *, stride, dilation, groups, stride_in_1x1
):  # fmt: skip
    z = x if in_scale is None else _norm(x, in_scale, in_shift).relu_()
    spatial = {"padding": dilation, "dilation": dilation}
    path = [spatial | {"stride": stride}, spatial]
    if len(weights) == 3:
        middle = spatial | {"stride": 1 if stride_in_1x1 else stride, "groups": groups}
        path = [{"stride": stride if stride_in_1x1 else 1}, middle, {}]
    h = z
    for i, geometry in enumerate(path):
        last = i == len(path) - 1
        h = _layer(h, weights[i], scales[i], shifts[i], activation="none" if last else "relu", **geometry)
    return h + (x if wd is None else functional.conv2d(z, wd, stride=stride))


def _dense_block(x, layers):
    for layer in layers:
        h = _norm(x, layer.in_scale, layer.in_shift).relu_()
        if layer.w1 is not None:
            h = _layer(h, layer.w1, layer.s1, layer.b1)
        x = torch.cat([x, functional.conv2d(h, layer.w2, padding=1)], 1)
    return x


def _transition(x, in_scale, in_shift, w):
    return functional.avg_pool2d(functional.conv2d(_norm(x, in_scale, in_shift).relu_(), w), 2)


def _bottleneck_chain(x, weights, scales, shifts):
    layers = list(zip(weights, scales, shifts, strict=True))
    for i in range(0, len(layers), 3):
        h = _layer(_layer(x, *layers[i]), *layers[i + 1], padding=1)
        x = _layer(h, *layers[i + 2], x)
    return x


def _head(x, weight, bias):
    return functional.linear(functional.adaptive_avg_pool2d(x, 1).flatten(1), weight, bias)


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "conv_bn_act": _conv,
    "bottleneck": _bottleneck,
    "basic_block": _basic_block,
    "stem": _stem,
    "preact_block": _preact_block,
    "dense_block": _dense_block,
    "transition": _transition,
    "bottleneck_chain": _bottleneck_chain,
    "head": _head,
}


def eager(call: Sample) -> Tensor:
    """The same call as an unfused model computes it, operator by operator."""
    return FORMULAS[call.name](*call.args, **call.options)


def contenders(
    call: Sample, dtype: torch.dtype, device: torch.device, compiled: bool
) -> dict[str, Callable[[], Tensor]]:
    """Everything that computes a call, by name; every kernel with the configuration that it would be run with."""
    found: dict[str, Callable[[], Tensor]] = {EAGER: functools.partial(eager, call)}
    if compiled:
        # Afresh for every shape: after a second one torch.compile would make sizes variables, after the eighth give up.
        torch.compiler.reset()
        found[COMPILED] = functools.partial(
            torch.compile(FORMULAS[call.name], dynamic=False), *call.args, **call.options
        )
    if not cudnn.unsupported(call.shape, dtype, device):
        found[CUDNN] = functools.partial(call.run, "vendor")
    for backend, kernels in plan.GPU_KERNELS.items():
        if not kernels.unsupported(call.shape, dtype, device):
            for candidate in kernels.candidates(call.shape, dtype, device):
                run = functools.partial(call.run_kernel, kernels, candidate.algorithm)
                found[f"{backend} {candidate.algorithm}"] = run
    return found


# --- the job ------------------------------------------------------------------------------------------------------


def row(shape: Shape, name: str, samples: list[float], ceiling: Roofline, itemsize: int) -> dict[str, Any]:
    """One line of the result: a contender at a shape."""
    seconds = median(samples)
    return {
        "shape": str(shape),
        "op": shape.op,
        "name": name,
        "us": seconds * 1e6,
        "tflops": flops(shape) / seconds / 1e12,
        "gb_per_s": traffic(shape, itemsize) / seconds / 1e9,
        "roofline": ceiling.seconds(shape, itemsize) / seconds,
        "bound": ceiling.bound(shape, itemsize),
        "samples": samples,
    }


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """How many times as fast as eager, cuDNN's fused call and torch.compile each line of one shape is."""
    times = {line["name"]: line["us"] for line in rows}
    for line in rows:
        for key, other in (("vs_eager", EAGER), ("vs_cudnn", CUDNN), ("vs_compile", COMPILED)):
            line[key] = times[other] / line["us"] if other in times else None


def split(
    calls: dict[str, Callable[[], Tensor]], attempts: Attempts, where: str
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """The calls that run, and why the others do not: a kernel that fails must not end the benchmark.

    Raises:
        BackendError: the GPU does not answer any more.
    """
    good, bad = {}, {}
    for name, call in calls.items():
        try:
            with attempts.attempt(f"{where}: {name}"):
                call()
        except Exception as problem:  # Triton, Inductor and CUDA raise what they like
            bad[name] = _one_line(problem)
            check_gpu(name)
        else:
            good[name] = call
    return good, bad


def _one_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}".splitlines()[0]


def run(
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    compiled: bool,
    measure: Measure,
    say: Callable[[str], None] = lambda text: None,
    result: dict[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
    attempts: Attempts | None = None,
) -> dict[str, Any]:
    """Measure shapes; the result is ready for `json.dump`.

    Args:
        shapes: each is measured by itself.
        dtype: of the images.
        device: a CUDA device.
        seconds: spent on each shape.
        compiled: whether torch.compile takes part.
        measure: how to time.
        say: told each shape before it is measured.
        result: of an earlier run, which is gone on with: its `shapes` are left out.
        keep: called with the result after every shape.
        attempts: of this run and those before.
    """
    attempts = attempts or Attempts()
    if result is None:
        ceiling = roofline(dtype, device, measure)
        result = {
            "dtype": str(dtype).removeprefix("torch."),
            "bytes_per_second": ceiling.bytes_per_second,
            "flops_per_second": ceiling.flops_per_second,
            "shapes": [],
            "rows": [],
            "failed": [],
        }
    ceiling = Roofline(result["bytes_per_second"], result["flops_per_second"])
    with torch.inference_mode(), cudnn_measures():
        for shape in shapes:
            if str(shape) in result["shapes"]:
                continue
            say(str(shape))
            where = f"{shape}, {dtype}"
            call = sample(shape, dtype, device)
            good, bad = split(contenders(call, dtype, device, compiled), attempts, where)
            samples = {}
            try:
                with attempts.attempt(f"{where}: timing", more_seconds=seconds + len(good)):
                    samples = measure(good, seconds)
            except Exception as problem:  # captured and repeated they may fail where one run did not
                bad["timing"] = _one_line(problem)
                check_gpu(where)
            rows = [row(shape, name, values, ceiling, dtype.itemsize) for name, values in samples.items()]
            add_ratios(rows)
            result["shapes"].append(str(shape))
            result["rows"] += rows
            result["failed"] += [{"shape": str(shape), "name": name, "why": why} for name, why in bad.items()]
            keep(result)
    return result


def table(result: dict[str, Any], names: dict[str, str]) -> Table:
    """The result as a table; `names` gives shapes short names."""
    columns = ("shape", "kernel", "us", "TFLOP/s", "GB/s", "roofline", "bound", "/eager", "/cuDNN", "/compile")
    made = Table(*columns, title=f"{result.get('gpu', '')} {result['dtype']}".strip())
    last = None
    for line in result["rows"]:
        figures = [f"{line['us']:.1f}", f"{line['tflops']:.0f}", f"{line['gb_per_s']:.0f}", f"{line['roofline']:.0%}"]
        ratios = [f"{r:.2f}" if (r := line[key]) else "" for key in ("vs_eager", "vs_cudnn", "vs_compile")]
        made.add_row(
            "" if line["shape"] == last else names[line["shape"]], line["name"], *figures, line["bound"], *ratios
        )
        last = line["shape"]
    return made


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"default: {' '.join(MODELS)}")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument(
        "--op", help="only shapes of this op: conv, bottleneck, basic_block, stem, dense_block, transition, ..."
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="spent on each shape")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it compiles every shape")
    parser.add_argument("--json", type=Path, help="write the result here, after every shape")
    parser.add_argument("--missing", action="store_true", help="leave out the shapes that the file of --json has")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds after which a kernel counts as hung")
    given = parser.parse_args(arguments)
    try:
        if unknown := [name for name in given.models if name not in rf.models.__all__]:
            raise InputError(f"MODEL must be one of {', '.join(rf.models.__all__)}, got {unknown[0]!r}")
        if not torch.cuda.is_available():
            raise BackendError(f"the kernel benchmark needs a CUDA GPU, torch {torch.__version__} sees none")
    except (InputError, BackendError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    wanted = [
        shape
        for name in given.models or MODELS
        for shape in model_shapes(name, given.batch, MODELS.get(name, 224))
        if given.op in (None, shape.op)
    ]
    console = Console()
    measure = functools.partial(interleave, device=device)
    shapes = list(dict.fromkeys(wanted))
    conditions = {
        "gpu": environment.device_name("cuda"),
        "versions": environment.versions(),
        "commit": environment.commit(),
    }
    found: dict[str, Any] | None = None
    if given.missing and given.json and given.json.exists():
        found = json.loads(given.json.read_text())
        if any(found[name] != value for name, value in conditions.items()):
            found = None  # of another machine or state of the sources

    def keep(result: dict[str, Any]) -> None:
        if given.json:
            partial = given.json.with_suffix(".partial")
            partial.write_text(json.dumps(result | conditions, indent=1) + "\n")
            partial.replace(given.json)

    attempts = Attempts()
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        attempts = Attempts(given.json.with_suffix(".attempts"), given.timeout)
    try:
        with terminated_as_interrupted():
            result = run(
                shapes, DTYPES[given.dtype], device, given.seconds, not given.no_compile, measure, console.log,
                found, keep, attempts,
            )  # fmt: skip
    except BackendError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept, and the same command with --missing goes on", file=sys.stderr)
        return 130
    console.print(table(result | conditions, {str(shape): describe(shape) for shape in shapes}))
    for failure in result["failed"]:
        console.print(f"failed: {failure['name']} at {failure['shape']}: {failure['why']}", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
