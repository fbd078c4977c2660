"""What was measured on a GPU: the best configuration of every Triton kernel, and the time of every backend, by shape.

A tuning file is JSON, one for each kind of GPU and release of Triton: those shipped in `resnet_fused/configs/` are read
first, this user's from `resnet-fused tune` (`settings.cache_folder`) come on top, shape by shape. A file that is
damaged, or that another GPU, Triton or generation of kernels wrote, is reported once, set aside and otherwise ignored;
so is a configuration that the kernel does not offer for its shape.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.metadata
import json
import os
import re
import tempfile
import typing
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ... import settings
from ...errors import InputError
from ...shapes import Shape
from . import configs
from .configs import Architecture, Config

GENERATION = 1
"""Of the kernels and their configurations. Raised when a change to them makes old measurements misleading."""
SHIPPED = Path(__file__).parents[2] / "configs"
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
SHAPES: dict[str, type[Any]] = {shape.op: shape for shape in typing.get_args(Shape)}

Key = tuple[Shape, torch.dtype]


@dataclass(frozen=True)
class Entry:
    """What was measured for one layer or block at one shape and dtype.

    Attributes:
        configs: the best configuration of each Triton kernel that can run it, by the kernel's name, as `Config.to_dict`
            gives it: this module is read where the kernels that know their classes are not imported.
        seconds: best time of each candidate, by name as in "triton pointwise", "cuda implicit_gemm" or "vendor cudnn".
    """

    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


Table = dict[Key, Entry]


def lookup(kernel: str, shape: Shape, dtype: torch.dtype, arch: Architecture) -> Config | None:
    """The measured configuration of a kernel for a shape, None if none was measured."""
    entry = _table(arch.name).get((shape, dtype))
    if entry is None or kernel not in entry.configs:
        return None
    try:
        config = configs.from_dict(kernel, entry.configs[kernel])
        if config not in configs.alternatives(kernel, shape, dtype, arch):
            raise InputError(f"it must be one that the kernel offers for {shape}, got {config}")
    except InputError as error:
        warnings.warn(
            f"a tuned configuration of {kernel!r} is not usable, the untuned one is used: {error}", stacklevel=2
        )
        return None
    return config


def backend_seconds(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, float] | None:
    """The measured time of each candidate for a layer or block (see `Entry`), None if none was measured."""
    entry = _table(configs.architecture(device).name).get((shape, dtype))
    return entry.seconds if entry is not None and entry.seconds else None


def forget() -> None:
    """Read the files again at the next question, and ask again for every configuration already chosen."""
    _table.cache_clear()
    configs.choose.cache_clear()


@functools.cache
def _table(gpu: str) -> Table:
    table = read(path(gpu, SHIPPED), gpu)
    for key, entry in read(path(gpu, settings.cache_folder()), gpu).items():
        below = table.get(key, Entry())
        table[key] = Entry({**below.configs, **entry.configs}, {**below.seconds, **entry.seconds})
    return table


def triton_release() -> str:
    """Triton's major and minor version, as "3.9": patch releases compile alike. "none" where it is not installed."""
    try:
        return ".".join(importlib.metadata.version("triton").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return "none"


def path(gpu: str, folder: Path) -> Path:
    """The tuning file of a GPU, by the name that its driver gives, in a folder."""
    return folder / f"{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}.triton{triton_release()}.json"


def _header(gpu: str) -> dict[str, Any]:
    return {"gpu": gpu, "triton": triton_release(), "generation": GENERATION}


def read(file: Path, gpu: str) -> Table:
    """The contents of a tuning file; nothing, with a warning, if it is damaged or foreign; nothing if there is none."""
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        warnings.warn(f"tuning file {file} cannot be read, untuned configurations are used: {error}", stacklevel=2)
        return {}
    try:
        return _parse(json.loads(text), gpu)
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # InputError and JSONDecodeError are ValueErrors
        aside = file.with_name(file.name + ".corrupt")
        with contextlib.suppress(OSError):  # a shipped file may be read-only
            file.replace(aside)
        where = f"moved to {aside}" if aside.exists() else "left where it is"
        warnings.warn(
            f"tuning file {file} is not usable, {where}, untuned configurations are used: {error}", stacklevel=2
        )
        return {}


def _parse(content: Any, gpu: str) -> Table:
    expected = _header(gpu)
    found = {name: content.get(name) for name in expected} if isinstance(content, dict) else content
    if found != expected:
        raise InputError(f"it must be of {expected}, got {found}")
    table: Table = {}
    for item in content["entries"]:
        if item["dtype"] not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {item['dtype']!r}")
        chosen, seconds = item["configs"], item["seconds"]
        if not all(isinstance(name, str) and isinstance(values, dict) for name, values in chosen.items()):
            raise InputError(f"configs must be configurations by kernel, got {chosen!r}")
        if not all(isinstance(name, str) and type(value) is float and value > 0 for name, value in seconds.items()):
            raise InputError(f"seconds must be positive numbers by candidate, got {seconds!r}")
        table[_shape(item["shape"]), DTYPES[item["dtype"]]] = Entry(chosen, seconds)
    return table


def _shape(values: dict[str, Any]) -> Shape:
    """A shape from JSON.

    Raises:
        InputError: it is none.
    """
    cls = SHAPES.get(values["op"])
    if cls is None:
        raise InputError(f"op must be one of {', '.join(SHAPES)}, got {values['op']!r}")
    sizes = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if name != "op"}
    numbers = [n for value in sizes.values() for n in (value if isinstance(value, tuple) else (value,))]
    if set(sizes) != {f.name for f in fields(cls)} or not all(isinstance(n, int) for n in numbers):
        raise InputError(
            f"a shape of op {values['op']!r} must have {', '.join(f.name for f in fields(cls))}, got {sizes}"
        )
    shape: Shape = cls(**sizes)
    return shape


def write(gpu: str, table: Table, folder: Path | None = None) -> Path:
    """Add measurements to a GPU's tuning file; what it holds of other shapes stays. Returns the file's path.

    The file is replaced in one step, and writers wait for each other: no reader sees half a file, and no writer undoes
    another's work.

    Args:
        gpu: name that its driver gives.
        table: the measurements.
        folder: where; the user's by default.

    Raises:
        OSError: the folder cannot be written.
    """
    file = path(gpu, folder or settings.cache_folder())
    file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(file.with_suffix(".lock")):
        merged = read(file, gpu) | table
        items = [
            {
                "dtype": str(dtype).removeprefix("torch."),
                "shape": {"op": shape.op, **asdict(shape)},
                "configs": entry.configs,
                "seconds": entry.seconds,
            }
            for (shape, dtype), entry in merged.items()
        ]
        lines = ",\n".join(json.dumps(item) for item in items)
        head = json.dumps(_header(gpu))[1:-1]
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        try:
            with os.fdopen(descriptor, "w") as out:
                out.write(f'{{{head}, "entries": [\n{lines}\n]}}\n')
            os.replace(temporary, file)
        except BaseException:
            os.unlink(temporary)
            raise
    forget()
    return file


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
