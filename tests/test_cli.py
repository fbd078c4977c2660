"""The command line, end to end and on bad input."""

import json
import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from resnet_fused import __version__
from resnet_fused.cli import app

run = CliRunner().invoke


def test_bench_end_to_end(tmp_path):
    paths = {"--json": tmp_path / "out.json", "--plot": tmp_path / "out.png"}
    arguments = ["bench", "resnet18", "--batch", "1", "--dtype", "bf16", "--seconds", "0.2"]
    outcome = run(app, [*arguments, *(str(part) for pair in paths.items() for part in pair)])
    assert outcome.exit_code == 0, outcome.output
    assert "speed-up" in outcome.stdout
    assert "reused" in outcome.stdout
    steps = ["parity, bf16 strict", *(f"timing, bf16, {memory} memory" for memory in ("default", "reused"))]
    steps += [*(f"memory, bf16 {name}" for name in ("eager", "eager channels_last", "fused")), "done"]
    shown = [line.strip().partition("% ") for line in outcome.stderr.splitlines()]
    assert [step for _, _, step in shown] == steps, "without a terminal: one line a step"
    assert [int(share) for share, _, _ in shown] == sorted(int(share) for share, _, _ in shown)

    result = json.loads(paths["--json"].read_text())
    assert (result["device"], result["model"], result["dtype"], result["batch"]) == ("cpu", "resnet18", "bf16", 1)
    assert result["versions"]["resnet_fused"] == __version__
    assert result["parity"]["ok"] is True
    assert [(row["name"], row["memory"]) for row in result["rows"]] == [
        (name, memory) for memory in ("default", "reused") for name in ("eager", "eager channels_last", "fused")
    ]
    for row in result["rows"]:
        assert len(row["ms_samples"]) >= 5
        assert row["images_per_s"] == pytest.approx(1e3 / row["ms_median"])
        if row["memory"] == "default":
            assert row["peak_extra_mb"] >= 0
    assert paths["--plot"].read_bytes().startswith(b"\x89PNG")


def test_verify():
    outcome = run(app, ["verify", "resnet18", "--batch", "1"])
    assert outcome.exit_code == 0, outcome.output


def test_explain():
    outcome = run(app, ["explain", "resnet18", "--batch", "1", "--backend", "reference"])
    assert outcome.exit_code == 0, outcome.output
    assert "reference" in outcome.stdout


def test_env():
    outcome = run(app, ["env", "--kernels"])
    assert outcome.exit_code == 0, outcome.output
    for word in (__version__, "native library", "threads", "instruction set"):
        assert word in outcome.stdout


def test_version():
    assert run(app, ["--version"]).stdout.strip() == __version__


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "resnet51"], ["model", "resnet50", "resnet51"]),
        (["bench", "--dtype", "fp8"], ["dtype", "bf16", "fp8"]),
        (["bench", "--device", "tpu"], ["device", "cpu", "tpu"]),
        (["bench", "--accuracy", "sloppy"], ["accuracy", "fast", "sloppy"]),
        (["bench", "--batch", "0"], ["batch", "1", "0"]),
        (["bench", "--seconds", "-1"], ["seconds", "at least 0", "-1"]),
        (["bench", "--seconds", "nan"], ["seconds", "at least 0", "nan"]),
        (["bench", "--json", "/nowhere/out.json"], ["--json", "/nowhere/out.json"]),
        (["bench", "--json", "/"], ["--json", "'/'"]),
        (["bench", "--plot", "/nowhere/out.png"], ["--plot", "/nowhere/out.png"]),
        (["bench", "--plot", "out.bmp"], ["--plot", ".png", "out.bmp"]),
        (["verify", "--backend", "tensorrt"], ["backend", "vendor", "tensorrt"]),
        (["verify", "resnet51"], ["model", "resnet50", "resnet51"]),
        (["explain", "--accuracy", "sloppy"], ["accuracy", "fast", "sloppy"]),
        (["explain", "--dtype", "fp8"], ["dtype", "bf16", "fp8"]),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, words):
    outcome = run(app, arguments)
    assert outcome.exit_code == 2
    assert outcome.stdout == ""
    assert len(outcome.stderr.strip().splitlines()) == 1
    assert all(word in outcome.stderr for word in words), outcome.stderr


def test_a_worker_that_dies_is_one_sentence_and_exit_code_1(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -KILL $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    arguments = ["bench", "resnet20_cifar", "--batch", "1", "--dtype", "bf16", "--json", str(tmp_path / "a.json")]
    outcome = run(app, arguments)
    assert outcome.exit_code == 1
    assert outcome.stdout == ""
    *steps, error = outcome.stderr.splitlines()
    assert error == "error: benchmark worker 'time' was ended by SIGKILL, perhaps for want of memory"
    assert not any("Traceback" in line for line in steps)
    assert not (tmp_path / "a.json").exists()


def test_output_paths_are_checked_without_touching_them(tmp_path):
    existing = tmp_path / "old.json"
    existing.write_text("old")
    outcome = run(app, ["bench", "--json", str(existing), "--plot", str(tmp_path / "missing" / "plot.png")])
    assert outcome.exit_code == 2
    assert existing.read_text() == "old"
    assert list(tmp_path.iterdir()) == [existing]


def test_installed_command():
    command = [sys.executable, "-m", "resnet_fused", "env"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr


def numbers(text):
    """The words of a text that are a number with a point or comma."""
    return sorted(word for word in re.split(r"[\s│┃]+", text) if re.search(r"\d[.,]\d", word))


def test_numbers_stay_whole_in_a_narrow_terminal():
    command = [sys.executable, "-m", "resnet_fused", "info", "densenet121"]
    shown = {}
    for width in ("30", "200", None):
        environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
        environment |= {"COLUMNS": width} if width else {}
        outcome = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        shown[width] = outcome.stdout
    assert "…" not in "".join(shown.values())
    assert numbers(shown["30"]) == numbers(shown["200"])
    assert shown[None] == shown["200"], "into a pipe: as wide as it needs"
