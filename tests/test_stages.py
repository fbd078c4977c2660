"""Chains of bottlenecks and the head: the ops on every backend, and where `fuse` lets blocks run as a chain."""

import copy
import importlib.util
import os
import pickle
from dataclasses import replace

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from torch import nn
from torch.nn import functional

import resnet_fused as rf
from resnet_fused import plan
from resnet_fused.errors import BackendError, InputError
from resnet_fused.kernels.triton import tuned
from resnet_fused.nn import plain
from resnet_fused.samples import sample
from resnet_fused.shapes import BottleneckChain, Head
from resnet_fused.stages import FusedStage

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
BACKENDS = ("auto", "vendor", "reference", pytest.param("triton", marks=needs_triton))
CHAIN, HEAD = BottleneckChain(2, 16, 5, 4, 8, 2), Head(3, 24, 4, 5, 10)
SHAPES = [CHAIN, HEAD]


def unfused(call):
    """The op in plain torch, every layer rounded to the dtype."""
    x = call.args[0]
    if isinstance(call.shape, Head):
        _, weight, bias = call.args
        return functional.linear(functional.adaptive_avg_pool2d(x, 1).flatten(1), weight, bias)
    layers = list(zip(*call.args[1:], strict=True))
    for first, second, third in zip(*[iter(layers)] * 3, strict=True):
        h = x
        for (w, scale, shift), padding in ((first, 0), (second, 1), (third, 0)):
            mean, var = torch.zeros_like(shift), torch.ones_like(shift)
            h = functional.batch_norm(functional.conv2d(h, w, padding=padding), mean, var, scale, shift, eps=0)
            h = (h + x if padding == 0 and w is third[0] else h).relu()
        x = h
    return x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.op)
def test_parity(shape, dtype, backend):
    call = sample(shape, dtype, CPU)
    with plan.record() as choices:
        y = call.run(backend)
    exact = unfused(call.to(torch.float64))
    allowed = 2 * (unfused(call) - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    assert y.dtype == dtype
    assert (y - exact).abs().max() <= allowed
    if backend == "triton":  # by its own kernel, not by those of its parts
        assert [choice.composed for choice in choices] == [False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.op)
def test_other_dtypes_take_the_reference(shape, dtype):
    call = sample(shape, torch.float32, CPU).to(dtype)
    if dtype == torch.float16 and shape is CHAIN:
        x, weights, scales, shifts = call.args
        call = replace(call, args=(x, weights, [s.float() for s in scales], [b.float() for b in shifts]))
    with plan.record() as choices:
        torch.testing.assert_close(call.run("auto"), unfused(call.to(torch.float64)).to(dtype), rtol=2e-2, atol=2e-2)
    assert {choice.backend for choice in choices} == {"reference"}


def test_memory_format_follows_the_input():
    x, *rest = sample(CHAIN, torch.float32, CPU).args
    assert rf.ops.bottleneck_chain(x, *rest).is_contiguous(memory_format=torch.channels_last)
    assert rf.ops.bottleneck_chain(x.contiguous(), *rest).is_contiguous()


ONE_BLOCK = replace(CHAIN, n=1, depth=1)


@pytest.mark.parametrize(
    ("shape", "gradients"),
    [(ONE_BLOCK, False), pytest.param(ONE_BLOCK, True, marks=pytest.mark.thorough), (HEAD, False), (HEAD, True)],
    ids=["chain", "chain, gradients", "head", "head, gradients"],
)
def test_opcheck(shape, gradients):
    args = sample(shape, torch.float32, CPU).args
    for t in torch.utils._pytree.tree_leaves(args):
        t.requires_grad_(gradients)
    torch.library.opcheck(getattr(torch.ops.resnet_fused, shape.op).default, args)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.op)
