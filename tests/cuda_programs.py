"""Executables of chosen CUDA kernels in CPU execution: under sanitizers, and with bugs planted in their headers."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cuda_emulated import ROOT

CXX = os.environ.get("CXX", "c++")
FLAGS = ("-std=c++17", "-O1", "-w")


@dataclass(frozen=True)
class Bug:
    """In a header of csrc/cuda, `old` (which is there once) becomes `new`.

    Attributes:
        sanitizer: the one that sees it where numbers do not: an access out of bounds or a race that execution on the
            CPU happens to win.
    """

    header: str
    old: str
    new: str
    sanitizer: str = ""


@functools.cache
def headers() -> str:
    """The folder of CUDA's headers."""
    with tempfile.NamedTemporaryFile("w", suffix=".cmake") as script:
        toolkit = ROOT / "csrc/cuda/toolkit.cmake"
        script.write(f'set(Python_EXECUTABLE {sys.executable})\ninclude({toolkit})\nmessage("${{CUDA_INCLUDE}}")\n')
        script.flush()
        result = subprocess.run(["cmake", "-P", script.name], capture_output=True, text=True, check=True)
    return result.stderr.strip()


def compiled(source: Path, output: Path, sanitizer: str, first: Sequence[str] = ()) -> Path:
    """An object file of a source; `first` are flags that go before the project's own include folders."""
    if not output.exists():
        includes = [*first, f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/cuda'}", "-isystem", headers()]
        sanitize = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-g1"] if sanitizer else []
        command = [CXX, *FLAGS, *includes, *sanitize, "-x", "c++", "-c", str(source), "-o", str(output)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    return output


def program(
    folder: Path, test: str, kernels: str, defines: Sequence[str] = (), sanitizer: str = "", bug: Bug | None = None
) -> Path:
    """An executable of the cases in tests/cuda/`test` on the kernels that tests/cuda/`kernels` instantiates.

    Args:
        folder: for its objects, of which those without a bug are used again.
        test: a test_*.cpp.
        kernels: a .cu file.
        defines: macros for `kernels`.
        sanitizer: `-fsanitize` of all of it.
        bug: planted into the kernels' headers.
    """
    suffix = re.sub(r"\W", "_", sanitizer) + ".o"
    common = [ROOT / "tests/cuda" / test, ROOT / "csrc/cuda/registry.cpp"]
    objects = [compiled(source, folder / f"{source.stem}_{suffix}", sanitizer) for source in common]
    flags = [f"-D{name}" for name in defines]
    target = folder / "_".join([Path(kernels).stem, *defines])
    if bug:
        target = folder / "bug"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(ROOT / "csrc/cuda", target / "cuda")
        header = target / "cuda" / bug.header
        text = header.read_text()
        assert text.count(bug.old) == 1, f"{bug.header} has {text.count(bug.old)} times: {bug.old}"
        header.write_text(text.replace(bug.old, bug.new))
        flags.append(f"-I{target}")
    target.mkdir(exist_ok=True)
    objects.append(compiled(ROOT / "tests/cuda" / kernels, target / suffix, sanitizer, flags))
    output = target / f"program_{suffix[:-2]}"
    sanitize = [f"-fsanitize={sanitizer}"] if sanitizer else []
    subprocess.run([CXX, *map(str, objects), "-pthread", *sanitize, "-o", str(output)], check=True)
    return output


def run(executable: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a test executable; see tests/cuda/emulator.h for the environment."""
    variables = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", **environment}
    return subprocess.run(
        [str(executable), *arguments], capture_output=True, text=True, env=variables, timeout=600, errors="replace"
    )


def assert_passes(result: subprocess.CompletedProcess[str]) -> None:
    """The executable has run cases, and none failed."""
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith(" passed, 0 failed\n")
    assert not result.stdout.startswith("0 passed")
