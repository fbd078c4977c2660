"""Trained weights from a file."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from ..errors import InputError


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state_dict into a model in place, strictly.

    Args:
        model: the model that the state_dict is of.
        path: a .safetensors file, or one that `torch.save(model.state_dict(), path)` wrote.

    Raises:
        InputError: the file cannot be read, holds no state_dict, or that of another model.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: dict[str, Tensor] = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    except (OSError, EOFError, ImportError, LookupError, RuntimeError, TypeError, ValueError, UnpicklingError) as error:
        why = " ".join(str(error).split())[:160]
        raise InputError(f"{path} must hold the state_dict of a {type(model).__name__}: {why}") from None
