"""The CPU kernels as a plain executable (tests/native), as shipped and under sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import cmake_tree
import pytest

from resnet_fused import environment
from resnet_fused.kernels import native

ISAS = ["portable", "avx2", "avx512", "avx512_bf16", "amx"]

pytestmark = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("ninja") and shutil.which(os.environ.get("CXX", "c++"))),
    reason="needs cmake, ninja and a C++ compiler",
)


def build(name: str, *options: str) -> Path:
    return cmake_tree.build(f"native-{name}", ["-DRESNET_FUSED_NATIVE_TESTS=ON", *options])


def run(tree: Path, *arguments: str, **environment: str) -> None:
    result = subprocess.run(
        [str(tree / "native_tests"), *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("0 failed\n")


@pytest.fixture(scope="module")
def plain() -> Path:
    return build("plain")


def test_as_shipped(plain: Path) -> None:
    run(plain, "--cases", "60")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.thorough] if n == "avx2" else []) for n in ISAS])
def test_sanitized(name: str, request: pytest.FixtureRequest) -> None:
    """AVX2 differs from others in the width of a vector only."""
    if native.available() and name not in environment.instruction_sets()[1]:
        pytest.skip(f"this machine does not run {name}")
    tree = build(
        "sanitized",
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
        "-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1 -g1",  # -O2 takes minutes to compile the kernels
        "-DRESNET_FUSED_SANITIZE=address,undefined",
    )
    cases = "20" if request.config.getoption("--thorough") else "4"
    # Fresh memory is filled with NaN, so that workspaces start out as such in every thread.
    run(tree, "--cases", cases, name, ASAN_OPTIONS="max_malloc_fill_size=1000000000:malloc_fill_byte=255")


def test_threads_sanitized() -> None:
    tree = build(
        "threads",
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
        "-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1 -g1",
        "-DRESNET_FUSED_SANITIZE=thread",
    )
    run(tree, "--no-blocks", TSAN_OPTIONS="halt_on_error=1")


@pytest.mark.parametrize("name", ISAS)
def test_kernels_export_one_symbol(plain: Path, name: str) -> None:
    """A function that other files define too, compiled with these flags, could be the one the linker takes for all."""
    objects = list(plain.rglob(f"kernels_{name}.cpp.o"))
    if not objects:
        pytest.skip(f"this machine has no {name} kernels")
    command = ["nm", "--defined-only", "-g", "-C", str(objects[0])]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    symbols = [line.split(maxsplit=2)[2] for line in output.splitlines()]
    assert symbols == [f"resnet_fused::cpu::kernels_{name}()"]
