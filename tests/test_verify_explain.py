"""verify judges, explain tells."""

import copy
import json

import pytest
import torch
from nets import BLOCKS, TinyBackbone, TinyResNet, images, tiny
from torch import nn

import resnet_fused as rf
from resnet_fused.errors import InputError
from resnet_fused.verify import judge, largest_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_report(dtype):
    model, x = tiny().to(dtype), images(dtype=dtype)
    report = rf.verify(model, rf.fuse(model), x)
    assert report.ok
    assert [row.block for row in report.rows] == [*BLOCKS, "end to end"]
    assert [row.kernel for row in report.rows] == ["stem", *["bottleneck"] * 2, *["basic_block"] * 2, "head", ""]
    assert all(0 < row.error <= row.limit for row in report.rows)
    assert report.dtype == str(dtype)[6:]
    assert report.flipped == 0
    text = str(report)
    assert "parity holds" in text and "layer2.1" in text and "\x1b" not in text
    data = json.loads(json.dumps(report.to_dict()))
    assert data["ok"] is True and len(data["rows"]) == 7


def test_a_wrong_block_is_found():
    model, x = tiny(), images()
    fast = rf.fuse(model)
    with torch.no_grad():
        fast.layer1[1].bn2.bias.add_(1e-5)
    report = rf.verify(model, fast, x)
    assert not report.ok
    assert next(row.block for row in report.rows if not row.ok) == "layer1.1"
    assert "PARITY DOES NOT HOLD" in str(report) and "FAIL" in str(report)


def test_a_wrong_format_or_hidden_layer_is_found_end_to_end():
    model, x = tiny(), images()
    fast = rf.fuse(model)
    with torch.no_grad():
        fast.fc.bias.add_(1.0)
        wrong = nn.Linear(24, 10)
        wrong.load_state_dict(fast.fc.state_dict())
    report = rf.verify(model, fast, x)
    assert [row.block for row in report.rows if not row.ok] == ["avgpool..fc", "end to end"]
    fast.fc = wrong
    report = rf.verify(model, fast, x)
    assert [row.block for row in report.rows if not row.ok] == ["end to end"]


def test_verify_leaves_the_models_alone():
    model, x = tiny(), images()
    fast = rf.fuse(model)
    before = [copy.deepcopy(m.state_dict()) for m in (model, fast)]
    rf.verify(model, fast, x)
    for m, state in zip((model, fast), before, strict=True):
        assert all(torch.equal(t, u) for t, u in zip(m.state_dict().values(), state.values(), strict=True))
        assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_model_against_itself():
    model, x = rf.fuse(tiny()), images()
    assert rf.verify(model, model, x).ok
    assert [row.block for row in rf.verify(model, model, x).rows] == [*BLOCKS, "end to end"]


def test_images_out():
    model = tiny(TinyBackbone)
    report = rf.verify(model, rf.fuse(model), images())
    assert report.ok and report.flipped is None


def test_nan_and_infinity():
    nan, inf = float("nan"), float("inf")
    exact = [torch.tensor([1.0, nan, inf], dtype=torch.float64)]
    assert largest_error([torch.tensor([1.0, nan, inf])], exact) == 0
    for wrong in ([1.0, 2.0, inf], [1.0, nan, -inf], [nan, nan, inf], [1.0, nan, 3.0]):
        assert not judge("", "", [torch.tensor(wrong)], [[torch.tensor([1.0, nan, inf])]], exact, 0.0).ok


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2.0**-23), (torch.bfloat16, 2.0**-8)])
def test_one_rounding_is_allowed_where_the_original_is_exact(dtype, rounding):
    exact, plain = [torch.tensor([4.0, 1.0], dtype=torch.float64)], [[torch.tensor([4.0, 1.0], dtype=dtype)]]
    right = [torch.tensor([4.0, 1.0 + 2 * rounding], dtype=dtype)]
    wrong = [torch.tensor([4.0 - 8 * rounding, 1.0], dtype=dtype)]
    assert judge("", "", right, plain, exact, 0.0).limit == 4 * rounding
    assert judge("", "", right, plain, exact, 0.0).ok
    assert not judge("", "", wrong, plain, exact, 0.0).ok


class CoarseInChannelsLast(nn.Module):
    def forward(self, x):
        return x * (1 + 1e-5) if x.is_contiguous(memory_format=torch.channels_last) else x * 1.0


def test_what_is_less_exact_in_channels_last_may_stay_so():
    """Fused layers give channels_last, and what comes after them sees that."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), CoarseInChannelsLast()).eval()
    fast = rf.fuse(model)
    report = rf.verify(model, fast, images())
    assert report.ok, f"\n{report}"
    assert report.rows[-1].unfused_error > 5e-6 * report.rows[-1].magnitude
    assert report.rows[0].unfused_error < 1e-6 * report.rows[0].magnitude


def test_hooks_on_blocks_do_not_count():
    model, x = tiny(), images()
    model.layer1[1].register_forward_hook(lambda module, args, y: 2 * y)
    model.layer1[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    report = rf.verify(model, rf.fuse(model), x)
    assert report.ok
    assert [row.block for row in report.rows] == [*BLOCKS, "end to end"]


def test_blocks_that_do_not_run_fused_have_no_row():
    model, x = tiny(), images()
    fast = rf.fuse(model, backend="reference")
    assert "avgpool..fc" in [row.block for row in rf.verify(model, fast, x).rows]
    fast.layer1[1].bn1.register_forward_hook(lambda module, args, y: None)
    assert [row.block for row in rf.verify(model, fast, x).rows] == [
        *(name for name in BLOCKS if name != "layer1.1"), "end to end",
    ]  # fmt: skip
    fast = rf.fuse(model)
    meta = torch.empty_like(x, device="meta")
    assert fast.avgpool._fused_op.why_left(meta) == "on a GPU the end of a classifier is torch's"


def test_empty_batch():
    model = tiny()
    assert rf.verify(model, rf.fuse(model), images(0)).ok


def test_fast_accuracy_has_a_limit_of_its_own():
    model, x = tiny(), images()
    strict, fast = (rf.verify(model, rf.fuse(model, accuracy=a), x) for a in ("strict", "fast"))
    assert all(f.limit > s.limit for f, s in zip(fast.rows, strict.rows, strict=True))
    block = fast.rows[1]
    assert block.limit == pytest.approx(1e-5 * block.magnitude)


class SevenClasses(TinyResNet):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(24, 7)


class Difference(nn.Module):
    """Of one net's outputs for two batches, the second one in a list, a number of times."""

    def __init__(self):
        super().__init__()
        self.net = TinyBackbone()

    def forward(self, x, others, times):
        return {"difference": (self.net(x) - self.net(others[0])) * times}


