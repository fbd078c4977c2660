"""The comparison: who computes the same, and who is fastest, all in one interleaved run.

Every contender has a process of its own (see `worker`). They are set up one after the other; then they take turns, in
an order that changes from round to round. All but the one whose turn it is are stopped (SIGSTOP), so that threads which
spin while they wait disturb nobody. A contender that fails, hangs or dies is a row that says so, and the others go on.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from pathlib import Path
from statistics import median
from typing import Any

import numpy
import torch

from .. import bench, blocks, environment, roofline
from ..errors import InputError
from ..roofline import Machine, Placement
from ..verify import FAST_LIMIT
from .peer import FUSED, PEER, Peer, Task
from .registry import contenders

TURN_SECONDS = 0.1  # a contender's turn lasts as long, or one call
WARM_BELOW_MS = 250.0  # calls that are shorter have an untimed one before them in every turn: cold caches would count
MIN_ROUNDS, MAX_ROUNDS = 5, 200
ENERGY_SECONDS = 2.0
ROUNDING = float(numpy.finfo(numpy.float32).eps)

PEER_FACTOR, PEER_LIMIT = 4.0, 1e-4
"""A peer's outputs may be off by so many times unfused torch's error, or by this share of the largest: BatchNorm
folded into the weights or another summation order is within that, another function or precision is not."""


class Failure(RuntimeError):
    """A contender could not do what it was asked for; the message says why."""


@dataclass
class Process:
    """A contender's process, stopped while it is not asked for anything."""

    peer: Peer | None
    folder: Path  # for what it writes

    def __post_init__(self) -> None:
        """Start it."""
        self.connection, theirs = Pipe()
        self.log = Path(self.folder, "log.txt")
        variables = {key: value for key, value in os.environ.items() if key not in bench.REUSE} | bench.REUSE
        variables |= {"TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor")}  # empty: compiling counts
        command = [sys.executable, "-m", "resnet_fused.peers.worker", str(theirs.fileno())]
        with self.log.open("w") as log:
            # A session of its own: Ctrl-C reaches this process only, which then ends the others.
            self.process = subprocess.Popen(
                command, env=variables, stdout=log, stderr=log, pass_fds=[theirs.fileno()], start_new_session=True
            )
        theirs.close()

    def ask(self, method: str, limit: float, **arguments: Any) -> Any:
        """Let it run a method of `worker.Runner` and return the result.

        Raises:
            Failure: it raised an error, did not answer within `limit` seconds, or died.
        """
        try:
            self.signal(signal.SIGCONT)
            self.connection.send((method, arguments))
            if not self.connection.poll(limit):
                raise Failure(f"no answer within {limit:.0f} s")
            status, result = self.connection.recv()
        except (EOFError, ConnectionError):
            raise Failure(self.last_words()) from None
        finally:
            self.signal(signal.SIGSTOP)
        if status != "ok":
            raise Failure(result)
        return result

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it and what it has started."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def last_words(self) -> str:
        """How it died."""
        try:
            code = self.process.wait(10)
        except subprocess.TimeoutExpired:
            return "its process hung up"
        return f"its process {bench.how_it_ended(code, self.log.read_text(errors='replace'))}"

    def end(self) -> None:
        """Kill it, with what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()


@dataclass
class Entry:
    """A contender's row as it comes about."""

    peer: Peer
    process: Process | None = None
    status: str = "failed"
    detail: str = ""
    setup: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, Any] = field(default_factory=dict)
    samples: list[float] = field(default_factory=list)
    joules: float | None = None

    def fail(self, why: str) -> None:
        """Give up on it; what was measured stays."""
        self.status, self.detail = "failed", why
        self.end()

    def compare(self, output: numpy.ndarray, exact: numpy.ndarray) -> None:
        """Take down its errors against float64; only they are kept, as a block's output can be large."""
        if output.shape != exact.shape:
            self.status, self.detail = "wrong", f"an output of shape {output.shape} where {exact.shape} was expected"
            return
        error = largest_error(output, exact)
        self.errors = {"error": error if numpy.isfinite(error) else None, "flipped": flips(output, exact)}
        if not numpy.isfinite(error):
            self.status, self.detail = "wrong", "an output is NaN or infinite"

    def end(self) -> None:
        """End its process."""
        if self.process is not None:
            self.process.end()
            self.process = None


