"""JAX: the model's operators compiled by XLA. It has not been run on a GPU yet."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn
from torch.utils import dlpack

from ..kernels.precision import allow_tf32
from .peer import PEER, Peer, Ready, Task, missing
from .traced import traced

PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")

YNNPACK: dict[str, Any] = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,"
    "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
}
"""Lets XLA take YNNPACK's kernels on a CPU, faster than Eigen's; jaxlib 0.10.2 does not by itself."""


def absent(task: Task) -> str | None:
    """On a GPU it needs the plugin of the GPU's CUDA."""
    if lacking := missing("jax"):
        return lacking
    if task.device == "cuda" and all(missing(plugin) for plugin in PLUGINS):
        return f"the installed jax has no GPU: neither {' nor '.join(PLUGINS)} is there"
    return None


def prepare(model: nn.Module, x: Tensor, task: Task) -> Ready:
    """Trace, fold BatchNorms and compile ahead of time for this input, with the weights as constants.

    Images are NHWC, which is faster on a CPU, and the input is handed over without a copy.
    """
    os.environ["NPROC"] = str(task.threads)  # XLA reads both when it first touches a device
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    import jax

    from .jax_ops import NHWC, Lowered, array

    if task.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    lowered_model = Lowered(traced(model, x))
    pictures = array(x.permute(NHWC))
    precision = "default" if task.dtype != "fp32" or allow_tf32(x.device) else "highest"
    with jax.default_matmul_precision(precision):
        lowered = jax.jit(lambda images: lowered_model.run(images)).lower(pictures)
    options: dict[str, Any] = YNNPACK if task.device == "cpu" else {}
    try:
        compiled = lowered.compile(compiler_options=options)
    except RuntimeError:
        if not options:
            raise
        options = {}  # this jaxlib knows no such option
        compiled = lowered.compile()
    settings = {"layout": "NHWC", "weights": "constants", "precision": precision, **options}
    return Ready(lambda: compiled(pictures).block_until_ready(), in_nchw, settings, alive=(pictures,))


def in_nchw(y: Any) -> Tensor:
    """JAX's array as a tensor; images, which are NHWC, as NCHW."""
    output: Tensor = dlpack.from_dlpack(y)
    return output.permute(0, 3, 1, 2) if output.dim() == 4 else output


JAX = Peer("JAX", PEER, ("jax",), prepare, absent)
