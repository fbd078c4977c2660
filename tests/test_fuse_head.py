"""The end of a classifier in `fuse`: where it is found, when it runs, and that no call misses what has changed."""

from __future__ import annotations

import copy
import functools
import linecache
import pickle

import pytest
import torch
from nets import TinyResNet, assert_parity, images, ops_run, tiny
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import resnet_fused as rf
from resnet_fused.errors import InputError
from resnet_fused.fusion import unfused
from resnet_fused.kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason="there are no native kernels")


class Net(nn.Module):
    """A layer, and what a head is made of."""

    def __init__(self, **modules):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(24, 10)
        for name, module in modules.items():
            self.add_module(name, module)


def net(end="m.fc(torch.flatten(m.avgpool(x), 1))", **modules):
    return rf.models.randomize_batchnorms(written(f"return {end}")(**modules)).eval()


@functools.cache
def written(*lines):
    """A `Net` whose forward ends in these lines; inspect finds its source."""
    source = "".join(["def forward(m, x):\n    x = m.features(x)\n", *(f"    {line}\n" for line in lines)])
    name, names = f"<forward {len(linecache.cache)}>", {"torch": torch, "functional": functional}
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    exec(compile(source, name, "exec"), names)
    return type("Written", (Net,), {"forward": names["forward"]})


def head_runs(model, x=None):
    return any(row.kernel == "head" for row in rf.explain(model, images() if x is None else x).rows)


@pytest.fixture
def fast():
    return rf.fuse(net())


# --- where it is found ----------------------------------------------------------------------------------------------

FOUND = {
    "method": lambda: net("m.fc(m.avgpool(x).flatten(1))"),
    "keywords": lambda: net("m.fc(torch.flatten(m.avgpool(x), start_dim=1, end_dim=-1))"),
    "module": lambda: net("m.fc(m.flat(m.avgpool(x)))", flat=nn.Flatten()),
    "no bias": lambda: net(fc=nn.Linear(24, 10, bias=False)),
    "dropout": lambda: net("m.fc(m.drop(m.avgpool(x).flatten(1)))", drop=nn.Dropout(0.5)),
    "dropout in a classifier": lambda: net(
        "m.tail(m.avgpool(x).flatten(1))", tail=nn.Sequential(nn.Dropout(0.5), nn.Linear(24, 10))
    ),
    "more layers": lambda: net(
        "m.tail(m.avgpool(x).flatten(1))",
        tail=nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)),
    ),
    "in a child": lambda: net(
        "m.tail(x)", tail=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))
    ),
    "in a sequential": lambda: rf.models.randomize_batchnorms(
        nn.Sequential(
            *net().features.eval(), nn.Conv2d(24, 24, 3), nn.BatchNorm2d(24), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(24, 10),
        )
    ).eval(),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", FOUND.values(), ids=FOUND)
def test_found(make, dtype):
    model, x = make().to(dtype), images(dtype=dtype)
    fast = rf.fuse(model)
    (row,) = (row for row in rf.explain(fast, x).rows if row.kernel == "head")
    assert row.flops == 2 * 2 * 24 * (10 if make is not FOUND["more layers"] else 16)
    assert_parity(model, fast, x)
    assert fast.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        expected = model(x)
        for _ in range(3):
            y = fast(x)
            torch.testing.assert_close(y, expected, rtol=3e-2, atol=1e-5 if dtype == torch.float32 else 3e-2)
            assert y.stride() == expected.stride()


class Always(nn.Dropout):
    def forward(self, x):
        return x * 2


def forward(*lines):
    return rf.models.randomize_batchnorms(written(*lines)()).eval()


class Gated(nn.Linear):
    def forward(self, x):
        return super().forward(x).sigmoid()


LEFT = {
    "another pooling": lambda: net("m.big(m.two(x).flatten(1))", two=nn.AdaptiveAvgPool2d(2), big=nn.Linear(96, 3)),
    "a function in between": lambda: net("m.fc(m.avgpool(x).flatten(1).relu())"),
    "a module in between": lambda: net("m.fc(m.act(m.avgpool(x).flatten(1)))", act=nn.ReLU()),
    "features come out": lambda: forward("x = m.avgpool(x).flatten(1)", "return m.fc(x), x"),
    "used twice": lambda: net("m.fc(m.avgpool(x).flatten(1)) + m.fc(x.mean((2, 3)))"),
    "pooled twice": lambda: net("m.fc(m.avgpool(x).flatten(1)) + m.avgpool(x).mean()"),
    "flattened otherwise": lambda: net("m.fc(m.avgpool(x).flatten(1, 2).flatten(1))"),
    "a linear layer that does more": lambda: net(fc=Gated(24, 10)),
    "a parametrized weight": lambda: net(fc=parametrizations.weight_norm(nn.Linear(24, 10))),
    "a functional pooling": lambda: net("m.fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))"),
    "another dropout": lambda: net("m.fc(m.drop(m.avgpool(x).flatten(1)))", drop=Always(0.5)),
    "without gradients": lambda: forward("with torch.no_grad():", "    x = m.avgpool(x).flatten(1)", "return m.fc(x)"),
    "its own autocast": lambda: forward(
        "with torch.autocast('cpu', enabled=False):", "    return m.fc(m.avgpool(x).flatten(1))"
    ),
    "a branch": lambda: forward("x = m.avgpool(x)", "if m.training:", "    x = x * 2", "return m.fc(x.flatten(1))"),
    "something kept": lambda: forward("x = m.features_seen = m.avgpool(x)", "return m.fc(x.flatten(1))"),
    "shared": lambda: net(again=(fc := nn.Linear(24, 10)), fc=fc),
}


