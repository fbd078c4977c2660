"""Every bug planted in the Triton kernels is noticed by a check; see triton_mutants.py."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


SCRIPT = Path(__file__).parent / "triton_mutants.py"


@functools.cache
def bugs():
    listed = subprocess.run([sys.executable, SCRIPT, "--list"], capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


def test_there_are_bugs_in_every_kernel():
    assert len(bugs()) >= 25
    assert len({bug.partition(":")[0] for bug in bugs()}) >= 8


def pytest_generate_tests(metafunc):
    if "bug" in metafunc.fixturenames:
        metafunc.parametrize("bug", bugs())


def test_planted_bugs(bug):
    run = subprocess.run([sys.executable, SCRIPT, bug], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (result,) = (json.loads(line) for line in run.stdout.splitlines())
    assert result["caught"]
