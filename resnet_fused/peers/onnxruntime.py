"""ONNX Runtime, with its CPU and its CUDA execution provider."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor, nn

from .onnx_export import INPUT, MODULES, OUTPUT, exported
from .peer import PEER, Peer, Ready, Task, missing

PROVIDER = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def absent(task: Task) -> str | None:
    """It needs its provider, and on a CPU has float32 convolutions only."""
    if lacking := missing("onnxruntime", *MODULES):
        return lacking
    import onnxruntime

    if PROVIDER[task.device] not in onnxruntime.get_available_providers():
        return f"the installed onnxruntime has no {PROVIDER[task.device]}"
    if task.device == "cpu" and task.dtype != "fp32":
        return f"its CPU provider has no {task.dtype} convolution"
    if task.dtype == "bf16":
        return "NumPy, through which inputs are bound, has no bf16"
    return None


def prepare(model: nn.Module, x: Tensor, task: Task) -> Ready:
    """Export, optimise the graph, and bind input and output where they are."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task.threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    choices = {"cudnn_conv_algo_search": "EXHAUSTIVE"} if task.device == "cuda" else {}
    with exported(model, x) as path:
        session = onnxruntime.InferenceSession(path, options, providers=[(PROVIDER[task.device], choices)])
    if session.get_providers()[0] != PROVIDER[task.device]:
        raise RuntimeError(f"the session runs on {session.get_providers()[0]}")
    settings = {"provider": PROVIDER[task.device], "graph_optimization": "all", "exporter": "torch.onnx"} | choices
    if task.device == "cpu":
        array = x.numpy()
        return Ready(lambda: session.run(None, {INPUT: array})[0], torch.from_numpy, settings)
    binding = session.io_binding()
    element = {"fp32": numpy.float32, "fp16": numpy.float16}[task.dtype]
    binding.bind_input(INPUT, "cuda", x.device.index or 0, element, tuple(x.shape), x.data_ptr())
    binding.bind_output(OUTPUT, "cuda")

    def call() -> object:
        session.run_with_iobinding(binding)
        return binding

    return Ready(call, lambda bound: torch.from_numpy(bound.copy_outputs_to_cpu()[0]), settings, alive=(x,))


ONNX_RUNTIME = Peer("ONNX Runtime", PEER, ("onnxruntime", "onnxruntime-gpu"), prepare, absent)
