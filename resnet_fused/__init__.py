"""Fused inference kernels for residual CNNs: same model, same numbers, less time."""

from . import models, nn, ops
from ._version import __version__
from .complexity import info
from .explain import explain
from .fuse import fuse, unfuse
from .responses import layer_responses
from .settings import backend
from .verify import verify

__all__ = [
    "__version__",
    "backend",
    "explain",
    "fuse",
    "info",
    "layer_responses",
    "models",
    "nn",
    "ops",
    "unfuse",
    "verify",
]
