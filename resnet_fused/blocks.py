"""The blocks of a model, each cut out as a small model of its own together with the input that it gets."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .errors import InputError
from .fuse import fuse, fusions
from .verify import submodules

T = TypeVar("T")


def split(name: str) -> tuple[str, str]:
    """The model and the block's path in a name such as `"resnet50/layer1.1"`; no path is the whole model."""
    model, _, block = name.partition("/")
    return model, block


@dataclass(frozen=True)
class Block:
    """The modules of a model, one after the other, that run as one op when it is fused."""

    steps: tuple[nn.Module, ...]

    @property
    def module(self) -> nn.Module:
        """The block as one module; its parameters are the model's."""
        return self.steps[0] if len(self.steps) == 1 else nn.Sequential(*self.steps).eval()


def find(model: nn.Module) -> dict[str, Block]:
    """Every block of an unfused model in eval mode, by the path that `explain` shows; a classifier's head is none."""
    fast = fuse(model)
    paths = {id(module): name for name, module in fast.named_modules()}
    return {
        name: Block(tuple(submodules("model", model, [paths[id(step)] for step in fusion.steps])))
        for name, fusion in fusions(fast).items()
        if fusion.op != "head"
    }


def distinct(model: nn.Module, x: Tensor) -> dict[str, tuple[int, ...]]:
    """The blocks that differ in make-up or input shape, each with that shape [C, H, W], in the order that they run.

    Args:
        model: unfused, in eval mode.
        x: its input [N, C, H, W].
    """
    found = find(model)
    shapes = _inputs(model, found, x, lambda tensor: tuple(tensor.shape[1:]))
    first: dict[tuple[str, tuple[int, ...]], str] = {}
    for name, shape in shapes.items():
        first.setdefault((repr(found[name].module), shape), name)
    return {name: shape for (_, shape), name in first.items()}


def cut(model: nn.Module, name: str, x: Tensor) -> tuple[nn.Module, Tensor]:
    """Return the block at a path and the input that it gets, contiguous, when the model runs on `x`.

    Args:
        model: unfused, in eval mode.
        name: as in `find`.
        x: the model's input [N, C, H, W].

    Raises:
        InputError: there is no such block.
    """
    found = find(model)
    if name not in found:
        close = difflib.get_close_matches(name, found, n=4, cutoff=0.5) or list(found)[:4]
        raise InputError(f"block must be one that explain shows (perhaps {' or '.join(close)}), got {name!r}")
    inputs = _inputs(model, {name: found[name]}, x, lambda tensor: tensor.clone(memory_format=torch.contiguous_format))
    return found[name].module, inputs[name]


def _inputs(model: nn.Module, blocks: dict[str, Block], x: Tensor, keep: Callable[[Tensor], T]) -> dict[str, T]:
    """Run the model, and return what `keep` makes of the input of each block, in the order that they run."""
    kept: dict[str, T] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def take(module: nn.Module, args: tuple[Any, ...]) -> None:
            kept[name] = keep(args[0])

        return take

    handles = [block.steps[0].register_forward_pre_hook(hook(name)) for name, block in blocks.items()]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return kept
