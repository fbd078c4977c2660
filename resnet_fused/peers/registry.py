"""Who takes part in a comparison."""

from __future__ import annotations

from ..errors import InputError
from . import cudnn_frontend, fused, jax, onnxruntime, openvino, tensorrt, torch_compile, torch_eager
from .peer import Peer, Task

CPU = (torch_compile.FREEZING, onnxruntime.ONNX_RUNTIME, openvino.OPENVINO, jax.JAX)
CUDA = (
    torch_compile.DEFAULT,
    torch_compile.MAX_AUTOTUNE,
    torch_compile.REDUCE_OVERHEAD,
    fused.CUDNN,
    cudnn_frontend.CUDNN_FRONTEND,
    onnxruntime.ONNX_RUNTIME,
    tensorrt.TENSORRT,
    tensorrt.TORCH_TENSORRT,
    jax.JAX,
)


def contenders(task: Task, accuracies: tuple[str, ...], only: tuple[str, ...] = (), block: bool = False) -> list[Peer]:
    """Everyone for a task, those that are absent from this machine included.

    Args:
        task: device, dtype, batch.
        accuracies: of the fused contenders.
        only: names of peers; empty for all. The eager and fused contenders take part always.
        block: whether it is a block, which on a CPU runs through oneDNN's fused layers as well.

    Raises:
        InputError: `only` names a peer that there is none of on this device.
    """
    cuda = task.device == "cuda"
    graphs = cuda and task.batch == 1
    eager = [torch_eager.NCHW, torch_eager.CHANNELS_LAST]
    eager += [torch_eager.GRAPH] if graphs else []
    eager += [torch_eager.AMP] if cuda and task.dtype != "fp32" else []
    eager += [fused.ONEDNN] if block and not cuda else []
    ours = [fused.peer(accuracy, graph) for graph in ((False, True) if graphs else (False,)) for accuracy in accuracies]
    peers = CUDA if cuda else CPU
    names = [peer.name for peer in peers]
    if unknown := set(only) - set(names):
        raise InputError(f"peers must be some of {', '.join(map(repr, names))}, got {sorted(unknown)[0]!r}")
    return [*eager, *(peer for peer in peers if not only or peer.name in only), *ours]
