"""`verify`: is a fused model as exact as the original? Judged against float64, block by block and end to end."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import InputError
from .fuse import arguments_of, check_model, floating_tensors, fusions
from .fusion import Fusion, unfused
from .tables import render

FAST_LIMIT = 1e-5
"""What `accuracy="fast"` may add in float32: error of a block, of its output's largest magnitude."""


@dataclass(frozen=True)
class ParityRow:
    """The errors of one block, or of the whole model.

    Attributes:
        block: path in the model, `"end to end"` for the whole.
        kernel: the op; empty for the whole.
        error: largest error of the fused output against float64.
        unfused_error: the same of the original modules at the same dtype.
        limit: what `error` may be.
        magnitude: largest magnitude of the float64 output.
        ok: whether `error` is within `limit`; not if it is NaN.
    """

    block: str
    kernel: str
    error: float
    unfused_error: float
    limit: float
    magnitude: float
    ok: bool


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Attributes:
        rows: one for each block, on the input that the original model gives it, then one end to end.
        dtype: of the model's input.
        flipped: rows of a classifier's output whose largest entry is not the one in float64; None for other outputs.
        unfused_flipped: the same of the original.
    """

    rows: tuple[ParityRow, ...]
    dtype: str
    flipped: int | None
    unfused_flipped: int | None

    @property
    def ok(self) -> bool:
        """Whether every row is within its limit."""
        return all(row.ok for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        fields = {"dtype": self.dtype, "flipped": self.flipped, "unfused_flipped": self.unfused_flipped}
        return {"ok": self.ok, **fields, "rows": [asdict(row) for row in self.rows]}

    def __rich__(self) -> Table:
        verdict = "parity holds" if self.ok else "PARITY DOES NOT HOLD"
        if self.flipped is not None:
            verdict += f"; predictions flipped: {self.flipped} fused, {self.unfused_flipped} unfused"
        table = Table(title=f"Error against float64, {self.dtype}", caption=verdict)
        table.add_column("block", overflow="fold")
        table.add_column("kernel")
        for name in ("fused", "unfused", "limit", "of largest output"):
            table.add_column(name, justify="right")
        table.add_column("")
        for row in self.rows:
            share = row.error / row.magnitude if row.magnitude else row.error
            numbers = (f"{v:.2e}" for v in (row.error, row.unfused_error, row.limit, share))
            table.add_row(row.block, row.kernel, *numbers, "ok" if row.ok else "FAIL", style=None if row.ok else "red")
        return table

    def __str__(self) -> str:
        return render(self)


def verify(model: nn.Module, fast: nn.Module, x: Tensor | tuple[Any, ...]) -> Report:
    """Compare a fused model with the original, each with a float64 copy of the original.

    The parity rule, for every block and for the whole: the fused error is at most twice the original's at the same
    dtype, and one rounding of the largest output (float32: a unit), for where the original happens to be exact. The
    original's error of the whole is the larger of those in the memory format of `x` and in channels_last, which fused
    models run in. With `accuracy="fast"` a float32 block may be off by 1e-5 of its largest output instead, and the
    whole by so much for each block. Blocks that do not run fused on `x` have no row.

    Args:
        model: the original, in eval mode.
        fast: `fuse(model)`.
        x: an input for both; a tuple stands for several arguments.

    Returns:
        The report; print it for a table.

    Raises:
        InputError: a model is no module or in train mode, `fast` holds nothing fused, the two differ, there is no
            floating-point tensor in `x`.
    """
    check_model("model", model)
    check_model("fast", fast)
    arguments, first = arguments_of(x)
    blocks = fusions(fast)
    if not blocks:
        raise InputError(f"fast must be a fused model, got {type(fast).__name__} with nothing fused in it")
    blocks = {name: fusion for name, fusion in blocks.items() if fusion.watched.why_changed() is None}
    paths = {id(module): name for name, module in fast.named_modules()}
    with torch.no_grad():
        fused = floating_tensors(fast(*arguments))
    exact_model = copy.deepcopy(model).double()
    rows: dict[str, ParityRow] = {}
    handles = []
    try:
        for name, fusion in blocks.items():
            where = [paths[id(step)] for step in fusion.steps if id(step) in paths]
            if len(where) < len(fusion.steps):  # a module was replaced since, so that it does not run
                continue
            original = submodules("model", model, where)
            check = functools.partial(
                check_block, rows, name, fusion, original, submodules("model", exact_model, where)
            )
            handles.append(original[0].register_forward_pre_hook(check))
        with torch.no_grad(), unfused():
            plain = floating_tensors(model(*arguments))
            exact = floating_tensors(exact_model(*pytree.tree_map(double, arguments)))
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad(), unfused():
        last = floating_tensors(model(*pytree.tree_map(channels_last, arguments)))
    if not fused:
        raise InputError(f"fast must give a floating-point tensor, got none from {type(fast).__name__}")
    if [t.shape for t in fused] != [t.shape for t in plain]:
        raise InputError(f"fast must give outputs of the model's shapes, {shapes(plain)}, got {shapes(fused)}")
    allowance = sum(fast_limit(fusion, first) for fusion in blocks.values())
    ordered = [rows[name] for name in blocks if name in rows]
    whole = judge("end to end", "", fused, [plain, last], exact, allowance)
    classes = fused[0].dim() == 2
    flips = [int((t[0].argmax(1) != exact[0].argmax(1)).sum()) if classes else None for t in (fused, plain)]
    return Report((*ordered, whole), str(first.dtype).removeprefix("torch."), *flips)


def check_block(
    rows: dict[str, ParityRow],
    name: str,
    fusion: Fusion,
    original: Sequence[nn.Module],
    exact: Sequence[nn.Module],
    module: nn.Module,
    args: tuple[Any, ...],
) -> None:
    """Forward pre-hook on a block of the original model: the block's row, from the input that it is about to get."""
    if name in rows or len(args) != 1:  # it runs several times; or the op does not take its place
        return
    (x,) = args
    if fusion.why_left(x):
        return
    plain, reference = fusion.run_steps(original, x.clone()), fusion.run_steps(exact, x.double())
    fused = fusion.run(x.clone())
    if fused.shape != plain.shape:
        raise InputError(f"fast must give {tuple(plain.shape)} at {name} as the model does, got {tuple(fused.shape)}")
    rows[name] = judge(name, fusion.op, [fused], [[plain]], [reference], fast_limit(fusion, x))


