"""Plain torch: NCHW, channels_last, under autocast, and replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import gpu_timer
from ..bench import BASELINE, DTYPES
from .peer import EAGER, Peer, Ready, Task


def channels_last(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """The model, itself, and its input in channels_last."""
    moved: nn.Module = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved, x.contiguous(memory_format=torch.channels_last)


def graphed(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call as a replay of a CUDA graph, captured after three runs in which it compiles, packs and chooses."""
    output: list[Tensor] = []

    def keep() -> None:
        output[:] = [call()]

    with torch.inference_mode():
        graph = gpu_timer.captured(keep)

    def replay() -> Tensor:
        graph.replay()
        return output[0]

    return replay


def prepare_nchw(model: nn.Module, x: Tensor, task: Task) -> Ready:
    """Eager as a model comes."""
    return Ready(lambda: model(x), settings={"memory_format": "contiguous"})


def prepare_channels_last(model: nn.Module, x: Tensor, task: Task) -> Ready:
    """Eager in channels_last."""
    model, x = channels_last(model, x)
    return Ready(lambda: model(x), settings={"memory_format": "channels_last"})


def prepare_graph(model: nn.Module, x: Tensor, task: Task) -> Ready:
    """Eager in channels_last, captured once."""
    model, x = channels_last(model, x)
    return Ready(graphed(lambda: model(x)), settings={"memory_format": "channels_last", "cuda_graph": True})


def prepare_amp(model: nn.Module, x: Tensor, task: Task) -> Ready:
    """A float32 model under autocast."""
    model, x = channels_last(model.float(), x.float())

    def call() -> Tensor:
        with torch.autocast(task.device, DTYPES[task.dtype]):
            y: Tensor = model(x)
        return y

    return Ready(call, settings={"memory_format": "channels_last", "autocast": task.dtype})


NCHW = Peer("eager", EAGER, ("torch",), prepare_nchw)
CHANNELS_LAST = Peer(BASELINE, EAGER, ("torch",), prepare_channels_last)
GRAPH = Peer("eager channels_last, CUDA graph", EAGER, ("torch",), prepare_graph)
AMP = Peer("eager AMP", EAGER, ("torch",), prepare_amp)