@dataclass
class Race:
    """All contenders of one dtype."""

    job: bench.Job
    task: Task
    entries: list[Entry]
    folder: Path
    limit: float
    machine: Machine
    plans: list[dict[str, Any]] = field(default_factory=list)

    def prepare(self, on_progress: Callable[[str, float], None]) -> None:
        """Set every contender up, and judge its numbers against float64."""
        on_progress("model", 0.0)
        model = self.folder / "model.pt"
        torch.save(bench.prepare(replace(self.job, device="cpu"), "fp32"), model)
        on_progress("float64 reference", 0.0)
        start = {"model": model, "task": self.task}
        exact, why = None, ""
        reference = self.process(None, "reference")
        try:
            reference.ask("start", self.limit, peer=None, **start)
            exact = reference.ask("reference", self.limit)
        except Failure as failure:
            why = f"not compared, the float64 reference failed: {failure}"
        finally:
            reference.end()
        for done, entry in enumerate(self.entries, 1):
            on_progress(f"set-up, {entry.peer.name}", done / (1 + len(self.entries)))
            if reason := entry.peer.absent(self.task):
                entry.status, entry.detail = "absent", reason
                continue
            try:
                entry.process = self.process(entry.peer, str(done))
                entry.process.ask("start", self.limit, peer=entry.peer, **start)
                entry.setup = entry.process.ask("set_up", self.limit, machine=self.machine)
                entry.status, entry.detail = "ok", why
                output = entry.setup.pop("output")
                if exact is not None:
                    entry.compare(output, exact)
            except Failure as failure:
                entry.fail(str(failure))
        if exact is not None:
            self.judge(float(abs(exact).max()))
        for entry in self.entries:
            if plan := entry.setup.get("plan"):
                self.plans.append(plan | {"dtype": self.task.dtype, "accuracy": entry.peer.accuracy})

    def process(self, peer: Peer | None, name: str) -> Process:
        """A process for a contender, with a folder for what it writes."""
        folder = self.folder / name
        folder.mkdir()
        return Process(peer, folder)

    def judge(self, magnitude: float) -> None:
        """Hold every contender's errors against those of unfused torch, and mark those whose numbers are others.

        Args:
            magnitude: the largest of the output in float64.
        """
        unfused = next((entry.errors for entry in self.entries if entry.peer.name == bench.BASELINE), {})
        for entry in self.entries:
            if not entry.errors:
                continue
            error, unfused_error = entry.errors["error"], unfused.get("error")
            limit = None if unfused_error is None else self.allowed(entry, unfused_error, magnitude)
            entry.errors |= {"unfused_error": unfused_error, "limit": limit, "unfused_flipped": unfused.get("flipped")}
            if error is not None and limit is not None and not error <= limit:
                entry.status = "wrong"
                entry.detail = f"largest error of an output {error:.1e}, at most {limit:.1e} is allowed"

    def allowed(self, entry: Entry, unfused_error: float, magnitude: float) -> float:
        """The largest error of an output with which a contender counts as equal; the parity rule for the fused ones."""
        if entry.peer.kind == PEER:
            return max(PEER_FACTOR * unfused_error, PEER_LIMIT * magnitude)
        fast = entry.peer.accuracy == "fast" and self.task.dtype == "fp32"
        allowance = FAST_LIMIT * entry.setup["blocks"] * magnitude if fast else 0.0
        return max(2 * unfused_error + ROUNDING * magnitude, allowance)

    def time(self, on_progress: Callable[[float], None]) -> None:
        """Let the contenders take turns until the job's seconds have passed, five rounds at least."""
        order, spent = random.Random(bench.SEED), 0.0
        tidy = self.task.device == "cuda" or self.short_of_memory()
        running = self.running()
        for rounds in range(1, MAX_ROUNDS + 1):
            order.shuffle(running)
            for entry in running:
                assert entry.process is not None
                warm = tidy or not entry.samples or median(entry.samples) < WARM_BELOW_MS
                try:
                    new = entry.process.ask("turn", self.limit, seconds=TURN_SECONDS, warm=warm, tidy=tidy)
                    entry.samples += new
                    spent += sum(new) / 1e3
                except Failure as failure:
                    entry.fail(str(failure))
            running = self.running()
            on_progress(min(1.0, spent / max(self.job.seconds, 1e-9), rounds / MIN_ROUNDS))
            if not running or (rounds >= MIN_ROUNDS and spent >= self.job.seconds):
                break

    def running(self) -> list[Entry]:
        """The contenders that have not given up."""
        return [entry for entry in self.entries if entry.process is not None]

    def short_of_memory(self) -> bool:
        """Whether the free tensors that the contenders would keep take more than half of what the system has left."""
        peaks = sum(entry.setup.get("peak_extra_mb") or 0.0 for entry in self.running())
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
        except OSError:
            return False
        available = next((int(line.split()[1]) / 1024 for line in lines if line.startswith("MemAvailable")), 0.0)
        return peaks > available / 2

    def weigh_energy(self) -> None:
        """Measure the joules of an image, where the device counts them."""
        for entry in self.running():
            assert entry.process is not None
            try:
                entry.joules = entry.process.ask("joules", self.limit, seconds=ENERGY_SECONDS)
            except Failure as failure:
                entry.fail(str(failure))
            if entry.joules is None:  # no counter, so the others have none either
                return

    def end(self) -> None:
        """End every process."""
        for entry in self.entries:
            entry.end()

    def roof(self) -> Placement | None:
        """The model's place on the roofline, by the plan of the first fused contender; None if there is no plan."""
        return next((Placement(**plan["roof"]) for plan in self.plans if "roof" in plan), None)

    def rows(self, interrupted: bool) -> list[dict[str, Any]]:
        """The result's rows."""
        baseline = next((e.samples for e in self.entries if e.peer.name == bench.BASELINE), [])
        roof = self.roof()
        rows = []
        for entry in self.entries:
            status, detail = entry.status, entry.detail
            if not entry.samples and status in ("ok", "wrong"):
                status, detail = "failed", "interrupted before it was timed"
            elif interrupted and status == "failed" and not detail:
                detail = "interrupted before it was set up"
            setup = entry.setup
            row = {
                "name": entry.peer.name,
                "kind": entry.peer.kind,
                "accuracy": entry.peer.accuracy,
                "status": status,
                "detail": detail,
                "version": entry.peer.version,
                "settings": setup.get("settings", {}),
                "setup_seconds": setup.get("setup_seconds"),
                **{key: entry.errors.get(key) for key in ("error", "unfused_error", "limit")},
                **{key: entry.errors.get(key) for key in ("flipped", "unfused_flipped")},
                "peak_extra_mb": setup.get("peak_extra_mb"),
                "kept_mb": setup.get("kept_mb"),
                "images_per_joule": 1 / entry.joules if entry.joules else None,
                "ms_samples": entry.samples,
            }
            reference = median(baseline) if baseline else None
            row = bench.summarise(row, self.task.dtype, "reused", self.task.batch, reference)
            rows.append(row | roofline.standing(roof, row["ms_median"]))
        return rows


