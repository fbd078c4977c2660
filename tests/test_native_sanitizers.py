"""The CPU kernels as a plain executable (tests/native), as shipped and under AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ISAS = ["portable", "avx2", "avx512", "avx512_bf16", "amx"]

pytestmark = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("ninja") and shutil.which(os.environ.get("CXX", "c++"))),
    reason="needs cmake, ninja and a C++ compiler",
)


def build(name: str, *options: str) -> Path:
    """The build tree of one variant; kept in build/, so that a second run compiles only what changed."""
    tree = ROOT / "build" / f"native-{name}"
    flags = ["-DRESNET_FUSED_EXTENSION=OFF", "-DRESNET_FUSED_NATIVE_TESTS=ON", *options]
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(tree), "-G", "Ninja", *flags],
        ["cmake", "--build", str(tree), "-j", jobs],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    return tree


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


def test_sanitized() -> None:
    tree = build(
        "sanitized",
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
        "-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O2 -g1",
        "-DRESNET_FUSED_SANITIZE=address,undefined",
    )
    # Fresh memory is filled with NaN, so that workspaces start out as such in every thread.
    run(tree, "--cases", "20", ASAN_OPTIONS="max_malloc_fill_size=1000000000:malloc_fill_byte=255")


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
