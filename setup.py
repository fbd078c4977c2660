"""Builds the native code through CMake; CMakeLists.txt holds the sources and flags, pyproject.toml the rest.

RESNET_FUSED_NATIVE=0 installs pure Python, =1 makes a missing compiler an error; unset, a machine without a compiler
gets pure Python and is told so, and everything else that goes wrong is an error. RESNET_FUSED_CUDA does the same for
the CUDA kernels and nvcc, which is looked for in CUDA_HOME, PATH, /usr/local/cuda and site-packages; no GPU is needed.
CXX, MAX_JOBS and TORCH_CUDA_ARCH_LIST work as usual.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

from build_backend import TORCH, find_torch

ROOT = Path(__file__).resolve().parent


def why_not_native() -> str:
    """Why the native kernels will not be built; empty if they will."""
    choice = os.environ.get("RESNET_FUSED_NATIVE", "")
    if choice == "0":
        return "RESNET_FUSED_NATIVE=0"
    compiler = os.environ.get("CXX")
    if not sys.platform.startswith("linux"):
        reason = f"they are built on Linux only, this is {sys.platform}"
    elif not any(shutil.which(c) for c in (compiler.split()[:1] if compiler else ["c++", "g++", "clang++"])):
        reason = f"no C++ compiler found ({f'CXX={compiler}' if compiler else 'c++, g++, clang++'})"
    else:
        return ""
    if choice == "1" or compiler:
        raise SystemExit(f"resnet_fused: cannot build the native kernels: {reason}")
    return reason


def cuda_choice() -> str:
    """RESNET_FUSED_CUDA: "0", "1" or "" (as far as there is a toolkit)."""
    choice = os.environ.get("RESNET_FUSED_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"resnet_fused: RESNET_FUSED_CUDA must be 0, 1 or unset, got {choice!r}")
    return choice


class CMakeBuild(build_ext):
    """Runs CMake once for all extensions and puts what it built where setuptools expects it."""

    def build_extensions(self) -> None:
        """Configures and builds; the tree in build/ is kept, so that a second build is incremental."""
        torch = find_torch()
        if torch is None:
            raise SystemExit(
                f"resnet_fused: the native kernels need {TORCH} to build; RESNET_FUSED_NATIVE=0 skips them"
            )
        tree = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        configure = [
            "cmake",
            *("-S", str(ROOT), "-B", str(tree), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DTORCH_ROOT={torch}",
            f"-DRESNET_FUSED_OUTPUT_DIR={tree / 'lib'}",
            f"-DRESNET_FUSED_CUDA={cuda_choice()}",
        ]
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(tree), "-j", jobs], check=True)
        except FileNotFoundError as error:
            raise SystemExit("resnet_fused: the native kernels need cmake and ninja to build") from error
        except subprocess.CalledProcessError as error:
            raise SystemExit("resnet_fused: building the native kernels failed (output above)") from error
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(tree / "lib" / target.name), str(target))

    def get_ext_filename(self, fullname: str) -> str:
        """_native.so is a plain shared library: no Python in it, and no Python version in its name."""
        if fullname.rpartition(".")[2] == "_native":
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)


class AnyPythonWheel(bdist_wheel):
    """One wheel for every Python 3: `_bindings.*.so` serves the one that builds it, `_bindings.py` all others."""

    def get_tag(self) -> tuple[str, str, str]:
        """`py3-none` and the platform, `any` without native code."""
        return ("py3", "none", super().get_tag()[2])


reason = why_not_native()
if reason:
    print(
        f"resnet_fused: installing without the native CPU kernels: {reason}. "
        "Everything works through PyTorch's own operators, slower.",
        file=sys.stderr,
    )
setup(
    ext_modules=[] if reason else [Extension("resnet_fused._native", []), Extension("resnet_fused._bindings", [])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
)
