"""The contract of fuse and unfuse."""

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from nets import BLOCKS, TinyBackbone, TinyResNet, assert_parity, images, ops_run, tiny
from torch import nn
from torch.nn import functional

import resnet_fused as rf
from resnet_fused.errors import InputError
from resnet_fused.matchers import probe
from resnet_fused.nn import plain


def fingerprint(model):
    """All of a model that fuse could change."""
    return [
        (name, id(m), type(m), sorted(m.__dict__), *(list(store.items()) for store in hooks(m)))
        for name, m in model.named_modules()
    ], [(name, id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()]


def hooks(m):
    return m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks


def assert_same_fingerprint(a, b):
    assert a[0] == b[0]
    for (name, i, t), (other_name, j, u) in zip(a[1], b[1], strict=True):
        assert (name, i) == (other_name, j)
        assert torch.equal(t, u)


# --- what is fused, and that it computes the same -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_every_block_is_fused_and_holds_parity(dtype, memory_format):
    model = tiny().to(dtype, memory_format=memory_format)
    fast = rf.fuse(model)
    x = images(dtype=dtype).to(memory_format=memory_format)
    assert ops_run(fast, x) == BLOCKS
    assert_parity(model, fast, x)


def test_fast_accuracy_reaches_the_ops():
    fast = rf.fuse(tiny(), accuracy="fast", backend="reference")
    assert {row.backend for row in rf.explain(fast, images()).rows} == {"reference"}
    assert fast.layer1[0]._fused_op.settings.accuracy == "fast"


def test_backend_context_overrides_auto():
    model, x = tiny(), images()
    fast = rf.fuse(model)
    with rf.backend("reference"):
        assert {row.backend for row in rf.explain(fast, x).rows} == {"reference"}
    assert_parity(model, rf.fuse(model, backend="vendor"), x)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (3, 3, 33, 47), (2, 3, 1, 1), (0, 3, 32, 32)])
def test_any_shape_runs(shape):
    model = tiny()
    fast, x = rf.fuse(model), torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))


def test_the_original_is_untouched_and_inplace_returns_it():
    model = tiny()
    before = fingerprint(model)
    fast = rf.fuse(model)
    assert_same_fingerprint(before, fingerprint(model))
    assert fast is not model
    assert rf.fuse(model, inplace=True) is model
    assert ops_run(model, images()) == BLOCKS


def test_modules_keep_their_identity_class_and_attributes():
    model = tiny()
    children = dict(model.named_modules())
    rf.fuse(model, inplace=True)
    assert dict(model.named_modules()) == children
    assert isinstance(model.layer1[0], plain.Bottleneck)
    assert model.layer2[0].stride == 2
    assert isinstance(model.conv1, nn.Conv2d)
    assert "fused=bottleneck" in repr(model.layer1[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)),
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        lambda: nn.Sequential(nn.Conv2d(3, 8, (1, 5), (2, 1), (0, 2), (1, 1), 1), nn.BatchNorm2d(8), nn.ReLU6()),
        lambda: nn.Sequential(nn.Conv2d(3, 9, 3, groups=3, padding="same"), nn.BatchNorm2d(9, affine=False), nn.ReLU()),
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)),
        lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sigmoid(), nn.Conv2d(8, 2, 1)),
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Identity(), nn.ReLU(), nn.Dropout(0.5)),
    ],
)
def test_neighbours_in_a_sequential(make):
    model = rf.models.randomize_batchnorms(make()).eval()
    fast, x = rf.fuse(model), images(size=15)
    assert_parity(model, fast, x)
    assert len(ops_run(fast, x)) == 1


def test_a_fused_sequential_is_still_a_sequential():
    model = rf.models.randomize_batchnorms(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))
    ).eval()
    fast, x = rf.fuse(model), images()
    with torch.no_grad():
        torch.testing.assert_close(fast[:2](x), model[:2](x))
        torch.testing.assert_close(fast[0](x), model[0](x))
        for m in (model, fast):
            m.append(nn.Sigmoid())
        torch.testing.assert_close(fast(x), model(x))


