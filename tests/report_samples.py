"""Made-up benchmark results, in the shape that `resnet-fused bench`, with `--peers` and with `--blocks`, write."""

import json
from pathlib import Path

from resnet_fused import bench

MACHINE = {
    "device": "cpu",
    "device_name": "some processor",
    "threads": 2,
    "copy_gb_s": 20.0,
    "matmul_tflop_s": {"fp32": 0.2, "bf16": 2.0},
    "launch_us": None,
}
PLAN_ROWS = [
    {"block": "conv1..maxpool", "kernel": "stem", "flops": 236027904, "bytes": 1400000, "layer_bytes": 2000000},
    {"block": "layer1.0", "kernel": "basic_block", "flops": 462422016, "bytes": 1900000, "layer_bytes": 4000000},
    {"block": "layer4.1", "kernel": "basic_block", "flops": 462422016, "bytes": 19100000, "layer_bytes": 20000000},
]
PEERS = {"torch.compile": 9.0, "ONNX Runtime": 10.0, "OpenVINO": 11.0}
"""Images per second beside the 8 of eager channels_last."""


def header(model: str, batch: int, dtype: str) -> dict:
    """The fields of every result."""
    return {
        "schema": bench.SCHEMA,
        "peers": False,
        "device": "cpu",
        "device_name": "some processor",
        "isa": "avx2",
        "threads": 2,
        "clocks": {"before": {"cores_mhz": [2500.0, 3100.4]}, "after": {"cores_mhz": [3100.4, 3100.1]}},
        "model": model,
        "dtype": dtype,
        "batch": batch,
        "versions": {"resnet_fused": "0.1.0", "torch": "2.13.0"},
        "commit": "0123456789abcdef",
        "created": "2026-01-02T03:04:05+00:00",
        "baseline": bench.BASELINE,
    }


def row(name: str, kind: str, images_per_s: float | None, batch: int, dtype: str, **more) -> dict:
    """A row, timed at this rate; None: not timed."""
    samples = [] if images_per_s is None else [batch / images_per_s * 1e3 * f for f in (0.97, 1.0, 1.02)]
    timed = {"name": name, "kind": kind, "accuracy": None, "status": "ok", "detail": "", "version": "1.0"}
    timed |= {"setup_seconds": 0.5, "error": 1e-6, "unfused_error": 1e-6, "flipped": 0, "ms_samples": samples} | more
    return bench.summarise(timed, dtype, "reused", batch, batch / 8.0 * 1e3)


def peer(name: str, images_per_s: float, batch: int, dtype: str) -> dict:
    """A peer's row."""
    settings = {"graph": "all", "threads": 2}
    return row(name, "peer", images_per_s, batch, dtype, setup_seconds=5 * images_per_s, settings=settings)


def with_peers(
    model: str = "resnet18",
    batch: int = 1,
    dtype: str = "fp32",
    fused: float = 12.0,
    fast: float | None = 13.0,
    peers: dict[str, float] | None = None,
) -> dict:
    """A result of `bench --peers`: one peer absent, one that failed, one of other numbers and faster than all."""
    rows = [
        row("eager", "eager", 6.0, batch, dtype),
        row(bench.BASELINE, "eager", 8.0, batch, dtype),
        *(peer(name, speed, batch, dtype) for name, speed in (PEERS if peers is None else peers).items()),
        row("TensorRT", "peer", None, batch, dtype, status="absent", detail="tensorrt not installed"),
        row("JAX", "peer", None, batch, dtype, status="failed", detail="no answer within 900 s"),
        row("cheat", "peer", 99.0, batch, dtype, status="wrong", detail="largest error of a logit 1.0e+00"),
        row("fused", "fused", fused, batch, dtype, accuracy="strict"),
    ]
    if fast is not None and dtype == "fp32":
        rows.append(row("fused fast", "fused", fast, batch, dtype, accuracy="fast"))
    plan = {"coverage": 1.0, "dtype": dtype, "accuracy": "strict", "rows": [r | {"dtype": dtype} for r in PLAN_ROWS]}
    more = {"peers": True, "machine": MACHINE, "interrupted": False, "rows": rows, "plans": [plan]}
    return header(model, batch, dtype) | more | {"parity": {"ok": True, "reports": []}}


def main_job(dtypes: tuple[str, ...] = ("fp32", "bf16")) -> dict:
    """A result of `bench` without peers."""
    rows = []
    for dtype in dtypes:
        for memory, factor in (("default", 1.0), ("reused", 1.25)):
            for name, accuracy, speed in (("eager", None, 6.0), (bench.BASELINE, None, 8.0), ("fused", "strict", 12.0)):
                kind = "fused" if accuracy else "eager"
                made = row(name, kind, speed * factor, 16, dtype, accuracy=accuracy)
                rows.append(made | {"memory": memory, "peak_extra_mb": 100.0, "kept_mb": 1.0})
    parity = {"ok": True, "reports": []}
    return header("resnet50", 16, ",".join(dtypes)) | {"rows": rows, "parity": parity, "plans": []}


def blocks(model: str = "resnet18", batch: int = 1, dtype: str = "fp32") -> dict:
    """A result of `bench --blocks`: in the stem fused is ahead, in layer4.1 it is behind."""
    speeds = {"stem 3x224x224": 12.0, "layer1.0 64x56x56": 11.5, "layer4.1 512x7x7": 9.0}
    rows = []
    for label, speed in speeds.items():
        part = with_peers(model, batch, dtype, fused=speed, fast=speed + 1)
        rows += [entry | {"block": label} for entry in part["rows"]]
        rows.append(row("oneDNN layer-fused", "peer", 10.0, batch, dtype) | {"block": label})
    plans = [
        {"block": label, "coverage": 1.0, "dtype": dtype, "accuracy": "strict", "rows": [plan_row | {"dtype": dtype}]}
        for label, plan_row in zip(speeds, PLAN_ROWS, strict=True)
    ]
    return with_peers(model, batch, dtype) | {"kind": "blocks", "rows": rows, "plans": plans}


def old_blocks(model: str = "resnet18", batch: int = 1, dtype: str = "fp32") -> dict:
    """A result of the blocks from before peers took part."""
    times = {
        "stem 3x224x224": {"eager": 4.0, "layer-fused": 2.0, "fused": 1.0, "fast": 1.0},
        "layer1.0 64x56x56": {"eager": 3.0, "layer-fused": 2.5, "fused": 2.0, "fast": 1.5},
        "layer4.1 512x7x7": {"eager": 3.0, "layer-fused": 2.0, "fused": 2.2, "fast": 2.1},
    }
    rows = [
        {"block": name, "ms_median": ms, "ms_samples": {k: [v] * 3 for k, v in ms.items()}}
        for name, ms in times.items()
    ]
    return header(model, batch, dtype) | {"kind": "blocks", "rows": rows}


def write(result: dict, path: Path) -> Path:
    """Write a result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    return path