def largest_error(output: numpy.ndarray, exact: numpy.ndarray) -> float:
    """The largest difference; NaN if there is one."""
    return float(abs(output - exact).max())


def flips(output: numpy.ndarray, exact: numpy.ndarray) -> int | None:
    """Rows of logits whose largest entry is another one than in float64; None for the images that a block gives."""
    return int((output.argmax(1) != exact.argmax(1)).sum()) if exact.ndim == 2 else None


def run(
    job: bench.Job,
    on_progress: bench.Progress = lambda what, share: None,
    only: tuple[str, ...] = (),
    limit: float = 900.0,
    field_of: Callable[[Task], list[Peer]] | None = None,
) -> dict[str, Any]:
    """Compare the fused model with plain torch and every peer, and return the result, ready for `json.dump`.

    Like that of `bench.run`, with a row for everyone, present or absent. Ctrl-C ends the measurements; the result then
    has what there was, and `"interrupted": true`.

    Args:
        job: what to measure.
        on_progress: told what is going on, and the share of the whole that is done.
        only: names of the peers to measure; empty for all.
        limit: seconds that any step of a contender may take: its set-up, or one turn.
        field_of: the contenders of a task, instead of those of the registry.
    """
    threads = torch.get_num_threads()
    tasks = [Task(job.device, dtype, job.batch, threads) for dtype in job.dtypes]
    choose = field_of or (lambda t: contenders(t, job.accuracies(t.dtype), only, bool(job.block)))
    fields = [choose(task) for task in tasks]
    if job.block:  # one that does not exist is said before anything is measured
        bench.prepare(replace(job, batch=1, device="cpu"), "fp32")
    clocks = {"before": environment.clocks(job.device), "after": None}
    result = bench.header(job) | {"peers": True, "clocks": clocks}
    rows: list[dict[str, Any]] = []
    plans: list[dict[str, Any]] = []
    try:
        on_progress("machine", 0.0)
        machine = roofline.measure(job.device, job.dtypes)
        result["machine"] = machine.to_dict()
        if job.device == "cuda":
            torch.cuda.empty_cache()
    except KeyboardInterrupt:
        result["interrupted"] = True
    for index, (task, peers) in enumerate(zip(tasks, fields, strict=True)):
        if result["interrupted"]:
            break

        def tell(what: str, share: float, index: int = index, dtype: str = task.dtype) -> None:
            on_progress(f"{dtype}: {what}", (index + share) / len(tasks))

        with tempfile.TemporaryDirectory(prefix="resnet_fused-peers-", ignore_cleanup_errors=True) as folder:
            race = Race(job, task, [Entry(peer) for peer in peers], Path(folder), limit, machine)
            try:
                race.prepare(lambda what, share, tell=tell: tell(what, 0.7 * share))  # type: ignore[misc]
                race.time(lambda share, tell=tell: tell("taking turns", 0.7 + 0.28 * share))  # type: ignore[misc]
                clocks["after"] = environment.clocks(job.device)
                tell("energy", 0.98)
                race.weigh_energy()
            except KeyboardInterrupt:
                result["interrupted"] = True
            finally:
                race.end()
        rows += race.rows(result["interrupted"])
        plans += race.plans
    on_progress("done", 1.0)
    return result | {"rows": rows, "parity": parity(rows, result["interrupted"]), "plans": plans}


