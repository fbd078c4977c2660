"""The plots of the report: one function a plot, each returns a matplotlib figure.

The fused contenders are blue, everything else is grey, and where another one wins that is orange: colour-blind readers
tell these apart. `svg` turns them into CSS variables, so that a page can be light or dark.
"""

from __future__ import annotations

import functools
import html
import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox
from result_files import LAYER_FUSED, Case, Device, Line

from resnet_fused.bench import BASELINE
from resnet_fused.report import three_digits

COLORS = {
    "ink": "#1b1f24",
    "muted": "#5b6471",
    "grid": "#dde2e8",
    "fused": "#0a62c4",
    "fast": "#58a6e8",
    "peer": "#87909b",
    "eager": "#c0c7cf",
    "lose": "#c2500d",
}
INK, MUTED, GRID, FUSED, FAST, PEER, EAGER, LOSE = COLORS.values()
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "resnet_fused",
    "hatch.linewidth": 0.6,
}
MARKERS = "sD^vPX*<>"
DPI = 140
WIDTH = 11.0  # inches at most: a page shows 96 of its pixels for each


def styled(plot: Callable[..., Any]) -> Callable[..., Any]:
    """Run a function with the report's style; what it draws is laid out once, not again for every file."""

    @functools.wraps(plot)
    def run(*args: Any, **options: Any) -> Any:
        with matplotlib.rc_context(STYLE):
            made = plot(*args, **options)
            if isinstance(made, Figure):
                made.draw_without_rendering()
                made.set_layout_engine("none")
            return made

    return run


@styled
def svg(figure: Figure, label: str) -> str:
    """The figure as an SVG element to put into a page; its colours are the page's CSS variables."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # several figures share a page, so their ids would clash
    width, height = figure.get_size_inches() * 96
    size = f"width: {width:.0f}px; min-width: {min(width, 700):.0f}px; aspect-ratio: {width:.0f} / {height:.0f}"
    text = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", text, count=1)
    attributes = f'style="{size}" role="img" aria-label="{html.escape(label)}"'
    text = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', lambda found: f"{found[1]} {attributes}", text, count=1)
    for name, color in COLORS.items():
        text = text.replace(color, f"var(--{name})")
    return text


@styled
def save(figure: Figure, path: Path) -> None:
    """Write the figure as PNG."""
    figure.savefig(path, dpi=DPI, facecolor="white", metadata={"Software": None})


def color(line: Line) -> str:
    """A contender's colour."""
    if line.kind == "fused":
        return FUSED if line.accuracy == "strict" else FAST
    return EAGER if line.kind == "eager" else PEER


