"""Cost model against measurement: every block of some models, by every algorithm of the CPU kernels and by oneDNN.

    python benchmarks/cost_model.py resnet18 resnet50 --batches 1 16 --json cost_model.json

One interleaved run a shape. What the plan chose is compared with what was fastest: the regret is what the choice costs,
and a model's is that of its blocks together, each as often as the model has it. A block that the plan computes layer by
layer is left out.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from kernels import MODELS
from rich.console import Console
from rich.table import Table

import resnet_fused as rf
from resnet_fused import environment, plan, tune
from resnet_fused.bench import DTYPES
from resnet_fused.kernels import cpu
from resnet_fused.samples import describe, sample
from resnet_fused.shapes import Shape

CPU = torch.device("cpu")
LEAST_ROUNDS, MOST_ROUNDS = 5, 101


@dataclass(frozen=True)
class Row:
    """One shape of a model.

    Attributes:
        shape: in words.
        count: how often the model has it.
        chosen: by the plan.
        predicted: milliseconds by candidate.
        samples: milliseconds by candidate, of every turn.
    """

    shape: str
    count: int
    chosen: str
    predicted: dict[str, float]
    samples: dict[str, list[float]]

    @property
    def measured(self) -> dict[str, float]:
        """The median milliseconds by candidate."""
        return {name: median(each) for name, each in self.samples.items()}

    @property
    def best(self) -> str:
        """The fastest candidate."""
        measured = self.measured
        return min(measured, key=measured.__getitem__)

    @property
    def regret(self) -> float:
        """What the choice takes over what the fastest takes."""
        return self.measured[self.chosen] / self.measured[self.best]


def model_shapes(name: str, batch: int) -> Counter[Shape]:
    """The blocks of a model of `resnet_fused.models`, and how many there are of each."""
    found: Counter[Shape] = Counter()
    fused = rf.fuse(getattr(rf.models, name)().eval(), backend="reference")
    with plan.record() as choices, torch.inference_mode():
        fused(torch.zeros(1, 3, MODELS[name], MODELS[name]))
    parts = {part for choice in choices for part in tune.parts_of(choice.shape) if part != choice.shape}
    for choice in choices:
        if choice.shape not in parts:
            found[replace(choice.shape, n=batch)] += 1
    return found


def candidates(shape: Shape, dtype: torch.dtype, accuracy: str) -> tuple[plan.Choice, dict[str, Callable[[], object]]]:
    """The plan's choice, and a call of each candidate that it priced."""
    choice = plan.choose(shape, dtype, CPU, "auto", accuracy, plan.state(CPU))
    call = sample(shape, dtype, CPU)
    calls: dict[str, Callable[[], object]] = {}
    for name, _ in choice.seconds:
        backend, algorithm = name.split(" ")
        if backend == "vendor":
            calls[name] = partial(call.run, "vendor")
        elif algorithm != "layers":
            calls[name] = partial(call.run_kernel, cpu, algorithm)
    return choice, calls


def interleave(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each, run in rounds of changing order until `seconds` have passed, MOST_ROUNDS at most."""
    order, turns = list(calls.items()), random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    for rounds in range(MOST_ROUNDS):
        if rounds >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        turns.shuffle(order)  # what comes after oneDNN finds other things in the caches
        for name, call in order:
            begin = time.perf_counter()
            call()
            samples[name].append(round((time.perf_counter() - begin) * 1e3, 4))
    return samples


def measure(name: str, batch: int, dtype: torch.dtype, accuracy: str, seconds: float) -> list[Row]:
    """A row for each shape of a model where there is a choice."""
    rows = []
    with torch.inference_mode():
        for shape, count in model_shapes(name, batch).items():
            choice, calls = candidates(shape, dtype, accuracy)
            chosen = f"{choice.backend} {choice.algorithm}"
            if len(calls) < 2 or chosen not in calls:
                continue
            predicted = {key: value * 1e3 for key, value in choice.seconds if key in calls}
            rows.append(Row(describe(shape), count, chosen, predicted, interleave(calls, seconds)))
    return rows


def print_rows(rows: Iterable[Row], title: str, console: Console) -> None:
    """A table: predicted and measured milliseconds of each candidate, and the regret."""
    table = Table("shape", "count", "predicted", "measured", "chosen", "regret", title=title)
    for row in rows:
        times = [
            "\n".join(f"{key} {value:.3f}" for key, value in each.items()) for each in (row.predicted, row.measured)
        ]
        regret = f"{row.regret:.2f}" if row.chosen == row.best else f"[bold]{row.regret:.2f}[/] {row.best}"
        table.add_row(row.shape, str(row.count), *times, row.chosen, regret)
    console.print(table)


def summary(rows: list[Row]) -> dict[str, float | None]:
    """Of a model: the regret of all its blocks together, and the largest of one; None where there is no choice."""
    if not rows:
        return {"regret": None, "worst": None}
    chosen = sum(row.count * row.measured[row.chosen] for row in rows)
    return {
        "regret": chosen / sum(row.count * row.measured[row.best] for row in rows),
        "worst": max(r.regret for r in rows),
    }


def main() -> int:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], help="default: all")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--accuracy", nargs="+", default=["strict", "fast"], choices=["strict", "fast"])
    parser.add_argument("--seconds", type=float, default=0.5, help="of measurement for each shape")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console(width=160 if not sys.stdout.isatty() else None)
    cases = []
    for name in options.models or MODELS:
        for batch in options.batches:
            for dtype in options.dtype:
                for accuracy in options.accuracy:
                    if accuracy == "fast" and dtype != "fp32":
                        continue  # all of its algorithms are allowed at "strict"
                    rows = measure(name, batch, DTYPES[dtype], accuracy, options.seconds)
                    title = f"{name}, batch {batch}, {dtype} {accuracy}"
                    print_rows(rows, title, console)
                    cases.append({"model": name, "batch": batch, "dtype": dtype, "accuracy": accuracy, **summary(rows)})
                    cases[-1]["rows"] = [asdict(row) for row in rows]
    table = Table("case", "regret", "worst block")
    for case in cases:
        table.add_row(
            f"{case['model']}, batch {case['batch']}, {case['dtype']} {case['accuracy']}",
            *(f"{case[key]:.3f}" if case[key] else "no choice" for key in ("regret", "worst")),
        )
    console.print(table)
    if options.json:
        conditions = {"kind": "cost_model", **environment.conditions("cpu"), "clocks": environment.clocks("cpu")}
        options.json.write_text(json.dumps(conditions | {"cases": cases}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
