"""Make pages, plots and the README's tables from the committed results.

    python benchmarks/report.py [--check]

From benchmarks/results/<device>/**/*.json: report.html, which needs nothing but itself, and PNG plots beside it. From
these and compatibility.json: the parts of README.md between its markers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import compatibility
import jinja2
import plots
import typer
from result_files import BASELINE_FILE, LEAST_RATE, RESULTS, Case, Device, Line, load, parse

from resnet_fused import report as tables
from resnet_fused.errors import InputError

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGE = "report.html"
END = "<!-- end -->"


@dataclass(frozen=True)
class Section:
    """A part of the page: a heading, a sentence on what is shown, and figures (SVG) with their labels."""

    title: str
    words: str
    figures: tuple[str, ...]


# --- words --------------------------------------------------------------------------------------------------------


def verdicts(cases: Sequence[Case]) -> tuple[str, list[str]]:
    """In one sentence, where the fused model is the fastest; and one sentence for every case where it is not."""
    compared = [(case, ours, other, ratio) for case in cases for ours, other, ratio in case.ratios()]
    strict = [entry for entry in compared if entry[1].accuracy == "strict"]
    if not strict:
        return "Nothing to compare was measured.", []
    wins = sum(ratio >= 1 for *_, ratio in strict)
    ratios = sorted(ratio for *_, ratio in strict)
    summary = (
        f"Fused at the default accuracy is the fastest in {wins} of {len(strict)} cases; its throughput is "
        f"{ratios[0]:.2f} to {ratios[-1]:.2f} times that of the fastest other contender."
    )
    return summary, [
        f"{case.title}: {other.name} is {1 / ratio:.2f} times as fast as {ours.name} "
        f"({tables.three_digits(other.speed)} against {tables.three_digits(ours.speed)} images/s)."
        for case, ours, other, ratio in compared
        if ratio < 1
    ]


def absences(cases: Sequence[Case]) -> list[str]:
    """Who was not measured, failed or gave other numbers, with the reason, and in how many cases."""
    found: dict[tuple[str, str, str], list[Case]] = {}
    for case in cases:
        for line in case.lines:
            if line.status != "ok":
                found.setdefault((line.name, line.status, line.detail), []).append(case)
    words = {"absent": "absent", "failed": "failed", "wrong": "gives other numbers"}
    return [
        f"{name} {words[status]}" + (f": {detail}" if detail else "") + f" ({_of(where, len(cases))})"
        for (name, status, detail), where in found.items()
    ]


def disturbances(device: Device) -> list[str]:
    """The cases, and the files of blocks, in which the machine was far slower than in others."""
    files = {case.title: case for case in device.cases}
    files |= {f"{case.network}, batch {case.batch}, {case.dtype}, blocks": case for case in device.blocks}
    slow = [(title, device.disturbance(case)) for title, case in files.items()]
    return [f"{title}: {words}" for title, words in slow if words]


def _of(where: Sequence[Case], total: int) -> str:
    if len(where) == total:
        return "everywhere"
    return where[0].title if len(where) == 1 else f"{len(where)} of {total} cases"


# --- the page -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One ratio of the overview table."""

    ratio: float
    ours: Line
    other: Line

    @property
    def tint(self) -> str:
        """Its colour: blue where fused is ahead, orange where it is behind, stronger the farther."""
        name = "fused" if self.ratio >= 1 else "lose"
        distance = self.ratio - 1 if self.ratio >= 1 else 1 / self.ratio - 1
        return f"color-mix(in srgb, var(--{name}) {min(12 + 40 * distance, 60):.0f}%, transparent)"


