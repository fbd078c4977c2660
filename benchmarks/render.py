"""Draw the committed results and write their tables into README.md, between its `results` markers.

    python benchmarks/render.py [--check]

Every figure in the README comes from benchmarks/results/<device>/main.json, by this script.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from resnet_fused import report

ROOT = Path(__file__).parent.parent
START, END = "<!-- results -->", "<!-- end -->"


def rendered(readme: str) -> str:
    """Return the README with the part between its markers made anew."""
    head, _, rest = readme.partition(START)
    _, _, tail = rest.partition(END)
    parts = []
    for path in sorted(ROOT.glob("benchmarks/results/*/main.json")):
        picture = path.with_suffix(".png").relative_to(ROOT)
        result = json.loads(path.read_text())
        parts.append(f"![Throughput, {report.conditions(result)}]({picture})\n\n{report.markdown_table(result)}\n")
    return f"{head}{START}\n" + "\n".join(parts) + f"{END}{tail}"


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
