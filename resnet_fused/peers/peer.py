"""What a contender of the comparison is."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .._version import __version__

EAGER, FUSED, PEER = "eager", "fused", "peer"  # kinds of contenders: plain torch, this package, what is there instead


@dataclass(frozen=True)
class Task:
    """What every contender of one comparison runs; `dtype` is `"fp32"`, `"bf16"` or `"fp16"`."""

    device: str
    dtype: str
    batch: int
    threads: int


@dataclass(frozen=True)
class Ready:
    """A contender that is set up.

    Attributes:
        call: one forward pass on the input that it was set up with.
        output: makes a tensor of what `call` returns.
        settings: what was chosen beyond the defaults, for the record.
        fused: the fused model, where it is one.
        alive: what `call` needs by address only.
    """

    call: Callable[[], Any]
    output: Callable[[Any], Tensor] = lambda y: y
    settings: dict[str, Any] = field(default_factory=dict)
    fused: nn.Module | None = None
    alive: tuple[Any, ...] = ()


def always(task: Task) -> str | None:
    """Nothing stands in the way of the contender."""
    return None


@dataclass(frozen=True)
class Peer:
    """One contender. It is sent to its process by pickle, so its functions are those of a module.

    Attributes:
        name: unique.
        kind: `"eager"`, `"fused"` or `"peer"`.
        distributions: the first one that is installed gives its version.
        prepare: sets it up: (model in eval mode, NCHW input, both in the task's dtype on its device, task). What it
            takes counts as set-up time. Runs with gradients on, and may change the model.
        absent: why it cannot take part on this machine, None if it can.
        accuracy: that of a fused contender.
    """

    name: str
    kind: str
    distributions: tuple[str, ...]
    prepare: Callable[[nn.Module, Tensor, Task], Ready]
    absent: Callable[[Task], str | None] = always
    accuracy: str | None = None

    @property
    def version(self) -> str | None:
        """The installed version, None if there is none."""
        for name in self.distributions:
            if name == "resnet_fused":  # which need not be installed
                return __version__
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return None


def missing(*modules: str) -> str | None:
    """The reason of a contender that needs these modules and lacks one of them."""
    lacking = [module for module in modules if importlib.util.find_spec(module) is None]
    return f"{' and '.join(lacking)} not installed" if lacking else None
