"""The papers' networks: names and keys, structure, parity of the fused model, training."""

import copy

import pytest
import thirdparty
import torch
from nets import assert_parity, images
from torch import nn
from torch.nn import functional as F

import resnet_fused as rf
from resnet_fused.errors import InputError
from resnet_fused.models.identity_mappings import JOINS, PLACEMENTS, ResidualUnit
from resnet_fused.models.plain import PlainBlock
from resnet_fused.nn.dense import DenseBlock, DenseLayer, Transition
from resnet_fused.nn.plain import BasicBlock, Bottleneck
from resnet_fused.nn.preact import PreActBasicBlock, PreActBottleneck
from resnet_fused.nn.shortcut import PadShortcut

DTYPES = [torch.float32, torch.bfloat16]

# One small net of every family, with every kind of block and shortcut; 50 classes, as the largest error of a few logits
# is a matter of chance.
NETS = {
    "resnet, option A": lambda: rf.models.ResNet(BasicBlock, [1, 1, 1, 1], 50, shortcut="A"),
    "resnet, option C": lambda: rf.models.ResNet(Bottleneck, [1, 1, 1, 1], 50, shortcut="C"),
    "plain": lambda: rf.models.ResNet(PlainBlock, [1, 1, 1, 1], 50, shortcut=None),
    "vgg": lambda: rf.models.VGG((1, 1, 1, 1, 1), 50, hidden=8),
    "resnet cifar": lambda: rf.models.CifarResNet(14, 50),
    "plain cifar": lambda: rf.models.CifarResNet(14, 50, block=PlainBlock, shortcut=None),
    "preact, basic": lambda: rf.models.preact_resnet_cifar(14, PreActBasicBlock, 50, shortcut="A"),
    "preact, bottleneck": lambda: rf.models.preact_resnet_cifar(20, PreActBottleneck, 50),
    "preact, imagenet": lambda: rf.models.PreActResNet(PreActBottleneck, (1, 2), (16, 32), 50),
    "densenet": lambda: rf.models.DenseNet(8, (2, 2), 16, num_classes=50),
    "densenet cifar": lambda: rf.models.densenet_cifar(10, 6, bc=False, num_classes=50),
    "densenet-bc cifar": lambda: rf.models.densenet_cifar(16, 6, num_classes=50),
    **{
        f"placement {p}": lambda p=p: rf.models.identity_mappings_cifar(8, placement=p, num_classes=50)
        for p in PLACEMENTS
    },
    **{
        f"join {join}": lambda join=join: rf.models.identity_mappings_cifar(8, join=join, num_classes=50)
        for join in JOINS
    },
    "unit of three convolutions": lambda: rf.models.identity_mappings_cifar(11, bottleneck=True, num_classes=50),
}


def prepared(model, dtype=torch.float32):
    return rf.models.randomize_batchnorms(model).eval().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NETS)
def test_fused_holds_parity(name, dtype):
    model = prepared(NETS[name](), dtype)
    fast = rf.fuse(model)
    assert fast.state_dict().keys() == model.state_dict().keys()
    x = images(4, 64 if name in ("vgg", "preact, imagenet") else 32, dtype)
    unfused = [row.block for row in rf.explain(fast, x).rows if row.kernel == "unfused"]
    assert all(block.endswith(("features.conv0", "join.gate")) for block in unfused), unfused  # no BatchNorm after them
    assert_parity(model, fast, x)


# --- names, keys and structure ---------------------------------------------------------------------------------------


def test_names_and_build():
    names = rf.models.names()
    assert len(names) == len(set(names)) and {"resnet50", "plain34", "vgg16_bn", "densenet264"} <= set(names)
    assert {"resnet1202_cifar", "preact_resnet1001_cifar", "densenet_bc190_k40_cifar"} <= set(names)
    assert all(callable(getattr(rf.models, name)) and name in rf.models.__all__ for name in names)
    model = rf.models.build("resnet20_cifar", num_classes=7)
    assert model.fc.out_features == 7 and model.training


def test_unknown_name_lists_what_is_close():
    with pytest.raises(InputError, match=r"model must be one of .*densenet121.*, got 'densnet121'"):
        rf.models.build("densnet121")


