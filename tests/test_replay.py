"""Recorded blocks: the same bits as the ops one by one, and no call that misses what has changed since."""

import contextlib
import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import resnet_fused as rf
from resnet_fused import plan, replay
from resnet_fused.fusion import unfused
from resnet_fused.kernels import native
from resnet_fused.nn import plain

pytestmark = pytest.mark.skipif(not native.available(), reason="there are no native kernels")

OPS = torch.ops.resnet_fused
X = torch.randn(2, 16, 10, 9, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)


class OneByOne(TorchDispatchMode):
    """Looks at every op, so that none may be left out."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


class Net(nn.Module):
    """A layer, a stage of bottlenecks and one of basic blocks, wide enough for the plan to take the CPU kernels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.layer1 = nn.Sequential(
            plain.Bottleneck(16, 16, 2, projection(16, 64, 2)), plain.Bottleneck(64, 16), plain.Bottleneck(64, 16)
        )
        self.layer2 = nn.Sequential(plain.BasicBlock(64, 64), plain.BasicBlock(64, 64))

    def forward(self, x):
        return self.layer2(self.layer1(self.stem(x)))


def projection(c, k, stride):
    return nn.Sequential(nn.Conv2d(c, k, 1, stride, bias=False), nn.BatchNorm2d(k))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return rf.models.randomize_batchnorms(Net()).eval()


@pytest.fixture
def fast(net):
    with torch.no_grad():
        fast = rf.fuse(net)
        fast(X)
        fast(X)
    return fast


def one_by_one(model, x):
    with OneByOne() as mode:
        y = model(x)
    assert not any("replay" in name for name in mode.seen)
    return y