def _plain(axis: Any) -> None:
    """Ticks of a logarithmic axis as plain numbers."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


# --- throughput beside peers --------------------------------------------------------------------------------------


@styled
def overview(cases: Sequence[Case]) -> Figure:
    """How many times as fast as the best of all others the fused model is, a row for each case."""
    rows = [(case, list(case.ratios())) for case in cases]
    rows = [(case, ratios) for case, ratios in rows if ratios]
    figure = Figure(figsize=(8.6, 1.0 + 0.245 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for y, (_, ratios) in enumerate(rows):
        for ours, _, ratio in reversed(ratios):
            strict = ours.accuracy == "strict"
            shade = LOSE if ratio < 1 and strict else color(ours)
            axes.plot([1, ratio], [y, y], color=shade, linewidth=5 if strict else 2, solid_capstyle="butt")
            if strict:
                axes.plot(ratio, y, "o", color=shade, markersize=6)
            else:  # above the bar, which is longer where fast is slower than strict
                axes.plot(ratio, y, "D", color=shade, markeredgecolor=INK, markeredgewidth=0.7, markersize=5, zorder=3)
        ours, other, ratio = ratios[0]
        shade = LOSE if ratio < 1 else INK
        farthest = max(1.0, *(r for *_, r in ratios))
        fast = "".join(f" (fast {r:.2f}x)" for contender, _, r in ratios[1:] if contender.accuracy == "fast")
        text = f"{ratio:.2f}x{fast}  {three_digits(ours.speed)} images/s, {other.name} {three_digits(other.speed)}"
        _note(axes, text, (farthest, y), 8, color=shade)
    axes.axvline(1, color=INK, linewidth=1)
    low = min([1.0] + [r for _, ratios in rows for *_, r in ratios])
    high = max([1.0] + [r for _, ratios in rows for *_, r in ratios])
    axes.set_xlim(low - 0.06 * (high - low + 0.2), high + 0.85 * (high - low + 0.2))
    axes.set_xticks([tick for tick in axes.get_xticks() if low - 0.1 <= tick <= high + 0.1])
    _rows(axes, [case.title for case, _ in rows])
    axes.set_xlabel("throughput of fused / best of all others (right of the line: fused is faster)")
    axes.set_title("Fused beside the fastest other contender; diamonds: accuracy='fast'")
    return figure


@styled
def throughput(model: str, cases: Sequence[Case]) -> Figure:
    """Images per second of everyone, for one model: a row of panels for each dtype, a column for each batch."""
    dtypes = list(dict.fromkeys(case.dtype for case in cases))
    batches = sorted({case.batch for case in cases})
    names = {dtype: _timed([case for case in cases if case.dtype == dtype]) for dtype in dtypes}
    heights = [0.55 + 0.2 * len(names[dtype]) for dtype in dtypes]
    size = (2.0 + min(3.1, (WIDTH - 2.0) / len(batches)) * len(batches), 0.35 + sum(heights))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(dtypes), len(batches), squeeze=False, height_ratios=heights)
    at = {(case.dtype, case.batch): case for case in cases}
    for i, dtype in enumerate(dtypes):
        for j, batch in enumerate(batches):
            axes = grid[i][j]
            _rows(axes, names[dtype], labels=j == 0)
            axes.set_title(f"{model}, {dtype}, batch {batch}")
            if (dtype, batch) in at:
                _bars(axes, at[dtype, batch], names[dtype])
            else:
                axes.set_xticks([])
                axes.text(0.02, 0.5, "not measured", color=MUTED, transform=axes.transAxes)
            if i == len(dtypes) - 1:
                axes.set_xlabel("images/s (more is better)")
    return figure


def _timed(cases: Sequence[Case]) -> list[str]:
    """The names of all who were timed, the fused ones first."""
    lines = {line.name: line for case in cases for line in case.lines if line.images_per_s}
    return sorted(lines, key=lambda name: lines[name].kind != "fused")


def _rows(axes: Axes, names: Sequence[str], labels: bool = True) -> None:
    """A row for each name, the first at the top."""
    axes.set_yticks(range(len(names)), names if labels else [])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _bars(axes: Axes, case: Case, names: Sequence[str]) -> None:
    found = {line.name: line for line in case.lines}
    widest = 0.0
    winner = max(case.lines, key=lambda line: line.speed)
    for y, name in enumerate(names):
        line = found.get(name)
        if line is None or not line.images_per_s:
            axes.text(0, y, "" if line is None else f" {line.status}", va="center", color=MUTED, fontsize=7.5)
            continue
        wrong, best, right = line.status != "ok", line is winner, line.images_per_s
        fill = "none" if wrong else color(line)
        edge = LOSE if wrong else color(line)
        axes.barh(y, line.images_per_s, 0.72, color=fill, edgecolor=edge, hatch="////" if wrong else None)
        if line.ms_p20 and line.ms_p80:
            spread = [case.batch / ms * 1e3 for ms in (line.ms_p80, line.ms_p20)]
            axes.plot(spread, [y, y], color=INK, linewidth=0.9)
            right = max(right, spread[1])
        widest = max(widest, right)
        text = three_digits(line.images_per_s) + (" wrong numbers" if wrong else " fastest" if best else "")
        shade = LOSE if wrong or (best and line.kind != "fused") else INK
        _note(axes, text, (right, y), color=shade, fontweight="bold" if best else "normal")
    axes.set_xlim(0, 1.5 * widest or 1.0)


def _note(axes: Axes, text: str, point: tuple[float, float], offset: float = 4, **style: Any) -> None:
    """Small text right of a point."""
    options: dict[str, Any] = {"va": "center", "fontsize": 7.5} | style
    axes.annotate(text, point, (offset, 0), textcoords="offset points", **options)


@styled
def latency(cases: Sequence[Case]) -> Figure | None:
    """Milliseconds of a call over the batch, a column for each model and a row for each dtype; None for one batch."""
    many = [m for m in dict.fromkeys(c.model for c in cases) if len({c.batch for c in cases if c.model == m}) > 1]
    if not many:
        return None
    dtypes = list(dict.fromkeys(case.dtype for case in cases))
    names = list(dict.fromkeys(line.name for case in cases for line in case.lines if line.kind != "fused"))
    width = max(min(1.2 + 2.7 * len(many), WIDTH), 8.6)  # not narrower than the legend
    figure = Figure(figsize=(width, 0.7 + 2.3 * len(dtypes)), layout="constrained")
    grid = figure.subplots(len(dtypes), len(many), squeeze=False)
    shown: dict[str, Any] = {}
    for i, dtype in enumerate(dtypes):
        for j, model in enumerate(many):
            axes = grid[i][j]
            here = sorted((c for c in cases if (c.model, c.dtype) == (model, dtype)), key=lambda c: c.batch)
            contenders = {line.name: line for case in here for line in case.lines}
            for name, line in sorted(contenders.items(), key=lambda item: item[1].kind == "fused"):
                points = [(c.batch, ln.ms) for c in here for ln in c.lines if ln.name == name and ln.ms and ln.speed]
                if not points:
                    continue
                ours = line.kind == "fused"
                (drawn,) = axes.plot(
                    *zip(*points, strict=True),
                    marker="o" if ours else MARKERS[names.index(name) % len(MARKERS)],
                    color=color(line),
                    linewidth=2.2 if ours else 1.0,
                    markersize=5 if ours else 4,
                )
                shown.setdefault(name, drawn)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(sorted({case.batch for case in here}))
            _plain(axes.xaxis)
            _plain(axes.yaxis)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.grid(True, axis="y")
            axes.set_title(f"{model}, {dtype}", fontsize=8.2 if len(many) > 4 else None)
            if i == len(dtypes) - 1:
                axes.set_xlabel("batch, images")
            if j == 0:
                axes.set_ylabel("ms for one call")
    ordered = sorted(shown, key=lambda name: name in names)
    figure.legend([shown[n] for n in ordered], ordered, loc="outside upper left", ncols=min(6, len(ordered)))
    return figure


@styled
def setup(cases: Sequence[Case]) -> Figure | None:
    """Seconds until the first result, a dot for each case; None where they were not taken down."""
    lines = [line for case in cases for line in case.lines if line.setup_seconds and line.speed]
    if not lines:
        return None
    kinds = {line.name: line for line in lines}
    middle = {name: sorted(ln.setup_seconds for ln in lines if ln.name == name) for name in kinds}
    names = sorted(kinds, key=lambda name: middle[name][len(middle[name]) // 2])
    figure = Figure(figsize=(8.6, 1.0 + 0.27 * len(names)), layout="constrained")
    axes = figure.subplots()
    for y, name in enumerate(names):
        seconds = middle[name]
        shade = color(kinds[name])
        axes.plot([seconds[0], seconds[-1]], [y, y], color=shade, linewidth=1.2)
        axes.plot(seconds, [y] * len(seconds), "o", color=shade, markersize=4.5, alpha=0.8, markeredgewidth=0)
        ends = dict.fromkeys((three_digits(seconds[0]), three_digits(seconds[-1])))
        _note(axes, f"{' to '.join(ends)} s", (seconds[-1], y), 8)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    left, right = axes.get_xlim()
    axes.set_xlim(left, right * 2)  # the last label, beside the slowest
    _rows(axes, names)
    _plain(axes.xaxis)
    axes.grid(True, axis="x")
    axes.set_xlabel("seconds from the model to its first result: fuse, export, compile, build (less is better)")
    axes.set_title("Set-up time, a dot for each model, batch and dtype")
    return figure


# --- blocks -------------------------------------------------------------------------------------------------------

BLOCK_STYLES = {
    "best": (PEER, "D", "best of all others"),
    "layer-fused": (INK, "|", LAYER_FUSED),
    "fast": (FAST, "D", "fused, accuracy='fast'"),
    "strict": (FUSED, "o", "fused"),
}


def block_speeds(case: Case) -> dict[str, float]:
    """How many times as fast as eager channels_last those are that a block's row shows; empty without eager."""
    by_name = {line.name: line for line in case.lines}
    lines = {"best": case.best_other(), "layer-fused": by_name.get(LAYER_FUSED)}
    lines |= {accuracy: case.fused(accuracy) for accuracy in ("fast", "strict")}
    eager = by_name[BASELINE].speed if BASELINE in by_name else 0.0
    return {name: line.speed / eager for name, line in lines.items() if line and line.speed and eager}


