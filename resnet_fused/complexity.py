"""`info`: a model's parameters, multiply-adds, layers and depth, as the papers count them.

And what the ops count in `torch.utils.flop_counter`: their convolutions and matrix products, as in the unfused model.
An option A shortcut counts as the 1x1 convolution that it runs as.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from .fuse import check_model, check_tensor
from .fusion import original_class, unfused
from .ops import _common
from .shapes import Shape
from .tables import render


@dataclass(frozen=True)
class Stage:
    """A part of a model.

    Attributes:
        name: path in the model.
        output: shape of what it gives for one image, channels first; empty if that is no tensor.
        layers: convolutions and linear layers that ran, projections included.
        parameters: how many numbers are learnt, those of BatchNorms that follow it included.
        multiply_adds: of its layers, for one image.
    """

    name: str
    output: tuple[int, ...]
    layers: int
    parameters: int
    multiply_adds: int


@dataclass(frozen=True)
class Info:
    """The size of a model.

    Attributes:
        model: its class.
        image: shape of one input, channels first.
        depth: convolutions and linear layers on the longest path from input to output: the 50 of ResNet-50.
        stages: its parts, in the order they ran.
    """

    model: str
    image: tuple[int, ...]
    depth: int
    stages: tuple[Stage, ...]

    @property
    def layers(self) -> int:
        """Convolutions and linear layers that ran, projections included."""
        return sum(stage.layers for stage in self.stages)

    @property
    def parameters(self) -> int:
        """How many numbers are learnt."""
        return sum(stage.parameters for stage in self.stages)

    @property
    def multiply_adds(self) -> int:
        """Multiplications, each with its addition, of convolutions and linear layers for one image: half the FLOPs."""
        return sum(stage.multiply_adds for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """The numbers as plain values."""
        totals = {"layers": self.layers, "parameters": self.parameters, "multiply_adds": self.multiply_adds}
        return asdict(self) | totals

    def __rich__(self) -> Table:
        table = Table(title=f"{self.model} at {size(self.image)}", show_footer=True)
        total = ("", str(self.layers), f"{self.parameters:,}", f"{self.multiply_adds / 1e6:,.1f} M", "")
        table.add_column("stage", footer=f"depth {self.depth}", overflow="fold")
        for name, footer in zip(("output", "layers", "parameters", "mult-adds", "share"), total, strict=True):
            table.add_column(name, footer=footer, justify="right")
        for stage in self.stages:
            share = stage.multiply_adds / max(1, self.multiply_adds)
            numbers = (
                str(stage.layers),
                f"{stage.parameters:,}",
                f"{stage.multiply_adds / 1e6:,.1f} M",
                f"{share:.1%}",
            )
            table.add_row(stage.name, size(stage.output), *numbers)
        return table

    def __str__(self) -> str:
        return render(self)


def size(shape: tuple[int, ...]) -> str:
    """A shape as in 64x56x56."""
    return "x".join(map(str, shape))


def info(model: nn.Module, x: Tensor) -> Info:
    """Count a model's parameters, multiply-adds, layers and depth.

    Multiply-adds are those of convolutions and matrix products, as in "Deep Residual Learning for Image Recognition"
    (https://arxiv.org/abs/1512.03385, table 1): neither biases, BatchNorms, additions nor pooling count.

    Args:
        model: a model in eval mode, fused or not; its original modules run once (on the meta device at no cost).
        x: its input, float [N, C, H, W] on the model's device.

    Returns:
        The numbers; print them for a table.

    Raises:
        InputError: `model` is no module, or in train mode; `x` is no tensor.
    """
    check_model("model", model)
    check_tensor("x", x)
    counter = _Counter(model)
    handles = [handle for name, module in model.named_modules() for handle in counter.watch(name, module)]
    try:
        # In inference mode torch would hand over composite operators that contain a convolution.
        with torch.inference_mode(False), torch.no_grad(), unfused(), counter:
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    parameters = _parameters(model, counter)
    stages = []
    for name, learnt in parameters.items():
        layers, adds = counter.layers.get(name, 0), counter.multiply_adds.get(name, 0) // len(x)
        stages.append(Stage(name, counter.outputs.get(name, ()), layers, learnt, adds))
    return Info(original_class(model).__name__, tuple(x.shape[1:]), counter.depth, tuple(stages))


class _Counter(TorchDispatchMode):
    """Counts each convolution and matrix product for the stage whose module runs, and follows depth along tensors."""

    def __init__(self, model: nn.Module) -> None:
        from torch.utils.flop_counter import flop_registry  # imports Triton

        super().__init__()
        self._flops = flop_registry
        self.depth = 0
        self.layers: dict[str, int] = {}
        self.multiply_adds: dict[str, int] = {}
        self.outputs: dict[str, tuple[int, ...]] = {}
        self._trunk = _trunk(model)
        self._running = [""]
        self._depths = WeakTensorKeyDictionary()

    def stage(self, path: str) -> str:
        """The stage that a path in the model belongs to: what it shares with the trunk, and one name more."""
        names, trunk = path.split("."), self._trunk.split(".")
        shared = 0
        while shared < min(len(names), len(trunk)) and names[shared] == trunk[shared]:
            shared += 1
        return ".".join(names[: shared + 1])

    def watch(self, name: str, module: nn.Module) -> tuple[Any, Any]:
        """Take down when a module runs, and what a stage gives."""

        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._running.append(name)

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._running.pop()
            if self.stage(name) == name and isinstance(output, Tensor):
                self.outputs[name] = tuple(output.shape[1:])

        return module.register_forward_pre_hook(enter), module.register_forward_hook(leave)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        y = func(*args, **kwargs)
        inputs = (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        depth = max((self._depths.get(t, 0) for t in inputs), default=0)
        flops = self._flops.get(func.overloadpacket)
        if flops is not None:
            depth += 1
            name = self.stage(self._running[-1])
            self.layers[name] = self.layers.get(name, 0) + 1
            self.multiply_adds[name] = self.multiply_adds.get(name, 0) + flops(*args, **kwargs, out_val=y) // 2
        self.depth = max(self.depth, depth)
        for t in tree_leaves(y):
            if isinstance(t, Tensor):
                self._depths[t] = depth
        return y


def _trunk(model: nn.Module) -> str:
    """Path of the innermost module that holds all convolutions: its children are the stages."""
    path, module = "", model
    while True:
        inner = [(n, m) for n, m in module.named_children() if any(isinstance(c, nn.Conv2d) for c in m.modules())]
        if len(inner) != 1 or isinstance(inner[0][1], nn.Conv2d):
            return path
        path, module = f"{path}.{inner[0][0]}" if path else inner[0][0], inner[0][1]


def _parameters(model: nn.Module, counter: _Counter) -> dict[str, int]:
    """The parameters of each stage; those of a part without layers, such as a BatchNorm, go to the stage before it."""
    found = dict.fromkeys(counter.multiply_adds, 0)
    current = next(iter(found), "")
    for path, parameter in model.named_parameters():
        name = counter.stage(path.rpartition(".")[0])
        current = name if name in found else current
        found[current] = found.get(current, 0) + parameter.numel()
    return found


def _flops(shape: Callable[..., Shape]) -> Callable[..., int]:
    """An op's formula for the counter."""
    return lambda *args, out_val, **options: shape(*args, **options).flops


def _register_formulas(counter: ModuleType) -> None:
    """Tell `torch.utils.flop_counter` of every op."""
    for name, shape in _common.SHAPES.items():
        counter.register_flop_formula(getattr(torch.ops.resnet_fused, name), get_raw=True)(_flops(shape))


class _Finder(MetaPathFinder):
    """Registers the formulas when the counter is imported: that takes 0.1 s, as it imports Triton."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The counter's own spec, with another loader; None for all other modules."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname == COUNTER else None
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            _register_formulas(module)

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


COUNTER = "torch.utils.flop_counter"
if COUNTER in sys.modules:
    _register_formulas(sys.modules[COUNTER])
else:
    sys.meta_path.insert(0, _Finder())
