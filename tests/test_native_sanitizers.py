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


# A processor and the instruction set that it runs: what the kernels do differs with both. AVX2 differs from others in
# the width of a vector only, and not with the processor.
RUNS = [
    pytest.param("zen4", "portable"),
    pytest.param("zen4", "avx2", marks=pytest.mark.thorough),
    pytest.param("zen4", "avx512"),
    pytest.param("zen4", "avx512_bf16"),
    pytest.param("sapphire_rapids", "avx512"),
    pytest.param("sapphire_rapids", "amx"),
]


@pytest.mark.parametrize(("cpu", "name"), RUNS)
def test_sanitized(cpu: str, name: str, request: pytest.FixtureRequest) -> None:
    """On either processor, whichever this machine has; AMX's tiles are computed in C++."""
    needed = "avx512_bf16" if name == "amx" else name
    if native.available() and needed not in environment.instruction_sets()[1]:
        pytest.skip(f"this machine does not run {needed}")
    tree = build(
        "sanitized",
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
        "-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1 -g1",  # -O2 takes minutes to compile the kernels
        "-DRESNET_FUSED_SANITIZE=address,undefined",
        "-DRESNET_FUSED_EMULATED_CPU=ON",
    )
    cases = "20" if request.config.getoption("--thorough") else "4"
    # Fresh memory is filled with NaN, so that workspaces start out as such in every thread.
    asan = "max_malloc_fill_size=1000000000:malloc_fill_byte=255"
    run(tree, "--cases", cases, name, ASAN_OPTIONS=asan, RESNET_FUSED_TEST_CPU=cpu)


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
