"""The truth: one layer in plain torch operations, forward and backward, for any dtype and device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    residual: Tensor | None = None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    activation: str = "relu",
) -> Tensor:
    """`activation(conv(x, weight) * scale + shift + residual)`, in float32 (float64 for float64), rounded once."""
    dtype = _compute_dtype(x)
    y = torch.conv2d(x.to(dtype), weight.to(dtype), None, stride, padding, dilation, groups)
    if scale is not None:
        y = y * scale.to(dtype)[:, None, None]
    y = y + shift.to(dtype)[:, None, None]
    if residual is not None:
        y = y + residual.to(dtype)
    return (torch.relu(y) if activation == "relu" else y).to(x.dtype)


def conv_bn_act_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    y: Tensor | None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    needs: Sequence[bool] = (True, True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Gradients of a layer to x, weight, scale and shift (None where not in `needs`), and to what is added to it.

    `y` is the layer's output if it ends in ReLU, None if it has no activation. The last result, the gradient before
    the activation, is the residual's and is always given.
    """
    dtype = _compute_dtype(x)
    grad = grad.to(dtype)
    if y is not None:
        grad = torch.ops.aten.threshold_backward(grad, y.to(dtype), 0)  # passes where y is NaN, as torch's ReLU does
    need_x, need_weight, need_scale, need_shift = needs
    need_scale = need_scale and scale is not None
    wide_x, wide_weight = x.to(dtype), weight.to(dtype)
    grad_x = grad_weight = grad_scale = grad_shift = None
    if need_x or need_weight:
        grad_conv = grad if scale is None else grad * scale.to(dtype)[:, None, None]
        geometry = (stride, padding, dilation, False, (0, 0), groups)
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad_conv, wide_x, wide_weight, None, *geometry, (need_x, need_weight, False)
        )
        grad_x = grad_x.to(x.dtype) if need_x else None
        grad_weight = grad_weight.to(weight.dtype) if need_weight else None
    if need_scale:
        assert scale is not None
        conv = torch.conv2d(wide_x, wide_weight, None, stride, padding, dilation, groups)
        grad_scale = (grad * conv).sum((0, 2, 3)).to(scale.dtype)
    if need_shift:
        grad_shift = grad.sum((0, 2, 3)).to(shift.dtype)
    return grad_x, grad_weight, grad_scale, grad_shift, grad.to(x.dtype)
