"""Compare results with a saved baseline: is the package slower than it was, beside the same reference?

    python benchmarks/baseline.py RESULT.json ... [--baseline FILE] [--worse 0.1] [--save]

A result is what `pytest benchmarks --benchmark-json`, `resnet-fused bench --json`, suite.py or kernels.py wrote. Times
change with the machine's load; compared are ratios: the speed of the package over that of a reference which was timed
beside it in the same run. --save adds the results to the baseline instead. Exit code 1 if a ratio got worse by more
than --worse, 2 if there is nothing to compare. `make baseline` and `make compare` measure, too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from result_files import BASELINE_FILE, RESULTS, device_folder, read
from rich.console import Console
from rich.table import Table

from resnet_fused import bench, environment
from resnet_fused.errors import InputError
from resnet_fused.tables import show, stdout

KERNEL_REFERENCE = "eager channels_last"


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as its reference a contender is."""

    case: str
    contender: str
    reference: str
    value: float


@dataclass(frozen=True)
class Change:
    """A ratio now and in the baseline."""

    now: Ratio
    before: float

    @property
    def factor(self) -> float:
        """Now over before: below 1 it got worse."""
        return self.now.value / self.before


@dataclass
class Comparison:
    """What became of the baseline's ratios.

    Attributes:
        changes: of all that both have.
        new: what the baseline has no counterpart of, with the reason.
        missing: what the results have no counterpart of, in the cases that they have.
    """

    changes: list[Change] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def worse(self, tolerance: float) -> list[Change]:
        """Those that got worse by more than this share, the worst first."""
        found = [change for change in self.changes if change.factor < 1 - tolerance]
        return sorted(found, key=lambda change: change.factor)


# --- ratios of results --------------------------------------------------------------------------------------------


def ratios(values: dict[str, Any], path: Path) -> list[Ratio]:
    """The ratios that a result holds.

    Raises:
        InputError: it is none of a benchmark, or holds no contender together with its reference.
    """
    rows = values.get("rows")
    if "benchmarks" in values:
        found = list(_of_pytest(values["benchmarks"]))
    elif not isinstance(rows, list):
        raise InputError(f"{path} must be the result of a benchmark, got the keys {', '.join(values)}")
    elif any("op" in row for row in rows):
        found = list(_of_kernels(values))
    else:
        found = list(_of_models(values))
    if not found:
        raise InputError(f"{path} must hold a contender and its reference, got neither pair")
    return found


def _of_pytest(benchmarks: list[dict[str, Any]]) -> Iterator[Ratio]:
    """Of pytest-benchmark: each test says in `extra_info` who it times and beside whom."""
    times: dict[str, dict[str, float]] = {}
    for entry in benchmarks:
        if "contender" in entry["extra_info"]:
            times.setdefault(entry["group"], {})[entry["extra_info"]["contender"]] = entry["stats"]["median"]
    for entry in benchmarks:
        about, group = entry["extra_info"], entry["group"]
        reference = times.get(group, {}).get(about.get("reference"))
        if reference and about["contender"] != about["reference"]:
            value = reference / times[group][about["contender"]]
            yield Ratio(f"pytest: {group}", about["contender"], about["reference"], value)


def _of_models(values: dict[str, Any]) -> Iterator[Ratio]:
    """Of bench.run, peers.run and peers.run_blocks: the fused rows, beside eager with the same allocator."""
    kind = values.get("kind") or ("peers" if values.get("peers") else "bench")
    reference = bench.BASELINE
    rows = [row for row in values["rows"] if row["ms_median"]]
    for group in dict.fromkeys(map(_group, rows)):
        dtype, memory, block = group
        times = {row["name"]: row["ms_median"] for row in rows if _group(row) == group}
        model = f"{values['model']}/{block}" if block else values["model"]
        case = f"{kind}: {model}, batch {values['batch']}, {dtype}, {memory} memory"
        fused = {row["name"] for row in rows if row["accuracy"]}
        for name in times.keys() & fused if reference in times else ():
            yield Ratio(case, name, reference, times[reference] / times[name])


def _group(row: dict[str, Any]) -> tuple[str, str, str]:
    """What the rows of a result that are compared with each other have in common."""
    return row["dtype"], row["memory"], row.get("block", "")


def _of_kernels(values: dict[str, Any]) -> Iterator[Ratio]:
    """Of kernels.py: this package's GPU kernels."""
    times: dict[str, dict[str, float]] = {}
    for row in values["rows"]:
        times.setdefault(row["shape"], {})[row["name"]] = row["us"]
    for shape, by_name in times.items():
        for name, microseconds in by_name.items():
            if name.startswith(("triton ", "cuda ")) and KERNEL_REFERENCE in by_name:
                case = f"kernels: {values['dtype']}, {shape}"
                yield Ratio(case, name, KERNEL_REFERENCE, by_name[KERNEL_REFERENCE] / microseconds)


def machine(values: dict[str, Any]) -> dict[str, Any]:
    """What a result was measured on, as far as it says so."""
    if "machine_info" in values:  # pytest-benchmark's
        values = values["machine_info"].get("resnet_fused", {})
    name = values.get("device_name", values.get("gpu"))
    found = {"device_name": name, "isa": values.get("isa"), "threads": values.get("threads")}
    return {key: value for key, value in found.items() if value is not None}


