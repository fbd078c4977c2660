"""The drop-in modules: torchvision's structure, plain in training, one op in eval mode."""

import copy
import pickle

import pytest
import thirdparty
import torch
from nets import TinyResNet, assert_parity, images, ops_run, tiny
from torch import nn

import resnet_fused as rf
from resnet_fused.errors import InputError
from resnet_fused.nn import plain


def projection(c, k, stride):
    return nn.Sequential(nn.Conv2d(c, k, 1, stride, bias=False), nn.BatchNorm2d(k))


MODULES = {
    "bottleneck": lambda **kw: rf.nn.Bottleneck(32, 8, **kw),
    "bottleneck, projection": lambda **kw: rf.nn.Bottleneck(16, 8, 2, projection(16, 32, 2), **kw),
    "bottleneck, v1": lambda **kw: rf.nn.Bottleneck(16, 8, 2, projection(16, 32, 2), stride_in_1x1=True, **kw),
    "bottleneck, ResNeXt": lambda **kw: rf.nn.Bottleneck(32, 8, groups=4, base_width=16, **kw),
    "bottleneck, dilated": lambda **kw: rf.nn.Bottleneck(32, 8, dilation=2, **kw),
    "basic block": lambda **kw: rf.nn.BasicBlock(32, 32, **kw),
    "basic block, projection": lambda **kw: rf.nn.BasicBlock(16, 24, 2, projection(16, 24, 2), **kw),
    "stem": lambda **kw: rf.nn.Stem(3, 16, **kw),
    "stem, 3x3": lambda **kw: rf.nn.Stem(2, 8, 3, 1, **kw),
    "layer": lambda **kw: rf.nn.ConvBNAct(8, 12, **kw),
    "layer, 1x7": lambda **kw: rf.nn.ConvBNAct(8, 12, (1, 7), (2, 1), bias=True, **kw),
    "layer, no activation": lambda **kw: rf.nn.ConvBNAct(8, 8, dilation=2, groups=4, activation_layer=None, **kw),
}


def make(name, **kwargs):
    module = rf.models.randomize_batchnorms(MODULES[name](**kwargs))
    channels = next(m for m in module.modules() if isinstance(m, nn.Conv2d)).in_channels
    return module, images(size=13, channels=channels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODULES)
def test_eval_is_one_op_that_holds_parity(name, dtype):
    module, x = make(name)
    module, x = module.to(dtype).eval(), x.to(dtype)
    assert ops_run(module, x) == [""] or len(ops_run(module, x)) == 1
    assert_parity(module, module, x)
    with torch.no_grad():
        y = module(x)
        assert y.is_contiguous()
        assert module(x.contiguous(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", MODULES)
def test_train_is_the_plain_module(name):
    module, x = make(name)
    twin = copy.deepcopy(module)
    with rf.nn.unfused():
        expected = twin(x)
    assert torch.equal(module(x), expected)
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    module.eval()
    with rf.nn.unfused():
        plain_output = module(x)
    torch.testing.assert_close(module(x), plain_output)


def test_train_updates_statistics_and_eval_folds_them():
    module, x = make("bottleneck, projection")
    module.eval()
    before = module(x)
    module.train()
    module(x)
    module.eval()
    assert not torch.allclose(module(x), before)
    assert_parity(module, module, x)


def test_state_dict_keys_are_torchvisions():
    models = thirdparty.torchvision_models()
    theirs, ours = models.resnet.Bottleneck(16, 8), rf.nn.Bottleneck(16, 8)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert list(models.resnet.BasicBlock(8, 8).state_dict()) == list(rf.nn.BasicBlock(8, 8).state_dict())


@pytest.mark.parametrize(
    "arguments",
    [
        {"in_channels": 4, "out_channels": 8},
        {"in_channels": 4, "out_channels": 8, "kernel_size": (3, 5), "dilation": 2, "inplace": None},
        {"in_channels": 4, "out_channels": 8, "norm_layer": None},
        {"in_channels": 4, "out_channels": 8, "kernel_size": 1, "stride": 2, "groups": 4, "activation_layer": None},
    ],
)
def test_conv_bn_act_is_torchvisions(arguments):
    thirdparty.torchvision_models()
    from torchvision.ops import Conv2dNormActivation

    theirs, ours = Conv2dNormActivation(**arguments), rf.nn.ConvBNAct(**arguments)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = images(channels=4, size=14)
    assert torch.equal(ours(x), theirs(x))
    assert str(ours[0]) == str(theirs[0])
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_what_cannot_be_fused_stays_plain_and_says_why():
    x = images(channels=32, size=8)
    for block, reason in [
        (rf.nn.Bottleneck(32, 8, norm_layer=lambda c: nn.GroupNorm(2, c)), "no BatchNorm"),
        (
            rf.nn.BasicBlock(32, 32, norm_layer=lambda c: nn.BatchNorm2d(c, 1e-5, 0.1, True, False)),
            "running statistics",
        ),
        (rf.nn.ConvBNAct(32, 8, activation_layer=nn.SiLU), "SiLU"),
        (rf.nn.ConvBNAct(32, 8, norm_layer=None), "no BatchNorm"),
    ]:
        rows = rf.explain(block.eval(), x).rows
        assert all(row.kernel == "unfused" and reason in row.why for row in rows), rows


def test_a_child_replaced_is_seen_by_eval():
    module, x = make("bottleneck")
    module.eval()(x)
    module.bn2 = rf.models.randomize_batchnorms(nn.BatchNorm2d(8)).eval()
    assert ops_run(module, x) == []
    assert_parity(module.eval(), module, x)
    module.relu = nn.Identity()
    assert ops_run(module.eval(), x) == []


@pytest.mark.parametrize("name", ["bottleneck, projection", "layer"])
def test_copies(name):
    module, x = make(name)
    module.eval()
    expected = module(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), expected)
        assert len(ops_run(twin, x)) == 1


def test_compile():
    torch.compiler.reset()
    module, x = make("bottleneck, projection")
    module.eval()
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), module(x))


