"""`make gpu` without a GPU: its steps, budget and resumption with stand-ins, and tests/gpu in Triton's interpreter."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu
import launches
import pytest
import suite
import torch
import typer
from gpu import Group, Job, Outcome, Step
from typer.testing import CliRunner

from resnet_fused import gpu_timer
from resnet_fused.errors import BackendError
from resnet_fused.kernels import packing, triton

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
sys.path.insert(0, str(ROOT / "tests/gpu"))
import gpu_cases  # noqa: E402
import test_gpu_models as gpu_models  # noqa: E402
import tiny  # noqa: E402

CRASHES = """
import os, time, pytest
def test_before(): pass
def test_wrong(): assert 1 == 2, "one is not two"
def test_crash(): os.abort()
def test_skipped(): pytest.skip("not here")
@pytest.fixture
def broken(): raise RuntimeError("no set-up")
def test_set_up(broken): pass
def test_after(): pass
"""


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path / "out", sys.executable, None, jobs=1, device="cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of tests with the conftest of tests/gpu."""
    made = tmp_path / "suite"
    made.mkdir()
    shutil.copy(ROOT / "tests/gpu/conftest.py", made)
    (made / "pytest.ini").write_text("[pytest]\nmarkers =\n  gpu: needs a GPU\n")
    return made


def test_a_test_that_takes_its_process_with_it_is_one_failure(job: Job, folder: Path) -> None:
    (folder / "test_crashes.py").write_text(CRASHES)
    group = gpu.run_group(
        job, "crashes", [str(folder), "--confcutdir", str(folder), "-c", str(folder / "pytest.ini")], 120
    )
    outcomes = {name.rpartition("::")[2]: outcome for name, outcome in group.outcomes.items()}
    assert outcomes == {
        "test_before": "passed",
        "test_wrong": "failed",
        "test_crash": "started",
        "test_skipped": "skipped",
        "test_set_up": "failed",
        "test_after": "passed",
    }
    assert group.complete
    assert not group.error
    assert [name.rpartition("::")[2] for name in group.failures] == [
        "test_wrong", "test_set_up", "test_crash (crashed)",
    ]  # fmt: skip
    outcome = gpu.summarise([group])
    assert (outcome.status, outcome.detail) == ("failed", "2 passed, 3 failed, 1 skipped")
    lines = [json.loads(line) for line in (job.out / "tests/crashes.jsonl").read_text().splitlines()]
    assert any("one is not two" in line.get("message", "") for line in lines)


@pytest.mark.thorough
def test_a_slow_group_keeps_what_it_has_and_goes_on_later(job: Job, folder: Path) -> None:
    mark = folder / "mark"
    (folder / "test_slow.py").write_text(
        f"import pathlib, time\nmark = pathlib.Path({str(mark)!r})\ndef test_quick(): mark.write_text('x')\n"
        "def test_slow():\n    if mark.read_text() == 'x':\n        mark.write_text('y'); time.sleep(60)\n"
    )
    arguments = [str(folder), "--confcutdir", str(folder), "-c", str(folder / "pytest.ini")]
    started = time.monotonic()
    group = gpu.run_group(job, "slow", arguments, 25)
    assert time.monotonic() - started < 45
    assert not group.complete
    assert list(group.outcomes.values()) == ["passed"]
    assert gpu.summarise([group]).status == "partial"
    group = gpu.run_group(job, "slow", arguments, 60)
    assert group.complete
    assert list(group.outcomes.values()) == ["passed", "passed"]
    assert gpu.summarise([group]).status == "ok"


@pytest.mark.thorough
def test_tests_that_cannot_be_collected_are_a_failure(job: Job, folder: Path) -> None:
    (folder / "test_broken.py").write_text("import there_is_no_such_module\n")
    group = gpu.run_group(
        job, "broken", [str(folder), "--confcutdir", str(folder), "-c", str(folder / "pytest.ini")], 60
    )
    assert group.failures == [f"broken: {group.error}"]
    assert gpu.summarise([group]).status == "failed"
    assert gpu.summarise([Group("none", {}, True)]).status == "failed", "nothing was tested"


