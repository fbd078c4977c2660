"""What the ahead-of-time checks compile: the kernels with the configurations that real models get.

- `python tests/aot_jobs.py`: one JSON line for every compiled kernel of the representative jobs;
- `... --every 3`: every third of these jobs;
- `... --table docs/triton.md`: all of these also as a table between the file's markers;
- `... --all --log FILE`: every shape, and every configuration that tuning would try: hours. Lines go to FILE as well,
  and what is in it already is not compiled again, so that the run can be stopped and started at will.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # `triton.jit` would make interpreted functions

import aot
import torch

from resnet_fused import samples
from resnet_fused.kernels import precision, triton
from resnet_fused.kernels.triton import configs
from resnet_fused.kernels.triton.configs import SM80, SM90, SM100, Architecture, Config
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
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ARCHITECTURES = {80: SM80, 90: SM90, 100: SM100}
SMALL_BATCH = 16
"""The tensors that a launch is captured with have this batch; the configuration is that of the job's shape."""


@dataclass(frozen=True)
class Job:
    """A kernel to compile for a GPU.

    Attributes:
        shape: which the configuration is chosen for.
        algorithm: as in `candidates`; None for all of them.
        dtype: "bf16", "fp16" or "fp32" (with TF32).
        capability: 80, 90 or 100.
    """

    shape: Shape
    algorithm: str | None = None
    dtype: str = "bf16"
    capability: int = 90


def _resnet_convs(n: int) -> list[Conv]:
    """The distinct layers of ResNet-50 behind the stem."""
    found = []
    c = 64
    for mid, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
        stride = 1 if mid == 64 else 2
        before, k = size * stride, 4 * mid
        found += [
            Conv(n, c, before, before, mid, 1, 1),
            Conv(n, mid, before, before, mid, 3, 3, (stride, stride), (1, 1)),
            Conv(n, c, before, before, k, 1, 1, (stride, stride)),
            Conv(n, mid, size, size, k, 1, 1, residual=True),
            Conv(n, k, size, size, mid, 1, 1),
            Conv(n, mid, size, size, mid, 3, 3, padding=(1, 1)),
        ]
        c = k
    return list(dict.fromkeys(found))


def _dense_convs(n: int) -> list[Conv]:
    """Some layers of DenseNet-121."""
    sizes = ((64, 56), (224, 56), (128, 28), (480, 28), (256, 14), (992, 14), (512, 7), (992, 7))
    return [
        layer
        for c, size in sizes
        for layer in (
            Conv(n, c, size, size, 128, 1, 1, prologue=True),
            Conv(n, 128, size, size, 32, 3, 3, padding=(1, 1)),
        )
    ]


STEMS = [Stem(128, 3, 224, 224, 64, 7, 7)]
BOTTLENECKS = [
    Bottleneck(128, 64, 56, 56, 64, 256, projection=True),
    Bottleneck(128, 256, 56, 56, 64, 256),
    Bottleneck(128, 256, 56, 56, 128, 512, stride2=2, projection=True),
    Bottleneck(128, 512, 28, 28, 128, 512),
]
BASIC_BLOCKS = [
    BasicBlock(128, 64, 56, 56, 64, 64),
    BasicBlock(128, 64, 56, 56, 128, 128, 2, projection=True),
    BasicBlock(256, 16, 32, 32, 16, 16),
    BasicBlock(256, 16, 32, 32, 32, 32, 2, projection=True),
    BasicBlock(256, 32, 16, 16, 32, 32),
    BasicBlock(256, 64, 8, 8, 64, 64),
]
DENSE_BLOCKS = [DenseBlock(128, c, s, s, 32, 1, 128) for c, s in ((224, 56), (480, 28), (992, 14), (992, 7))]
TRANSITIONS = [Transition(128, 256, 56, 56, 128), Transition(128, 1024, 14, 14, 512)]
CIFAR_CONVS = [
    Conv(256, 3, 32, 32, 16, 3, 3, padding=(1, 1)),
    Conv(256, 16, 32, 32, 16, 3, 3, padding=(1, 1)),
    Conv(256, 16, 32, 32, 32, 3, 3, (2, 2), (1, 1)),
]
GROUPED = Conv(128, 128, 56, 56, 128, 3, 3, padding=(1, 1), groups=32)
CHAINS = [BottleneckChain(128, 256, 56, 56, 64, 2), BottleneckChain(128, 512, 28, 28, 128, 2)]
PROJECTED = [
    Bottleneck(128, 64, 56, 56, 64, 256, projection=True),
    *(
        Bottleneck(128, 4 * m, s, s, 2 * m, 8 * m, stride2=2, projection=True)
        for m, s in ((64, 56), (128, 28), (256, 14))
    ),
]
HEADS = [Head(128, 2048, 7, 7, 1000), Head(1, 2048, 7, 7, 1000), Head(256, 64, 8, 8, 10)]
PROJECT = "project"
"""In the place of an algorithm: a bottleneck's last convolution and its projection in one accumulator."""

