"""Loads the native library (`_native.so`: tensor ops) and its Python bindings (`_bindings`: kernel table, cost model).

Neither has to be there: importing never fails, and `reason()` keeps why. One that is there and cannot be used is also
warned of. A wrong `RESNET_FUSED_CPU_ISA` is an InputError as soon as the library is asked for.
"""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from types import ModuleType

import torch

from ..errors import InputError
from ..settings import check_isa

# The one owner of the namespace: every schema is defined through it, in Python, so an op exists without native code.
library = torch.library.Library("resnet_fused", "DEF")
library.define("_table(str function, str arguments) -> str")  # for resnet_fused/_bindings.py

LIBRARY_PATH = Path(__file__).parent.parent / "_native.so"

bindings: ModuleType | None = None
_reason: str | None = "not loaded yet"
_wrong: str | None = None  # what to say of the environment


def available() -> bool:
    """Whether the native kernels can be called.

    Raises:
        InputError: `RESNET_FUSED_CPU_ISA` names no instruction set that runs here.
    """
    return reason() is None


def reason() -> str | None:
    """Why the native kernels cannot be called, in one sentence, or None; raises as `available` does."""
    if _wrong is not None:
        raise InputError(_wrong)
    return _reason


def isa() -> str:
    """The instruction set the native kernels use now, `"none"` without them; raises as `available` does."""
    if _wrong is not None:
        raise InputError(_wrong)
    return bindings.isa() if bindings is not None else "none"


def load() -> None:
    """Load the library and the bindings, once the private ops' schemas are defined; keep the reason on failure."""
    global _reason
    if not LIBRARY_PATH.exists():
        _reason = f"{LIBRARY_PATH} is not there: the package was installed without its native library"
        return
    _reason = _why_unusable()
    if _reason is not None and _wrong is None:
        warnings.warn(f"the kernels of resnet_fused are not used: {_reason}", RuntimeWarning, stacklevel=2)


def _why_unusable() -> str | None:
    """Load what is there; the reason if that fails."""
    global bindings, _wrong
    try:
        torch.ops.load_library(LIBRARY_PATH)
        loaded = importlib.import_module("resnet_fused._bindings")
        check_isa(loaded.isas())
        loaded.isa()  # chosen here, so that a later change of the environment changes nothing
    except InputError as error:
        _wrong = str(error)
        return _wrong
    except (OSError, ImportError, RuntimeError) as error:
        return f"{LIBRARY_PATH.name} does not load: {' '.join(str(error).split())}"
    bindings = loaded
    return None
