"""How the ops stand in torch: opcheck, gradients, torch.compile."""

import pytest
import torch
from support import DTYPES, EXAMPLES, Case, conv_case

import resnet_fused as rf
from resnet_fused import settings
from resnet_fused.errors import BackendError, InputError
from resnet_fused.kernels import packing


def flat(case: Case) -> tuple[torch.Tensor, ...]:
    """The tensors of a call in the order of the op's schema."""
    names = {"bottleneck": ("s1", "s2", "s3", "sd"), "basic_block": ("s1", "s2", "sd")}.get(case.op, ())
    shortcut = [None] * ({"bottleneck": 9, "basic_block": 7}.get(case.op, 0) - len(case.args))
    return *case.args, *shortcut, *(case.options.get(name) for name in names)


def plain(case: Case) -> dict[str, object]:
    return {name: value for name, value in case.options.items() if not isinstance(value, torch.Tensor)}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", EXAMPLES)
def test_opcheck(op, dtype, layout):
    case = EXAMPLES[op](dtype=dtype, layout=layout)
    args = tuple(t if t is None else t.requires_grad_() for t in flat(case))
    torch.library.opcheck(getattr(torch.ops.resnet_fused, op).default, args, plain(case))


CASES = {
    "layer": conv_case(1, 4, 4, 3, 6, residual="nchw", stride=(2, 1), padding=1, dilation=(1, 2), groups=2),
    "layer without activation": conv_case(1, 2, 3, 4, 2, 2, 1, activation="none"),
    "projection": EXAMPLES["bottleneck"](n=1, c=3, h=4, w=3, mid=4, out=4, groups=2),
    "stride in the 1x1": EXAMPLES["bottleneck"](n=1, c=3, h=4, w=3, mid=2, out=4, stride_in_1x1=True),
    "identity": EXAMPLES["bottleneck"](n=2, c=3, h=3, w=2, mid=2, out=3, stride=1, dilation=2),
    "basic projection": EXAMPLES["basic_block"](n=1, c=2, h=4, w=3, mid=2, out=3, stride=2),
    "basic identity": EXAMPLES["basic_block"](n=1, c=2, h=3, w=3, mid=3, out=2),
    "stem": EXAMPLES["stem"](n=1, c=2, h=9, w=7, k=2, r=3, padding=1),
}


def differentiable(case: Case):
    """The call in float64 as a function of all its tensors."""
    case = case.to(torch.float64)
    tensors = flat(case)
    present = [i for i, t in enumerate(tensors) if t is not None]
    op = getattr(torch.ops.resnet_fused, case.op).default

    def function(*given):
        args = [None] * len(tensors)
        for i, t in zip(present, given, strict=True):
            args[i] = t
        return op(*args, **plain(case))

    return function, [tensors[i].contiguous().requires_grad_() for i in present]


@pytest.mark.parametrize("name", CASES)
def test_gradients(name):
    function, inputs = differentiable(CASES[name])
    assert torch.autograd.gradcheck(function, inputs)


def test_second_derivatives():
    function, inputs = differentiable(CASES["layer"])
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("which", range(13))
def test_gradient_of_one_tensor_alone_is_the_same(which):
    function, inputs = differentiable(CASES["projection"])
    every = torch.autograd.grad(function(*inputs).sin().sum(), inputs)
    alone = [t.detach().requires_grad_(i == which) for i, t in enumerate(inputs)]
    (one,) = torch.autograd.grad(function(*alone).sin().sum(), alone[which])
    torch.testing.assert_close(one, every[which])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", EXAMPLES)
