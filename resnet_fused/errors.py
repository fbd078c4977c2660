"""What the package raises where an argument is wrong, a backend cannot do what was asked, or a process died."""

from __future__ import annotations


class InputError(ValueError):
    """An argument of a public function is wrong; the message names it, what was expected and what was given."""


class WorkerError(RuntimeError):
    """A process that measures something has failed or died; the message says which and why."""


class BackendError(RuntimeError):
    """A backend asked for by name is missing or cannot run this call; the message says which and why."""