class Frozen(nn.Module):
    """A BatchNorm look-alike with its eps in the code."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.1)
        self._e = eps

    def forward(self, x):
        scale = self.weight * (self.running_var + self._e).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


@pytest.mark.parametrize("eps", [1e-5, 0.0, 1e-3])
def test_batchnorm_look_alikes(eps):
    model = TinyResNet(norm_layer=lambda channels: Frozen(channels, eps)).eval()
    for module in model.modules():
        if isinstance(module, Frozen):
            module.running_var.uniform_(1e-3, 1e-2)
            module.weight.uniform_(0.03, 0.06)
    fast, x = rf.fuse(model), images()
    assert ops_run(fast, x) == BLOCKS
    assert_parity(model, fast, x)


def test_a_look_alike_that_computes_something_else_stays():
    class Doubled(Frozen):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(InputError, match="computes something else than BatchNorm"):
        rf.fuse(TinyResNet(norm_layer=Doubled).eval())


# --- what must not be fused -----------------------------------------------------------------------------------------


class Odd(plain.Bottleneck):
    """A bottleneck in structure only."""

    def __init__(self, kind, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kind = kind
        if kind in ("silu", "relu6", "leaky", "identity"):
            acts = {"silu": nn.SiLU(), "relu6": nn.ReLU6(), "leaky": nn.LeakyReLU(0.01), "identity": nn.Identity()}
            self.relu = acts[kind]
        if kind == "gate":
            self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 32, 1), nn.Sigmoid())
        if kind == "gamma":
            self.gamma = nn.Parameter(torch.full((32, 1, 1), 0.5))

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if self.kind == "scaled":
            y = y * 0.99
        if self.kind == "gate":
            y = y * self.gate(y)
        if self.kind == "gamma":
            y = y * self.gamma
        if self.kind == "dropout":
            y = functional.dropout(y, 0.01)
        if self.kind == "drop":
            y = y * (torch.rand(y.shape[0], 1, 1, 1) < 0.999)
        if self.kind == "relu before add":
            return self.relu(y) + x
        if self.kind == "no relu":
            return y + x
        if self.kind == "no add":
            return self.relu(y)
        if self.kind == "clip":
            return (y + x).clamp(0, 8)
        if self.kind == "softplus":
            return functional.softplus(y + x)
        if self.kind == "tuple":
            return (self.relu(y + x),)
        if self.kind == "conv1 twice":
            return self.relu(y + x) + self.conv1(x).mean()
        return self.relu(y + x)


KINDS = ["silu", "relu6", "leaky", "identity", "gate", "gamma", "scaled", "dropout", "drop", "relu before add"]
KINDS += ["no relu", "no add", "clip", "softplus", "tuple", "conv1 twice"]


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_look_alike_blocks_are_refused(kind, zero):
    """Also where a zero last BatchNorm hides the whole branch."""
    odd = Odd(kind, 32, 8)
    model = rf.models.randomize_batchnorms(nn.Sequential(nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32), odd)).eval()
    if zero:
        nn.init.zeros_(odd.bn3.weight)
        nn.init.zeros_(odd.bn3.bias)
    fast, x = rf.fuse(model), images(channels=32, size=8).contiguous(memory_format=torch.channels_last)
    kernels = {row.kernel for row in rf.explain(fast, x).rows}
    assert kernels <= {"conv_bn_act", "unfused"}
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    torch.testing.assert_close(fast(x), expected)


def test_probing_leaves_the_random_state_alone():
    model = nn.Sequential(Odd("drop", 32, 8), plain.BasicBlock(32, 32)).eval()
    state = torch.get_rng_state()
    rf.fuse(model)
    assert torch.equal(state, torch.get_rng_state())


def reasons(fast, x):
    return {row.block: row.why for row in rf.explain(fast, x).rows if row.kernel == "unfused"}


def test_hook_inside_a_block():
    model, seen = tiny(), []
    model.layer1[1].conv2.register_forward_hook(lambda *args: seen.append(1))
    fast, x = rf.fuse(model), images()
    assert reasons(fast, x) == {"layer1.1.conv2": "a hook on layer1.1.conv2"}
    seen.clear()
    fast(x)
    assert seen == [1]
    assert_parity(model, fast, x)


def test_hook_added_and_removed_after_fusing():
    fast, x, seen = rf.fuse(tiny()), images(), []
    handles = [m.register_forward_hook(lambda *args: seen.append(1)) for m in (fast.layer1[0].conv2, fast.bn1)]
    assert ops_run(fast, x) == BLOCKS[2:]
    assert set(reasons(fast, x).values()) == {"a hook on a module inside it"}
    assert len(seen) == 4
    for handle in handles:
        handle.remove()
    assert ops_run(fast, x) == BLOCKS


def test_hooks_on_a_block_run():
    model, seen = tiny(), []
    model.layer1[0].register_forward_hook(lambda module, args, output: seen.append(output))
    fast, x = rf.fuse(model), images()
    assert ops_run(fast, x) == BLOCKS
    fast(x)
    assert len(seen) == 2
    seen.clear()
    fast.train()(x)
    assert len(seen) == 1


def test_shared_convolution_and_batchnorm():
    model = tiny()
    model.layer1[1].conv2 = model.layer1[0].conv2
    model.layer2[1].bn2 = model.layer2[0].bn2
    fast, x = rf.fuse(model), images()
    why = reasons(fast, x)
    assert why["layer1.0.conv2"] == "layer1.0.conv2 is shared: the model holds it in 2 places"
    assert "bn2 is shared" in why["layer2.0.conv2"]
    assert_parity(model, fast, x)


def test_a_convolution_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
            self.other, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.relu(self.bn(self.conv(x)))
            return self.bn2(self.other(self.conv(y)))

    model = rf.models.randomize_batchnorms(Twice()).eval()
    fast, x = rf.fuse(model), images(channels=4)
    assert ops_run(fast, x) == ["other..bn2"]
    assert_parity(model, fast, x)


def test_intermediate_used_elsewhere():
    class Tap(TinyResNet):
        def forward(self, x):
            y = self.relu(self.bn1(self.conv1(x)))
            return self.layer2(self.layer1(self.maxpool(y))), y

    model = tiny(Tap)
    fast, x = rf.fuse(model), images()
    assert ops_run(fast, x)[0] == "conv1..relu"
    assert_parity(model, fast, x)


def test_batchnorm_without_running_statistics():
    model = tiny()
    model.layer1[1].bn2 = nn.BatchNorm2d(8, track_running_stats=False)
    fast, x = rf.fuse(model.eval()), images()
    assert reasons(fast, x) == {"layer1.1.conv2": "layer1.1.bn2 has no running statistics"}
    torch.testing.assert_close(fast(x), model(x))


def test_batchnorm_in_train_mode_inside_an_eval_model():
    model, x = tiny(), images()
    fast = rf.fuse(model)
    for m in (model, fast):
        m.layer1[0].bn2.train()
    torch.testing.assert_close(fast(x), model(x))
    assert "layer1.0" not in ops_run(fast, x)
    assert "layer1.0" not in ops_run(rf.fuse(model), x)


def test_parametrized_weight_stays():
    model = tiny()
    nn.utils.parametrizations.weight_norm(model.layer1[0].conv1)
    model.eval()
    fast, x = rf.fuse(model), images()
    assert {row.kernel for row in rf.explain(fast, x).rows if row.block == "layer1.0"} == {"conv_bn_act"}
    assert reasons(fast, x) == {"layer1.0.conv1": "its weight is computed, as a parametrization does"}
    assert not fast.layer1[0].conv1._forward_pre_hooks
    torch.testing.assert_close(fast(x), model(x))


def test_module_replaced_after_fusing():
    fast, x = rf.fuse(tiny()), images()
    slow = rf.unfuse(fast)
    for m in (fast, slow):
        torch.manual_seed(3)
        m.layer1[0].bn2 = rf.models.randomize_batchnorms(nn.BatchNorm2d(8)).eval()
        m.layer1[1].downsample = nn.Sequential(nn.Conv2d(32, 32, 1)).eval()
        m.bn1 = rf.models.randomize_batchnorms(nn.BatchNorm2d(16)).eval()
        m.fc = nn.Identity()
    torch.testing.assert_close(fast(x), slow(x))
    assert ops_run(fast, x) == BLOCKS[3:-1]


def test_children_of_a_fused_stem_outside_of_the_model():
    model, x = tiny(), images()
    fast = rf.fuse(model)
    with torch.no_grad():
        torch.testing.assert_close(fast.conv1(x), model.conv1(x))
        head, fast_head = (nn.Sequential(*list(m.children())[:5]) for m in (model, fast))
        torch.testing.assert_close(fast_head(x), head(x))


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda: tiny().train(), {}, "model must be in eval mode, got TinyResNet in train mode"),
        (lambda: nn.Sequential(nn.Linear(3, 4)).eval(), {}, "got Sequential with 0 convolutions"),
        (lambda: nn.Conv2d(3, 4, 3).eval(), {}, "with 1 convolution and none"),
        (lambda: Odd("gamma", 32, 8, norm_layer=nn.Identity).eval(), {}, "got Odd with 3 convolutions"),
        (tiny, {"backend": "cudnn"}, "backend must be one of .* got 'cudnn'"),
        (tiny, {"accuracy": "exact"}, "accuracy must be one of .* got 'exact'"),
    ],
)
def test_errors_leave_the_model_as_it_was(make, arguments, message, inplace):
    model = make()
    before = fingerprint(model)
    with pytest.raises(InputError, match=message):
        rf.fuse(model, inplace=inplace, **arguments)
    assert_same_fingerprint(before, fingerprint(model))


def test_a_model_that_cannot_be_copied():
    model = tiny()
    model.lock = threading.Lock()
    for change in (rf.fuse, rf.unfuse):
        with pytest.raises(InputError, match=r"deep copy, or be changed itself with inplace=True: .*lock"):
            change(model)
    assert rf.fuse(model, inplace=True) is model


def test_no_module():
    with pytest.raises(InputError, match=r"model must be a torch.nn.Module, got function"):
        rf.fuse(tiny)


def test_wrong_input_of_a_fused_model():
    fast = rf.fuse(tiny())
    with pytest.raises(ValueError, match="4 dimensions"):
        fast(torch.randn(3, 32, 32))
    with pytest.raises(ValueError, match="dtype"):
        fast(images(dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="channels"):
        fast(images(channels=4))
    with pytest.raises(ValueError, match=r"weight.device must be that of x, meta, got cpu"):
        fast(images().to("meta"))
    with pytest.raises(TypeError, match="conv2d"):  # what the unfused model says
        fast("x")


def test_on_the_meta_device():
    """Which has no autocast to be asked for."""
    model = tiny().to("meta")
    assert rf.fuse(tiny()).to("meta")(images().to("meta")).shape == model(images().to("meta")).shape


# --- staying right --------------------------------------------------------------------------------------------------


def test_state_dict_both_ways():
    model = tiny()
    fast = rf.fuse(model)
    assert list(fast.state_dict()) == list(model.state_dict())
    other = tiny(TinyResNet)
    fast.load_state_dict(other.state_dict(), strict=True)
    assert_parity(other, fast, images())
    model.load_state_dict(fast.state_dict(), strict=True)
    assert_parity(model, fast, images())
    fast.load_state_dict(tiny().state_dict(), assign=True)


def fused_step(model):
    """Of an optimizer that does not count its steps as changes."""
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.3)
    torch.optim.SGD(model.parameters(), 0.5, fused=True).step()


CHANGES = {
    "fused optimizer": lambda m, other: fused_step(m),
    "load_state_dict": lambda m, other: m.load_state_dict(other.state_dict()),
    "assign": lambda m, other: m.load_state_dict(copy.deepcopy(other.state_dict()), assign=True),
    "in place": lambda m, other: [t.copy_(other.state_dict()[name]) for name, t in m.state_dict().items()],
    "data": lambda m, other: [
        setattr(p, "data", q.data.clone()) for p, q in zip(m.parameters(), other.parameters(), strict=True)
    ],
    "eps": lambda m, other: [setattr(n, "eps", 0.5) for n in m.modules() if isinstance(n, nn.BatchNorm2d)],
    "round trip": lambda m, other: m.bfloat16().float(),
    "data in place": lambda m, other: [
        *(p.data.copy_(q.data) for p, q in zip(m.parameters(), other.parameters(), strict=True)),
        m.eval(),
    ],
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_tensors_are_folded_again(change, inference):
    context = torch.inference_mode() if inference else torch.no_grad()
    model, x = tiny(), images()
    fast = rf.fuse(model)
    other = tiny()
    with context:
        before = fast(x)
        for m in (model, fast):
            with torch.inference_mode(False), torch.no_grad():
                CHANGES[change](m, other)
        torch.testing.assert_close(fast(x), model(x))
        assert not torch.allclose(fast(x), before, rtol=1e-4)


def test_train_and_back():
    model, x = tiny(), images(4)
    fast = rf.fuse(model)
    fast(x)
    outputs = []
    for m in (model, fast):
        m.train()
        optimizer = torch.optim.SGD(m.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            outputs.append(m(x))
            outputs[-1].square().mean().backward()
            optimizer.step()
        m.eval()
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    for (name, t), u in zip(model.state_dict().items(), fast.state_dict().values(), strict=True):
        assert torch.equal(t, u), name
    assert ops_run(fast, x) == BLOCKS
    assert_parity(model, fast, x)


def test_gradients_in_eval_mode():
    model = tiny().double()
    fast = rf.fuse(model)
    x, y = (images(dtype=torch.float64).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    model(x).square().sum().backward()
    fast(y).square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad)
    for (name, p), q in zip(model.named_parameters(), fast.parameters(), strict=True):
        assert q.grad is not None, name
        torch.testing.assert_close(q.grad, p.grad)


@pytest.mark.parametrize("inference", [False, True])
def test_vectors_kept_by_one_mode_serve_the_other(inference):
    fast, x = rf.fuse(tiny()), images()
    for p in fast.parameters():
        p.requires_grad_(False)
    with torch.inference_mode(inference):
        fast(x)
    z = x.clone().requires_grad_()
    fast(z).sum().backward()
    assert z.grad is not None


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = tiny()
        fast = rf.fuse(model)
        x = images()
        torch.testing.assert_close(fast(x), model(x))
        assert ops_run(fast, x) == BLOCKS


def test_conversions():
    model, x = tiny(), images()
    fast = rf.fuse(model)
    fast(x)
    assert_parity(model.bfloat16(), fast.bfloat16(), x.bfloat16())
    model = tiny().half()
    assert_parity(model, rf.fuse(model), x.half())


def test_autocast_runs_as_unfused():
    model, x = tiny(), images()
    fast = rf.fuse(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), model(x))


# --- memory format --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("pictures", [torch.contiguous_format, torch.channels_last])
def test_output_format_is_that_of_the_unfused_model(weights, pictures):
    model = tiny(TinyBackbone).to(memory_format=weights)
    fast, x = rf.fuse(model), images(size=64).to(memory_format=pictures)
    with torch.no_grad():
        assert fast(x).stride() == model(x).stride()


def test_format_is_restored_inside_containers():
    class Many(TinyResNet):
        def forward(self, x):
            y = self.features(x)
            return {"out": y, "all": [(y, y + 1)], "name": "many"}

    x = images(size=64)
    with torch.no_grad():
        result = rf.fuse(tiny(Many))(x)
    assert result["out"].is_contiguous() and result["all"][0][1].is_contiguous()
    assert result["out"] is result["all"][0][0]
    assert result["name"] == "many"


# --- twice, and back ------------------------------------------------------------------------------------------------


def test_fuse_twice_is_fuse_once():
    model, x = tiny(), images()
    once = rf.fuse(model)
    twice = rf.fuse(once)
    assert repr(once) == repr(twice)
    assert [type(m) for m in once.modules()] == [type(m) for m in twice.modules()]
    assert [list(map(len, hooks(m))) for m in once.modules()] == [list(map(len, hooks(m))) for m in twice.modules()]
    with torch.no_grad():
        assert torch.equal(once(x), twice(x))
    assert rf.fuse(once, accuracy="fast").layer1[0]._fused_op.settings.accuracy == "fast"
    assert once.layer1[0]._fused_op.settings.accuracy == "strict"


def test_fuse_a_part_then_the_whole():
    model, x = tiny(), images()
    fast = copy.deepcopy(model)
    rf.fuse(fast.layer1[0].downsample, inplace=True)
    rf.fuse(fast.layer1, inplace=True)
    assert_parity(model, fast, x)
    rf.fuse(fast, inplace=True)
    assert ops_run(fast, x) == BLOCKS
    assert_parity(model, fast, x)


def test_a_block_as_the_whole_model():
    block = rf.models.randomize_batchnorms(plain.Bottleneck(32, 8)).eval()
    fast, x = copy.deepcopy(block), images(channels=32)
    assert rf.fuse(fast, inplace=True) is fast
    assert_parity(block, fast, x)
    assert type(rf.unfuse(fast)) is plain.Bottleneck


def test_unfuse():
    model = tiny()
    before = fingerprint(model)
    x = images()
    fast = rf.fuse(model, inplace=True)
    slow = rf.unfuse(fast)
    assert ops_run(fast, x) == BLOCKS
    assert ops_run(slow, x) == []
    assert [type(m) for m in slow.modules()] == [t for _, _, t, *_ in before[0]]
    assert rf.unfuse(fast, inplace=True) is model
    assert_same_fingerprint(before, fingerprint(model))
    assert_same_fingerprint(before, fingerprint(rf.unfuse(model, inplace=True)))


# --- copies, compilers, threads -------------------------------------------------------------------------------------


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
def test_copies_are_fused_and_independent(duplicate):
    fast, x = rf.fuse(tiny()), images()
    with torch.no_grad():
        expected = fast(x)
        twin = duplicate(fast)
        assert ops_run(twin, x) == BLOCKS
        assert torch.equal(twin(x), expected)
        other = tiny()
        twin.load_state_dict(other.state_dict())
        torch.testing.assert_close(twin(x), other(x))
        assert torch.equal(fast(x), expected)
        assert ops_run(rf.unfuse(twin), x) == []


def test_a_dropped_model_is_freed():
    fast = rf.fuse(tiny())
    fast(images())
    ref = weakref.ref(fast.layer1[0].conv1.weight)
    del fast
    gc.collect()
    assert ref() is None


@pytest.mark.parametrize("cls", [TinyResNet, TinyBackbone])
def test_compile_fullgraph(cls):
    torch.compiler.reset()
    called = []

    def look(graph, example):
        called.extend(str(n.target) for n in graph.graph.nodes if "resnet_fused" in str(n.target))
        return graph

    model, x = tiny(cls), images()
    fast = rf.fuse(model)
    compiled = torch.compile(fast, fullgraph=True, backend=look)
    with torch.no_grad():
        y = compiled(x)
        torch.testing.assert_close(y, model(x))
        assert y.stride() == model(x).stride()
        assert len(called) == len(BLOCKS) - (cls is TinyBackbone)
        other = tiny(cls)
        fast.load_state_dict(other.state_dict())
        torch.testing.assert_close(compiled(x), other(x))
        fast.layer1[0].bn1.weight.mul_(2)
        other.layer1[0].bn1.weight.mul_(2)
        torch.testing.assert_close(compiled(x), other(x))
        for m in (fast, other):
            m.train()
        torch.testing.assert_close(compiled(x), other(x))


def test_compile_gradients():
    torch.compiler.reset()
    fast, x = rf.fuse(rf.models.randomize_batchnorms(plain.BasicBlock(4, 4)).eval()), images(channels=4, size=8)
    torch.compile(fast, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    grads = [p.grad.clone() for p in fast.parameters()]
    fast.zero_grad()
    fast(x).square().sum().backward()
    for p, grad in zip(fast.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_export():
    model, x = tiny(), images()
    program = torch.export.export(rf.fuse(model), (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    assert sum("resnet_fused" in str(n.target) for n in program.graph.nodes) == len(BLOCKS)


def test_threads():
    model = tiny()
    fast, inputs = rf.fuse(model), [images() for _ in range(4)]
    wrong = []

    def work(x):
        with torch.inference_mode():
            expected = model(x)
            wrong.extend(1 for _ in range(20) if not torch.allclose(fast(x), expected, atol=1e-5))

    threads = [threading.Thread(target=work, args=(x,)) for x in inputs]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_an_error_inside_does_not_leave_the_stem_on():
    fast, x = rf.fuse(tiny()), images()
    with pytest.raises(ValueError, match="channels"):
        fast(images(channels=4))
    with torch.no_grad():
        assert fast.conv1(x).shape[-1] == 16


class Interrupted(nn.Module):
    """A layer, after which somebody presses Ctrl-C."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.pressed = plain.conv3x3(16, 16), nn.BatchNorm2d(16), False
        self.norm.running_var.fill_(3.0)

    def forward(self, x):
        x = self.norm(self.conv(x)).sigmoid()
        if self.pressed:
            raise KeyboardInterrupt
        return x


