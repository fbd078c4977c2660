"""The public ops of pre-activation and dense blocks: values on every backend, gradients, opcheck, bad input."""

import pytest
import support
import torch
from support import DTYPES, EXAMPLES
from test_kernels_cpu_prologue import (
    check,
    conv_bn_act,
    dense_block,
    dense_layers,
    mapped,
    preact_block,
    transition,
    vectors,
    whole,
)

import resnet_fused as rf
from resnet_fused.errors import InputError

BACKENDS = ("auto", "vendor", "reference")
LAYOUTS = ("nchw", "nhwc", "view", "nhwc view")


def preact_arguments(c=16, mid=8, out=16, bottleneck=False, projection=False, prologue=True, dtype=torch.float32, **kw):
    taps = ((mid, c, 1), (mid, mid, 3), (out, mid, 1)) if bottleneck else ((mid, c, 3), (out, mid, 3))
    weights = [support.weight(k, i, r, r, dtype) for k, i, r in taps]
    scales = [*(support.scale(w.shape[0]) for w in weights[:-1]), None]
    shifts = [*(support.shift(w.shape[0]) for w in weights[:-1]), torch.zeros(out)]
    wd = support.weight(out, c, 1, 1, dtype) if projection else None
    x = support.image(kw.get("n", 2), c, 7, 6, dtype, kw.get("layout", "nhwc"))
    return [x, *(vectors(c) if prologue else (None, None)), weights, scales, shifts, wd]


def transition_arguments(dtype=torch.float32, n=2, layout="nhwc"):
    return [support.image(n, 24, 7, 9, dtype, layout), *vectors(24), support.weight(12, 24, 1, 1, dtype)]


def dense_arguments(dtype=torch.float32, n=2, layout="nhwc", mid=16):
    return [support.image(n, 12, 6, 7, dtype, layout), dense_layers(12, 8, mid, 3, dtype)]


def conv_arguments(dtype=torch.float32, n=2, layout="nhwc"):
    x, weight = support.image(n, 12, 6, 7, dtype, layout), support.weight(16, 12, 3, 3, dtype)
    return [x, weight, *vectors(16), None, *vectors(12)]


