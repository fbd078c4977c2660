"""Configurations of the kernels: block sizes, warps, pipeline stages, from pure functions of shape, dtype and GPU.

A kernel registers the class of its configurations and the function that lists those worth trying for a shape, the
heuristic's best first. All of them compile without spills and fit the GPU's shared memory. A measured configuration, if
there is one, comes before the heuristic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch

from ...errors import InputError
from ...shapes import Shape

C = TypeVar("C", bound="Config")


@dataclass(frozen=True)
class Architecture:
    """What the choice of a configuration needs to know about a GPU.

    Attributes:
        name: as the driver reports it; tells tuning files apart.
        capability: compute capability (major, minor).
        sms: streaming multiprocessors.
        shared_memory: bytes that one block can have.
        l2: bytes of the L2 cache.
    """

    name: str
    capability: tuple[int, int]
    sms: int
    shared_memory: int
    l2: int

    @property
    def tma(self) -> bool:
        """Whether it has the tensor memory accelerator (Hopper and newer)."""
        return self.capability >= (9, 0)

    @property
    def warpgroups(self) -> bool:
        """Whether matrix instructions read both factors from shared memory (wgmma, tcgen05); sm_120 has only mma."""
        return self.capability[0] in (9, 10, 11)


SHARED_MEMORY_KIB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}
"""What one block can have, by compute capability (CUDA C++ Programming Guide, technical specifications); else 99."""
SM80 = Architecture("sm_80", (8, 0), 108, 163 * 1024, 40 << 20)
SM90 = Architecture("sm_90", (9, 0), 132, 227 * 1024, 50 << 20)
SM100 = Architecture("sm_100", (10, 0), 148, 227 * 1024, 126 << 20)


@functools.cache
def architecture(device: torch.device) -> Architecture:
    """The GPU's architecture; for a CPU device, where the interpreter runs, that of an H100."""
    if device.type != "cuda":
        return SM90
    p = torch.cuda.get_device_properties(device)
    capability = (p.major, p.minor)
    shared_memory = SHARED_MEMORY_KIB.get(capability, 99) * 1024
    return Architecture(p.name, capability, p.multi_processor_count, shared_memory, p.L2_cache_size)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What every kernel's configuration has. Numbers that are no flag are positive.

    Attributes:
        warps: per block.
        stages: depth of the pipeline of loads.
    """

    warps: int
    stages: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            numbers = value if isinstance(value, tuple) else (value,)
            powers = field.name in ("warps", "box", "parts") or field.name.startswith("block")
            for number in numbers:
                if not isinstance(number, int) or (not isinstance(number, bool) and number < 1):
                    raise InputError(
                        f"{type(self).__name__}.{field.name} must consist of positive integers, got {value!r}"
                    )
                if powers and number & (number - 1):
                    raise InputError(f"{type(self).__name__}.{field.name} must be a power of two, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls: type[C], values: dict[str, Any]) -> C:
        """What `to_dict` gave.

        Raises:
            InputError: a name is missing or unknown, or a value is not of its type or out of range.
        """
        expected = {field.name: str(field.type) for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != set(expected):
            raise InputError(f"{cls.__name__} must have {', '.join(sorted(expected))}, got {values!r}")
        read: dict[str, Any] = {}
        for name, value in values.items():
            kind = expected[name]
            read[name] = tuple(value) if kind.startswith("tuple") and isinstance(value, list) else value
            wanted = tuple if kind.startswith("tuple") else bool if kind == "bool" else int
            if type(read[name]) is not wanted:
                raise InputError(f"{cls.__name__}.{name} must be of type {kind}, got {value!r}")
            if wanted is tuple and len(read[name]) != kind.count("int"):
                raise InputError(f"{cls.__name__}.{name} must be of type {kind}, got {value!r}")
        return cls(**read)

    def __str__(self) -> str:
        """All that tells it from the kernel's other configurations; what is 1 or False is not said."""
        words = [self._tile(), f"{self.warps} warps", f"{self.stages} stages"]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("warps", "stages", "box") and not field.name.startswith("block") and value != 1:
                words += [f"{field.name} {value}"] if value else []
            elif value is True:
                words.append(field.name)
        return ", ".join(words)

    def _tile(self) -> str:
        blocks = [getattr(self, f.name) for f in fields(self) if f.name.startswith("block")]
        return "x".join(map(str, blocks))


@dataclass(frozen=True)
class Candidate:
    """A kernel that can run a layer or block.

    Attributes:
        algorithm: the kernel's name.
        config: the configuration it would run with, in words.
    """

    algorithm: str
    config: str


Space = Callable[[Any, torch.dtype, Architecture], "list[Any]"]
_kernels: dict[str, tuple[type[Config], Space]] = {}


def register(kernel: str, config: type[Config], space: Space) -> None:
    """Make a kernel's configurations known.

    Args:
        kernel: its name, as in `Candidate.algorithm` where it stands for a whole op.
        config: class of its configurations.
        space: (shape, dtype, architecture) to the configurations worth trying, best first; [] if it cannot run it.
    """
    _kernels[kernel] = (config, space)


def from_dict(kernel: str, values: dict[str, Any]) -> Config:
    """A kernel's configuration from JSON.

    Raises:
        InputError: no such kernel, or not a configuration of it.
    """
    if kernel not in _kernels:
        raise InputError(f"kernel must be one of {', '.join(sorted(_kernels))}, got {kernel!r}")
    return _kernels[kernel][0].from_dict(values)


@functools.lru_cache(maxsize=4096)
def alternatives(kernel: str, shape: Shape, dtype: torch.dtype, arch: Architecture) -> tuple[Config, ...]:
    """The configurations of a kernel worth trying for a shape, the heuristic's best first; () if it cannot run it."""
    return tuple(_kernels[kernel][1](shape, dtype, arch))


@functools.lru_cache(maxsize=4096)
def choose(kernel: str, shape: Shape, dtype: torch.dtype, arch: Architecture) -> Config:
    """The configuration to use: the measured one if there is one, else the heuristic's.

    Memoised: `choose.cache_clear()` after tuning.
    """
    from . import tuned

    measured = tuned.lookup(kernel, shape, dtype, arch)
    return measured if measured is not None else alternatives(kernel, shape, dtype, arch)[0]