def test_gradients_as_unfused(op, dtype):
    """In the model's own dtype, against torch's gradients of the formula in float64."""
    case = EXAMPLES[op](dtype=dtype)
    exact = case.to(torch.float64)

    def gradients(run, case):
        inputs = [t.requires_grad_() for t in flat(case) if t is not None]
        return torch.autograd.grad(run().double().square().sum(), inputs)

    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    for mine, theirs in zip(gradients(case.run, case), gradients(exact.formula, exact), strict=True):
        assert (mine.double() - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
@pytest.mark.parametrize("op", EXAMPLES)
def test_compile(op, backend):
    case = EXAMPLES[op]()
    x, *rest = case.args
    run = getattr(rf.ops, op)
    compiled = torch.compile(lambda x: run(x, *rest, **case.options), fullgraph=True, backend=backend)
    assert torch.equal(compiled(x), case.run())
    x = torch.cat([x, x])  # another batch
    if op != "conv_bn_act":
        assert torch.equal(compiled(x), Case(op, [x, *rest], case.options).run())
    inputs = [t.requires_grad_() for t in flat(case) if t is not None]
    eager = torch.autograd.grad(case.run().sum(), inputs)
    for mine, theirs in zip(torch.autograd.grad(compiled(case.args[0]).sum(), inputs), eager, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_compile_with_inductor():
    case = EXAMPLES["bottleneck"]()
    compiled = torch.compile(lambda x: rf.ops.bottleneck(x, *case.args[1:], **case.options), fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(case.args[0]), case.run())


def test_compiled_calls_pack_once():
    case = conv_case(dtype=torch.float32, padding=1)
    case.args[1] = torch.nn.Parameter(case.args[1])
    compiled = torch.compile(
        lambda x: rf.ops.conv_bn_act(x, *case.args[1:], padding=1, backend="vendor"), backend="aot_eager"
    )
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            compiled(case.args[0])
            before = {id(pack) for packs in packing._all.values() for pack in packs.by_key.values()}
            compiled(case.args[0])
            after = {id(pack) for packs in packing._all.values() for pack in packs.by_key.values()}
            assert before == after
    assert packing.count(case.args[1]) == 1


def test_compile_inside_and_around_the_backend_context():
    case = conv_case()
    seen = []

    def run(x):
        with rf.backend("reference"):
            y = rf.ops.conv_bn_act(x, *case.args[1:])
        return y, rf.ops.conv_bn_act(x, *case.args[1:])

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for name in ("vendor", "auto", "reference"):
        with rf.backend(name), rf.plan.record() as choices:
            compiled(case.args[0])
        seen.append([choice.backend for choice in choices])
    with rf.plan.record() as choices:
        case.run()
    assert seen == [["reference", "vendor"], ["reference", choices[0].backend], ["reference", "reference"]]


def test_compile_keeps_the_sentence_of_an_error():
    case = conv_case()
    compiled = torch.compile(lambda x: rf.ops.conv_bn_act(x, *case.args[1:]), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"x\.shape|channels coming in"):
        compiled(torch.randn(1, 5, 7, 7))


def test_backend_context_is_of_one_thread_and_ends_with_an_error():
    with pytest.raises(KeyError), rf.backend("reference"):
        raise KeyError
    assert rf.settings.resolve_backend("auto") == "auto"
    with rf.backend("reference"):
        with rf.backend("vendor"):
            assert rf.settings.resolve_backend("auto") == "vendor"
        assert rf.settings.resolve_backend("auto") == "reference"
        assert rf.settings.resolve_backend("vendor") == "vendor"


def test_named_backend_that_cannot_is_an_error():
    case = conv_case().to(torch.float64)
    with pytest.raises(BackendError, match=r"backend='vendor'.*float64"):
        case.run(backend="vendor")
    with rf.backend("vendor"), pytest.raises(BackendError, match=r"backend='vendor'.*float64"):
        case.run()


def test_an_unknown_backend_is_told_before_with():
    with pytest.raises(InputError, match=r"backend must be one of .* got 'foo'"):
        rf.backend("foo")


@pytest.mark.parametrize(("value", "error"), [("foo", "RESNET_FUSED_BACKEND must be one of .* got 'foo'"), ("", None)])
def test_backend_of_the_environment(monkeypatch, value, error):
    monkeypatch.setenv("RESNET_FUSED_BACKEND", value)
    monkeypatch.setattr(settings, "_state", settings._State())
    case = conv_case()
    if error is None:
        case.run()
    else:
        with pytest.raises(InputError, match=error):
            case.run()
