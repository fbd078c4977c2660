"""The comparison with a saved baseline: ratios of every kind of result, what is worse, what has no counterpart."""

import json

import baseline
import pytest
import report_samples as samples
from typer.testing import CliRunner

from resnet_fused.errors import InputError

APP = baseline.typer.Typer()
APP.command()(baseline.main)


def run(*arguments):
    return CliRunner().invoke(APP, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def pytest_result(strict=2.0, fast=1.6, reference=4.0, group="stem") -> dict:
    """What pytest-benchmark writes, as far as it is read: medians in seconds."""

    def entry(name, seconds, beside):
        return {"group": group, "extra_info": {"contender": name, "reference": beside}, "stats": {"median": seconds}}

    return {
        "machine_info": {"resnet_fused": {"device_name": "some processor", "isa": "avx2", "threads": 2}},
        "benchmarks": [
            entry("eager", 8.0, None),
            entry("layer-fused", reference, None),
            entry("strict", strict, "layer-fused"),
            entry("fast", fast, "layer-fused"),
            {"group": "other", "extra_info": {}, "stats": {"median": 1.0}},
        ],
    }


def kernels_result(triton=50.0) -> dict:
    rows = [("eager channels_last", 100.0), ("torch.compile", 80.0), ("triton gemm", triton)]
    return {
        "gpu": "a GPU",
        "dtype": "bfloat16",
        "rows": [{"shape": "Conv(...)", "op": "conv", "name": name, "us": us} for name, us in rows],
    }


def values(result) -> dict:
    found = baseline.ratios(result, baseline.Path("x.json"))
    return {(ratio.case, ratio.contender, ratio.reference): ratio.value for ratio in found}


def test_ratios_of_pytest_benchmark():
    assert values(pytest_result()) == {
        ("pytest: stem", "strict", "layer-fused"): 2.0,
        ("pytest: stem", "fast", "layer-fused"): 2.5,
    }


def test_ratios_of_models():
    eager = "eager channels_last"
    assert values(samples.with_peers()) == pytest.approx(
        {
            ("peers: resnet18, batch 1, fp32, reused memory", "fused", eager): 12 / 8,
            ("peers: resnet18, batch 1, fp32, reused memory", "fused fast", eager): 13 / 8,
        }
    )
    found = values(samples.main_job())
    assert len(found) == 4 and list(found.values()) == pytest.approx([1.5] * 4)
    assert ("bench: resnet50, batch 16, bf16, default memory", "fused", eager) in found


def test_ratios_of_blocks_and_kernels():
    case, eager = "blocks: resnet18/layer4.1 512x7x7, batch 1, fp32, reused memory", "eager channels_last"
    found = values(samples.blocks())
    assert len(found) == 6
    assert found[case, "fused", eager] == pytest.approx(9 / 8)
    assert found[case, "fused fast", eager] == pytest.approx(10 / 8)
    assert values(kernels_result()) == {("kernels: bfloat16, Conv(...)", "triton gemm", "eager channels_last"): 2.0}


def test_what_was_not_timed_has_no_ratio():
    result = samples.with_peers()
    result["rows"][-1] |= {"status": "failed", "ms_median": None}
    assert [contender for _, contender, _ in values(result)] == ["fused"]
    result["rows"] = [row for row in result["rows"] if row["name"] != "eager channels_last"]
    with pytest.raises(InputError, match=r"x.json must hold a contender and its reference"):
        values(result)


@pytest.mark.parametrize(
    ("strict", "code"),
    [
        (2.0, 0),
        (2.0 / 0.91, 0),  # 9% worse
        (2.0 / 0.89, 1),  # 11% worse
        (1.0, 0),  # twice as fast
    ],
)
def test_a_ratio_worse_by_a_tenth_is_flagged(tmp_path, strict, code):
    saved = tmp_path / "baseline.json"
    before, now = samples.write(pytest_result(), tmp_path / "a.json"), tmp_path / "b.json"
    samples.write(pytest_result(strict=strict), now)
    assert run(before, "--baseline", saved, "--save").exit_code == 0
    outcome = run(now, "--baseline", saved)
    assert outcome.exit_code == code, outcome.output
    assert f"2 ratios compared, {code} worse by more than 10%" in outcome.stdout
    assert ("Worse by more than 10%" in outcome.stdout) == bool(code)
    if code:
        (line,) = (line for line in outcome.stdout.splitlines() if "pytest: stem" in line)
        assert all(word in line for word in ("strict", "layer-fused", "2.00x", "1.78x", "0.89")), line
        assert run(now, "--baseline", saved, "--worse", "0.2").exit_code == 0


def test_a_slower_machine_is_no_regression(tmp_path):
    saved = tmp_path / "baseline.json"
    before = samples.write(pytest_result(), tmp_path / "a.json")
    loaded = samples.write(pytest_result(strict=20.0, fast=16.0, reference=40.0), tmp_path / "b.json")
    run(before, "--baseline", saved, "--save")
    assert run(loaded, "--baseline", saved).exit_code == 0


def test_missing_counterparts_are_named(tmp_path):
    saved = tmp_path / "baseline.json"
    result = pytest_result()
    run(samples.write(result, tmp_path / "a.json"), "--baseline", saved, "--save")
    result["benchmarks"][3]["extra_info"]["contender"] = "faster"
    result["benchmarks"][2]["extra_info"]["reference"] = "eager"
    blocks = samples.write(samples.blocks(), tmp_path / "c.json")
    run(blocks, "--baseline", saved, "--save")
    outcome = run(samples.write(result, tmp_path / "b.json"), blocks, "--baseline", saved)
    assert outcome.exit_code == 0
    assert "not in the baseline: pytest: stem: faster\n" in outcome.stdout
    assert "not in the baseline: pytest: stem: strict, beside eager now, layer-fused in the baseline" in outcome.stdout
    assert "not in the results: pytest: stem: fast\n" in outcome.stdout
    assert "6 ratios compared" in outcome.stdout
    assert "pytest: stem" not in run(blocks, "--baseline", saved).stdout, (
        "cases that were not measured are not asked for"
    )


def test_nothing_in_common_is_an_error(tmp_path):
    saved = tmp_path / "baseline.json"
    run(samples.write(pytest_result(), tmp_path / "a.json"), "--baseline", saved, "--save")
    outcome = run(samples.write(samples.blocks(), tmp_path / "b.json"), "--baseline", saved)
    assert outcome.exit_code == 2
    assert len(outcome.stderr.splitlines()) == 1 and outcome.stdout == ""
    for words in (
        f"a ratio in common with {saved}, got none",
        "resnet18/stem 3x224x224, batch 1, fp32, reused memory: fused",
        ", ... are not in it",
    ):
        assert words in outcome.stderr


def test_saving_adds_and_replaces(tmp_path):
    saved = tmp_path / "new" / "baseline.json"
    first = samples.write(pytest_result(), tmp_path / "a.json")
    assert run(first, "--baseline", saved, "--save").stdout == f"2 ratios saved in {saved}\n"
    result = pytest_result(strict=1.0)
    del result["benchmarks"][3]
    again = samples.write(result, tmp_path / "b.json")
    blocks = samples.write(samples.blocks(), tmp_path / "c.json")
    assert run(again, blocks, "--baseline", saved, "--save").exit_code == 0
    written = json.loads(saved.read_text())
    assert written["schema"] == 1 and written["machine"] == {
        "device_name": "some processor",
        "isa": "avx2",
        "threads": 2,
    }
    assert written["ratios"]["pytest: stem"] == {"strict": {"ratio": 4.0, "reference": "layer-fused"}}
    assert len(written["ratios"]) == 4 and written["commit"]


def test_the_baseline_of_the_device(tmp_path, monkeypatch):
    monkeypatch.setattr(baseline, "RESULTS", tmp_path)
    path = samples.write(samples.with_peers(), tmp_path / "some-processor" / "peers" / "a.json")
    outside = samples.write(samples.with_peers(), tmp_path / "out.json")
    another = samples.write(samples.with_peers(), tmp_path / "another" / "a.json")
    assert baseline.default_path([path, outside]) == tmp_path / "some-processor" / "baseline.json"
    assert run(path, "--save").exit_code == 0 and run(path).exit_code == 0
    monkeypatch.setattr(baseline, "device_folder", lambda device, results: results / f"this {device}")
    monkeypatch.setattr(baseline.torch.cuda, "is_available", lambda: False)
    assert baseline.default_path([outside]) == tmp_path / "this cpu" / "baseline.json"
    outcome = run(path, another)
    assert outcome.exit_code == 2 and "got none for another and some-processor" in outcome.stderr


@pytest.mark.parametrize(
    ("result", "options", "words"),
    [
        (samples.main_job() | {"threads": 8}, (), "must be of the baseline's machine, threads 2, got 8"),
        (samples.main_job() | {"device_name": "b"}, (), "device_name 'some processor', got 'b'"),
        (samples.main_job() | {"schema": 2}, (), "must be of schema version 1, got 2"),
        ({"rows": 3}, (), "must be the result of a benchmark, got the keys rows"),
        (samples.main_job(), ("--worse", "1.5"), "--worse must be at least 0 and less than 1, got 1.5"),
        (samples.main_job(), ("--baseline", "/nowhere/b.json"), "does not exist: --save makes it"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, result, options, words):
    saved = tmp_path / "baseline.json"
    run(samples.write(pytest_result(), tmp_path / "a.json"), "--baseline", saved, "--save")
    outcome = run(samples.write(result, tmp_path / "b.json"), "--baseline", saved, *options)
    assert outcome.exit_code == 2
    assert words in outcome.stderr and len(outcome.stderr.splitlines()) == 1
