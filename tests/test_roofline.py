"""The roofline: what shapes must do and move, where that places them, what is measured, and explain with it."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from nets import images, tiny
from test_tune import SHAPES
from typer.testing import CliRunner

import resnet_fused as rf
from resnet_fused import cli, roofline, shapes
from resnet_fused.errors import BackendError, InputError
from resnet_fused.report import three_digits
from resnet_fused.roofline import Machine, Placement
from resnet_fused.shapes import BasicBlock, Bottleneck, Conv, DenseBlock, Head, PreActBlock, Stem, Transition
from resnet_fused.tables import render

explain = sys.modules["resnet_fused.explain"]  # the function of this name hides the module
MACHINE = Machine("cpu", "some processor", 2, 10.0, {"fp32": 0.1, "bf16": 1.0})


@pytest.mark.parametrize(
    ("shape", "elements", "by_layers"),
    [
        # input, residual, weights, output
        (Conv(2, 8, 5, 6, 16, 3, 3, padding=(1, 1)), 2 * 8 * 30 + 16 * 8 * 9 + 2 * 16 * 30, None),
        (Conv(2, 8, 5, 6, 16, 1, 1, residual=True), 2 * 8 * 30 + 16 * 8 + 2 * 2 * 16 * 30, None),
        (Conv(2, 8, 5, 6, 16, 3, 3, padding=(1, 1), groups=4), 2 * 8 * 30 + 16 * 2 * 9 + 2 * 16 * 30, None),
        # a 1x1 of stride 2 reads 3x3 of the 5x6 pixels
        (Conv(2, 8, 5, 6, 16, 1, 1, (2, 2)), 2 * 8 * 9 + 16 * 8 + 2 * 16 * 9, None),
        (Conv(2, 8, 5, 6, 16, 2, 2, (2, 2)), 2 * 8 * 4 * 6 + 16 * 8 * 4 + 2 * 16 * 6, None),
        # by layers: 1x1, 3x3, 1x1 with the residual
        (
            Bottleneck(1, 16, 4, 4, 4, 16),
            2 * 256 + 64 + 144 + 64,
            (256 + 64 + 64) + (64 + 144 + 64) + (64 + 64 + 256 + 256),
        ),
        # the 3x3 of stride 2 needs all that the first 1x1 computes, and that all of the input
        (
            Bottleneck(1, 16, 4, 4, 4, 16, 1, 2, projection=True),
            256 + 64 + 144 + 64 + 256 + 64,
            (256 + 64 + 64) + (64 + 144 + 16) + (64 + 256 + 64) + (16 + 64 + 64 + 64),
        ),
        # with stride 2 in the 1x1, a quarter of the input is enough
        (
            Bottleneck(1, 16, 4, 4, 4, 16, 2, 1, projection=True),
            64 + 64 + 144 + 64 + 256 + 64,
            (64 + 64 + 16) + (16 + 144 + 16) + (64 + 256 + 64) + (16 + 64 + 64 + 64),
        ),
        (
            BasicBlock(1, 8, 4, 4, 8, 8),
            2 * 128 + 2 * 576,
            (128 + 576 + 128) + (128 + 576 + 2 * 128),
        ),
        (PreActBlock(1, 8, 4, 4, 8, 8), 2 * 128 + 2 * 576, (128 + 576 + 128) + (128 + 576 + 2 * 128)),
        # by layers the pooling is one more: 8x8 in, 4x4 out
        (Stem(1, 3, 16, 16, 8, 7, 7), 768 + 8 * 147 + 128, (768 + 8 * 147 + 512) + (512 + 128)),
        # 8 channels in, twice 4 more; by layers the input is copied first
        (
            DenseBlock(1, 8, 4, 4, 4, 2),
            128 + 288 + 432 + 256,
            2 * 128 + (128 + 288 + 64) + (192 + 432 + 64),
        ),
        # 5x5 pixels, of which 4x4 are averaged
        (Transition(1, 8, 5, 5, 4), 128 + 32 + 16, (128 + 32) + (32 + 32 + 16)),
        (Head(2, 8, 3, 3, 10), 144 + 80 + 20, (144 + 16) + (16 + 80 + 20)),
    ],
    ids=str,
)
def test_traffic(shape, elements, by_layers):
    for size in (2, 4):
        assert roofline.traffic(shape, size) == elements * size
        assert roofline.layer_traffic(shape, size) == (elements if by_layers is None else by_layers) * size


@pytest.mark.parametrize("shape", [*SHAPES, Head(2, 8, 3, 3, 10)], ids=str)
def test_every_shape_can_be_placed(shape):
    placed = roofline.place(shape, torch.bfloat16, MACHINE)
    assert 0 < placed.bytes <= placed.layer_bytes
    assert placed.flops == sum(layer.flops for layer in shape.layers())
    assert placed.intensity == placed.flops / placed.bytes


def test_the_cases_cover_every_shape():
    chain = getattr(shapes, "BottleneckChain", None)
    tested = {type(shape) for shape in SHAPES} | {Head, chain}
    assert set(shapes.Shape.__args__) <= tested
    if chain:
        placed = roofline.place(chain(1, 16, 4, 4, 4, 2), torch.float32, MACHINE)
        assert placed.bytes == 4 * (2 * 256 + 2 * (64 + 144 + 64))


def test_bound():
    pointwise, late = Conv(1, 64, 56, 56, 256, 1, 1), Conv(1, 512, 7, 7, 512, 3, 3, padding=(1, 1))
    near = Machine("cpu", "", 1, 10.0, {"fp32": 10.0, "bf16": 0.1})
    placed = roofline.place(pointwise, torch.float32, near)
    assert placed.bound == "memory"
    assert placed.bound_seconds == pytest.approx(roofline.traffic(pointwise, 4) / 10e9)
    placed = roofline.place(late, torch.bfloat16, near)
    assert placed.bound == "compute"
    assert placed.bound_seconds == pytest.approx(late.flops / 0.1e12)
    with pytest.raises(InputError, match="measured with, fp32, bf16, got fp16"):
        roofline.place(late, torch.float16, near)


def test_a_model_is_the_sum_of_its_blocks():
    total = roofline.total([Placement(100, 10, 20, 3.0, "memory"), Placement(50, 40, 50, 1.0, "compute")] * 2)
    assert total == Placement(300, 100, 140, 8.0, "memory")


def test_what_a_model_reaches_of_its_bound():
    roof = Placement(6000, 1000, 2000, 0.004, "memory")
    stands = {"flop_per_byte": 6.0, "bound": "memory", "bound_ms": pytest.approx(4.0), "share_of_bound": 0.25}
    assert roofline.standing(roof, 16.0) == stands
    assert roofline.standing(roof, None) == stands | {"share_of_bound": None}
    assert roofline.standing(None, 16.0) == dict.fromkeys(stands)


def test_machine_as_plain_values():
    machine = Machine("cuda", "a GPU", 4, 3000.0, {"bf16": 800.0}, 2.5)
    assert Machine.from_dict(json.loads(json.dumps(machine.to_dict()))) == machine
    assert str(machine) == "copy 3000.0 GB/s, matmul bf16 800 TFLOP/s, launch 2.5 us"
    with pytest.raises(InputError, match=r"a machine must have the fields device, .* got device"):
        Machine.from_dict({"device": "cpu"})


def test_rates_follow_from_the_best_time(monkeypatch):
    sizes = []

    def timed(call, device, spend=0.4, rounds=3):
        call()
        cells = dict(zip(call.__code__.co_freevars, call.__closure__, strict=True))
        sizes.append(next(cells[name].cell_contents for name in ("source", "a") if name in cells))
        return 0.5

    monkeypatch.setattr(roofline, "best_seconds", timed)
    monkeypatch.setattr(roofline, "last_level_cache", lambda: 0)
    machine = roofline.measure("cpu", ("fp32",))
    buffer, matrix = sizes
    assert buffer.nbytes == 256 << 20
    assert machine.copy_gb_s == pytest.approx(2 * buffer.nbytes / 0.5 / 1e9), "bytes read and bytes written"
    n = matrix.shape[0]
    assert machine.matmul_tflop_s == {"fp32": pytest.approx(2 * n**3 / 0.5 / 1e12)}
    assert (machine.device, machine.threads, machine.launch_us) == ("cpu", torch.get_num_threads(), None)


def test_the_best_of_several(monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 4.0, 6.0, 6.0, 16.0, 16.0])  # calls of 3, 2 and 10 seconds
    monkeypatch.setattr(roofline.time, "perf_counter", lambda: next(clock))
    calls = []
    best = roofline.best_seconds(lambda: calls.append(0), torch.device("cpu"), spend=1.0, rounds=3)
    assert (best, len(calls)) == (2.0, 4)


def test_last_level_cache_is_the_largest(tmp_path, monkeypatch):
    for index, size in enumerate(("48K", "2048K", "105M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    monkeypatch.setattr(roofline, "Path", lambda _: tmp_path)
    assert roofline.last_level_cache() == 105 << 20
    monkeypatch.setattr(roofline, "Path", lambda _: tmp_path / "index0")
    assert roofline.last_level_cache() == 0


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("tpu",), InputError, "device must be one of 'cpu', 'cuda', got 'tpu'"),
        (("cpu", ("fp64",)), InputError, "dtype must be one of .* got 'fp64'"),
        (("cuda",), BackendError, "roofline of a GPU needs one"),
    ],
)
def test_bad_input(arguments, error, words):
    if arguments[0] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(error, match=words):
        roofline.measure(*arguments)


# --- explain ------------------------------------------------------------------------------------------------------


def test_explain_places_and_times_every_row(monkeypatch):
    monkeypatch.setattr(explain, "_seconds", lambda call, device: call() is not None and 0.5)
    fast, x = rf.fuse(tiny(), backend="reference"), images()
    plan = rf.explain(fast, x, roofline=MACHINE)
    plain = rf.explain(fast, x)
    assert [row.block for row in plan.rows] == [row.block for row in plain.rows]
    assert plain.machine is None and plain.roof is None and plain.rows[0].roof is None
    assert [row.bytes for row in plan.rows] == [row.bytes for row in plain.rows]
    for row in plan.rows:
        assert row.dtype == "fp32" and row.seconds == 0.5
        assert (row.roof.flops, row.roof.bytes, row.roof.layer_bytes) == (row.flops, row.bytes, row.layer_bytes)
        assert row.share == pytest.approx(row.roof.bound_seconds / 0.5)
    stem = plan.rows[0]
    assert stem.roof == roofline.place(Stem(2, 3, 32, 32, 16, 7, 7), torch.float32, MACHINE)
    assert plan.seconds == 3.0 and plan.roof.flops == sum(row.flops for row in plan.rows)
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["machine"] == MACHINE.to_dict() and data["rows"][0]["roof"]["bytes"] == stem.bytes
    assert "machine" not in plain.to_dict()


def test_explain_places_without_timing():
    fast, x = rf.fuse(tiny(), backend="reference"), images()
    plan = rf.explain(fast, x, roofline=MACHINE, timed=False)
    assert [row.roof for row in plan.rows] == [row.roof for row in rf.explain(fast, x, roofline=MACHINE).rows]
    assert all(row.seconds is None and row.share is None for row in plan.rows) and plan.seconds is None
    assert Placement(**json.loads(json.dumps(plan.to_dict()))["roof"]) == plan.roof
    whole = next(line for line in render(plan, 120).splitlines() if "all of them" in line)
    assert three_digits(plan.roof.bound_seconds * 1e3) in whole and "%" not in whole


def test_explain_measures_this_machine(monkeypatch):
    asked = []
    monkeypatch.setattr(explain, "measure", lambda *given: asked.append(given) or MACHINE)
    plan = rf.explain(rf.fuse(tiny().bfloat16()), images(dtype=torch.bfloat16), roofline=True)
    assert asked == [("cpu", ("bf16",))]
    assert all(0 < row.seconds < 60 for row in plan.rows)


def test_unfused_convolutions_are_placed_too():
    model = torch.nn.Sequential(torch.nn.ConvTranspose2d(4, 6, 3, 2), torch.nn.Conv2d(6, 6, 3)).eval()
    rows = rf.explain(model, images(1, 5, channels=4), roofline=MACHINE).rows
    assert [row.bytes for row in rows] == [4 * (100 + 216 + 6 * 121), 4 * (6 * 121 + 324 + 6 * 81)]
    assert all(row.roof.flops == row.flops and row.share > 0 for row in rows)


def test_explain_of_other_dtypes():
    double = images().double()
    assert rf.explain(rf.fuse(tiny().double()), double).rows[0].dtype == "float64"
    with pytest.raises(InputError, match="x must be in a dtype that the roofline has, fp32, bf16, fp16, got float64"):
        rf.explain(rf.fuse(tiny().double()), double, roofline=True)
    with pytest.raises(InputError, match="fp32, bf16, got fp16"):
        rf.explain(rf.fuse(tiny().half()), images(dtype=torch.half), roofline=MACHINE)


def test_table_fits_120_columns(monkeypatch):
    monkeypatch.setattr(explain, "_seconds", lambda call, device: 0.1234)
    plan = rf.explain(rf.fuse(tiny()), images(), roofline=MACHINE)
    text = render(plan, 120)
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= 120
    row = next(line for line in lines if line.startswith(" layer1.0"))
    assert "bottleneck" in row and " 123 " in row, "a row is one line"
    assert any("all of them" in line and " 740 " in line for line in lines)


def test_command(monkeypatch):
    small = tiny(), images(1)
    monkeypatch.setattr(cli.benchmark, "Job", lambda *given: SimpleNamespace())
    monkeypatch.setattr(cli.benchmark, "prepare", lambda job, dtype: small)
    monkeypatch.setattr(explain, "measure", lambda *given: MACHINE)
    outcome = CliRunner().invoke(cli.app, ["explain", "--roofline"])
    assert outcome.exit_code == 0, outcome.output
    assert "Roofline, fp32: copy 10.0 GB/s" in outcome.stdout
