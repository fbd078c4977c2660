"""The parameter-free shortcut of ResNets between images of different shape."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError


class PadShortcut(nn.Module):
    """Every stride-th pixel, and zeros for the channels that are missing: option A of ResNet (section 3.3).

    Args:
        inplanes: channels in.
        planes: channels out.
        stride: between the pixels that are kept.

    Raises:
        InputError: planes is less than inplanes.
    """

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        if planes < inplanes:
            raise InputError(f"planes must be at least inplanes ({inplanes}) in a PadShortcut, got {planes}")
        self.inplanes, self.planes, self.stride = inplanes, planes, stride

    def forward(self, x: Tensor) -> Tensor:
        """[N, inplanes, H, W] to [N, planes, ceil(H / stride), ceil(W / stride)]."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.planes - self.inplanes))

    def extra_repr(self) -> str:
        """As in torch.nn.Module."""
        return f"{self.inplanes}, {self.planes}, stride={self.stride}"
