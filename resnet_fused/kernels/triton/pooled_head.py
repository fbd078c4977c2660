"""The head: global average pooling, summed in float32, and a linear layer as a 1x1 convolution of one pixel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...shapes import Head
from ..layout import nhwc_slice, pixel_pitch
from ..packing import packed
from ..precision import allow_tf32_matmul
from .block_configs import HeadConfig, configuration
from .launch import empty_output, on_device, precision
from .matrices import pointwise_layer, zeros


@triton.jit(do_not_specialize=["PIXELS"])
def average_pool_kernel(x, y, C, PIXELS, pitch, BP: tl.constexpr, BC: tl.constexpr):
    """x [N, PIXELS, C] -> y [N, C], the mean over the pixels; a program sums BC channels of an image in order."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    rp = tl.arange(0, BP)
    image = x + tl.program_id(0).to(tl.int64) * PIXELS * pitch
    total = tl.zeros((BP, BC), tl.float32)
    for p in tl.range(0, PIXELS, BP):
        at = image + (p + rp).to(tl.int64)[:, None] * pitch + c[None, :]
        total += tl.load(at, mask=(p + rp < PIXELS)[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / PIXELS
    tl.store(y + tl.program_id(0).to(tl.int64) * C + c, mean.to(y.dtype.element_ty), mask=c < C)


def head(x: Tensor, weight: Tensor | None, bias: Tensor | None = None, *, config: HeadConfig | None = None) -> Tensor:
    """Global average pooling, rounded once, and the linear layer if there is one (then two launches).

    Where float32 convolutions may use TF32 but matrix products may not, the linear layer is torch's.

    Args:
        x: [N, C, H, W], float32, bfloat16 or float16, any memory format.
        weight: [O, C] of x's dtype; None to stop after the pooling.
        bias: [O] of x's dtype or float32; None is zeros.
        config: None for the one that `configs.choose` gives.

    Returns:
        [N, C], or with a weight [N, O], of x's dtype.
    """
    n, c, h, w = x.shape
    x = nhwc_slice(x)
    pitch = pixel_pitch(x)
    assert pitch is not None
    y = empty_output((n, c, 1, 1), x)
    config = configuration("head", Head(n, c, h, w, 0 if weight is None else weight.shape[0]), x, config)
    with on_device(x):
        average_pool_kernel[(n, triton.cdiv(c, config.block_n))](
            x, y, c, h * w, pitch,
            BP=config.block_m, BC=config.block_n,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip
    if weight is None:
        return y.flatten(1)
    if precision(x) == "tf32" and not allow_tf32_matmul(x.device):
        # The switch of convolutions decides for the layer kernels, but this is a matrix product, which has its own: by
        # torch's defaults the first allows TF32 and the second does not.
        return torch.nn.functional.linear(y.flatten(1), weight, bias)
    shift = zeros(weight.shape[0], x.device) if bias is None else bias.float()
    # The same view at every call, so that packs made of it are found again; detached, so as not to keep the weight.
    kernel = packed(weight, ("triton", "linear"), lambda: weight.detach()[:, :, None, None])
    return pointwise_layer(y, kernel, None, shift, "none").flatten(1)
