"""The package's CUDA C++ kernels: private ops of the native library, on torch's current stream.

The kernels read images in NHWC, dense or a slice of the channels, aligned to 16 bytes, and weights as [K, R, S, C];
what is not so is copied. Which of the compiled kernels runs an algorithm is decided in the library (`choose` in
csrc/cuda/api.h).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..shapes import BasicBlock, Bottleneck, BottleneckChain, Conv, Shape, Stem
from . import native
from .layout import nhwc, nhwc_slice, pixel_pitch
from .packing import packed
from .precision import allow_tf32

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

for _schema in (
    "_cuda_conv(Tensor x, Tensor weight, Tensor? scale, Tensor shift, Tensor? residual, Tensor? in_scale, "
    "Tensor? in_shift, Tensor? x2, Tensor? weight2, Tensor? scale2, int stride2, int[] stride, int[] padding, "
    "int[] dilation, bool relu, str algorithm) -> Tensor",
    "_cuda_conv_out(Tensor x, Tensor weight, Tensor? scale, Tensor shift, Tensor? residual, Tensor? in_scale, "
    "Tensor? in_shift, int[] stride, int[] padding, int[] dilation, bool relu, str algorithm, Tensor(a!) out) -> ()",
    "_cuda_bottleneck(Tensor x, Tensor w1, Tensor? s1, Tensor b1, Tensor w2, Tensor? s2, Tensor b2, Tensor w3, "
    "Tensor? s3, Tensor b3, Tensor? wd, Tensor? sd, Tensor? bd, int stride1, int stride2, int dilation, "
    "str algorithm) -> Tensor",
    "_cuda_basic_block(Tensor x, Tensor w1, Tensor? s1, Tensor b1, Tensor w2, Tensor? s2, Tensor b2, Tensor? wd, "
    "Tensor? sd, Tensor? bd, int stride, int dilation, str algorithm) -> Tensor",
    "_cuda_rotated(Tensor h1, Tensor w2, Tensor? s2, Tensor b2, Tensor w3, Tensor? s3, Tensor b3, Tensor x, "
    "Tensor? w1, Tensor? s1, Tensor? b1, str algorithm) -> Tensor[]",
    "_cuda_stem(Tensor x, Tensor weight, Tensor? scale, Tensor shift, int stride, int padding, int pool_kernel, "
    "int pool_stride, int pool_padding, str algorithm) -> Tensor",
):
    native.library.define(_schema)


_Compiled = Conv | Bottleneck | BasicBlock | BottleneckChain | Stem
"""What the library's table knows."""


class Candidate(NamedTuple):
    """A way to run a layer or block.

    Attributes:
        algorithm: which kernel: `"implicit_gemm"`, `"split_k"`, ...; of blocks `"whole"`, or `"dual"`: a kernel a
            layer, the last of which adds up its own sum and the projection's in one accumulator; of chains `"rotated"`:
            a launch a block, from its 3x3 to the next block's first 1x1.
        config: name of the compiled kernel that would run: architecture, type, tile, stages.
    """

    algorithm: str
    config: str


class Device(NamedTuple):
    """What the kernels are chosen for.

    Attributes:
        arch: 10 * major + minor of the compute capability.
        multiprocessors: of the GPU.
        shared_bytes: most shared memory that a block may ask for.
    """

    arch: int
    multiprocessors: int
    shared_bytes: int


@functools.cache
def device_of(device: torch.device) -> Device:
    """The GPU's figures."""
    p = torch.cuda.get_device_properties(device)
    return Device(10 * p.major + p.minor, p.multi_processor_count, p.shared_memory_per_block_optin)  # type: ignore[attr-defined]


def built() -> str | None:
    """Why there are no CUDA kernels in this installation, None if there are."""
    if (why := native.reason()) is not None:
        return why
    return None if hasattr(native.bindings, "cuda_candidates") else "the package was built without CUDA kernels"


@functools.cache
def _driver_lack() -> str:
    """Why this machine's driver cannot run the kernels' CUDA runtime, empty if it can."""
    assert native.bindings is not None
    return native.bindings.cuda_driver_lack()


