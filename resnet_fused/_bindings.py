"""The native library's tables for a Python that the package has no compiled `_bindings` for.

Python prefers `_bindings.*.so`, which belongs to the version that it was built by; every other version imports this
module, whose functions are the same and go through a tensor op of `_native.so`, which serves every Python.
"""

from __future__ import annotations

import json
from typing import Any

import torch


def _call(function: str, dims: dict[str, int] | None = None, **arguments: object) -> Any:
    lines = [f"{name}={value}" for name, value in arguments.items()]
    lines += [f"dims.{name}={int(value)}" for name, value in (dims or {}).items()]
    result = json.loads(torch.ops.resnet_fused._table(function, "\n".join(lines)))
    if "wrong" in result:
        raise ValueError(result["wrong"])
    return result["value"]


def isa() -> str:
    """The instruction set in use."""
    return _call("isa")


def isas() -> list[str]:
    """Those that this machine runs."""
    return _call("isas")


def set_isa(name: str) -> None:
    """Use another one; packed weights depend on it."""
    _call("set_isa", name=name)


def kernel_table() -> list[dict[str, Any]]:
    """One dict a compiled kernel."""
    return _call("kernel_table")


def cost(op: str, dims: dict[str, int], dtype: str, algorithm: str, threads: int) -> dict[str, Any]:
    """Predicted seconds, FLOPs, bytes and workspace of a layer or block."""
    return _call("cost", dims, op=op, dtype=dtype, algorithm=algorithm, threads=threads)


def cached_bytes() -> int:
    """Bytes kept: idle outputs and workspaces."""
    return _call("cached_bytes")


def release_memory() -> None:
    """Give them back to the system; no kernel may be running."""
    _call("release_memory")


def pool_limit() -> int:
    """Most bytes of idle outputs that are kept."""
    return _call("pool_limit")


def set_pool_limit(bytes: int) -> None:
    """Keep at most so many."""
    _call("set_pool_limit", bytes=bytes)


def poison_workspaces() -> None:
    """Fill the workspaces with NaN (tests)."""
    _call("poison_workspaces")


def dictionaries(entries: tuple[Any, ...], sizes: tuple[Any, ...]) -> None:
    """What makes `unchanged` faster where it is compiled."""
    return None


def unchanged(
    entries: tuple[Any, ...],
    sizes: tuple[Any, ...],
    versions: tuple[Any, ...],
    watched: torch.Tensor,
    dictionaries: None = None,
) -> bool:
    """Whether all that a recording depends on is as it was.

    Args:
        entries: dictionary, key and value, one after the other: `dictionary.get(key) is value`.
        sizes: dictionary and number of its entries, one after the other.
        versions: tensor and its version, one after the other.
        watched: made by the op `_watch` of the tensors that are to be where and what they were.
        dictionaries: what `dictionaries` made of entries and sizes.
    """
    return (
        all([store.get(key) is value for store, key, value in zip(*[iter(entries)] * 3, strict=True)])
        and all([len(store) == size for store, size in zip(*[iter(sizes)] * 2, strict=True)])
        and all([tensor._version == version for tensor, version in zip(*[iter(versions)] * 2, strict=True)])
        and torch.ops.resnet_fused._unchanged.default(watched)
    )


if _call("has_cuda"):

    def cuda_kernel_table() -> list[dict[str, Any]]:
        """One dict a compiled CUDA kernel; registers and occupancy where a GPU tells."""
        return _call("cuda_kernel_table")

    def cuda_driver_lack() -> str:
        """Why the NVIDIA driver is too old for the kernels' CUDA runtime; empty if it is not, or there is none."""
        return _call("cuda_driver_lack")

    def cuda_candidates(
        op: str, dims: dict[str, int], dtype: str, arch: int, multiprocessors: int, shared_bytes: int
    ) -> tuple[list[tuple[str, str, float]], str]:
        """((algorithm, kernel, predicted microseconds), ...), best first, and why there is none."""
        device = {"arch": arch, "multiprocessors": multiprocessors, "shared_bytes": shared_bytes}
        found, why = _call("cuda_candidates", dims, op=op, dtype=dtype, **device)
        return [(row["algorithm"], row["kernel"], row["microseconds"]) for row in found], why
