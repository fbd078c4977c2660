"""Triton kernels for NVIDIA GPUs of compute capability 8.0 and newer; for CPU tensors in Triton's interpreter.

Importing this imports no Triton: the kernels' modules do, at the first call.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import BackendError
from ...shapes import Conv, Head, Shape
from ..precision import allow_tf32
from . import block_configs, configs, layer_configs
from .configs import Candidate, architecture

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYERS = ("implicit_gemm", "pointwise", "tma_conv")
"""The kernels of a layer: algorithm and module of one name."""
BLOCKS = ("bottleneck", "bottleneck_chain", "basic_block", "stem", "dense_block", "transition", "head")
"""The ops with a kernel for the whole of a block. Its module has another name: importing it would hide the op here."""
MAX_PIXELS = 2**31 - 2**16
"""Pixels are counted in 32 bits, with room for the last tile; elements in 64."""


def _module(name: str) -> Any:
    return importlib.import_module(f".{name}", __name__)


def _pair(values: Sequence[int]) -> tuple[int, int]:
    first, second = values
    return first, second


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def unsupported(shape: Shape, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why no kernel here can run a layer or the whole of a block, in a phrase; None if one can."""
    if dtype not in DTYPES:
        return f"it takes {', '.join(map(str, DTYPES))}, x.dtype is {dtype}"
    if not _installed():
        return "triton is not installed"
    if device.type != "cuda" and not (device.type == "cpu" and _interpreted()):
        return f"it needs a CUDA GPU of compute capability 8.0 or newer, x.device is {device}"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    arch = architecture(device)
    if arch.capability < (8, 0):
        return f"it needs compute capability 8.0 or newer, {arch.name} has {'.'.join(map(str, arch.capability))}"
    if max(layer.n * layer.h * layer.w for layer in shape.layers()) > MAX_PIXELS:
        return f"it takes at most {MAX_PIXELS} pixels"
    if isinstance(shape, Conv) or candidates(shape, dtype, device):
        return None
    why = block_configs.why_not_whole(shape, dtype, arch)
    return why or "a whole block in float32 needs TF32, which torch's switch does not allow"


def candidates(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Candidate]:
    """The kernels that can run a layer or the whole of a block, the one predicted fastest first; [] if none can."""
    arch = architecture(device)
    if isinstance(shape, Conv):
        if dtype == torch.float32 and not allow_tf32(device):
            return [Candidate("implicit_gemm", str(layer_configs.IEEE))]
        names = layer_configs.algorithms(shape, dtype, arch)
    elif isinstance(shape, Head) or (
        shape.op in BLOCKS and not (device.type == "cuda" and dtype == torch.float32 and not allow_tf32(device))
    ):
        names = [shape.op] if configs.alternatives(shape.op, shape, dtype, arch) else []
    else:
        names = []
    return [Candidate(name, str(configs.choose(name, shape, dtype, arch))) for name in names]


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    residual: Tensor | None,
    in_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    algorithm: str,
    out: Tensor | None = None,
    config: configs.Config | None = None,
) -> Tensor:
    """`activation(conv(relu(x * in_scale + in_shift), weight) * scale + shift + residual)`.

    Args:
        x: [N, C, H, W], float32, bfloat16 or float16; NHWC in memory, or copied to it. Slices of channels are read in
            place.
        weight: [K, C / groups, R, S] of x's dtype.
        scale: float32 [K], None for ones.
        shift: float32 [K].
        residual: None, or of the output's shape and x's dtype.
        in_scale: float32 [C], None with in_shift for no prologue. The padding is zero after it.
        in_shift: float32 [C].
        stride: vertical, horizontal; as padding and dilation.
        padding: zeros on each side.
        dilation: distance between taps.
        groups: as in torch. Narrow groups are computed several at a time: a NaN or infinity in one of them reaches the
            others' outputs as NaN.
        activation: `"relu"` or `"none"`.
        algorithm: one of `LAYERS`, from `candidates`. Implicit GEMM runs instead where others cannot: on images that
            are not aligned to 16 bytes (a slice from an odd channel on), and for float32 without TF32.
        out: where to write: [N, K, P, Q], channels_last or a slice of its channels; None for a new tensor.
        config: None for the one that `configs.choose` gives.

    Returns:
        `out`, or [N, K, P, Q] of x's dtype, channels_last.

    Raises:
        BackendError: the algorithm cannot run this layer.
        InputError: `out` has another layout.
    """
    n, c, h, w = x.shape
    k, _, r, s = weight.shape
    shape = Conv(
        n, c, h, w, k, r, s,
        stride=_pair(stride), padding=_pair(padding), dilation=_pair(dilation), groups=groups,
        residual=residual is not None, prologue=in_scale is not None,
    )  # fmt: skip
    return _run(shape, x, weight, scale, shift, residual, in_scale, in_shift, None, activation, algorithm, out, config)


