"""The package as it would run on a Sapphire Rapids: AMX's tiles computed in C++, the choices made for Intel.

The kernels alone run so under sanitizers (test_native_sanitizers.py); here they run through the ops.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cmake_tree
import pytest

from resnet_fused import environment
from resnet_fused.kernels import native

OPS = ["test_kernels_cpu.py", "test_kernels_cpu_head.py", "test_kernels_cpu_prologue.py", "test_block_ops.py"]
MODELS = ["test_fuse.py", "test_fuse_graph.py", "test_fuse_head.py", "test_nn.py", "test_plan.py", "test_replay.py"]
MODELS += ["test_fashion_mnist.py", "test_stages.py", "test_verify_explain.py", "test_whole.py"]


@pytest.fixture(scope="module")
def sapphire_rapids(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which Python finds the package with such kernels."""
    if not native.available():
        pytest.skip("the native library is not built")
    if "avx512_bf16" not in environment.instruction_sets()[1]:
        pytest.skip("this machine does not run avx512_bf16, which AMX's kernels use as well")
    options = ["-DRESNET_FUSED_EXTENSION=ON", "-DRESNET_FUSED_CUDA=0", "-DRESNET_FUSED_EMULATED_CPU=ON"]
    tree = cmake_tree.build("emulated-cpu", [*options, f"-DPython_EXECUTABLE={sys.executable}"])
    path = tmp_path_factory.mktemp("emulated")
    (path / "resnet_fused").mkdir()
    for folder in (cmake_tree.ROOT / "resnet_fused", tree / "resnet_fused"):
        for entry in folder.iterdir():
            if entry.suffix != ".so" or folder.is_relative_to(tree):
                (path / "resnet_fused" / entry.name).symlink_to(entry)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return {**inherited, "PYTHONPATH": str(path), "RESNET_FUSED_TEST_CPU": "sapphire_rapids"}


def run(environment: dict[str, str], *command: str) -> str:
    arguments = [sys.executable, *command]
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=cmake_tree.ROOT / "tests")
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_what_runs(sapphire_rapids: dict[str, str]) -> None:
    program = "from resnet_fused.kernels import native; print(native.LIBRARY_PATH, native.isa())"
    library, isa = run(sapphire_rapids, "-c", program).split()
    assert isa == "amx"
    assert Path(library).is_relative_to(sapphire_rapids["PYTHONPATH"])


def test_ops(sapphire_rapids: dict[str, str]) -> None:
    others = "not (portable or avx2 or avx512)"
    output = run(sapphire_rapids, "-m", "pytest", "-q", "-p", "no:cacheprovider", *OPS, "-k", others)
    assert " passed" in output and "skipped" not in output


@pytest.mark.thorough
def test_models(sapphire_rapids: dict[str, str]) -> None:
    run(sapphire_rapids, "-m", "pytest", "-q", "-p", "no:cacheprovider", *MODELS)
