"""The emulator that executes CUDA kernels on the CPU (tests/cuda/emulator.h): its self-test, also under sanitizers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import cuda_emulated
import pytest

pytestmark = cuda_emulated.needs_toolkit


def run(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(tree / "test_emulator"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_as_it_is() -> None:
    """Right numbers in every order of warps and timing of copies; every planted fault is caught."""
    result = run(cuda_emulated.build("plain", "test_emulator", "-O1"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith(" 0 failed\n")


@pytest.mark.thorough
def test_address_sanitizer() -> None:
    tree = cuda_emulated.build("address", "test_emulator", "-O1 -g1", "address,undefined")
    # A launch that a violation ends abandons its threads with what they own.
    result = run(tree, ASAN_OPTIONS="detect_leaks=0")
    assert result.returncode == 0, result.stdout + result.stderr
    overrun = run(tree, "overrun", ASAN_OPTIONS="detect_leaks=0")
    assert overrun.returncode != 0
    assert "AddressSanitizer" in overrun.stderr


@pytest.mark.thorough
def test_thread_sanitizer() -> None:
    tree = cuda_emulated.build("thread", "test_emulator", "-O1 -g1", "thread")
    race = run(tree, "race")
    assert race.returncode != 0
    assert "data race" in race.stderr
    correct = run(tree, "correct")
    assert correct.returncode == 0, correct.stdout + correct.stderr


def test_options_that_do_not_exist() -> None:
    tree = cuda_emulated.build("plain", "test_emulator", "-O1")
    result = run(tree, EMULATOR_ORDER="sideways")
    assert result.returncode != 0
    assert "expected forward, reverse or random, got sideways" in result.stderr


@pytest.mark.parametrize("seed", ["2", "3"])
def test_seeds(seed: str) -> None:
    tree = cuda_emulated.build("plain", "test_emulator", "-O1")
    result = run(tree, EMULATOR_SEED=seed)
    assert result.returncode == 0, result.stdout + result.stderr