def grid(device: Device) -> tuple[list[tuple[str, str]], list[tuple[str, list[Cell | None]]]]:
    """The overview: its columns (dtype, accuracy), and its rows (model and batch, a cell for each column)."""
    cells: dict[tuple[str, int], dict[tuple[str, str], Cell]] = {}
    for case in device.cases:
        for ours, other, ratio in case.ratios():
            row = cells.setdefault((case.model, case.batch), {})
            row[case.dtype, ours.accuracy or ""] = Cell(ratio, ours, other)
    columns = [
        (dtype, accuracy)
        for dtype in device.dtypes
        for accuracy in ("strict", "fast")
        if any((dtype, accuracy) in row for row in cells.values())
    ]
    rows = [(f"{model}, batch {batch}", [row.get(c) for c in columns]) for (model, batch), row in cells.items()]
    return columns, rows


def figures(device: Device) -> dict[str, tuple[str, str, Any]]:
    """Every plot of a device that its results allow: (section, label, figure), by file name."""
    cases, found = device.cases, {}
    if any(list(case.ratios()) for case in cases):
        found["peers"] = ("", "Throughput of fused over the best of all others", plots.overview(cases))
    for model in device.models:
        mine = [case for case in cases if case.model == model]
        found[f"throughput-{model}"] = ("throughput", f"Throughput, {model}", plots.throughput(model, mine))
    if device.blocks:
        found["blocks"] = ("blocks", "Speed-up of every block", plots.blocks(device.blocks))
    for name, label, figure in (
        ("roofline", "Roofline", plots.roofline(device)),
        ("latency", "Latency over batch", plots.latency(cases)),
        ("setup", "Set-up time", plots.setup(cases)),
    ):
        if figure is not None:
            found[name] = (name, label, figure)
    return found


SECTIONS = {
    "throughput": (
        "Throughput beside peers",
        "Images per second, the median of interleaved calls; the thin line spans the 20th to the 80th percentile. "
        "Blue is this package, the darker blue at the default accuracy. Hatched: the numbers are not the model's.",
    ),
    "blocks": (
        "Speed-up per block",
        "Every distinct block alone, with the input that it gets in the model, beside eager torch at 1, the best of "
        "all others and, on a CPU, oneDNN's layer-fused path. Orange names: fused is behind the best of all others.",
    ),
    "roofline": (
        "Roofline",
        "The sloping roof is the rate of a large copy, the flat one that of torch.matmul. Every run measures both; "
        "the best of all runs is drawn. Kernels better than torch's pass the roof, Winograd, whose operations are "
        "counted as those of direct convolution, and what a cache holds. All figures, below, have every contender's "
        "share of the bound in its own run.",
    ),
    "latency": (
        "Latency over batch",
        "Milliseconds of one call, both axes logarithmic. Lower is better.",
    ),
    "setup": (
        "Set-up time",
        "From the model to its first result: to fuse, export, compile or build an engine, and the first call. The axis "
        "is logarithmic.",
    ),
}


def page(device: Device, drawn: dict[str, tuple[str, str, Any]]) -> str:
    """The device's page."""
    sections = []
    for key, (title, words) in SECTIONS.items():
        svgs = tuple(plots.svg(figure, label) for section, label, figure in drawn.values() if section == key)
        if svgs:
            sections.append(Section(title, words, svgs))
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "number": tables.three_digits,
        "percent": tables.percent,
        "settings": tables.settings,
        "bound": lambda line: tables.bound(asdict(line)),
    }
    summary, losses = verdicts(device.cases)
    columns, rows = grid(device)
    newest, every = device.newest, [*device.cases, *device.blocks]
    compared = [case for case in every if case.machine or not case.block]  # once only oneDNN was beside blocks
    return environment.get_template("report.html.j2").render(
        device=device,
        newest=newest,
        machine=device.machine,
        clocks=tables.clocks(newest),
        summary=summary,
        losses=losses,
        absences=absences(compared),
        disturbances=disturbances(device),
        least_rate=LEAST_RATE,
        columns=columns,
        rows=rows,
        sections=sections,
        colors=plots.COLORS,
        sources=sorted({case.source for case in every}),
        commits=sorted({case.commit[:12] for case in every if case.commit}),
        energy=any(line.images_per_joule for case in device.cases for line in case.lines),
        parity=all(line.status == "ok" for case in every for line in case.lines if line.kind == "fused"),
        relative=lambda path: path.relative_to(device.folder).as_posix(),
    )


