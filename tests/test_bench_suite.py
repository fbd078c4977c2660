"""The whole comparison: what is measured, where it is written, what is left out and what goes on after a failure."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import report_samples
import suite
import torch
import typer
from typer.testing import CliRunner

from resnet_fused import environment, peers
from resnet_fused.errors import InputError

app = typer.Typer()
app.command()(suite.main)


@pytest.fixture
def small(tmp_path):
    models, blocks = ("resnet18", "resnet56_cifar"), ("densenet121",)
    return suite.Suite(models, blocks, (1,), ("fp32",), "cpu", 5.0, (), 9.0, tmp_path, False)


FAST = report_samples.MACHINE | {"copy_gb_s": 26.0}
"""Of which MACHINE has less than 0.8 in copy bandwidth."""


def current(model="resnet18"):
    """A result of this commit with these versions and as many threads."""
    now = {"commit": environment.commit(), "versions": environment.versions(), "threads": torch.get_num_threads()}
    return report_samples.with_peers(model) | now


@pytest.fixture
def measured(monkeypatch):
    """What `peers.run` and `peers.run_blocks` were asked for; nothing is measured."""
    asked = []

    def run(job, on_progress, only, limit):
        on_progress("taking turns", 0.5)
        asked.append((job.model, job.batch, job.dtypes, job.seconds, only, limit))
        return current(job.model)

    def run_blocks(job, on_progress, only, limit):
        asked.append(("blocks", job.model, job.batch, job.dtypes, job.seconds, only, limit))
        return current(job.model) | {"kind": "blocks", "rows": report_samples.blocks(job.model)["rows"]}

    monkeypatch.setattr(peers, "run", run)
    monkeypatch.setattr(peers, "run_blocks", run_blocks)
    return asked


def test_every_case_has_a_file(small, measured):
    assert suite.measure(small) == ([], False)
    first, second, third = measured
    assert first == ("resnet18", 1, ("fp32",), 5.0, (), 9.0)
    assert second[0] == "resnet56_cifar"
    assert third == ("blocks", "densenet121", 1, ("fp32",), 2.0, (), 9.0)
    files = sorted(str(path.relative_to(small.out)) for path in small.out.rglob("*.*"))
    assert files == [
        "blocks/densenet121-batch1-fp32.json",
        "peers/resnet18-batch1-fp32.json",
        "peers/resnet56_cifar-batch1-fp32.json",
    ]


def test_what_was_measured_is_left_out(small, measured, capsys):
    path = small.out / "peers" / "resnet18-batch1-fp32.json"
    report_samples.write(current(), path)
    suite.measure(small)
    assert [job[0] for job in measured] == ["resnet56_cifar", "blocks"]
    measured.clear()
    suite.measure(replace(small, again=True))
    assert [job[0] for job in measured] == ["resnet18", "resnet56_cifar", "blocks"]


@pytest.mark.parametrize(
    "change",
    [
        {"commit": "another"},
        {"versions": {"torch": "1.0"}},
        {"threads": 99},
        {"interrupted": True},
        {"schema": 99},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_results_are_measured_again(tmp_path, change):
    path = tmp_path / "result.json"
    assert not suite.done(path)
    report_samples.write(current(), path)
    assert suite.done(path)
    report_samples.write(current() | change, path)
    assert not suite.done(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"copy_gb_s": 26.0}, "copy 20 GB/s where the median of others is 26"),
        ({"matmul_tflop_s": {"fp32": 0.26}}, "fp32 matmul 0.2 TFLOP/s where the median of others is 0.26"),
        ({"copy_gb_s": 24.0, "matmul_tflop_s": {"fp32": 0.24}}, ""),
        ({"copy_gb_s": 26.0, "device_name": "another"}, ""),
        ({"copy_gb_s": 26.0, "threads": 4}, ""),
        ({"copy_gb_s": 26.0, "matmul_tflop_s": {"bf16": 2.0}}, ""),
    ],
    ids=str,
)
def test_a_case_of_a_disturbed_machine_is_not_done(tmp_path, capsys, change, words):
    path = report_samples.write(current(), tmp_path / "slow.json")
    assert suite.done(path), "alone, and on a machine as fast as its own"
    other = current() | {"machine": report_samples.MACHINE | change}
    report_samples.write(other, tmp_path / "other.json")
    (tmp_path / "broken.json").write_text('{"machine": {')
    assert suite.disturbed(path, current()) == words
    assert suite.done(path) == (not words)
    assert words in capsys.readouterr().out
    assert suite.done(tmp_path / "other.json"), "the faster one"


def test_the_reference_is_the_median(tmp_path):
    for name, rate in (("a", 20.0), ("b", 21.0), ("c", 30.0)):
        other = current() | {"machine": report_samples.MACHINE | {"copy_gb_s": rate}}
        report_samples.write(other, tmp_path / f"{name}.json")
    for rate, words in ((17.0, ""), (16.0, "copy 16 GB/s where the median of others is 21")):
        result = current() | {"machine": report_samples.MACHINE | {"copy_gb_s": rate}}
        assert suite.disturbed(tmp_path / "mine.json", result) == words


def test_blocks_of_a_disturbed_machine(small):
    ((job, path),) = small.blocks()
    report_samples.write(report_samples.blocks(job.model), path)
    report_samples.write(current() | {"machine": FAST}, small.out / "peers" / "another folder.json")
    assert suite.disturbances(small) == []
    report_samples.write(report_samples.blocks() | {"machine": FAST}, path.with_name("other.json"))
    assert suite.disturbances(small) == [
        "densenet121, batch 1, fp32, blocks: measured on a disturbed machine: "
        "copy 20 GB/s where the median of others is 26"
    ]


def test_a_disturbed_case_is_measured_once_a_call(small, measured, monkeypatch, capsys):
    machines = {"resnet18": report_samples.MACHINE, "resnet56_cifar": FAST}

    def run(job, *arguments):
        measured.append((job.model,))
        return current(job.model) | {"machine": machines[job.model]}

    monkeypatch.setattr(peers, "run", run)
    for expected in (["resnet18", "resnet56_cifar", "blocks"], ["resnet18"]):
        measured.clear()
        assert suite.measure(small) == ([], False), "it is no failure"
        assert [job[0] for job in measured] == expected
        assert suite.disturbances(small) == [
            "resnet18, batch 1, fp32: measured on a disturbed machine: copy 20 GB/s where the median of others is 26"
        ], "which the second case has shown"
    assert "  disturbed machine: copy 20 GB/s where the median of others is 26" in capsys.readouterr().out
    machines["resnet18"] = FAST
    suite.measure(small)
    measured.clear()
    suite.measure(small)
    assert measured == []
    assert suite.disturbances(small) == []


def test_a_case_that_fails_does_not_end_the_run(small, measured, monkeypatch):
    real = peers.run

    def run(job, *arguments):
        if job.model == "resnet18":
            raise RuntimeError("no memory")
        return real(job, *arguments)

    monkeypatch.setattr(peers, "run", run)
    failures, interrupted = suite.measure(small)
    assert failures == ["resnet18, batch 1, fp32: RuntimeError: no memory"]
    assert not interrupted
    assert [job[0] for job in measured] == ["resnet56_cifar", "blocks"]


def test_parity_that_does_not_hold_is_a_failure(small, monkeypatch, measured):
    broken = {"parity": {"ok": False, "reports": []}}
    monkeypatch.setattr(peers, "run", lambda job, *arguments: current(job.model) | broken)
    failures, _ = suite.measure(small)
    assert failures == [f"{model}, batch 1, fp32: parity does not hold" for model in small.models]


def test_an_interrupted_case_is_written_and_ends_the_run(small, monkeypatch, measured):
    monkeypatch.setattr(peers, "run", lambda job, *arguments: current(job.model) | {"interrupted": True})
    assert suite.measure(small) == ([], True)
    (path,) = small.out.rglob("*.json")
    assert json.loads(path.read_text())["interrupted"]
    assert not suite.done(path)


def test_termination_counts_as_ctrl_c(small, monkeypatch, measured):
    def run(job, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not reached")

    monkeypatch.setattr(peers, "run", run)
    assert suite.measure(small) == ([], True)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_folder_of_this_machine(tmp_path):
    new = suite.device_folder("cpu", tmp_path)
    assert new.parent == tmp_path
    assert new.name == new.name.lower()
    assert f"{torch.get_num_threads()}threads" in new.name
    mine = {
        "device_name": environment.device_name("cpu"),
        "isa": environment.instruction_sets()[0],
        "threads": torch.get_num_threads(),
    }
    report_samples.write(report_samples.main_job() | mine | {"threads": 99}, tmp_path / "a" / "main.json")
    report_samples.write([], tmp_path / "b" / "other.json")
    assert suite.device_folder("cpu", tmp_path) == new
    report_samples.write(report_samples.main_job() | mine, tmp_path / "mine" / "deep" / "main.json")
    assert suite.device_folder("cpu", tmp_path) == tmp_path / "mine"


def test_a_truncated_file_does_not_end_the_search_for_the_folder(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "cut.json").write_text('{"device_name": "some pro')
    mine = {
        "device_name": environment.device_name("cpu"),
        "isa": environment.instruction_sets()[0],
        "threads": torch.get_num_threads(),
    }
    report_samples.write(report_samples.main_job() | mine, tmp_path / "b" / "main.json")
    assert suite.device_folder("cpu", tmp_path) == tmp_path / "b"
    words = capsys.readouterr().err
    assert "cut.json must be a JSON file of a benchmark: Unterminated string" in words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--models", "resnet51"], ["model", "resnet50", "resnet51"]),
        (["--batches", "0"], ["batch", "1", "0"]),
        (["--batches", "many"], ["--batches", "whole numbers", "many"]),
        (["--dtypes", "fp8"], ["dtype", "bf16", "fp8"]),
        (["--device", "tpu"], ["device", "cuda", "tpu"]),
        (["--blocks", "resnet51"], ["model", "resnet50", "resnet51"]),
        (["--models", "resnet50/layer1.0"], ["--models", "--blocks", "resnet50/layer1.0"]),
        (["--only", "TensorFlow"], ["peers", "OpenVINO", "TensorFlow"]),
    ],
)
def test_bad_input_is_one_sentence(arguments, words, tmp_path):
    outcome = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert outcome.exit_code == 2, outcome.output
    assert len(outcome.stderr.strip().splitlines()) == 1
    assert all(word in outcome.stderr for word in words), outcome.stderr


def test_report_is_made_at_the_end(tmp_path, measured, monkeypatch):
    made = []
    monkeypatch.setattr(suite.pages, "write", lambda folder: made.append(folder) or folder / "report.html")
    arguments = ["--models", "resnet18", "--batches", "1,2", "--dtypes", "fp32,bf16", "--only", "OpenVINO"]
    outcome = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert outcome.exit_code == 0, outcome.output
    assert made == [tmp_path]
    assert [job[1:3] for job in measured[:4]] == [(b, (d,)) for b in (1, 2) for d in ("fp32", "bf16")]
    assert measured[0][4] == ("OpenVINO",)
    assert "1.09x, faster than the best peer" in outcome.stdout
    assert "disturbed" not in outcome.stdout


def test_disturbed_cases_are_listed_at_the_end(tmp_path, measured, monkeypatch):
    monkeypatch.setattr(suite.pages, "write", lambda folder: folder / "report.html")
    report_samples.write(current() | {"machine": FAST}, tmp_path / "peers" / "fast.json")
    arguments = ["--models", "resnet18", "--batches", "1", "--dtypes", "fp32", "--out", str(tmp_path)]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    *_, listed, advice, report = outcome.stdout.strip().splitlines()
    assert listed.startswith("resnet18, batch 1, fp32: measured on a disturbed machine: copy 20 GB/s")
    assert advice == "The same command measures these again."
    assert report.startswith("report: ")


@pytest.mark.parametrize(
    ("arguments", "models"),
    [
        (["--models", "resnet18,resnet50"], ["resnet50"]),
        (["--models", "resnet18"], []),
        (["--models", "resnet50", "--blocks", ""], []),
        (["--models", "resnet18", "--blocks", "densenet121,resnet18"], ["densenet121", "resnet18"]),
        (["--full"], list(suite.FULL_MODELS)),
    ],
)
def test_whose_blocks_are_measured(arguments, models, tmp_path, measured, monkeypatch):
    monkeypatch.setattr(suite.pages, "write", lambda folder: folder)
    monkeypatch.setattr(suite, "FULL_BATCHES", (1,))
    options = ["--batches", "1", "--dtypes", "fp32", "--out", str(tmp_path)]
    outcome = CliRunner().invoke(app, [*arguments, *options])
    assert outcome.exit_code == 0, outcome.output
    assert [job[1] for job in measured if job[0] == "blocks"] == models


def test_no_report_is_a_failure_in_words(tmp_path, measured, monkeypatch):
    def refuse(folder: Path):
        raise InputError("a file is of schema version 9")

    monkeypatch.setattr(suite.pages, "write", refuse)
    outcome = CliRunner().invoke(app, ["--models", "resnet18", "--batches", "1", "--out", str(tmp_path)])
    assert outcome.exit_code == 1
    assert "no report: a file is of schema version 9" in outcome.stdout
