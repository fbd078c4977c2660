"""The Triton kernels compiled for GPUs that are not there: no spills, matrix instructions, wide loads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent


def lines(script, *options):
    """What a script prints. It needs a process without TRITON_INTERPRET, where Triton compiles."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, FOLDER / script, *options]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("share", ["3", pytest.param("1", marks=pytest.mark.thorough)])
def test_kernels_compile_as_they_should(share):
    found = lines("aot_jobs.py", "--every", share)
    assert {line["capability"] for line in found} == {80, 90, 100}
    assert [(line["job"], line["config"], line["kernel"], line["problems"]) for line in found if line["problems"]] == []


def test_faults_are_found():
    found = {line["kernel"]: " ".join(line["problems"]) for line in lines("aot_faults.py")}
    assert found.pop("sound") == ""
    assert found.pop("no product") == ""
    assert "local loads and stores" in found["spills"]
    assert "bytes of shared memory, the GPU has 232448" in found["too much shared memory"]
    assert "no TMA and no 128-bit load" in found["narrow loads"]
    assert "no HGMMA instruction" in found["too small for wgmma"]
