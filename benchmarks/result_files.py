"""Reads benchmarks/results/<device>: what was measured there, case by case, whichever command wrote it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from resnet_fused import environment
from resnet_fused import report as tables
from resnet_fused.bench import BASELINE, SCHEMA, summarise
from resnet_fused.blocks import split
from resnet_fused.errors import InputError
from resnet_fused.peers.fused import ONEDNN
from resnet_fused.roofline import Machine, Placement, placement, standing, total

RESULTS = Path(__file__).parent / "results"
BASELINE_FILE = "baseline.json"
DTYPE_ORDER = ("fp32", "bf16", "fp16")
LAYER_FUSED = ONEDNN.name
LEAST_RATE = 0.8
"""Of the median that other runs measured: below it, something else had the machine as well."""


@dataclass(frozen=True)
class Line:
    """One contender of a case: a row of a result, as `resnet-fused bench` writes it (docs/benchmarks.md)."""

    name: str
    kind: str  # "eager", "fused" or "peer"
    accuracy: str | None
    status: str  # "ok", "wrong", "failed" or "absent"
    detail: str
    version: str | None
    images_per_s: float | None
    ms: float | None
    ms_p20: float | None
    ms_p80: float | None
    setup_seconds: float | None
    peak_extra_mb: float | None
    images_per_joule: float | None
    error: float | None
    unfused_error: float | None
    flipped: int | None
    settings: dict[str, Any] | None
    flop_per_byte: float | None
    bound: str | None
    bound_ms: float | None
    share_of_bound: float | None

    @property
    def speed(self) -> float:
        """Images per second, 0 if it was not timed or its numbers are wrong."""
        return self.images_per_s if self.status == "ok" and self.images_per_s else 0.0


@dataclass(frozen=True)
class Case:
    """One model, batch and dtype, and everyone who was timed on it in one run."""

    model: str
    batch: int
    dtype: str
    lines: tuple[Line, ...]
    source: Path
    commit: str | None
    plan: dict[str, Any] | None  # of the model fused at accuracy="strict"
    machine: Machine | None
    roof: Placement | None  # of the model, on the machine as the same run measured it
    clocks: str  # in words
    interrupted: bool = False

    @property
    def network(self) -> str:
        """The model; of a block, the one that it is of."""
        return split(self.model)[0]

    @property
    def block(self) -> str:
        """The block's path and the input of one image; empty for the whole model."""
        return split(self.model)[1]

    @property
    def title(self) -> str:
        """Its name."""
        return f"{self.model}, batch {self.batch}, {self.dtype}"

    def fused(self, accuracy: str = "strict") -> Line | None:
        """The fastest fused contender of an accuracy (on a GPU at batch 1 there are two), None if there is none."""
        return _fastest(line for line in self.lines if line.kind == "fused" and line.accuracy == accuracy)

    def best_other(self) -> Line | None:
        """The fastest contender that is not fused and gives the right numbers, None if there is none."""
        return _fastest(line for line in self.lines if line.kind != "fused")

    def ratios(self) -> Iterator[tuple[Line, Line, float]]:
        """(fused contender, the fastest other, how many times as fast the fused one is), strict and then fast."""
        other = self.best_other()
        for accuracy in ("strict", "fast"):
            ours = self.fused(accuracy)
            if ours and other:
                yield ours, other, ours.speed / other.speed


def _fastest(lines: Iterable[Line]) -> Line | None:
    best = max(lines, key=lambda line: line.speed, default=None)
    return best if best and best.speed else None


