"""Blocks that run step by step: layers with the addition after them as one op, all else as the forward has it."""

import contextlib
import copy
import pickle

import pytest
import torch
from nets import assert_parity
from torch import Tensor, nn
from torch.nn import functional

import resnet_fused as rf
from resnet_fused.fuse import fusions
from resnet_fused.graph import GraphFusion
from resnet_fused.models.identity_mappings import PLACEMENTS
from resnet_fused.nn import plain


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(functional.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Early(nn.Module):
    """A gate between two layers, the second of which is added: as in RegNet."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        same = stride == 1 and channels == out
        self.proj = None if same else nn.Sequential(plain.conv1x1(channels, out, stride), nn.BatchNorm2d(out))
        self.f = nn.Sequential(
            nn.Sequential(plain.conv3x3(channels, out, stride, groups=2), nn.BatchNorm2d(out), nn.ReLU(inplace=True)),
            Gate(out),
            nn.Sequential(plain.conv1x1(out, out), nn.BatchNorm2d(out)),
        )
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.f(x) + (x if self.proj is None else self.proj(x)))


class Gated(nn.Module):
    """A gate just before the addition: only the shortcut's layer can take the addition."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = plain.conv3x3(channels, out, 2), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = plain.conv3x3(out, out), nn.BatchNorm2d(out)
        self.gate, self.relu = Gate(out), nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.AvgPool2d(2), plain.conv1x1(channels, out), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.gate(self.bn2(self.conv2(y)))
        y += self.downsample(x)
        return self.relu(y)


class Split(nn.Module):
    """Channels in groups, each added to the next before its convolution: as in Res2Net."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1, self.bn1 = plain.conv1x1(channels, channels), nn.BatchNorm2d(channels)
        self.convs = nn.ModuleList(plain.conv3x3(half, half) for _ in range(2))
        self.bns = nn.ModuleList(nn.BatchNorm2d(half) for _ in range(2))
        self.conv3, self.bn3, self.drop = plain.conv1x1(channels, channels), nn.BatchNorm2d(channels), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.chunk(functional.relu(self.bn1(self.conv1(x))), 2, 1)
        first = self.bns[0](self.convs[0](parts[0])).relu_()
        second = self.bns[1](self.convs[1](first + parts[1])).relu_()
        y = self.drop(self.bn3(self.conv3(torch.cat([first, second], dim=1))))
        return functional.relu(torch.add(x, y))


class Bare(nn.Module):
    """A convolution without BatchNorm is added, a BatchNorm and ReLU follow; what is learnt scales the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = plain.conv3x3(channels, channels), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.gamma = nn.Parameter(torch.zeros(channels, 1, 1))
        self.act = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y).add(x * self.gamma)))


class Interpolated(nn.Module):
    """The sizes of the image are arguments."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = plain.conv3x3(channels, channels, 2), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = plain.conv3x3(channels, channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        low = functional.relu(self.bn1(self.conv1(x)))
        high = functional.interpolate(low, size=x.shape[2:], mode="nearest")
        return x[:, : low.size(1)] + self.bn2(self.conv2(high))


class ReluBefore(nn.Module):
    """The path ends in a BatchNorm with a ReLU of its own, so that only the projection can take the addition."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(plain.conv1x1(channels, channels), nn.BatchNorm2d(channels))
        self.conv, self.bn = plain.conv3x3(channels, channels), BatchNormReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x) + self.bn(self.conv(x))


