"""The whole comparison: models, batches and dtypes beside every peer on this machine, and then the report.

    python benchmarks/suite.py --models resnet18,resnet50 --batches 1,16 --dtypes fp32,bf16

One file for each model, batch and dtype is written as soon as it is measured, in benchmarks/results/<device>/peers;
those of its blocks, each measured alone in the same way, are in blocks. What was measured already at this commit with
these versions is left out, so that an interrupted run can be started again; but not where the machine was much slower
than in most other cases. A case that cannot be measured is reported at the end, and the others go on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import report as pages
import torch
import typer
from result_files import device_folder, disturbance, machines, read
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from resnet_fused import bench, environment, peers, report
from resnet_fused.attempts import terminated_as_interrupted
from resnet_fused.errors import InputError
from resnet_fused.roofline import Machine
from resnet_fused.settings import one_of

console = Console()

MODELS = ("resnet18", "resnet50", "densenet121", "resnet56_cifar")
BATCHES = (1, 16)
DTYPES = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16", "fp16")}
FULL_MODELS = ("resnet18", "resnet50", "resnet152", "resnet56_cifar", "densenet121", "preact_resnet164_cifar")
BLOCKS = {"cpu": ("resnet50",), "cuda": ()}  # a run for each block takes a minute or two
BLOCK_SECONDS = 2.0
FULL_BATCHES = (1, 16, 64, 256)


@dataclass(frozen=True)
class Suite:
    """What to measure, where to, and how long.

    Raises:
        InputError: a name is unknown, a number out of range, the device is missing.
    """

    models: tuple[str, ...]
    blocks_of: tuple[str, ...]
    batches: tuple[int, ...]
    dtypes: tuple[str, ...]
    device: str
    seconds: float
    peers: tuple[str, ...]
    limit: float
    out: Path
    again: bool

    def __post_init__(self) -> None:
        for model, batch in product((*self.models, *self.blocks_of), self.batches):
            if bench.Job(model, batch, self.dtypes, self.device).block:
                raise InputError(f"--models must be whole models (--blocks measures their blocks), got {model!r}")
        peers.contenders(peers.Task(self.device, self.dtypes[0], 1, 1), ("strict",), self.peers)

    def cases(self) -> Iterator[tuple[bench.Job, Path]]:
        """Every model, batch and dtype, and its file."""
        for model, batch, dtype in product(self.models, self.batches, self.dtypes):
            job = bench.Job(model, batch, (dtype,), self.device, seconds=self.seconds)
            yield job, self.out / "peers" / f"{model}-batch{batch}-{dtype}.json"

    def blocks(self) -> Iterator[tuple[bench.Job, Path]]:
        """Those whose blocks are compared."""
        seconds = min(self.seconds, BLOCK_SECONDS)
        for job, path in replace(self, models=self.blocks_of, seconds=seconds).cases():
            yield job, self.out / "blocks" / path.name

    def everything(self) -> Iterator[tuple[str, bench.Job, Path, bool]]:
        """The name of each case and of each model's blocks, the job, its file, whether it is of blocks."""
        for found, blocks in ((self.cases(), False), (self.blocks(), True)):
            for job, path in found:
                name = f"{job.model}, batch {job.batch}, {job.dtypes[0]}" + (", blocks" if blocks else "")
                yield name, job, path, blocks


def done(path: Path) -> bool:
    """Whether a file holds the whole of a case, of this commit, these versions, as many threads, undisturbed."""
    if not path.exists():
        return False
    try:
        result = read(path)
        slow = disturbed(path, result)
    except InputError as error:
        console.print(f"{error}", style="yellow", markup=False)
        return False
    now = {"commit": environment.commit(), "versions": environment.versions(), "threads": torch.get_num_threads()}
    if result.get("interrupted") or any(result.get(key) != value for key, value in now.items()):
        return False
    if slow:
        words = f"{path.stem}: measured on a disturbed machine, so measured again: {slow}"
        console.print(words, style="yellow", markup=False, soft_wrap=True)
    return not slow


def disturbed(path: Path, result: dict[str, Any]) -> str:
    """Which of the machine's rates were far below those of the other results in the folder, in words; empty if none.

    Raises:
        InputError: what the result says of the machine is not what `roofline.measure` found.
    """
    if not result.get("machine"):  # interrupted before it was measured
        return ""
    return disturbance(Machine.from_dict(result["machine"]), result["dtype"], machines(path.parent, without=path))


def disturbances(suite: Suite) -> list[str]:
    """A sentence for every case measured on a disturbed machine; of an early one, a later may have shown it."""
    found = []
    for name, _, path, _ in suite.everything():
        with suppress(InputError):  # not measured, which has been said
            if slow := disturbed(path, read(path)):
                found.append(f"{name}: measured on a disturbed machine: {slow}")
    return found


