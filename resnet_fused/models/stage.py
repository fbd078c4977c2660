"""What the residual nets' stages are made of: a run of blocks, and their shortcuts by option A, B or C."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..nn.plain import Norm, conv1x1
from ..nn.shortcut import PadShortcut
from ..settings import one_of

SHORTCUTS = ("A", "B", "C")


def make_shortcut(option: str, inplanes: int, planes: int, stride: int, norm: Norm | None) -> nn.Module | None:
    """The module on the shortcut of a block, None for the identity (ResNet, section 3.3, "Projection shortcuts").

    Args:
        option: "A": zero-padded identity where the shape changes; "B": projection there; "C": projection everywhere.
        inplanes: channels in.
        planes: channels out.
        stride: of the block.
        norm: makes the BatchNorm after a projection; None for none.

    Raises:
        InputError: an unknown option.
    """
    one_of("shortcut", option, SHORTCUTS)
    changes = stride != 1 or inplanes != planes
    if option == "C" or (option == "B" and changes):
        conv = conv1x1(inplanes, planes, stride)
        return conv if norm is None else nn.Sequential(conv, norm(planes))
    return PadShortcut(inplanes, planes, stride) if changes else None


def make_stage(
    block: Any,
    inplanes: int,
    planes: int,
    count: int,
    stride: int,
    shortcut: str | None,
    norm: Norm | None,
    first: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Sequential:
    """Blocks of one width, the first of which changes the shape.

    Args:
        block: a class with the arguments inplanes, planes, stride, downsample, and an `expansion`.
        inplanes: channels in.
        planes: the channels out are `planes * block.expansion`.
        count: of blocks.
        stride: of the first block.
        shortcut: as in `make_shortcut`; None for blocks without shortcuts.
        norm: as in `make_shortcut`.
        first: further arguments of the first block, instead of those in kwargs with the same name.
        kwargs: further arguments of each block.
    """
    blocks = []
    for index in range(count):
        args = (inplanes, planes * block.expansion, stride if index == 0 else 1)
        downsample = None if shortcut is None else make_shortcut(shortcut, *args, norm)
        further = kwargs | (first or {}) if index == 0 else kwargs
        blocks.append(block(inplanes, planes, args[2], downsample, **further))
        inplanes = planes * block.expansion
    return nn.Sequential(*blocks)


def initialize(model: nn.Module) -> None:
    """Draw the weights of all convolutions, in place, as He et al. (2015, https://arxiv.org/abs/1502.01852) do."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
