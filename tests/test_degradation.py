"""The degradation example: its nets train as modules and are measured as fused ops; its results show what it says."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import resnet_fused as rf

EXAMPLE = Path(__file__).parent.parent / "examples" / "degradation"
spec = importlib.util.spec_from_file_location("degradation_train", EXAMPLE / "train.py")
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_a_few_steps_lower_the_loss(kind):
    net = example.make_net(kind, 8)
    images, labels = torch.randn(64, 1, 14, 14), torch.arange(64) % 10
    curves = example.train(net, (images, labels), (images[:32], labels[:32]), steps=20, every=10, batch=32, rate=0.1)
    assert len(curves["loss"]) == 20 and curves["step"] == [10, 20]
    assert sum(curves["loss"][-3:]) < sum(curves["loss"][:3])
    assert net.training
    # The error is that of the fused net, with the weights and statistics that training left.
    wrong = example.predict_unfused(net.eval(), images[:32]).ne(labels[:32]).double().mean().item()
    assert curves["test_error"][-1] == pytest.approx(wrong, abs=1 / 32)
    assert rf.explain(rf.fuse(net), images).coverage > 0.5


def test_the_committed_results_show_degradation():
    nets = {net["name"]: net for net in json.loads((EXAMPLE / "results.json").read_text())["nets"]}
    error = {name: net["train_error"][-1] for name, net in nets.items()}
    assert error["plain-44"] > 1.2 * error["plain-8"]
    assert error["residual-44"] < error["residual-8"]
    assert all(net["flipped"] == 0 for net in nets.values())
    plain, residual = (nets[f"{kind}-44"]["responses"] for kind in ("plain", "residual"))
    assert len(plain) == len(residual) == 43
