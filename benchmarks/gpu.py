"""One command for a machine with a GPU: prove every kernel on it, tune, measure.

`make gpu`, or without a network

    python benchmarks/gpu.py --minutes 10 --out results

in an environment that has torch, Triton and pytest. Steps run one after the other, each in processes of its own with a
time limit; what they find is written as they go, and a step that is done is not done again by the next call. See
docs/gpu.md.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]
GPU_LOST = 75
"""See tests/gpu/conftest.py."""
NOTHING_COLLECTED = 5
"""pytest's exit status where there is no test."""
MOST_RESTARTS = 40
"""Of one group of tests, or of one command, each behind a test or kernel that took its process with it."""
GRACE_SECONDS = 8.0
"""That a command has at its limit to write what it found."""
OPS = (
    "conv_bn_act", "bottleneck", "basic_block", "stem", "preact_block", "dense_block", "transition", "project",
    "bottleneck_chain", "head",
)  # fmt: skip
"""Keys of SHAPES in tests/gpu/gpu_cases.py."""
MODELS = ("resnet50", "densenet121", "preact_resnet164_cifar", "resnet56_cifar", "resnet18", "small")
"""Words in the names of the tests in tests/gpu/test_gpu_models.py, each in a test of its own."""
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SANITIZER_FAILED = 9


@dataclass
class Outcome:
    """What became of a step.

    Attributes:
        status: `"ok"`, `"failed"`, `"partial"` (time ran out, nothing failed before), `"left out"` (no time for it) or
            `"absent"` (what it needs is not on this machine).
        detail: one line about it.
        seconds: it took.
        logs: files in the output folder.
        failures: of tests, by name; of others, the last line of the log.
    """

    status: str
    detail: str = ""
    seconds: float = 0.0
    logs: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Finished:
    """How a command ended: exit status (None: stopped at its limit), seconds, its log."""

    status: int | None
    seconds: float
    log: Path

    def last_line(self) -> str:
        """The last line of the log that is not empty."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else "it wrote nothing"


class Job:
    """One call of this program: where results go, how much time is left, what runs the commands."""

    def __init__(self, out: Path, python: str, minutes: float | None, jobs: int, device: str = "cuda") -> None:
        self.out, self.python, self.jobs, self.device = out, python, jobs, device
        self.full = minutes is None
        self.end = None if minutes is None else time.monotonic() + 60 * minutes
        self.sanitizer = find_sanitizer()
        out.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        """Seconds until the budget is spent."""
        return float("inf") if self.end is None else self.end - time.monotonic()

    def say(self, text: str) -> None:
        """A line of progress, at once: the caller may be cut off at any time."""
        print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)

    def run(self, command: Sequence[str], name: str, limit: float, env: dict[str, str] | None = None) -> Finished:
        """Run a command from the repository's root; what it prints goes to `name`.log.

        At the limit it is asked to end, and a few seconds later killed, with all that it started.
        """
        log = self.out / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        with log.open("a") as output:
            output.write(f"$ {' '.join(command)}\n")
            output.flush()
            status = _wait(command, output, {**self.environment(), **(env or {})}, limit)
            if status is None:
                output.write(f"\n[stopped at its limit, after {time.monotonic() - begun:.1f} s]\n")
        return Finished(status, time.monotonic() - begun, log)

    def environment(self) -> dict[str, str]:
        """Of the commands: kernels are compiled, not interpreted, and tuning files stay with the results."""
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        interpret = "1" if self.device == "cpu" else "0"
        own = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": interpret, "COLUMNS": "200"}
        return {**os.environ, **own, "RESNET_FUSED_CACHE": str(self.out / "tuned")}


def _wait(command: Sequence[str], output: TextIO, env: dict[str, str], limit: float) -> int | None:
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            return process.wait(None if limit == float("inf") else max(limit, 0.1))
        except subprocess.TimeoutExpired:
            process.terminate()  # it alone: it may want what its children have found
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
            return None
        finally:
            # Its children too, and also where this program itself is being interrupted.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def fingerprint() -> str:
    """Of everything that decides the results: a done step of another state of the sources is done again."""
    digest = hashlib.sha256()
    for folder in ("resnet_fused", "csrc", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".txt", ".cmake") and "results" not in path.parts:
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def find_sanitizer() -> str | None:
    """Where compute-sanitizer is: on PATH, in the toolkit, or from PyPI's nvidia-cuda-sanitizer-api."""
    folders = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    folders += ["/usr/local/cuda", *(str(path) for site in sys.path for path in Path(site).glob("nvidia/*"))]
    found = shutil.which("compute-sanitizer")
    for folder in folders:
        for path in ("bin", "compute-sanitizer", "extras/compute-sanitizer", ""):
            found = found or shutil.which("compute-sanitizer", path=str(Path(folder or "/nonexistent") / path))
    return found


