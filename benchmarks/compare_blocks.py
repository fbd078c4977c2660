"""Time every distinct block of a model alone, with memory reused on all sides.

    python benchmarks/compare_blocks.py resnet50 --batch 16 --dtype fp32 --json blocks.json

Contenders: eager channels_last, oneDNN's layer-fused path (the vendor backend), fused strict, fused fast. They are
interleaved; the ratios are of medians. The JSON has the fields of every result (docs/benchmarks.md), `"kind":
"blocks"`, and a row for each block.
"""

import os
import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from blocks import distinct_blocks
from rich.console import Console
from rich.table import Table

import resnet_fused as rf
from resnet_fused import bench, report

CONTENDERS = ("eager", "layer-fused", "fused", "fast")


def main(
    model: Annotated[str, typer.Argument(help="A ResNet for ImageNet of resnet_fused.models.")] = "resnet50",
    batch: int = 16,
    dtype: str = "fp32",
    seconds: Annotated[float, typer.Option(help="For each block.")] = 2.0,
    json: Annotated[Path | None, typer.Option(help="Write the result here, as JSON.")] = None,
) -> None:
    """Compare the blocks of one model."""
    report.check_output("--json", json)
    rows = []
    with torch.inference_mode():
        for block in distinct_blocks(model, batch, dtype):
            fused = [
                rf.fuse(block.module, backend="vendor"),
                rf.fuse(block.module),
                rf.fuse(block.module, accuracy="fast"),
            ]
            modules = dict(zip(CONTENDERS, [block.module, *fused], strict=True))
            calls = {name: partial(module, block.x) for name, module in modules.items()}
            samples = bench.interleave(calls, seconds)
            ms = {name: median(times) for name, times in samples.items()}
            rows.append({"block": block.label, "ms_median": ms, "ms_samples": samples})
    header = bench.header(bench.Job(model, batch, (dtype,)))
    result = header | {"kind": "blocks", "baseline": "layer-fused", "rows": rows}
    title = "milliseconds, and speed-up over layer-fused"
    table = Table("block", *CONTENDERS, *(f"{name} x" for name in CONTENDERS[2:]), title=title)
    for row in rows:
        ms = row["ms_median"]
        ratios = [f"{ms['layer-fused'] / ms[name]:.2f}x" for name in CONTENDERS[2:]]
        table.add_row(row["block"], *(f"{ms[name]:.2f}" for name in CONTENDERS), *ratios)
    console = Console()
    console.print(f"{report.conditions(result)}, {dtype}, memory reused", style="bold")
    console.print(table)
    if json:
        report.write_json(result, json)


if __name__ == "__main__":
    # The allocator reads its settings when the process starts.
    if any(os.environ.get(key) != value for key, value in bench.REUSE.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | bench.REUSE)
    typer.run(main)