def test_an_interrupted_call_is_not_taken_for_running():
    torch.manual_seed(0)
    model = nn.Sequential(Interrupted(), Interrupted()).eval()
    fast, x = rf.fuse(model), images(channels=16)
    assert ops_run(fast, x) == ["0.conv..norm", "1.conv..norm"]
    with torch.no_grad():
        for mine in fast:
            for _ in range(2):
                mine.pressed = True
                with pytest.raises(KeyboardInterrupt):
                    fast(x)
                mine.pressed = False
                for m, theirs in zip(fast, model, strict=True):
                    torch.testing.assert_close(m.conv(x), theirs.conv(x))
            assert ops_run(fast, x) == ["0.conv..norm", "1.conv..norm"]
            torch.testing.assert_close(fast(x), model(x))


def test_dataflow_with_extra_arguments():
    class Flexible(plain.BasicBlock):
        def forward(self, x, scale=1.0):
            return super().forward(x) * scale

    block = rf.models.randomize_batchnorms(Flexible(8, 8)).eval()
    fast, x = rf.fuse(block), images(channels=8)
    with torch.no_grad():
        torch.testing.assert_close(fast(x, 2.0), block(x, 2.0))
        torch.testing.assert_close(fast(x=x), block(x))
        torch.testing.assert_close(fast(x), block(x))