@styled
def blocks(cases: Sequence[Case]) -> Figure:
    """Speed-up of every block over eager, a panel for each model, batch and dtype."""
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for case in cases:
        title = f"{case.network}, batch {case.batch}, {case.dtype}"
        panels.setdefault(title, {})[case.block] = block_speeds(case)
    columns = min(2, len(panels))
    counts = [len(panel) for panel in panels.values()]
    tallest = [max(counts[i : i + columns]) for i in range(0, len(counts), columns)]
    figure = Figure(figsize=(0.6 + 5.2 * columns, 0.6 + sum(0.75 + 0.21 * n for n in tallest)), layout="constrained")
    grid = figure.subplots(len(tallest), columns, squeeze=False, height_ratios=[n + 2 for n in tallest])
    shown: dict[str, Any] = {}
    for axes in grid.flat:
        axes.set_visible(False)
    for axes, (title, panel) in zip(grid.flat, panels.items(), strict=False):
        axes.set_visible(True)
        _rows(axes, list(panel))
        for y, ups in enumerate(panel.values()):
            if not ups:
                _note(axes, "not measured", (1, y), color=MUTED)
                continue
            behind = min(ups.get("strict", 0.0), ups.get("fast", math.inf)) < ups.get("best", 1.0)
            axes.plot([min(ups.values()), max(ups.values())], [y, y], color=GRID, linewidth=1.5)
            axes.get_yticklabels()[y].set_color(LOSE if behind else INK)
            for name, up in ups.items():
                shade, marker, label = BLOCK_STYLES[name]
                (shown[label],) = axes.plot(up, y, marker, color=shade, markersize=6, linestyle="none")
        axes.axvline(1, color=INK, linewidth=1)
        axes.set_xlim(left=min(0.9, axes.get_xlim()[0]))
        axes.grid(True, axis="x")
        axes.set_xlabel("times as fast as eager channels_last (more is better)")
        axes.set_title(title)
    figure.legend(shown.values(), shown.keys(), loc="outside upper left", ncols=2 * columns)
    return figure