def test_gradients_are_those_of_the_formula(shape):
    call = sample(shape, torch.float32, CPU).to(torch.float64)
    leaves = [t.requires_grad_() for t in torch.utils._pytree.tree_leaves(call.args)]
    expected = torch.autograd.grad(unfused(call).sin().sum(), leaves)
    for ours, theirs in zip(torch.autograd.grad(call.run("auto").sin().sum(), leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.op)
def test_batch_0_and_autocast(shape):
    empty = sample(replace(shape, n=0), torch.float32, CPU).run("auto")
    call = sample(shape, torch.float32, CPU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call.run("auto")
    assert y.dtype == torch.bfloat16
    assert empty.shape == (0, *y.shape[1:])


def test_head_without_bias_or_with_a_float32_one():
    x, weight, bias = sample(HEAD, torch.bfloat16, CPU).args
    torch.testing.assert_close(rf.ops.head(x, weight) + bias, rf.ops.head(x, weight, bias), rtol=2e-2, atol=2e-2)
    assert torch.equal(rf.ops.head(x, weight, bias.float()), rf.ops.head(x, weight, bias))


X, WEIGHTS, SCALES, SHIFTS = sample(CHAIN, torch.float32, CPU).args
POOLED, LINEAR, BIAS = sample(HEAD, torch.float32, CPU).args


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("bottleneck_chain", [X, [], [], []], "weights must be 3 for each of one or more blocks, got 0"),
        ("bottleneck_chain", [X, WEIGHTS[:4], SCALES[:4], SHIFTS[:4]], "one or more blocks, got 4"),
        ("bottleneck_chain", [X, WEIGHTS, SCALES[:3], SHIFTS], "scales must be one for each of the 6 weights, got 3"),
        (
            "bottleneck_chain",
            [X, [*WEIGHTS[:5], WEIGHTS[5][:8]], SCALES, SHIFTS],
            r"weights\[5\].shape\[0\] must be 16, got 8",
        ),
        (
            "bottleneck_chain",
            [X, [*WEIGHTS[:4], *WEIGHTS[3:5]], SCALES, SHIFTS],
            r"weights\[4\].shape\[1\] times groups, 16 \* 1, got 8 channels",
        ),
        ("bottleneck_chain", [X, WEIGHTS, SCALES, [*SHIFTS[:5], BIAS]], r"shifts\[5\].shape must be \(16,\)"),
        ("head", [POOLED, LINEAR[:, 1:]], r"weight.shape must be \(K, 24\), got \(10, 23\)"),
        ("head", [POOLED, LINEAR, BIAS[1:]], r"bias.shape must be \(10,\), got \(9,\)"),
        ("head", [POOLED, LINEAR, BIAS.double()], "bias.dtype must be torch.float32, got torch.float64"),
        ("head", [POOLED[:, :, :0], LINEAR], "x must have at least one pixel, got an image of 0x5"),
    ],
)
def test_bad_input(op, arguments, message):
    with pytest.raises(InputError, match=message):
        getattr(rf.ops, op)(*arguments)


# --- what the plan takes --------------------------------------------------------------------------------------------

WIDE = BottleneckChain(8, 256, 56, 56, 64, 3)
CUDA_KERNELS = {"bottleneck_chain": "rotated", "bottleneck": "whole", "conv": "implicit_gemm"}


@pytest.fixture
def measured(monkeypatch):
    """Have these times taken for measured ones, on a GPU that need not be there: shape to seconds by candidate."""
    times = {}
    monkeypatch.setattr(tuned, "backend_seconds", lambda shape, dtype, device: times.get(shape))
    monkeypatch.setattr(plan.triton, "unsupported", lambda shape, dtype, device: None)
    monkeypatch.setattr(plan.triton, "candidates", lambda s, *_: [plan.triton.Candidate(s.op, "64 wide")])
    monkeypatch.setattr(plan.cuda, "unsupported", lambda shape, dtype, device: None)
    monkeypatch.setattr(plan.cuda, "candidates", lambda s, *_: [plan.cuda.Candidate(CUDA_KERNELS[s.op], "64 wide")])
    monkeypatch.setattr(plan.cuda, "chain_pays", lambda shape, dtype, device: True)
    monkeypatch.setattr(plan.cudnn, "unsupported", lambda *_: None)
    plan.choose.cache_clear()
    yield times
    plan.choose.cache_clear()