class BatchNormReLU(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(super().forward(x))


CASES = {
    "gate early": (lambda: Early(8, 8), 2),
    "gate early, projection": (lambda: Early(8, 12, 2), 3),
    "gate late": (lambda: Gated(8, 12), 3),
    "split": (lambda: Split(8), 4),
    "bare": (lambda: Bare(8), 2),
    "interpolated": (lambda: Interpolated(8), 2),
    "relu before": (lambda: ReluBefore(8), 2),
}


def randomized(module: nn.Module) -> nn.Module:
    return rf.models.randomize_batchnorms(module).eval()


def residuals(fast: nn.Module) -> list[int]:
    """How many layers of each block take an addition with them."""
    found = [fusion for fusion in fusions(fast).values() if isinstance(fusion, GraphFusion)]
    return [sum(s.kind == "layer" and s.args[1] is not None for s in fusion.program) for fusion in found]


@pytest.mark.parametrize("name", CASES)
def test_additions_are_part_of_a_layer(name):
    make, layers = CASES[name]
    for dtype in (torch.float32, torch.bfloat16):
        model = randomized(make()).to(dtype)
        fast, x = rf.fuse(model), torch.randn(2, 8, 12, 10).to(dtype)
        assert residuals(fast) == [1]
        rows = [row for row in rf.explain(fast, x).rows if row.kernel != "unfused"]
        assert len(rows) == layers, rows
        assert_parity(model, fast, x)
        assert_parity(model, fast, x.contiguous(memory_format=torch.channels_last))
        fast.load_state_dict(model.state_dict(), strict=True)
    assert_parity(model, fast, torch.randn(1, 8, 20, 16).bfloat16())  # other sizes than it was fused and run with


def test_the_layer_takes_addition_and_relu_with_it():
    model = randomized(Early(8, 8))
    fast, x = rf.fuse(model), torch.randn(2, 8, 6, 6)
    called = []
    for net in (model, fast):
        with torch.no_grad():
            net(x)  # folds
            with torch.profiler.profile() as profile:
                net(x)
        called.append({event.key for event in profile.key_averages()})
    assert {"aten::add", "aten::batch_norm"} <= called[0]
    assert not {"aten::add", "aten::batch_norm"} & called[1]


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_of_the_paper(placement, bottleneck):
    depth, kwargs = 11 if bottleneck else 8, {"placement": placement, "bottleneck": bottleneck, "shortcut": "A"}
    model = randomized(rf.models.identity_mappings_cifar(depth, **kwargs))
    fast, x = rf.fuse(model), torch.randn(1, 3, 16, 16)
    assert rf.explain(fast, x).coverage == 1.0
    assert_parity(model, fast, x)


# --- what must not be taken -------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Looks as if the addition belonged to the layer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = plain.conv3x3(8, 8), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = plain.conv3x3(8, 8), nn.BatchNorm2d(8)
        self.kind = kind
        self.act = nn.SiLU()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(h))
        if self.kind == "alpha":
            return torch.add(x, y, alpha=2).relu()
        if self.kind == "used twice":
            return functional.relu(y + x) * y
        if self.kind == "sum used twice":
            z = y + x
            return functional.relu(z) - z
        if self.kind == "itself":
            return (y + y).relu()
        if self.kind == "number":
            return (y + 1).relu()
        if self.kind == "broadcast":
            return (y + x.mean((2, 3), keepdim=True)).relu()
        if self.kind == "input changed":
            h.mul_(2)
            return y + x
        if self.kind == "shortcut changed":
            y += x
            x += y
            return x * y
        if self.kind == "random":
            return y + x * torch.rand(())
        if self.kind == "branch":
            return y + x if x.sum() > 0 else y - x
        if self.kind == "tuple":
            return (y + x,)
        raise ValueError(self.kind)


