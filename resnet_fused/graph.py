"""A block that no op computes as a whole: its forward step by step, layers with the additions after them as one op."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from . import ops
from .folding import Arguments, Layer
from .fusion import Fusion, Settings, attributes


@dataclass(frozen=True)
class Value:
    """What a step gives, as an argument of a later one; the block's input has index 0."""

    index: int


@dataclass(frozen=True)
class Step:
    """One operation of a block's forward.

    Attributes:
        kind: `"layer"`: a fused layer; `"module"`: a child's call; `"function"`; `"method"`: of the first argument;
            `"tensor"`: one that the block holds.
        target: index of the layer; (the parent's children, name); the function; the method's name; the tensor's path.
        args: positional arguments, with `Value` for what earlier steps gave. A layer's are its input and the image
            that it adds, or None.
        kwargs: keyword arguments, alike.
        index: of the value that it gives.
        last: indices of values that no later step takes.
    """

    kind: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: int
    last: tuple[int, ...]


class GraphFusion(Fusion):
    """A block as its forward computes it, but for some of its layers, which are one op each.

    Args:
        layers: the fused layers.
        program: the steps.
        result: index of the value that is the block's output.
        block: the module.
        left_out: modules whose calls the fused layers replace; a hook on one of them, and the block runs unfused.
        channels: of the block's input.
        options: of each layer's `conv_bn_act`.
        inside: as in `Fusion`: the children that the steps were read off with.
        whole: as in `Fusion`.
        settings: how to run.
    """

    op = "conv_bn_act"
    recordable = False

    def __init__(
        self,
        layers: Sequence[Layer],
        program: Sequence[Step],
        result: int,
        block: nn.Module,
        left_out: Sequence[nn.Module],
        channels: int,
        options: Sequence[dict[str, Any]],
        inside: Sequence[tuple[dict[str, nn.Module | None], str]],
        whole: Sequence[dict[str, nn.Module | None]],
        settings: Settings,
    ) -> None:
        super().__init__(layers, (block,), inside, {"layers": list(options)}, settings, whole)
        self.program = list(program)
        self.result = result
        self.channels = channels
        self.watched.watch(left_out)
        # What the steps read anew on every call may change.
        taken = {step.target[0] for step in self.program if step.kind == "tensor"}
        of_block = [entry for entry in attributes(block) if entry[1] not in taken]
        self.watched.watch_attributes([*of_block, *(entry for m in left_out for entry in attributes(m))])

    def compute(self, x: Tensor, arguments: Sequence[Arguments], backend: str, accuracy: str) -> Tensor:  # noqa: D102
        values: dict[int, Any] = {0: x}
        for step in self.program:
            args = [resolve(a, values) for a in step.args]
            kwargs = {name: resolve(a, values) for name, a in step.kwargs.items()}
            for index in step.last:
                del values[index]
            if step.kind == "layer":
                y, residual = args
                weight, scale, shift = arguments[step.target]
                options = {**self.options["layers"][step.target], "backend": backend, "accuracy": accuracy}
                made: Any = ops.conv_bn_act(y, weight, scale, shift, residual, **options)
            elif step.kind == "module":
                children, name = step.target
                made = children[name](*args, **kwargs)
            elif step.kind == "function":
                made = step.target(*args, **kwargs)
            elif step.kind == "method":
                made = getattr(args[0], step.target)(*args[1:], **kwargs)
            else:
                made = self.steps[0]
                for name in step.target:
                    made = getattr(made, name)
            values[step.index] = made
            del args, kwargs, made  # or they would hold what no later step takes
        return values[self.result]


def resolve(argument: Any, values: dict[int, Any]) -> Any:
    """An argument with what the steps gave in place of each `Value`."""
    if isinstance(argument, Value):
        return values[argument.index]
    if isinstance(argument, tuple):
        return tuple(resolve(a, values) for a in argument)
    if isinstance(argument, list):
        return [resolve(a, values) for a in argument]
    if isinstance(argument, dict):
        return {key: resolve(a, values) for key, a in argument.items()}
    if isinstance(argument, slice):
        return slice(*(resolve(a, values) for a in (argument.start, argument.stop, argument.step)))
    return argument
