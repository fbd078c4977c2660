"""Whether float32 products may round their factors to TF32: torch's own switches decide, and only this asks them."""

from __future__ import annotations

import torch


def allow_tf32(device: torch.device) -> bool:
    """Whether torch's own convolution on this device would use TF32 for float32 (`fp32_precision`, or `allow_tf32`)."""
    backend = torch.backends.cudnn if device.type == "cuda" else torch.backends.mkldnn
    return backend.conv.fp32_precision == "tf32"


def allow_tf32_matmul(device: torch.device) -> bool:
    """Whether torch's own matrix product on this device would use TF32 for float32."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return backend.matmul.fp32_precision == "tf32"
