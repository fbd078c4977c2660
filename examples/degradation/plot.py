"""Draw curves.png and responses.png from results.json, all beside this file."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import typer
from matplotlib import pyplot

from resnet_fused.responses import Response, Responses, plot_responses

HERE = Path(__file__).parent
COLORS = {"plain": "#c8553d", "residual": "#1b7f5c"}


def plot_curves(nets: list[dict[str, Any]], path: Path) -> None:
    """Draw training and test error over the steps, plain nets on the left, residual nets on the right."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    depths = sorted({int(net["name"].split("-")[1]) for net in nets})
    for axis, kind in zip(axes, COLORS, strict=True):
        for net in nets:
            name, depth = net["name"].split("-")
            if name != kind:
                continue
            deep = int(depth) == depths[-1]
            for key, style in (("train_error", "--"), ("test_error", "-")):
                what = f"{depth} layers, {key.split('_')[0].replace('train', 'training')} error"
                errors = [100 * error for error in net[key]]
                width = 2.4 if deep else 1.1
                axis.plot(net["step"], errors, style, color=COLORS[kind], linewidth=width, label=what)
        axis.set_title(f"{kind} nets", fontsize=10)
        axis.set_xlabel("training step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("error, %")
    axes[0].set_ylim(bottom=0)
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)


def main(folder: Path = HERE) -> None:
    """Draw both plots."""
    nets = json.loads((folder / "results.json").read_text())["nets"]
    plot_curves(nets, folder / "curves.png")
    deepest = max(int(net["name"].split("-")[1]) for net in nets)
    responses = {
        net["name"]: Responses(tuple(Response(**row) for row in net["responses"]))
        for net in nets
        if net["name"].endswith(f"-{deepest}")
    }
    plot_responses(responses, folder / "responses.png")


if __name__ == "__main__":
    typer.run(main)
