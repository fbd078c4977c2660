"""`layer_responses`: how strongly each 3x3 layer of a net responds (He et al., 2015, figure 7)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .errors import InputError
from .fuse import check_model, check_tensor
from .fusion import unfused
from .matchers.layers import is_norm
from .tables import render


@dataclass(frozen=True)
class Response:
    """One 3x3 layer.

    Attributes:
        layer: path of its convolution in the model.
        std: standard deviation of its output, in the units of that output.
    """

    layer: str
    std: float


@dataclass(frozen=True)
class Responses:
    """The responses of all 3x3 layers.

    Attributes:
        rows: one for each layer, in the order they ran.
    """

    rows: tuple[Response, ...]

    @property
    def sorted(self) -> tuple[Response, ...]:
        """The layers by the size of their response, the strongest first."""
        return tuple(sorted(self.rows, key=lambda row: -row.std))

    def to_dict(self) -> dict[str, Any]:
        """The responses as plain values."""
        return {"rows": [asdict(row) for row in self.rows], "sorted": [asdict(row) for row in self.sorted]}

    def __rich__(self) -> Table:
        table = Table(title="Layer responses", caption="standard deviation after BatchNorm, before ReLU and addition")
        for name in ("in order", "sorted"):
            table.add_column(name, overflow="fold")
            table.add_column("std", justify="right")
        for row, ranked in zip(self.rows, self.sorted, strict=True):
            table.add_row(row.layer, f"{row.std:.4f}", ranked.layer, f"{ranked.std:.4f}")
        return table

    def __str__(self) -> str:
        return render(self)


def layer_responses(model: nn.Module, x: Tensor) -> Responses:
    """Standard deviation of each 3x3 layer's output, after BatchNorm, before ReLU and addition.

    As in "Deep Residual Learning for Image Recognition" (https://arxiv.org/abs/1512.03385), figure 7: small responses
    mean that a residual function changes its input little. A layer is a 3x3 convolution and the BatchNorm that takes
    its output; where none does, as before the addition of a pre-activation unit, it is the convolution alone.

    Args:
        model: a model in eval mode, fused or not; its original modules run.
        x: its input.

    Returns:
        The responses; print them for a table.

    Raises:
        InputError: `model` is no module, in train mode, or runs no 3x3 convolution; `x` is no tensor.
    """
    check_model("model", model)
    check_tensor("x", x)
    stds: dict[str, float] = {}
    outputs = WeakTensorKeyDictionary()  # a convolution's output to the convolution's path
    handles = []

    def measure_conv(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            outputs[y] = name
            stds[name] = y.double().std(correction=0).item()

        return hook

    def measure_norm(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        name = outputs.pop(args[0], None) if args else None
        if name is not None:
            stds[name] = y.double().std(correction=0).item()

    try:
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                handles.append(module.register_forward_hook(measure_conv(name)))
            elif is_norm(module):
                handles.append(module.register_forward_hook(measure_norm))
        with torch.no_grad(), unfused():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    if not stds:
        raise InputError(f"model must run a 3x3 convolution, got {type(model).__name__} that runs none")
    return Responses(tuple(Response(name, std) for name, std in stds.items()))


def plot_responses(responses: dict[str, Responses], path: Path) -> None:
    """Draw the responses of several nets as a PNG: in the order of the layers above, sorted by size below.

    Args:
        responses: of each net, by the label that it gets.
        path: where to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, figsize=(7, 5.5), layout="constrained")
    for axis, order in zip(axes, ("rows", "sorted"), strict=True):
        for label, measured in responses.items():
            stds = [row.std for row in getattr(measured, order)]
            axis.plot(range(1, len(stds) + 1), stds, label=label, linewidth=1.5, marker="o", markersize=2.5)
        axis.set_ylabel("standard deviation")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_xlabel("layer, in order")
    axes[1].set_xlabel("layer, sorted by response")
    axes[0].legend(frameon=False)
    axes[0].set_title("Responses of the 3x3 layers, after BatchNorm", fontsize=10)
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)
