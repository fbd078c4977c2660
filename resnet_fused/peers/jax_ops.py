"""ATen operators in JAX: those that the models of the comparison consist of, and no more. Imports jax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import jax
import torch
from jax import lax
from jax import numpy as jnp
from torch import fx

aten = torch.ops.aten
NHWC, NCHW = (0, 2, 3, 1), (0, 3, 1, 2)  # permutations of the other layout's axes


class Lowered(fx.Interpreter):
    """Runs a graph of ATen operators on JAX's arrays, under `jax.jit`: 4-D activations are NHWC, 4-D weights HWIO.

    The weights become constants, so that XLA can bring them into its own layout when it compiles.

    Raises:
        NotImplementedError: an operator, or an argument of one, is not among those of this module.
    """

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> jax.Array:
        """A weight."""
        weight = attrgetter(target)(self.module).detach()
        return array(weight.permute(2, 3, 1, 0) if weight.dim() == 4 else weight)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An operator's result."""
        if target not in OPERATORS:
            raise NotImplementedError(f"{target} is not translated to JAX")
        return OPERATORS[target](*args, **kwargs)


def array(tensor: torch.Tensor) -> jax.Array:
    """JAX's view of a tensor's memory, or of a copy where the layout asks for one."""
    return jnp.from_dlpack(tensor.contiguous())


def refuse(**arguments: object) -> None:
    """Raise NotImplementedError for an argument that is not what a model without it would have."""
    for name, value in arguments.items():
        if value:
            raise NotImplementedError(f"{name}={value} is not translated to JAX")


def axis(x: jax.Array, dim: int) -> int:
    """The axis of NHWC that a dimension of NCHW is; that of anything but an image is the same."""
    return NCHW[dim % 4] if x.ndim == 4 else dim


def conv2d(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> jax.Array:
    """Convolution."""
    y = lax.conv_general_dilated(
        x,
        weight,
        tuple(stride),
        [(p, p) for p in padding],
        rhs_dilation=tuple(dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    return y if bias is None else y + bias


def batch_norm(
    x: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    mean: jax.Array,
    variance: jax.Array,
    training: bool,
    momentum: float,
    eps: float,
    cudnn: bool,
) -> jax.Array:
    """BatchNorm that no convolution could take, in float32; its scale and shift are constants."""
    refuse(training=training)
    scale = lax.rsqrt(variance.astype(jnp.float32) + eps)
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    shift = shift if bias is None else shift + bias
    return (x * scale + shift).astype(x.dtype)


def window(x: jax.Array, start: Any, reduce: Any, size: Any, stride: Any, padding: Any) -> jax.Array:
    """Reduce every window of an image."""
    around = ((0, 0), *((p, p) for p in padding), (0, 0))
    return lax.reduce_window(x, start, reduce, (1, *size, 1), (1, *(stride or size), 1), around)


def max_pool2d(
    x: jax.Array,
    size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> jax.Array:
    """Max pooling."""
    refuse(dilation=set(dilation) - {1}, ceil_mode=ceil_mode)
    return window(x, -jnp.inf, lax.max, size, stride, padding)


def avg_pool2d(
    x: jax.Array,
    size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> jax.Array:
    """Average pooling, summed in float32; padding counts as zeros."""
    refuse(ceil_mode=ceil_mode, count_without_pad=any(padding) and not count_include_pad, divisor=divisor)
    total = window(x.astype(jnp.float32), 0.0, lax.add, size, stride, padding)
    return (total / (size[0] * size[1])).astype(x.dtype)


def adaptive_avg_pool2d(x: jax.Array, size: Sequence[int]) -> jax.Array:
    """Average pooling to a size that divides the image's."""
    height, width = x.shape[1:3]
    refuse(remainder=height % size[0] or width % size[1])
    if tuple(size) == (1, 1):
        return x.mean((1, 2), keepdims=True)
    return avg_pool2d(x, (height // size[0], width // size[1]))


def mean(x: jax.Array, dims: Sequence[int], keepdim: bool = False) -> jax.Array:
    """Mean over dimensions that are an image's height and width."""
    refuse(dims=x.ndim != 4 or {dim % 4 for dim in dims} != {2, 3})
    return x.mean((1, 2), keepdims=keepdim)


def flatten(x: jax.Array, start: int = 0, end: int = -1) -> jax.Array:
    """Flatten in the order of NCHW."""
    x = x.transpose(NCHW) if x.ndim == 4 else x
    return x.reshape(*x.shape[:start], -1, *x.shape[end % x.ndim + 1 :])


def linear(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Linear layer."""
    y = x @ weight.T
    return y if bias is None else y + bias


def cat(parts: Sequence[jax.Array], dim: int = 0) -> jax.Array:
    """Concatenation."""
    return jnp.concatenate(parts, axis(parts[0], dim))


def slice_(x: jax.Array, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> jax.Array:
    """Part of a dimension."""
    part: list[slice] = [slice(None)] * x.ndim
    part[axis(x, dim)] = slice(start, end, step)
    return x[tuple(part)]


def pad(x: jax.Array, around: Sequence[int], mode: str = "constant", value: float | None = None) -> jax.Array:
    """Constants around the last dimensions; `around` begins with the last one's."""
    refuse(mode=mode != "constant")
    widths = [(0, 0, 0)] * x.ndim
    for index in range(len(around) // 2):
        widths[axis(x, x.ndim - 1 - index)] = (around[2 * index], around[2 * index + 1], 0)
    return lax.pad(x, jnp.array(value or 0.0, x.dtype), widths)


def dropout(x: jax.Array, share: float, training: bool) -> jax.Array:
    """Nothing, as it is outside training."""
    refuse(training=training)
    return x


OPERATORS: dict[Any, Callable[..., Any]] = {
    aten.conv2d.default: conv2d,
    aten.batch_norm.default: batch_norm,
    aten.relu.default: lambda x: jnp.maximum(x, 0),
    aten.add.Tensor: jnp.add,
    aten.max_pool2d.default: max_pool2d,
    aten.avg_pool2d.default: avg_pool2d,
    aten.adaptive_avg_pool2d.default: adaptive_avg_pool2d,
    aten.mean.dim: mean,
    aten.flatten.using_ints: flatten,
    aten.linear.default: linear,
    aten.cat.default: cat,
    aten.slice.Tensor: slice_,
    aten.pad.default: pad,
    aten.dropout.default: dropout,
}
