"""Parameters, multiply-adds, layers and depth: the papers' numbers."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import resnet_fused as rf
from resnet_fused.cli import app
from resnet_fused.errors import InputError
from resnet_fused.nn import plain

M, G = 1e6, 1e9


def count(name, **kwargs):
    entry = rf.models.find(name)
    with torch.device("meta"):
        return rf.info(entry.make(**kwargs).eval(), torch.empty(2, 3, entry.image, entry.image))


@pytest.mark.parametrize(
    ("name", "kwargs", "parameters", "multiply_adds", "depth"),
    [
        # He et al., 2015, table 1 and section 3.3 (v1; its nets of basic blocks have option A shortcuts)
        ("resnet18", {"shortcut": "A"}, None, 1.8 * G, 18),
        ("resnet34", {"shortcut": "A"}, None, 3.6 * G, 34),
        ("plain34", {}, None, 3.6 * G, 34),
        ("resnet50", {"stride_in_1x1": True}, None, 3.8 * G, 50),
        ("resnet101", {"stride_in_1x1": True}, None, 7.6 * G, 101),
        ("resnet152", {"stride_in_1x1": True}, None, 11.3 * G, 152),
        ("vgg19_bn", {}, None, 19.6 * G, 19),
        # torchvision's figures
        ("vgg16_bn", {}, 138_365_992, 15.47 * G, 16),
        ("resnet50", {}, 25_557_032, 4.09 * G, 50),
        ("densenet121", {}, 7_978_856, 2.83 * G, 121),
        ("densenet169", {}, 14_149_480, 3.36 * G, 169),
        ("densenet201", {}, 20_013_928, 4.29 * G, 201),
        # table 6
        ("resnet20_cifar", {}, 0.27 * M, None, 20),
        ("resnet32_cifar", {}, 0.46 * M, None, 32),
        ("resnet44_cifar", {}, 0.66 * M, None, 44),
        ("resnet56_cifar", {}, 0.85 * M, None, 56),
        ("resnet110_cifar", {}, 1.7 * M, None, 110),
        ("plain56_cifar", {}, 0.85 * M, None, 56),
        # He et al., 2016, tables 1 and 4
        ("preact_resnet110_cifar", {}, 1.7 * M, None, 110),
        ("preact_resnet164_cifar", {}, 1.7 * M, None, 164),
        ("preact_resnet200", {}, 64.7 * M, None, 200),
        # Huang et al., 2016, table 2 and figure 3
        ("densenet264", {}, 33.3 * M, None, 265),  # its 6 + 12 + 64 + 48 layers make one more than its name
        ("densenet40_k12_cifar", {}, 1.0 * M, None, 40),
        ("densenet100_k12_cifar", {}, 7.0 * M, None, 100),
        ("densenet100_k24_cifar", {}, 27.2 * M, None, 100),
        ("densenet_bc100_k12_cifar", {}, 0.8 * M, None, 100),
        ("densenet_bc250_k24_cifar", {}, 15.3 * M, None, 250),
        ("densenet_bc190_k40_cifar", {}, 25.6 * M, None, 190),
    ],
)
def test_the_papers_numbers(name, kwargs, parameters, multiply_adds, depth):
    counted = count(name, **kwargs)
    assert counted.depth == depth
    for got, expected in ((counted.parameters, parameters), (counted.multiply_adds, multiply_adds)):
        if expected is not None:
            assert got == expected or rounded_like(got, expected), (got, expected)


def rounded_like(got, expected):
    """Whether the number is `expected` to its digits: rounded, or cut off as some of the papers do."""
    unit = G if expected >= G else M
    digits = len(f"{expected / unit:.10f}".rstrip("0").split(".")[1])
    step = 10**-digits
    return -step / 2 <= got / unit - round(expected / unit, digits) < step


@pytest.mark.parametrize(
    ("name", "parameters"), [("resnet1202_cifar", 19_421_274), ("preact_resnet1001_cifar", 10_327_706)]
)
def test_a_thousand_layers(name, parameters):
    with torch.device("meta"):
        model = rf.models.build(name)
    assert sum(p.numel() for p in model.parameters()) == parameters  # the papers: 19.4 M and 10.2 M


def test_a_bottleneck_costs_no_more_than_a_basic_block():
    # He et al., 2015, figure 5: a basic block of 64 channels beside a bottleneck of 256.
    basic, bottleneck = plain.BasicBlock(64, 64).eval(), plain.Bottleneck(256, 64).eval()
    weights = [sum(p.numel() for p in block.parameters() if p.dim() == 4) for block in (basic, bottleneck)]
    assert weights == [73_728, 69_632]
    adds = [rf.info(block, torch.zeros(1, c, 4, 4)).multiply_adds for block, c in ((basic, 64), (bottleneck, 256))]
    assert adds == [16 * weight for weight in weights]


@pytest.mark.parametrize(("option", "projections"), [("A", 0), ("B", 3), ("C", 16)])
def test_shortcut_options(option, projections):
    counted = count("resnet34", shortcut=option)
    assert (counted.layers, counted.depth) == (34 + projections, 34)
    assert (counted.parameters == count("plain34").parameters) == (option == "A")


def test_stages():
    counted = count("resnet50")
    assert [stage.name for stage in counted.stages] == ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"]
    assert [stage.layers for stage in counted.stages] == [1, 10, 13, 19, 10, 1]
    assert counted.stages[0].output == (64, 112, 112)
    assert counted.stages[1].output == (256, 56, 56)
    assert counted.stages[0].parameters == 64 * 3 * 49 + 2 * 64  # bn1 belongs to conv1
    assert counted.stages[-1].multiply_adds == 2048 * 1000
    names = [stage.name for stage in count("densenet121").stages]
    assert names[:3] == ["features.conv0", "features.denseblock1", "features.transition1"]


def test_sums_and_text():
    counted = count("resnet18")
    as_dict = counted.to_dict()
    assert as_dict["parameters"] == counted.parameters == sum(stage["parameters"] for stage in as_dict["stages"])
    assert as_dict["multiply_adds"] == counted.multiply_adds
    assert as_dict["depth"] == 18
    assert f"{counted.parameters:,}" in str(counted) and "layer4" in str(counted)


def test_depth_is_the_longest_path():
    class TwoPaths(nn.Module):
        def __init__(self):
            super().__init__()
            self.long = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
            self.short = nn.Conv2d(2, 2, 1)

        def forward(self, x):
            y = self.short(x)
            y += self.long(x)
            return y

    counted = rf.info(TwoPaths().eval(), torch.zeros(1, 2, 4, 4))
    assert (counted.depth, counted.layers) == (3, 4)


def test_grouped_convolutions_and_batches():
    conv = nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4, bias=False)).eval()
    for batch in (1, 3):
        assert rf.info(conv, torch.zeros(batch, 8, 6, 6)).multiply_adds == 3 * 3 * 12 * 2 * 9


def test_a_fused_model_counts_as_its_original():
    model = rf.models.resnet20_cifar().eval()
    x = torch.zeros(1, 3, 32, 32)
    fast = rf.fuse(model)
    assert rf.info(fast, x) == rf.info(model, x)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_bad_input():
    with pytest.raises(InputError, match="eval mode"):
        rf.info(rf.models.resnet20_cifar(), torch.zeros(1, 3, 32, 32))
    with pytest.raises(InputError, match=r"model must be a torch.nn.Module, got int"):
        rf.info(3, torch.zeros(1, 3, 32, 32))


def test_command():
    outcome = CliRunner().invoke(app, ["info", "resnet20_cifar"])
    assert outcome.exit_code == 0, outcome.output
    assert "3x32x32" in outcome.stdout and "269,722" in outcome.stdout and "depth 20" in outcome.stdout
    outcome = CliRunner().invoke(app, ["info", "resnet20_cifar", "--image", "64"])
    assert "3x64x64" in outcome.stdout
    for arguments, words in (
        (["resnet21_cifar"], ["resnet20_cifar", "resnet21_cifar"]),
        (["--image", "8"], ["32", "8"]),
    ):
        outcome = CliRunner().invoke(app, ["info", *arguments])
        assert outcome.exit_code == 2
        assert len(outcome.stderr.strip().splitlines()) == 1
        assert all(word in outcome.stderr for word in words)


def flops(model, x):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet110_cifar", "densenet121"])
def test_torch_counts_fused_models_like_the_originals(name):
    model, x = rf.models.find(name).make().eval(), torch.randn(2, 3, 64, 64)
    counted = flops(rf.fuse(model), x)
    assert counted == flops(model, x) == 2 * len(x) * rf.info(model, x).multiply_adds


def test_torch_counts_every_op():
    known = {str(packet) for packet in FlopCounterMode(display=False).flop_registry}
    assert known >= {f"resnet_fused.{op}" for op in rf.ops.__all__ if op != "DenseLayer"}


@pytest.mark.parametrize("first", ["torch.utils.flop_counter", "resnet_fused"])
def test_the_counter_may_be_imported_before_or_after(first):
    code = f"""
import sys, {first}
before = "torch.utils.flop_counter" in sys.modules
import torch, resnet_fused, torch.utils.flop_counter as counter
print(before, torch.ops.resnet_fused.stem in counter.flop_registry)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(first != "resnet_fused"), "True"]