def test_several_arguments():
    model, x = Difference().eval(), (images(), [images(2) + 1], 3)
    fast = rf.fuse(model)
    report = rf.verify(model, fast, x)
    assert report.ok and report.flipped is None
    assert [row.block for row in report.rows] == [*(f"net.{name}" for name in BLOCKS[:5]), "end to end"]
    with torch.no_grad():
        fast.net.layer2[1].bn2.bias.add_(1e-5)
        assert not rf.verify(model, fast, x).ok
    assert [row.block for row in rf.explain(fast, x).rows] == [f"net.{name}" for name in BLOCKS[:5]] * 2


class Labels(TinyResNet):
    def forward(self, x):
        return super().forward(x).argmax(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: (tiny().train(), rf.fuse(tiny())), "model must be in eval mode, got TinyResNet in train mode"),
        (lambda: (tiny(), rf.fuse(tiny()).train()), "fast must be in eval mode"),
        (lambda: (tiny(), tiny()), "fast must be a fused model, got TinyResNet with nothing fused"),
        (lambda: (nn.Identity().eval(), rf.fuse(tiny())), "model must have the module 'conv1' .* got Identity"),
        (lambda: (3, rf.fuse(tiny())), r"model must be a torch.nn.Module, got int"),
        (lambda: (tiny(), rf.fuse(tiny()), "x"), r"x must be a floating-point torch.Tensor, .* got str"),
        (
            lambda: (tiny(), rf.fuse(tiny()), (1, images().int())),
            r"x must be a floating-point torch.Tensor, .* got tuple",
        ),
        (
            lambda: (tiny(), rf.fuse(tiny()), images().int()),
            r"x must be a floating-point .* got a tensor of torch.int32",
        ),
        (lambda: (tiny(), rf.fuse(tiny()), images(channels=4)), "3 \\* 1, got 4 channels"),
        (lambda: (tiny(Labels), rf.fuse(tiny(Labels))), "fast must give a floating-point tensor, got none from Labels"),
        (lambda: (tiny(SevenClasses), rf.fuse(tiny())), r"fast must give \(2, 7, 1, 1\) at"),
        (lambda: (tiny(TinyBackbone), rf.fuse(tiny())), "fast must give outputs of the model's shapes"),
    ],
)
def test_bad_input_of_verify(arguments, message):
    with pytest.raises(InputError, match=message):
        rf.verify(*(*arguments(), images())[:3])


def test_plan():
    plan = rf.explain(rf.fuse(tiny(), backend="reference"), images())
    assert [row.block for row in plan.rows] == BLOCKS
    assert all(row.backend == "reference" and row.algorithm == "torch" for row in plan.rows)
    assert plan.coverage == 1.0
    text = str(plan)
    assert "100.0%" in text and "bottleneck" in text and "\x1b" not in text
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["coverage"] == 1.0 and data["rows"][0]["kernel"] == "stem"


def test_flops_and_coverage():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.GELU())
    fast, x = rf.fuse(model.eval()), images(2, 10)
    plan = rf.explain(fast, x)
    assert [(row.kernel, row.flops) for row in plan.rows] == [
        ("conv_bn_act", 2 * 2 * 100 * 8 * 3 * 9),
        ("unfused", 2 * 2 * 100 * 8 * 8 * 9),
    ]
    assert plan.rows[1].block == "2" and plan.rows[1].why == "no BatchNorm that follows it was found"
    assert plan.coverage == pytest.approx(3 / 11)


def test_transposed_and_grouped_convolutions_are_counted():
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, groups=2), nn.Conv2d(6, 6, 3, groups=3)).eval()
    plan = rf.explain(model, images(1, 5, channels=4))
    assert [row.flops for row in plan.rows] == [2 * 25 * 4 * 3 * 9, 2 * 81 * 6 * 2 * 9]
    assert plan.coverage == 0.0


def test_explain_in_inference_mode_and_of_an_unfused_model():
    x = images()
    with torch.inference_mode():
        assert rf.explain(rf.fuse(tiny()), x).coverage == 1.0
    plan = rf.explain(tiny(), x)
    assert plan.coverage == 0.0 and len(plan.rows) == 13
    with pytest.raises(InputError, match="fast must be in eval mode"):
        rf.explain(tiny().train(), x)


def test_unfused_at_run_time_says_why():
    fast, x = rf.fuse(tiny()), images()
    with rf.nn.unfused():
        assert {row.why for row in rf.explain(fast, x).rows} == {"inside unfused()"}
    with torch.autocast("cpu", torch.bfloat16):
        assert {row.why for row in rf.explain(fast, x).rows} == {"autocast is on"}
