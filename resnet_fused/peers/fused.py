"""This package: strict, fast, replayed as CUDA graphs; and oneDNN's and cuDNN's own fused layers by the same fusing."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from ..fuse import fuse
from .peer import FUSED, PEER, Peer, Ready, Task
from .torch_eager import channels_last, graphed


def prepare(
    model: nn.Module, x: Tensor, task: Task, accuracy: str = "strict", backend: str = "auto", graph: bool = False
) -> Ready:
    """Fuse, and capture where asked for."""
    model, x = channels_last(model, x)
    fast = fuse(model, backend=backend, accuracy=accuracy)
    settings = {"memory_format": "channels_last", "backend": backend, "accuracy": accuracy, "cuda_graph": graph}
    return Ready(graphed(lambda: fast(x)) if graph else lambda: fast(x), settings=settings, fused=fast)


def peer(accuracy: str, graph: bool = False) -> Peer:
    """The fused model at an accuracy."""
    name = ("fused" if accuracy == "strict" else "fused fast") + (", CUDA graph" if graph else "")
    return Peer(name, FUSED, ("resnet_fused",), partial(prepare, accuracy=accuracy, graph=graph), accuracy=accuracy)


ONEDNN = Peer("oneDNN layer-fused", PEER, ("torch",), partial(prepare, backend="vendor"))
CUDNN = replace(ONEDNN, name="cuDNN fused")