# --- forwards that do something else on other calls ------------------------------------------------------------------


class Clamped(plain.BasicBlock):
    def forward(self, x):
        return super().forward(x).clamp(max=20.0)


class WithoutNaN(plain.BasicBlock):
    def forward(self, x):
        return torch.nan_to_num(super().forward(x))


class NotAlone(plain.BasicBlock):
    def forward(self, x):
        return x if x.shape[0] == 1 else super().forward(x)


class Storing(plain.BasicBlock):
    def forward(self, x):
        self.features = super().forward(x)
        return self.features


class Checked(plain.BasicBlock):
    """Nothing else for any number of channels that can come in."""

    def forward(self, x):
        if x.shape[1] != 16:
            raise ValueError(f"16 channels, got {x.shape[1]}")
        return super().forward(x)


def two(block):
    torch.manual_seed(0)
    return nn.Sequential(plain.BasicBlock(16, 16), block(16, 16)).eval()


@pytest.mark.parametrize(
    ("block", "extreme"),
    [
        (Clamped, lambda x: 30 * x),
        (WithoutNaN, lambda x: torch.where(x > 3, torch.nan, x)),
        (NotAlone, lambda x: x[:1]),
        (Storing, lambda x: x),
    ],
)
def test_a_block_that_does_more_is_no_block(block, extreme):
    model = two(block)
    fast, x = rf.fuse(model), extreme(images(channels=16))
    torch.testing.assert_close(fast(x), model(x), equal_nan=True)
    assert vars(fast[1]).keys() - vars(model[1]).keys() <= {"_fused_op"}
    torch.testing.assert_close(getattr(fast[1], "features", 0), getattr(model[1], "features", 0))
    rows = rf.explain(fast, images(channels=16)).rows
    assert "basic_block" not in [row.kernel for row in rows if row.block.startswith("1")]