def project(
    h: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    x: Tensor,
    wd: Tensor,
    sd: Tensor | None,
    bd: Tensor,
    *,
    stride: int,
    padding: int = 0,
    dilation: int = 1,
    activation: str = "relu",
    algorithm: str | None = None,
    config: configs.Config | None = None,
) -> Tensor:
    """The end of a block and its projection shortcut, summed up in one accumulator.

    `activation(conv(h, weight) * scale + shift + conv1x1(x, wd, stride) * sd + bd)`.

    Args:
        h: [N, C, P', Q'], the block's last intermediate.
        weight: [K, C, R, S], stride 1; 1x1 in a bottleneck, 3x3 in a basic block.
        scale: float32 [K], None for ones; as sd.
        shift: float32 [K]; as bd.
        x: [N, C2, H, W], the block's input.
        wd: [K, C2, 1, 1].
        sd: see scale.
        bd: see shift.
        stride: of the projection.
        padding: of the first convolution.
        dilation: of the first convolution.
        activation: `"relu"` or `"none"`.
        algorithm: `"implicit_gemm"`, `"tma_conv"`, or None for the one predicted faster.
        config: None for the first of `layer_configs.with_projection`.

    Returns:
        [N, K, P, Q] of x's dtype, channels_last.

    Raises:
        BackendError: the algorithm cannot run this.
    """
    from .layers import Projection

    n, c, p, q = h.shape
    k, _, r, s = weight.shape
    shape = Conv(n, c, p, q, k, r, s, padding=(padding, padding), dilation=(dilation, dilation))
    if algorithm is None:
        ranked = layer_configs.algorithms(shape, h.dtype, architecture(h.device))
        algorithm = next(name for name in ranked if name != "pointwise")
        if x.shape[1] % 8:
            algorithm = "implicit_gemm"
    projection = Projection(x, wd, sd, bd, stride)
    return _run(shape, h, weight, scale, shift, None, None, None, projection, activation, algorithm, None, config)


def _run(
    shape: Conv,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    residual: Tensor | None,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    projection: Any,
    activation: str,
    algorithm: str,
    out: Tensor | None,
    config: configs.Config | None,
) -> Tensor:
    layers = _module("layers")
    prologue = None if in_scale is None or in_shift is None else layers.Prologue(in_scale, in_shift)
    layer = layers.prepare(shape, x, weight, scale, shift, residual, prologue, projection, activation, out)
    arch = architecture(x.device)
    if algorithm not in LAYERS or not configs.alternatives(algorithm, shape, x.dtype, arch):
        raise BackendError(f"algorithm {algorithm!r} of backend 'triton' cannot run {shape}")
    without_tf32 = x.dtype == torch.float32 and layer.precision == "ieee"
    if algorithm != "implicit_gemm" and (without_tf32 or not layer.describable()):
        algorithm, config = "implicit_gemm", None
    if config is None and projection is not None:
        config = layer_configs.with_projection(algorithm, shape, x.dtype, arch)[0]
    elif config is None:
        config = configs.choose(algorithm, shape, x.dtype, arch)
    return _module(algorithm).run(layer, config)


def bottleneck(*args: Any, algorithm: str = "bottleneck", **options: Any) -> Tensor:
    """The whole bottleneck in one launch; see `whole_bottleneck.bottleneck`."""
    return _module("whole_bottleneck").bottleneck(*args, **options)


def basic_block(*args: Any, algorithm: str = "basic_block", **options: Any) -> Tensor:
    """The whole basic block in one launch; see `whole_basic_block.basic_block`."""
    return _module("whole_basic_block").basic_block(*args, **options)


def stem(*args: Any, algorithm: str = "stem", **options: Any) -> Tensor:
    """Convolution, ReLU and max pooling in one launch; see `whole_stem.stem`."""
    return _module("whole_stem").stem(*args, **options)


def bottleneck_chain(*args: Any, algorithm: str = "bottleneck_chain", **options: Any) -> Tensor:
    """A chain of identity bottlenecks, one launch a block; see `rotated.stage`."""
    return _module("rotated").stage(*args, **options)


def head(*args: Any, algorithm: str = "head", **options: Any) -> Tensor:
    """Global average pooling and the linear layer after it; see `pooled_head.head`."""
    return _module("pooled_head").head(*args, **options)


def dense_block(*args: Any, algorithm: str = "dense_block", **options: Any) -> Tensor:
    """A dense block in one buffer; see `dense.dense_block`."""
    return _module("dense").dense_block(*args, **options)


def transition(*args: Any, algorithm: str = "transition", **options: Any) -> Tensor:
    """DenseNet's transition with the pooling first; see `dense.transition`."""
    return _module("dense").transition(*args, **options)
