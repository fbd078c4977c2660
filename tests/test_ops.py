"""What every op promises whatever computes it: values, memory format, repeatability, no surprises from threads."""

import threading

import hypothesis
import pytest
import torch
from hypothesis import given, settings
from support import CL, DTYPES, EXAMPLES, Case, assert_parity, cases, conv_case, image, integers

import resnet_fused as rf
from resnet_fused.errors import BackendError, InputError

BACKENDS = ("auto", "reference", "vendor")


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=120)
@given(case=cases)
def test_parity(backend, case):
    hypothesis.assume(backend != "reference" or case.reliable())
    try:
        y = case.run(backend=backend)
    except BackendError as error:
        assert backend == "vendor"
        assert "groups=1" in str(error) or not case.reliable()
    else:
        assert_parity(y, case)


@pytest.mark.parametrize("op", EXAMPLES)
@pytest.mark.parametrize("dtype", (torch.float16, torch.float64))
def test_other_dtypes_take_the_reference(op, dtype):
    case = EXAMPLES[op]().to(dtype)
    with rf.plan.record() as choices:
        assert_parity(case.run(), case)
    assert {choice.backend for choice in choices} == {"reference"}


@pytest.mark.parametrize("op", EXAMPLES)
@pytest.mark.parametrize("layout", ("nchw", "nhwc", "view", "nhwc view", "expanded"))
@pytest.mark.parametrize("size", ("usual", "one channel", "one pixel"))
def test_memory_format_is_that_of_torch(op, layout, size):
    if size == "one channel":
        case = EXAMPLES[op](c=1, layout=layout)
    elif size == "one pixel":
        case = EXAMPLES[op](h=1, w=1, layout=layout)
    else:
        case = EXAMPLES[op](layout=layout)
    for backend in BACKENDS:
        y = case.run(backend=backend)
        expected = torch.empty(y.shape).contiguous(
            memory_format=torch._prims_common.suggest_memory_format(case.args[0])
        )
        assert y.stride() == torch.empty_like(expected).stride() or 1 in y.shape
        assert torch._prims_common.suggest_memory_format(y) == torch._prims_common.suggest_memory_format(case.args[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", EXAMPLES)
def test_same_bits_on_every_run_and_whatever_the_layout(op, backend):
    nchw = EXAMPLES[op](layout="nchw", h=15, w=13)
    nhwc = Case(op, [nchw.args[0].contiguous(memory_format=CL), *nchw.args[1:]], nchw.options)
    if op == "conv_bn_act":
        for case in (nchw, nhwc):
            case.args[4] = nchw.args[4].contiguous(memory_format=CL) if case is nhwc else case.args[4]
    first = nchw.run(backend=backend)
    for case in (nchw, nhwc, nchw):
        if backend != "reference" or case is nchw:  # torch's own convolution differs between the layouts
            assert torch.equal(case.run(backend=backend), first)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", EXAMPLES)
def test_integers_come_out_exactly(op, dtype, backend):
    case = integers(EXAMPLES[op](dtype=dtype))
    assert torch.equal(case.run(backend=backend), case.exact().to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", EXAMPLES)
def test_nan_passes_through_relu(op, backend):
    case = EXAMPLES[op](n=2)
    case.args[0] = case.args[0].clone()
    case.args[0][0, 0, 0, 0] = float("nan")
    y = case.run(backend=backend)
    assert torch.equal(y.isnan(), case.formula().isnan())
    assert y[0].isnan().any()
    assert not y[1].isnan().any()


@pytest.mark.parametrize("op", EXAMPLES)
def test_batch_0(op):
    case = EXAMPLES[op](n=0)
    for backend in BACKENDS:
        assert case.run(backend=backend).shape == case.formula().shape


@pytest.mark.parametrize("op", EXAMPLES)
def test_forward_mode_is_refused(op):
    """The tangent would be lost without a word."""
    case = EXAMPLES[op]()
    with pytest.raises(InputError, match="x must not be differentiated in forward mode"):
        torch.func.jvp(lambda x: Case(op, [x, *case.args[1:]], case.options).run(), (case.args[0],), (case.args[0],))


def test_scalars_and_pairs_are_the_same():
    case = conv_case(padding=1, dilation=2, stride=2)
    pairs = Case(case.op, case.args, {"padding": (1, 1), "dilation": [2, 2], "stride": (2, 2), "groups": 1})
    assert torch.equal(case.run(), pairs.run())


@pytest.mark.parametrize("op", ("conv_bn_act", "bottleneck", "basic_block", "stem"))
def test_scale_of_none_is_ones(op):
    case = EXAMPLES[op]()
    ones = EXAMPLES[op]()
    if op in ("conv_bn_act", "stem"):
        case.args[2], ones.args[2] = None, torch.ones_like(ones.args[2])
    else:
        ones.options |= {name: torch.ones_like(ones.options[name]) for name in ("s1", "s2")}
        case.options |= {"s1": None, "s2": None}
    ones.args = [
        mine if i == 2 and op in ("conv_bn_act", "stem") else theirs
        for i, (mine, theirs) in enumerate(zip(ones.args, case.args, strict=True))
    ]
    ones.options = {**case.options, **{name: ones.options[name] for name in ("s1", "s2") if name in ones.options}}
    for backend in BACKENDS:
        assert torch.equal(case.run(backend=backend), ones.run(backend=backend))


def test_two_threads_at_once():
    """Both pack the same weights on their first call, then compute different images."""
    made = {op: EXAMPLES[op](h=23, w=23) for op in EXAMPLES}
    inputs = {
        op: [image(2, case.args[0].shape[1], 23, 23, torch.float32, "nhwc") for _ in range(2)]
        for op, case in made.items()
    }
    results: list[list[torch.Tensor]] = [[], []]
    start = threading.Barrier(2)

    def work(i):
        start.wait()
        for _ in range(5):
            results[i] = [Case(op, [inputs[op][i], *case.args[1:]], case.options).run() for op, case in made.items()]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        for (op, case), y in zip(made.items(), results[i], strict=True):
            assert torch.equal(y, Case(op, [inputs[op][i], *case.args[1:]], case.options).run())


def test_autocast_casts_images_and_weights_but_not_scales():
    case = conv_case(residual="nhwc", padding=1)
    case.args[1] = torch.nn.Parameter(case.args[1])
    expected = case.to(torch.bfloat16).run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(case.run(), expected)
        with torch.no_grad():
            assert torch.equal(case.run(), expected)
            case.args[1].mul_(2)
            assert not torch.equal(case.run(), expected)
        case.run().float().sum().backward()
    assert case.args[1].grad.dtype == torch.float32
