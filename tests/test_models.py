"""The package's ResNets, and fuse on torchvision's and transformers'."""

import pytest
import thirdparty
import torch
from nets import assert_parity, images, ops_run
from torch import nn

import resnet_fused as rf
from resnet_fused.errors import InputError
from resnet_fused.nn import plain

DEPTHS = {"resnet18": 8, "resnet34": 16, "resnet50": 16, "resnet101": 33, "resnet152": 50}
DTYPES = [torch.float32, torch.bfloat16]


def prepared(model, dtype=torch.float32):
    return rf.models.randomize_batchnorms(model).eval().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DEPTHS)
def test_every_block_holds_parity(name, dtype):
    model = prepared(getattr(rf.models, name)(), dtype)
    fast, x = rf.fuse(model), images(2, 64, dtype)
    assert len(ops_run(fast, x)) == 2 + DEPTHS[name]
    assert rf.explain(fast, x).coverage == 1.0
    assert_parity(model, fast, x)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_fast_holds_its_limit(name):
    model = prepared(getattr(rf.models, name)())
    assert_parity(model, rf.fuse(model, accuracy="fast"), images(2, 64))


@pytest.mark.parametrize("name", DEPTHS)
def test_structure_is_torchvisions(name):
    with torch.device("meta"):
        theirs, ours = getattr(thirdparty.torchvision_models(), name)(), getattr(rf.models, name)()
    shapes = [{key: t.shape for key, t in m.state_dict().items()} for m in (theirs, ours)]
    assert list(shapes[0].items()) == list(shapes[1].items())
    convs = [[str(m) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.MaxPool2d))] for model in (theirs, ours)]
    assert convs[0] == convs[1]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"groups": 4, "width_per_group": 8, "num_classes": 5},
        {"replace_stride_with_dilation": [False, True, True]},
    ],
)
def test_outputs_are_torchvisions(arguments):
    models = thirdparty.torchvision_models()
    theirs = prepared(models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], **arguments))
    ours = rf.models.ResNet(plain.Bottleneck, [1, 1, 1, 1], **arguments).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        x = images(1, 64)
        assert torch.equal(ours(x), theirs(x))


def test_stride_placement():
    model = prepared(rf.models.ResNet(plain.Bottleneck, [1, 1, 1, 1], stride_in_1x1=True))
    assert model.layer2[0].conv1.stride == (2, 2) and model.layer2[0].conv2.stride == (1, 1)
    fast, x = rf.fuse(model), images(1, 64)
    assert len(ops_run(fast, x)) == 6
    assert_parity(model, fast, x)


def test_zero_init_residual():
    model = rf.models.resnet18(zero_init_residual=True)
    assert not model.layer1[0].bn2.weight.any() and model.layer1[0].bn1.weight.all()


def test_bad_arguments():
    with pytest.raises(InputError, match="layers must have 4 numbers, got 3"):
        rf.models.ResNet(plain.BasicBlock, [1, 1, 1])
    with pytest.raises(InputError, match="replace_stride_with_dilation must have 3 values, got 2"):
        rf.models.resnet50(replace_stride_with_dilation=[True, True])


# --- the neighbours' ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d"])
def test_torchvision_resnets(name, dtype):
    model = prepared(getattr(thirdparty.torchvision_models(), name)(), dtype)
    fast, x = rf.fuse(model), images(1, 64, dtype)
    assert len(ops_run(fast, x)) == (10 if name == "resnet18" else 18)
    assert_parity(model, fast, x)
    fast.load_state_dict(model.state_dict(), strict=True)


def test_torchvision_frozen_batchnorm_and_dilation():
    models = thirdparty.torchvision_models()
    from torchvision.ops import FrozenBatchNorm2d

    blocks = models.resnet.Bottleneck, [1, 1, 1, 1]
    dilate = [False, True, True]
    model = models.ResNet(*blocks, norm_layer=FrozenBatchNorm2d, replace_stride_with_dilation=dilate).eval()
    for name, buffer in model.named_buffers():
        buffer.uniform_(0.5, 1.5) if "var" in name else buffer.uniform_(-0.5, 0.9)
    fast, x = rf.fuse(model), images(1, 64)
    assert len(ops_run(fast, x)) == 6
    assert_parity(model, fast, x)


@pytest.mark.parametrize("name", ["vgg11_bn", "mobilenet_v2", "googlenet", "densenet121", "regnet_y_400mf"])
def test_other_torchvision_models_layer_by_layer(name):
    arguments = {"init_weights": False} if name == "googlenet" else {}
    model = prepared(getattr(thirdparty.torchvision_models(), name)(**arguments))
    fast, x = rf.fuse(model), images(1, 64)
    coverage = rf.explain(fast, x).coverage
    assert coverage > 0.95
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(fast(x), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "config",
    [
        {"layer_type": "bottleneck"},
        {"layer_type": "bottleneck", "downsample_in_bottleneck": True, "downsample_in_first_stage": True},
        {"layer_type": "basic"},
    ],
)
def test_transformers_resnets(config, dtype):
    model = prepared(thirdparty.transformers_resnet(**config), dtype)
    fast, x = rf.fuse(model), images(2, 64, dtype)
    assert len(ops_run(fast, x)) == 6
    assert rf.explain(fast, x).coverage == 1.0
    assert_parity(model, fast, x)


def test_transformers_backbone_gives_contiguous_images():
    model = prepared(thirdparty.transformers_resnet("ResNetBackbone", out_features=["stage1", "stage3"]))
    fast, x = rf.fuse(model), images(1, 64)
    assert_parity(model, fast, x)
    with torch.no_grad():
        ours, theirs = fast(x).feature_maps, model(x).feature_maps
    assert [y.stride() for y in ours] == [y.stride() for y in theirs]


def test_transformers_other_activation_is_fused_without_it():
    model = prepared(thirdparty.transformers_resnet(hidden_act="gelu"))
    fast, x = rf.fuse(model), images(2, 64)
    assert {row.kernel for row in rf.explain(fast, x).rows} == {"conv_bn_act"}
    assert_parity(model, fast, x)


def test_transformers_saves_and_loads(tmp_path):
    model = prepared(thirdparty.transformers_resnet())
    fast, x = rf.fuse(model), images(1, 64)
    fast.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    saved, loaded = model.state_dict(), again.state_dict()
    assert list(saved) == list(loaded)
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    with torch.no_grad():  # not bit for bit: oneDNN may take another kernel for memory that is aligned otherwise
        assert torch.allclose(again(x).logits, model(x).logits, rtol=1e-5, atol=1e-6)


SCRIPTED = [
    *("resnet18", "resnet50", "plain18", "resnet20_cifar", "plain20_cifar", "densenet121", "densenet40_k12_cifar"),
    *("preact_resnet110_cifar", "preact_resnet164_cifar", "preact_resnet200", "identity_mappings_cifar", "vgg16_bn"),
]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", SCRIPTED)
@pytest.mark.parametrize("again", [False, True], ids=["made", "unfused"])
def test_torch_script_takes_the_models(name, again):
    model = prepared(rf.models.build(name))
    x = images(1, 32)
    if again:
        model = rf.unfuse(rf.fuse(model))
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(x), model(x))