def fast_limit(fusion: Fusion, x: Tensor) -> float:
    """What `accuracy="fast"` allows a block, as a share of its largest output."""
    return FAST_LIMIT if fusion.settings.accuracy == "fast" and x.dtype == torch.float32 else 0.0


def judge(
    block: str,
    kernel: str,
    fused: Sequence[Tensor],
    plain: Sequence[Sequence[Tensor]],
    exact: Sequence[Tensor],
    allowance: float,
) -> ParityRow:
    """Apply the parity rule to a block's outputs; `plain` are the original's in one or several memory formats."""
    error, unfused_error = largest_error(fused, exact), max(largest_error(outputs, exact) for outputs in plain)
    magnitude = max((t.abs().nan_to_num(0.0, 0.0).max().item() for t in exact if t.numel()), default=0.0)
    # Of float32 a whole unit: sums in another order differ by more than the rounding of what they give.
    rounding = max((torch.finfo(t.dtype).eps / 2 for t in fused), default=0.0) * magnitude
    rounding = max(rounding, torch.finfo(torch.float32).eps * magnitude)
    limit = max(2 * unfused_error + rounding, allowance * magnitude)
    return ParityRow(block, kernel, error, unfused_error, limit, magnitude, error <= limit)


def largest_error(outputs: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest difference; NaN or infinite in both counts as equal, in one of them as a NaN error."""
    errors = [0.0]
    for y, reference in zip(outputs, exact, strict=True):
        same = (y == reference) | (y.isnan() & reference.isnan())
        if y.numel():
            errors.append((y - reference).abs().masked_fill(same, 0.0).max().item())
    return torch.tensor(errors, dtype=torch.float64).max().item()  # which is NaN if one of them is


def double(value: Any) -> Any:
    """A floating-point tensor in float64, anything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def channels_last(value: Any) -> Any:
    """Images in channels_last, anything else as it is."""
    return (
        value.contiguous(memory_format=torch.channels_last) if isinstance(value, Tensor) and value.dim() == 4 else value
    )


def shapes(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Their shapes."""
    return [tuple(t.shape) for t in tensors]


def submodules(argument: str, model: nn.Module, paths: Sequence[str]) -> list[nn.Module]:
    """The modules at these paths.

    Raises:
        InputError: one is not there.
    """
    try:
        return [model.get_submodule(path) for path in paths]
    except AttributeError:
        message = f"{argument} must have the module {paths[0]!r} that fast has, got {type(model).__name__}"
        raise InputError(message) from None