def same(model, x=X):
    """That a model gives what its ops give one by one, twice."""
    with torch.no_grad():
        expected = one_by_one(model, x)
        assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("weights", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
def test_the_same_bits_and_format(net, dtype, memory_format, weights):
    fast = rf.fuse(net.to(dtype).to(memory_format=weights))
    x = X.to(dtype).contiguous(memory_format=memory_format)
    same(fast, x)
    assert fast(x).stride() == one_by_one(fast, x).stride()


def test_the_forward_is_one_call(fast, replays):
    with torch.no_grad():
        fast(X)
    assert replays == [6]


class Apart(Net):
    """Computes the same, but what stands between its stages is no module."""

    def forward(self, x):
        return self.layer2(self.layer1(self.stem(x).relu()).relu())


class Features(Net):
    """Gives what its stages pass on, too."""

    def forward(self, x):
        x = self.stem(x)
        y = self.layer1(x)
        return x, y, self.layer2(y)


class Twice(Net):
    """Calls a stage twice."""

    def forward(self, x):
        return self.layer2(self.layer2(self.layer1(self.stem(x))))


class Between(Net):
    """Has modules that do nothing in eval mode between its stages, and one that does."""

    def __init__(self):
        super().__init__()
        self.nothing, self.drop, self.last = nn.Identity(), nn.Dropout(0.5), nn.Softplus()

    def forward(self, x):
        return self.last(self.layer2(self.drop(self.layer1(self.nothing(self.stem(x))))))


class Kept(Net):
    """Keeps what a stage gives."""

    def forward(self, x):
        x = self.seen = self.layer1(self.stem(x))
        return self.layer2(x)


class Branch(Net):
    """May stop early."""

    early = False

    def forward(self, x):
        x = self.layer1(self.stem(x))
        if self.early:
            return x
        return self.layer2(x)


class Frozen(Net):
    """Computes a part of it without gradients."""

    def forward(self, x):
        with torch.no_grad():
            x = self.layer1(self.stem(x))
        return self.layer2(x)


class Helped(Net):
    """Calls its modules in a method of its own."""

    def forward(self, x):
        return self.helper(x)

    def helper(self, x):
        x = self.stem(x)
        return self.layer2(self.layer1(x))


class Scaled(nn.Identity):
    """Is an Identity by its class alone."""

    def forward(self, x):
        return x * 2


class NotNothing(Between):
    """Has a module between its stages that does something."""

    def __init__(self):
        super().__init__()
        self.nothing = Scaled()


@pytest.mark.parametrize(
    ("cls", "lengths"),
    [
        *((cls, [1, 3, 2]) for cls in (Apart, Features, Kept, Branch, Frozen)),
        *((cls, [6]) for cls in (Between, Helped)),
        (Twice, [4, 2, 2]),
        (NotNothing, [1, 5]),
    ],
)
def test_what_is_one_call(cls, lengths, replays):
    torch.manual_seed(0)
    net = rf.models.randomize_batchnorms(cls()).eval()
    fast = rf.fuse(net)
    with torch.no_grad():
        for model in (fast, copy.deepcopy(fast)):
            replays.clear()
            torch.testing.assert_close(model(X), net(X), rtol=1e-4, atol=1e-4)
            assert replays == lengths
        for block in (net.layer1[1], fast.layer1[1]):  # a change in the middle
            scaled(block.conv2.weight)
        torch.testing.assert_close(fast(X), net(X), rtol=1e-4, atol=1e-4)
        if cls is Kept:
            torch.testing.assert_close(fast.seen, net.seen, rtol=1e-4, atol=1e-4)
        if cls is Branch:
            fast.early = net.early = True
            torch.testing.assert_close(fast(X), net(X), rtol=1e-4, atol=1e-4)
        if cls is Between:
            fast.drop.train()
            torch.manual_seed(1)
            assert not torch.allclose(fast(X), net(X), rtol=1e-3, atol=1e-3)


def test_a_part_without_gradients():
    fast = rf.fuse(Frozen().eval())
    fast(X).sum().backward()
    assert fast.layer2[0].conv1.weight.grad is not None and fast.layer1[0].conv1.weight.grad is None


def test_one_recording_each_for_all_and_a_part():
    """The same pieces on the same input, once with a module in between."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.stage = nn.Sequential(plain.BasicBlock(16, 16), plain.BasicBlock(16, 16))
            self.first, self.nothing, self.second = self.stage[0], nn.Identity(), self.stage[1]

        def forward(self, x):
            return self.second(self.nothing(self.first(x)))

    fast = rf.fuse(rf.models.randomize_batchnorms(Inner()).eval())
    with torch.no_grad():
        expected = fast(X)
        fast.stage(X)
        assert torch.equal(fast(X), expected)
        fast.nothing = Scaled()
        assert not torch.allclose(fast(X), expected)


def test_a_stage_compiled_in_place(net, fast):
    with torch.no_grad():
        for stage in (net.layer2, fast.layer2):
            stage.compile(backend="eager")
        torch.testing.assert_close(fast(X), net(X), rtol=1e-4, atol=1e-4)


def test_one_inference_tensor_hides_no_other(net):
    fast = rf.fuse(net)
    with torch.inference_mode():
        for m in (net, fast):
            m.layer1[0].bn1.running_mean = m.layer1[0].bn1.running_mean.clone()
    with torch.no_grad():
        fast(X)
        for m in (net, fast):
            scaled(m.layer2[0].conv1.weight)
        torch.testing.assert_close(fast(X), net(X), rtol=1e-4, atol=1e-4)


def test_what_an_interrupted_call_leaves_is_not_taken(net, fast):
    """No hook sees a KeyboardInterrupt, so that the stages behind it stay covered."""
    with torch.no_grad():
        rf.fusion.cover(fast, [fast.layer1], X)
        try:
            x = net.stem(X)
            torch.testing.assert_close(fast.layer1(x), net.layer1(x), rtol=1e-4, atol=1e-4)
        finally:
            rf.fusion._state.covered.clear()


def test_a_hook_may_call_a_part(net, fast):
    seen = []
    for m in (net, fast):
        m.register_forward_pre_hook(lambda m, args: seen.append(m.stem(args[0])))
    with torch.no_grad():
        torch.testing.assert_close(fast(X), net(X), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-4)


def test_a_part_alone_does_not_hold_the_whole(fast):
    fast = copy.deepcopy(fast)
    with torch.no_grad():
        fast(X)
    stage, whole = fast.layer2, weakref.ref(fast)
    assert len(pickle.dumps(stage)) < 1.5 * len(pickle.dumps(rf.unfuse(stage)))
    del fast
    gc.collect()
    assert whole() is None


def test_a_stage_given_back_its_modules_is_called(net, fast, replays):
    rf.unfuse(fast.layer1, inplace=True)
    with torch.no_grad():
        torch.testing.assert_close(fast(X), net(X), rtol=1e-4, atol=1e-4)
        rf.fuse(fast.layer1, inplace=True)
        torch.testing.assert_close(fast(X), net(X), rtol=1e-4, atol=1e-4)
        rf.fuse(fast, inplace=True)
        replays.clear()
        torch.testing.assert_close(fast(X), net(X), rtol=1e-4, atol=1e-4)
    assert replays == [6]


def test_an_error_in_the_forward_leaves_nothing_behind(net):
    class Raises(Net):
        bad = False

        def forward(self, x):
            x = self.stem(x)
            if self.bad:
                raise ValueError("bad")
            return self.layer2(self.layer1(x))

    torch.manual_seed(0)
    fast = rf.fuse(rf.models.randomize_batchnorms(Raises()).eval())
    with torch.no_grad():
        fast(X)
        fast.bad = True
        with pytest.raises(ValueError, match="bad"):
            fast(X)
        x = net.stem(X)
        torch.testing.assert_close(fast.layer1(x), net.layer1(x), rtol=1e-4, atol=1e-4)
        fast.bad = False
        torch.testing.assert_close(fast(X), net(X), rtol=1e-4, atol=1e-4)


@pytest.fixture
def mixed():
    """Layers and blocks, all children of one nn.Sequential."""
    torch.manual_seed(0)
    layer = [nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    last = [nn.Conv2d(64, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(2)]
    blocks = [plain.Bottleneck(32, 16, 2, projection(32, 64, 2)), plain.BasicBlock(64, 64)]
    fast = rf.fuse(rf.models.randomize_batchnorms(nn.Sequential(*layer, *blocks, *last)).eval())
    with torch.no_grad():
        fast(X)
    return fast


def test_layers_and_blocks_of_a_sequential_are_one_call(mixed, replays):
    same(mixed)
    assert replays == [4, 4]


@pytest.mark.parametrize("child", [0, 2, 3, 4, 7])
def test_a_hook_inside_a_sequential_sees_what_passes(mixed, child, replays):
    with torch.no_grad():
        expected, seen = mixed(X), []
        handle = mixed[child].register_forward_hook(lambda module, args, output: seen.append(output))
        torch.testing.assert_close(mixed(X), expected, rtol=1e-4, atol=1e-5)
        assert len(seen) == 1
        handle.remove()
        replays.clear()
        assert torch.equal(mixed(X), expected)
    assert replays == [4]


def test_another_child_of_a_sequential_is_called(mixed):
    with torch.no_grad():
        expected = mixed(X)
        mixed[3] = nn.Conv2d(32, 64, 1, 2)
        mixed[4].forward = torch.zeros_like
        y = mixed(X)
    assert y.shape == expected.shape and not torch.equal(y, expected)
    assert torch.equal(y, mixed[5:](torch.zeros(len(X), 64, *[(size + 1) // 2 for size in X.shape[2:]])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bottlenecks", [True, False], ids=["bc", "plain"])
def test_dense_blocks(replays, bottlenecks, dtype):
    torch.manual_seed(0)
    model = rf.models.DenseNet(8, (3, 2), 16, 4 if bottlenecks else None, small_images=True)
    fast = rf.fuse(rf.models.randomize_batchnorms(model).eval().to(dtype), backend="cpu")
    first, second = (torch.randn(2, 3, 12, 9, dtype=dtype) for _ in range(2))
    with torch.no_grad():
        for x in (first, second):  # the second time in other memory
            expected = one_by_one(fast, x)
            replays.clear()
            assert torch.equal(fast(x), expected)
            assert replays == [3]  # block, transition, block
        outputs = [fast(x) for x in (first, second, first)]
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 5, 13])
def test_blocks_share_one_parallel_region(n, threads):
    """Bands and images of one block start when what they read of the block before is there, whoever computes it."""
    torch.manual_seed(0)
    blocks = [
        plain.BasicBlock(16, 32, 2, projection(16, 32, 2)),
        *(plain.BasicBlock(32, 32) for _ in range(4)),
        plain.BasicBlock(32, 96, 2, projection(32, 96, 2)),  # more images at once, as they are smaller
        *(plain.BasicBlock(96, 96) for _ in range(2)),
    ]
    fast = rf.fuse(rf.models.randomize_batchnorms(nn.Sequential(*blocks)).eval(), backend="cpu")
    x = torch.randn(n, 16, 33, 20).to(memory_format=torch.channels_last)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with torch.no_grad():
            h = x
            for block in fast:  # one call each
                h = block(h)
            torch.set_num_threads(threads)
            for _ in range(20):
                assert torch.allclose(fast(x), h, rtol=1e-5, atol=1e-5)
            same(fast, x)
    finally:
        torch.set_num_threads(before)


def test_a_block_alone_gives_its_own_output(fast, replays):
    with torch.no_grad():
        h = fast.layer1[0](fast.stem(X))
        expected = one_by_one(fast.layer1[0], one_by_one(fast.stem, X))
    assert torch.equal(h, expected)
    assert replays == [1, 1]


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (6, 1), (5, 4)])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_every_size_has_its_own(fast, n, size):
    for x in (torch.randn(n, 16, *size), X):
        same(fast, x)


@pytest.mark.parametrize("drop_in", [False, True], ids=["fuse", "nn"])
def test_slices_of_channels(net, drop_in):
    fast = rf.nn.BasicBlock(16, 16).eval() if drop_in else rf.fuse(net)
    same(fast)
    if drop_in:  # takes what it is given, where `fuse` converts it
        assert fast._fused_op.recordings
    wide = torch.randn(2, 40, 10, 9).to(memory_format=torch.channels_last)
    same(fast, wide[:, 8:24])
    same(fast, wide[:, :16])


def scaled(t):
    with torch.no_grad():
        t.mul_(1.5)


def replaced(module, name):
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(old.detach() * 2, requires_grad=False))


def written_through_data(model):
    """A change that torch does not count; `eval` is what the documentation asks for then."""
    model.layer1[2].conv2.weight.data.mul_(2)
    model.eval()


CHANGES = {
    "through data, then eval": written_through_data,
    "weight in place": lambda m: scaled(m.layer1[1].conv2.weight),
    "weight of the last block": lambda m: scaled(m.layer2[1].conv2.weight),
    "BatchNorm in place": lambda m: scaled(m.layer1[2].bn3.running_var),
    "projection's shift": lambda m: scaled(m.layer1[0].downsample[1].bias),
    "weight's data": lambda m: setattr(m.layer1[1].conv1.weight, "data", m.layer1[1].conv1.weight * 2),
    "shift's data": lambda m: setattr(m.layer2[0].bn1.bias, "data", m.layer2[0].bn1.bias + 1),
    "another view of the same memory": lambda m: setattr(
        m.layer2[0].conv1.weight, "data", m.layer2[0].conv1.weight.data.transpose(2, 3)
    ),
    "another parameter": lambda m: replaced(m.layer1[0].conv3, "weight"),
    "another buffer": lambda m: m.layer1[0].bn1._buffers.update(running_mean=torch.ones(16)),
    "eps": lambda m: setattr(m.layer1[2].bn1, "eps", 0.5),
    "state dict": lambda m: m.load_state_dict(
        {k: v * 1.25 if v.is_floating_point() else v for k, v in m.state_dict().items()}
    ),
    "BatchNorm replaced": lambda m: setattr(m.layer1[1], "bn2", nn.Identity()),
    "block replaced": lambda m: m.layer1.__setitem__(1, nn.Identity()),
    "block added": lambda m: m.layer1.append(nn.Softplus()),
    "block taken away": lambda m: m.layer1.__delitem__(2),
    "stage replaced": lambda m: setattr(m, "layer2", nn.Identity()),
    "stem replaced": lambda m: setattr(m, "stem", nn.Identity()),
    "stage's forward": lambda m: setattr(m.layer2, "forward", torch.neg),
    "block's forward": lambda m: setattr(m.layer1[1], "forward", torch.neg),
    "train mode of a BatchNorm": lambda m: m.layer1[1].bn1.train(),
    "dtype": lambda m: m.double(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_changes_are_seen(net, change, mode):
    fast = rf.fuse(net)
    with mode():
        fast(X)
        before = fast(X)
        expected = copy.deepcopy(net)
        change(fast)
        change(expected)
        x = X.to(next(fast.parameters()).dtype)
        # A BatchNorm in train mode changes its own buffers: each model is called once.
        y, expected = fast(x), expected(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
        assert y.dtype != before.dtype or y.shape != before.shape or not torch.allclose(y, before, rtol=1e-3, atol=1e-3)


def test_another_parameter_in_the_same_memory_is_seen(fast):
    conv = fast.layer1[1].conv2
    scaled(conv.weight)
    with torch.no_grad():
        before = fast(X)
        written = conv.weight._version
        conv.weight = nn.Parameter(conv.weight.data, requires_grad=False)
        for _ in range(written):  # until both counts are the same
            scaled(conv.weight)
        assert not torch.equal(fast(X), before)
    same(fast)


@pytest.mark.parametrize(
    "where", ["layer1", "layer1.1", "layer1.1.bn2", "layer1.0.downsample", "layer2.1.relu", "stem.0"]
)
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_see_what_passes(net, fast, where, kind, replays):
    seen = {}

    def hook(model):
        def look(module, *values):
            seen.setdefault(model, []).append(torch.utils._pytree.tree_leaves(values[-1])[0].clone())

        return getattr(model.get_submodule(where), kind)(look)

    handles = [hook(fast), hook(net)]
    with torch.no_grad():
        torch.testing.assert_close(fast(X), net(X), rtol=1e-4, atol=1e-4)
        assert len(seen[fast]) == len(seen[net]) > 0
        for mine, theirs in zip(seen[fast], seen[net], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
        for handle in handles:
            handle.remove()
        replays.clear()
        fast(X)
    assert replays == [6]


@pytest.mark.parametrize(
    "context",
    [
        rf.fusion.unfused,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: rf.backend("reference"),
        lambda: rf.backend("vendor"),
        torch.profiler.profile,
        OneByOne,
        lambda: FlopCounterMode(display=False),
        lambda: torch.device("meta"),
    ],
    ids=["unfused", "autocast", "reference", "vendor", "profiler", "dispatch", "flops", "default device"],
)
def test_contexts_that_want_the_ops(fast, context, replays):
    with torch.no_grad(), context():
        y = fast(X)
    assert replays == []
    with torch.no_grad():
        torch.testing.assert_close(y.float(), fast(X), rtol=0.1, atol=0.1)
    assert replays == [6]


def test_the_profiler_names_blocks(fast):
    with torch.no_grad(), torch.profiler.profile() as profile:
        fast(X)
    names = [event.key for event in profile.key_averages()]
    assert {"resnet_fused::bottleneck", "resnet_fused::basic_block"} <= set(names)


def test_gradients(net, fast, replays):
    x = X.clone().requires_grad_()
    mine = torch.autograd.grad(fast(x).square().mean(), [x, fast.layer1[1].conv2.weight])
    theirs = torch.autograd.grad(net(x).square().mean(), [x, net.layer1[1].conv2.weight])
    assert replays == []
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    fast.requires_grad_(False)
    fast(X)  # nothing wants a gradient
    assert replays == [6]
    assert fast(x).requires_grad


def test_functional_transforms_and_tracing(fast, replays):
    fast.requires_grad_(False)
    x = torch.stack([X, X + 1])
    with torch.no_grad():
        expected = torch.stack([fast(x[0]), fast(x[1])])
        del replays[:]
        traced = torch.jit.trace(fast, X, check_trace=False)
        exported = torch.export.export(fast, (X,)).module()
        compiled = torch.compile(fast, fullgraph=True, backend="eager")
        assert torch.equal(compiled(X), expected[0])
        assert replays == []
        for again in (traced, exported):
            torch.testing.assert_close(again(X + 1), expected[1])
    torch.testing.assert_close(torch.func.jvp(fast, (X,), (torch.zeros_like(X),))[0], expected[0])
    assert replays == []


def test_threads_and_instruction_sets_are_planned_anew(fast):
    threads, isa = torch.get_num_threads(), native.isa()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            same(fast)
        for name in native.bindings.isas():
            native.bindings.set_isa(name)
            same(fast)
    finally:
        torch.set_num_threads(threads)
        native.bindings.set_isa(isa)


def test_several_threads_at_once(fast):
    images = [torch.randn(1 + i % 3, 16, 9, 9) for i in range(12)]
    with torch.no_grad():
        expected = [one_by_one(fast, x) for x in images]
    wrong = []

    def work(i):
        with torch.no_grad():
            for _ in range(10):
                for x, y in zip(images[i:], expected[i:], strict=True):
                    if not torch.equal(fast(x), y):
                        wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_copies_record_for_themselves(fast, replays):
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        scaled(twin.layer1[1].conv2.weight)
        same(twin)
    assert set(replays) == {6}
    same(fast)


def test_what_a_replay_runs_is_noted(fast):
    with torch.no_grad():
        with plan.record() as choices:
            fast(X)
        with plan.record() as expected:
            one_by_one(fast, X)
    assert choices == expected
    assert {"conv", "bottleneck", "basic_block"} == {choice.shape.op for choice in choices}


def test_recordings_go_with_the_model(net):
    fast = rf.fuse(net)
    with torch.no_grad():
        fast(X)
    kept = [r for m in fast.modules() for f in getattr(m, "fusions", list)() for r in f.recordings.values()]
    handles = [weakref.ref(r.program) for r in kept]
    assert handles
    del kept, fast, net
    gc.collect()
    # `net` lives on in its fixture; what was fused is gone.
    assert [handle() for handle in handles] == [None] * len(handles)


def test_old_recordings_go_with_the_weights_they_were_made_of(fast):
    with torch.no_grad():
        fast(X[:1])
    kept = [r for m in fast.modules() for f in getattr(m, "fusions", list)() for r in f.recordings.values()]
    handles = [weakref.ref(r.program) for r in kept]
    assert len(handles) == 2  # two shapes
    del kept
    fast.bfloat16()
    gc.collect()
    assert [handle() for handle in handles] == [None] * len(handles)


def test_hooks_on_all_modules_see_every_block(fast, replays):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(module))
    with handle, torch.no_grad():
        fast(X)
    assert replays == []
    assert set(fast.layer1) | set(fast.layer2) <= set(seen)


def test_a_few_shapes_are_kept(fast):
    with torch.no_grad():
        for h in range(3, 5 + replay.RECORDINGS_PER_FUSION):
            fast(torch.randn(1, 16, h, 5))
    assert all(
        len(f.recordings) <= replay.RECORDINGS_PER_FUSION for m in fast.modules() for f in getattr(m, "fusions", list)()
    )


def test_the_shape_not_used_for_longest_makes_room(fast, monkeypatch):
    made, record = [], replay._record
    monkeypatch.setattr(replay, "_record", lambda *args: made.append(args[-1].shape[2]) or record(*args))
    monkeypatch.setattr(replay, "RECORDINGS_PER_FUSION", 3)
    with torch.no_grad():
        for height in (6, 7, 8, 6, 9, 6, 10, 6, 9, 7):
            fast(torch.randn(1, 16, height, 5))
    assert made == [6, 7, 8, 9, 10, 7]


def test_twelve_shapes_in_turn_are_recorded_once(fast, monkeypatch):
    made, record = [], replay._record
    monkeypatch.setattr(replay, "_record", lambda *args: made.append(0) or record(*args))
    with torch.no_grad():
        for height in 3 * [*range(3, 15)]:
            fast(torch.randn(1, 16, height, 5))
    assert len(made) == 12


def test_what_is_no_single_block_is_tried_once(monkeypatch):
    torch.manual_seed(0)
    blocks = [plain.Bottleneck(32, 8), plain.Bottleneck(32, 8, groups=2, base_width=32), plain.Bottleneck(32, 8)]
    fast = rf.fuse(rf.models.randomize_batchnorms(nn.Sequential(*blocks)).eval())
    tried, handle = [], replay._handle
    monkeypatch.setattr(replay, "_handle", lambda *args: tried.append(0) or handle(*args))
    x = torch.randn(1, 32, 6, 6)
    same(fast, x)
    count = len(tried)
    same(fast, x)
    assert len(tried) == count


def test_an_error_while_recording_leaves_nothing_behind(net, monkeypatch):
    fast = rf.fuse(net)

    def fail(self, x):
        raise RuntimeError("no")

    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(rf.fusion.Fusion, "run", fail)
            with pytest.raises(RuntimeError, match="no"):
                fast(X)
        with pytest.raises(RuntimeError, match="_cpu_record"):
            OPS._cpu_recorded(X)
        same(fast)


def test_wrong_arguments_are_refused(fast):
    with torch.no_grad():
        fast.layer2(fast.layer1(fast.stem(X)))  # each as a call of its own
    program = next(iter(fast.layer2[0]._fused_op.recordings.values())).program
    good = torch.randn(2, 64, 5, 5).to(memory_format=torch.channels_last)
    OPS._cpu_replay(good, program)
    for wrong in (torch.zeros(program.numel(), dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8), X):
        with pytest.raises(RuntimeError, match="_cpu_link made"):
            OPS._cpu_replay(good, wrong)
        with pytest.raises(RuntimeError, match="_cpu_recorded made"):
            OPS._cpu_link([wrong])
    for bad in (good[:1], good[:, :16], good[:, :, :4], good.bfloat16(), good.contiguous()):
        with contextlib.suppress(AssertionError), pytest.raises(RuntimeError, match="x: expected"):
            OPS._cpu_replay(bad, program)
    recordings = []
    for block in fast.layer1[1:]:
        x = torch.randn(2, 64, 5, 5).to(memory_format=torch.channels_last)
        OPS._cpu_record(x)
        recordings.append(OPS._cpu_recorded(block._fused_op.run(x)))
    OPS._cpu_link(recordings)
    larger = torch.randn(2, 64, 7, 7).to(memory_format=torch.channels_last)
    OPS._cpu_record(larger)
    recordings.append(OPS._cpu_recorded(fast.layer2[1]._fused_op.run(larger)))
    with pytest.raises(RuntimeError, match="output of the one before"):
        OPS._cpu_link(recordings)


def test_memory_between_stages_is_given_back():
    """One call for all stages does not hold the memory of all at once: 4.3 images of stage 1, not 6.2."""
    model = rf.fuse(rf.models.resnet18().eval().to(memory_format=torch.channels_last))
    x = torch.randn(16, 3, 224, 224).to(memory_format=torch.channels_last)
    with torch.no_grad():
        model(x)
        native.bindings.release_memory()
        before = native.bindings.cached_bytes()
        model(x)
    assert native.bindings.cached_bytes() - before < 5 * 16 * 64 * 56 * 56 * 4


def test_change_while_it_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may change a weight between its packing and the recording: the next call sees it."""
    torch.manual_seed(0)
    model = rf.models.resnet20_cifar().eval()
    fast, x = rf.fuse(model), torch.randn(1, 3, 32, 32)
    handle, changed = replay._handle, []

    def change(fusion, y):
        made = handle(fusion, y)
        if not changed:
            changed.append(fusion)
            with torch.no_grad():
                fusion.convs[0].weight.mul_(1.5)
        return made

    monkeypatch.setattr(replay, "_handle", change)
    with torch.no_grad():
        fast(x)
        assert changed
        with unfused():
            expected = fast(x)
        torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-4)
