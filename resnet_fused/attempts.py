"""Kernels that take their process with them: what is being run is on disk, so that the next process leaves it out.

A kernel that hangs cannot be stopped, and one that reads or writes where it must not leaves its process without the
GPU. Who runs many kernels, to tune or to measure them, loses only one that way.
"""

from __future__ import annotations

import faulthandler
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from . import environment
from .errors import BackendError
from .gpu_timer import check_gpu


class Attempts:
    """The file of attempts, one JSON object a line: `name`, and `outcome` "started" or "ended".

    Args:
        path: the file; None to keep none.
        seconds: after which an attempt counts as hung, and the process ends.

    Attributes:
        fatal: names of attempts that an earlier process began and did not end.
    """

    def __init__(self, path: Path | None = None, seconds: float = 120.0) -> None:
        self.path, self.seconds = path, seconds
        self.fatal = frozenset(unended(path) if path else ())
        versions = environment.versions()
        self._suffix = "".join(f", {name} {versions.get(name)}" for name in ("resnet_fused", "torch", "triton"))
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(map(_started, sorted(self.fatal))))  # what ended well is of no further interest

    @contextmanager
    def attempt(self, what: str, more_seconds: float = 0.0) -> Iterator[None]:
        """Around an attempt that `what` names; it must wait for the GPU before it ends.

        An exception is passed on.

        Args:
            what: shape, kernel and configuration.
            more_seconds: that it may take beyond those of a single call.

        Raises:
            BackendError: an earlier process did not survive the same with these versions, or the GPU is lost to this
                one.
        """
        if self.path is None:
            yield
            return
        name = what + self._suffix
        if name in self.fatal:
            raise BackendError(f"an earlier process hung or died in it; to try it again, delete {self.path}")
        self._write(_started(name))
        trace = self.path.with_suffix(".trace").open("a")
        faulthandler.dump_traceback_later(self.seconds + more_seconds, exit=True, file=trace)
        try:
            yield
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
        except Exception:
            check_gpu(what)  # raises where it is lost: then the attempt has not ended
            self._write(_ended(name))
            raise
        except BaseException:  # asked to stop, by Ctrl-C
            self._write(_ended(name))
            raise
        else:
            self._write(_ended(name))
        finally:
            faulthandler.cancel_dump_traceback_later()
            trace.close()

    def _write(self, line: str) -> None:
        assert self.path is not None
        with self.path.open("a") as file:
            file.write(line)


def unended(path: Path) -> set[str]:
    """The names of the attempts in a file that were begun and did not end."""
    outcomes = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        entry = json.loads(line)
        outcomes[entry["name"]] = entry["outcome"]
    return {name for name, outcome in outcomes.items() if outcome == "started"}


def _started(name: str) -> str:
    return json.dumps({"name": name, "outcome": "started"}) + "\n"


def _ended(name: str) -> str:
    return json.dumps({"name": name, "outcome": "ended"}) + "\n"


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Take SIGTERM for Ctrl-C, after which what was measured is kept. For the main thread."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