# One of a kind: every kernel with each of its options somewhere, on the GPU where it matters most.
REPRESENTATIVE = [
    Job(Conv(128, 64, 56, 56, 256, 1, 1, residual=True)),
    Job(Conv(128, 256, 56, 56, 64, 1, 1), "pointwise"),
    Job(Conv(128, 512, 7, 7, 2048, 1, 1, residual=True), "pointwise"),
    Job(Conv(128, 480, 28, 28, 128, 1, 1, prologue=True)),
    Job(Conv(128, 64, 56, 56, 64, 3, 3, padding=(1, 1)), "tma_conv"),
    Job(Conv(128, 256, 14, 14, 256, 3, 3, padding=(1, 1)), "tma_conv"),
    Job(Conv(128, 512, 7, 7, 512, 3, 3, padding=(1, 1)), "tma_conv"),
    Job(Conv(128, 512, 7, 7, 512, 3, 3, padding=(1, 1), residual=True), "tma_conv"),
    Job(Conv(128, 128, 56, 56, 128, 3, 3, (2, 2), (1, 1)), "tma_conv"),
    Job(Conv(128, 256, 56, 56, 512, 1, 1, (2, 2)), "tma_conv"),
    Job(Conv(1, 512, 7, 7, 512, 3, 3, padding=(1, 1), residual=True), "implicit_gemm"),
    Job(Conv(128, 3, 224, 224, 64, 7, 7, (2, 2), (3, 3)), "implicit_gemm"),
    Job(CIFAR_CONVS[1], "tma_conv"),
    Job(GROUPED, "implicit_gemm"),
    *(Job(shape) for shape in [*STEMS, *BOTTLENECKS[:3], *BASIC_BLOCKS[1:3], *DENSE_BLOCKS[1:2], TRANSITIONS[0]]),
    Job(Conv(128, 128, 28, 28, 512, 1, 1, residual=True), "pointwise", "fp16"),
    Job(Conv(128, 128, 28, 28, 512, 1, 1, residual=True), "pointwise", "fp32"),
    Job(Conv(128, 128, 28, 28, 128, 3, 3, padding=(1, 1)), "tma_conv", "fp32"),
    Job(BOTTLENECKS[1], None, "fp32"),
    *(Job(BOTTLENECKS[2], PROJECT, "bf16", capability) for capability in (80, 90, 100)),
    *(Job(CHAINS[1], None, "bf16", capability) for capability in (80, 90, 100)),
    Job(CHAINS[0]),
    Job(HEADS[0]),
    Job(Conv(128, 64, 56, 56, 256, 1, 1, residual=True), None, "bf16", 80),
    Job(Conv(128, 256, 14, 14, 256, 3, 3, padding=(1, 1)), None, "bf16", 80),
    *(Job(shape, None, "bf16", 80) for shape in (BOTTLENECKS[1], BASIC_BLOCKS[0], STEMS[0], DENSE_BLOCKS[1])),
    Job(Conv(128, 64, 56, 56, 256, 1, 1, residual=True), "pointwise", "bf16", 100),
    Job(Conv(128, 256, 14, 14, 256, 3, 3, padding=(1, 1)), "tma_conv", "bf16", 100),
    *(Job(shape, None, "bf16", 100) for shape in (BOTTLENECKS[1], BASIC_BLOCKS[0], STEMS[0], DENSE_BLOCKS[1])),
]


def every_job() -> Iterator[Job]:
    """All shapes on all GPUs, in bf16, the layers also at batch 1; in the other dtypes on sm_90. Blocks come first."""
    convs = [*_resnet_convs(128), *_dense_convs(128), *CIFAR_CONVS, GROUPED]
    blocks: list[Shape] = [*CHAINS, *HEADS, *STEMS, *BOTTLENECKS, *BASIC_BLOCKS, *DENSE_BLOCKS, *TRANSITIONS]
    for shape, capability in itertools.product(PROJECTED, ARCHITECTURES):
        yield Job(shape, PROJECT, "bf16", capability)
    for shapes in (blocks, (*convs, *_resnet_convs(1))):
        for shape, capability in itertools.product(shapes, ARCHITECTURES):
            yield Job(shape, None, "bf16", capability)
    for shape, dtype in itertools.product((*blocks, *convs), ("fp16", "fp32")):
        yield Job(shape, None, dtype, 90)


@contextlib.contextmanager
def gpu(architecture: Architecture, tf32: bool) -> Iterator[None]:
    """Have CPU tensors taken for this GPU's."""
    switch = torch.backends.mkldnn.conv
    before, switch.fp32_precision = switch.fp32_precision, "tf32" if tf32 else "ieee"
    with (
        mock.patch.object(configs, "SM90", architecture),  # what `architecture` gives for the CPU
        mock.patch.object(samples._Random, "_normal", lambda self, *size: torch.empty(size)),
    ):
        configs.architecture.cache_clear()
        try:
            assert precision.allow_tf32(CPU) == tf32
            yield
        finally:
            configs.architecture.cache_clear()
            switch.fp32_precision = before


