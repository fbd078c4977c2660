"""Fused inference kernels for residual CNNs: same model, same numbers, less time."""

from . import models, nn, ops
from ._version import __version__
from .fuse import fuse, unfuse
from .settings import backend

__all__ = ["__version__", "backend", "fuse", "models", "nn", "ops", "unfuse"]
