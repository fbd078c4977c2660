"""The models that can be asked for by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from torch import nn

from ..errors import InputError

Make = TypeVar("Make", bound=Callable[..., nn.Module])


class Entry(NamedTuple):
    """A model's constructor and its usual image height and width in pixels."""

    make: Callable[..., nn.Module]
    image: int


_entries: dict[str, Entry] = {}


def register(image: int) -> Callable[[Make], Make]:
    """Decorator: a constructor's name is a model's name."""

    def add(make: Make) -> Make:
        _entries[make.__name__] = Entry(make, image)
        return make

    return add


def names() -> list[str]:
    """The names of all models, family by family."""
    return list(_entries)


def find(name: str) -> Entry:
    """What is known of the model `name`.

    Raises:
        InputError: there is none; the message has the names that are close.
    """
    if name not in _entries:
        close = difflib.get_close_matches(name, _entries, n=4, cutoff=0.5)
        hint = f"perhaps {' or '.join(close)}" if close else f"such as {', '.join(list(_entries)[:5])}"
        raise InputError(f"model must be one of resnet_fused.models ({hint}), got {name!r}")
    return _entries[name]


def build(name: str, **kwargs: Any) -> nn.Module:
    """The model `name`, newly initialised, in train mode as torch makes it.

    Args:
        name: one of `names()`.
        kwargs: given to the constructor.

    Raises:
        InputError: no such model, or the constructor refuses an argument.
    """
    return find(name).make(**kwargs)
