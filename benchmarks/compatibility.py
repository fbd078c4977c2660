"""Which models fuse, how much of them, and how exact they then are: the table of supported models in the README.

    python benchmarks/compatibility.py [--only NAME]

writes benchmarks/results/compatibility.json, from which report.py makes the table. The tests measure the same models,
with the same functions, against the floors that stand here.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import resnet_fused as rf
from resnet_fused import environment

RESULT = Path(__file__).parent / "results" / "compatibility.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Entry:
    """A model to fuse.

    Attributes:
        library: the distribution it comes from.
        make: builds it with random weights.
        floor: share of its convolution FLOPs that must run in fused kernels.
        size: of the square test image.
    """

    library: str
    make: Callable[[], nn.Module]
    floor: float
    size: int = 64


@dataclass(frozen=True)
class Outcome:
    """What came of one model at one dtype.

    Attributes:
        coverage: share of the convolution FLOPs in fused kernels.
        kernels: how often each op ran.
        ratio: the worst block's error over its limit, which the parity rule sets; 1 is just within.
        ok: whether the parity rule holds everywhere.
    """

    model: str
    library: str
    version: str
    dtype: str
    coverage: float
    kernels: dict[str, int]
    ratio: float
    ok: bool


@contextlib.contextmanager
def without_compiled_operators() -> Iterator[None]:
    """torchvision imports although its compiled operators do not match the installed torch: no model needs them."""
    register_fake = torch.library.register_fake

    def skip_torchvision(op: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return register_fake(op, *args, **kwargs)

    torch.library.register_fake = skip_torchvision
    try:
        yield
    finally:
        torch.library.register_fake = register_fake


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with without_compiled_operators():
            from torchvision import models

        module: Any = models
        *path, function = name.split(".")
        for part in path:
            module = getattr(module, part)
        return getattr(module, function)(**options)

    return make


def _timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with without_compiled_operators(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about names that timm maps to newer ones
            import timm

            return timm.create_model(name, pretrained=False)

    return make


def _transformers(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with without_compiled_operators():
            import transformers

            return getattr(transformers, name)(getattr(transformers, config)(**options))

    return make


def _own(name: str) -> Callable[[], nn.Module]:
    return lambda: rf.models.build(name)


_FEATURES = {"out_features": ["stage2", "stage3", "stage4"]}
_DETECTION = "detection.backbone_utils.resnet_fpn_backbone"
_NO_AUXILIARY = {"init_weights": False, "aux_logits": False}

MODELS: dict[str, Entry] = {
    "resnet18": Entry("torchvision", _torchvision("resnet18"), 1.0),
    "resnet50": Entry("torchvision", _torchvision("resnet50"), 1.0),
    "resnext50_32x4d": Entry("torchvision", _torchvision("resnext50_32x4d"), 1.0),
    "wide_resnet50_2": Entry("torchvision", _torchvision("wide_resnet50_2"), 1.0),
    "densenet121": Entry("torchvision", _torchvision("densenet121"), 1.0),
    "vgg16_bn": Entry("torchvision", _torchvision("vgg16_bn"), 1.0),
    "regnet_y_400mf": Entry("torchvision", _torchvision("regnet_y_400mf"), 0.95),
    "googlenet": Entry("torchvision", _torchvision("googlenet", **_NO_AUXILIARY), 1.0),
    "inception_v3": Entry("torchvision", _torchvision("inception_v3", **_NO_AUXILIARY), 1.0, 80),
    "Faster R-CNN's ResNet-50": Entry(
        "torchvision", lambda: _torchvision(_DETECTION, backbone_name="resnet50", weights=None)().body, 0.95
    ),
    "fcn_resnet50": Entry(
        "torchvision", _torchvision("segmentation.fcn_resnet50", weights=None, weights_backbone=None), 0.95
    ),
    "timm resnet50": Entry("timm", _timm("resnet50"), 1.0),
    "timm resnet50d": Entry("timm", _timm("resnet50d"), 1.0),
    "timm resnetaa50": Entry("timm", _timm("resnetaa50"), 1.0),
    "timm seresnet50": Entry("timm", _timm("seresnet50"), 0.95),
    "timm ecaresnet26t": Entry("timm", _timm("ecaresnet26t"), 0.95),
    "timm legacy_seresnet18": Entry("timm", _timm("legacy_seresnet18"), 0.95),
    "timm gluon resnet50_v1c": Entry("timm", _timm("resnet50c"), 1.0),
    "timm resnetv2_50": Entry("timm", _timm("resnetv2_50"), 0.95),
    "timm densenet121": Entry("timm", _timm("densenet121"), 1.0),
    "timm res2net50_26w_4s": Entry("timm", _timm("res2net50_26w_4s"), 1.0),
    "ResNetForImageClassification": Entry(
        "transformers", _transformers("ResNetForImageClassification", "ResNetConfig", num_labels=1000), 1.0
    ),
    "RTDetrResNetBackbone": Entry(
        "transformers", _transformers("RTDetrResNetBackbone", "RTDetrResNetConfig", **_FEATURES), 0.95
    ),
}


def measure(name: str, dtype: str) -> Outcome:
    """Fuse a model with every BatchNorm random, explain it and verify it, on a small random image."""
    entry = MODELS[name]
    torch.manual_seed(0)
    model = rf.models.randomize_batchnorms(entry.make()).eval().to(DTYPES[dtype])
    x = torch.randn(1, 3, entry.size, entry.size + 32).to(DTYPES[dtype])
    fast = rf.fuse(model)
    plan, report = rf.explain(fast, x), rf.verify(model, fast, x)
    names = [row.kernel for row in plan.rows]
    return Outcome(
        name,
        entry.library,
        importlib.metadata.version(entry.library),
        dtype,
        plan.coverage,
        {kernel: names.count(kernel) for kernel in sorted(set(names))},
        max(row.error / row.limit if row.limit else float(row.error > 0) for row in report.rows),
        report.ok,
    )


def markdown_table(result: dict[str, Any]) -> str:
    """The README's table: a row for each model, its dtypes side by side."""
    outcomes = {(row["model"], row["dtype"]): row for row in result["rows"]}
    lines = [
        "| model | from | conv FLOPs fused | kernels | worst error / limit, fp32 | bf16 |",
        "|---|---|---:|---|---:|---:|",
    ]
    for name in dict.fromkeys(row["model"] for row in result["rows"]):
        row = outcomes[name, "fp32"]
        kernels = ", ".join(f"{count} {kernel}" for kernel, count in row["kernels"].items() if kernel != "unfused")
        ratios = " | ".join(f"{outcomes[name, dtype]['ratio']:.2f}" for dtype in DTYPES)
        source = f"{row['library']} {row['version']}"
        lines.append(f"| {name} | {source} | {row['coverage']:.1%} | {kernels} | {ratios} |")
    return "\n".join(lines)


def main(only: Annotated[str, typer.Option(help="Models whose name contains this.")] = "") -> None:
    """Measure every model at every dtype; write the result unless --only is given."""
    rows = []
    for name in MODELS:
        if only not in name:
            continue
        for dtype in DTYPES:
            outcome = measure(name, dtype)
            rows.append(asdict(outcome))
            print(f"{name:32} {dtype} {outcome.coverage:.3f} {outcome.ratio:.2f} {outcome.kernels}", flush=True)
    if not all(row["ok"] for row in rows):
        sys.exit("parity does not hold everywhere")
    if not only:
        found = {"versions": environment.versions(), "commit": environment.commit(), "rows": rows}
        RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
