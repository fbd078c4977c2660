"""The package where its native library is missing, broken, or asked for an instruction set that is not there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import resnet_fused
from resnet_fused.kernels import native

CODE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import resnet_fused as rf
import torch
torch.manual_seed(0)
model = rf.models.resnet20_cifar().eval()
fast = rf.fuse(model)
print(rf.verify(model, fast, torch.randn(1, 3, 32, 32)).ok)
print({row.backend for row in rf.explain(fast, torch.randn(1, 3, 32, 32)).rows})
print([str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)])
print(rf.kernels.native.reason())
"""


def run(folder: Path, **environment: str) -> list[str]:
    """What the package in `folder` prints: parity, backends, warnings, the reason."""
    command = [sys.executable, "-c", CODE]
    env = {**os.environ, "PYTHONPATH": str(folder), **environment}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The package's Python files alone, in a folder of their own."""
    source = Path(resnet_fused.__file__).parent
    shutil.copytree(source, tmp_path / "resnet_fused", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    return tmp_path


def test_missing(copied: Path) -> None:
    parity, backends, warned, reason = run(copied)
    assert (parity, backends, warned) == ("True", "{'vendor'}", "[]")
    assert "installed without its native library" in reason


def test_broken(copied: Path) -> None:
    (copied / "resnet_fused" / "_native.so").write_bytes(b"not a library")
    parity, backends, warned, reason = run(copied)
    assert (parity, backends) == ("True", "{'vendor'}")
    assert "_native.so does not load" in reason and reason in warned


@pytest.mark.skipif(not native.available(), reason="the native library is not built")
def test_unknown_instruction_set() -> None:
    parity, backends, warned, reason = run(Path(resnet_fused.__file__).parent.parent, RESNET_FUSED_CPU_ISA="foo")
    assert (parity, backends) == ("True", "{'vendor'}")
    assert "RESNET_FUSED_CPU_ISA cannot be used" in reason and "foo" in reason and reason in warned