@dataclass
class Device:
    """What a folder of results holds.

    Attributes:
        folder: of the device.
        cases: every model, batch and dtype; with peers where there is a run with peers.
        jobs: results of `resnet-fused bench` without peers, by file.
        blocks: every block that was measured alone, as `cases`; the model is `"resnet50/layer1.0 64x56x56"`.
        newest: the result made last, for the conditions.
        others: JSON files of other kinds.
    """

    folder: Path
    cases: list[Case] = field(default_factory=list)
    jobs: dict[Path, dict[str, Any]] = field(default_factory=dict)
    blocks: list[Case] = field(default_factory=list)
    newest: dict[str, Any] = field(default_factory=dict)
    others: list[Path] = field(default_factory=list)

    @property
    def models(self) -> list[str]:
        """The models of the cases, in their order."""
        return list(dict.fromkeys(case.model for case in self.cases))

    @property
    def dtypes(self) -> list[str]:
        """The dtypes of the cases and blocks."""
        return sorted({case.dtype for case in (*self.cases, *self.blocks)}, key=DTYPE_ORDER.index)

    @property
    def machine(self) -> Machine | None:
        """The ceilings: the best of each rate, of all runs; None where none was measured."""
        machines = [case.machine for case in (*self.cases, *self.blocks) if case.machine]
        if not machines:
            return None
        rates: dict[str, float] = {}
        for machine in machines:
            for dtype, rate in machine.matmul_tflop_s.items():
                rates[dtype] = max(rate, rates.get(dtype, 0.0))
        launches = [machine.launch_us for machine in machines if machine.launch_us is not None]
        best = max(machines, key=lambda machine: machine.copy_gb_s)
        return Machine(
            best.device, best.device_name, best.threads, best.copy_gb_s, rates, min(launches) if launches else None
        )

    def disturbance(self, case: Case) -> str:
        """Which of the machine's rates were far below those of the folder's other files, in words; empty if none."""
        if case.machine is None:
            return ""
        here = [other for other in (*self.cases, *self.blocks) if other.source.parent == case.source.parent]
        machines = {other.source: other.machine for other in here if other.machine and other.source != case.source}
        return disturbance(case.machine, case.dtype, machines.values())


def parse(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} must be a JSON file of a benchmark: {error}") from None


def read(path: Path) -> dict[str, Any]:
    """Read a result.

    Raises:
        InputError: it is no JSON object, or of another schema version.
    """
    values = parse(path)
    if not isinstance(values, dict):
        raise InputError(f"{path} must be a JSON object, got a {type(values).__name__}")
    version = values.get("schema", SCHEMA)  # results from before there were versions have the fields of the first
    if version != SCHEMA:
        raise InputError(f"{path} must be of schema version {SCHEMA}, got {version}: measure again")
    if values.get("kind") == "blocks":
        values["rows"] = [new for row in values["rows"] for new in _block_rows(row, values)]
    return values


def machines(folder: Path, without: Path) -> Iterator[Machine]:
    """The machine as every other run in a folder found it; files that are no results of this version do not count."""
    for path in sorted(folder.glob("*.json")):
        with suppress(InputError):
            if path != without and (values := read(path).get("machine")):
                yield Machine.from_dict(values)


def disturbance(machine: Machine, dtype: str, others: Iterable[Machine]) -> str:
    """Which rates of a machine in one run are far below the median of other runs, in words; empty if none is.

    Args:
        machine: as the run found it.
        dtype: `"fp32"`, `"bf16"` or `"fp16"`.
        others: of other runs. They count if device, threads and dtype are those of the run.
    """
    alike = [
        other
        for other in others
        if (other.device, other.device_name, other.threads) == (machine.device, machine.device_name, machine.threads)
        and dtype in other.matmul_tflop_s.keys() & machine.matmul_tflop_s.keys()
    ]
    if not alike:
        return ""
    copy = median(other.copy_gb_s for other in alike)
    matmul = median(other.matmul_tflop_s[dtype] for other in alike)
    found = []
    if machine.copy_gb_s < LEAST_RATE * copy:
        found.append(f"copy {machine.copy_gb_s:.3g} GB/s where the median of others is {copy:.3g}")
    if machine.matmul_tflop_s[dtype] < LEAST_RATE * matmul:
        rate = f"{dtype} matmul {machine.matmul_tflop_s[dtype]:.3g} TFLOP/s"
        found.append(f"{rate} where the median of others is {matmul:.3g}")
    return ", ".join(found)


OLD_BLOCK_NAMES = {
    "eager": (BASELINE, "eager", None),
    "layer-fused": (LAYER_FUSED, "peer", None),
    "fused": ("fused", "fused", "strict"),
    "fast": ("fused fast", "fused", "fast"),
}