@pytest.mark.parametrize("name", ["resnet18", "vgg16_bn", "vgg19_bn", "densenet121", "densenet169", "densenet201"])
def test_keys_and_shapes_are_torchvisions(name):
    with torch.device("meta"):
        theirs, ours = getattr(thirdparty.torchvision_models(), name)(), rf.models.build(name)
    shapes = [[(key, t.shape) for key, t in model.state_dict().items()] for model in (theirs, ours)]
    assert shapes[0] == shapes[1]


def test_outputs_are_torchvisions():
    models = thirdparty.torchvision_models()
    widths = [64, "M", 128, "M", 256, "M", 512, "M", 512, "M"]
    pairs = [
        (models.vgg.make_layers(widths, batch_norm=True), rf.models.VGG((1, 1, 1, 1, 1), hidden=8).features),
        (models.DenseNet(8, (2, 3), 16, num_classes=3), rf.models.DenseNet(8, (2, 3), 16, num_classes=3)),
    ]
    x = images(1, 64)
    for theirs, ours in pairs:
        prepared(theirs)
        ours.eval().load_state_dict(theirs.state_dict(), strict=True)
        with torch.no_grad():
            expected = theirs(x)
            torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_option_a_keeps_pixels_and_adds_zero_channels():
    x = images(2, 5, channels=3)
    y = PadShortcut(3, 8, 2)(x)
    assert y.shape == (2, 8, 3, 3)
    assert torch.equal(y[:, :3], x[:, :, ::2, ::2]) and not y[:, 3:].any()
    with pytest.raises(InputError, match=r"planes must be at least inplanes \(8\) in a PadShortcut, got 3"):
        PadShortcut(8, 3)


def test_option_c_projects_everywhere():
    model = rf.models.ResNet(BasicBlock, [2, 1, 1, 1], shortcut="C")
    assert all(m.downsample is not None for m in model.modules() if isinstance(m, BasicBlock))


def test_plain_block_is_a_basic_block_without_the_addition():
    block = PlainBlock(8, 8).eval()
    x = images(1, 6, channels=8)
    expected = F.relu(block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x))))))
    assert torch.equal(block(x), expected)


def test_preactivation():
    block = prepared(PreActBasicBlock(4, 6, 2, nn.Conv2d(4, 6, 1, 2, bias=False)))
    x = images(1, 6, channels=4)
    before = x.clone()
    active = F.relu(block.bn1(x))
    expected = block.downsample(active) + block.conv2(F.relu(block.bn2(block.conv1(active))))
    torch.testing.assert_close(block(x), expected)
    assert torch.equal(x, before)
    identity = prepared(PreActBottleneck(16, 4))
    x = images(1, 6, channels=16)
    with torch.no_grad():
        identity.conv3.weight.zero_()
        assert torch.equal(identity(x), x)  # nothing on the shortcut, nothing after the addition


def test_preactivation_of_the_first_unit_and_after_the_last():
    model = prepared(rf.models.preact_resnet_cifar(8, PreActBasicBlock, shortcut="A"))
    assert model.layer1[0].bn1 is None and model.layer2[0].bn1 is not None
    x = images(1, 16)
    y = model.relu(model.bn1(model.conv1(x)))
    y = model.layer3(model.layer2(model.layer1(y)))
    y = F.relu(model.norm(y)).mean((2, 3))
    torch.testing.assert_close(model(x), model.fc(y))


@pytest.mark.parametrize("placement", PLACEMENTS[:4])
def test_placements(placement):
    unit = prepared(ResidualUnit(4, 4, placement=placement))
    x = images(1, 6, channels=4)
    conv1, conv2 = (m for m in unit.modules() if isinstance(m, nn.Conv2d))
    bn1, bn2 = (m for m in unit.modules() if isinstance(m, nn.BatchNorm2d))
    expected = {
        "original": lambda: F.relu(x + bn2(conv2(F.relu(bn1(conv1(x)))))),
        "bn_after_add": lambda: F.relu(bn2(x + conv2(F.relu(bn1(conv1(x)))))),
        "relu_before_add": lambda: x + F.relu(bn2(conv2(F.relu(bn1(conv1(x)))))),
        "relu_preact": lambda: x + bn2(conv2(F.relu(bn1(conv1(F.relu(x)))))),
    }
    torch.testing.assert_close(unit(x), expected[placement]())