@pytest.mark.parametrize("make", LEFT.values(), ids=LEFT)
def test_left_alone(make):
    model, x = make(), images()
    fast = rf.fuse(model)
    assert not head_runs(fast, x)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_model_with_nothing_else_to_fuse_is_refused():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)).eval()
    with pytest.raises(InputError, match="model must have a convolution followed by a BatchNorm"):
        rf.fuse(model)


# --- when it runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["avgpool", "flat", "drop", "fc"])
def test_a_hook_sees_what_passes(name):
    model = net("m.fc(m.drop(m.flat(m.avgpool(x))))", flat=nn.Flatten(), drop=nn.Dropout())
    fast, x, seen = rf.fuse(model), images(), []
    with torch.no_grad():
        expected = fast(x)
        handle = getattr(fast, name).register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        torch.testing.assert_close(fast(x), expected)
        ((taken, given),) = seen
        getattr(model, name).register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        model(x)
        torch.testing.assert_close((taken, given), seen[1])
        assert not head_runs(fast)
        handle.remove()
        assert torch.equal(fast(x), expected) and head_runs(fast)


def test_children_outside_of_the_model_give_their_own_output(fast):
    x = torch.randn(2, 24, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(fast.avgpool(x), x.mean((2, 3), keepdim=True))
        torch.testing.assert_close(fast.fc(x[:, :, 0, 0]), functional.linear(x[:, :, 0, 0], *fast.fc.parameters()))


def test_gradients_of_a_head_alone():
    fast = rf.fuse(forward("with torch.no_grad():", "    x = m.avgpool(x).flatten(1)", "return m.fc(x)"))
    fast(images()).sum().backward()
    assert fast.fc.weight.grad is not None


def test_autocast_around_a_head():
    model = forward("with torch.autocast('cpu', enabled=False):", "    return m.fc(m.avgpool(x.float()).flatten(1))")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert rf.fuse(model)(images()).shape == model(images()).shape


PATCHES = {
    "the model's forward": lambda m: setattr(m, "forward", lambda x: m.avgpool(m.features(x))),
    "the pooling's forward": lambda m: setattr(m.avgpool, "forward", lambda x: x.amax((2, 3), keepdim=True)),
    "the linear layer's forward": lambda m: setattr(m.fc, "forward", lambda x: x[:, :3]),
    "no bias": lambda m: setattr(m.fc, "bias", None),
    "a parametrization": lambda m: parametrizations.weight_norm(m.fc),
    "a BatchNorm's forward": lambda m: setattr(m.features[1], "forward", torch.neg),
}


@pytest.mark.parametrize("patch", PATCHES.values(), ids=PATCHES)
@pytest.mark.parametrize("called", [False, True])
def test_what_is_patched_after_fusing(patch, called):
    model, x = net(), images()
    fast = rf.fuse(model)
    with torch.no_grad():
        for _ in range(2 * called):
            fast(x)
        for m in (model, fast):
            torch.manual_seed(0)
            patch(m)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_bias_that_was_not_there():
    model = net(fc=nn.Linear(24, 10, bias=False))
    fast, x = rf.fuse(model), images()
    with torch.no_grad():
        fast(x)
        for m in (model, fast):
            m.fc.bias = nn.Parameter(torch.ones(10))
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["avgpool", "fc"])
def test_another_module_in_its_place(fast, name):
    x = images()
    with torch.no_grad():
        fast(x)
        setattr(fast, name, nn.AdaptiveMaxPool2d(1) if name == "avgpool" else nn.Linear(24, 3))
        assert not head_runs(fast)
        torch.testing.assert_close(fast(x), rf.unfuse(fast)(x), rtol=1e-4, atol=1e-5)