def chosen(backend="auto"):
    plan.choose.cache_clear()
    return plan.choose(WIDE, torch.bfloat16, GPU, backend, "strict", (0, "none", True))


def test_chain_is_chosen_only_where_it_was_measured_faster(measured):
    assert chosen().algorithm == "blocks"
    assert "nothing was measured" in chosen().reason
    measured[WIDE] = {"triton bottleneck_chain": 2e-3}
    assert chosen().algorithm == "blocks"  # nothing to compare with
    measured[WIDE.block] = {"triton bottleneck": 1e-3}
    choice = chosen()
    assert (choice.backend, choice.algorithm, choice.config) == ("triton", "bottleneck_chain", "64 wide")
    assert dict(choice.seconds) == {"triton bottleneck_chain": 2e-3, "triton blocks": 3e-3}
    measured[WIDE.block] = {"triton bottleneck": 5e-4}
    assert chosen().algorithm == "blocks"


def test_chain_by_name(measured, monkeypatch):
    assert chosen("triton").algorithm == "bottleneck_chain"
    assert (chosen("cuda").algorithm, chosen("cuda").config) == ("rotated", "64 wide")
    assert chosen("vendor").algorithm == "blocks"
    monkeypatch.setattr(plan.cuda, "chain_pays", lambda shape, dtype, device: False)
    assert chosen("cuda").algorithm == "blocks"
    measured[WIDE.block], measured[WIDE] = {"cuda whole": 1e-3}, {"cuda rotated": 2e-3}
    assert chosen("cuda").algorithm == "rotated"  # what was measured counts


def test_chain_of_the_faster_backend(measured):
    measured[WIDE.block] = {"triton bottleneck": 1e-3, "cuda whole": 9e-4}
    measured[WIDE] = {"triton bottleneck_chain": 2e-3, "cuda rotated": 1.5e-3}
    choice = chosen()
    assert (choice.backend, choice.algorithm) == ("cuda", "rotated")
    assert [name for name, _ in choice.seconds] == ["cuda rotated", "triton bottleneck_chain", "cuda blocks"]
    measured[WIDE]["cuda rotated"] = 4e-3
    assert chosen().backend == "triton"
    assert chosen("cuda").algorithm == "blocks"


@needs_triton
def test_chain_that_no_kernel_takes_runs_block_by_block():
    shape = BottleneckChain(1, 256, 3, 3, 256, 2)
    choice = plan.choose(shape, torch.bfloat16, CPU, "triton", "strict", plan.state(CPU))
    assert choice.algorithm == "blocks"
    assert "up to 128 intermediate channels, got 256" in choice.reason
    with pytest.raises(BackendError, match="cannot run this"):
        sample(CHAIN, torch.float32, CPU).to(torch.float64).run("triton")


# --- what fuse makes of it ----------------------------------------------------------------------------------------


def projection(c, k):
    return nn.Sequential(nn.Conv2d(c, k, 1, bias=False), nn.BatchNorm2d(k))


class Net(nn.Module):
    """One stage of four bottlenecks, the first with a projection."""

    def __init__(self, middle=None):
        super().__init__()
        blocks = [plain.Bottleneck(32, 8) for _ in range(3)]
        if middle is not None:
            blocks[1] = middle
        self.layer1 = nn.Sequential(plain.Bottleneck(16, 8, 1, projection(16, 32)), *blocks)

    def forward(self, x):
        return self.layer1(x)


@pytest.fixture
def net():
    return rf.models.randomize_batchnorms(Net()).eval()


def rows(model, backend="triton"):
    with rf.backend(backend):
        return [(row.block, row.kernel) for row in rf.explain(model, torch.randn(1, 16, 4, 3)).rows]


SINGLE = [(f"layer1.{i}", "bottleneck") for i in range(4)]
CHAINED = [SINGLE[0], ("layer1.1", "bottleneck_chain")]


