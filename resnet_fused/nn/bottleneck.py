"""The bottleneck of ResNet-50 and larger as a module that is one fused op in eval mode."""

from __future__ import annotations

from typing import Any

from . import plain
from ._drop_in import DropIn


class Bottleneck(DropIn, plain.Bottleneck):
    """torchvision's Bottleneck, one fused op in eval mode; arguments as in `plain.Bottleneck`, and two more.

    Args:
        args: as in torchvision.
        backend: as in `resnet_fused.fuse`.
        accuracy: as in `resnet_fused.fuse`.
        kwargs: as in torchvision, and `stride_in_1x1`.
    """

    def __init__(self, *args: Any, backend: str = "auto", accuracy: str = "strict", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._configure(backend, accuracy)