# --- the baseline -------------------------------------------------------------------------------------------------


def compare(now: list[Ratio], saved: dict[str, dict[str, dict[str, Any]]]) -> Comparison:
    """Compare ratios with those of a baseline (case, contender: ratio and reference)."""
    outcome = Comparison()
    for ratio in now:
        before = saved.get(ratio.case, {}).get(ratio.contender)
        if before is None:
            outcome.new.append(f"{ratio.case}: {ratio.contender}")
        elif before["reference"] != ratio.reference:
            why = f"beside {ratio.reference} now, {before['reference']} in the baseline"
            outcome.new.append(f"{ratio.case}: {ratio.contender}, {why}")
        else:
            outcome.changes.append(Change(ratio, before["ratio"]))
    measured = {(ratio.case, ratio.contender) for ratio in now}
    for case in dict.fromkeys(ratio.case for ratio in now):
        names = saved.get(case, {})
        outcome.missing += [f"{case}: {name}" for name in names if (case, name) not in measured]
    return outcome


def default_path(paths: list[Path]) -> Path:
    """The baseline of the device whose results these are: by their folder, and outside of those this machine's.

    Raises:
        InputError: they are in the folders of several devices.
    """
    folders = {parent for path in paths for parent in path.resolve().parents if parent.parent == RESULTS.resolve()}
    if len(folders) > 1:
        names = " and ".join(sorted(folder.name for folder in folders))
        raise InputError(f"--baseline must name the file for results of several devices, got none for {names}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return (folders.pop() if folders else device_folder(device, RESULTS)) / BASELINE_FILE


def load(path: Path, save: bool) -> dict[str, Any]:
    """The saved baseline; an empty one if there is none and it is about to be saved.

    Raises:
        InputError: it is missing, or of another schema version.
    """
    if path.exists():
        return read(path)
    if save:
        return {"schema": bench.SCHEMA, "machine": {}, "ratios": {}}
    raise InputError(f"--baseline must name a file, got {path}, which does not exist: --save makes it")


def report(outcome: Comparison, tolerance: float, console: Console) -> None:
    """Print what got worse, and what has no counterpart."""
    worse = outcome.worse(tolerance)
    if worse:
        table = Table("case", "contender", "reference", title=f"Worse by more than {tolerance:.0%}")
        for name in ("before", "now", "now / before"):
            table.add_column(name, justify="right")
        for change in worse:
            figures = (f"{change.before:.2f}x", f"{change.now.value:.2f}x", f"{change.factor:.2f}")
            table.add_row(change.now.case, change.now.contender, change.now.reference, *figures, style="red")
        show(table, console)
    for title, names in (("not in the baseline", outcome.new), ("not in the results", outcome.missing)):
        for name in names:
            console.print(f"{title}: {name}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    middle = median(change.factor for change in outcome.changes)
    counts = f"{len(outcome.changes)} ratios compared, {len(worse)} worse by more than {tolerance:.0%}"
    console.print(f"{counts}, median of now / before {middle:.2f}")


def save(found: list[Ratio], on: dict[str, Any], known: dict[str, Any], path: Path) -> None:
    """Write the baseline with these ratios added; cases that they have are replaced."""
    saved = {case: names for case, names in known["ratios"].items() if case not in {ratio.case for ratio in found}}
    for ratio in found:
        saved.setdefault(ratio.case, {})[ratio.contender] = {"ratio": ratio.value, "reference": ratio.reference}
    about = {
        "schema": bench.SCHEMA,
        "machine": known["machine"] | on,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": environment.commit(),
        "versions": environment.versions(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about | {"ratios": dict(sorted(saved.items()))}, indent=1) + "\n")


def main(
    results: Annotated[list[Path], typer.Argument(help="JSON files of benchmarks.")],
    baseline: Annotated[Path | None, typer.Option(help="The baseline; that of the device if left out.")] = None,
    worse: Annotated[float, typer.Option(help="The share by which a ratio may get worse.")] = 0.1,
    save_: Annotated[bool, typer.Option("--save", help="Add the results to the baseline.")] = False,
) -> None:
    """Compare results with a baseline, or save them as one."""
    try:
        if not 0 <= worse < 1:
            raise InputError(f"--worse must be at least 0 and less than 1, got {worse}")
        path = baseline or default_path(results)
        known = load(path, save_)
        found: list[Ratio] = []
        on: dict[str, Any] = {}
        for result in results:
            values = read(result)
            found += ratios(values, result)
            mine = machine(values)
            for key, value in mine.items():
                expected = on.get(key, known["machine"].get(key, value))
                if value != expected:
                    raise InputError(f"{result} must be of the baseline's machine, {key} {expected!r}, got {value!r}")
            on |= mine
        if save_:
            save(found, on, known, path)
            print(f"{len(found)} ratios saved in {path}")
            return
        outcome = compare(found, known["ratios"])
        if not outcome.changes:
            raise InputError(
                f"the results must have a ratio in common with {path}, got none: {', '.join(outcome.new[:3])}"
                f"{', ...' * (len(outcome.new) > 3)} are not in it (--save adds them)"
            )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    report(outcome, worse, stdout())
    raise typer.Exit(1 if outcome.worse(worse) else 0)


if __name__ == "__main__":
    typer.run(main)