KINDS = ["alpha", "used twice", "sum used twice", "itself", "number", "broadcast", "input changed", "shortcut changed"]
KINDS += ["random", "branch", "tuple"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_stays_right(kind):
    model = randomized(nn.Sequential(plain.conv1x1(8, 8), nn.BatchNorm2d(8), Odd(kind)))
    fast, x = rf.fuse(model), torch.randn(2, 8, 6, 7)
    for image in (x, -x, x.contiguous(memory_format=torch.channels_last)):
        outputs = []
        for net in (model, fast):
            torch.manual_seed(3)
            with torch.no_grad():
                outputs.append(net(image.clone()))
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    assert residuals(fast) == ([1] if kind == "sum used twice" else [])


def test_a_block_whose_projection_changes_the_input_in_place():
    class InPlace(Early):
        def forward(self, x):
            shortcut = self.proj(functional.relu_(x))
            return self.act(self.f(x) + shortcut)

    model = randomized(InPlace(8, 12, 2))
    fast, x = rf.fuse(model), torch.randn(2, 8, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(fast(x.clone()), model(x.clone()), rtol=1e-4, atol=1e-5)


def test_a_module_in_train_mode_keeps_its_statistics():
    block = randomized(Gated(8, 12))
    block.gate = nn.Sequential(Gate(12), nn.BatchNorm2d(12), nn.Sigmoid()).eval()
    block.gate[1].train()
    before = copy.deepcopy(block.state_dict())
    fast = rf.fuse(block, inplace=True)
    assert residuals(fast) == [] and fusions(fast)
    assert all(torch.equal(t, before[name]) for name, t in fast.state_dict().items())


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.fixture
def gated():
    model = randomized(nn.Sequential(Gated(8, 12), Early(12, 12)))
    return model, rf.fuse(model), torch.randn(2, 8, 12, 12)


def equal(one: nn.Module, other: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(one(x), other(x))


def test_copies_and_pickle(gated):
    model, fast, x = gated
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert residuals(twin) == [1, 1]
        assert equal(twin, fast, x)
        with torch.no_grad():
            for p in twin.parameters():
                p.mul_(1.5)
        assert not equal(twin, fast, x)
        assert_parity(rf.unfuse(twin), twin, x)
    assert equal(rf.unfuse(fast), model, x)
    assert equal(rf.fuse(fast), fast, x) and residuals(rf.fuse(fast)) == [1, 1]


@pytest.mark.parametrize("path", ["0.bn2", "0.downsample", "0.downsample.1", "0.relu", "1.f", "1.f.2", "1.f.2.0"])
def test_hook_on_what_is_left_out(gated, path):
    model, fast, x = gated
    seen = []
    fast.get_submodule(path).register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert seen
    unfused = path in ("0.bn2", "0.downsample.1", "1.f.2.0")  # what is between a convolution and its op's end
    with pytest.warns(UserWarning, match=f"a hook on {path}") if unfused else contextlib.nullcontext():
        again = rf.fuse(fast)
    why = [row.why for row in rf.explain(again, x).rows if row.kernel == "unfused" and "gate" not in row.block]
    assert [reason for reason in why if "hook" in reason] == [f"a hook on {path}"] * unfused
    assert residuals(again) == ([1, 1] if path in ("0.bn2", "0.relu") else [1])  # those are no part of the addition
    seen.clear()
    assert_parity(model, again, x)
    assert seen


def test_hook_on_what_still_runs(gated):
    _, fast, x = gated
    seen = []
    fast[0].gate.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        fast(x)
    assert len(seen) == 1
    assert all(fusion.why_unfused(x) is None for fusion in fusions(fast).values())


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m[0], "gate", nn.Identity()),
        lambda m: setattr(m[0], "relu", nn.SiLU()),
        lambda m: setattr(m[1], "proj", nn.Conv2d(12, 12, 1).eval()),
        lambda m: m[1].f.append(nn.Sigmoid()),
        lambda m: m.eval() and m[0].bn2.train(),
    ],
)
def test_replaced_modules_and_train_mode(gated, change):
    model, fast, x = gated
    torch.manual_seed(1)
    change(fast)
    torch.manual_seed(1)
    change(model)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_train_and_gradients(gated):
    model, fast, x = gated
    model, fast, x = model.double(), fast.double(), x.double()
    for net in (model, fast):
        net(x).square().sum().backward()
    for p, q in zip(model.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)
    for net in (model, fast):
        net.train()(x)
        net.eval()
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))


def test_compile_and_export(gated):
    _, fast, x = gated
    torch.compiler.reset()
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        expected = fast(x)
        compiled = torch.compile(fast, fullgraph=True, dynamic=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        larger = torch.randn(3, 8, 16, 20)
        torch.testing.assert_close(compiled(larger), fast(larger))
        program = torch.export.export(fast, (x,), dynamic_shapes=({0: batch},))
        more = torch.randn(5, 8, 12, 12)
        torch.testing.assert_close(program.module()(more), fast(more))
    assert sum("resnet_fused.conv_bn_act" in str(node.target) for node in program.graph.nodes) == 5