def test_a_block_that_checks_its_channels_is_one():
    fast = rf.fuse(two(Checked))
    assert [row.kernel for row in rf.explain(fast, images(channels=16)).rows] == ["basic_block"] * 2


class Switched(plain.BasicBlock):
    def __init__(self, *args):
        super().__init__(*args)
        self.skip = False

    def forward(self, x):
        return x if self.skip else super().forward(x)


ATTRIBUTES = {
    "dilation": lambda m: [setattr(m.conv1, name, (2, 2)) for name in ("dilation", "padding")],
    "padding mode": lambda m: setattr(m.conv2, "padding_mode", "circular"),
    "own flag": lambda m: setattr(m, "skip", True),
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_changed_after_fusing(name):
    model = two(Switched)
    fast, x = rf.fuse(model), images(channels=16)
    with torch.no_grad():
        fast(x)
        for m in (model, fast):
            ATTRIBUTES[name](m[1])
        torch.testing.assert_close(fast(x), model(x))
    rows = {row.block: row.why for row in rf.explain(fast, x).rows if row.block.startswith("1")}
    assert name == "own flag" or all("an attribute of a module inside it was changed" in why for why in rows.values())


class Adjustable(plain.BasicBlock):
    """A block whose forward reads attributes of every kind, which change nothing as they are."""

    gain = 1.0

    def __init__(self, *args):
        super().__init__(*args)
        self.drop = None
        self.scales, self.more, self.factor = [1.0], {"scale": 1.0}, torch.ones(1)
        self.factors = [torch.ones(1)]
        self.end = functional.relu

    def between(self, x):
        return x

    def forward(self, x):
        y = self.bn2(self.conv2(self.end(self.bn1(self.conv1(x)))))
        if self.drop is not None:
            y = self.drop(y)
        y = self.between(y) * self.scales[0] * self.more["scale"] * self.factor * self.factors[0] * self.gain
        return self.end(y + x)


ADJUSTMENTS = {
    "none": lambda m: setattr(m, "drop", torch.sin),
    "none, a module": lambda m: setattr(m, "drop", nn.Tanh()),
    "list": lambda m: setattr(m, "scales", [0.5]),
    "in a list": lambda m: m.scales.__setitem__(0, 0.5),
    "in a dictionary": lambda m: m.more.update(scale=0.5),
    "tensor": lambda m: setattr(m, "factor", torch.tensor([0.5])),
    "in a tensor": lambda m: m.factor.mul_(0.5),
    "in a tensor in a list": lambda m: m.factors[0].mul_(0.5),
    "function": lambda m: setattr(m, "end", functional.gelu),
    "in place of a class's": lambda m: setattr(m, "gain", 0.5),
    "in place of a method": lambda m: setattr(m, "between", torch.sin),
}


@pytest.mark.parametrize("duplicate", [None, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", ADJUSTMENTS)
def test_attributes_of_any_kind_changed_after_fusing(name, duplicate):
    model = two(Adjustable)
    fast, x = rf.fuse(model), images(channels=16)
    with torch.no_grad():
        if duplicate is not None:
            fast(x)
            fast = duplicate(fast)
        before = fast(x)
        assert [row.kernel for row in rf.explain(fast, x).rows] == ["basic_block"] * 2
        for m in (model, fast):
            ADJUSTMENTS[name](m[1])
        torch.testing.assert_close(fast(x), model(x))
        assert not torch.allclose(fast(x), before, rtol=1e-2)
    whys = [row.why for row in rf.explain(fast, x).rows if row.block.startswith("1")]
    assert len(whys) == 2 and all("after fusing" in why for why in whys)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_block_with_a_changed_tensor_is_none_either(duplicate):
    model = two(Adjustable)
    fast, x = rf.fuse(model), images(channels=16)
    for m in (model, fast):
        m[1].factor.mul_(0.5)
    twin = duplicate(fast)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), model(x))
    assert ops_run(twin, x) == ops_run(fast, x) == ["0"]


@pytest.mark.parametrize("factor", [1.0, torch.ones(1)], ids=["without tensors", "with tensors"])
def test_compile_a_block_with_attributes_of_any_kind(factor):
    model, graphs = two(Adjustable), []
    model[1].factor, model[1].factors = factor, [factor]
    fast, x = rf.fuse(model), images(channels=16)

    def keep(graph, inputs):
        graphs.append(graph.code)
        return graph

    with torch.no_grad():
        compiled = torch.compile(fast, fullgraph=True, backend=keep)
        torch.testing.assert_close(compiled(x), model(x))
        assert "".join(graphs).count("resnet_fused.basic_block") == 1 + isinstance(factor, float)
        for name in ("in a list", "none", "function"):
            for m in (model, fast):
                ADJUSTMENTS[name](m[1])
            graphs.clear()
            torch.testing.assert_close(compiled(x), model(x))
            assert "".join(graphs).count("resnet_fused.basic_block") == 1
    torch._dynamo.reset()  # or other tests would reach the limit of recompilations


@pytest.mark.parametrize("keep", [lambda m, x: m.kept.append(x), lambda m, x: m.named.update(x=x)])
def test_a_block_that_keeps_what_passes_is_no_block(keep):
    class Keeping(plain.BasicBlock):
        def __init__(self, *args):
            super().__init__(*args)
            self.kept, self.named = [], {}

        def forward(self, x):
            keep(self, x)
            return super().forward(x)

    model = two(Keeping)
    fast, x = rf.fuse(model), images(channels=16)
    assert not fast[1].kept and not fast[1].named
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast(x), model(x))
    assert len(fast[1].kept) == len(model[1].kept) and fast[1].named.keys() == model[1].named.keys()
    assert ops_run(fast, x) == ["0", "1.conv1..bn1", "1.conv2..bn2"]


