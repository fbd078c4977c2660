"""The package where its native library is missing, broken, or asked for an instruction set that is not there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import resnet_fused
from resnet_fused import environment
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


def run(folder: Path) -> list[str]:
    """What the package in `folder` prints: parity, backends, warnings, the reason."""
    command = [sys.executable, "-c", CODE]
    env = {**os.environ, "PYTHONPATH": str(folder)}
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
@pytest.mark.parametrize("call", ["rf.fuse(model)(x)", "rf.ops.head(x, x.mean((2, 3)), backend='vendor')"])
def test_unknown_instruction_set(call: str) -> None:
    code = f"""
import torch, warnings
warnings.simplefilter("error")
import resnet_fused as rf
model, x = rf.models.resnet20_cifar().eval(), torch.randn(1, 3, 32, 32)
for _ in range(2):
    try:
        {call}
    except rf.errors.InputError as error:
        print(error)
"""
    env = {**os.environ, "RESNET_FUSED_CPU_ISA": "foo"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    names = ", ".join(map(repr, environment.instruction_sets()[1]))
    assert done.stdout == f"RESNET_FUSED_CPU_ISA must be one of {names}, got 'foo'\n" * 2


@pytest.mark.skipif(not native.available(), reason="the native library is not built")
def test_env_with_an_unknown_instruction_set() -> None:
    env = {**os.environ, "RESNET_FUSED_CPU_ISA": "foo"}
    command = [sys.executable, "-m", "resnet_fused", "env"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: RESNET_FUSED_CPU_ISA must be one of ")
    assert done.stderr.count("\n") == 1