def _block_rows(row: dict[str, Any], values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of today that one of a block is: itself, or one for each of the four who took part before peers did."""
    if "name" in row:
        yield row
        return
    for old, samples in row["ms_samples"].items():
        name, kind, accuracy = OLD_BLOCK_NAMES[old]
        new = {"block": row["block"], "name": name, "kind": kind, "accuracy": accuracy, "ms_samples": samples}
        yield summarise(new | {"status": "ok"}, values["dtype"], "reused", values["batch"], row["ms_median"]["eager"])


def device_folder(device: str, results: Path = RESULTS) -> Path:
    """Where this machine's results are: the folder that has some of it, else a new one with its name."""
    name, threads = environment.device_name(device), torch.get_num_threads()
    mine = {"device_name": name} | (
        {"isa": environment.instruction_sets()[0], "threads": threads} if device == "cpu" else {}
    )
    for path in sorted(results.glob("*/**/*.json")):
        try:
            found = parse(path)
        except InputError as error:
            print(f"{error}; it does not count", file=sys.stderr)
            continue
        if isinstance(found, dict) and all(found.get(key) == value for key, value in mine.items()):
            return results / path.relative_to(results).parts[0]
    parts = [name, *([mine["isa"], f"{threads}threads"] if device == "cpu" else [])]
    return results / re.sub("[^a-z0-9]+", "-", "-".join(map(str, parts)).lower()).strip("-")


def load(folder: Path) -> Device:
    """Read all results of a device.

    Raises:
        InputError: a file is of another schema version or no JSON.
    """
    device = Device(folder)
    with_peers: list[Case] = []
    without: list[Case] = []
    for path in sorted(folder.rglob("*.json")):
        if path.name == BASELINE_FILE:
            continue
        values = read(path)
        rows = values.get("rows")
        if not isinstance(rows, list) or not {"model", "batch", "device_name"} <= values.keys():
            device.others.append(path)
            continue
        if values.get("created", "") >= device.newest.get("created", ""):
            device.newest = values
        if values.get("kind") == "blocks":
            device.blocks += _blocks(path, values)
            continue
        if values.get("peers"):
            with_peers += _cases(path, values)
        else:
            device.jobs[path] = values
            without += _cases(path, values)
    known = {(case.model, case.batch, case.dtype) for case in with_peers}
    found = with_peers + [case for case in without if (case.model, case.batch, case.dtype) not in known]
    order = list(dict.fromkeys(case.model for case in found))
    device.cases = sorted(found, key=lambda c: (order.index(c.model), c.batch, DTYPE_ORDER.index(c.dtype)))
    return device


def _place(plan: dict[str, Any] | None, machine: Machine | None) -> Placement | None:
    """The model's place on the roofline of its own run; None without a plan that counts bytes, or without rates."""
    if plan is None or machine is None:
        return None
    if plan.get("roof"):
        return Placement(**plan["roof"])
    placed = []
    for row in plan["rows"]:  # of a run from before plans were placed
        if not row.get("bytes") or row["dtype"] not in machine.matmul_tflop_s:
            continue
        work = row["flops"] // 4 if row["kernel"] == "transition" else row["flops"]  # counted before its 2x2 pooling
        placed.append(placement(work, row["bytes"], row["layer_bytes"], row["dtype"], machine))
    return total(placed) if placed else None


def _blocks(path: Path, values: dict[str, Any]) -> Iterator[Case]:
    for block in dict.fromkeys(row["block"] for row in values["rows"]):
        mine = {key: [entry for entry in values.get(key, ()) if entry["block"] == block] for key in ("rows", "plans")}
        yield from _cases(path, values | mine | {"model": f"{values['model']}/{block}"})


def _cases(path: Path, values: dict[str, Any]) -> Iterator[Case]:
    machine = Machine.from_dict(values["machine"]) if values.get("machine") else None
    for dtype in values["dtype"].split(","):
        rows = [row for row in values["rows"] if row["dtype"] == dtype]
        # Peers are timed with the allocator that keeps memory, so that is what their absence is shown with too.
        reused = [row for row in rows if row.get("memory") == "reused"]
        plans = [p for p in values.get("plans", ()) if p.get("dtype") == dtype and p.get("accuracy") == "strict"]
        plan = plans[0] if plans else None
        roof = _place(plan, machine)
        yield Case(
            values["model"],
            values["batch"],
            dtype,
            tuple(_line(standing(roof, row["ms_median"]) | row) for row in reused or rows),
            path,
            values.get("commit"),
            plan,
            machine,
            roof,
            tables.clocks(values),
            bool(values.get("interrupted")),
        )


def _line(row: dict[str, Any]) -> Line:
    optional = ("version", "setup_seconds", "peak_extra_mb", "images_per_joule", "error", "unfused_error", "flipped")
    optional += ("settings", "flop_per_byte", "bound", "bound_ms", "share_of_bound")
    return Line(
        name=row["name"],
        kind=row.get("kind") or ("fused" if row["accuracy"] else "eager"),
        accuracy=row["accuracy"],
        status=row.get("status", "ok"),
        detail=row.get("detail") or "",
        images_per_s=row["images_per_s"],
        ms=row["ms_median"],
        ms_p20=row["ms_p20"],
        ms_p80=row["ms_p80"],
        **{name: row.get(name) for name in optional},
    )