# --- roofline -----------------------------------------------------------------------------------------------------


@styled
def roofline(device: Device) -> Figure | None:
    """Models and blocks under the machine's roofline, a panel for each dtype; None where it was not measured."""
    machine = device.machine
    if machine is None:
        return None
    dtypes = [dtype for dtype in device.dtypes if dtype in machine.matmul_tflop_s]
    rows = max([1, *(math.ceil(len(model_points(device, dtype)) / KEY_COLUMNS) for dtype in dtypes)])
    heights = [4.3, 0.17 * rows]
    figure = Figure(figsize=(1.0 + 4.6 * len(dtypes), sum(heights)), dpi=DPI, layout="constrained")
    grid = figure.subplots(2, len(dtypes), squeeze=False, height_ratios=heights)
    panels = []
    for axes, key, dtype in zip(*grid, dtypes, strict=True):
        models, parts = sorted(model_points(device, dtype)), block_points(device, dtype)
        peak, copy = machine.matmul_tflop_s[dtype] * 1e3, machine.copy_gb_s
        ridge = peak / copy
        points = [*((x, y) for x, y, _ in models), *((x, y) for x, y, _ in parts)]
        left = min([ridge / 4, *(x / 1.5 for x, _ in points)])
        right = max([ridge * 8, *(x * 1.5 for x, _ in points)])
        axes.plot([left, ridge, right], [left * copy, peak, peak], color=INK, linewidth=1.6)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(left, right * 1.1)
        axes.set_ylim(
            min([left * copy, peak / 5, *(y / 2 for _, y in points)]), max([peak, *(y for _, y in points)]) * 1.6
        )
        for x, y, _ in parts:
            axes.plot(x, y, "o", markerfacecolor="none", markeredgecolor=FUSED, markersize=4, alpha=0.75)
        for x, y, _ in models:
            axes.plot(x, y, "o", color=FUSED, markersize=6.5)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 3)))
            _plain(axis)
        axes.grid(True)
        axes.set_xlabel("FLOP per byte (input, weights and output of every block, once)")
        axes.set_ylabel("GFLOP/s")
        axes.set_title(f"{dtype}: filled, models{'; hollow, blocks' if parts else ''}")
        _key(key, [name for *_, name in models], rows)
        panels.append((axes, models, points, peak, copy, left, right))
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # from now on everything stays where it is
    for axes, models, points, peak, copy, left, right in panels:
        ridge = peak / copy
        across = [left * (right / left) ** (i / 60) for i in range(61)]
        drawn = [_box(axes, x, min(x * copy, peak), 1) for x in across] + [_box(axes, x, y, 6) for x, y in points]
        words: list[Bbox] = []
        spots = [((x, peak), (0, 4), side, "bottom") for x, side in ((ridge, "left"), (right, "right"), (left, "left"))]
        _write(axes, f"torch.matmul {three_digits(peak)} GFLOP/s", spots, drawn, words, MUTED)
        spots = [((ridge / part, peak / part), (8, -2), "left", "top") for part in (2, 3, 1.4)]
        _write(axes, f"copy {three_digits(copy)} GB/s", spots, drawn, words, MUTED)
        for number, (x, y, _) in enumerate(models, 1):
            _write(axes, str(number), [((x, y), *spot) for spot in BESIDE], drawn, words, INK)
    return figure


