"""The CUDA kernels on the CPU, for tests: every kernel of csrc/cuda compiled by the host compiler over an emulator.

`conv_bn_act`, `bottleneck`, `basic_block`, `rotated` and `stem` take torch tensors as the backends do, build the same
parameters as the registration does and run the kernel that is asked for by name, or the one that the table would
choose.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cmake_tree
import pytest
import torch
from torch import Tensor

from resnet_fused.kernels.layout import nhwc, nhwc_slice, pixel_pitch
from resnet_fused.shapes import conv_out

ROOT = cmake_tree.ROOT
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""In the order of the library's DType."""

A100 = (80, 108, 163 * 1024)
H100 = (90, 132, 227 * 1024)
"""Compute capability times 10, multiprocessors, most dynamic shared memory of a block."""


@functools.cache
def _toolkit() -> bool:
    script = "set(Python_EXECUTABLE {})\ninclude({})\nif(NOT CUDA_INCLUDE)\nmessage(FATAL_ERROR)\nendif()"
    if not shutil.which("cmake"):
        return False
    with tempfile.NamedTemporaryFile("w", suffix=".cmake") as file:
        file.write(script.format(sys.executable, ROOT / "csrc/cuda/toolkit.cmake"))
        file.flush()
        return subprocess.run(["cmake", "-P", file.name], capture_output=True).returncode == 0


needs_toolkit = pytest.mark.skipif(
    not (_toolkit() and shutil.which("ninja") and shutil.which(os.environ.get("CXX", "c++"))),
    reason="needs cmake, ninja, a C++ compiler and CUDA's headers (CUDA_HOME, or PyPI's; see docs/cuda.md)",
)


def build(name: str, target: str, flags: str = "-O2", sanitize: str = "") -> Path:
    """The build tree of one variant of the emulated kernels, in build/; a second run compiles only what changed.

    Args:
        name: of the variant.
        target: `"cuda_emulated"` (the shared library), or the name of a tests/cuda/test_*.cpp.
        flags: of the compiler. Sanitizers take minutes to compile at -O3.
        sanitize: what goes to -fsanitize=.
    """
    options = [
        "-DRESNET_FUSED_CUDA_TESTS=ON",
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
        f"-DCMAKE_CXX_FLAGS_RELWITHDEBINFO={flags}",
        f"-DRESNET_FUSED_SANITIZE={sanitize}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    return cmake_tree.build(f"cuda-{name}", options, target)


def _fields(*groups: tuple[str, Any]) -> list[tuple[str, Any]]:
    return [(name, kind) for names, kind in groups for name in names.split()]


class _Layer(ctypes.Structure):
    _fields_ = _fields(("weight scale shift", ctypes.c_void_p))


class _Projection(ctypes.Structure):
    _fields_ = _fields(
        ("x", ctypes.c_void_p),
        ("x_pitch", ctypes.c_int64),
        ("weight scale", ctypes.c_void_p),
        ("h w c stride", ctypes.c_int),
    )


_CONV_SIZES = "n h w c k r s stride_h stride_w pad_h pad_w dil_h dil_w p q"


class _Conv(ctypes.Structure):
    _fields_ = _fields(
        ("dtype", ctypes.c_int),
        ("x", ctypes.c_void_p),
        ("x_pitch", ctypes.c_int64),
        ("conv", _Layer),
        ("residual", ctypes.c_void_p),
        ("residual_pitch", ctypes.c_int64),
        ("in_scale in_shift out", ctypes.c_void_p),
        ("out_pitch", ctypes.c_int64),
        (_CONV_SIZES, ctypes.c_int),
        ("relu", ctypes.c_bool),
        ("projection", _Projection),
    )


_IMAGE = (("dtype", ctypes.c_int), ("x", ctypes.c_void_p), ("x_pitch", ctypes.c_int64))
_OUT = (("out", ctypes.c_void_p), ("out_pitch", ctypes.c_int64))


class _Bottleneck(ctypes.Structure):
    _fields_ = _fields(
        *_IMAGE,
        ("conv1 conv2 conv3 projection", _Layer),
        *_OUT,
        ("n h w c mid k stride1 stride2 dilation p q", ctypes.c_int),
    )


class _BasicBlock(ctypes.Structure):
    _fields_ = _fields(
        *_IMAGE, ("conv1 conv2 projection", _Layer), *_OUT, ("n h w c mid k stride dilation p q", ctypes.c_int)
    )


class _Rotated(ctypes.Structure):
    _fields_ = _fields(
        ("dtype", ctypes.c_int),
        *(("h1", ctypes.c_void_p), ("h1_pitch", ctypes.c_int64), ("x", ctypes.c_void_p), ("x_pitch", ctypes.c_int64)),
        ("conv2 conv3 conv1", _Layer),
        *(("y", ctypes.c_void_p), ("y_pitch", ctypes.c_int64)),
        *(("h1_next", ctypes.c_void_p), ("h1_next_pitch", ctypes.c_int64)),
        ("n h w mid k", ctypes.c_int),
    )


class _Stem(ctypes.Structure):
    _fields_ = _fields(
        *_IMAGE,
        ("conv", _Layer),
        *_OUT,
        ("n h w c k r s stride pad pool_kernel pool_stride pool_padding conv_p conv_q p q", ctypes.c_int),
    )


class _Device(ctypes.Structure):
    _fields_ = _fields(("arch multiprocessors shared_bytes", ctypes.c_int))


PARAMS = {
    "conv": _Conv,
    "bottleneck": _Bottleneck,
    "basic_block": _BasicBlock,
    "bottleneck_chain": _Rotated,
    "stem": _Stem,
}


@functools.cache
def library() -> ctypes.CDLL:
    """The emulated kernels, built on the first call."""
    loaded = ctypes.CDLL(str(build("emulated", "cuda_emulated") / "libcuda_emulated.so"))
    loaded.emulated_kernels.restype = ctypes.c_char_p
    loaded.emulated_options.restype = ctypes.c_char_p
    loaded.emulated_options.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint64, ctypes.c_int]
    for op, params in PARAMS.items():
        size = getattr(loaded, f"emulated_{op}_size")
        size.restype = ctypes.c_size_t
        assert size() == ctypes.sizeof(params), f"{params.__name__} is not what csrc/cuda/api.h has"
        getattr(loaded, f"emulated_{op}").restype = ctypes.c_char_p
        getattr(loaded, f"emulated_{op}_choice").restype = ctypes.c_char_p
    return loaded


