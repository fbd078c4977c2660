"""Shows benchmark results: tables for the terminal, a plot, and the table of the README."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .errors import InputError
from .roofline import Machine
from .tables import show

Result = dict[str, Any]  # what bench.run and peers.run return
Row = dict[str, Any]

NARROW: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
"""Options of a table with so many columns that 80 characters are few."""


def check_output(option: str, path: Path | None, suffix: str = "") -> None:
    """Raise InputError unless a file can be written at `path`; called before a long run, leaves nothing behind."""
    if path is None:
        return
    if suffix and path.suffix != suffix:
        raise InputError(f"{option} must name a {suffix} file, got {str(path)!r}")
    existed = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise InputError(f"{option} must be a path that can be written, got {str(path)!r}: {error.strerror}") from None
    if not existed:
        path.unlink()


def write_json(result: Result, path: Path) -> None:
    """Write a result as JSON."""
    path.write_text(json.dumps(result, indent=1) + "\n")


def conditions(result: Result) -> str:
    """The conditions of a result in one line."""
    parts = [result["model"], f"batch {result['batch']}", result["device_name"]]
    if result["device"] == "cpu":
        parts += [f"{result['threads']} thread{'s' * (result['threads'] != 1)}"]
        parts += ["no native kernels" if result["isa"] == "none" else f"{result['isa']} kernels"]
    return ", ".join([*parts, f"torch {result['versions']['torch']}"])


def clocks(result: Result) -> str:
    """The clocks before and after a run, in words; empty where the system did not tell them."""
    told = result.get("clocks") or {}
    return ", ".join(f"{_clock_words(told[moment])} {moment}" for moment in ("before", "after") if told.get(moment))


def _clock_words(told: dict[str, Any]) -> str:
    names = {"sm_mhz": "SM", "memory_mhz": "memory"}
    words = [f"{names[key]} {told[key]} MHz" for key in names if key in told]
    if cores := told.get("cores_mhz"):
        ends = dict.fromkeys(f"{mhz:.0f}" for mhz in (min(cores), max(cores)))
        words.append(f"cores {' to '.join(ends)} MHz")
    return " and ".join(words)


def settings(chosen: dict[str, Any]) -> str:
    """A contender's settings in one line."""
    return ", ".join(f"{name}={value}" for name, value in chosen.items())


def bound(row: Row) -> str:
    """A row's place on the roofline, in words; empty without one."""
    if not row.get("bound_ms"):
        return ""
    return f"{row['flop_per_byte']:.0f} FLOP/byte, at least {three_digits(row['bound_ms'])} ms ({row['bound']})"


def row_label(row: dict[str, Any]) -> str:
    """The name of a row, its allocator setting included."""
    return row["name"] + (", memory reused" if row["memory"] == "reused" else "")


def print_result(result: Result, console: Console) -> None:
    """Print what a result holds: tables of parity, throughput and costs, or the comparison with the peers."""
    console.print(conditions(result), style="bold")
    machine = f"machine: {Machine.from_dict(result['machine'])}" if result.get("machine") else ""
    clock_words = f"clocks: {clocks(result)}" if clocks(result) else ""
    for words in filter(None, (machine, clock_words)):
        console.print(words, highlight=False)
    if result["peers"]:
        (print_blocks if result.get("kind") == "blocks" else print_peers)(result, console)
        if result["interrupted"]:
            console.print("Interrupted: these are the rows so far.", style="yellow")
        return
    show(parity_table(result), console)
    for dtype in result["dtype"].split(","):
        show(throughput_table(result, dtype), console)
        show(cost_table(result, dtype), console)
    console.print(
        f"Speed-up: over {result['baseline']} with the same allocator setting. ms: the median, beside it the 20th and "
        "80th percentile. Extra: the peak of one forward pass. Kept: what stays between passes (packed weights). "
        "Parity: errors of the logits, and predictions that differ from float64's.",
        style="dim",
    )


