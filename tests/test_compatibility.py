"""Other people's models and blocks: how much of each is fused, how exact it is, and what fuse's contract promises."""

import copy
import importlib
import io
import json
import warnings

import compatibility
import pytest
import thirdparty
import torch
import torch._dynamo.testing
import torch._inductor
from nets import assert_parity, images, ops_run
from torch import nn
from torch.nn import functional

import resnet_fused as rf
from resnet_fused.errors import InputError
from resnet_fused.fuse import fusions
from resnet_fused.nn import plain


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, list(compatibility.DTYPES)[i % 2]) for i, name in enumerate(compatibility.MODELS)]
)
def test_model(name, dtype):
    outcome = compatibility.measure(name, dtype)
    assert outcome.coverage >= compatibility.MODELS[name].floor
    assert outcome.ok, outcome


def test_the_table_is_of_these_models():
    rows = json.loads(compatibility.RESULT.read_text())["rows"]
    assert {(row["model"], row["dtype"]) for row in rows} == {
        (name, dtype) for name in compatibility.MODELS for dtype in compatibility.DTYPES
    }
    assert all(row["ok"] for row in rows)


# --- a user's own modules ---------------------------------------------------------------------------------------------


class NormInConv(nn.Conv2d):
    """A convolution that holds its BatchNorm and activation, as detectron2's does."""

    def __init__(self, *args, norm, activation=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm, self.activation = norm, activation

    def forward(self, x):
        x = self.norm(functional.conv2d(x, self.weight, self.bias, self.stride, self.padding))
        return x if self.activation is None else self.activation(x)


class NormInConvBlock(nn.Module):
    def __init__(self, channels, mid):
        super().__init__()
        self.conv1 = NormInConv(channels, mid, 1, bias=False, norm=nn.BatchNorm2d(mid))
        self.conv2 = NormInConv(mid, mid, 3, padding=1, bias=False, norm=nn.BatchNorm2d(mid))
        self.conv3 = NormInConv(mid, channels, 1, bias=False, norm=nn.BatchNorm2d(channels))

    def forward(self, x):
        h = functional.relu_(self.conv2(functional.relu_(self.conv1(x))))
        return functional.relu_(self.conv3(h) + x)


class IRBlock(nn.Module):
    """A block of insightface's: a BatchNorm before the padded convolution, PReLU, nothing after the addition."""

    def __init__(self, channels, out, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.prelu = nn.PReLU(out)
        self.conv2 = nn.Conv2d(out, out, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        h = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(h)) + self.downsample(x)


class ActInNorm(nn.BatchNorm2d):
    """BatchNorm and an activation in one module, as timm has it."""

    def __init__(self, channels, act):
        super().__init__(channels)
        self.act = act

    def forward(self, x):
        return self.act(super().forward(x))


class OptionA(nn.Module):
    """A basic block whose shortcut pads the channels with zeros, written as many CIFAR nets have it."""

    def __init__(self, channels, out, stride, both_sides):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        more = out - channels
        self.stride, self.pad = stride, (more // 2, more - more // 2) if both_sides else (0, more)

    def forward(self, x):
        h = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(h + functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.pad)))


class PreAct(nn.Module):
    """A pre-activation bottleneck under other names, its projection registered first."""

    def __init__(self, channels, mid, out, stride):
        super().__init__()
        self.skip = nn.Conv2d(channels, out, 1, stride, bias=False) if stride > 1 or channels != out else None
        self.n = nn.ModuleList(nn.BatchNorm2d(width) for width in (channels, mid, mid))
        self.c = nn.ModuleList([plain.conv1x1(channels, mid), plain.conv3x3(mid, mid, stride), plain.conv1x1(mid, out)])

    def forward(self, x):
        z = h = functional.relu(self.n[0](x))
        h = functional.relu(self.n[1](self.c[0](h)))
        h = self.c[2](functional.relu(self.n[2](self.c[1](h))))
        return h + (x if self.skip is None else self.skip(z))


class Dense(nn.Module):
    """A dense block of a user's own, without torchvision's names."""

    def __init__(self, channels, growth, depth):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                *(nn.BatchNorm2d(c), nn.ReLU(), plain.conv1x1(c, 4 * growth)),
                *(nn.BatchNorm2d(4 * growth), nn.ReLU(), plain.conv3x3(4 * growth, growth)),
            )
            for c in range(channels, channels + depth * growth, growth)
        )

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class PrependingDense(Dense):
    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([layer(x), x], 1)
        return x


def kernels(fast, x):
    return [row.kernel for row in rf.explain(fast, x).rows]


