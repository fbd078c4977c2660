"""Environment variables and the `backend` context: the only place that reads either.

| variable | meaning |
|---|---|
| `RESNET_FUSED_BACKEND` | backend for every call left at `"auto"`, as if the program ran inside `backend(...)` |
| `RESNET_FUSED_CPU_ISA` | instruction set of the CPU kernels; read when the native library loads |
| `RESNET_FUSED_CACHE` | folder of this user's tuning files, see `cache_folder` |

A value that cannot be used is an InputError at the first call that needs it, not at import.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from .errors import InputError

BACKENDS = ("auto", "cpu", "cuda", "triton", "vendor", "reference")
ACCURACIES = ("strict", "fast")


def one_of(argument: str, value: str, allowed: tuple[str, ...]) -> str:
    """Return `value`, or raise InputError naming the argument, what it may be and what it is."""
    if value not in allowed:
        raise InputError(f"{argument} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


class _State(threading.local):
    # Set per thread in __init__, not on the class: torch.compile guards on what it finds in the instance.
    def __init__(self) -> None:
        self.backend = os.environ.get("RESNET_FUSED_BACKEND") or "auto"


_state = _State()


def backend(name: str) -> AbstractContextManager[None]:
    """Run every call whose backend is `"auto"` on another one, in this thread, as long as a `with` statement lasts.

    Works around and inside a function under `torch.compile`. A call or module that names its backend keeps it.

    Args:
        name: one of `"auto"`, `"cpu"`, `"cuda"`, `"triton"`, `"vendor"`, `"reference"`.

    Raises:
        InputError: unknown name.
    """
    return _backend(one_of("backend", name, BACKENDS))


@contextmanager
def _backend(name: str) -> Iterator[None]:
    previous = _state.backend
    _state.backend = name
    try:
        yield
    finally:
        _state.backend = previous


def resolve_backend(name: str) -> str:
    """The backend that a call asking for `name` gets: for `"auto"` that of the surrounding `backend(...)`.

    Raises:
        InputError: the environment names no backend.
    """
    return one_of("RESNET_FUSED_BACKEND", _state.backend, BACKENDS) if name == "auto" else name


def check_isa(known: Sequence[str]) -> None:
    """Raise InputError if `RESNET_FUSED_CPU_ISA` is none of these, the instruction sets that run here."""
    name = os.environ.get("RESNET_FUSED_CPU_ISA")
    if name:
        one_of("RESNET_FUSED_CPU_ISA", name, tuple(known))


def cache_folder() -> Path:
    """Where `resnet-fused tune` writes: `RESNET_FUSED_CACHE`, else `resnet_fused` in `XDG_CACHE_HOME` or `~/.cache`.

    Raises:
        InputError: `RESNET_FUSED_CACHE` is there and no folder.
    """
    own = os.environ.get("RESNET_FUSED_CACHE")
    if own:
        folder = Path(own)
        if folder.exists() and not folder.is_dir():
            raise InputError(f"RESNET_FUSED_CACHE must be a folder, or the path of one to make, got the file {own!r}")
        return folder
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resnet_fused"