def test_another_child_in_a_sequential():
    fast, x = rf.fuse(FOUND["in a sequential"]()), images()
    with torch.no_grad():
        before = fast(x)
        fast.append(nn.Softmax(1))
        torch.testing.assert_close(fast(x), before.softmax(1), rtol=1e-4, atol=1e-5)
        fast.insert(6, nn.ReLU())
        torch.testing.assert_close(fast(x), rf.unfuse(fast)(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fast[:6](x), rf.unfuse(fast)[:6](x), rtol=1e-4, atol=1e-5)


def test_train_unfused_autocast(fast):
    x = images()
    with torch.no_grad():
        expected = fast(x)
        for name in ("avgpool", "fc"):
            getattr(fast, name).train()
            assert not head_runs(fast)
            fast.eval()
        assert head_runs(fast) and torch.equal(fast(x), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert fast(x).dtype == torch.bfloat16 and not head_runs(fast)
        with unfused():
            assert not head_runs(fast)
        assert not head_runs(rf.unfuse(fast))


def test_what_no_kernel_takes_is_torchs(fast):
    for dtype in (torch.float64, torch.float16):
        assert not head_runs(fast.to(dtype), images(dtype=dtype))
    fast = rf.fuse(net().double(), backend="reference")
    assert head_runs(fast, images(dtype=torch.float64))


def test_on_a_gpu_only_a_kernel_that_is_named():
    x = torch.empty(2, 24, 4, 4, device="meta")  # stands for one on a GPU
    why = {b: rf.fuse(net(), backend=b).avgpool._fused_op.why_unfused(x) for b in ("auto", "vendor", "cuda", "triton")}
    assert why.pop("triton") == "called from outside of the model's own forward"
    assert set(why.values()) == {"on a GPU the end of a classifier is torch's"}


# --- gradients, copies, graphs --------------------------------------------------------------------------------------


def test_gradients():
    model, x = net(), images()
    fast = rf.fuse(model)
    for m in (model, fast):
        m(x).sin().sum().backward()
    for ours, theirs in zip(fast.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(copied):
    fast, x = rf.fuse(tiny()), images()
    with torch.no_grad():
        expected = fast(x)
        twin = copied(fast)
        assert torch.equal(twin(x), expected) and ops_run(twin, x) == ops_run(fast, x)
        twin.fc.bias.add_(1)
        torch.testing.assert_close(twin(x), expected + 1)
        assert torch.equal(fast(x), expected)


def test_compile_export_and_feature_extraction():
    model, x = tiny(), images()
    fast = rf.fuse(model)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        fast.fc.weight.mul_(2)
        torch.testing.assert_close(compiled(x), fast(x))
        traced = torch.fx.symbolic_trace(fast)
        torch.testing.assert_close(traced(x), fast(x))
        assert [n.target for n in traced.graph.nodes if n.op == "call_module"][-2:] == ["avgpool", "fc"]


# --- recordings -----------------------------------------------------------------------------------------------------


def set_data(parameter):
    parameter.data = parameter.data * 2


CHANGES = {
    "weight in place": lambda m: m.fc.weight.mul_(2),
    "bias in place": lambda m: m.fc.bias.mul_(2),
    "weight.data": lambda m: set_data(m.fc.weight),
    "bias.data": lambda m: set_data(m.fc.bias),
    "another weight": lambda m: setattr(m.fc, "weight", nn.Parameter(m.fc.weight * 2)),
    "another bias": lambda m: setattr(m.fc, "bias", nn.Parameter(m.fc.bias * 2)),
    "state_dict": lambda m: m.load_state_dict(net().state_dict()),
    "to": lambda m: [m.to(dtype) for dtype in (torch.float64, m.fc.weight.dtype)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_recording_sees_every_change(change, dtype, replays):
    model, x = net().to(dtype), images(dtype=dtype)
    fast = rf.fuse(model)
    with torch.no_grad():
        for _ in range(2):
            before = fast(x)
        assert replays == [2, 2]
        for m in (model, fast):
            torch.manual_seed(5)
            change(m)
        y, expected = fast(x), rf.unfuse(fast)(x)
        assert replays[-1] == 2
        torch.testing.assert_close(y, expected, rtol=3e-2, atol=1e-5 if dtype == torch.float32 else 3e-2)
        torch.testing.assert_close(expected, model(x))
        assert torch.equal(fast(x), y)
    assert change is CHANGES["to"] or not torch.equal(y, before)


def test_one_call_with_what_comes_before_it(replays):
    fast = rf.fuse(FOUND["in a sequential"]())
    with torch.no_grad():
        for n in (2, 1, 2):
            x = images(n)
            expected = rf.unfuse(fast)(x)
            torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
    assert replays == [3, 3, 3]


def test_outputs_do_not_share_memory(fast):
    with torch.no_grad():
        first, second = images(), images()
        y = fast(first)
        kept = y.clone()
        fast(second)
        assert torch.equal(y, kept)


def test_other_threads_and_batches(fast):
    model = rf.unfuse(fast)
    with torch.no_grad():
        for n in (1, 3, 0, 16, 1):
            x = images(n)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "vendor", "reference"])
def test_other_backends(backend):
    model, x = tiny(TinyResNet), images()
    fast = rf.fuse(model, backend=backend)
    assert ops_run(fast, x)[-1] == "avgpool..fc"
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
