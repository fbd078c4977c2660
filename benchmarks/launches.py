"""What the host spends on launching a small kernel: raw, wrapped as an operator of torch, and through the package.

    python benchmarks/launches.py --json launches.json

The kernel has next to nothing to do, so that the GPU waits for the host: seconds from call to call are the host's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl
from rich.console import Console
from rich.table import Table
from torch import Tensor

import resnet_fused as rf
from resnet_fused.kernels import cuda
from resnet_fused.kernels import triton as triton_kernels
from resnet_fused.samples import sample
from resnet_fused.shapes import Conv

BLOCK = 256


@triton.jit
def add_one_kernel(x, y, count, BLOCK: tl.constexpr):
    """y = x + 1."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < count, other=0.0) + 1, mask=at < count)


def raw(x: Tensor) -> Tensor:
    """The kernel, launched by Triton."""
    y = torch.empty_like(x)
    add_one_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, y, x.numel(), BLOCK=BLOCK)
    return y


as_custom_op = torch.library.custom_op("resnet_fused_launches::custom_op", raw, mutates_args=())


@torch.library.triton_op("resnet_fused_launches::triton_op", mutates_args=())
def as_triton_op(x: Tensor) -> Tensor:
    """The kernel as torch.compile can look into it."""
    y = torch.empty_like(x)
    torch.library.wrap_triton(add_one_kernel)[(triton.cdiv(x.numel(), BLOCK),)](x, y, x.numel(), BLOCK=BLOCK)
    return y


as_library_op = torch.library.Library("resnet_fused_launches", "FRAGMENT")
as_library_op.define("library_op(Tensor x) -> Tensor")
as_library_op.impl("library_op", raw, "CompositeExplicitAutograd")


def calls(device: torch.device) -> dict[str, Callable[[], object]]:
    """What is compared, by name."""
    x = torch.zeros(BLOCK, device=device)
    graph = None
    call = sample(Conv(1, 64, 7, 7, 64, 1, 1), torch.bfloat16, device)
    found: dict[str, Callable[[], object]] = {
        "torch add": lambda: x + 1,
        "Triton kernel": lambda: raw(x),
        "the same as library op": lambda: torch.ops.resnet_fused_launches.library_op.default(x),
        "the same as custom_op": lambda: as_custom_op(x),
    }
    if device.type == "cuda":
        found["the same as triton_op"] = lambda: as_triton_op(x)
        raw(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            raw(x)
        found["the same as CUDA graph"] = graph.replay
    for backend, kernels in (("cuda", cuda), ("triton", triton_kernels)):
        if not kernels.unsupported(call.shape, torch.bfloat16, device):
            algorithm = kernels.candidates(call.shape, torch.bfloat16, device)[0].algorithm
            found[f"{backend} {algorithm}, called directly"] = lambda k=kernels, a=algorithm: call.run_kernel(k, a)
            found[f"conv_bn_act, {backend}"] = lambda b=backend: call.run(b)
    found["conv_bn_act, auto"] = lambda: call.run("auto")
    weight, shift = call.args[1], call.args[3].to(torch.bfloat16)
    found["torch conv2d, then ReLU"] = lambda: torch.conv2d(call.args[0], weight, shift).relu_()
    block = rf.nn.plain.Bottleneck(64, 16).eval().to(device, torch.bfloat16)
    image = call.args[0]
    fused = rf.fuse(block)
    found["bottleneck module, unfused"] = lambda: block(image)
    found["bottleneck module, fused"] = lambda: fused(image)
    return found


def seconds(call: Callable[[], object], device: torch.device, count: int) -> float:
    """From call to call: the least of five times `count` calls."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best = float("inf")
    for _ in range(6):  # the first compiles and packs
        synchronize()
        begun = time.perf_counter()
        for _ in range(count):
            call()
        enqueued = time.perf_counter()
        synchronize()
        best = min(best, (enqueued - begun) / count)
    return best


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: try this program out")
    parser.add_argument("--count", type=int, default=300, help="calls in a row: few enough for the queue to the GPU")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    table = Table("what", "us", title=f"Host time of a call on {given.device}")
    found = {}
    with torch.inference_mode():
        for name, call in calls(device).items():
            found[name] = seconds(call, device, given.count) * 1e6
            table.add_row(name, f"{found[name]:.1f}")
    Console().print(table)
    if given.json:
        given.json.write_text(json.dumps({"device": given.device, "count": given.count, "us": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
