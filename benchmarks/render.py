"""Draw the committed results and write their tables into README.md, between its markers.

    python benchmarks/render.py [--check]

Every figure in the README comes from benchmarks/results, by this script: speed from <device>/main.json, the models from
compatibility.json.
"""

import json
from pathlib import Path
from typing import Annotated

import compatibility
import typer

from resnet_fused import report

ROOT = Path(__file__).parent.parent
END = "<!-- end -->"


def between(readme: str, name: str, text: str) -> str:
    """Return the README with the part between the markers of this name replaced."""
    start = f"<!-- {name} -->"
    head, _, rest = readme.partition(start)
    _, _, tail = rest.partition(END)
    return f"{head}{start}\n{text}{END}{tail}"


def rendered(readme: str) -> str:
    """Return the README with the parts between its markers made anew."""
    parts = []
    for path in sorted(ROOT.glob("benchmarks/results/*/main.json")):
        picture = path.with_suffix(".png").relative_to(ROOT)
        result = json.loads(path.read_text())
        parts.append(f"![Throughput, {report.conditions(result)}]({picture})\n\n{report.markdown_table(result)}\n")
    readme = between(readme, "results", "\n".join(parts))
    models = json.loads(compatibility.RESULT.read_text())
    return between(readme, "compatibility", compatibility.markdown_table(models) + "\n")


def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if it would change.")] = False,
) -> None:
    """Render, or check that the README is up to date."""
    readme = ROOT / "README.md"
    text = rendered(readme.read_text())
    if check:
        raise typer.Exit(text != readme.read_text())
    for path in ROOT.glob("benchmarks/results/*/main.json"):
        report.plot(json.loads(path.read_text()), path.with_suffix(".png"))
    readme.write_text(text)


if __name__ == "__main__":
    typer.run(main)
