"""The comparison with peers: rows, parity, contenders that misbehave, processes, energy, what is shown."""

import ctypes
import gc
import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import fake_cudnn
import fake_peers
import numpy
import pytest
import report_samples
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from resnet_fused import bench, cli, environment, models, peers, report
from resnet_fused.errors import InputError
from resnet_fused.peers import cudnn_frontend, energy, jax, onnxruntime, openvino, race, torch_compile, worker
from resnet_fused.peers.peer import EAGER, FUSED, PEER, Peer, Task
from resnet_fused.peers.traced import traced
from resnet_fused.roofline import Machine, Placement

JOB = bench.Job("resnet20_cifar", 2, ("fp32",), seconds=0.0)
TASK = Task("cpu", "fp32", 2, 1)
MACHINE = Machine.from_dict(report_samples.MACHINE)


class SameProcess:
    """Stands in for `race.Process`: no process, so that tests are fast."""

    def __init__(self, peer, folder):
        self.runner = None

    def ask(self, method, limit, **arguments):
        try:
            if method == "start":
                self.runner = worker.Runner(**arguments)
                return None
            return getattr(self.runner, method)(**arguments)
        except Exception as error:
            raise race.Failure(worker.one_line(error)) from None

    def end(self):
        self.runner = None


@pytest.fixture
def quick(monkeypatch):
    """`peers.run` in this process, on a machine that need not be measured."""
    monkeypatch.setattr(race, "Process", SameProcess)
    monkeypatch.setattr(race, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(race.roofline, "measure", lambda device, dtypes: MACHINE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would wait for each other where the machine is busy
    yield
    torch.set_num_threads(threads)
    gc.unfreeze()


def compare(*contenders, job=JOB, on_progress=lambda what, share: None):
    return peers.run(job, on_progress, field_of=lambda task: list(contenders))


def by_name(result):
    return {row["name"]: row for row in result["rows"]}


def test_everyone_gets_a_row(quick):
    bad = [getattr(fake_peers, name) for name in ("SHIFTED", "TRANSPOSED", "POISONED", "REFUSING", "TIRING", "ABSENT")]
    result = compare(*fake_peers.HONEST, *bad)
    rows = by_name(json.loads(json.dumps(result)))
    status = {name: row["status"] for name, row in rows.items()}
    assert status == {
        "eager": "ok",
        "eager channels_last": "ok",
        "fused": "ok",
        "fused fast": "ok",
        "shifted": "wrong",
        "transposed": "wrong",
        "poisoned": "wrong",
        "refusing": "failed",
        "tiring": "failed",
        "absent": "absent",
    }
    assert rows["absent"]["detail"] == "made for another machine"
    assert rows["refusing"]["detail"] == "ValueError: it cannot be set up and says so in two lines"
    assert rows["refusing"]["version"] is None
    assert rows["tiring"]["detail"] == "RuntimeError: out of memory"
    assert "1.0e+00" in rows["shifted"]["detail"]
    assert rows["poisoned"]["detail"] == "an output is NaN or infinite"
    assert "(10, 2)" in rows["transposed"]["detail"]
    for name, row in rows.items():
        timed = status[name] in ("ok", "wrong")
        assert (len(row["ms_samples"]) >= race.MIN_ROUNDS) == timed, name
        assert (row["images_per_s"] is not None) == (timed or name == "tiring"), "what was measured is kept"
        assert row["memory"] == "reused"
    assert rows["eager channels_last"]["speedup"] == 1
    assert rows["eager channels_last"]["error"] == rows["fused"]["unfused_error"] > 0
    assert rows["fused"]["error"] <= rows["fused"]["limit"] < rows["fused fast"]["limit"]
    assert rows["fused"]["flipped"] == 0
    assert rows["fused"]["settings"]["accuracy"] == "strict"
    assert rows["fused"]["setup_seconds"] > 0
    assert [row["kind"] for row in result["rows"][:5]] == [EAGER, EAGER, FUSED, FUSED, PEER]

    assert result["parity"]["ok"]
    assert (result["schema"], result["peers"], result["interrupted"]) == (bench.SCHEMA, True, False)
    assert result["machine"] == report_samples.MACHINE
    assert {(plan["dtype"], plan["accuracy"]) for plan in result["plans"]} == {("fp32", "strict"), ("fp32", "fast")}
    assert all(plan["coverage"] == 1 for plan in result["plans"])


def test_every_row_is_placed_on_the_roofline_of_the_run(quick):
    job = bench.Job("resnet20_cifar", 2, ("fp32", "bf16"), seconds=0.0)
    result = json.loads(json.dumps(compare(*fake_peers.HONEST[:3], fake_peers.ABSENT, job=job)))
    for dtype in ("fp32", "bf16"):
        (plan,) = [plan for plan in result["plans"] if plan["dtype"] == dtype]
        roof = Placement(**plan["roof"])
        parts = [Placement(**row["roof"]) for row in plan["rows"]]
        assert roof == race.roofline.total(parts) and roof.bytes == sum(row["bytes"] for row in plan["rows"])
        for row in (row for row in result["rows"] if row["dtype"] == dtype):
            assert (row["flop_per_byte"], row["bound"]) == (roof.intensity, roof.bound)
            assert row["bound_ms"] == pytest.approx(roof.bound_seconds * 1e3)
            timed = row["status"] == "ok"
            assert row["share_of_bound"] == (pytest.approx(row["bound_ms"] / row["ms_median"]) if timed else None)


def test_without_a_fused_model_there_is_no_bound(quick):
    rows = compare(*fake_peers.HONEST[:2])["rows"]
    assert [(row["bound"], row["share_of_bound"]) for row in rows] == [(None, None)] * 2


def test_clocks_before_and_after_the_turns(quick, monkeypatch):
    moment = ["start"]
    monkeypatch.setattr(
        environment, "clocks", lambda device: {"cores_mhz": [2000.0 if "turns" in moment[0] else 1000.0]}
    )
    result = compare(*fake_peers.HONEST[:3], on_progress=lambda what, share: moment.__setitem__(0, what))
    assert result["clocks"]["before"] == {"cores_mhz": [1000.0]}
    assert result["clocks"]["after"] == {"cores_mhz": [2000.0]}


def test_fused_model_with_other_numbers_fails_parity(quick):
    result = compare(*fake_peers.HONEST[:2], fake_peers.WRONG_FUSED)
    assert by_name(result)["fused"]["status"] == "wrong"
    assert not result["parity"]["ok"]


def test_dtypes_are_apart(quick):
    job = bench.Job("resnet20_cifar", 1, ("fp32", "bf16"), seconds=0.0)
    result = compare(*fake_peers.HONEST[:3], job=job)
    assert [row["dtype"] for row in result["rows"]] == ["fp32"] * 3 + ["bf16"] * 3
    errors = [row["unfused_error"] for row in result["rows"]]
    assert errors[0] == errors[1] == errors[2]
    assert errors[3] > 100 * errors[0]
    assert result["parity"]["ok"]


@pytest.mark.parametrize(("moment", "timed"), [("machine", 0), ("set-up, fused", 0), ("taking turns", 1)])
def test_interrupted_run_keeps_what_it_had(quick, moment, timed):
    seen = 0

    def interrupt(what, share):
        nonlocal seen
        if what.endswith(moment):
            seen += 1
            if seen > timed:
                raise KeyboardInterrupt

    result = compare(*fake_peers.HONEST[:3], on_progress=interrupt)
    assert result["interrupted"]
    rows = result["rows"]
    if moment == "machine":
        assert rows == []
    elif moment == "taking turns":
        assert all(row["status"] == "ok" and row["ms_samples"] for row in rows)
    else:
        assert [row["status"] for row in rows] == ["failed"] * 3
        assert [row["detail"] for row in rows] == ["interrupted before it was timed"] * 2 + [
            "interrupted before it was set up"
        ]
    assert result["parity"]["ok"] == (moment == "taking turns")
    json.dumps(result)


def test_no_reference_no_parity(quick, monkeypatch):
    def fail(self):
        raise MemoryError("too large")

    monkeypatch.setattr(worker.Runner, "reference", fail)
    result = compare(*fake_peers.HONEST[:3])
    assert not result["parity"]["ok"]
    for row in result["rows"]:
        assert row["status"] == "ok"
        assert "MemoryError: too large" in row["detail"]
        assert row["error"] is None


def test_what_counts_as_the_same_numbers():
    def status(peer, off, dtype="fp32"):
        exact = numpy.array([[100.0, 0.0], [0.0, 50.0]])
        entries = [race.Entry(fake_peers.HONEST[1]), race.Entry(peer)]
        for entry, error in zip(entries, (1e-4, off), strict=True):
            entry.status, entry.setup = "ok", {"blocks": 3}
            entry.compare(exact + error, exact)
        task = Task("cpu", dtype, 2, 1)
        race.Race(JOB, task, entries, Path(), 1.0, MACHINE).judge(100.0)
        return entries[1].status

    strict, fast, peer = fake_peers.HONEST[2], fake_peers.HONEST[3], fake_peers.SHIFTED
    assert status(strict, 2.0e-4) == "ok"
    assert status(strict, 2.3e-4) == "wrong"
    assert status(fast, 2.9e-3) == "ok", "1e-5 of the largest logit for each of three blocks"
    assert status(fast, 3.1e-3) == "wrong"
    assert status(fast, 2.9e-3, "bf16") == "wrong"
    assert status(peer, 9e-3) == "ok"
    assert status(peer, 1.1e-2) == "wrong"
    assert status(peer, float("nan")) == "wrong"


def test_flipped_predictions():
    exact = numpy.array([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    assert race.flips(exact[:, ::-1], exact) == 3
    assert race.flips(exact * 2, exact) == 0
    assert race.flips(exact[:, :, None, None], exact[:, :, None, None]) is None, "images are no predictions"


# --- blocks -------------------------------------------------------------------------------------------------------


def test_a_block_is_compared_as_a_model(quick):
    result = compare(*fake_peers.HONEST, job=bench.Job("resnet20_cifar/layer2.0", 2, ("fp32",), seconds=0.0))
    assert result["parity"]["ok"] and result["model"] == "resnet20_cifar/layer2.0"
    assert [row["status"] for row in result["rows"]] == ["ok"] * 4
    assert [row["flipped"] for row in result["rows"]] == [None] * 4
    assert [[row["kernel"] for row in plan["rows"]] for plan in result["plans"]] == [["basic_block"]] * 2
    (plan, _) = result["plans"]
    weights = 9 * 16 * 32 + 9 * 32 * 32 + 16 * 32  # the last of the projection
    assert plan["rows"][0]["bytes"] == 4 * (2 * 16 * 32 * 32 + 2 * 32 * 16 * 16 + weights)


def test_every_distinct_block_has_its_rows(quick, monkeypatch):
    monkeypatch.setattr(race, "contenders", lambda *arguments: fake_peers.HONEST[:3])
    told = []
    result = peers.run_blocks(bench.Job("resnet20_cifar", 2, ("fp32", "bf16"), seconds=0.0), lambda *a: told.append(a))
    labels = ["conv1..relu 3x32x32", "layer1.0 16x32x32", "layer2.0 16x32x32", "layer2.1 32x16x16"]
    labels += ["layer3.0 32x16x16", "layer3.1 64x8x8"]
    assert list(dict.fromkeys(row["block"] for row in result["rows"])) == labels
    found = [(row["dtype"], row["name"]) for row in result["rows"] if row["block"] == labels[3]]
    assert found == [(dtype, peer.name) for dtype in ("fp32", "bf16") for peer in fake_peers.HONEST[:3]]
    assert all(row["status"] == "ok" and len(row["ms_samples"]) >= race.MIN_ROUNDS for row in result["rows"])
    assert [plan["block"] for plan in result["plans"]] == [label for label in labels for _ in range(2)]
    assert (result["kind"], result["model"], result["peers"]) == ("blocks", "resnet20_cifar", True)
    assert result["machine"] == report_samples.MACHINE and result["parity"]["ok"] and not result["interrupted"]
    assert [share for _, share in told] == sorted(share for _, share in told)
    json.dumps(result)


@pytest.mark.parametrize("wrong", [False, True])
def test_blocks_interrupted_or_wrong(quick, monkeypatch, wrong):
    def run(job, on_progress, only, limit):
        asked.append(job.model)
        result = report_samples.with_peers(job.model)
        for row in result["rows"]:
            if row["kind"] == "fused":
                row |= {"error": {2: 2.0 if wrong else 0.0, 3: None}.get(len(asked), 0.0), "limit": 1.0}
        changed = {"interrupted": len(asked) == 3}
        changed["clocks"] = {moment: {"cores_mhz": [f"{moment} {len(asked)}"]} for moment in ("before", "after")}
        return result | changed

    asked = []
    monkeypatch.setattr(race, "run", run)
    result = peers.run_blocks(JOB)
    assert asked == [f"resnet20_cifar/{name}" for name in ("conv1..relu", "layer1.0", "layer2.0")]
    assert result["interrupted"] and result["parity"]["ok"] != wrong, "what was not reached counts neither way"
    assert result["clocks"] == {"before": {"cores_mhz": ["before 1"]}, "after": {"cores_mhz": ["after 3"]}}
    assert len(result["rows"]) == 3 * len(report_samples.with_peers()["rows"]), "what was measured is kept"
    with pytest.raises(InputError, match=r"model must be a whole one, .* got 'resnet20_cifar/layer1.0'"):
        peers.run_blocks(bench.Job("resnet20_cifar/layer1.0", 2, ("fp32",)))


def test_memory_that_contenders_keep():
    entries = [race.Entry(fake_peers.SHIFTED, process="some", setup={"peak_extra_mb": mb}) for mb in (None, 1e9)]
    short = race.Race(JOB, TASK, entries[:1], Path(), 1.0, MACHINE)
    assert not short.short_of_memory()
    assert race.Race(JOB, TASK, entries, Path(), 1.0, MACHINE).short_of_memory()


# --- processes ----------------------------------------------------------------------------------------------------


def saved(folder):
    """A file of a model and its input, as `race` writes it."""
    path = folder / "model.pt"
    torch.save((bench.make_model("resnet20_cifar"), torch.rand(2, 3, 32, 32)), path)
    return path


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function that starts a contender's process, far enough to be set up."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    begun = []
    model = saved(tmp_path)

    def begin(peer):
        process = race.Process(peer, tmp_path)
        begun.append(process)
        process.ask("start", 300, peer=peer, model=model, task=TASK)
        return process

    yield begin
    for process in begun:
        process.end()


def state(process):
    """The letter of /proc: R running, S sleeping, T stopped."""
    return Path(f"/proc/{process.process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_process_is_stopped_while_it_waits_and_killed_when_it_hangs(start):
    process = start(fake_peers.HANGING)
    assert eventually(lambda: state(process) == "T")
    with pytest.raises(race.Failure, match="no answer within 1 s"):
        process.ask("set_up", 1, machine=MACHINE)
    process.end()
    assert process.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("peer", "words"),
    [
        ("CRASHING", "its process was ended by SIGSEGV$"),
        ("KILLED", "its process was ended by SIGKILL, perhaps for want of memory$"),
        ("LEAVING", "its process ended with status 3: it wrote nothing$"),
    ],
)
def test_how_a_process_died(start, peer, words):
    process = start(getattr(fake_peers, peer))
    with pytest.raises(race.Failure, match=words):
        process.ask("set_up", 300, machine=MACHINE)


def eventually(condition, seconds=20.0):
    """Whether the condition comes true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.thorough
def test_real_processes_and_all_peers_of_this_machine():
    result = peers.run(bench.Job("resnet20_cifar", 2, ("fp32", "bf16"), seconds=0.2))
    assert result["parity"]["ok"]
    for row in result["rows"]:
        assert row["status"] in ("ok", "absent"), row
        if row["kind"] != PEER:
            assert row["peak_extra_mb"] is not None
    assert result["machine"]["copy_gb_s"] > 0


# --- who takes part -----------------------------------------------------------------------------------------------


def names(*task, **options):
    return [peer.name for peer in peers.contenders(Task(*task, 1), ("strict", "fast"), **options)]


def test_contenders():
    cpu = ["eager", "eager channels_last", "torch.compile, freezing", "ONNX Runtime", "OpenVINO", "JAX"]
    cpu += ["fused", "fused fast"]
    assert names("cpu", "fp32", 1) == cpu
    gpu = names("cuda", "bf16", 1)
    assert {"eager AMP", "eager channels_last, CUDA graph", "fused, CUDA graph", "cuDNN fused", "TensorRT"} <= set(gpu)
    assert {"cuDNN frontend", "JAX"} <= set(gpu)
    assert len(set(gpu)) == len(gpu)
    assert not any("graph" in name for name in names("cuda", "bf16", 2))
    assert "eager AMP" not in names("cuda", "fp32", 1)
    assert names("cpu", "fp32", 1, only=("OpenVINO",)) == [*cpu[:2], "OpenVINO", "fused", "fused fast"]
    layered = "oneDNN layer-fused"
    assert names("cpu", "fp32", 1, only=("OpenVINO",), block=True)[:4] == [*cpu[:2], layered, "OpenVINO"]
    assert layered not in names("cuda", "fp32", 1, block=True)


def test_unknown_peer():
    with pytest.raises(InputError, match=r"peers must be some of .*'OpenVINO'.*got 'OpenVIN'"):
        names("cpu", "fp32", 1, only=("OpenVIN",))


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert onnxruntime.absent(TASK) == "onnxruntime and onnx and onnxscript not installed"
    assert openvino.absent(TASK) == "openvino not installed"
    assert jax.absent(TASK) == "jax not installed"
    assert cudnn_frontend.absent(TASK) == "cudnn not installed"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if "plugin" in name else name)
    assert jax.absent(TASK) is None
    assert "neither jax_cuda13_plugin nor jax_cuda12_plugin" in jax.absent(Task("cuda", "bf16", 2, 1))


class Tiny(nn.Module):
    """A network that is exported quickly."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))


@pytest.fixture
def restored(monkeypatch):
    """The environment, which the JAX peer changes, is as before afterwards."""
    for name in ("NPROC", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        monkeypatch.setenv(name, "")


@pytest.mark.parametrize(
    ("peer", "dtype"),
    [
        pytest.param(onnxruntime.ONNX_RUNTIME, "fp32", marks=pytest.mark.thorough),
        (openvino.OPENVINO, "fp32"),
        pytest.param(openvino.OPENVINO, "bf16", marks=pytest.mark.thorough),
        pytest.param(torch_compile.FREEZING, "fp32", marks=pytest.mark.thorough),
        (jax.JAX, "fp32"),
        (jax.JAX, "bf16"),
    ],
    ids=lambda value: value.name if isinstance(value, Peer) else value,
)
def test_peers_compute_the_model(peer, dtype, restored):
    task = Task("cpu", dtype, 2, 1)
    if reason := peer.absent(task):
        pytest.skip(reason)
    model = Tiny().eval().to(bench.DTYPES[dtype])
    x = torch.randn(2, 3, 16, 16).to(bench.DTYPES[dtype])
    with torch.inference_mode():
        expected = model(x).float()
    ready = peer.prepare(model, x, task)
    with torch.inference_mode():
        first, second = (ready.output(ready.call()).float() for _ in range(2))
    torch.testing.assert_close(first, expected, rtol=2e-2, atol=1e-5 if dtype == "fp32" else 1e-2)
    assert torch.equal(first, second)
    json.dumps(ready.settings)


class Every(nn.Module):
    """Every operator that a traced model may hold, many of them in place."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.norm = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=2, dilation=2, bias=False)
        self.norm2 = nn.BatchNorm2d(16, affine=False)
        self.conv3 = nn.Conv2d(16, 16, 1, bias=False)
        self.fc1, self.fc2 = nn.Linear(32 * 4, 16, bias=False), nn.Linear(48, 4)

    def forward(self, x):
        x = self.pool(self.stem(x))
        x += self.norm1(self.conv1(self.norm(x).relu_()))
        before = x
        x = self.norm2(self.conv2(x.relu_()))
        y = nn.functional.pad(before[:, :, ::2, ::2], (0, 0, 0, 0, 3, 5))  # `before` has been through the ReLU
        y = y.add_(x).relu_()
        x = torch.cat([y, self.conv3(y)], 1)
        pooled = nn.functional.avg_pool2d(x, 3, 2, 1)
        wide = nn.functional.dropout(
            self.fc1(torch.flatten(nn.functional.adaptive_avg_pool2d(pooled, 2), 1)), 0.5, False
        )
        narrow = nn.functional.adaptive_avg_pool2d(pooled, 1)
        return self.fc2(torch.cat([wide, narrow.mean((2, 3))], -1))


@pytest.fixture(scope="module")
def every():
    """A model in eval mode, an input, and what they give."""
    torch.manual_seed(0)
    model = models.randomize_batchnorms(Every()).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        return model, x, model(x)


def targets(module):
    """Names of the operators in a graph."""
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


def test_traced_model(every):
    model, x, expected = every
    module = traced(model, x)
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
    assert not [target for target in targets(module) if "_." in target]
    assert targets(module).count("aten.batch_norm.default") == 1, "that before the convolution; three are folded"
    assert torch.equal(model(x), expected), "the model is as it was"


def test_jax_has_every_operator(every, restored):
    pytest.importorskip("jax")
    model, x, expected = every
    ready = jax.prepare(model, x, TASK)
    torch.testing.assert_close(ready.output(ready.call()), expected, rtol=1e-5, atol=1e-5)


def test_jax_gives_images_as_torch_does(restored):
    pytest.importorskip("jax")
    torch.manual_seed(0)
    model, x = nn.Conv2d(3, 5, 3).eval(), torch.randn(2, 3, 8, 9)
    ready = jax.prepare(model, x, TASK)
    with torch.no_grad():
        torch.testing.assert_close(ready.output(ready.call()), model(x), rtol=1e-5, atol=1e-5)


def test_jax_names_the_operator_that_it_lacks(restored):
    pytest.importorskip("jax")
    with pytest.raises(NotImplementedError, match=r"aten.gelu.default is not translated to JAX"):
        jax.prepare(nn.GELU(), torch.ones(1, 1, 2, 2), TASK)
    with pytest.raises(NotImplementedError, match="ceil_mode=True"):
        jax.prepare(nn.MaxPool2d(2, ceil_mode=True), torch.ones(1, 1, 3, 3), TASK)


@pytest.fixture
def cudnn(monkeypatch):
    """A stand-in for cuDNN, which need not have a GPU."""
    monkeypatch.setitem(sys.modules, "cudnn", fake_cudnn)
    monkeypatch.setattr(fake_cudnn, "refused", set())
    monkeypatch.setattr(fake_cudnn, "streams", [])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=11))
    return fake_cudnn


def test_cudnn_graphs_compute_the_model(every, cudnn):
    model, x, expected = every
    ready = cudnn_frontend.prepare(model, x, TASK)
    with torch.inference_mode():
        torch.testing.assert_close(ready.output(ready.call()), expected, rtol=1e-5, atol=1e-5)
    assert (ready.settings["fused_convolutions"], ready.settings["unfused_convolutions"]) == (4, 0)
    assert cudnn.streams == [11, 11], "before every pass"
    json.dumps(ready.settings)


def test_what_cudnn_graphs_take_in(every, cudnn):
    model, x, _ = every
    module = traced(model, x)
    layers = cudnn_frontend.fuse_convolutions(module, tf32=False, dtype="fp32", handle="handle")
    calls = [node for node in module.graph.nodes if node.op == "call_module"]
    assert [layer.relu for layer in layers] == [True, True, True, False]
    assert [call.args[1] is not None for call in calls] == [False, True, True, False]
    assert [target for target in targets(module) if "relu" in target or "add." in target] == ["aten.relu.default"]
    module(x)
    assert all(layer.plan[0].notes == ["tensor core"] for layer in layers), "float32 without TF32"


def test_convolutions_that_cudnn_refuses(every, cudnn):
    model, x, expected = every
    cudnn.refused |= {3, 8}
    ready = cudnn_frontend.prepare(model, x, TASK)
    torch.testing.assert_close(ready.output(ready.call()), expected, rtol=1e-5, atol=1e-5)
    assert (ready.settings["fused_convolutions"], ready.settings["unfused_convolutions"]) == (1, 3)
    cudnn.refused |= {16}
    with pytest.raises(RuntimeError, match="no fused plan for any convolution: no engine"):
        cudnn_frontend.prepare(model, x, TASK)


# --- energy -------------------------------------------------------------------------------------------------------


def test_processor_energy_adds_packages_and_wraps_around(tmp_path, monkeypatch):
    for name, now in (("intel-rapl:0", 90), ("intel-rapl:1", 10), ("intel-rapl:0:0", 999)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "max_energy_range_uj").write_text("100")
        (tmp_path / name / "energy_uj").write_text(str(now))
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    read = energy.cpu_meter()
    assert read is not None
    assert read() == 0
    (tmp_path / "intel-rapl:0/energy_uj").write_text("20")  # 30 more, past the end of the range
    (tmp_path / "intel-rapl:1/energy_uj").write_text("15")
    assert read() == pytest.approx(35e-6)


def test_no_energy_where_it_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    assert energy.cpu_meter() is None
    (tmp_path / "intel-rapl:0").mkdir()  # without files, as for a user who may not read them
    assert energy.cpu_meter() is None


def test_gpu_energy_and_clocks_are_those_of_the_gpu_in_use(monkeypatch):
    asked = []

    class Nvml:
        def nvmlInit_v2(self):
            return 0

        def nvmlDeviceGetHandleByUUID(self, uuid, handle):
            asked.append(uuid)
            return 0

        def nvmlDeviceGetTotalEnergyConsumption(self, handle, value):
            value._obj.value = 2500
            return 0

        def nvmlDeviceGetClockInfo(self, handle, kind, value):
            value._obj.value = 1980
            return 0 if kind == 1 else 3  # NVML_CLOCK_SM; NVML_ERROR_NOT_SUPPORTED

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Nvml())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"abc-{device}"))
    read = energy.gpu_meter()
    assert read is not None
    assert read() == 2.5
    assert asked == [b"GPU-abc-1"]
    assert environment.clocks("cuda") == {"sm_mhz": 1980}, "without that which the GPU does not tell"


def test_nothing_is_told_of_a_gpu_without_nvml(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert energy.gpu_meter() is None
    assert environment.clocks("cuda") is None


def test_joules_of_an_image(monkeypatch, tmp_path):
    runner = worker.Runner(fake_peers.HONEST[0], saved(tmp_path), TASK)
    runner.set_up(MACHINE)
    monkeypatch.setattr(worker, "meter", lambda device: None)
    assert runner.joules(0.0) is None
    used = iter((100.0, 110.0))
    calls = []
    monkeypatch.setattr(worker, "meter", lambda device: partial(next, used))
    monkeypatch.setattr(runner, "call", lambda: calls.append(1))
    joules = runner.joules(0.001)
    assert joules == pytest.approx(10.0 / (2 * (len(calls) - 1))), "two images a call, the first call not counted"


# --- what is shown ------------------------------------------------------------------------------------------------


def printed(result):
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 (the console keeps it)
    report.print_result(result, console)
    return console.export_text()


def test_table_shows_who_wins():
    text = printed(report_samples.with_peers(fused=12.0, fast=10.0))
    assert "fp32 fused: 12.0 images/s, 1.09x, faster than the best peer, OpenVINO, with 11.0" in text
    assert "fp32 fused fast: 10.0 images/s, 0.91x, SLOWER than the best peer, OpenVINO, with 11.0" in text
    assert "TensorRT: absent, tensorrt not installed" in text
    assert "JAX: failed, no answer within 900 s" in text
    assert "machine: copy 20.0 GB/s, matmul fp32 0.2 TFLOP/s" in text
    assert "clocks: cores 2500 to 3100 MHz before, cores 3100 MHz after" in text
    assert "OpenVINO: graph=all, threads=2" in text
    order = [line.split()[0] for line in text.partition("images/s")[2].splitlines()[2:4]]
    assert order == ["cheat", "fused"], "the fastest is first, wrong or not"


def test_table_shows_the_share_of_the_bound():
    result = report_samples.with_peers()
    for row in result["rows"]:
        row |= {"flop_per_byte": 51.8, "bound": "compute", "bound_ms": 8.04, "share_of_bound": 0.097}
    text = printed(result)
    assert "roofline: 52 FLOP/byte, at least 8.04 ms (compute)" in text
    assert "of bound" in text and " 10% " in next(line for line in text.splitlines() if line.startswith(" fused "))
    assert "roofline:" not in printed(report_samples.with_peers()), "a result from before this was recorded"


def test_short_times_have_three_digits():
    text = printed(report_samples.with_peers(fused=3000.0))
    assert "0.333  0.327-0.337" in next(line for line in text.splitlines() if line.startswith(" fused "))


def test_table_of_a_run_without_anything():
    result = report_samples.with_peers()
    for row in result["rows"]:
        row |= {"images_per_s": None, "status": "failed", "detail": "gone"}
    text = printed(result | {"interrupted": True})
    assert "fp32 fused: not timed" in text
    assert "Interrupted" in text


def test_plot_of_peers(tmp_path):
    report.plot(report_samples.with_peers(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("interrupted", "ok", "code"), [(False, True, 0), (False, False, 1), (True, True, 130)])
def test_command(monkeypatch, tmp_path, interrupted, ok, code):
    result = report_samples.with_peers() | {"interrupted": interrupted, "parity": {"ok": ok, "reports": []}}
    monkeypatch.setattr(cli.comparison, "run", lambda job, on_progress: result)
    path = tmp_path / "out.json"
    outcome = CliRunner().invoke(cli.app, ["bench", "resnet18", "--batch", "1", "--peers", "--json", str(path)])
    assert outcome.exit_code == code, outcome.output
    assert json.loads(path.read_text())["peers"] is True
