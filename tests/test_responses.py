"""Layer responses: the standard deviation of every 3x3 layer after BatchNorm."""

import json

import pytest
import torch
from nets import images, tiny
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import resnet_fused as rf
from resnet_fused.bench import real_pictures
from resnet_fused.cli import app
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


# --- the command ------------------------------------------------------------------------------------------------------

run = CliRunner().invoke


def test_command(tmp_path):
    pytest.importorskip("matplotlib")
    net = randomized(rf.models.plain20_cifar())
    torch.save(net.state_dict(), tmp_path / "plain.pt")
    save_file(rf.models.resnet20_cifar().state_dict(), tmp_path / "residual.safetensors")
    paths = {"--json": tmp_path / "out.json", "--plot": tmp_path / "out.png"}
    arguments = ["responses", "plain20_cifar", "resnet20_cifar", "--batch", "2"]
    arguments += ["--weights", str(tmp_path / "plain.pt"), "--weights", str(tmp_path / "residual.safetensors")]
    outcome = run(app, [*arguments, *(str(part) for pair in paths.items() for part in pair)])
    assert outcome.exit_code == 0, outcome.output
    assert "random" not in outcome.stdout
    result = json.loads(paths["--json"].read_text())
    assert list(result) == ["plain20_cifar", "resnet20_cifar"]
    expected = rf.layer_responses(net, real_pictures(2, 32)).to_dict()
    assert [row["layer"] for row in result["plain20_cifar"]["rows"]] == [row["layer"] for row in expected["rows"]]
    assert [row["std"] for row in result["plain20_cifar"]["rows"]] == pytest.approx(
        [row["std"] for row in expected["rows"]], rel=1e-4
    )
    assert paths["--plot"].read_bytes().startswith(b"\x89PNG")


def test_command_says_that_weights_are_random():
    outcome = run(app, ["responses", "resnet20_cifar", "--batch", "1"])
    assert outcome.exit_code == 0, outcome.output
    assert "weights are random" in outcome.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["resnet51"], ["model", "resnet50", "resnet51"]),
        (["resnet20_cifar", "--plot", "out.bmp"], ["--plot", ".png", "out.bmp"]),
        (["resnet20_cifar", "plain20_cifar", "--weights", "a.pt"], ["--weights", "2 models", "got 1"]),
        (["resnet20_cifar", "--weights", "missing.pt"], ["missing.pt", "state_dict of a CifarResNet"]),
        (["resnet20_cifar", "--weights", "missing.safetensors"], ["missing.safetensors", "state_dict"]),
        (["resnet20_cifar", "--weights", __file__], [__file__, "state_dict of a CifarResNet"]),
    ],
)
def test_bad_input_of_the_command(arguments, words):
    outcome = run(app, ["responses", *arguments])
    assert outcome.exit_code == 2
    assert len(outcome.stderr.strip().splitlines()) == 1
    assert all(word in outcome.stderr for word in words), outcome.stderr


def test_weights_that_are_none(tmp_path):
    (tmp_path / "bad.pt").write_text("epoch 1\n")
    with pytest.raises(InputError, match="must hold the state_dict of a CifarResNet"):
        rf.models.load_weights(rf.models.resnet20_cifar(), tmp_path / "bad.pt")


def test_weights_of_another_model(tmp_path):
    torch.save(rf.models.resnet32_cifar().state_dict(), tmp_path / "other.pt")
    with pytest.raises(InputError, match="must hold the state_dict of a CifarResNet"):
        rf.models.load_weights(rf.models.resnet20_cifar(), tmp_path / "other.pt")
