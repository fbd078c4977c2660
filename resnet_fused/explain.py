"""`explain`: which kernel runs each piece of a fused model at one input shape, why, and how near to the roofline."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from . import gpu_timer, plan
from .errors import InputError
from .fuse import arguments_of, check_model, fusions
from .report import percent, three_digits
from .roofline import DTYPES, Machine, Placement, dtype_name, flops, layer_traffic, measure, placement, total, traffic
from .tables import render

TIMED_CALLS = 7
"""Calls of every op on a CPU of which the median is taken, after two to warm up."""


@dataclass(frozen=True)
class PlanRow:
    """One fused op, or one convolution that runs unfused, as it ran.

    Attributes:
        block: path in the model, first and last module of a chain.
        kernel: the op, `"unfused"` for a convolution through torch.
        backend: `"cpu"`, `"cuda"`, `"triton"`, `"vendor"` or `"reference"`; `"torch"` if unfused.
        algorithm: of the backend; those of its layers, if the block runs layer by layer.
        why: the reason for that choice, with the predicted times that it was made by, or the reason for none.
        flops: of its convolutions, of a head those of the linear layer.
        dtype: of its input: `"fp32"`, `"bf16"`, `"fp16"`.
        bytes: that its input, weights and output take, each counted once.
        layer_bytes: that would move if it ran layer by layer; see `roofline.Placement`.
        roof: its place on the roofline, if that was asked for and the machine was measured with its dtype.
        seconds: that it took, the median of a few calls with the same input; None if it was not timed.
        candidates: what could have run with the seconds that each was expected to take, what ran first.
    """

    block: str
    kernel: str
    backend: str
    algorithm: str
    why: str
    flops: int
    dtype: str = ""
    bytes: int = 0
    layer_bytes: int = 0
    roof: Placement | None = None
    seconds: float | None = None
    candidates: tuple[tuple[str, float], ...] = ()

    @property
    def share(self) -> float | None:
        """The least time by the roofline as a share of the time that it took; None if they are not known."""
        return self.roof.bound_seconds / self.seconds if self.roof and self.seconds else None


@dataclass(frozen=True)
class Plan:
    """What ran for one input, in order.

    Attributes:
        rows: one for each fused op and each unfused convolution.
        machine: whose roofline the rows are placed on; None if that was not asked for.
    """

    rows: tuple[PlanRow, ...]
    machine: Machine | None = None

    @property
    def coverage(self) -> float:
        """Share of the convolutions' FLOPs that ran in fused ops, 0 to 1; a head has none."""
        convolutions = [row for row in self.rows if row.kernel != "head"]
        whole = sum(row.flops for row in convolutions)
        return sum(row.flops for row in convolutions if row.kernel != "unfused") / whole if whole else 0.0

    @property
    def roof(self) -> Placement | None:
        """The place of all rows together on the roofline: the bound is the sum of theirs; None where none has one."""
        placed = [row.roof for row in self.rows if row.roof]
        return total(placed) if placed else None

    @property
    def seconds(self) -> float | None:
        """That the rows which were timed took together; None where none was."""
        timed = [row.seconds for row in self.rows if row.seconds is not None]
        return sum(timed) if timed else None

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values."""
        placed = {"machine": self.machine.to_dict()} if self.machine else {}
        placed |= {"roof": asdict(self.roof)} if self.roof else {}
        return {"coverage": self.coverage, "rows": [asdict(row) for row in self.rows], **placed}

    def __rich__(self) -> Table:
        return self._plan_table() if self.machine is None else self._roofline_table(self.machine)

    def __str__(self) -> str:
        return render(self)

    def _plan_table(self) -> Table:
        table = Table(title="Plan", caption=self._caption(), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for name in ("block", "kernel", "computed by"):
            table.add_column(name, overflow="fold")
        table.add_column("GFLOP", justify="right")
        table.add_column("expected ms (of others), or why", overflow="fold")
        for row in self.rows:
            by = f"{row.backend} {row.algorithm}".strip()
            table.add_row(row.block, row.kernel, by, f"{row.flops / 1e9:.3f}", _short_why(row), style=_style(row))
        return table

    def _caption(self) -> str:
        """Coverage, and how much of it torch's own operators compute."""
        fused = sum(row.flops for row in self.rows if row.kernel != "unfused")
        torchs = sum(row.flops for row in self.rows if row.backend == "reference")
        by_torch = f"; {torchs / fused:.1%} of that is computed by torch's own operators" if torchs else ""
        return f"{self.coverage:.1%} of the convolution FLOPs run in fused ops{by_torch}"

    def _roofline_table(self, machine: Machine) -> Table:
        title = f"Roofline, {' and '.join(dict.fromkeys(row.dtype for row in self.rows))}: {machine}"
        table = Table(title=title, caption=ROOFLINE_CAPTION, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for name in ("block", "kernel", "computed by"):
            table.add_column(name, overflow="fold")
        for name in ("GFLOP", "MB", "by layers", "FLOP per byte"):
            table.add_column(name, justify="right")
        table.add_column("limit")
        for name in ("bound ms", "ms", "share"):
            table.add_column(name, justify="right")
        for row in self.rows:
            by = f"{row.backend} {row.algorithm}".strip()
            cells = _figures(row.roof, row.seconds) if row.roof else ("", "", "", "", "not measured", "", "", "")
            table.add_row(row.block, row.kernel, by, *cells, style=_style(row))
        if self.roof:
            table.add_section()
            table.add_row("all of them", "", "", *_figures(self.roof, self.seconds), style="bold")
        return table


ROOFLINE_CAPTION = (
    "MB: input, weights and output, each once; by layers: if every layer were a kernel of its own. Bound: the least "
    "time for these FLOPs and MB. Share: bound / ms. Winograd multiplies less and caches keep data: both can pass it."
)


def _short_why(row: PlanRow) -> str:
    """The times that decided, or what else did."""
    if not row.candidates:
        return row.why
    names = [name.removeprefix(f"{row.backend} ") for name, _ in row.candidates]
    times = [f"{seconds * 1e3:.3g}" for _, seconds in row.candidates]
    others = ", ".join(f"{name} {ms}" for name, ms in zip(names[1:], times[1:], strict=True))
    return f"{times[0]} ({others})" if others else times[0]


def _style(row: PlanRow) -> str | None:
    return "yellow" if row.kernel == "unfused" else None


def _figures(roof: Placement, seconds: float | None) -> tuple[str, ...]:
    """The cells of a row of the roofline table, after the names."""
    return (
        three_digits(roof.flops / 1e9),
        three_digits(roof.bytes / 1e6),
        three_digits(roof.layer_bytes / 1e6),
        f"{roof.intensity:.0f}",
        roof.bound,
        three_digits(roof.bound_seconds * 1e3),
        three_digits(seconds * 1e3 if seconds else None),
        percent(roof.bound_seconds / seconds if seconds else None),
    )


def explain(fast: nn.Module, x: Tensor | tuple[Any, ...], roofline: bool | Machine = False, timed: bool = True) -> Plan:
    """Run a fused model once and report what ran.

    Args:
        fast: a fused model (of any other, every convolution is reported as unfused).
        x: its input; a tuple stands for several arguments.
        roofline: also time every op and place it on the roofline of this machine, which is measured first (one or two
            seconds), or of the `Machine` given.
        timed: if False, ops are placed on the roofline but not timed.

    Returns:
        The plan; print it for a table.

    Raises:
        InputError: `fast` is no module, or in train mode; there is no floating-point tensor in `x`, or it is on
            the meta device, or of a dtype without a roofline.
    """
    check_model("fast", fast)
    arguments, first = arguments_of(x)
    if first.device.type == "meta":
        raise InputError("x must be on a device that computes, got meta")
    machine = _machine(roofline, first)
    watch = _Watch(fast, first, machine, timed)
    # In inference mode torch would hand over composite operators that contain a convolution.
    with torch.inference_mode(False), torch.no_grad(), watch:
        fast(*arguments)
    return Plan(tuple(watch.rows), machine)


def _machine(wanted: bool | Machine, x: Tensor) -> Machine | None:
    """The machine to place rows on, None if that is not asked for."""
    name = dtype_name(x.dtype)
    known = tuple(wanted.matmul_tflop_s) if isinstance(wanted, Machine) else tuple(DTYPES.values())
    if wanted and name not in known:
        raise InputError(f"x must be in a dtype that the roofline has, {', '.join(known)}, got {name}")
    if isinstance(wanted, Machine):
        return wanted
    return measure(x.device.type, (name,)) if wanted else None


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The median time of a call: on a GPU with a cold cache, on a CPU with what the last call left there."""
    if device.type == "cuda":
        return median(gpu_timer.interleave({"op": call}, 0.02, device)["op"])
    samples = []
    for _ in range(2 + TIMED_CALLS):
        started = time.perf_counter()
        call()
        samples.append(time.perf_counter() - started)
    return median(samples[2:])


class _Watch(TorchDispatchMode):
    """Takes down every fused op and every convolution that runs."""

    def __init__(self, model: nn.Module, x: Tensor, machine: Machine | None, timed: bool) -> None:
        super().__init__()
        self._machine, self._timed = machine, timed
        self._autocast = torch.is_autocast_enabled(x.device.type)  # below it, where the ops are seen, it is off
        self.rows: list[PlanRow] = []
        self._blocks: dict[int, str] = {}
        self._convs: dict[int, str] = {}
        self._reasons: dict[str, str] = {}
        self._called = ""  # the unfused convolution that is running
        self._hooks: list[RemovableHandle] = []
        fused = {conv for fusion in fusions(model).values() for conv in fusion.convs}
        self._unfused_convs = {
            name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m not in fused
        }
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and (weight := module._parameters.get("weight")) is not None:
                self._convs[id(weight)] = name
            for conv, reason in module.__dict__.get("_unfused_reasons", {}).items():
                self._reasons[f"{name}.{conv}" if name else conv] = reason
        for name, fusion in fusions(model).items():
            self._blocks |= {id(conv.weight): name for conv in fusion.convs}
            reason = fusion.why_unfused(x)
            if reason is not None:
                weights = (id(conv.weight) for conv in fusion.convs)
                self._reasons |= {self._convs[weight]: reason for weight in weights if weight in self._convs}

    def __enter__(self) -> _Watch:
        for name, conv in self._unfused_convs.items():  # a hook on the others would unfuse them
            self._hooks.append(conv.register_forward_pre_hook(functools.partial(self._call, name)))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _call(self, name: str, *call: Any) -> None:
        self._called = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = functools.partial(func, *args, **(kwargs or {}))
        if func.namespace == "resnet_fused":
            with plan.record() as choices:
                y = call()
            tensors = (id(t) for t in pytree.tree_leaves(args) if isinstance(t, Tensor))
            block = next((self._blocks[key] for key in tensors if key in self._blocks), "(called directly)")
            row = _fused(block, func.overloadpacket.__name__, choices, args[0].dtype)
            self.rows.append(self._placed(row, flops(choices[0].shape), call, args[0].device))
            return y
        y = call()
        if func is torch.ops.aten.convolution.default:
            row = self._unfused(args[0], args[1], y, transposed=args[6])
            self.rows.append(self._placed(row, row.flops, call, args[0].device))
        return y

    def _placed(self, row: PlanRow, work: int, call: Callable[[], object], device: torch.device) -> PlanRow:
        """The row with its place on the roofline, and its time, if they are wanted and the machine has its dtype."""
        if self._machine is None or row.dtype not in self._machine.matmul_tflop_s:
            return row
        roof = placement(work, row.bytes, row.layer_bytes, row.dtype, self._machine)
        return replace(row, roof=roof, seconds=_seconds(call, device) if self._timed else None)

    def _unfused(self, x: Tensor, weight: Tensor, y: Tensor, transposed: bool) -> PlanRow:
        known = self._convs.get(id(weight))
        name, self._called = self._called if known is None else known, ""
        if self._autocast:
            why = "autocast is on"
        elif known is None:
            why = "its weight is computed, as a parametrization does"
        else:
            why = self._reasons.get(name, "no BatchNorm that follows it was found")
        work = 2 * (x if transposed else y).numel() * weight[0].numel()
        moved = x.nbytes + weight.nbytes + y.nbytes
        return PlanRow(name, "unfused", "torch", "", why, work, dtype_name(x.dtype), moved, moved)


def _fused(block: str, kernel: str, choices: list[plan.Choice], dtype: torch.dtype) -> PlanRow:
    choice, *layers = choices
    algorithms = dict.fromkeys(layer.algorithm for layer in layers)
    algorithm = " + ".join(algorithms) if algorithms else choice.algorithm
    why = choice.reason
    if len(choice.seconds) > 1:
        why += ": " + ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in choice.seconds)
    shape, size = choice.shape, dtype.itemsize
    moved, layer_moved = traffic(shape, size), layer_traffic(shape, size)
    row = PlanRow(block, kernel, choice.backend, algorithm, why, shape.flops, dtype_name(dtype), moved, layer_moved)
    return replace(row, candidates=choice.seconds)