def launches(job: Job, every: bool) -> Iterator[tuple[str, Config, aot.Launch]]:
    """(algorithm, configuration, launch) of a job: with the heuristic's choice, or with every configuration."""
    dtype, arch = DTYPES[job.dtype], ARCHITECTURES[job.capability]
    with gpu(arch, job.dtype == "fp32"), torch.inference_mode():
        small = dataclasses.replace(job.shape, n=min(job.shape.n, SMALL_BATCH))
        call = samples.sample(small, dtype, CPU)
        if job.algorithm == PROJECT:
            assert isinstance(job.shape, Bottleneck)
            yield from _project(job.shape, call, every)
            return
        for candidate in triton.candidates(job.shape, dtype, CPU):
            name = candidate.algorithm
            if job.algorithm not in (None, name):
                continue
            space = configs.alternatives(name, job.shape, dtype, arch)
            for config in space if every else space[:1]:
                with aot.captured() as found:
                    call.run_kernel(triton, name, config=config)
                for launch in found:
                    yield name, config, launch


def _project(shape: Bottleneck, call: samples.Sample, every: bool) -> Iterator[tuple[str, Config, aot.Launch]]:
    """The end of a bottleneck by each kernel that can add its projection."""
    x, *_, w3, b3, wd, bd = call.args
    *_, last = shape.layers()
    small = dataclasses.replace(last, n=x.shape[0], residual=False)
    h = torch.empty(small.n, small.c, small.h, small.w, dtype=x.dtype).contiguous(memory_format=torch.channels_last)
    s3, sd = call.options["s3"], call.options["sd"]
    arch = configs.architecture(CPU)
    for name in triton.layer_configs.algorithms(small, x.dtype, arch):
        if name == "pointwise":
            continue
        space = triton.layer_configs.with_projection(name, last, x.dtype, arch)
        for config in space if every else space[:1]:
            with aot.captured() as found:
                options: dict[str, Any] = {"stride": shape.stride1 * shape.stride2, "algorithm": name, "config": config}
                triton.project(h, w3, s3, b3, x, wd, sd, bd, **options)
            for launch in found:
                yield f"{PROJECT} {name}", config, launch


def results(jobs: Iterable[Job], every: bool = False, done: Iterable[str] = ()) -> Iterator[dict[str, Any]]:
    """Compile, each distinct kernel once and none in `done`; what came out, or the error, ready for JSON."""
    done = set(done)
    for job in jobs:
        for algorithm, config, launch in launches(job, every):
            identity = hashlib.sha256(repr(aot.identity(launch, job.capability)).encode()).hexdigest()
            if identity in done:
                continue
            done.add(identity)
            line: dict[str, Any] = {
                "job": f"sm_{job.capability} {job.dtype} {algorithm} {job.shape}",
                "shape": samples.describe(job.shape),
                "config": str(config),
                "dtype": job.dtype,
                "capability": job.capability,
                "kernel": launch.kernel.__name__,
                "identity": identity,
            }
            try:
                resources = aot.compiled(launch, job.capability)
            except Exception as error:
                yield line | {"problems": [f"{type(error).__name__}: {str(error)[-300:]}"]}
            else:
                yield line | dataclasses.asdict(resources) | {"problems": resources.problems()}


BEGIN, END = "<!-- resources -->\n", "<!-- end -->"


def table(lines: Iterable[dict[str, Any]]) -> str:
    """The resources as a Markdown table."""
    rows = ["| kernel | GPU | dtype | shape and configuration | warps | registers | shared memory, KiB |"]
    rows.append("|---|---|---|---|---:|---:|---:|")
    for line in lines:
        assert not line["problems"], line
        cells = (line["kernel"], f"sm_{line['capability']}", line["dtype"], f"{line['shape']}: {line['config']}")
        numbers = (line["warps"], line["registers"], f"{line['shared'] / 1024:.0f}")
        rows.append(f"| {' | '.join(map(str, (*cells, *numbers)))} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every shape and configuration")
    parser.add_argument("--every", type=int, default=1, help="of so many jobs one")
    parser.add_argument("--only", default="", help="jobs whose text has this in it")
    parser.add_argument("--log", type=Path, help="append to this file, and skip what is in it")
    parser.add_argument("--table", type=Path, help="replace the table between this file's markers")
    given = parser.parse_args()
    jobs = (list(every_job()) if given.all else REPRESENTATIVE)[:: given.every]
    before = given.log.read_text().splitlines() if given.log and given.log.exists() else []
    done = [json.loads(line)["identity"] for line in before]
    found = []
    with contextlib.ExitStack() as stack:
        outputs = [sys.stdout, *([stack.enter_context(given.log.open("a"))] if given.log else [])]
        for line in results((job for job in jobs if given.only in str(job)), given.all, done):
            for output in outputs:
                print(json.dumps(line), file=output, flush=True)
            found.append(line)
    if given.table:
        head, _, rest = given.table.read_text().partition(BEGIN)
        given.table.write_text(f"{head}{BEGIN}{table(found)}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    sys.exit(main())