def print_peers(result: Result, console: Console) -> None:
    """Print the comparison, a table for each dtype, and who wins."""
    for dtype in dict.fromkeys(row["dtype"] for row in result["rows"]):
        if timed_rows(result, dtype):
            show(peers_table(result, dtype), console)
            show(numbers_table(result, dtype), console)
        rows = select(result, dtype, "reused")
        for row in rows:
            if row["status"] != "ok":
                console.print(f"{row['name']}: {row['status']}, {row['detail']}", markup=False, highlight=False)
        for row in rows:
            if row["kind"] == "peer" and row.get("settings"):
                words = f"{row['name']}: {settings(row['settings'])}"
                console.print(words, style="dim", markup=False, highlight=False)
        for row in (row for row in rows if row["kind"] == "fused"):
            console.print(verdict(row, rows), style="bold", markup=False)
    console.print(
        f"Speed-up: over {result['baseline']}. ms: the median, beside it the 20th and 80th percentile. Of bound: the "
        "least time at the machine's rates, as a share of ms; Winograd and caches can pass 100%. Set-up: export, "
        "compiling, fusing and the first call. Error: the largest of an output against float64, beside it how many "
        "times unfused torch's. Flipped: predictions that differ from float64's. Extra: the peak of one forward pass. "
        "Kept: what set-up leaves behind. Memory is reused by all.",
        style="dim",
    )


def print_blocks(result: Result, console: Console) -> None:
    """Print the comparison of a model's blocks: a table for each dtype, and who was not measured or was wrong."""
    rows = result["rows"]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        show(blocks_table(result, dtype), console)
    missing: dict[str, list[str]] = {}
    for row in (row for row in rows if row["status"] != "ok"):
        missing.setdefault(f"{row['dtype']} {row['name']}: {row['status']}, {row['detail']}", []).append(row["block"])
    total = len({row["block"] for row in rows})
    for what, where in missing.items():
        which = where[0] if len(where) == 1 else f"{len(where)} of {total} blocks"
        console.print(f"{what} ({which})", markup=False, highlight=False)
    console.print(
        "ms: medians. Best other: the fastest that is not this package and whose numbers hold. Beside fused: how many "
        "times as fast as that it is. A block gets what it gets in the model on real pictures. Memory is reused.",
        style="dim",
    )


def blocks_table(result: Result, dtype: str) -> Table:
    """Milliseconds of every block: the fastest of each accuracy, and the best of all others."""
    table = Table("block", title=f"{dtype}: blocks, ms", caption=f"parity {_holds(result)}")
    for column in ("best other", "fused", "", "fused fast", ""):
        table.add_column(column, justify="right")
    rows = select(result, dtype, "reused")
    for block in dict.fromkeys(row["block"] for row in rows):
        here = [row for row in rows if row["block"] == block]
        best = best_peer(here)
        cells = [f"{best['name']} {three_digits(best['ms_median'])}" if best else "not timed"]
        for accuracy in ("strict", "fast"):
            times = [row["ms_median"] for row in here if row["accuracy"] == accuracy and row["ms_median"]]
            ratio = best["ms_median"] / min(times) if best and times else None
            cells += [three_digits(min(times, default=None)), "" if ratio is None else f"{ratio:.2f}x"]
        table.add_row(block, *cells)
    return table


def _holds(result: Result) -> str:
    if result["interrupted"] and not any(
        row.get("kind") == "fused" and row["error"] is not None for row in result["rows"]
    ):
        return "was not checked yet"
    return "holds" if result["parity"]["ok"] else "DOES NOT HOLD"


def timed_rows(result: Result, dtype: str) -> list[Row]:
    """The rows of a comparison that were timed, the fastest first."""
    rows = [row for row in select(result, dtype, "reused") if row["images_per_s"]]
    return sorted(rows, key=lambda row: row["ms_median"])


def style_of(row: Row) -> str | None:
    """Red for a row that does not count, bold for a fused one."""
    return "red" if row["status"] != "ok" else "bold" if row["kind"] == "fused" else None


def peers_table(result: Result, dtype: str) -> Table:
    """Throughput and set-up time, one line for each contender that was timed."""
    rows = timed_rows(result, dtype)
    energy = any(row.get("images_per_joule") for row in rows)
    known = (None, result["versions"]["torch"])  # it is in the heading
    roof = next(filter(None, map(bound, rows)), "")
    table = Table("contender", title=f"{dtype}: interleaved, the fastest first", **NARROW)
    table.caption = f"roofline: {roof}" if roof else None
    columns = ("images/s", "speed-up", "ms", "20-80%", "of bound", "set-up s", *(["images/J"] if energy else []))
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"{row['name']} {row['version']}" if row["kind"] == "peer" and row["version"] not in known else row["name"],
            number(row["images_per_s"], 1),
            f"{row['speedup']:.2f}x" if row["speedup"] else "",
            three_digits(row["ms_median"]),
            f"{three_digits(row['ms_p20'])}-{three_digits(row['ms_p80'])}",
            percent(row.get("share_of_bound")),
            number(row["setup_seconds"], 1),
            *([number(row.get("images_per_joule"), 2)] if energy else []),
            style=style_of(row),
        )
    return table