OPS = {
    "conv_bn_act": (conv_arguments, conv_bn_act, {"padding": 1, "stride": 2}),
    "preact_block": (preact_arguments, preact_block, {"stride": 1, "dilation": 1}),
    "dense_block": (dense_arguments, dense_block, {}),
    "transition": (transition_arguments, transition, {}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_parity_and_memory_format(op, dtype, layout, backend):
    make, formula, options = OPS[op]
    arguments = make(dtype=dtype, layout=layout)
    y = getattr(rf.ops, op)(*arguments, **options, backend=backend)
    check(y, formula, *arguments, **options)
    assert torch._prims_common.suggest_memory_format(y) == torch._prims_common.suggest_memory_format(arguments[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prologue", (True, False))
@pytest.mark.parametrize("bottleneck", (False, True))
@pytest.mark.parametrize("stride", (1, 2))
def test_preact_block(stride, bottleneck, prologue, backend):
    projection, out = stride == 2, 16 * stride
    arguments = preact_arguments(out=out, bottleneck=bottleneck, projection=projection, prologue=prologue)
    options = {"stride": stride, "dilation": 1}
    check(rf.ops.preact_block(*arguments, **options, backend=backend), preact_block, *arguments, **options)


def test_preact_block_with_its_stride_in_the_1x1():
    arguments = preact_arguments(out=32, bottleneck=True, projection=True)
    y = rf.ops.preact_block(*arguments, stride=2, stride_in_1x1=True)
    x, in_scale, in_shift, weights, scales, shifts, wd = arguments
    h = conv_bn_act(x, weights[0], scales[0], shifts[0], None, in_scale, in_shift, stride=2)
    h = support.layer(h, weights[1], scales[1], shifts[1], padding=1)
    ones = torch.ones(32)
    h = support.layer(h, weights[2], ones, shifts[2], activation="none")
    side = conv_bn_act(x, wd, ones, torch.zeros(32), None, in_scale, in_shift, stride=2, activation="none")
    torch.testing.assert_close(y, h + side, rtol=1e-5, atol=1e-5)


def test_dense_block_without_1x1():
    arguments = dense_arguments(mid=0)
    check(rf.ops.dense_block(*arguments), dense_block, *arguments)


@pytest.mark.parametrize("dtype", (torch.float16, torch.float64))
@pytest.mark.parametrize("op", OPS)
def test_other_dtypes_take_the_reference(op, dtype):
    make, formula, options = OPS[op]
    arguments = make(dtype=dtype)
    if dtype == torch.float64:
        arguments = mapped(torch.Tensor.double, arguments)
    if op == "dense_block":
        arguments[1] = [rf.ops.DenseLayer(*layer) for layer in arguments[1]]
    with rf.plan.record() as choices:
        check(getattr(rf.ops, op)(*arguments, **options), formula, *arguments, **options)
    assert {choice.backend for choice in choices} == {"reference"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ("conv_bn_act", "preact_block", "transition"))
def test_integers_come_out_exactly(op, dtype, backend):
    make, formula, options = OPS[op]
    arguments = whole(make(dtype=dtype))
    exact = formula(*mapped(torch.Tensor.double, arguments), **options)
    assert exact.abs().max() <= 256
    assert torch.equal(getattr(rf.ops, op)(*arguments, **options, backend=backend), exact.to(dtype))


@pytest.mark.parametrize("op", OPS)
def test_batch_0(op):
    make, formula, options = OPS[op]
    assert getattr(rf.ops, op)(*make(n=0), **options).shape == (0, *formula(*make(n=1), **options).shape[1:])


def flat(arguments):
    return torch.utils._pytree.tree_leaves(arguments)


@pytest.mark.parametrize("op", OPS)
def test_gradients_are_those_of_the_formula(op):
    make, formula, options = OPS[op]
    arguments = mapped(lambda t: t.detach().double(), make())
    leaves = [t.requires_grad_() for t in flat(arguments) if isinstance(t, torch.Tensor)]
    expected = torch.autograd.grad(formula(*arguments, **options).sin().sum(), leaves)
    if op == "dense_block":
        arguments[1] = [rf.ops.DenseLayer(*layer) for layer in arguments[1]]
    found = torch.autograd.grad(getattr(rf.ops, op)(*arguments, **options).sin().sum(), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("gradients", (False, True))
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, gradients):
    make, _, options = OPS[op]
    arguments = make()
    if op == "dense_block":
        arguments = [arguments[0], *(list(column) for column in zip(*arguments[1], strict=True))]
    if op == "conv_bn_act":
        options = {name: (value, value) for name, value in options.items()}
    for t in flat(arguments):
        if isinstance(t, torch.Tensor):
            t.requires_grad_(gradients)
    torch.library.opcheck(getattr(torch.ops.resnet_fused, op).default, tuple(arguments), options)


@pytest.mark.parametrize("op", OPS)
def test_autocast_casts_images_and_weights(op):
    make, _, options = OPS[op]
    arguments = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = getattr(rf.ops, op)(*arguments, **options)
    assert y.dtype == torch.bfloat16


LAYER = dense_layers(12, 8, 16, 1, torch.float32)[0]
BARE = dense_layers(12, 8, 0, 1, torch.float32)[0]
PREACT = preact_arguments()
TRANSITION = transition_arguments()


@pytest.mark.parametrize(
    ("op", "arguments", "options", "message"),
    [
        (
            "conv_bn_act",
            [*conv_arguments()[:5], torch.ones(12)],
            {"padding": 1},
            "in_shift must be given together with",
        ),
        ("conv_bn_act", [*conv_arguments()[:5], *vectors(11)], {}, r"in_scale.shape must be \(12,\), got \(11,\)"),
        ("dense_block", [dense_arguments()[0], []], {}, "layers must hold at least one layer, got none"),
        (
            "dense_block",
            [dense_arguments()[0], [LAYER, BARE]],
            {},
            "w1 must be given for all 2 layers or for none, got 1",
        ),
        (
            "dense_block",
            [dense_arguments()[0], [LAYER, LAYER]],
            {},
            r"in_scales\[1\].shape must be \(20,\), got \(12,\)",
        ),
        ("preact_block", [*PREACT[:3], PREACT[3][:1], *PREACT[4:]], {}, r"weights must be 2 .* or 3 .*, got 1"),
        ("preact_block", [*PREACT[:4], PREACT[4][:1], *PREACT[5:]], {}, "scales must be one for each of the 2 weights"),
        ("preact_block", PREACT, {"groups": 2}, "weights must be 3 for groups=2, got 2"),
        ("preact_block", PREACT, {"stride": 2}, "wd must be given unless the input fits the output"),
        ("transition", [torch.randn(1, 24, 1, 5), *TRANSITION[1:]], {}, r"pooling window of size \(2, 2\)"),
        ("transition", TRANSITION, {"backend": "gpu"}, "backend must be one of"),
    ],
)
def test_bad_input(op, arguments, options, message):
    with pytest.raises(InputError, match=message):
        getattr(rf.ops, op)(*arguments, **options)


def test_compiles_whole():
    arguments = dense_arguments()
    compiled = torch.compile(lambda x: rf.ops.dense_block(x, arguments[1]), fullgraph=True)
    assert torch.equal(compiled(arguments[0]), rf.ops.dense_block(*arguments))


def test_examples_have_the_public_ops():
    elsewhere = {"bottleneck_chain", "head"}  # tests/test_stages.py
    assert set(rf.ops.__all__) == {"DenseLayer", *EXAMPLES, *OPS, *elsewhere}
