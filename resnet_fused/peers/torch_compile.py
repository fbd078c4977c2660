"""torch.compile: with frozen weights on a CPU, in its three modes on a GPU."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from .peer import PEER, Peer, Ready, Task
from .torch_eager import channels_last


def prepare(model: nn.Module, x: Tensor, task: Task, mode: str | None = None, freezing: bool = False) -> Ready:
    """Compile for this input's shape; the compiler runs in the first call, with an empty cache."""
    import torch._inductor.config as inductor

    inductor.freezing = freezing
    model, x = channels_last(model, x)
    compiled = torch.compile(model, mode=mode)
    settings = {"memory_format": "channels_last", "mode": mode or "default", "freezing": freezing}
    return Ready(lambda: compiled(x), settings=settings)


FREEZING = Peer("torch.compile, freezing", PEER, ("torch",), partial(prepare, freezing=True))
DEFAULT = Peer("torch.compile", PEER, ("torch",), prepare)
MAX_AUTOTUNE = Peer("torch.compile, max-autotune", PEER, ("torch",), partial(prepare, mode="max-autotune"))
REDUCE_OVERHEAD = Peer("torch.compile, reduce-overhead", PEER, ("torch",), partial(prepare, mode="reduce-overhead"))