def two(first, second):
    return rf.models.randomize_batchnorms(nn.Sequential(first, second)).eval()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: two(NormInConvBlock(12, 8), NormInConvBlock(12, 8)), ["bottleneck"] * 2),
        (lambda: two(IRBlock(12, 16, 1), IRBlock(16, 16, 2)), ["conv_bn_act"] * 6),
        (lambda: two(OptionA(12, 20, 2, False), OptionA(20, 30, 2, True)), ["basic_block"] * 2),
        (lambda: two(PreAct(12, 8, 12, 1), PreAct(12, 8, 24, 2)), ["preact_block"] * 2),
        (lambda: two(Dense(12, 4, 3), rf.nn.Transition(24, 8)), ["dense_block", "transition"]),
    ],
    ids=["norm in conv", "insightface", "option A", "pre-activation", "dense"],
)
def test_own_blocks(model, expected):
    for dtype in (torch.float32, torch.bfloat16):
        made = model().to(dtype)
        fast, x = rf.fuse(made), torch.randn(2, 12, 14, 18).to(dtype)
        assert kernels(fast, x) == expected
        assert_parity(made, fast, x)
        fast.load_state_dict(made.state_dict(), strict=True)


def test_norm_in_conv_with_activation_is_one_layer():
    conv = NormInConv(8, 8, 3, padding=1, norm=nn.BatchNorm2d(8), activation=nn.ReLU())
    model = rf.models.randomize_batchnorms(nn.Sequential(conv)).eval()
    fast, x = rf.fuse(model), torch.randn(2, 8, 6, 7)
    assert kernels(fast, x) == ["conv_bn_act"]
    assert_parity(model, fast, x)


def test_relu_in_the_norm():
    model = rf.models.randomize_batchnorms(
        nn.Sequential(plain.conv3x3(8, 8), ActInNorm(8, nn.ReLU()), plain.conv3x3(8, 8), ActInNorm(8, nn.SiLU()))
    ).eval()
    fast, x = rf.fuse(model), torch.randn(2, 8, 6, 7)
    rows = rf.explain(fast, x).rows
    assert [row.kernel for row in rows] == ["conv_bn_act", "unfused"]
    assert "computes something else than BatchNorm, or BatchNorm and ReLU" in rows[1].why
    assert_parity(model, fast, x)
    model[1].act = nn.Identity()  # after fusing, on the original; the copy is not touched
    fast[1].act = nn.Identity()
    assert torch.equal(fast(x), model(x))


def test_concatenated_the_other_way_round_is_no_dense_block():
    model = rf.models.randomize_batchnorms(PrependingDense(12, 4, 3)).eval()
    fast, x = rf.fuse(model), torch.randn(2, 12, 6, 6)
    assert "dense_block" not in kernels(fast, x)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))


def test_speaker_resnet_on_wide_spectrograms():
    model = rf.models.ResNet(plain.BasicBlock, (1, 1, 1, 1))
    model.conv1 = nn.Conv2d(1, 64, 3, 1, 1, bias=False)
    model = rf.models.randomize_batchnorms(model).eval()
    fast, x = rf.fuse(model), torch.randn(2, 1, 40, 101)
    assert rf.explain(fast, x).coverage == 1.0
    assert_parity(model, fast, x)


# --- the contract -----------------------------------------------------------------------------------------------------

