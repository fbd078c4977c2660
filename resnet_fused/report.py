"""Shows benchmark results: tables for the terminal, a plot, and the table of the README."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .errors import InputError

Result = dict[str, Any]  # what bench.run returns


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


def row_label(row: dict[str, Any]) -> str:
    """The name of a row, its allocator setting included."""
    return row["name"] + (", memory reused" if row["memory"] == "reused" else "")


def print_result(result: Result, console: Console) -> None:
    """Print the parity and throughput tables."""
    console.print(conditions(result), style="bold")
    console.print(parity_table(result))
    for dtype in result["dtype"].split(","):
        console.print(throughput_table(result, dtype))
        console.print(cost_table(result, dtype))
    console.print(
        f"Speed-up: over {result['baseline']} with the same allocator setting. ms: the median, beside it the 20th and "
        "80th percentile. Extra: the peak of one forward pass. Kept: what stays between passes (packed weights). "
        "Parity: errors of the logits, and predictions that differ from float64's.",
        style="dim",
    )


def parity_table(result: Result) -> Table:
    """One line for each fused model: its errors against float64 beside unfused torch's, and how much of it is fused."""
    verdict = "holds" if result["parity"]["ok"] else "DOES NOT HOLD"
    table = Table(title="Parity with float64", caption=f"parity {verdict} (block by block: resnet-fused verify)")
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
            str(report["flipped"]),
            str(report["unfused_flipped"]),
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
                f"{row['ms_median']:.1f}",
                f"{row['ms_p20']:.1f}-{row['ms_p80']:.1f}",
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


def plot(result: Result, path: Path) -> None:
    """Draw throughput, a panel for each dtype and a bar for each row, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dtypes = result["dtype"].split(",")
    figure, axes = pyplot.subplots(
        1, len(dtypes), figsize=(1.5 + 5 * len(dtypes), 3.6), squeeze=False, layout="constrained"
    )
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        rows = [row for row in result["rows"] if row["dtype"] == dtype]
        names = list(dict.fromkeys(row["name"] for row in rows))
        for row in rows:
            reused = row["memory"] == "reused"
            y = names.index(row["name"]) + (0.2 if reused else -0.2)
            color = ("#1b7f5c" if row["accuracy"] else "#8a8f98", 0.55 if reused else 1.0)
            axis.barh(y, row["images_per_s"], 0.38, color=color)
            axis.plot([row_rate(result, row, p) for p in ("ms_p20", "ms_p80")], [y, y], color="black", linewidth=1)
            label = f" {row['images_per_s']:.3g}" + (f"  {row['speedup']:.2f}x" if row["accuracy"] else "")
            if row["name"] == names[0]:
                label += "  memory reused" if reused else "  default allocator"
            axis.text(max(row["images_per_s"], row_rate(result, row, "ms_p20")), y, label, va="center", fontsize=8)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set_title(dtype)
        axis.set_xlabel("images/s (more is better)")
        axis.set_xlim(0, 1.35 * max(row["images_per_s"] for row in rows))
        axis.spines[["top", "right"]].set_visible(False)
    title = f"{conditions(result)}\nspeed-up over {result['baseline']} with the same allocator setting"
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)


def row_rate(result: Result, row: dict[str, Any], quantile: str) -> float:
    """Images per second at a percentile of a row's times."""
    return result["batch"] / row[quantile] * 1e3