def write(folder: Path) -> Path:
    """Write a device's page and plots; returns the page's path.

    Raises:
        InputError: there are no results, or a file is of another schema version.
    """
    device = load(folder)
    if not device.cases and not device.blocks:
        raise InputError(f"{folder} must hold results of resnet-fused bench, got none")
    drawn = figures(device)
    for name, (_, _, figure) in drawn.items():
        plots.save(figure, folder / f"{name}.png")
    for path, result in device.jobs.items():
        if path.name == "main.json":
            tables.plot(result, path.with_suffix(".png"))
    target = folder / PAGE
    target.write_text(page(device, drawn))
    return target


# --- the README ---------------------------------------------------------------------------------------------------


def between(readme: str, name: str, text: str) -> str:
    """Return the README with the part between the markers of this name replaced."""
    start = f"<!-- {name} -->"
    head, found, rest = readme.partition(start)
    if not found:
        raise InputError(f"README.md must have the marker {start}")
    _, _, tail = rest.partition(END)
    return f"{head}{start}\n{text}{END}{tail}"


def peers_table(cases: Sequence[Case]) -> str:
    """The README's comparison: a row for each case and accuracy."""
    lines = [
        "| model | batch | dtype | fused, images/s | best other | its images/s | fused / best other |",
        "|---|---:|---|---:|---|---:|---:|",
    ]
    for case in cases:
        for ours, other, ratio in case.ratios():
            dtype = case.dtype + (" fast" if ours.accuracy == "fast" else "")
            shown = f"**{ratio:.2f}x**" if ratio >= 1 else f"{ratio:.2f}x"
            speeds = tables.three_digits(ours.speed), other.name, tables.three_digits(other.speed)
            lines.append(f"| {' | '.join((case.model, str(case.batch), dtype, *speeds, shown))} |")
    return "\n".join(lines)


def rendered(readme: str, results: Path = RESULTS, root: Path = ROOT) -> str:
    """Return the README with the parts between its markers made anew.

    Raises:
        InputError: a marker is missing, or a file is of another schema version.
    """
    jobs, peers = [], []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        device, where = load(folder), folder.relative_to(root).as_posix()
        for path, result in device.jobs.items():
            if path.name == "main.json":
                title = f"Throughput, {tables.conditions(result)}"
                jobs.append(f"![{title}]({where}/main.png)\n\n{tables.markdown_table(result)}\n")
        compared = [case for case in device.cases if any(line.kind == "peer" for line in case.lines)]
        if compared:
            summary, losses = verdicts(compared)
            notes = [summary, *losses, *(f"{words[0].upper()}{words[1:]}." for words in absences(compared))]
            heading = f"{device.newest['device_name']}, {device.newest['threads']} threads"
            peers.append(
                f"![Fused beside the best of all others, {heading}]({where}/peers.png)\n\n"
                f"{heading}. {' '.join(notes)} All plots: [report.html]({where}/{PAGE}).\n\n{peers_table(compared)}\n"
            )
    readme = between(readme, "results", "\n".join(jobs))
    readme = between(readme, "peers", "\n".join(peers))
    models = parse(results / compatibility.RESULT.name)
    return between(readme, "compatibility", compatibility.markdown_table(models) + "\n")


def make(results: Path = RESULTS, readme: Path | None = README) -> list[Path]:
    """Write every device's page and plots, and the README's parts; returns the pages' paths.

    Raises:
        InputError: a file is of another schema version, or the README lacks a marker.
    """
    folders = sorted(path for path in results.iterdir() if path.is_dir())
    pages = [write(folder) for folder in folders if any(p.name != BASELINE_FILE for p in folder.rglob("*.json"))]
    if readme is not None:
        readme.write_text(rendered(readme.read_text(), results))
    return pages


def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if the README would change.")] = False,
) -> None:
    """Make everything, or check that the README is up to date."""
    try:
        if check:
            raise typer.Exit(rendered(README.read_text()) != README.read_text())
        for path in make():
            print(path)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