@pytest.mark.parametrize("name", JOINS)
def test_joins(name):
    join = JOINS[name](4).eval()
    x, y = images(1, 3, channels=4), images(1, 3, channels=4)
    gate = torch.sigmoid(join.gate(x)) if "gating" in name else None
    expected = {
        "identity": lambda: x + y,
        "constant_scaling": lambda: 0.5 * x + 0.5 * y,
        "exclusive_gating": lambda: (1 - gate) * x + gate * y,
        "shortcut_only_gating": lambda: (1 - gate) * x + y,
        "dropout": lambda: x + y,
    }
    torch.testing.assert_close(join(x, y), expected[name]())
    if gate is not None:
        assert (join.gate.bias == -6).all()
    if name == "dropout":
        assert not torch.equal(join.train()(x, y), x + y)


def test_dense_layers_see_every_layer_before_them():
    block = prepared(DenseBlock(3, 5, 2, 4))
    x = images(1, 6, channels=5)
    y = block(x)
    assert y.shape == (1, 5 + 3 * 4, 6, 6)
    for index, layer in enumerate(block.values()):
        seen = 5 + 4 * index
        assert torch.equal(y[:, seen : seen + 4], layer(y[:, :seen]))
    assert torch.equal(y[:, :5], x)


def test_dense_layer_without_bottleneck_and_with_dropout():
    layer = DenseLayer(6, 3, bn_size=None, drop_rate=0.5)
    assert layer.conv1.kernel_size == (3, 3) and not hasattr(layer, "conv2")
    y = layer(images(4, 8, channels=6))
    assert 0.3 < (y == 0).double().mean() < 0.7
    layer.eval()
    assert (layer(images(1, 8, channels=6)) != 0).all()


def test_transition_and_compression():
    y = Transition(8, 4).eval()(images(1, 6, channels=8))
    assert y.shape == (1, 4, 3, 3)
    assert rf.models.densenet_cifar(16, 6, compression=0.3).features.transition1.conv.out_channels == 7
    assert rf.models.densenet_cifar(10, 6, bc=False).features.transition1.conv.out_channels == 16 + 12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rf.models.resnet18(shortcut="D"), r"shortcut must be one of 'A', 'B', 'C', got 'D'"),
        (lambda: rf.models.CifarResNet(21), r"depth must be 6n \+ 2 with these blocks, got 21"),
        (
            lambda: rf.models.CifarResNet(20, block=Bottleneck, shortcut="B", widths=(8, 8)),
            "widths must have 3 numbers",
        ),
        (
            lambda: rf.models.preact_resnet_cifar(22, PreActBottleneck),
            r"depth must be 9n \+ 2 with these blocks, got 22",
        ),
        (lambda: rf.models.PreActResNet(PreActBottleneck, (1, 1), (8,)), r"as many numbers as layers \(2\), got 1"),
        (lambda: rf.models.densenet_cifar(41, 12), r"depth must be 6n \+ 4 with these layers, got 41"),
        (lambda: rf.models.DenseNet(compression=0), "compression must be above 0 and at most 1, got 0"),
        (lambda: rf.models.identity_mappings_cifar(placement="last"), "placement must be one of 'original'"),
        (lambda: rf.models.identity_mappings_cifar(join="glue"), "join must be one of 'identity'"),
        (
            lambda: rf.models.identity_mappings_cifar(placement="full_preact", join="dropout"),
            "join must be 'identity' with placement 'full_preact', got 'dropout'",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(InputError, match=message):
        make()


# --- training --------------------------------------------------------------------------------------------------------

TRAINED = {
    "residual": lambda: rf.models.CifarResNet(8, 4, block=rf.nn.BasicBlock, shortcut="B"),
    "plain": NETS["plain cifar"],
    "preact": NETS["preact, bottleneck"],
    "densenet": NETS["densenet-bc cifar"],
}


@pytest.mark.parametrize("name", TRAINED)
def test_fused_models_train(name):
    fast = rf.fuse(TRAINED[name]().eval())
    x, labels = images(16, 8), torch.arange(16) % 4
    before = fast(x)
    fast.train()
    optimizer = torch.optim.SGD(fast.parameters(), 0.05, momentum=0.9)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(fast(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in fast.parameters())
    assert losses[-1] < 0.7 * losses[0]
    # eval uses the new weights and statistics: it agrees with an unfused model that has them.
    fast.eval()
    twin = TRAINED[name]()
    twin.load_state_dict(copy.deepcopy(fast.state_dict()), strict=True)
    with torch.no_grad(), rf.nn.unfused():
        expected = twin.eval()(x)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(fast(x), before, atol=0.1)
