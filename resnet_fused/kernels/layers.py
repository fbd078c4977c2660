"""The tensors of one layer of a dense block, as every backend takes them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class DenseLayer(NamedTuple):
    """One layer of a DenseNet block (Huang et al., 2017, section 3): its output is appended to what it reads.

    Attributes:
        in_scale: float32 [C]: of the BatchNorm (and ReLU) before everything else.
        in_shift: float32 [C].
        w1: [M, C, 1, 1], the 1x1 of DenseNet-B; None without, and then s1 and b1 are None too.
        s1: float32 [M]: of the BatchNorm (and ReLU) after the 1x1.
        b1: float32 [M].
        w2: [growth, M, 3, 3], or [growth, C, 3, 3] without the 1x1.
    """

    in_scale: Tensor
    in_shift: Tensor
    w1: Tensor | None
    s1: Tensor | None
    b1: Tensor | None
    w2: Tensor
