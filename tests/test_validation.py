"""Bad arguments: one sentence that names the argument and both values, before anything is computed."""

import pytest
import torch
from support import EXAMPLES, Case, assert_parity, basic_block_case, bottleneck_case, conv_case, stem_case

import resnet_fused as rf
from resnet_fused import plan
from resnet_fused.errors import BackendError, InputError


def change(case: Case, position: int, value) -> Case:
    return Case(case.op, [*case.args[:position], value, *case.args[position + 1 :]], case.options)


def tensor(*shape, **options):
    return torch.zeros(shape, **options)


CONV, BLOCK, BASIC, STEM = conv_case(padding=1), bottleneck_case(stride=2), basic_block_case(), stem_case()
BAD = {
    "rank of x": (change(CONV, 0, tensor(8, 7, 6)), "x must have 4 dimensions", "got 3"),
    "pixels of x": (change(CONV, 0, tensor(2, 8, 0, 6)), "x must have at least one pixel", "got an image of 0x6"),
    "dtype of x": (change(CONV, 0, tensor(2, 8, 7, 6, dtype=torch.int64)), "x.dtype", "torch.int64"),
    "channels of x": (change(CONV, 0, tensor(2, 5, 7, 6)), "weight.shape[1]", "5 channels", "8 * 1"),
    "rank of weight": (change(CONV, 1, tensor(12, 8, 3)), "weight must have 4 dimensions", "got 3"),
    "dtype of weight": (change(CONV, 1, CONV.args[1].bfloat16()), "weight.dtype", "float32", "bfloat16"),
    "device of weight": (change(CONV, 1, CONV.args[1].to("meta")), "weight.device", "cpu", "meta"),
    "empty weight": (change(CONV, 1, tensor(12, 8, 0, 3)), "weight.shape", "(12, 8, 0, 3)"),
    "size of scale": (change(CONV, 2, tensor(11)), "scale.shape", "(12,)", "(11,)"),
    "dtype of scale": (change(CONV, 2, tensor(12, dtype=torch.bfloat16)), "scale.dtype", "float32", "bfloat16"),
    "float64 scale": (change(CONV, 2, tensor(12, dtype=torch.float64)), "scale.dtype", "float32", "float64"),
    "size of shift": (change(CONV, 3, tensor(12, 1)), "shift.shape", "(12,)", "(12, 1)"),
    "device of shift": (change(CONV, 3, tensor(12, device="meta")), "shift.device", "cpu", "meta"),
    "shape of residual": (
        Case("conv_bn_act", [*CONV.args, tensor(2, 12, 7, 1)], CONV.options),
        "residual.shape",
        "(2, 12, 7, 6)",
        "(2, 12, 7, 1)",
    ),
    "dtype of residual": (
        Case("conv_bn_act", [*CONV.args, tensor(2, 12, 7, 6, dtype=torch.float16)], CONV.options),
        "residual.dtype",
        "float32",
        "float16",
    ),
    "stride": (Case("conv_bn_act", CONV.args, {"stride": 0}), "stride", "from 1 to", "0"),
    "huge stride": (Case("conv_bn_act", CONV.args, {"stride": 2**31}), "stride", "to 1048576", "2147483648"),
    "three strides": (Case("conv_bn_act", CONV.args, {"stride": (1, 1, 1)}), "stride", "one or two", "(1, 1, 1)"),
    "padding": (Case("conv_bn_act", CONV.args, {"padding": (0, -1)}), "padding", "from 0 to", "(0, -1)"),
    "groups": (Case("conv_bn_act", CONV.args, {"groups": 0}), "groups", "at least 1", "0"),
    "groups and channels": (Case("conv_bn_act", CONV.args, {"groups": 3}), "weight.shape[1]", "8 channels", "8 * 3"),
    "groups and outputs": (
        Case("conv_bn_act", [tensor(1, 8, 5, 5), tensor(3, 4, 1, 1), None, tensor(3)], {"groups": 2}),
        "weight.shape[0]",
        "groups, 2",
        "got 3",
    ),
    "small image": (Case("conv_bn_act", CONV.args, {"dilation": 4}), "(3, 3)", "dilation (4, 4)", "(7, 6)", "(0, 0)"),
    "activation": (Case("conv_bn_act", CONV.args, {"activation": "gelu"}), "activation", "'relu', 'none'", "'gelu'"),
    "backend": (Case("conv_bn_act", CONV.args, {"backend": "cudnn"}), "backend", "'vendor'", "'cudnn'"),
    "accuracy": (Case("conv_bn_act", CONV.args, {"accuracy": "loose"}), "accuracy", "'strict', 'fast'", "'loose'"),
    "w1 of a bottleneck": (change(BLOCK, 1, tensor(8, 16, 3, 3)), "w1.shape[2:]", "(1, 1)", "(3, 3)"),
    "w2 of a bottleneck": (change(BLOCK, 3, tensor(9, 8, 3, 3)), "w2.shape[0]", "8 output", "got 9"),
    "w3 of a bottleneck": (change(BLOCK, 5, tensor(16, 9, 1, 1)), "w3.shape[1]", "8 channels", "9 * 1"),
    "b3 of a bottleneck": (change(BLOCK, 6, tensor(8)), "b3.shape", "(16,)", "(8,)"),
    "wd of a bottleneck": (change(BLOCK, 7, tensor(8, 16, 1, 1)), "wd.shape[0]", "16 output", "got 8"),
    "no wd": (Case("bottleneck", BLOCK.args[:7], {"stride": 2}), "wd must be given", "16 channels", "stride 2"),
    "no bd": (Case("bottleneck", BLOCK.args[:8], {"stride": 2}), "bd must be given", "(16, 16, 1, 1)"),
    "bd alone": (Case("bottleneck", [*BLOCK.args[:7], None, BLOCK.args[8]], {}), "bd must be None", "(16,)"),
    "sd alone": (Case("basic_block", BASIC.args[:5], {"sd": tensor(16)}), "sd must be None", "(16,)"),
    "s1 of a bottleneck": (
        Case("bottleneck", BLOCK.args, {**BLOCK.options, "s1": tensor(3)}),
        "s1.shape",
        "(8,)",
        "(3,)",
    ),
    "channels of a basic block": (change(BASIC, 0, tensor(1, 3, 7, 7)), "w1.shape[1]", "3 channels", "16 * 1"),
    "w2 of a basic block": (change(BASIC, 3, tensor(16, 16, 1, 1)), "w2.shape[2:]", "(3, 3)", "(1, 1)"),
    "stride of a basic block": (Case("basic_block", BASIC.args, {"stride": -1}), "stride", "at least 1", "-1"),
    "pool_padding": (Case("stem", STEM.args, {"pool_padding": 2}), "pool_padding", "pool_kernel, 3", "got 2"),
    "pool_kernel": (
        Case("stem", STEM.args, {"pool_kernel": 99, "pool_padding": 0}),
        "pool_kernel",
        "(99, 99)",
        "(12, 10)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_one_sentence(name, monkeypatch):
    case, *words = BAD[name]
    monkeypatch.setattr(plan, "choose", None)  # nothing may come this far
    with pytest.raises(InputError) as caught:
        case.run()
    message = str(caught.value)
    for word in words:
        assert word in message
    assert "\n" not in message
    assert len(message) < 200


@pytest.mark.parametrize("name", BAD)
def test_found_while_tracing_too(name):
    case, *words = BAD[name]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = Case(case.op, [None if t is None else mode.from_tensor(t) for t in case.args], case.options)
        with pytest.raises(Exception, match=r"\w") as caught:
            fakes.run()
    if "device" not in name:
        assert words[0] in str(caught.value)


@pytest.mark.parametrize("op", EXAMPLES)
def test_backends_that_cannot(op):
    half = EXAMPLES[op]().to(torch.float16)
    for backend in ("cpu", "vendor"):
        with pytest.raises(BackendError, match=rf"backend='{backend}'.*float16"):
            half.run(backend=backend)


def test_vendor_refuses_a_residual_in_groups():
    case = conv_case(groups=2, residual="nhwc")
    with pytest.raises(BackendError, match=r"backend='vendor'.*groups"):
        case.run(backend="vendor")
    assert_parity(case.run(), case)


def test_unknown_name_of_the_backend_context():
    with pytest.raises(InputError, match=r"backend must be one of .*'gpu'"), rf.backend("gpu"):
        pass


def test_not_a_tensor():
    with pytest.raises(InputError, match=r"^x must be of type Tensor, got ndarray$"):
        rf.ops.conv_bn_act(CONV.args[0].numpy(), *CONV.args[1:])
    with pytest.raises(InputError, match=r"^residual must be of type Optional\[Tensor\], got list$"):
        rf.ops.conv_bn_act(*CONV.args, [1.0])
    with pytest.raises(InputError, match=r"^weights must be of type List\[Tensor\], got list$"):
        rf.ops.bottleneck_chain(CONV.args[0], [1.0], [None], [CONV.args[3]])


def test_not_a_number():
    with pytest.raises(InputError, match=r"^padding must be of type List\[int\], got str$"):
        rf.ops.conv_bn_act(*CONV.args, padding="same")


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (tensor(1, 4, 32, 32), r"channels coming in must be weight.shape\[1\] times groups, 3 \* 1, got 4 channels"),
        (tensor(1, 3, 32, 32, dtype=torch.float64), "must be the same, got torch.float64 and torch.float32"),
    ],
)
def test_wrong_input_of_a_fused_model(x, message):
    with pytest.raises(InputError, match=message):
        rf.fuse(rf.models.resnet20_cifar().eval())(x)


def test_vendor_refuses_what_onednn_gets_wrong():
    case = conv_case(h=13, w=3, stride=2, dtype=torch.bfloat16)
    with pytest.raises(BackendError, match=r"wrong or crashes on windows of 3x3.* image of 13x3"):
        case.run(backend="vendor")
