"""Layer responses: the standard deviation of every 3x3 layer after BatchNorm."""

import pytest
import torch
from nets import images, tiny
from torch import nn

import resnet_fused as rf
from resnet_fused.errors import InputError
from resnet_fused.models.plain import PlainBlock
from resnet_fused.nn.preact import PreActBasicBlock
from resnet_fused.responses import plot_responses


def randomized(model):
    return rf.models.randomize_batchnorms(model).eval()


def test_of_a_basic_block():
    block = randomized(rf.nn.BasicBlock(8, 8))
    x = images(3, 6, channels=8)
    with torch.no_grad(), rf.nn.unfused():
        first = block.bn1(block.conv1(x))
        second = block.bn2(block.conv2(first.relu()))
    measured = rf.layer_responses(block, x)
    assert [row.layer for row in measured.rows] == ["conv1", "conv2"]
    expected = [y.double().std(correction=0).item() for y in (first, second)]
    assert [row.std for row in measured.rows] == pytest.approx(expected)


def test_of_convolutions_without_a_batchnorm():
    unit = randomized(PreActBasicBlock(8, 8))
    x = images(2, 6, channels=8)
    with torch.no_grad():
        first = unit.conv1(unit.bn1(x).relu())
        second = unit.conv2(unit.bn2(first).relu())
    measured = rf.layer_responses(unit, x)
    assert measured.rows[0].std == pytest.approx(unit.bn2(first).double().std(correction=0).item())
    assert measured.rows[1].std == pytest.approx(second.double().std(correction=0).item())


def test_3x3_layers_only_in_the_order_they_run():
    model = tiny()  # a 7x7 stem, two bottlenecks, two basic blocks
    names = [row.layer for row in rf.layer_responses(model, images()).rows]
    assert names == ["layer1.0.conv2", "layer1.1.conv2", *(f"layer2.{i}.conv{j}" for i in (0, 1) for j in (1, 2))]
    plain_net = randomized(rf.models.CifarResNet(8, block=PlainBlock, shortcut=None))
    assert len(rf.layer_responses(plain_net, images()).rows) == 7  # conv1 is 3x3 as well


def test_a_fused_model_gives_those_of_its_original():
    model, x = tiny(), images()
    fast = rf.fuse(model)
    assert rf.layer_responses(fast, x) == rf.layer_responses(model, x)
    assert not any(m._forward_hooks for m in model.modules())


def test_sorted_dict_and_text():
    measured = rf.layer_responses(tiny(), images())
    stds = [row.std for row in measured.sorted]
    assert stds == sorted(stds, reverse=True) and set(measured.sorted) == set(measured.rows)
    assert [row["layer"] for row in measured.to_dict()["rows"]] == [row.layer for row in measured.rows]
    assert "layer2.1.conv2" in str(measured) and f"{stds[0]:.4f}" in str(measured)


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "responses.png"
    plot_responses({"tiny": rf.layer_responses(tiny(), images())}, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_bad_input():
    with pytest.raises(InputError, match="eval mode"):
        rf.layer_responses(rf.models.resnet20_cifar(), images())
    with pytest.raises(InputError, match="model must run a 3x3 convolution, got Sequential that runs none"):
        rf.layer_responses(nn.Sequential(nn.Conv2d(3, 4, 1)).eval(), images())