def test_settings():
    module, x = make("bottleneck", backend="reference", accuracy="fast")
    assert rf.explain(module.eval(), x).rows[0].backend == "reference"
    with pytest.raises(InputError, match="backend must be one of"):
        make("stem", backend="gpu")
    with pytest.raises(InputError, match="accuracy must be one of"):
        make("layer", accuracy="best")


def test_blocks_of_a_model_that_fuses_itself():
    model = tiny(bottleneck=rf.nn.Bottleneck, basic_block=rf.nn.BasicBlock)
    x = images()
    assert ops_run(model, x) == ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]
    fast = rf.fuse(model, accuracy="fast")
    assert ops_run(fast, x)[0] == "conv1..maxpool"
    assert type(fast.layer1[0]) is rf.nn.Bottleneck
    fast.train().eval()
    assert fast.layer1[0]._fused_op.settings.accuracy == "fast"
    assert fast.layer1[0]._fused_op.settings.channels_last
    assert_parity(model, fast, x)
    slow = rf.unfuse(fast)
    assert slow.layer1[0]._fused_op.settings.accuracy == "strict"
    assert ops_run(slow, x) == ops_run(model, x)


def test_basic_block_takes_what_torchvisions_takes():
    for arguments, message in [
        ({"groups": 2}, "groups must be 1 in a BasicBlock, got 2"),
        ({"base_width": 128}, "base_width must be 64"),
        ({"dilation": 2}, "dilation must be 1"),
    ]:
        with pytest.raises(InputError, match=message):
            rf.nn.BasicBlock(8, 8, **arguments)


def test_plain_blocks_are_the_ones_in_the_models():
    assert type(rf.models.resnet18().layer1[0]) is plain.BasicBlock
    assert isinstance(TinyResNet().layer1[0], plain.Bottleneck)


def test_export_of_the_original_modules():
    model = rf.models.randomize_batchnorms(nn.Sequential(rf.nn.Stem(3, 16), rf.nn.BasicBlock(16, 16))).eval()
    x = images()
    assert ops_run(model, x) == ["0", "1"]
    with rf.nn.unfused():
        traced = torch.jit.trace(model, x)
        program = torch.export.export(model, (x,))
    assert "resnet_fused::" not in str(traced.inlined_graph)
    assert not any("resnet_fused" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-4)
