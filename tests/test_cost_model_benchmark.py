"""benchmarks/cost_model.py: what the plan chose, beside the fastest of what it could have."""

from __future__ import annotations

import json
import sys

import cost_model
import pytest
import torch

from resnet_fused import shapes
from resnet_fused.kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason="needs the native library")

ROW = cost_model.Row(
    shape="a block",
    count=3,
    chosen="cpu direct",
    predicted={"cpu direct": 1.0, "cpu winograd2": 2.0},
    samples={"cpu direct": [3.0, 9.0, 3.0], "cpu winograd2": [2.0, 1.0, 2.0]},
)


def test_regret_is_of_medians():
    assert (ROW.best, ROW.regret) == ("cpu winograd2", 1.5)
    right = cost_model.Row("another", 1, "cpu direct", {}, {"cpu direct": [6.0], "vendor onednn": [7.0]})
    assert cost_model.summary([ROW, right]) == {"regret": (3 * 3 + 6) / (3 * 2 + 6), "worst": 1.5}


def test_shapes_are_those_of_the_blocks_alone():
    found = cost_model.model_shapes("resnet56_cifar", 4)
    assert {shape.n for shape in found} == {4}
    assert [type(shape) for shape in found] == [shapes.Conv, *[shapes.BasicBlock] * 5, shapes.Head]
    assert list(found.values()) == [1, 9, 1, 8, 1, 8, 1]


def test_every_candidate_computes_the_same():
    torch.manual_seed(0)
    shape = next(s for s in cost_model.model_shapes("resnet56_cifar", 1) if isinstance(s, shapes.BasicBlock))
    with torch.inference_mode():
        choice, calls = cost_model.candidates(shape, torch.bfloat16, "strict")
        assert set(calls) == {name for name, _ in choice.seconds} - {"cpu layers"}
        assert f"{choice.backend} {choice.algorithm}" in calls and len(calls) == 4
        first, *others = (call() for call in calls.values())
        for y in others:
            torch.testing.assert_close(y, first, rtol=0.05, atol=0.05 * first.abs().max().item())


def test_command(monkeypatch, tmp_path, capsys):
    path = tmp_path / "found.json"
    arguments = ["resnet56_cifar", "--batches", "1", "--dtype", "bf16", "--seconds", "0", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["cost_model.py", *arguments])
    assert cost_model.main() == 0
    assert "basic_block 1x16x32x32 -> 16 -> 16" in capsys.readouterr().out
    found = json.loads(path.read_text())
    (case,) = found["cases"]
    assert (case["model"], case["dtype"], case["accuracy"]) == ("resnet56_cifar", "bf16", "strict")
    assert case["worst"] >= case["regret"] >= 1
    assert all(len(s) == cost_model.LEAST_ROUNDS for row in case["rows"] for s in row["samples"].values())