@dataclass(frozen=True)
class Kernel:
    """A row of the table of kernels; see Kernel in csrc/cuda/api.h."""

    op: str
    name: str
    algorithm: str
    arch: int
    dtype: torch.dtype
    tile: tuple[int, int, int]
    stages: int
    threads: int
    shared_bytes: int


@functools.cache
def kernels(op: str | None = None, arch: int | None = None) -> list[Kernel]:
    """All compiled kernels, or those of an op or architecture (80, 90)."""
    rows = []
    for line in library().emulated_kernels().decode().splitlines():
        name, kernel, algorithm, *numbers = line.split()
        a, dtype, m, n, k, stages, threads, shared = map(int, numbers)
        rows.append(Kernel(name, kernel, algorithm, a, DTYPES[dtype], (m, n, k), stages, threads, shared))
    return [row for row in rows if op in (None, row.op) and arch in (None, row.arch)]


class EmulatedError(RuntimeError):
    """No kernel can run this, or the emulator caught a violation."""


def options(order: str = "forward", async_: str = "late", seed: int = 1, threads: int = 1) -> None:
    """How the following calls are executed; see tests/cuda/emulator.h."""
    _raise(library().emulated_options(order.encode(), async_.encode(), seed, threads))


def _raise(message: bytes | None) -> None:
    if message is not None:
        raise EmulatedError(message.decode())


def _run(op: str, params: ctypes.Structure, kernel: str, device: tuple[int, int, int]) -> None:
    call = getattr(library(), f"emulated_{op}")
    _raise(call(ctypes.byref(params), ctypes.byref(_Device(*device)), kernel.encode()))


def _choice(op: str, params: ctypes.Structure, kernel: str, device: tuple[int, int, int]) -> str:
    name = ctypes.create_string_buffer(256)
    call = getattr(library(), f"emulated_{op}_choice")
    _raise(call(ctypes.byref(params), ctypes.byref(_Device(*device)), kernel.encode(), name, 256))
    return name.value.decode()


