"""Kernels that take their process with them, with stand-ins: a process that dies, one that hangs."""

import subprocess
import sys

import pytest

from resnet_fused import environment
from resnet_fused.attempts import Attempts, unended
from resnet_fused.errors import BackendError

DIES = """
import os, sys
from pathlib import Path
import torch
from resnet_fused.attempts import Attempts
attempts = Attempts(Path(sys.argv[1]), seconds=2)
with attempts.attempt("first"):
    pass
for name in ("second", "third"):
    try:
        with attempts.attempt(name):
            {does}
    except Exception as problem:
        print(name, problem)
"""


@pytest.mark.parametrize("does", ["os.abort()", "import time; time.sleep(60)"])
def test_what_took_its_process_with_it_is_left_out(tmp_path, does):
    file = tmp_path / "attempts"
    command = [sys.executable, "-c", DIES.format(does=does), str(file)]
    for lost in ("second", "third"):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode != 0
        assert [name.split(",")[0] for name in sorted(unended(file))][-1] == lost
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    says = f"an earlier process hung or died in it; to try it again, delete {file}"
    assert done.stdout.splitlines() == [f"second {says}", f"third {says}"]
    assert ("sleep" in does) == ("Timeout" in file.with_suffix(".trace").read_text())


def test_attempts_that_fail_or_are_interrupted_have_ended(tmp_path):
    attempts = Attempts(tmp_path / "attempts")
    for problem in (ValueError, KeyboardInterrupt):
        with pytest.raises(problem), attempts.attempt("it"):
            raise problem
        assert not unended(tmp_path / "attempts")
    assert not Attempts(tmp_path / "attempts").fatal
    with Attempts().attempt("nothing is kept of it"):
        pass


def test_attempts_of_other_versions_do_not_count(tmp_path, monkeypatch):
    file = tmp_path / "attempts"
    subprocess.run([sys.executable, "-c", DIES.format(does="os.abort()"), str(file)], capture_output=True, check=False)
    (line,) = [line for line in file.read_text().splitlines() if "second" in line]
    monkeypatch.setattr(environment, "versions", lambda: {"triton": "9"})
    with Attempts(file).attempt("second"):
        pass
    assert line in file.read_text()


def test_a_lost_gpu_leaves_its_attempt_open(tmp_path, monkeypatch):
    def lost(culprit):
        raise BackendError(f"the GPU is lost to this process after {culprit}")

    monkeypatch.setattr("resnet_fused.attempts.check_gpu", lost)
    attempts = Attempts(tmp_path / "attempts")
    with pytest.raises(BackendError, match="lost to this process after gemm"), attempts.attempt("gemm"):
        raise RuntimeError("illegal access")
    assert len(Attempts(tmp_path / "attempts").fatal) == 1
