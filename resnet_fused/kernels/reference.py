"""The truth: one layer in plain torch operations, forward and backward, for any dtype and device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def prologue(x: Tensor, in_scale: Tensor, in_shift: Tensor) -> Tensor:
    """`relu(x * in_scale + in_shift)`, in float32 (float64 for float64), rounded once."""
    dtype = _compute_dtype(x)
    return torch.relu(x.to(dtype) * in_scale.to(dtype)[:, None, None] + in_shift.to(dtype)[:, None, None]).to(x.dtype)


def pooled_prologue(x: Tensor, in_scale: Tensor, in_shift: Tensor) -> Tensor:
    """`avg_pool2d(relu(x * in_scale + in_shift), 2)`, in float32 (float64 for float64), rounded once."""
    dtype = _compute_dtype(x)
    z = torch.relu(x.to(dtype) * in_scale.to(dtype)[:, None, None] + in_shift.to(dtype)[:, None, None])
    return functional.avg_pool2d(z, 2).to(x.dtype)


def mean(x: Tensor) -> Tensor:
    """The mean over the pixels [N, C, 1, 1], in float32 (float64 for float64), rounded once."""
    return x.to(_compute_dtype(x)).mean((2, 3), keepdim=True).to(x.dtype)


def conv_bn_act(
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
    out: Tensor | None = None,
) -> Tensor:
    """`activation(conv(x, weight) * scale + shift + residual)`, in float32 (float64 for float64), rounded once.

    With `in_scale` and `in_shift` the convolution reads `prologue(x, in_scale, in_shift)`. `out` takes the result.
    """
    dtype = _compute_dtype(x)
    if in_scale is not None and in_shift is not None:
        x = prologue(x, in_scale, in_shift)
    y = torch.conv2d(x.to(dtype), weight.to(dtype), None, stride, padding, dilation, groups)
    if scale is not None:
        y = y * scale.to(dtype)[:, None, None]
    y = y + shift.to(dtype)[:, None, None]
    if residual is not None:
        y = y + residual.to(dtype)
    y = (torch.relu(y) if activation == "relu" else y).to(x.dtype)
    return y if out is None else out.copy_(y)


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


def prologue_backward(
    grad: Tensor, x: Tensor, z: Tensor, in_scale: Tensor, *, needs: Sequence[bool] = (True, True, True)
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `z = prologue(x, in_scale, in_shift)` to x, in_scale and in_shift (None where not in `needs`)."""
    dtype = _compute_dtype(x)
    grad = torch.ops.aten.threshold_backward(grad.to(dtype), z.to(dtype), 0)
    need_x, need_scale, need_shift = needs
    return (
        (grad * in_scale.to(dtype)[:, None, None]).to(x.dtype) if need_x else None,
        (grad * x.to(dtype)).sum((0, 2, 3)).to(in_scale.dtype) if need_scale else None,
        grad.sum((0, 2, 3)).to(in_scale.dtype) if need_shift else None,
    )