KEY_COLUMNS = 2


def _key(axes: Axes, names: Sequence[str], rows: int) -> None:
    """What the numbers of the points stand for."""
    axes.axis("off")
    for i, name in enumerate(names):
        column, row = divmod(i, rows)
        place = (column / KEY_COLUMNS, 1 - row / rows)
        axes.text(*place, f"{i + 1}  {name}", fontsize=7, va="top", transform=axes.transAxes)


Spot = tuple[tuple[float, float], tuple[float, float], str, str]
"""Where words may stand: a point of the panel, an offset from it in points, horizontal and vertical alignment."""
BESIDE = (
    ((0, 6), "center", "bottom"),
    ((0, -6), "center", "top"),
    ((6, 0), "left", "center"),
    ((-6, 0), "right", "center"),
    *(((x, y), side, up) for y, up in ((5, "bottom"), (-5, "top")) for x, side in ((5, "left"), (-5, "right"))),
)


def _box(axes: Axes, x: float, y: float, size: float) -> Bbox:
    """The square around a point of a panel, up to so many pixels away."""
    across, up = axes.transData.transform((x, y))
    return Bbox([[across - size, up - size], [across + size, up + size]])


def _write(axes: Axes, text: str, spots: Sequence[Spot], drawn: Sequence[Bbox], words: list[Bbox], shade: str) -> None:
    """Write where nothing else is, else where least is.

    Args:
        axes: the panel.
        text: to write.
        spots: where it may stand, the best first.
        drawn: what it should not cover.
        words: what it must not cover; the new words are added.
        shade: colour.
    """

    def put(spot: Spot) -> Annotation:
        point, offset, across, up = spot
        style = {"textcoords": "offset points", "ha": across, "va": up, "fontsize": 7, "color": shade}
        return axes.annotate(text, point, offset, **style)

    def extent(spot: Spot) -> Bbox:
        trial = put(spot)
        box = trial.get_window_extent()
        trial.remove()
        return box.padded(2, 1)

    def cost(spot: Spot) -> int:
        box = extent(spot)
        inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1
        return box.count_overlaps(drawn) + 10 * box.count_overlaps(words) + (0 if inside else 100)

    best = min(spots, key=cost)  # the first of the best
    words.append(extent(best))
    put(best)


def model_points(device: Device, dtype: str) -> list[tuple[float, float, str]]:
    """(FLOP/byte, GFLOP/s, name) of every case fused at accuracy="strict"."""
    found = []
    for case in device.cases:
        ours = case.fused()
        if case.dtype == dtype and ours and case.roof:
            rate = case.roof.flops / case.batch * ours.speed / 1e9
            found.append((case.roof.intensity, rate, f"{case.model}, batch {case.batch}"))
    return found


def block_points(device: Device, dtype: str) -> list[tuple[float, float, str]]:
    """(FLOP/byte, GFLOP/s, name) of the blocks timed alone, at accuracy="strict"."""
    found = []
    plans = {(case.model, case.batch, case.dtype): case.plan for case in device.cases}
    for case in device.blocks:
        ours = case.fused()
        if case.dtype != dtype or ours is None:
            continue
        if case.roof:
            work, moved = case.roof.flops, case.roof.bytes
        else:  # of a run from before blocks had plans: by that of their model
            whole, path = plans.get((case.network, case.batch, dtype)) or {"rows": ()}, case.block.split()[0]
            rows = [row for row in whole["rows"] if path in (row["block"], row["kernel"])]
            work, moved = (sum(row.get(key) or 0 for row in rows) for key in ("flops", "bytes"))
        if moved:
            found.append((work / moved, work / case.batch * ours.speed / 1e9, case.block))
    return found