class Tapped(nn.Module):
    """Does something with what passes between its layers, if asked to, and keeps account of it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = plain.conv3x3(16, 16), nn.BatchNorm2d(16)
        self.norm.running_var.fill_(3.0)
        self.between = self.owner_of_it = None
        self.calls, self.seen, self.wanted = 0, [], [False]

    def forward(self, x):
        self.calls += 1
        self.seen.append(self.calls)
        x = self.conv(x)
        if self.between is not None:
            x = self.between(x)
        if self.wanted[0]:
            x = x * 2
        return self.norm(x)


@pytest.mark.parametrize(
    "change", [lambda m: setattr(m, "between", torch.sin), lambda m: m.wanted.__setitem__(0, True)]
)
def test_attributes_that_a_forward_reads_and_changes(change):
    model = Tapped().eval()
    fast, x = rf.fuse(model), images(channels=16)
    assert fast.seen == [] and fast.calls == 0
    with torch.no_grad():
        for m in (model, fast):
            m.owner_of_it = m.new = "what no forward reads"
        for _ in range(2):
            torch.testing.assert_close(fast(x), model(x))
        assert fast.seen == model.seen == [1, 2]
        assert ops_run(fast, x) == ["conv..norm"]
        for m in (model, fast):
            change(m)
        torch.testing.assert_close(fast(x), model(x))
    assert ops_run(fast, x) == []


def test_flag_of_the_model_changed_after_fusing():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.normalised = plain.conv3x3(16, 16), nn.BatchNorm2d(16), True
            self.norm.running_var.fill_(3.0)

        def forward(self, x):
            x = self.conv(x)
            return self.norm(x) if self.normalised else x

    model = Net().eval()
    fast, x = rf.fuse(model), images(channels=16)
    assert rf.explain(fast, x).rows[0].kernel == "conv_bn_act"
    model.normalised = fast.normalised = False
    torch.testing.assert_close(fast(x), model(x))


def test_transforms_of_torch_func_and_forward_mode():
    model = two(plain.BasicBlock)
    fast, x = rf.fuse(model), images(channels=16)
    for transformed in (
        lambda m: torch.func.jvp(m, (x,), (x,)),
        lambda m: torch.func.grad(lambda t: m(t).square().sum())(x),
        lambda m: torch.vmap(m)(x[:, None]),
    ):
        torch.testing.assert_close(transformed(fast), transformed(model))
    with torch.autograd.forward_ad.dual_level():
        tangents = [
            torch.autograd.forward_ad.unpack_dual(m(torch.autograd.forward_ad.make_dual(x, x))).tangent
            for m in (fast, model)
        ]
    torch.testing.assert_close(*tangents)


class _ChangesItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        x += y
        return torch.relu(x)


def test_block_that_changes_its_input_in_place() -> None:
    """Whoever reads the input afterwards would not find the change if the block were one op."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            self.block = _ChangesItsInput()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            side = torch.relu(self.norm(self.stem(x)))
            return self.block(side) - side

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 3, 9, 9)
    fast = rf.fuse(model)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


def test_fusing_leaves_precision_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are compared in full float32, whatever a GPU may use otherwise."""
    seen = []
    run = probe.run_original

    def spy(*args: object, **kwargs: object) -> torch.Tensor:
        seen.append(torch.backends.cudnn.conv.fp32_precision)
        return run(*args, **kwargs)

    monkeypatch.setattr(probe, "run_original", spy)
    before = torch.backends.cudnn.conv.fp32_precision
    rf.fuse(rf.models.resnet20_cifar().eval())
    assert set(seen) == {"ieee"}
    assert torch.backends.cudnn.conv.fp32_precision == before