def unsupported(shape: Shape, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why no CUDA kernel can run a layer or the whole of a block, in a phrase; None if one can."""
    if (why := built()) is not None:
        return why
    if device.type != "cuda":
        return f"it needs a CUDA GPU of compute capability 8.0 or newer, x.device is {device}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    if why := _driver_lack():
        return why
    if dtype == torch.float32 and not allow_tf32(device):
        return "it computes float32 in TF32, which torch.backends.cudnn does not allow now"
    return _search(shape, dtype, device_of(device))[1]


def candidates(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Candidate]:
    """The ways to run a layer or the whole of a block, the one predicted fastest first; [] if there is none."""
    return [] if unsupported(shape, dtype, device) else _search(shape, dtype, device_of(device))[0]


@functools.lru_cache(maxsize=4096)
def _search(shape: Shape, dtype: torch.dtype, device: Device) -> tuple[list[Candidate], str | None]:
    """The candidates on a GPU, which need not be there, and why there are none."""
    if dtype not in DTYPES:
        return [], f"it takes {', '.join(map(str, DTYPES))}, x.dtype is {dtype}"
    if device.arch < 80:
        return [], f"it needs compute capability 8.0 or newer, the GPU has {device.arch // 10}.{device.arch % 10}"
    if not isinstance(shape, _Compiled):
        return [], f"it has no kernel for a whole {shape.op}"
    if any(layer.groups > 1 for layer in shape.layers()):
        return [], "it takes groups=1 only"
    whole, why = _compiled(shape, dtype, device)
    if isinstance(shape, (Bottleneck, BasicBlock)) and shape.projection:
        *path, _, last = shape.layers()  # the projection comes just before the last layer
        dual, _ = _compiled(last, dtype, device, projection=shape.c)
        if dual and all(_compiled(layer, dtype, device)[0] for layer in path):
            whole = [*whole, Candidate("dual", dual[0].config)]
    return whole, None if whole else why


def _compiled(shape: _Compiled, dtype: torch.dtype, device: Device, projection: int = 0) -> tuple[list[Candidate], str]:
    """What the library's table has for one kernel launch, best first, and why it has nothing."""
    found, why = _table(shape, dtype, device, projection)
    return [Candidate(algorithm, kernel) for algorithm, kernel, _ in found], why


def _table(
    shape: _Compiled, dtype: torch.dtype, device: Device, projection: int = 0
) -> tuple[list[tuple[str, str, float]], str]:
    """The same as (algorithm, kernel, predicted microseconds)."""
    assert native.bindings is not None
    dims = shape.dims()
    if isinstance(shape, Conv):
        dims = {**dims, "residual": 0 if projection else dims["residual"], "projection": projection}
    return native.bindings.cuda_candidates(shape.op, dims, str(dtype).removeprefix("torch."), *device)


def chain_pays(shape: BottleneckChain, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a chain's launches take less than its blocks one by one, by estimates that no measurement went into."""

    def predicted(part: _Compiled) -> float:
        found, _ = _table(part, dtype, device_of(device))
        return found[0][2] if found else math.inf

    layers = shape.block.layers()
    chain = predicted(layers[0]) + (shape.depth - 1) * predicted(shape) + predicted(replace(shape, depth=1))
    block = predicted(shape.block)  # where there is a kernel for it, the plan takes that before single layers
    return chain < shape.depth * (sum(map(predicted, layers)) if block == math.inf else block)


# ---- calls ---------------------------------------------------------------------------------------------------------
def _aligned(t: Tensor) -> bool:
    pitch = pixel_pitch(t)
    return pitch is not None and t.data_ptr() % 16 == 0 and pitch * t.element_size() % 16 == 0


def _image(t: Tensor | None) -> Tensor | None:
    """`t` as the kernels read it: NHWC or a slice of its channels, aligned; copied if it is not."""
    if t is None:
        return None
    t = nhwc_slice(t)
    return t if _aligned(t) else nhwc(t.clone(memory_format=torch.channels_last))


def _weight(weight: Tensor) -> Tensor:
    """[K, R, S, C] in memory; a copy is kept with the weight."""
    dense = nhwc(weight)  # a view where that is possible
    if dense.data_ptr() == weight.data_ptr() and dense.data_ptr() % 16 == 0:
        return dense
    return packed(weight, ("cuda", "krsc"), lambda: nhwc(weight.clone(memory_format=torch.channels_last)))


def _vector(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _aligned_vector(t: Tensor | None) -> Tensor | None:
    """As the prologue reads it: four numbers at a time."""
    t = _vector(t)
    return t if t is None or t.data_ptr() % 16 == 0 else t.clone()


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
) -> Tensor:
    """`activation(conv(relu(x * in_scale + in_shift), weight) * scale + shift + residual)`.

    Args:
        x: [N, C, H, W], float32 (computed in TF32), bfloat16 or float16.
        weight: [K, C, R, S] of x's dtype.
        scale: float32 [K], None for ones.
        shift: float32 [K].
        residual: None, or of the output's shape and x's dtype.
        in_scale: float32 [C], None with in_shift for no prologue. The padding is zero after it.
        in_shift: float32 [C].
        stride: vertical, horizontal; as padding and dilation.
        padding: zeros on each side.
        dilation: distance between taps.
        groups: 1.
        activation: `"relu"` or `"none"`.
        algorithm: from `candidates`, or the name of a compiled kernel.
        out: where to write: [N, K, P, Q], channels_last or a slice of its channels; None for a new tensor.

    Returns:
        `out`, or [N, K, P, Q] of x's dtype, channels_last.
    """
    tensors = (
        _image(x),
        _weight(weight),
        _vector(scale),
        shift.contiguous(),
        _image(residual),
        _aligned_vector(in_scale),
        _aligned_vector(in_shift),
    )
    geometry = (stride, padding, dilation, activation == "relu", algorithm)
    if out is not None and _aligned(out):
        torch.ops.resnet_fused._cuda_conv_out.default(*tensors, *geometry, out)
        return out
    y = torch.ops.resnet_fused._cuda_conv.default(*tensors, None, None, None, 1, *geometry)
    return y if out is None else out.copy_(y)


def _layer(x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor, stride: int, dilation: int = 1) -> Tensor:
    """A layer inside a block: padded to keep the size, ReLU, the best algorithm."""
    padding = dilation * (weight.shape[2] // 2)
    geometry: dict[str, Any] = {"stride": (stride,) * 2, "padding": (padding,) * 2, "dilation": (dilation,) * 2}
    return conv_bn_act(x, weight, scale, shift, None, groups=1, activation="relu", algorithm="", **geometry)


def _last_layer(
    h: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    x: Tensor,
    projection: tuple[Tensor, Tensor | None, Tensor],
    stride: int,
    dilation: int = 1,
) -> Tensor:
    """`relu(conv(h) * scale + shift + conv1x1(x) * sd + bd)`, both convolutions in one kernel."""
    wd, sd, bd = projection
    padding = dilation * (weight.shape[2] // 2)
    return torch.ops.resnet_fused._cuda_conv.default(
        _image(h),
        _weight(weight),
        _vector(scale),
        packed(shift, ("cuda", "sum"), lambda: shift + bd, bd),
        None,
        None,
        None,
        _image(x),
        _weight(wd),
        _vector(sd),
        stride,
        (1, 1),
        (padding,) * 2,
        (dilation,) * 2,
        True,
        "",  # the best of those that take a projection
    )


def bottleneck(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    wd: Tensor | None,
    bd: Tensor | None,
    s1: Tensor | None,
    s2: Tensor | None,
    s3: Tensor | None,
    sd: Tensor | None,
    *,
    stride1: int,
    stride2: int,
    dilation: int,
    algorithm: str,
) -> Tensor:
    """1x1 (stride1), 3x3 (stride2, dilation), 1x1, plus x or its projection, ReLU after each; see `Candidate`.

    Args are those of `rf.ops.bottleneck`; the output is channels_last.
    """
    if algorithm == "dual":
        assert wd is not None and bd is not None
        h = _layer(_layer(x, w1, s1, b1, stride1), w2, s2, b2, stride2, dilation)
        return _last_layer(h, w3, s3, b3, x, (wd, sd, bd), stride1 * stride2)
    return torch.ops.resnet_fused._cuda_bottleneck.default(
        _image(x),
        *(_weight(w1), _vector(s1), b1.contiguous()),
        *(_weight(w2), _vector(s2), b2.contiguous()),
        *(_weight(w3), _vector(s3), b3.contiguous()),
        *(None if wd is None else _weight(wd), _vector(sd), _vector(bd)),
        stride1,
        stride2,
        dilation,
        algorithm,
    )


def basic_block(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    wd: Tensor | None,
    bd: Tensor | None,
    s1: Tensor | None,
    s2: Tensor | None,
    sd: Tensor | None,
    *,
    stride: int,
    dilation: int,
    algorithm: str,
) -> Tensor:
    """3x3 (stride, dilation), 3x3 (dilation), plus x or its projection, ReLU after each; see `Candidate`.

    Args are those of `rf.ops.basic_block`; the output is channels_last.
    """
    if algorithm == "dual":
        assert wd is not None and bd is not None
        h = _layer(x, w1, s1, b1, stride, dilation)
        return _last_layer(h, w2, s2, b2, x, (wd, sd, bd), stride, dilation)
    return torch.ops.resnet_fused._cuda_basic_block.default(
        _image(x),
        *(_weight(w1), _vector(s1), b1.contiguous()),
        *(_weight(w2), _vector(s2), b2.contiguous()),
        *(None if wd is None else _weight(wd), _vector(sd), _vector(bd)),
        stride,
        dilation,
        algorithm,
    )


def _rotated(
    h1: Tensor,
    w2: Tensor,
    s2: Tensor | None,
    b2: Tensor,
    w3: Tensor,
    s3: Tensor | None,
    b3: Tensor,
    x: Tensor,
    w1: Tensor | None,
    s1: Tensor | None,
    b1: Tensor | None,
    *,
    algorithm: str,
) -> tuple[Tensor, Tensor | None]:
    """A block's output y from its first 1x1's h1, and the next block's h1; None without w1.

    y = relu(conv1x1(relu(conv3x3(h1, w2) * s2 + b2), w3) * s3 + b3 + x), next h1 = relu(conv1x1(y, w1) * s1 + b1).
    """
    y, *next_h1 = torch.ops.resnet_fused._cuda_rotated.default(
        _image(h1),
        *(_weight(w2), _vector(s2), b2.contiguous()),
        *(_weight(w3), _vector(s3), b3.contiguous()),
        _image(x),
        *(None if w1 is None else _weight(w1), _vector(s1), _vector(b1)),
        algorithm,
    )
    return y, next_h1[0] if next_h1 else None


def bottleneck_chain(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    shifts: Sequence[Tensor],
    *,
    algorithm: str,
) -> Tensor:
    """Identity bottlenecks one after the other: the first 1x1 as a layer, then a launch a block; see `Candidate`.

    Args are those of `rf.ops.bottleneck_chain`; the output is channels_last.
    """
    layers = list(zip(weights, scales, shifts, strict=True))
    h1: Tensor | None = _layer(x, *layers[0], 1)
    for i in range(0, len(layers), 3):
        assert h1 is not None
        following = layers[i + 3] if i + 3 < len(layers) else (None, None, None)
        x, h1 = _rotated(h1, *layers[i + 1], *layers[i + 2], x, *following, algorithm=algorithm)
    return x


def stem(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    *,
    stride: int,
    padding: int,
    pool_kernel: int,
    pool_stride: int,
    pool_padding: int,
    algorithm: str,
) -> Tensor:
    """Layer with ReLU, then max pooling; the output is channels_last."""
    return torch.ops.resnet_fused._cuda_stem.default(
        nhwc_slice(x),
        _weight(weight),
        _vector(scale),
        shift.contiguous(),
        stride,
        padding,
        pool_kernel,
        pool_stride,
        pool_padding,
        algorithm,
    )
