"""The benchmark's parts: pictures, timing, percentiles, memory, results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resnet_fused import bench, environment, report
from resnet_fused.errors import InputError, WorkerError

ROOT = Path(__file__).parent.parent


def result(dtypes: tuple[str, ...] = ("fp32", "bf16")) -> dict:
    """Return a small result of the benchmark's shape."""
    rows = []
    for dtype in dtypes:
        for memory in ("default", "reused"):
            for contender in bench.Job(dtypes=dtypes).contenders(dtype):
                factor = 2.0 if contender.accuracy else 1.0
                timed = {
                    "name": contender.name,
                    "accuracy": contender.accuracy,
                    "ms_samples": [t / factor for t in (90.0, 100.0, 110.0)],
                }
                rows.append(bench.summarise(timed, dtype, memory, 16, 100.0) | {"peak_extra_mb": 1.0, "kept_mb": None})
    return {
        "device": "cpu",
        "device_name": "some processor",
        "isa": "avx2",
        "threads": 2,
        "model": "resnet50",
        "dtype": ",".join(dtypes),
        "batch": 16,
        "versions": {"torch": "2.13.0"},
        "baseline": bench.BASELINE,
        "rows": rows,
        "parity": {"ok": True, "reports": []},
        "plans": [],
    }


def test_pictures_are_normalised_and_all_different():
    pictures = bench.real_pictures(34, size=32)
    assert pictures.shape == (34, 3, 32, 32)
    assert pictures.isfinite().all()
    assert pictures.abs().max() < 3
    assert len({picture.numpy().tobytes() for picture in pictures}) == 34


def test_models_are_seeded_with_every_batchnorm_random():
    first, second = bench.make_model("resnet18"), bench.make_model("resnet18")
    assert not first.training
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
        if ".bn" in name and a.is_floating_point():
            assert a.std() > 0, f"{name} is the same for every channel"


def test_interleave_calls_everyone_as_often():
    seen: list[str] = []
    shares: list[float] = []
    calls = {name: lambda name=name: seen.append(name) for name in "abc"}
    samples = bench.interleave(calls, seconds=0, on_progress=shares.append, min_rounds=4)
    assert {len(times) for times in samples.values()} == {4}
    assert sorted(seen) == sorted("abc" * (4 + 2)), "two warm-up rounds and four timed ones"
    assert len({tuple(seen[i : i + 3]) for i in range(6, len(seen), 3)}) > 1, "the order must change"
    assert shares == sorted(shares)


def test_summary_of_a_row():
    row = bench.summarise({"name": "fused", "ms_samples": [10.0, 30.0, 20.0]}, "fp32", "default", 4, 50.0)
    assert row["ms_median"] == 20
    assert row["images_per_s"] == pytest.approx(200)
    assert row["speedup"] == pytest.approx(2.5)
    assert (row["ms_p20"], row["ms_p80"]) == pytest.approx((14, 26))


def test_rows_to_measure():
    def names(dtype: str, accuracy: str | None = None) -> list[str]:
        return [contender.name for contender in bench.Job(accuracy=accuracy).contenders(dtype)]

    assert names("fp32") == ["eager", "eager channels_last", "fused", "fused fast"]
    assert names("bf16") == ["eager", "eager channels_last", "fused"]
    assert names("fp32", "fast") == ["eager", "eager channels_last", "fused fast"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": "resnet51"}, ["model", "resnet50", "resnet51"]),
        ({"dtypes": ("fp64",)}, ["dtype", "bf16", "fp64"]),
        ({"device": "tpu"}, ["device", "cpu", "tpu"]),
        ({"accuracy": "sloppy"}, ["accuracy", "strict", "sloppy"]),
        ({"batch": 0}, ["batch", "1", "0"]),
    ],
)
def test_bad_job(arguments, words):
    with pytest.raises(InputError) as error:
        bench.Job(**arguments)
    assert all(word in str(error.value) for word in words)


def test_clocks_of_the_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(environment, "CPUFREQ", tmp_path)
    assert environment.clocks("cpu") is None, "no such system"
    (tmp_path / "cpuinfo").write_text("model name\t: some\ncpu MHz\t\t: 2596.142\n\ncpu MHz\t\t: 800.000\n")
    assert environment.clocks("cpu") == {"cores_mhz": [2596.142, 800.0]}
    (tmp_path / "cpuinfo").write_text("model name\t: some\ncpu MHz\t\t: Unknown\n")
    assert environment.clocks("cpu") is None
    (tmp_path / "cpu0" / "cpufreq").mkdir(parents=True)
    (tmp_path / "cpu0" / "cpufreq" / "scaling_cur_freq").write_text("1800500\n")
    assert environment.clocks("cpu") == {"cores_mhz": [1800.5]}