def write(result: dict[str, Any], path: Path) -> None:
    """Write a result, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    report.write_json(result, partial)
    partial.replace(path)


def summary(result: dict[str, Any]) -> list[str]:
    """What a case came to: each fused contender beside the best peer, and who was not measured."""
    if result.get("kind") == "blocks":
        return [f"{len({row['block'] for row in result['rows']})} blocks measured"]
    rows = result["rows"]
    fused = [report.verdict(row, rows) for row in rows if row["kind"] == "fused"]
    others = [f"{row['name']} {row['status']}: {row['detail']}" for row in rows if row["status"] != "ok"]
    return fused + others


def measure(suite: Suite) -> tuple[list[str], bool]:
    """Measure every case; returns what failed, a sentence each, and whether it was interrupted."""
    failures: list[str] = []
    whole = list(suite.everything())
    columns = (TextColumn("{task.description:<52}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with terminated_as_interrupted(), Progress(*columns, console=console, transient=True) as progress:
        every = progress.add_task("all", total=len(whole))
        current = progress.add_task("", total=100)
        for name, job, path, blocks in whole:
            if not suite.again and done(path):
                progress.console.print(f"{name}: measured before", style="dim")
                progress.advance(every)
                continue
            progress.reset(current, description=name, total=100)

            def tell(what: str, share: float, name: str = name) -> None:
                progress.update(current, description=f"{name}: {what}"[:52], completed=100 * share)

            try:
                result = (peers.run_blocks if blocks else peers.run)(job, tell, suite.peers, suite.limit)
                write(result, path)
                progress.console.print(name, style="bold")
                for line in summary(result):
                    progress.console.print(f"  {line}", markup=False, highlight=False)
                if slow := disturbed(path, result):
                    words = f"  disturbed machine: {slow}"
                    progress.console.print(words, style="yellow", markup=False, soft_wrap=True)
                if result["interrupted"]:
                    return failures, True
                if not result["parity"]["ok"]:
                    failures.append(f"{name}: parity does not hold")
            except KeyboardInterrupt:
                return failures, True
            except Exception as error:  # the run goes on: the next case may well work
                failures.append(f"{name}: {type(error).__name__}: {error}")
                progress.console.print(failures[-1], style="red", markup=False)
            progress.advance(every)
    return failures, False


def split(text: str) -> tuple[str, ...]:
    """The parts of a comma-separated option."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def main(
    models: Annotated[str, typer.Option(help="Names of resnet_fused.models, comma-separated.")] = ",".join(MODELS),
    blocks: Annotated[
        str | None,
        typer.Option(help="Models whose blocks are measured too; resnet50 if it is among --models."),
    ] = None,
    batches: Annotated[str, typer.Option(help="Batches, comma-separated.")] = ",".join(map(str, BATCHES)),
    dtypes: Annotated[str, typer.Option(help="Dtypes, comma-separated; all of the device if left out.")] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seconds: Annotated[float, typer.Option(help="Time to spend on the timing of a case.")] = 10.0,
    only: Annotated[str, typer.Option(help="Peers to measure, comma-separated; all if left out.")] = "",
    limit: Annotated[float, typer.Option(help="Seconds that a contender's set-up, or a turn, may take.")] = 900.0,
    out: Annotated[Path | None, typer.Option(help="Folder; benchmarks/results/<device> if left out.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Every model and batch of the table, for many hours.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Measure what was measured already, too.")] = False,
) -> None:
    """Measure, then make the report. Exit code 1 if a case failed or parity does not hold, 130 after Ctrl-C."""
    try:
        one_of("device", device, bench.DEVICES)
        whole = FULL_MODELS if full else split(models)
        usual = FULL_MODELS if full else tuple(model for model in BLOCKS[device] if model in whole)
        suite = Suite(
            whole,
            usual if blocks is None else split(blocks),
            FULL_BATCHES if full else tuple(map(number, split(batches))),
            split(dtypes) or DTYPES[device],
            device,
            seconds,
            split(only),
            limit,
            out or device_folder(device),
            again,
        )
    except InputError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    failures, interrupted = measure(suite)
    for failure in failures:
        console.print(failure, style="red", markup=False)
    slow = disturbances(suite)
    for words in slow:
        console.print(words, style="yellow", markup=False, soft_wrap=True)
    if slow and not interrupted:
        console.print("The same command measures these again.", style="yellow")
    if interrupted:
        console.print("Interrupted: what was measured is kept, and the same command goes on.", style="yellow")
        raise typer.Exit(130)
    try:
        made = pages.make() if out is None else [pages.write(out)]
        console.print("report: " + " ".join(map(str, made)), soft_wrap=True)
    except InputError as error:
        failures.append(str(error))
        console.print(f"no report: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1 if failures else 0)


def number(text: str) -> int:
    """A batch.

    Raises:
        InputError: it is no whole number.
    """
    try:
        return int(text)
    except ValueError:
        raise InputError(f"--batches must be whole numbers, got {text!r}") from None


if __name__ == "__main__":
    typer.run(main)
