"""Energy that the device has used: NVML's counter on a GPU, RAPL's on a CPU, where they can be read."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

from .. import nvml

POWERCAP = Path("/sys/class/powercap")

Meter = Callable[[], float]  # joules since some moment in the past


def meter(device: str) -> Meter | None:
    """The counter of a device, None where it has none that this user may read."""
    return gpu_meter() if device == "cuda" else cpu_meter()


def cpu_meter() -> Meter | None:
    """The sum over the processor packages; the machine's whole load counts.

    A counter wraps around after minutes to hours: a difference is taken modulo its range.
    """
    counters = [folder for folder in sorted(POWERCAP.glob("intel-rapl:*")) if folder.name.count(":") == 1]
    try:
        ranges = [int((folder / "max_energy_range_uj").read_text()) for folder in counters]
        last = [int((folder / "energy_uj").read_text()) for folder in counters]
    except (OSError, ValueError):
        return None
    if not counters:
        return None
    total = 0

    def read() -> float:
        nonlocal total
        for i, folder in enumerate(counters):
            now = int((folder / "energy_uj").read_text())
            total += (now - last[i]) % ranges[i]
            last[i] = now
        return total / 1e6

    return read


def gpu_meter() -> Meter | None:
    """NVML's count for torch's current GPU, which GPUs since Volta keep in millijoules."""
    gpu = nvml.current_gpu()
    if gpu is None:
        return None
    library, handle = gpu
    millijoules = ctypes.c_ulonglong()

    def read() -> float:
        if status := library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
            raise OSError(f"NVML gives no energy, status {status}")
        return millijoules.value / 1e3

    try:
        read()
    except OSError:
        return None
    return read