def test_clocks_before_and_after_the_run(monkeypatch):
    now = iter(({"cores_mhz": [1000.0]}, {"cores_mhz": [2000.0]}))
    monkeypatch.setattr(environment, "clocks", lambda device: next(now))
    monkeypatch.setattr(bench, "check_parity", lambda job, dtype, accuracy: ({"ok": True}, {}))
    monkeypatch.setattr(bench, "run_worker", worker)
    found = bench.run(bench.Job("resnet20_cifar", 1, ("bf16",)))
    assert found["clocks"] == {"before": {"cores_mhz": [1000.0]}, "after": {"cores_mhz": [2000.0]}}
    assert report.clocks(found) == "cores 1000 MHz before, cores 2000 MHz after"


@pytest.mark.parametrize(("device", "settings"), [("cpu", {"default", "reused"}), ("cuda", {"default"})])
def test_allocator_settings(monkeypatch, device, settings):
    """Those of the C library change nothing on a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(environment, "clocks", lambda device: None)
    monkeypatch.setattr(environment, "device_name", lambda device: "a device")
    monkeypatch.setattr(bench, "check_parity", lambda job, dtype, accuracy: ({"ok": True}, {}))
    monkeypatch.setattr(bench, "run_worker", worker)
    found = bench.run(bench.Job("resnet20_cifar", 1, ("bf16",), device))
    assert {row["memory"] for row in found["rows"]} == settings


def worker(spec, reuse, on_progress):
    """Stands in for `bench.run_worker`."""
    if spec["task"] == "weigh":
        return {"kept_mb": None, "peak_extra_mb": None}
    return [{"name": contender.name, "ms_samples": [1.0]} for contender in bench.Job().contenders(spec["dtype"])]


@pytest.mark.parametrize(
    ("clocks", "words"),
    [
        (None, ""),
        ({"before": None, "after": None}, ""),
        ({"before": None, "after": {"cores_mhz": [2596.1, 800.0, 3000.0]}}, "cores 800 to 3000 MHz after"),
        (
            {"before": {"sm_mhz": 345, "memory_mhz": 2619}, "after": {"sm_mhz": 1980}},
            "SM 345 MHz and memory 2619 MHz before, SM 1980 MHz after",
        ),
    ],
)
def test_clocks_in_words(clocks, words):
    assert report.clocks({"clocks": clocks}) == words
    assert report.clocks({}) == "", "a result from before clocks were recorded"


def test_worker_failure_names_the_cause():
    with pytest.raises(WorkerError, match=r"benchmark worker 'time' ended with status 1: KeyError: 'job'$"):
        bench.run_worker({"task": "time"}, False, lambda share: None)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_weighing_sees_a_large_tensor():
    code = """
from pathlib import Path
import torch
from resnet_fused import bench
torch.ones(1)
before, _ = bench.resident_mb()
Path("/proc/self/clear_refs").write_text("5")
torch.ones(64 << 18)  # 64 MiB, freed at once
now, peak = bench.resident_mb()
print(now - before, peak - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    kept, extra = map(float, out.split())
    assert kept < 16
    assert 60 < extra < 80


def test_plot_is_a_png(tmp_path):
    for dtypes in (("fp32",), ("fp32", "bf16")):
        report.plot(result(dtypes), tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_markdown_has_a_line_for_every_row():
    lines = report.markdown_table(result()).splitlines()
    assert sum(line.startswith(("| fp32", "| bf16")) for line in lines) == len(result()["rows"])
    assert "**fused fast, memory reused**" in report.markdown_table(result())


def test_committed_results_have_the_documented_shape():
    paths = list(ROOT.glob("benchmarks/results/*/main.json"))
    assert paths
    for path in paths:
        committed = json.loads(path.read_text())
        assert {"device", "model", "dtype", "batch", "versions", "rows", "parity"} <= committed.keys()
        assert committed["parity"]["ok"]
        for row in committed["rows"]:
            assert {"name", "images_per_s", "ms_median", "ms_samples", "speedup"} <= row.keys()
