"""`explain`: which kernel runs each piece of a fused model at one input shape, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from . import plan
from .fuse import check_model, fusions
from .tables import render


@dataclass(frozen=True)
class PlanRow:
    """One fused op, or one convolution that runs unfused, as it ran.

    Attributes:
        block: path in the model, first and last module of a chain.
        kernel: the op, `"unfused"` for a convolution through torch.
        backend: `"cpu"`, `"vendor"`, `"reference"`; `"torch"` if unfused.
        algorithm: of the backend; those of its layers, if the block runs layer by layer.
        why: the reason for that choice, with the predicted times that it was made by, or the reason for none.
        flops: of its convolutions.
    """

    block: str
    kernel: str
    backend: str
    algorithm: str
    why: str
    flops: int


@dataclass(frozen=True)
class Plan:
    """What ran for one input, in order.

    Attributes:
        rows: one for each fused op and each unfused convolution.
    """

    rows: tuple[PlanRow, ...]

    @property
    def coverage(self) -> float:
        """Share of the convolutions' FLOPs that ran in fused ops, 0 to 1."""
        total = sum(row.flops for row in self.rows)
        return sum(row.flops for row in self.rows if row.kernel != "unfused") / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values."""
        return {"coverage": self.coverage, "rows": [asdict(row) for row in self.rows]}

    def __rich__(self) -> Table:
        table = Table(title="Plan", caption=f"{self.coverage:.1%} of the convolution FLOPs run in fused kernels")
        for name in ("block", "kernel", "backend", "algorithm", "why"):
            table.add_column(name, overflow="fold")
        table.add_column("GFLOP", justify="right")
        for row in self.rows:
            style = "yellow" if row.kernel == "unfused" else None
            cells = (row.block, row.kernel, row.backend, row.algorithm, row.why)
            table.add_row(*cells, f"{row.flops / 1e9:.3f}", style=style)
        return table

    def __str__(self) -> str:
        return render(self)


def explain(fast: nn.Module, x: Tensor) -> Plan:
    """Run a fused model once and report what ran.

    Args:
        fast: a fused model (of any other, every convolution is reported as unfused).
        x: its input.

    Returns:
        The plan; print it for a table.

    Raises:
        InputError: `fast` is no module, or in train mode.
    """
    check_model("fast", fast)
    watch = _Watch(fast, x)
    # In inference mode torch would hand over composite operators that contain a convolution.
    with torch.inference_mode(False), torch.no_grad(), watch:
        fast(x)
    return Plan(tuple(watch.rows))


class _Watch(TorchDispatchMode):
    """Takes down every fused op and every convolution that runs."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.rows: list[PlanRow] = []
        self._blocks: dict[int, str] = {}
        self._convs: dict[int, str] = {}
        self._reasons: dict[str, str] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d) and (weight := module._parameters.get("weight")) is not None:
                self._convs[id(weight)] = name
            for conv, reason in module.__dict__.get("_unfused_reasons", {}).items():
                self._reasons[f"{name}.{conv}" if name else conv] = reason
        for name, fusion in fusions(model).items():
            self._blocks |= {id(conv.weight): name for conv in fusion.convs}
            reason = fusion.why_unfused(x)
            if reason is not None:
                for conv in fusion.convs:
                    self._reasons[self._convs[id(conv.weight)]] = reason

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "resnet_fused":
            with plan.record() as choices:
                y = func(*args, **(kwargs or {}))
            tensors = (id(t) for t in pytree.tree_leaves(args) if isinstance(t, Tensor))
            block = next((self._blocks[key] for key in tensors if key in self._blocks), "(called directly)")
            self._fused(block, func.overloadpacket.__name__, choices)
            return y
        y = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self._unfused(args[0], args[1], y, transposed=args[6])
        return y

    def _fused(self, block: str, kernel: str, choices: list[plan.Choice]) -> None:
        choice, *layers = choices
        algorithms = dict.fromkeys(layer.algorithm for layer in layers)
        algorithm = " + ".join(algorithms) if algorithms else choice.algorithm
        why = choice.reason
        if len(choice.seconds) > 1:
            why += ": " + ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in choice.seconds)
        self.rows.append(PlanRow(block, kernel, choice.backend, algorithm, why, choice.shape.flops))

    def _unfused(self, x: Tensor, weight: Tensor, y: Tensor, transposed: bool) -> None:
        name, why = self._convs.get(id(weight), ""), "its weight is computed, by autocast or otherwise"
        if name:
            why = self._reasons.get(name, "no BatchNorm that follows it was found")
        flops = 2 * (x if transposed else y).numel() * weight[0].numel()
        self.rows.append(PlanRow(name, "unfused", "torch", "", why, flops))