def stand_in(name: str, outcome: Outcome, ran: list[str], minutes: float = 1.0) -> Step:
    def run(job: Job, limit: float) -> Outcome:
        ran.append(f"{name} {limit:.0f}")
        return Outcome(outcome.status, outcome.detail, failures=list(outcome.failures))

    return Step(name, run, minutes)


def test_done_steps_are_not_done_again(job: Job) -> None:
    ran: list[str] = []
    steps = [
        stand_in("first", Outcome("ok"), ran),
        stand_in("second", Outcome("failed", failures=["a[test]"]), ran),
        stand_in("third", Outcome("partial"), ran),
    ]
    assert {name: o.status for name, o in gpu.run_steps(job, steps, "a").items()} == {
        "first": "ok", "second": "failed", "third": "partial",
    }  # fmt: skip
    assert ran == ["first inf", "second inf", "third inf"]
    gpu.run_steps(job, steps, "a")
    assert ran[3:] == ["second inf", "third inf"]
    (job.out / "tests").mkdir()
    (job.out / "tests/old.jsonl").write_text("{}")
    gpu.run_steps(job, steps, "b")
    assert ran[5:] == ["first inf", "second inf", "third inf"]
    assert not (job.out / "tests").exists(), "outcomes of other sources were kept"
    assert json.loads((job.out / "summary.json").read_text())["steps"]["second"]["failures"] == ["a[test]"]


def test_budget(tmp_path: Path) -> None:
    ran: list[str] = []
    job = Job(tmp_path, sys.executable, 1.5, jobs=1)
    steps = [stand_in("short", Outcome("ok"), ran, 0.5), stand_in("long", Outcome("ok"), ran, 5.0)]
    gpu.run_steps(job, steps, "a")
    assert ran == ["short 30", "long 90"], "no step gets less than 30 s, and the last one all that is left"
    job.end = time.monotonic() + 3
    outcomes = gpu.run_steps(job, [*steps, stand_in("late", Outcome("ok"), ran)], "a")
    assert outcomes["late"].status == "left out"
    assert len(ran) == 2


def test_each_step_has_its_share_and_what_those_before_it_left(tmp_path: Path) -> None:
    ran: list[str] = []
    job = Job(tmp_path, sys.executable, 10, jobs=1)
    steps = [stand_in(name, Outcome("ok"), ran, share) for name, share in (("a", 1.0), ("b", 3.0), ("c", 1.0))]
    gpu.run_steps(job, steps, "a")
    assert ran == ["a 120", "b 450", "c 600"]


def test_nothing_is_tried_without_what_everything_needs(tmp_path: Path) -> None:
    ran: list[str] = []
    job = Job(tmp_path, sys.executable, 10, jobs=1)
    broken = stand_in("build", Outcome("failed"), ran)
    broken = replace(broken, needed=True)
    outcomes = gpu.run_steps(job, [broken, stand_in("tests", Outcome("ok"), ran)], "a")
    assert [line.split()[0] for line in ran] == ["build"]
    assert (outcomes["tests"].status, outcomes["tests"].detail) == ("left out", "build failed")
    assert {step.name for step in gpu.STEPS if step.needed} == {"build", "imports"}