# --- steps --------------------------------------------------------------------------------------------------------


def build(job: Job, limit: float) -> Outcome:
    """The native library: it is there, or compiled."""
    ready = (
        "import sys; from resnet_fused.kernels import cuda; why = cuda.built(); print(why or 'built'); "
        "sys.exit(why is not None)"
    )
    if job.run([job.python, "-c", ready], "build", 120).status == 0:
        return Outcome("ok", "it was built already")
    command = [job.python, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = job.run(command, "build", limit, {"RESNET_FUSED_CUDA": "1"})
    if done.status == 0 and (done := job.run([job.python, "-c", ready], "build", 120)).status == 0:
        return Outcome("ok", "compiled here")
    return _ended(done, "compiled here")


def environment(job: Job, limit: float) -> Outcome:
    """What the machine is: GPU, clocks, versions, kernel tables."""
    _keep(job, "nvidia-smi", ["nvidia-smi", "-q"])
    _keep(job, "packages", [job.python, "-m", "pip", "list"])
    done = job.run([job.python, "-m", "resnet_fused", "env", "--kernels"], "environment", limit)
    return _ended(done, "versions, GPU, kernel tables")


def _keep(job: Job, name: str, command: list[str]) -> None:
    """Note what a command prints, if there is such a command."""
    if shutil.which(command[0]):
        job.run(command, name, 60)


NOT_ALL = 3
"""Exit status of `imports` where some backends can be used and others cannot."""


def imports(job: Job, limit: float) -> Outcome:
    """Every backend can be used here: what would otherwise fail in each test with the same words."""
    on_gpu = job.device == "cuda"
    code = (
        "import torch; from resnet_fused.kernels import cuda, cudnn, triton; from resnet_fused.shapes import Conv; "
        f"device = torch.device({'torch.cuda.current_device()' if on_gpu else repr('cpu')}); "
        f"backends = ({'cuda, cudnn, ' if on_gpu else ''}triton,); "
        "shape = Conv(2, 64, 8, 8, 64, 1, 1); lacks = {kernels.__name__: why for kernels in backends "
        "if (why := kernels.unsupported(shape, torch.bfloat16, device))}; "
        f"print(lacks or 'all backends'); raise SystemExit({{0: 0, len(backends): 1}}.get(len(lacks), {NOT_ALL}))"
    )
    done = job.run([job.python, "-c", code], "imports", limit)
    if done.status == NOT_ALL:
        return Outcome("partial", done.last_line(), logs=["logs/imports.log"])
    return _ended(done, "cuda, cudnn, triton")


def tests(job: Job, limit: float) -> Outcome:
    """tests/gpu, a group a process: one backend and op or model each, several at a time."""
    small = ["-m", "not large", "--configs", "2", "--shapes", "6", "--dtypes", "bf16,tf32", "--test-timeout", "45"]
    options = [] if job.full else small
    last = [(f"large-{backend}", "large", backend, []) for backend in BACKENDS[:2]] if job.full else []
    end = time.monotonic() + limit
    found: list[Group] = []

    def run(group: tuple[str, str, str, list[str]]) -> None:
        name, part, backend, more = group
        # The last of two options counts.
        command = [f"tests/gpu/test_gpu_{part}.py", "--backend", backend, *options, *more]
        result = run_group(job, f"tests-{name}", command, end - time.monotonic())
        found.append(result)
        if result.outcomes or result.complete:
            job.say(f"  {name}: {result}")

    with concurrent.futures.ThreadPoolExecutor(job.jobs) as pool:
        list(pool.map(run, groups(("bf16", "tf32", "fp16", "fp32") if job.full else ("bf16", "tf32"))))
    for group in last:  # each takes a good part of the GPU's memory
        run(group)
    return summarise(found)


def groups(dtypes: Sequence[str]) -> list[tuple[str, str, str, list[str]]]:
    """(name, file, backend, options) of the groups of tests, those first that take longest."""
    found = []
    for op in OPS:
        for backend in BACKENDS:
            parts = [[dtype] for dtype in dtypes] if op == "conv_bn_act" else [list(dtypes)]
            for part in parts:
                name = "-".join(["kernels", backend, op, *(part if len(parts) > 1 else ())])
                found.append((name, "kernels", backend, ["--op", op, "--dtypes", ",".join(part)]))
    for backend in BACKENDS:
        models = [(f"models-{backend}-{name}", "models", backend, ["-k", f"{name} and not auto"]) for name in MODELS]
        found[len(dtypes) * len(BACKENDS) : 0] = models
        found.append((f"torch-{backend}", "torch", backend, []))
    return [*found, ("models-auto", "models", "vendor", ["-k", "auto"])]


BACKENDS = ("triton", "cuda", "vendor")


@dataclass
class Group:
    """How a group of tests ended: its log's name, outcomes by test, and whether all of it ran."""

    name: str
    outcomes: dict[str, str]
    complete: bool
    error: str = ""

    def count(self, outcome: str) -> int:
        """How many tests had this outcome."""
        return list(self.outcomes.values()).count(outcome)

    @property
    def failures(self) -> list[str]:
        """Tests that failed, and those that ended their process, as "crashed"."""
        failed = [test for test, outcome in self.outcomes.items() if outcome == "failed"]
        failed += [f"{test} (crashed)" for test, outcome in self.outcomes.items() if outcome == "started"]
        return failed + ([f"{self.name}: {self.error}"] if self.error else [])

    def __str__(self) -> str:
        text = f"{self.count('passed')} passed, {len(self.failures)} failed, {self.count('skipped')} skipped"
        return text if self.complete else text + ", time ran out"


def run_group(job: Job, name: str, arguments: Sequence[str], limit: float) -> Group:
    """Run pytest until every test of a group has an outcome, in a new process behind each test that ended one.

    A group of which the same was asked before, and which ran to its end, is not run again.
    """
    results = job.out / "tests" / f"{name}.jsonl"
    asked, complete = " ".join(arguments), results.with_suffix(".complete")
    if complete.exists() and complete.read_text() == asked:
        return Group(name, read_results(results), True)
    group = _run_group(job, name, arguments, results, limit)
    if group.complete and not group.error:
        complete.write_text(asked)
    return group


def _run_group(job: Job, name: str, arguments: Sequence[str], results: Path, limit: float) -> Group:
    results.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + limit
    command = [job.python, "-m", "pytest", *arguments, "--results", str(results), "-p", "no:cacheprovider"]
    command += ["--device", job.device, "-q", "--tb=short", "-o", "addopts=--strict-markers"]
    for _ in range(MOST_RESTARTS):
        known = read_results(results)
        if end - time.monotonic() < 5:
            return Group(name, read_results(results), False)
        # Inductor would start a process for every core, in each of the groups.
        done = job.run(command, name, end - time.monotonic(), {"TORCHINDUCTOR_COMPILE_THREADS": "1"})
        outcomes = read_results(results)
        # A test that hung ends its process with 1, as failures do, but has no outcome.
        hung = any(outcome == "started" and known.get(test) != "started" for test, outcome in outcomes.items())
        if done.status in (0, NOTHING_COLLECTED) or (done.status == 1 and not hung):
            return Group(name, outcomes, True)
        if done.status is None:  # the test that was running may be slow, or may only have come last: it runs again
            forget_started(results)
            return Group(name, read_results(results), False)
        if len(outcomes) == len(known):
            return Group(name, outcomes, True, f"status {done.status}: {done.last_line()}")
    return Group(name, read_results(results), False, f"{MOST_RESTARTS} processes were lost")


def read_results(path: Path) -> dict[str, str]:
    """The last outcome of every test in a file of results; "started" where its process ended in it."""
    found: dict[str, str] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        entry = json.loads(line)
        if found.get(entry["name"]) != "failed":  # a failure in the set-up or the end of a test counts too
            found[entry["name"]] = entry["outcome"]
    return found


def forget_started(path: Path) -> None:
    """Take the tests without an outcome out of a file of results."""
    if path.exists():
        outcomes = read_results(path)
        kept = [line for line in path.read_text().splitlines() if outcomes[json.loads(line)["name"]] != "started"]
        path.write_text("".join(f"{line}\n" for line in kept))


def summarise(groups: Sequence[Group]) -> Outcome:
    """The outcome of a step made of groups of tests."""
    failures = [failure for group in groups for failure in group.failures]
    passed, skipped = (sum(group.count(outcome) for group in groups) for outcome in ("passed", "skipped"))
    unfinished = [group.name for group in groups if not group.complete]
    detail = f"{passed} passed, {len(failures)} failed, {skipped} skipped"
    detail += f"; time ran out in {len(unfinished)} groups" if unfinished else ""
    status = "failed" if failures or not passed else "partial" if unfinished else "ok"
    logs = [f"logs/{group.name}.log" for group in groups if group.failures or not group.complete]
    return Outcome(status, detail, logs=logs, failures=failures)


def sanitizers(job: Job, limit: float) -> Outcome:
    """tests/gpu/tiny.py under every tool of compute-sanitizer."""
    if job.sanitizer is None:
        return Outcome("absent", "compute-sanitizer was not found: PyPI's nvidia-cuda-sanitizer-api has it")
    end = time.monotonic() + limit
    pairs = [(tool, backend) for tool in TOOLS for backend in ("cuda", "triton")]

    def run(pair: tuple[str, str]) -> tuple[str, Finished]:
        tool, backend = pair
        name = f"sanitizer-{tool}-{backend}"
        command = [str(job.sanitizer), "--tool", tool, "--error-exitcode", str(SANITIZER_FAILED), "--print-limit", "20"]
        program = [
            job.python,
            "tests/gpu/tiny.py",
            "--backend",
            backend,
            "--dtypes",
            "bf16,tf32" if job.full else "bf16",
        ]
        # Every tensor is an allocation of its own: accesses beside it are seen.
        done = job.run([*command, *program], name, end - time.monotonic(), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        job.say(f"  {tool} {backend}: {'stopped' if done.status is None else f'status {done.status}'}")
        return name, done

    with concurrent.futures.ThreadPoolExecutor(max(1, job.jobs // 2)) as pool:
        ended = list(pool.map(run, pairs))
    failures = [f"{name}: {done.last_line()}" for name, done in ended if done.status not in (0, None)]
    late = [name for name, done in ended if done.status is None]
    detail = f"{len(ended) - len(failures) - len(late)} of {len(ended)} runs clean"
    detail += f"; time ran out in {', '.join(late)}" if late else ""
    status = "failed" if failures else "partial" if late else "ok"
    return Outcome(status, detail, logs=[f"logs/{name}.log" for name, done in ended if done.status], failures=failures)


def machine(job: Job, limit: float) -> Outcome:
    """The roofline's two ceilings, and what a launch costs."""
    code = (
        "import json, sys; from resnet_fused import roofline; "
        f"found = roofline.measure({job.device!r}, ('fp32', 'bf16', 'fp16')).to_dict(); print(found); "
        "open(sys.argv[1], 'w').write(json.dumps(found, indent=1))"
    )
    return _ended(job.run([job.python, "-c", code, str(job.out / "machine.json")], "machine", limit), "machine.json")


def launches(job: Job, limit: float) -> Outcome:
    """What the host spends on a kernel: raw, as a custom op, through the package."""
    command = [job.python, "benchmarks/launches.py", "--device", job.device, "--json", str(job.out / "launches.json")]
    return _ended(job.run(command, "launches", limit), "launches.json")


def tune(job: Job, limit: float) -> Outcome:
    """`resnet-fused tune`; its files are in the folder tuned."""
    jobs = [("resnet50", 256, "bf16")]
    if job.full:
        models = ("resnet50", "resnet18", "resnet152", "densenet121", "resnet56_cifar")
        jobs = [(m, batch, dtype) for dtype in ("bf16", "fp16") for batch in (256, 1, 64, 16) for m in models]
    # A run that is stopped keeps the shapes that it has measured, and those before it in the list matter most.
    more = ["--seconds", "2"] if job.full else ["--seconds", "0.6", "--configs", "4", "--timeout", "30"]
    more += ["--workers", str(job.jobs), "--missing"]
    commands = [
        (
            f"tune-{m}-{n}-{dtype}",
            [job.python, "-m", "resnet_fused", "tune", m, "--batch", str(n), "--dtype", dtype, *more],
        )
        for m, n, dtype in jobs
    ]
    return in_turn(job, commands, limit)


def kernels(job: Job, limit: float) -> Outcome:
    """benchmarks/kernels.py: every kernel at every shape, beside eager and cuDNN."""
    command = [job.python, "benchmarks/kernels.py"]
    if job.full:
        jobs = [(dtype, batch, []) for dtype in ("bf16", "fp16") for batch in (256, 1, 64, 16)]
    else:
        jobs = [("bf16", 256, ["resnet50", "--seconds", "0.3", "--no-compile", "--timeout", "30"])]
    commands = [
        (
            f"kernels-{dtype}-{n}",
            [*command, *more, "--dtype", dtype, "--batch", str(n), *_json(job, f"kernels-{dtype}-{n}"), "--missing"],
        )
        for dtype, n, more in jobs
    ]
    return in_turn(job, commands, limit)


def bench(job: Job, limit: float) -> Outcome:
    """`resnet-fused bench`: ResNet-50 in bf16 at batch 256, then at batch 1."""
    seconds = "10" if job.full else "4"
    commands = []
    for batch in (256, 1):
        name = f"bench-resnet50-bf16-{batch}"
        command = [job.python, "-m", "resnet_fused", "bench", "resnet50", "--device", "cuda", "--batch", str(batch)]
        commands.append((name, [*command, "--dtype", "bf16", "--seconds", seconds, *_json(job, name)]))
    return in_turn(job, commands, limit)


def suite(job: Job, limit: float) -> Outcome:
    """benchmarks/suite.py: models beside every peer that is installed."""
    if not (ROOT / "benchmarks/suite.py").exists():
        return Outcome("absent", "there is no benchmarks/suite.py")
    command = [job.python, "benchmarks/suite.py", "--device", "cuda", "--out", str(job.out / "suite")]
    if job.full:
        command += ["--full"]
    else:
        command += ["--models", "resnet50", "--batches", "256", "--dtypes", "bf16", "--seconds", "3"]
        command += ["--only", "torch.compile,cuDNN fused", "--limit", "60"]
    return in_turn(job, [("suite", command)], limit)


def _json(job: Job, name: str) -> list[str]:
    return ["--json", str(job.out / f"{name}.json")]


def in_turn(job: Job, commands: Sequence[tuple[str, list[str]]], limit: float) -> Outcome:
    """Run commands one after the other, by log name, within a limit for all of them.

    One that a kernel took with it is begun again, as often as another kernel is to blame: it leaves that one out.
    """
    end = time.monotonic() + limit
    ended: list[tuple[str, Finished]] = []
    late: list[str] = []
    for name, command in commands:
        if end - time.monotonic() < 5:
            late.append(name)
            continue
        for _ in range(MOST_RESTARTS):
            before = fatal_attempts(job.out)
            done = job.run(command, name, end - time.monotonic())
            if done.status in (0, None) or fatal_attempts(job.out) == before:
                break
            job.say(f"  {name}: a kernel ended it, {done.last_line()}")
        job.say(f"  {name}: {'stopped at the limit' if done.status is None else f'status {done.status}'}")
        if done.status is None:
            late.append(name)
        else:
            ended.append((name, done))
    failures = [f"{name}: {done.last_line()}" for name, done in ended if done.status != 0]
    detail = f"{len(ended) - len(failures)} of {len(commands)} done"
    detail += f"; no time for {', '.join(late)}" if late else ""
    lost = fatal_attempts(job.out)
    detail += f"; {len(lost)} kernels hung or died, see *.attempts" if lost else ""
    status = "failed" if failures else "partial" if late else "ok"
    return Outcome(status, detail, logs=[f"logs/{name}.log" for name, _ in commands], failures=failures)


def fatal_attempts(out: Path) -> set[str]:
    """What took its process with it in tuning and in the kernel benchmark (see resnet_fused/attempts.py)."""
    outcomes = {name: outcome for path in out.rglob("*.attempts") for name, outcome in read_results(path).items()}
    return {name for name, outcome in outcomes.items() if outcome == "started"}


def _ended(done: Finished, detail: str) -> Outcome:
    """The outcome of a step of one command."""
    logs = [f"logs/{done.log.name}"]
    if done.status == 0:
        return Outcome("ok", detail, logs=logs)
    if done.status is None:
        return Outcome(
            "failed", f"stopped at its limit of {done.seconds:.0f} s", logs=logs, failures=[done.last_line()]
        )
    return Outcome("failed", f"status {done.status}", logs=logs, failures=[done.last_line()])


@dataclass(frozen=True)
class Step:
    """A step: its name, what it does, its share of a budget, and whether the others need it."""

    name: str
    run: Callable[[Job, float], Outcome]
    share: float
    needed: bool = False


STEPS = (
    Step("build", build, 3.0, needed=True),
    Step("environment", environment, 0.5),
    Step("imports", imports, 0.5, needed=True),
    Step("tests", tests, 2.5),
    Step("sanitizers", sanitizers, 0.9),
    Step("machine", machine, 0.3),
    Step("launches", launches, 0.9),
    Step("tune", tune, 1.3),
    Step("kernels", kernels, 0.9),
    Step("bench", bench, 1.2),
    Step("suite", suite, 1.5),
)
"""What a step leaves of its share, those after it have."""
LEAST_SECONDS = 10.0
"""With less left, a step is not begun."""
SHORTEST_SECONDS = 30.0
"""Importing torch and Triton and starting CUDA takes half of it on a fresh machine."""


def run_steps(job: Job, steps: Sequence[Step], state: str) -> dict[str, Outcome]:
    """Run steps in order, but for those that the summary in the output folder has as done; keep it up to date."""
    file = job.out / "summary.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    if before.get("fingerprint") != state:  # results of other sources: none of them counts
        before = {}
        for folder in ("tests", "tuned"):
            shutil.rmtree(job.out / folder, ignore_errors=True)
        for path in job.out.glob("*.attempts"):
            path.unlink()
    outcomes = {name: Outcome(**values) for name, values in before.get("steps", {}).items()}
    wanting = ""
    for i, step in enumerate(steps):
        if step.name in outcomes and outcomes[step.name].status == "ok":
            job.say(f"{step.name}: done before")
            continue
        shares = sum(s.share for s in steps[i:] if s.name not in outcomes or outcomes[s.name].status != "ok")
        limit = job.left() if job.full else min(job.left(), max(SHORTEST_SECONDS, job.left() * step.share / shares))
        if wanting:
            outcomes[step.name] = Outcome("left out", f"{wanting} failed")
        elif limit < LEAST_SECONDS:
            outcomes[step.name] = Outcome("left out", "the time was spent")
        else:
            job.say(f"{step.name}: {'no limit' if limit == float('inf') else f'at most {limit:.0f} s'}")
            begun = time.monotonic()
            outcomes[step.name] = step.run(job, limit)
            outcomes[step.name].seconds = round(time.monotonic() - begun, 1)
        outcome = outcomes[step.name]
        wanting = wanting or (step.name if step.needed and outcome.status == "failed" else "")
        job.say(f"{step.name}: {outcome.status}, {outcome.detail} ({outcome.seconds:.0f} s)")
        for failure in outcome.failures[:10]:
            job.say(f"  failed: {failure}")
        steps_done = {name: asdict(found) for name, found in outcomes.items()}
        text = json.dumps({"fingerprint": state, "steps": steps_done}, indent=1)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(text + "\n")
        temporary.replace(file)
    return outcomes


def print_table(outcomes: dict[str, Outcome]) -> None:
    """The summary, readable."""
    from rich.console import Console
    from rich.table import Table

    table = Table("step", "status", "seconds", "what", "first failures, logs", title="GPU run")
    colours = {"ok": "green", "failed": "red", "partial": "yellow"}
    for name, outcome in outcomes.items():
        notes = [*outcome.failures[:3], *(outcome.logs[:3] if outcome.status != "ok" else [])]
        status = f"[{colours.get(outcome.status, 'dim')}]{outcome.status}"
        table.add_row(name, status, f"{outcome.seconds:.0f}", outcome.detail, "\n".join(notes).replace("[", r"\["))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def default_folder() -> Path:
    """benchmarks/results/<GPU>/gpu."""
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=True
    )
    name = re.sub("[^a-z0-9]+", "-", asked.stdout.splitlines()[0].lower()).strip("-")
    return ROOT / "benchmarks" / "results" / name / "gpu"


def take_wheel(wheel: Path) -> None:
    """Put the libraries of a wheel beside the sources of this checkout."""
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if re.fullmatch(r"resnet_fused/[^/]+\.so", name)]
        if not libraries:
            raise SystemExit(f"error: {wheel} must hold resnet_fused/*.so, it has none")
        for name in libraries:
            archive.extract(name, ROOT)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<GPU>/gpu")
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything; steps shrink to it")
    parser.add_argument("--full", action="store_true", help="everything, however long it takes")
    parser.add_argument("--only", default=",".join(names), help=f"of {', '.join(names)}")
    parser.add_argument(
        "--jobs",
        type=int,
        default=max(1, (os.cpu_count() or 2) - 2),
        help="processes at a time, where nothing is timed",
    )
    parser.add_argument("--python", default=sys.executable, help="interpreter to run everything with")
    parser.add_argument(
        "--wheel", type=Path, help="take the native libraries from this wheel instead of compiling them"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: try this program out")
    given = parser.parse_args(arguments)
    wanted = given.only.split(",")
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"--only must be of {', '.join(names)}, got {unknown[0]!r}")
    if given.device == "cuda" and not shutil.which("nvidia-smi"):
        print("error: this needs an NVIDIA GPU, and nvidia-smi is not on PATH", file=sys.stderr)
        return 2
    if given.wheel:
        take_wheel(given.wheel)
    job = Job(
        (given.out or default_folder()).resolve(), given.python, None if given.full else given.minutes, given.jobs
    )
    job.device = given.device
    outcomes = run_steps(job, [step for step in STEPS if step.name in wanted], fingerprint())
    shown = {name: outcome for name, outcome in outcomes.items() if name in wanted}
    print_table(shown)
    return int(any(outcome.status == "failed" for outcome in shown.values()))


if __name__ == "__main__":
    sys.exit(main())