class _Pointers:
    """Pointers into tensors, which are kept for as long as this is."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def __call__(self, t: Tensor | None) -> int | None:
        if t is None:
            return None
        self.kept.append(t)
        return t.data_ptr()

    def image(self, t: Tensor) -> tuple[int | None, int]:
        t = nhwc_slice(t)
        pitch = pixel_pitch(t)
        assert pitch is not None
        return self(t), pitch

    def layer(self, weight: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> _Layer:
        return _Layer(self(None if weight is None else nhwc(weight)), self(scale), self(shift))


def _output(n: int, k: int, p: int, q: int, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    if out is None:
        out = torch.full((n, k, p, q), float("nan"), dtype=dtype).contiguous(memory_format=torch.channels_last)
    return out


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    residual: Tensor | None = None,
    in_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str = "relu",
    projection: tuple[Tensor, Tensor, Tensor | None, int] | None = None,
    out: Tensor | None = None,
    kernel: str = "",
    device: tuple[int, int, int] = A100,
    only_choose: bool = False,
) -> Any:
    """One layer by a CUDA kernel, the output NaN beforehand. Arguments are those of `rf.ops.conv_bn_act` and more.

    `projection` is (x2 [N, C2, H2, W2], weight2 [K, C2, 1, 1], scale2 [K] or None, stride) of a dual accumulation;
    `out` the channel slice to write into; `kernel` the name of a kernel or algorithm, empty for the table's own choice;
    `device` what to choose for; with `only_choose` nothing runs and the kernel's name is returned.
    """

    def pair(value: int | Sequence[int]) -> tuple[int, int]:
        return (value, value) if isinstance(value, int) else (value[0], value[1])

    n, c, h, w = x.shape
    k, _, r, s = weight.shape
    (stride_h, stride_w), (pad_h, pad_w), (dil_h, dil_w) = pair(stride), pair(padding), pair(dilation)
    p, q = conv_out(h, r, stride_h, pad_h, dil_h), conv_out(w, s, stride_w, pad_w, dil_w)
    out = _output(n, k, p, q, x.dtype, out)
    at = _Pointers()
    params = _Conv(DTYPES.index(x.dtype), *at.image(x), at.layer(weight, scale, shift))
    if residual is not None:
        params.residual, params.residual_pitch = at.image(residual)
    params.in_scale, params.in_shift = at(in_scale), at(in_shift)
    params.out, params.out_pitch = at.image(out)
    numbers = (n, h, w, c, k, r, s, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, p, q)
    for name, value in zip(_CONV_SIZES.split(), numbers, strict=True):
        setattr(params, name, value)
    params.relu = activation == "relu"
    if projection is not None:
        x2, weight2, scale2, stride2 = projection
        _, c2, h2, w2 = x2.shape
        params.projection = _Projection(*at.image(x2), at(nhwc(weight2)), at(scale2), h2, w2, c2, stride2)
    if only_choose:
        return _choice("conv", params, kernel, device)
    _run("conv", params, kernel, device)
    return out


def bottleneck(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    wd: Tensor | None = None,
    bd: Tensor | None = None,
    s1: Tensor | None = None,
    s2: Tensor | None = None,
    s3: Tensor | None = None,
    sd: Tensor | None = None,
    *,
    stride1: int = 1,
    stride2: int = 1,
    dilation: int = 1,
    kernel: str = "",
    device: tuple[int, int, int] = A100,
    only_choose: bool = False,
) -> Any:
    """A whole bottleneck by a CUDA kernel; see `conv_bn_act` for `kernel`, `device` and `only_choose`."""
    n, c, h, w = x.shape
    mid, k = w1.shape[0], w3.shape[0]
    p, q = (conv_out(conv_out(size, 1, stride1, 0), 3, stride2, dilation, dilation) for size in (h, w))
    out = _output(n, k, p, q, x.dtype, None)
    at = _Pointers()
    layers = [at.layer(w1, s1, b1), at.layer(w2, s2, b2), at.layer(w3, s3, b3), at.layer(wd, sd, bd)]
    sizes = (n, h, w, c, mid, k, stride1, stride2, dilation, p, q)
    params = _Bottleneck(DTYPES.index(x.dtype), *at.image(x), *layers, *at.image(out), *sizes)
    if only_choose:
        return _choice("bottleneck", params, kernel, device)
    _run("bottleneck", params, kernel, device)
    return out


def basic_block(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    wd: Tensor | None = None,
    bd: Tensor | None = None,
    s1: Tensor | None = None,
    s2: Tensor | None = None,
    sd: Tensor | None = None,
    *,
    stride: int = 1,
    dilation: int = 1,
    kernel: str = "",
    device: tuple[int, int, int] = A100,
    only_choose: bool = False,
) -> Any:
    """A whole basic block by a CUDA kernel; see `conv_bn_act` for `kernel`, `device` and `only_choose`."""
    n, c, h, w = x.shape
    mid, k = w1.shape[0], w2.shape[0]
    p, q = (conv_out(size, 3, stride, dilation, dilation) for size in (h, w))
    out = _output(n, k, p, q, x.dtype, None)
    at = _Pointers()
    layers = [at.layer(w1, s1, b1), at.layer(w2, s2, b2), at.layer(wd, sd, bd)]
    sizes = (n, h, w, c, mid, k, stride, dilation, p, q)
    params = _BasicBlock(DTYPES.index(x.dtype), *at.image(x), *layers, *at.image(out), *sizes)
    if only_choose:
        return _choice("basic_block", params, kernel, device)
    _run("basic_block", params, kernel, device)
    return out


def rotated(
    h1: Tensor,
    w2: Tensor,
    s2: Tensor | None,
    b2: Tensor,
    w3: Tensor,
    s3: Tensor | None,
    b3: Tensor,
    x: Tensor,
    w1: Tensor | None = None,
    s1: Tensor | None = None,
    b1: Tensor | None = None,
    *,
    kernel: str = "",
    device: tuple[int, int, int] = H100,
    only_choose: bool = False,
) -> Any:
    """One launch of a chain: (y, the next h1 or None without w1); see `conv_bn_act` for the options."""
    n, mid, h, w = h1.shape
    k = x.shape[1]
    y, next_h1 = _output(n, k, h, w, x.dtype, None), None if w1 is None else _output(n, mid, h, w, x.dtype, None)
    at = _Pointers()
    params = _Rotated(
        DTYPES.index(x.dtype),
        *at.image(h1),
        *at.image(x),
        *(at.layer(w2, s2, b2), at.layer(w3, s3, b3), at.layer(w1, s1, b1)),
        *at.image(y),
        *((None, 0) if next_h1 is None else at.image(next_h1)),
        *(n, h, w, mid, k),
    )
    if only_choose:
        return _choice("bottleneck_chain", params, kernel, device)
    _run("bottleneck_chain", params, kernel, device)
    return y, next_h1


def stem(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    *,
    stride: int = 2,
    padding: int = 3,
    pool_kernel: int = 3,
    pool_stride: int = 2,
    pool_padding: int = 1,
    kernel: str = "",
    device: tuple[int, int, int] = A100,
    only_choose: bool = False,
) -> Any:
    """Layer and max pooling by a CUDA kernel; see `conv_bn_act` for `kernel`, `device` and `only_choose`."""
    n, c, h, w = x.shape
    k, _, r, s = weight.shape
    conv_p, conv_q = conv_out(h, r, stride, padding), conv_out(w, s, stride, padding)
    p, q = (conv_out(size, pool_kernel, pool_stride, pool_padding) for size in (conv_p, conv_q))
    out = _output(n, k, p, q, x.dtype, None)
    at = _Pointers()
    pool = (pool_kernel, pool_stride, pool_padding)
    sizes = (n, h, w, c, k, r, s, stride, padding, *pool, conv_p, conv_q, p, q)
    params = _Stem(DTYPES.index(x.dtype), *at.image(x), at.layer(weight, scale, shift), *at.image(out), *sizes)
    if only_choose:
        return _choice("stem", params, kernel, device)
    _run("stem", params, kernel, device)
    return out
