"""What the package raises when an argument is wrong or a backend cannot do what was asked of it by name."""

from __future__ import annotations


class InputError(ValueError):
    """An argument of a public function is wrong; the message names it, what was expected and what was given."""


class BackendError(RuntimeError):
    """A backend asked for by name is missing or cannot run this call; the message says which and why."""