FAMILIES = {
    "torchvision": lambda: compatibility.MODELS["densenet121"].make(),
    "timm": lambda: compatibility.MODELS["timm resnetv2_50"].make(),
    "transformers": lambda: thirdparty.transformers_resnet(),
    "own": lambda: rf.models.build("resnet20_cifar"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def fused(request):
    model = rf.models.randomize_batchnorms(FAMILIES[request.param]()).eval()
    return model, rf.fuse(model)


def first(output):
    return output if isinstance(output, torch.Tensor) else output.logits


def same(one, other, x):
    with torch.no_grad():
        return torch.equal(first(one(x)), first(other(x)))


def test_state_dict_both_ways(fused):
    model, fast = fused
    assert list(fast.state_dict()) == list(model.state_dict())
    fast.load_state_dict(model.state_dict(), strict=True)
    copy.deepcopy(model).load_state_dict(fast.state_dict(), strict=True)


def test_copies_and_whole_module_files(fused):
    _, fast = fused
    x, file = images(1, 32), io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for copied in (copy.deepcopy(fast), torch.load(file, weights_only=False)):
        assert ops_run(copied, x) == ops_run(fast, x)
        assert same(copied, fast, x)


def test_to_dtype_after_fusing(fused):
    model, fast = fused
    x = images(1, 32, torch.bfloat16)
    half = copy.deepcopy(fast).to(torch.bfloat16)
    assert same(half, rf.fuse(copy.deepcopy(model).to(torch.bfloat16)), x)
    last = copy.deepcopy(fast).to(memory_format=torch.channels_last)
    assert same(last, fast, images(1, 32))


def test_fused_twice_is_fused_once(fused):
    _, fast = fused
    x = images(1, 32)
    again = rf.fuse(fast)
    assert ops_run(again, x) == ops_run(fast, x)
    assert same(again, fast, x)
    plain_again = rf.unfuse(again)
    assert ops_run(plain_again, x) == []


def test_hook_inside_is_honoured_and_warned_of():
    model = rf.models.randomize_batchnorms(compatibility.MODELS["densenet121"].make()).eval()
    fast, x, seen = rf.fuse(model), images(1, 32), []
    handle = fast.features.denseblock1.denselayer2.conv1.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="hook on features.denseblock1"):
        with_hook = rf.fuse(fast)
    assert kernels(with_hook, x).count("dense_block") == 3
    with torch.no_grad():
        with_hook(x)
    assert seen
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rf.fuse(fast)


def test_data_parallel_wrapper():
    model = rf.models.randomize_batchnorms(rf.models.build("resnet20_cifar")).eval()
    wrapped = nn.DataParallel(model).eval()
    fast, x = rf.fuse(wrapped), images(2, 32)
    assert len(ops_run(fast, x)) == len(ops_run(rf.fuse(model), x))
    assert same(fast, rf.fuse(model), x)
    fast.load_state_dict(wrapped.state_dict(), strict=True)


def test_distributed_data_parallel(tmp_path):
    model = rf.models.randomize_batchnorms(rf.models.CifarResNet(8)).eval()
    expected, x = rf.fuse(model), images(2, 16)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model)).eval()
        inside = nn.parallel.DistributedDataParallel(rf.fuse(model)).eval()
        for fast in (rf.fuse(wrapped), rf.fuse(wrapped, inplace=True), inside):
            assert len(ops_run(fast, x)) == len(ops_run(expected, x))
            assert same(fast, expected, x)
            fast.load_state_dict({f"module.{name}": t for name, t in model.state_dict().items()}, strict=True)
        inside.train()(x).sum().backward()  # the gradients are averaged through hooks on the parameters
        model.train()(x).sum().backward()
        for p, q in zip(inside.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    finally:
        torch.distributed.destroy_process_group()


INTERPRETED = {
    "residual": lambda: rf.models.CifarResNet(8),
    "bottleneck": lambda: nn.Sequential(plain.Bottleneck(16, 4), plain.Bottleneck(16, 4)),
    "pre-activation": lambda: PreAct(16, 8, 24, 2),
    "dense": lambda: nn.Sequential(Dense(16, 4, 2), rf.nn.Transition(24, 8)),
    "additions": lambda: nn.Sequential(IRBlock(16, 16, 2)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", INTERPRETED)
def test_interpreted_triton_kernels(family, dtype):
    pytest.importorskip("triton")
    model = rf.models.randomize_batchnorms(INTERPRETED[family]()).eval().to(dtype)
    x = torch.randn(1, 3 if family == "residual" else 16, 8, 8).to(dtype)
    with rf.backend("triton"):
        fast = rf.fuse(model)
        rows = rf.explain(fast, x).rows
        assert {row.backend for row in rows} == {"triton"}, rows
        assert_parity(model, fast, x)


def test_onnx_export_of_the_unfused_model(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = rf.models.randomize_batchnorms(nn.Sequential(plain.BasicBlock(4, 4))).eval()
    torch.onnx.export(rf.unfuse(rf.fuse(model)), (torch.randn(1, 4, 6, 6),), tmp_path / "model.onnx", dynamo=True)
    kinds = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert "Conv" in kinds and not any("resnet_fused" in kind for kind in kinds)


def test_feature_extraction():
    model = rf.models.randomize_batchnorms(compatibility.MODELS["timm resnet50"].make()).eval()
    fast, x = rf.fuse(model), images(1, 64)
    with torch.no_grad():
        torch.testing.assert_close(fast.forward_features(x), model.forward_features(x), rtol=1e-4, atol=1e-5)
        _, ours = fast.forward_intermediates(x)
        _, theirs = model.forward_intermediates(x)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_feature_extraction_by_torch_fx():
    models = thirdparty.torchvision_models()
    extract = importlib.import_module("torchvision.models.feature_extraction").create_feature_extractor
    model = rf.models.randomize_batchnorms(models.resnet18(weights=None)).eval()
    fast, x = rf.fuse(model), images(1, 64)
    ours, theirs = (extract(m, ["layer1", "layer3.0"]) for m in (fast, model))
    with torch.no_grad():
        for a, b in zip(ours(x).values(), theirs(x).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    kernels = [row.kernel for row in rf.explain(ours, x).rows]
    assert kernels.count("basic_block") == 5  # layer1, layer2 and the first of layer3
    assert kernels.count("unfused") == 1  # the stem: what the graph calls is not the model that it is fused in


def test_compiled_once_for_all_sizes():
    model = rf.models.randomize_batchnorms(rf.models.build("resnet20_cifar")).eval()
    fast = rf.fuse(model)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fast, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    with torch.no_grad():
        for n, size in ((2, 32), (3, 40), (5, 48), (4, 36)):
            x = images(n, size)
            torch.testing.assert_close(compiled(x), fast(x), rtol=1e-5, atol=1e-5)
            frames.append(counter.frame_count)
    assert frames[-1] == frames[0]


def test_export():
    model = rf.models.randomize_batchnorms(rf.models.build("resnet20_cifar")).eval()
    fast, x = rf.fuse(model), images(2, 32)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        exported = torch.export.export(fast, (x,), dynamic_shapes=({0: batch},))
    names = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert any("resnet_fused.basic_block" in name for name in names)
    larger = images(5, 32)
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(larger), fast(larger), rtol=1e-5, atol=1e-5)


@pytest.mark.thorough
def test_ahead_of_time_inductor(tmp_path):
    model = rf.models.randomize_batchnorms(nn.Sequential(plain.BasicBlock(8, 8), IRBlock(8, 8, 2))).eval()
    fast, x = rf.fuse(model), torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        exported = torch.export.export(fast, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
        larger = torch.randn(5, 8, 6, 6)
        loaded = torch._inductor.aoti_load_package(package)
        torch.testing.assert_close(loaded(larger), fast(larger), rtol=1e-5, atol=1e-5)


class StandardizedConv(nn.Conv2d):
    """A convolution with a standardised weight, as BiT has it."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding)


def test_norms_of_the_image_are_left_alone():
    norm = nn.Sequential(plain.conv3x3(8, 8), nn.BatchNorm2d(8))
    group = nn.Sequential(plain.conv3x3(8, 8), nn.GroupNorm(2, 8), nn.ReLU())
    before = nn.Sequential(nn.InstanceNorm2d(8), nn.ReLU(), plain.conv1x1(8, 8))
    model = rf.models.randomize_batchnorms(nn.Sequential(norm, group, before)).eval()
    fast, x = rf.fuse(model), torch.randn(2, 8, 6, 6)
    why = {row.block: row.why for row in rf.explain(fast, x).rows if row.kernel == "unfused"}
    assert why == {
        "1.0": "1.1 is a GroupNorm: its statistics depend on the image",
        "2.2": "2.0 is a InstanceNorm2d: its statistics depend on the image",
    }
    assert_parity(model, fast, x)
    with pytest.raises(InputError, match="1 is a GroupNorm"):
        rf.fuse(group)


def test_standardised_weights_are_left_alone():
    model = two(nn.Sequential(plain.conv3x3(8, 8), nn.BatchNorm2d(8)), StandardizedConv(8, 8, 3, padding=1))
    model.append(nn.BatchNorm2d(8).eval())
    fast, x = rf.fuse(model), torch.randn(2, 8, 6, 6)
    rows = rf.explain(fast, x).rows
    assert [row.kernel for row in rows] == ["conv_bn_act", "unfused"]
    assert "computes something else" in fast._unfused_reasons["1"] and "weight is computed" in rows[1].why
    assert_parity(model, fast, x)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: m.to("meta"), "meta device"),
        (lambda m: torch.jit.trace(m, images(1, 32)), "scripted or traced"),
        (lambda m: nn.Sequential(torch.ao.nn.quantized.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval(), "0 convolutions"),
    ],
    ids=["meta", "scripted", "quantized"],
)
def test_models_that_cannot_be_fused(spoil, message):
    with pytest.raises(InputError, match=message):
        rf.fuse(spoil(rf.models.build("resnet20_cifar").eval()))


# With a sparse weight the rest of the block still runs step by step; torch cannot run a complex one on a real image.
@pytest.mark.parametrize(("kind", "rest"), [("sparse", "1"), ("complex", "1.conv2..bn2")])
def test_unusual_weights_are_left_alone(kind, rest):
    model = two(plain.BasicBlock(8, 8), plain.BasicBlock(8, 8))
    weight = model[1].conv1.weight.detach()
    model[1].conv1.weight = nn.Parameter(weight.to_sparse() if kind == "sparse" else weight.to(torch.complex64))
    fast = rf.fuse(model, inplace=True)  # torch itself cannot copy a sparse parameter
    assert list(fusions(fast)) == ["0", rest]
    assert kind in fast._unfused_reasons["1.conv1"]
