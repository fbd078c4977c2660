"""The model as an ONNX file, for the peers that read one."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

INPUT, OUTPUT = "x", "logits"
MODULES = ("onnx", "onnxscript")  # what torch's exporter imports


@contextmanager
def exported(model: nn.Module, x: Tensor) -> Iterator[Path]:
    """Export with torch's default exporter at the input's shape, to a file that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder, "model.onnx")
        torch.onnx.export(model, (x,), path, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False)
        yield path
