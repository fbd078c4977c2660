"""Triton's interpreter (TRITON_INTERPRET=1: kernels run in numpy, on CPU tensors) with its arithmetic repaired.

As it comes, it multiplies and adds the bit patterns of bfloat16 as integers, truncates where a GPU rounds to nearest,
and computes TF32 products in full float32. `install` mends all three, so that what a kernel computes here is what a GPU
computes, up to the order of its sums; and it drops two thirds of the interpreter's own work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter as stock

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in the interpreter: fixed when this is imported, as `triton.jit` decides then."""


def widen_bf16(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns (uint16) as float32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest bfloat16, ties to even, as bit patterns (uint16). NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def truncate_to_tf32(values: np.ndarray) -> np.ndarray:
    """float32 as TF32 matrix instructions see it: they drop the low 13 bits of what they are given."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return np.where(np.isnan(values), values, (bits & np.uint32(0xFFFFE000)).view(np.float32))


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _dot(original: Callable[..., Any], builder: Any, a: Any, b: Any, d: Any, precision: Any, *rest: Any) -> Any:
    if _is_bf16(a) and _is_bf16(b):
        left, right = widen_bf16(a.data), widen_bf16(b.data)
    elif a.dtype.scalar == tl.float32 and str(precision).rsplit(".", 1)[-1].upper() == "TF32":
        left, right = truncate_to_tf32(a.data), truncate_to_tf32(b.data)
    elif a.dtype.scalar == tl.float16 and d.dtype.scalar == tl.float32:
        left, right = a.data.astype(np.float32), b.data.astype(np.float32)
    else:
        return original(builder, a, b, d, precision, *rest)
    return stock.TensorHandle((left @ right + d.data).astype(d.data.dtype), d.dtype.scalar)


def _binary(original: Callable[..., Any], builder: Any, lhs: Any, rhs: Any, op: Callable[..., Any]) -> Any:
    if not (_is_bf16(lhs) and _is_bf16(rhs)):
        return original(builder, lhs, rhs, op)
    result = op(widen_bf16(lhs.data), widen_bf16(rhs.data))
    if result.dtype == np.bool_:
        return stock.TensorHandle(result, lhs.dtype.scalar)
    return stock.TensorHandle(round_to_bf16(result), tl.bfloat16)


def _unary(original: Callable[..., Any], builder: Any, arg: Any, op: Callable[..., Any]) -> Any:
    if _is_bf16(arg):
        return stock.TensorHandle(round_to_bf16(op(widen_bf16(arg.data))), tl.bfloat16)
    return original(builder, arg, op)


def _cast(original: Callable[..., Any], builder: Any, src: Any, target: Any) -> Any:
    source, wanted = src.dtype.scalar, target.scalar
    if source == tl.bfloat16 and wanted != tl.bfloat16:
        return stock.TensorHandle(widen_bf16(src.data).astype(stock._get_np_dtype(target)), wanted)
    if wanted == tl.bfloat16 and source != tl.bfloat16:
        return stock.TensorHandle(round_to_bf16(src.data.astype(np.float32)), wanted)
    return original(builder, src, target)


def _cast_float(original: Callable[..., Any], builder: Any, src: Any, target: Any, rounding: Any) -> Any:
    types = (src.dtype.scalar, target.scalar)
    if tl.bfloat16 in types and all(t.primitive_bitwidth >= 16 for t in types):
        return builder.cast_impl(src, target)
    return original(builder, src, target, rounding)


_REPAIRS: dict[str, Callable[..., Any]] = {
    "create_dot": _dot,
    "binary_op": _binary,
    "unary_op": _unary,
    "cast_impl": _cast,
    "create_fp_to_fp": _cast_float,
}


_readied: set[Any] = set()


def _call_device_function(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a jitted function from a kernel, readying `triton.language` for it once, not at every call."""
    if function.fn not in _readied:
        stock._patch_lang(function.fn)
        _readied.add(function.fn)
    return function.rewrite()(*args, **kwargs)


def _check_overflow(original: Callable[..., Any], *operation: Any) -> None:
    """Compute the condition of an integer operation's assertion only where assertions are on."""
    if stock.interpreter_builder.options.debug:
        original(*operation)


def _patch_tensor(original: Callable[..., None], tensor: Any, *scope: Any) -> None:
    """Let numpy 2.4 and newer read the bounds of a loop, arrays of one element, as Triton 3.6 expects."""
    original(tensor, *scope)
    tensor.__index__ = lambda number: int(number.handle.data.item())


@functools.cache
def install() -> None:
    """Mend the interpreter of this process; a second call does nothing."""
    for name, repair in _REPAIRS.items():
        original = getattr(stock.InterpreterBuilder, name)

        def mended(builder: Any, *args: Any, _repair: Any = repair, _original: Any = original) -> Any:
            with np.errstate(all="ignore"):  # a GPU does not report overflow
                return _repair(_original, builder, *args)

        setattr(stock.InterpreterBuilder, name, mended)
    stock.InterpretedFunction.__call__ = _call_device_function
    stock._patch_lang_tensor = functools.partial(_patch_tensor, stock._patch_lang_tensor)
    semantic = stock.interpreter_semantic
    semantic.binary_op_sanitize_overflow_impl = functools.partial(
        _check_overflow, semantic.binary_op_sanitize_overflow_impl
    )
