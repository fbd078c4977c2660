"""NVML, the library of NVIDIA's driver that tells what a GPU does."""

from __future__ import annotations

import ctypes

import torch

SM_CLOCK, MEMORY_CLOCK = 1, 2  # NVML_CLOCK_SM, NVML_CLOCK_MEM


def current_gpu() -> tuple[ctypes.CDLL, ctypes.c_void_p] | None:
    """The library and its handle of torch's current GPU; None where there is no NVML or it does not know the GPU."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle = ctypes.c_void_p()
    uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)):
        return None
    return library, handle


def clock_mhz(kind: int) -> int | None:
    """The present clock of torch's current GPU, `SM_CLOCK` or `MEMORY_CLOCK`, in MHz; None where it is not told."""
    gpu = current_gpu()
    if gpu is None:
        return None
    library, handle = gpu
    mhz = ctypes.c_uint()
    return None if library.nvmlDeviceGetClockInfo(handle, kind, ctypes.byref(mhz)) else mhz.value
