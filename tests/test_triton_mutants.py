"""Every bug planted in the Triton kernels is noticed by a check; see triton_mutants.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_every_planted_bug_is_caught():
    script = Path(__file__).parent / "triton_mutants.py"
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(results) >= 25
    assert [result for result in results if not result["caught"]] == []
