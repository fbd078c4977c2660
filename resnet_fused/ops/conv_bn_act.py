"""One layer: optional prologue, convolution, scale and shift, optional residual, activation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import plan
from ..kernels import cudnn, reference, vendor
from ..kernels.layout import nhwc
from ..kernels.native import library
from ..settings import one_of, resolve_backend
from ..shapes import Conv, Pair
from . import _common as common
from ._common import Spec, optional_spec, spec

ACTIVATIONS = ("relu", "none")

TORCH_LAYERS = {"onednn": vendor.conv_bn_act, "cudnn": cudnn.conv_bn_act, "torch": reference.conv_bn_act}
"""The algorithms that are operators of torch."""

library.define(
    "conv_bn_act(Tensor x, Tensor weight, Tensor? scale, Tensor shift, Tensor? residual=None, Tensor? in_scale=None, "
    "Tensor? in_shift=None, *, int[2] stride=1, int[2] padding=0, int[2] dilation=1, int groups=1, "
    "str activation='relu', str backend='auto', str accuracy='strict') -> Tensor"
)


@common.typed
def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    residual: Tensor | None = None,
    in_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    activation: str = "relu",
    backend: str = "auto",
    accuracy: str = "strict",
) -> Tensor:
    """`activation(conv(x, weight) * scale + shift + residual)`, accumulated in float32 and rounded once.

    With `in_scale` and `in_shift` the convolution reads `relu(x * in_scale + in_shift)` instead of x, padded after it:
    the BatchNorm and ReLU before a convolution, as in pre-activation networks.

    Args:
        x: [N, C, H, W], float32, bfloat16, float16 or float64, any strides.
        weight: [K, C / groups, R, S], dtype and device of x.
        scale: float32 [K], None for ones.
        shift: float32 [K].
        residual: None, or of the output's shape and x's dtype, any strides.
        in_scale: float32 [C], together with in_shift; None for no prologue.
        in_shift: float32 [C].
        stride: one number or (vertical, horizontal), as are padding and dilation.
        padding: zeros on each side.
        dilation: distance between taps.
        groups: as in `torch.nn.functional.conv2d`.
        activation: `"relu"` (NaN passes on) or `"none"`.
        backend: `"auto"`, or one by name: an error if it is missing or cannot run this.
        accuracy: `"strict"`, or `"fast"` to allow float32 Winograd F(4x4, 3x3).

    Returns:
        [N, K, P, Q] of x's dtype, channels_last if x is, else contiguous. Differentiable.

    Raises:
        InputError: an argument does not fit the others.
        BackendError: the backend asked for by name cannot run this.
    """
    return torch.ops.resnet_fused.conv_bn_act.default(
        x,
        weight,
        scale,
        shift,
        residual,
        in_scale,
        in_shift,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        activation=activation,
        backend=resolve_backend(backend),
        accuracy=accuracy,
    )


def _check(
    x: Spec,
    weight: Spec,
    scale: Spec | None,
    shift: Spec,
    residual: Spec | None,
    in_scale: Spec | None,
    in_shift: Spec | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    backend: str,
    accuracy: str,
) -> Conv:
    common.check_choices(backend, accuracy)
    one_of("activation", activation, ACTIVATIONS)
    common.check_input(x)
    common.check_pair(1, stride=stride, dilation=dilation)
    common.check_pair(0, padding=padding)
    common.check_number(1, groups=groups)
    n, c, h, w = x[0]
    common.check_weight("weight", weight, x, c, groups)
    k, _, r, s = weight[0]
    common.check_vector("scale", scale, x, k)
    common.check_vector("shift", shift, x, k)
    common.check_prologue(x, in_scale, in_shift)
    common.check_window("weight", (h, w), (r, s), stride, padding, dilation)
    pairs = (tuple(stride), tuple(padding), tuple(dilation))
    shape = Conv(n, c, h, w, k, r, s, *pairs, groups, residual is not None, in_scale is not None)  # type: ignore[arg-type]
    if residual is not None:
        common.check_like("residual", residual, x, shape.output_shape)
    return shape


@functools.lru_cache(maxsize=4096)
def _prepare(x: Spec, *arguments: Any) -> plan.Choice:
    *checked, state = arguments
    return plan.choose(_check(x, *checked), x[1], x[2], *checked[-2:], state)


def run(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    residual: Tensor | None = None,
    in_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    activation: str = "relu",
    backend: str = "auto",
    accuracy: str = "strict",
    out: Tensor | None = None,
) -> Tensor:
    """The op's implementation; the layers of a block that is no kernel of its own come straight here.

    `out`, a slice of the channels of a channels_last tensor, takes the result and is returned.
    """
    choice = _prepare(
        spec(x),
        spec(weight),
        optional_spec(scale),
        spec(shift),
        optional_spec(residual),
        optional_spec(in_scale),
        optional_spec(in_shift),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
        activation,
        backend,
        accuracy,
        plan.state(x.device),
    )
    plan.note(choice)
    if choice.empty:
        return common.empty_like_format(choice.shape.output_shape, x) if out is None else out
    geometry: dict[str, Any] = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "activation": activation,
    }
    tensors = (x, weight, scale, shift, residual, in_scale, in_shift)
    if (kernels := common.KERNELS.get(choice.backend)) is not None:
        y = kernels.conv_bn_act(*tensors, algorithm=choice.algorithm, out=out, **geometry)
        return y if out is not None else common.like_format(y, x)
    y = TORCH_LAYERS[choice.algorithm](*tensors, **geometry)
    return out.copy_(y) if out is not None else common.like_format(y, x)


def layer_runner(choice: plan.Choice, x: Tensor, accuracy: str) -> tuple[Callable[..., Tensor], Tensor]:
    """How a block that is no kernel of its own computes its layers, and its input in the format that suits them."""
    if choice.backend == "reference":
        return reference.conv_bn_act, x
    layer = functools.partial(run, backend=choice.backend, accuracy=accuracy)
    return layer, nhwc(x)


def _shape(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    residual: Tensor | None = None,
    in_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    activation: str = "relu",
    backend: str = "auto",
    accuracy: str = "strict",
) -> Conv:
    optional = (optional_spec(residual), optional_spec(in_scale), optional_spec(in_shift))
    tensors = (spec(x), spec(weight), optional_spec(scale), spec(shift), *optional)
    return _check(*tensors, stride, padding, dilation, groups, activation, backend, accuracy)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    x, weight, scale, shift, _, in_scale, in_shift = common.pad(inputs, 7)
    relu = keyword_only_inputs["activation"] == "relu"
    ctx.save_for_backward(x, weight, scale, shift, output if relu else None, in_scale, in_shift)
    ctx.geometry = {name: keyword_only_inputs[name] for name in ("stride", "padding", "dilation", "groups")}


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scale, shift, y, in_scale, in_shift = ctx.saved_tensors
    need_x, *needs, need_residual, need_in_scale, need_in_shift = common.pad(ctx.needs_input_grad, 7, False)
    source = x if in_scale is None else reference.prologue(x, in_scale, in_shift)
    need_source = need_x or need_in_scale or need_in_shift
    grad_x, *grads, grad_residual = reference.conv_bn_act_backward(
        grad, source, weight, scale, shift, y, needs=(need_source, *needs), **ctx.geometry
    )
    ends: tuple[Tensor | None, ...] = (grad_x, None, None)
    if in_scale is not None and grad_x is not None:
        needs_in = (need_x, need_in_scale, need_in_shift)
        ends = reference.prologue_backward(grad_x, x, source, in_scale, needs=needs_in)
    return ends[0], *grads, grad_residual if need_residual else None, *ends[1:]


common.register("conv_bn_act", run, _shape, _setup_context, _backward)
