"""OpenVINO on a CPU, at the task's precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .peer import PEER, Peer, Ready, Task, missing

PRECISION = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


def absent(task: Task) -> str | None:
    """It must be installed, and this processor have the precision."""
    if lacking := missing("openvino"):
        return lacking
    import openvino

    able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return None if task.dtype.upper() in able else f"OpenVINO has no {task.dtype} on this processor"


def prepare(model: nn.Module, x: Tensor, task: Task) -> Ready:
    """Convert the float32 model from torch and compile it for one stream of requests; the precision is a hint.

    The weights are those of the task's dtype, so a bf16 contender computes the function that the others compute.
    """
    import openvino

    x = x.float()
    with torch.no_grad():
        converted = openvino.convert_model(model.float(), example_input=x, input=[tuple(x.shape)])
    settings = {
        "INFERENCE_PRECISION_HINT": PRECISION[task.dtype],
        "INFERENCE_NUM_THREADS": task.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
    }
    request = openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()
    array = x.numpy()
    return Ready(
        lambda: request.infer([array], share_inputs=True, share_outputs=True)[0],
        lambda y: torch.from_numpy(y.copy()),
        settings,
    )


OPENVINO = Peer("OpenVINO", PEER, ("openvino",), prepare, absent)