def numbers_table(result: Result, dtype: str) -> Table:
    """Parity and memory, one line for each contender that was timed."""
    table = Table("contender", title=f"{dtype}: parity with float64, and memory", **NARROW)
    for column in ("error", "/ unfused", "flipped", "extra MB", "kept MB"):
        table.add_column(column, justify="right")
    for row in timed_rows(result, dtype):
        ratio = row["error"] / row["unfused_error"] if row["error"] is not None and row["unfused_error"] else None
        table.add_row(
            row["name"],
            "" if row["error"] is None else f"{row['error']:.1e}",
            "" if ratio is None else f"{ratio:.1f}x",
            "" if row["flipped"] is None else str(row["flipped"]),
            number(row.get("peak_extra_mb"), 0),
            number(row.get("kept_mb"), 0),
            style=style_of(row),
        )
    return table


def best_peer(rows: list[Row]) -> Row | None:
    """The fastest contender that is not this package and computes the same, plain torch included; None without one."""
    able = [row for row in rows if row["kind"] != "fused" and row["status"] == "ok" and row["images_per_s"]]
    return max(able, key=lambda row: row["images_per_s"], default=None)


def verdict(row: Row, rows: list[Row]) -> str:
    """How a fused row stands beside the best peer among the rows of its dtype, in words."""
    best = best_peer(rows)
    if not row["images_per_s"]:
        return f"{row['dtype']} {row['name']}: not timed"
    if best is None:
        return f"{row['dtype']} {row['name']}: {row['images_per_s']:.1f} images/s, no peer was timed"
    ratio = row["images_per_s"] / best["images_per_s"]
    which = "faster than" if ratio > 1 else "SLOWER than"
    return (
        f"{row['dtype']} {row['name']}: {row['images_per_s']:.1f} images/s, {ratio:.2f}x, {which} the best peer, "
        f"{best['name']}, with {best['images_per_s']:.1f}"
    )


def parity_table(result: Result) -> Table:
    """One line for each fused model: its errors against float64 beside unfused torch's, and how much of it is fused."""
    table = Table(title="Parity with float64", caption=f"parity {_holds(result)} (block by block: resnet-fused verify)")
    table.add_column("fused")
    for column in ("blocks", "error", "unfused", "flipped", "unfused", "FLOPs fused"):
        table.add_column(column, justify="right")
    for report, plan in zip(result["parity"]["reports"], result["plans"], strict=True):
        *blocks, whole = report["rows"]
        table.add_row(
            f"{report['dtype']} {report['accuracy']}",
            f"{sum(row['ok'] for row in blocks)}/{len(blocks)}",
            f"{whole['error']:.1e}",
            f"{whole['unfused_error']:.1e}",
            number(report["flipped"], 0),
            number(report["unfused_flipped"], 0),
            f"{plan['coverage']:.1%}",
            style=None if report["ok"] else "red",
        )
    return table


def throughput_table(result: Result, dtype: str) -> Table:
    """One line for each timed row of a dtype."""
    table = Table("contender", "memory", title=f"{dtype}: throughput, interleaved")
    for column in ("images/s", "speed-up", "ms", "20-80%"):
        table.add_column(column, justify="right")
    for memory in ("default", "reused"):
        for row in select(result, dtype, memory):
            table.add_row(
                row["name"],
                memory,
                f"{row['images_per_s']:.1f}",
                f"{row['speedup']:.2f}x",
                three_digits(row["ms_median"]),
                f"{three_digits(row['ms_p20'])}-{three_digits(row['ms_p80'])}",
                style="bold" if row["accuracy"] else None,
            )
        table.add_section()
    return table


