"""Builds of the native code that tests make, one tree at a time."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build(name: str, options: Sequence[str], target: str = "all") -> Path:
    """The tree build/`name`, kept, so that a second run compiles only what changed; without torch unless asked for.

    Safe between test processes that want the same tree.
    """
    tree = ROOT / "build" / name
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    tree.mkdir(parents=True, exist_ok=True)
    with open(tree / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            ["cmake", "-S", str(ROOT), "-B", str(tree), "-G", "Ninja", "-DRESNET_FUSED_EXTENSION=OFF", *options],
            ["cmake", "--build", str(tree), "-j", jobs, "--target", target],
        ):
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, result.stdout + result.stderr
    return tree