def test_imports(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """That one backend of several cannot be used is told; that none can, ends the run."""
    assert gpu.imports(job, 60).status == "ok"
    job.device = "cuda"
    with monkeypatch.context() as patch:
        patch.setattr(Job, "environment", lambda self: os.environ | {"PYTHONPATH": str(ROOT)})
        outcome = gpu.imports(job, 60)
    assert (outcome.status, len(outcome.failures)) == ("failed", 1)
    half = SimpleNamespace(status=gpu.NOT_ALL, last_line=lambda: "{'cuda': 'it was not compiled'}")
    monkeypatch.setattr(Job, "run", lambda *_: half)
    outcome = gpu.imports(job, 60)
    assert (outcome.status, outcome.detail) == ("partial", "{'cuda': 'it was not compiled'}")


def test_results_of_other_sources_are_deleted(job: Job) -> None:
    gpu.run_steps(job, [], "a")
    (job.out / "summary.json").write_text(json.dumps({"fingerprint": "a", "steps": {}}))
    for folder in ("tests", "tuned"):
        (job.out / folder).mkdir()
    (job.out / "kernels.attempts").write_text("")
    gpu.run_steps(job, [stand_in("one", Outcome("ok"), [])], "a")
    assert (job.out / "tuned").exists() and (job.out / "kernels.attempts").exists()
    gpu.run_steps(job, [stand_in("one", Outcome("ok"), [])], "b")
    assert [path.name for path in job.out.iterdir()] == ["summary.json"]


FATAL = """
import sys, pathlib
from resnet_fused.attempts import Attempts
import os
attempts = Attempts(pathlib.Path(sys.argv[1]))
for name in ("one", "two", "three"):
    try:
        with attempts.attempt(name):
            if name != "two": os.abort()
    except Exception:
        pass
print("through")
"""


def test_a_command_that_a_kernel_ended_is_begun_again(job: Job) -> None:
    command = [sys.executable, "-c", FATAL, str(job.out / "kernels.attempts")]
    outcome = gpu.in_turn(job, [("kernels", command)], 120)
    assert (outcome.status, outcome.failures) == ("ok", [])
    assert outcome.detail == "1 of 1 done; 2 kernels hung or died, see *.attempts"
    log = (job.out / "logs/kernels.log").read_text()
    assert log.count("$ ") == 3 and log.rstrip().endswith("through")
    outcome = gpu.in_turn(job, [("kernels", [sys.executable, "-c", "raise SystemExit(1)"])], 120)
    assert outcome.status == "failed", "a command that fails for another reason is not tried again"
    assert (job.out / "logs/kernels.log").read_text().count("$ ") == 4


def test_a_command_has_time_to_write_what_it_found(job: Job) -> None:
    saves = (
        "import pathlib, time\nfrom resnet_fused.attempts import terminated_as_interrupted\n"
        f"file = pathlib.Path({str(job.out / 'found')!r})\n"
        "with terminated_as_interrupted():\n  try:\n    file.write_text('begun')\n    time.sleep(99)\n"
        "  except KeyboardInterrupt:\n    file.write_text('found')\n"
    )
    done = job.run([sys.executable, "-c", saves], "saves", 15)
    assert done.status is None
    assert (job.out / "found").read_text() == "found"


def test_groups_of_tests_are_complete() -> None:
    """Every op, backend, dtype and model is in one group, and every test of a model in one word's."""
    made = gpu.groups(("bf16", "tf32"))
    assert len({name for name, *_ in made}) == len(made)
    kernels = [(backend, *options[1::2]) for _, part, backend, options in made if part == "kernels"]
    assert {(backend, op) for backend, op, _ in kernels} == {(b, op) for b in gpu.BACKENDS for op in gpu.OPS}
    for backend in gpu.BACKENDS:
        assert sorted(d for b, op, d in kernels if (b, op) == (backend, "conv_bn_act")) == ["bf16", "tf32"]
    assert set(gpu_models.MODELS) | {"small"} == set(gpu.MODELS)
    tests = [name for name in vars(gpu_models) if name.startswith("test_")]
    assert sorted(tests) == [
        "test_auto_takes_what_there_is", "test_cuda_graph_and_compile", "test_parity", "test_parity_of_a_small_model",
    ]  # fmt: skip


def test_a_group_that_ran_to_its_end_is_not_run_again(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run(self: Job, command: list[str], name: str, limit: float, env: dict[str, str]) -> gpu.Finished:
        ran.append(env["TORCHINDUCTOR_COMPILE_THREADS"])
        (job.out / "tests" / f"{name}.jsonl").write_text('{"name": "a", "outcome": "failed"}\n')
        return gpu.Finished(1, 0.0, job.out / "log")

    monkeypatch.setattr(Job, "run", run)
    for arguments, times in ((["x"], 1), (["x"], 1), (["x", "y"], 2)):
        group = gpu.run_group(job, "group", arguments, 100)
        assert group.complete and group.failures == ["a"]
        assert ran == ["1"] * times


def test_commands_are_stopped_at_their_limit_with_their_children(job: Job) -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; print(1); time.sleep(99)'])"
    started = time.monotonic()
    done = job.run([sys.executable, "-c", child], "sleep", 3)
    assert time.monotonic() - started < 20
    assert done.status is None
    assert "stopped at its limit" in done.log.read_text()
    done = job.run([sys.executable, "-c", "raise SystemExit('it is broken')"], "broken", 60)
    assert (done.status, gpu._ended(done, "").failures) == (1, ["it is broken"])
    outcome = gpu.in_turn(job, [("one", [sys.executable, "-c", "1"]), ("two", [sys.executable, "-c", "1/0"])], 60)
    assert outcome.status == "failed"
    assert outcome.failures == ["two: ZeroDivisionError: division by zero"]


def test_environment_of_commands(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    on_gpu = Job(job.out, sys.executable, None, 1).environment()
    assert on_gpu["TRITON_INTERPRET"] == "0"
    assert on_gpu["COLUMNS"] == "200"
    assert on_gpu["RESNET_FUSED_CACHE"] == str(job.out / "tuned")
    assert on_gpu["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)


def test_sanitizers_are_absent_or_run(job: Job, tmp_path: Path) -> None:
    job.sanitizer = None
    assert gpu.sanitizers(job, 60).status == "absent"
    fake = tmp_path / "compute-sanitizer"
    fake.write_text('#!/bin/sh\necho "$@"\ncase "$*" in *racecheck*triton*) echo hazard; exit 9;; esac\n')
    fake.chmod(0o755)
    job.sanitizer = str(fake)
    outcome = gpu.sanitizers(job, 60)
    assert outcome.status == "failed"
    assert outcome.detail == "7 of 8 runs clean"
    assert outcome.failures == ["sanitizer-racecheck-triton: hazard"]
    log = (job.out / "logs/sanitizer-memcheck-cuda.log").read_text()
    assert "--tool memcheck --error-exitcode 9" in log
    assert "tests/gpu/tiny.py --backend cuda" in log


def test_every_op_has_a_group() -> None:
    assert sorted(gpu_cases.SHAPES) == sorted(gpu_cases.TINY) == sorted(gpu.OPS)


def test_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("resnet_fused/_native.so", "library")
        archive.writestr("resnet_fused/__init__.py", "not this")
    monkeypatch.setattr(gpu, "ROOT", tmp_path / "tree")
    gpu.take_wheel(wheel)
    assert [path.name for path in (tmp_path / "tree/resnet_fused").iterdir()] == ["_native.so"]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("resnet_fused/__init__.py", "")
    with pytest.raises(SystemExit, match="it has none"):
        gpu.take_wheel(wheel)


def python_calls(tmp_path: Path, *arguments: str) -> list[str]:
    """Every call of `$(VENV)/bin/python` by `make gpu`, RESNET_FUSED_NATIVE first; a stand-in notes them."""
    calls, programs = tmp_path / "calls", tmp_path / "venv/bin"
    programs.mkdir(parents=True)
    (programs.parent / "pyvenv.cfg").touch()
    for name, script in (("python", f'echo "${{RESNET_FUSED_NATIVE-unset}} $*" >> {calls}'), ("nvidia-smi", "")):
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    command = ["make", "gpu", "DEVICE=cuda", f"VENV={programs.parent}", *arguments]
    choices = ("RESNET_FUSED_NATIVE", "WHEEL", "GPU", "MAKEFLAGS")  # of the make that runs the tests
    environment = {name: value for name, value in os.environ.items() if name not in choices}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return calls.read_text().splitlines()


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_make_compiles_nothing_where_there_is_a_wheel(tmp_path: Path) -> None:
    compiled, taken = python_calls(tmp_path / "a"), python_calls(tmp_path / "b", "WHEEL=a.whl", "GPU=--full")
    assert sum("install --no-build-isolation -e" in call for call in taken) == 2
    assert {call.split()[0] for call in compiled} == {"unset"}
    assert {call.split()[0] for call in taken} == {"0"}
    assert not any("nvcc" in call for call in taken)
    assert compiled[-1] == "unset benchmarks/gpu.py"
    assert taken[-1] == "0 benchmarks/gpu.py --wheel a.whl --full"


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_make_takes_torchvision_from_the_index_of_torch(tmp_path: Path) -> None:
    calls = python_calls(tmp_path, "TORCH=torch==2.13.0", "TORCH_INDEX=https://an.index")
    torch_call, torchvision_call = (call for call in calls if "install --index-url https://an.index" in call)
    assert torch_call.endswith(" torch==2.13.0")
    assert " torchvision torch==" in torchvision_call  # the installed version follows, which the stand-in does not tell


@pytest.mark.parametrize("full", [False, True])
def test_suite_is_asked_for_the_whole_table_or_one_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    asked: list[suite.Suite] = []
    program = typer.Typer()
    program.command()(suite.main)

    def run(self: Job, command: list[str], name: str, limit: float) -> gpu.Finished:
        outcome = CliRunner().invoke(program, command[2:])
        return gpu.Finished(outcome.exit_code, 0.0, tmp_path / "log")

    def measure(given: suite.Suite) -> tuple[list[str], bool]:
        asked.append(given)
        return [], False

    monkeypatch.setattr(Job, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(suite, "measure", measure)
    monkeypatch.setattr(suite.pages, "write", lambda folder: folder / "report.html")
    outcome = gpu.suite(Job(tmp_path, sys.executable, None if full else 10.0, jobs=1), 60)
    assert (outcome.status, outcome.failures) == ("ok", [])
    (given,) = asked
    assert (given.device, given.out) == ("cuda", tmp_path / "suite")
    table = (suite.FULL_MODELS, suite.FULL_BATCHES, suite.DTYPES["cuda"])
    assert (given.models, given.batches, given.dtypes) == (table if full else (("resnet50",), (256,), ("bf16",)))
    assert given.seconds == (10.0 if full else 3.0)
    assert given.peers == (() if full else ("torch.compile", "cuDNN fused"))


def test_refuses(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda *_, **__: None)
    assert gpu.main([]) == 2
    assert "nvidia-smi is not on PATH" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main(["--only", "tests,dance"])
    assert "--only must be of build" in capsys.readouterr().err


def test_whole_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[str] = []
    steps = (
        stand_in("tests", Outcome("failed", "1 failed", failures=["x[y]"]), ran),
        stand_in("tune", Outcome("ok"), ran),
    )
    monkeypatch.setattr(gpu, "STEPS", steps)
    out = ["--device", "cpu", "--out", str(tmp_path / "out")]
    assert gpu.main([*out, "--only", "tune"]) == 0
    assert gpu.main(out) == 1
    assert [line.split()[0] for line in ran] == ["tune", "tests"]
    assert "x[y]" in capsys.readouterr().out


# --- tests/gpu and what it runs, in Triton's interpreter ----------------------------------------------------------


def variant(op: str) -> gpu_cases.Variant:
    return next(v for v in gpu_cases.variants(CPU, ["triton"], op, ["bf16"], most=1, tiny=True) if v.algorithm != "op")


def test_checks_pass_on_right_kernels() -> None:
    for op in ("transition", "head", "project"):
        for values in ("integers", "random", "special"):
            gpu_cases.check(variant(op), values, CPU)
        gpu_cases.check_repeats(variant(op), CPU, 1)
    gpu_cases.check_slices(variant("conv_bn_act"), CPU)


def test_every_check_fails_on_a_kernel_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = triton.transition, []

    def wrong(*args: Any, **options: Any) -> torch.Tensor:
        y = right(*args, **options)
        calls.append(y)
        y[0, 0, 0, 0] += len(calls)
        y[y.isnan()] = 0
        return y

    monkeypatch.setattr(triton, "transition", wrong)
    for values, message in (("integers", "1 of .* wrong"), ("random", "error"), ("special", "a NaN was lost")):
        with pytest.raises(AssertionError, match=message):
            gpu_cases.check(variant("transition"), values, CPU)
    with pytest.raises(AssertionError, match="1 of 1 runs differed"):
        gpu_cases.check_repeats(variant("transition"), CPU, 1)


def test_a_convolution_that_writes_beside_its_slice_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = triton.conv_bn_act

    def wrong(*args: Any, out: torch.Tensor, **options: Any) -> torch.Tensor:
        torch.as_strided(out, (1,), (1,), out.storage_offset() + out.shape[1]).zero_()  # the next channel
        return right(*args, out=out, **options)

    monkeypatch.setattr(triton, "conv_bn_act", wrong)
    with pytest.raises(AssertionError, match="behind its slice"):
        gpu_cases.check_slices(variant("conv_bn_act"), CPU)


def test_variants_have_names_of_their_own() -> None:
    """Of a failing configuration one must know which it was."""
    every = list(gpu_cases.variants(CPU, ["triton", "vendor"], precisions=["bf16", "tf32"]))
    assert len({str(v) for v in every}) == len(every)
    assert {v.op for v in every} == set(gpu.OPS)
    few = list(gpu_cases.variants(CPU, ["triton"], "bottleneck", ["bf16"], most=2, shapes=1))
    assert [v.algorithm for v in few] == ["bottleneck", "bottleneck", "op"]


def test_tiny_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.main(["--device", "cpu", "--backend", "triton", "--op", "transition", "--dtypes", "bf16"]) == 0
    assert "2 variants ran" in capsys.readouterr().out


def test_launches(tmp_path: Path) -> None:
    assert launches.main(["--device", "cpu", "--count", "1", "--json", str(tmp_path / "l.json")]) == 0
    found = json.loads((tmp_path / "l.json").read_text())["us"]
    assert min(found.values()) > 0
    assert {"Triton kernel", "the same as custom_op", "conv_bn_act, triton"} <= set(found)


# --- what only a GPU would meet first -----------------------------------------------------------------------------


def test_timer_leaves_cudnn_on() -> None:
    cudnn = torch.backends.cudnn
    before = (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision)
    with gpu_timer.cudnn_measures():
        assert (cudnn.enabled, cudnn.benchmark) == (True, True)
        assert (cudnn.deterministic, cudnn.conv.fp32_precision) == before[2:]
    assert (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision) == before


class Graph:
    """Stands in for a CUDA graph."""

    replays = 0

    def replay(self) -> None:
        Graph.replays += 1


class Event:
    """Stands in for a CUDA event."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    def elapsed_time(self, end: object) -> float:
        return 2.0


def test_timer_captures_every_call_in_one_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = []

    @contextlib.contextmanager
    def capture(graph: Graph, pool: str) -> Iterator[None]:
        pools.append(pool)
        yield

    stand_ins = {
        "device": lambda _: contextlib.nullcontext(),
        "graph_pool_handle": lambda: "pool",
        "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "stream": lambda _: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": capture,
        "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=1024),
        "Event": Event,
        "synchronize": lambda: None,
    }
    for name, stand_in_for_it in stand_ins.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, stand_in_for_it)
    ran: list[str] = []
    calls = {"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}
    samples = gpu_timer.interleave(calls, 0.0, CPU)
    assert samples == {"a": [0.002] * gpu_timer.MIN_ROUNDS, "b": [0.002] * gpu_timer.MIN_ROUNDS}
    assert ran == [*"aaaa", *"bbbb"]  # three times to warm up, once to be captured
    assert pools == ["pool", "pool"]
    assert Graph.replays == 2 * gpu_timer.MIN_ROUNDS


def test_a_lost_gpu_ends_the_run_with_the_culprit(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_timer.check_gpu("nothing")  # no GPU was touched

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(BackendError, match="lost to this process after triton gemm: CUDA error: an illegal"):
        gpu_timer.check_gpu("triton gemm")


def test_packs_are_there_for_every_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack made on one stream may be read on another at once: making it waits."""
    waited = []

    class Stream:
        def synchronize(self) -> None:
            waited.append("yes")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    packing.wait_for(torch.device("cpu"))
    assert not waited
    packing.wait_for(torch.device("cuda", 0))
    assert waited == ["yes"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    packing.wait_for(torch.device("cuda", 0))
    assert waited == ["yes"]