def cost_table(result: Result, dtype: str) -> Table:
    """Memory and preparation time, one line for each contender of a dtype."""
    table = Table("contender", title=f"{dtype}: memory and preparation")
    for column in ("extra MB", "kept MB", "fuse s", "first call s"):
        table.add_column(column, justify="right")
    for row in select(result, dtype, "default"):
        table.add_row(
            row["name"],
            number(row["peak_extra_mb"], 0),
            number(row["kept_mb"], 0),
            number(row.get("fuse_seconds"), 2),
            number(row.get("first_call_seconds"), 2),
            style="bold" if row["accuracy"] else None,
        )
    return table


def select(result: Result, dtype: str, memory: str) -> list[dict[str, Any]]:
    """The rows of a result with this dtype and allocator setting."""
    return [row for row in result["rows"] if (row["dtype"], row["memory"]) == (dtype, memory)]


def number(value: float | None, digits: int) -> str:
    """The number with so many digits after the point; nothing for None."""
    return "" if value is None else f"{value:.{digits}f}"


def three_digits(value: float | None) -> str:
    """The value with three digits, without exponent; nothing for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def percent(share: float | None) -> str:
    """The share in whole percents; nothing for None."""
    return "" if share is None else f"{share:.0%}"


def markdown_table(result: Result) -> str:
    """The throughput table as Markdown, for the README."""
    lines = [
        f"{conditions(result)}. Parity {'holds' if result['parity']['ok'] else 'does not hold'}.",
        "",
        "| dtype | | images/s | speed-up | ms (20-80%) | extra memory, MB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        mark = "**" if row["accuracy"] else ""
        cells = (
            row["dtype"],
            f"{mark}{row_label(row)}{mark}",
            f"{row['images_per_s']:.1f}",
            f"{mark}{row['speedup']:.2f}x{mark}",
            f"{row['ms_median']:.1f} ({row['ms_p20']:.1f}-{row['ms_p80']:.1f})",
            number(row.get("peak_extra_mb"), 0),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


COLORS = {"fused": "#1b7f5c", "eager": "#8a8f98", "peer": "#6b86a8"}


def plot(result: Result, path: Path) -> None:
    """Draw throughput, a panel for each dtype and a bar for each row that was timed, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in result["rows"] if row["images_per_s"]]
    dtypes = list(dict.fromkeys(row["dtype"] for row in timed))
    panels = max(1, len(dtypes))
    most = max((sum(row["dtype"] == dtype for row in timed) for dtype in dtypes), default=1)
    size = (1.5 + 5 * panels, max(3.6, 1.5 + 0.3 * most))
    figure, axes = pyplot.subplots(1, panels, figsize=size, squeeze=False, layout="constrained")
    for axis, dtype in zip(axes[0], dtypes, strict=False):
        rows = [row for row in timed if row["dtype"] == dtype]
        names = list(dict.fromkeys(row["name"] for row in rows))
        both = len({row["memory"] for row in rows}) > 1  # allocator settings, a bar for each
        for row in rows:
            reused = row["memory"] == "reused"
            y = names.index(row["name"]) + (0.2 if reused else -0.2) * both
            kind = "fused" if row["accuracy"] else row.get("kind", "eager")
            color = (COLORS[kind], 0.55 if both and reused else 1.0)
            axis.barh(y, row["images_per_s"], 0.38 if both else 0.7, color=color)
            axis.plot([row_rate(result, row, p) for p in ("ms_p20", "ms_p80")], [y, y], color="black", linewidth=1)
            label = f" {three_digits(row['images_per_s'])}" + (
                f"  {row['speedup']:.2f}x" if row["accuracy"] and row["speedup"] else ""
            )
            if both and row["name"] == names[0]:
                label += "  memory reused" if reused else "  default allocator"
            if row.get("status", "ok") != "ok":
                label += f"  {row['status']}"
            axis.text(max(row["images_per_s"], row_rate(result, row, "ms_p20")), y, label, va="center", fontsize=8)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set_title(dtype)
        axis.set_xlabel("images/s (more is better)")
        axis.set_xlim(0, 1.35 * max(row_rate(result, row, "ms_p20") for row in rows))
        axis.spines[["top", "right"]].set_visible(False)
    setting = "memory reused by all" if result.get("peers") else "with the same allocator setting"
    figure.suptitle(f"{conditions(result)}\nspeed-up over {result['baseline']}, {setting}", fontsize=8)
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)


def row_rate(result: Result, row: dict[str, Any], quantile: str) -> float:
    """Images per second at a percentile of a row's times."""
    return result["batch"] / row[quantile] * 1e3
