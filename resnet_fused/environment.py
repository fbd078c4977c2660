"""What this machine and this installation are: for `resnet-fused env` and for every benchmark result."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from . import nvml
from ._version import __version__
from .kernels import cuda, native

LIBRARIES = ("torchvision", "transformers", "triton")
PEERS = (
    *("onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "openvino", "jax", "jaxlib"),
    *("nvidia-cudnn-frontend", "tensorrt", "torch-tensorrt"),
)


CPUINFO = Path("/proc/cpuinfo")
CPUFREQ = Path("/sys/devices/system/cpu")


def device_name(device: str) -> str:
    """The processor's or GPU's own name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def clocks(device: str) -> dict[str, Any] | None:
    """The present clocks in MHz, None where the system does not tell them.

    Args:
        device: `"cpu"` for `cores_mhz`, a list with a number for each core; `"cuda"` for `sm_mhz` and `memory_mhz` of
            torch's current GPU, without the one that it does not tell.
    """
    if device == "cpu":
        cores = _core_clocks()
        return {"cores_mhz": cores} if cores else None
    told = {"sm_mhz": nvml.clock_mhz(nvml.SM_CLOCK), "memory_mhz": nvml.clock_mhz(nvml.MEMORY_CLOCK)}
    return {name: mhz for name, mhz in told.items() if mhz is not None} or None


def _core_clocks() -> list[float]:
    """MHz of every core: what Linux measures on x86, else what the frequency driver has set."""
    try:
        measured = re.findall(r"^cpu MHz\s*: ([\d.]+)$", CPUINFO.read_text(), re.MULTILINE)
        if measured:
            return [float(mhz) for mhz in measured]
        return [int(path.read_text()) / 1e3 for path in CPUFREQ.glob("cpu[0-9]*/cpufreq/scaling_cur_freq")]
    except OSError:
        return []


def commit() -> str | None:
    """The git commit of the checkout that this package runs from; None for an installed copy."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def versions() -> dict[str, str]:
    """Versions of the package, of Python and of the libraries that take part, by distribution name."""
    found = {"resnet_fused": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in (*LIBRARIES, *PEERS):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def instruction_sets() -> tuple[str, list[str]]:
    """The CPU instruction set in use (`"none"` without the native library) and all that can run here."""
    return native.isa(), list(native.bindings.isas()) if native.bindings is not None else []


def conditions(device: str) -> dict[str, Any]:
    """On what a measurement is made, with what, and when: fields of its result.

    Args:
        device: `"cpu"` or `"cuda"`.
    """
    return {
        "device": device,
        "device_name": device_name(device),
        "isa": native.isa(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def kernel_table() -> list[dict[str, object]]:
    """The compiled kernels, one mapping each; empty without the native library."""
    return list(native.bindings.kernel_table()) if native.bindings is not None else []


def cuda_kernel_table() -> list[dict[str, object]]:
    """The compiled CUDA kernels, one mapping each; registers and occupancy are None where no GPU tells them."""
    return list(native.bindings.cuda_kernel_table()) if native.bindings is not None and cuda.built() is None else []