@needs_triton
def test_identity_blocks_run_as_a_chain(net):
    fast = rf.fuse(net)
    assert isinstance(fast.layer1, FusedStage)
    assert rows(fast) == CHAINED
    assert rows(fast, "auto") == rows(fast, "reference") == SINGLE  # a CPU's kernels take one block at a time
    assert rows(rf.fuse(net, backend="triton"), "auto") == CHAINED
    with rf.backend("triton"):
        assert rf.verify(net, fast, torch.randn(1, 16, 4, 3)).ok


def test_backends_that_may_take_a_chain(net, monkeypatch):
    stage, chains = rf.fuse(net).layer1[1:], []
    monkeypatch.setattr(rf.ops, "bottleneck_chain", lambda x, weights, *_, **__: chains.append(len(weights)) or x)
    for backend, expected in (("cuda", [9]), ("triton", [9]), ("vendor", []), ("auto", [])):
        chains.clear()
        with rf.backend(backend):
            stage(torch.randn(1, 32, 4, 3))
        assert chains == expected


@needs_triton
def test_a_watched_block_cuts_the_chain(net):
    fast = rf.fuse(net)
    seen = []
    handle = fast.layer1[3].register_forward_hook(lambda module, args, y: seen.append(y))
    assert rows(fast) == [SINGLE[0], ("layer1.1", "bottleneck_chain"), SINGLE[3]]
    assert len(seen) == 1
    handle.remove()
    handle = fast.layer1[2].bn1.register_forward_hook(lambda module, args, y: None)
    unfused_convs = [(f"layer1.2.conv{i}", "unfused") for i in (1, 2, 3)]
    assert rows(fast) == [*SINGLE[:2], *unfused_convs, SINGLE[3]]
    handle.remove()
    fast.layer1[2].forward = lambda x: x
    assert rows(fast) == [*SINGLE[:2], SINGLE[3]]
    del fast.layer1[2].forward
    fast.layer1[1].train()
    assert rows(fast)[-1] == ("layer1.2", "bottleneck_chain")
    fast.layer1[1].eval()
    assert rows(fast) == CHAINED


@needs_triton
def test_blocks_changed_after_fusing_are_seen(net):
    fast = rf.fuse(net)
    x = torch.randn(1, 16, 4, 3)
    with rf.backend("triton"), torch.no_grad():
        fast(x)
        fast.layer1[2].bn2.weight.mul_(2)
        fast.layer1[3] = nn.Identity()
        changed = copy.deepcopy(net)
        changed.layer1[2].bn2.weight.mul_(2)
        changed.layer1[3] = nn.Identity()
        torch.testing.assert_close(fast(x), changed(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fast.layer1[1](fast.layer1[0](x)), changed.layer1[1](changed.layer1[0](x)))


@needs_triton
@pytest.mark.parametrize(
    "middle",
    [
        plain.Bottleneck(32, 8, dilation=2),
        plain.Bottleneck(32, 8, groups=2, base_width=32),
        plain.Bottleneck(32, 8, base_width=128),
        plain.Bottleneck(32, 8, 1, projection(32, 32)),
    ],
    ids=["dilation", "groups", "width", "projection"],
)
def test_other_blocks_are_no_part_of_a_chain(middle):
    fast = rf.fuse(rf.models.randomize_batchnorms(Net(middle)).eval())
    assert rows(fast) == SINGLE


@needs_triton
def test_contract(net):
    fast = rf.fuse(net)
    assert fast.state_dict().keys() == net.state_dict().keys()
    assert type(rf.unfuse(fast).layer1) is nn.Sequential
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert rows(twin) == CHAINED
    assert rows(nn.Sequential(fast.layer1[:3]).eval())[-1][1] == "bottleneck_chain"
    fast.train()
    assert fast(torch.randn(2, 16, 4, 3)).requires_grad


@needs_triton
def test_gradients_and_compile(net):
    fast, x = rf.fuse(net), torch.randn(1, 16, 4, 3, requires_grad=True)
    with rf.backend("triton"):
        (mine,) = torch.autograd.grad(fast(x).square().sum(), x)
        compiled = torch.compile(fast, fullgraph=True, backend="eager")
        with torch.no_grad():
            assert torch.equal(compiled(x), fast(x))
    (theirs,) = torch.autograd.grad(net(x).square().sum(), x)
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