def parity(rows: list[dict[str, Any]], interrupted: bool) -> dict[str, Any]:
    """Whether the fused contenders hold the parity rule: all of them, or those that an interrupted run came to."""
    pairs = [(row["error"], row["limit"]) for row in rows if row["kind"] == FUSED]
    checked = [pair for pair in pairs if not (interrupted and None in pair)]
    return {"ok": bool(checked) and all(None not in pair and pair[0] <= pair[1] for pair in checked), "reports": []}


def run_blocks(
    job: bench.Job,
    on_progress: Callable[[str, float], None] = lambda what, share: None,
    only: tuple[str, ...] = (),
    limit: float = 900.0,
) -> dict[str, Any]:
    """Compare every distinct block of a model, each in a run of its own as a small model, and return one result.

    Like that of `run`, with `"kind": "blocks"`; every row and plan says in `block` whose it is: `"layer1.0 64x56x56"`,
    the path and the input of one image.

    Args:
        job: a model; its `seconds` are of each block.
        on_progress: as in `run`.
        only: as in `run`.
        limit: as in `run`.

    Raises:
        InputError: the job is of a single block.
    """
    if job.block:
        raise InputError(f"model must be a whole one, whose blocks are compared, got {job.model!r}")
    on_progress("blocks", 0.0)
    model, x = bench.prepare(replace(job, batch=1, device="cpu"), "fp32")
    sizes = blocks.distinct(model, x)
    result = bench.header(job) | {"peers": True, "kind": "blocks", "rows": [], "plans": []}
    for index, (name, size) in enumerate(sizes.items()):

        def tell(what: str, share: float, index: int = index, name: str = name) -> None:
            on_progress(f"{name}, {what}", (index + share) / len(sizes))

        found = run(replace(job, model=f"{job.model}/{name}"), tell, only, limit)
        label = {"block": f"{name} {'x'.join(map(str, size))}"}
        for key in ("rows", "plans"):
            result[key] += [label | entry for entry in found[key]]
        result["machine"] = result["machine"] or found["machine"]
        before = result["clocks"]["before"] or found["clocks"]["before"]
        result["clocks"] = {"before": before, "after": found["clocks"]["after"]}
        result["interrupted"] = found["interrupted"]
        if result["interrupted"]:
            break
    return result | {"parity": parity(result["rows"], result["interrupted"])}
