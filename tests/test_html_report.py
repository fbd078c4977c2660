"""The report: what is read, what the page and the README say of it, and who wins."""

import re
import subprocess
import sys
import xml.dom.minidom
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import compatibility
import plots
import pytest
import report
import report_samples as samples
import result_files
from matplotlib.text import Text
from typer.testing import CliRunner

from resnet_fused.errors import InputError
from resnet_fused.roofline import Placement

ROOT = Path(__file__).parent.parent
VOID = {"meta", "br", "link", "img", "input", "hr"}


@pytest.fixture
def results(tmp_path) -> Path:
    """Two models with peers, one file of blocks, a main job; on resnet50 at batch 16 a peer is faster."""
    folder = tmp_path / "benchmarks" / "results" / "some-processor"
    samples.write(samples.with_peers("resnet18", 1), folder / "peers" / "a.json")
    samples.write(samples.with_peers("resnet18", 16), folder / "peers" / "b.json")
    samples.write(samples.with_peers("resnet50", 16, "bf16", fused=10.0), folder / "peers" / "c.json")
    samples.write(samples.main_job(), folder / "main.json")
    samples.write(samples.blocks(), folder / "blocks" / "resnet18.json")
    for place in (folder, folder.parent / "only-a-baseline"):
        samples.write({"ratios": 1}, place / "baseline.json")
    samples.write({"steps": []}, folder / "gpu" / "summary.json")
    (folder.parent / compatibility.RESULT.name).write_text(compatibility.RESULT.read_text())
    return folder.parent


@pytest.fixture
def device(results) -> result_files.Device:
    return result_files.load(results / "some-processor")


# --- reading ------------------------------------------------------------------------------------------------------


def test_cases_come_from_peers_and_else_from_the_main_job(device):
    found = [(case.title, case.source.name) for case in device.cases]
    assert found == [
        ("resnet18, batch 1, fp32", "a.json"),
        ("resnet18, batch 16, fp32", "b.json"),
        ("resnet50, batch 16, fp32", "main.json"),
        ("resnet50, batch 16, bf16", "c.json"),
    ]
    assert [path.name for path in device.others] == ["summary.json"]
    assert {case.source.name for case in device.blocks} == {"resnet18.json"}
    assert [(case.network, case.block) for case in device.blocks] == [
        ("resnet18", "stem 3x224x224"),
        ("resnet18", "layer1.0 64x56x56"),
        ("resnet18", "layer4.1 512x7x7"),
    ]
    assert [case.best_other().name for case in device.blocks] == ["OpenVINO"] * 3
    main = device.cases[2]
    assert {line.name: line.speed for line in main.lines} == pytest.approx(
        {"eager": 7.5, "eager channels_last": 10.0, "fused": 15.0}
    ), "the rows with memory reused"


def test_best_other_is_the_fastest_with_the_right_numbers(device):
    first = device.cases[0]
    assert first.best_other().name == "OpenVINO"
    assert [(ours.name, other.name) for ours, other, _ in first.ratios()] == [
        ("fused", "OpenVINO"),
        ("fused fast", "OpenVINO"),
    ]
    assert [ratio for *_, ratio in first.ratios()] == pytest.approx([12 / 11, 13 / 11])
    slow = samples.with_peers(peers={"ONNX Runtime": 7.0})
    (case,) = result_files._cases(Path("x"), slow)
    assert case.best_other().name == "eager channels_last", "plain torch counts as well"


def test_the_fused_one_of_several_is_the_fastest(device):
    result = samples.with_peers()
    graph = samples.row("fused, CUDA graph", "fused", 20.0, 1, "fp32", accuracy="strict")
    result["rows"].append(graph)
    (case,) = result_files._cases(Path("x"), result)
    assert case.fused().name == "fused, CUDA graph"


def test_ceilings_are_the_best_of_all_runs(results, device):
    other = samples.MACHINE | {"copy_gb_s": 30.0, "matmul_tflop_s": {"fp32": 0.1, "bf16": 3.0}}
    samples.write(samples.with_peers("resnet34") | {"machine": other}, results / "some-processor" / "d.json")
    machine = result_files.load(results / "some-processor").machine
    assert (machine.copy_gb_s, machine.matmul_tflop_s) == (30.0, {"fp32": 0.2, "bf16": 3.0})


def test_a_disturbed_machine_is_told(results):
    folder = results / "some-processor"
    assert "disturbed" not in report.page(result_files.load(folder), {})
    fast = samples.MACHINE | {"copy_gb_s": 30.0, "matmul_tflop_s": {"fp32": 0.2}}
    for batch in (1, 4, 8):
        samples.write(samples.with_peers("resnet50", batch) | {"machine": fast}, folder / "peers" / f"d{batch}.json")
    faster = fast | {"copy_gb_s": 40.0}
    samples.write(samples.blocks("resnet50") | {"machine": faster}, folder / "blocks" / "resnet50.json")
    device = result_files.load(folder)
    assert report.disturbances(device) == [
        f"resnet18, {case}: copy 20 GB/s where the median of others is {rate}"
        for case, rate in (("batch 1, fp32", 30), ("batch 16, fp32", 30), ("batch 1, fp32, blocks", 40))
    ], "not the bf16 one, and not the main job, whose machine was not measured"
    text = report.page(device, {})
    assert "<h2>Measured on a disturbed machine</h2>" in text
    assert "below 0.8 of the median" in text and "resnet18, batch 16, fp32: copy 20 GB/s" in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"schema": 2, "rows": []}', "odd.json must be of schema version 1, got 2"),
        ('{"schema": 1, "rows"', "odd.json must be a JSON file of a benchmark"),
        ("[]", "odd.json must be a JSON object, got a list"),
    ],
)
def test_other_files_are_refused_with_the_reason(results, text, words):
    (results / "some-processor" / "odd.json").write_text(text)
    with pytest.raises(InputError, match=words):
        result_files.load(results / "some-processor")
    with pytest.raises(InputError, match=words):
        report.make(results, None)


def test_cases_are_placed_by_the_rates_of_their_own_run(results):
    other = samples.MACHINE | {"copy_gb_s": 40.0, "matmul_tflop_s": {"fp32": 0.4}}
    samples.write(samples.with_peers("resnet34") | {"machine": other}, results / "some-processor" / "d.json")
    device = result_files.load(results / "some-processor")
    bounds = {case.title: case.roof.bound_seconds for case in device.cases if case.roof and case.dtype == "fp32"}
    expected = sum(max(row["flops"] / 0.2e12, row["bytes"] / 20e9) for row in samples.PLAN_ROWS)
    assert bounds["resnet18, batch 1, fp32"] == pytest.approx(expected)
    assert bounds["resnet34, batch 1, fp32"] == pytest.approx(expected / 2)
    shares = {(case.title, line.name): line.share_of_bound for case in device.cases for line in case.lines}
    assert shares["resnet18, batch 1, fp32", "OpenVINO"] == pytest.approx(expected * 11.0)
    assert shares["resnet18, batch 1, fp32", "TensorRT"] is None, "absent"
    assert shares["resnet50, batch 16, fp32", "fused"] is None, "the main job measures no rates"


def test_recorded_places_are_taken_as_they_are():
    result = samples.with_peers()
    roof = {"flops": 80, "bytes": 10, "layer_bytes": 20, "bound_seconds": 0.01, "bound": "memory"}
    result["plans"][0]["roof"] = roof
    for row in result["rows"]:
        row |= {"flop_per_byte": 8.0, "bound": "memory", "bound_ms": 10.0, "share_of_bound": 0.12}
    (case,) = result_files._cases(Path("x"), result)
    assert case.roof == Placement(**roof) and {line.share_of_bound for line in case.lines} == {0.12}


def test_transitions_of_older_results_multiply_after_their_pooling():
    result = samples.with_peers()
    row = {"kernel": "transition", "flops": 4_000_000, "bytes": 10, "layer_bytes": 20, "dtype": "fp32"}
    result["plans"][0]["rows"] = [row]
    (case,) = result_files._cases(Path("x"), result)
    assert case.roof.flops == 1_000_000


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="must hold results of resnet-fused bench, got none"):
        report.write(tmp_path)


def test_results_from_before_the_first_version_are_read(results):
    old = samples.main_job()
    for key in ("schema", "peers", "commit", "created"):
        del old[key]
    for row in old["rows"]:
        for key in ("kind", "status", "detail", "setup_seconds"):
            del row[key]
    folder = results / "some-processor" / "old"
    samples.write(old, folder / "main.json")
    lines = result_files.load(folder).cases[0].lines
    assert [line.kind for line in lines] == ["eager", "eager", "fused"] and all(line.speed for line in lines)


# --- words --------------------------------------------------------------------------------------------------------


def test_verdicts_name_who_wins(device):
    summary, losses = report.verdicts(device.cases)
    assert summary.startswith(
        "Fused at the default accuracy is the fastest in 3 of 4 cases; its throughput is 0.91 to 1.50"
    )
    assert losses == ["resnet50, batch 16, bf16: OpenVINO is 1.10 times as fast as fused (11.0 against 10.0 images/s)."]
    assert report.verdicts([]) == ("Nothing to compare was measured.", [])


def test_absences(device):
    assert report.absences(device.cases[:2]) == [
        "TensorRT absent: tensorrt not installed (everywhere)",
        "JAX failed: no answer within 900 s (everywhere)",
        "cheat gives other numbers: largest error of a logit 1.0e+00 (everywhere)",
    ]
    assert report.absences(device.cases)[0].endswith("(3 of 4 cases)")
    assert report.absences(device.cases[1:3])[0].endswith("(resnet18, batch 16, fp32)")


@pytest.mark.parametrize(
    ("value", "text"), [(0.01234, "0.0123"), (1.0, "1.00"), (30.0, "30.0"), (99.96, "100"), (1234.5, "1,234")]
)
def test_numbers_have_three_digits(value, text):
    assert report.tables.three_digits(value) == text


# --- the page -----------------------------------------------------------------------------------------------------


class Checker(HTMLParser):
    """Asserts that every element is closed, and takes down what would be fetched, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        if tag != "a":
            self.fetched += [
                v for k, v in attrs if k in ("src", "href", "xlink:href") and not (v or "").startswith("#")
            ]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def checked(page: Path) -> Checker:
    checker = Checker()
    checker.feed(page.read_text())
    assert checker.open == []
    return checker


def test_page_and_plots(results):
    (page,) = report.make(results, None)
    assert page == results / "some-processor" / "report.html"
    checker, source = checked(page), page.read_text()
    assert checker.fetched == [], "nothing but itself"
    assert "url(http" not in source and "@import" not in source
    text = " ".join(checker.text.split())
    for words in (
        "resnet_fused on some processor",
        "fastest in 3 of 4 cases",
        "OpenVINO is 1.10 times as fast as fused",
        "TensorRT absent: tensorrt not installed",
        "Every fused model holds parity",
        "best rates of all runscopy 20.0 GB/s, matmul fp32 0.2 TFLOP/s, bf16 2 TFLOP/s",
        "the best of all runs is drawn",
        "This run: copy 20.0 GB/s, matmul fp32 0.2 TFLOP/s, bf16 2 TFLOP/s; clocks: cores 2500 to 3100 MHz before",
        "The model: 52 FLOP/byte, at least 5.80 ms (compute).",
        "OpenVINOgraph=all, threads=2",
        "clockscores 2500 to 3100 MHz before, cores 3100 MHz after",
        "peers/a.json",
        "gpu/summary.json",
    ):
        assert words in text, words
    assert "<td>7%</td>" in source, "fused reaches 5.8 of 83 ms"
    titles = re.findall("<h2>(.*?)</h2>", source)
    assert titles[:5] == [title for title, _ in report.SECTIONS.values()]
    assert source.count("<svg") == 2 + 4, "a figure of throughput for each model, and one of each other kind"
    names = {path.stem for path in page.parent.glob("*.png")}
    assert names == {
        "main",
        "peers",
        "throughput-resnet18",
        "throughput-resnet50",
        "blocks",
        "roofline",
        "latency",
        "setup",
    }
    assert all((page.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in names)


def test_figures_take_the_colours_of_the_page(device):
    text = plots.svg(plots.throughput("resnet18", device.cases[:2]), 'a "label" & more')
    xml.dom.minidom.parseString(text)
    assert "var(--fused)" in text and "var(--lose)" in text and "var(--ink)" in text
    assert not set(plots.COLORS.values()) & set(re.findall("#[0-9a-f]{6}", text))
    assert ">12.0<" in text and ">13.0 fastest<" in text and ">99.0 wrong numbers<" in text
    assert text == plots.svg(plots.throughput("resnet18", device.cases[:2]), 'a "label" & more'), "the same every time"


def test_a_winning_peer_is_orange(device):
    text = plots.svg(plots.throughput("resnet50", device.cases[3:]), "")
    winner = next(line for line in text.splitlines() if "11.0 fastest" in line)
    assert "var(--lose)" in winner
    text = plots.svg(plots.overview(device.cases[3:]), "")
    assert "var(--lose)" in next(line for line in text.splitlines() if "0.91x" in line)
    cell = report.grid(device)[1][-1][1][-1]
    assert cell.ratio < 1 and "--lose" in cell.tint and "--fused" in report.grid(device)[1][0][1][0].tint


def test_a_fast_model_slower_than_strict_is_seen_above_its_bar(device):
    result = samples.with_peers(fused=15.0, fast=12.0)
    (axes,) = plots.overview(list(result_files._cases(Path("x"), result))).axes
    bar = next(line for line in axes.lines if line.get_linewidth() == 5)
    diamond = next(line for line in axes.lines if line.get_marker() == "D")
    assert diamond.get_xdata()[0] < max(bar.get_xdata()), "where the bar is"
    assert diamond.zorder > bar.zorder


def test_words_on_the_roofline_do_not_overprint(device, monkeypatch):
    ridge = 10.0  # FLOP/byte at 0.2 TFLOP/s and 20 GB/s
    near = [(ridge * 10 * 1.3**i, 190.0 + 8 * (i % 4), f"preact_resnet1001_cifar, batch {i}") for i in range(11)]
    monkeypatch.setattr(plots, "model_points", lambda device, dtype: near)
    blocks = [(x * 1.1, y, "") for x, y, _ in near]
    monkeypatch.setattr(plots, "block_points", lambda device, dtype: blocks)
    figure = plots.roofline(device)
    panels, keys = figure.axes[: len(figure.axes) // 2], figure.axes[len(figure.axes) // 2 :]
    numbers = [str(i + 1) for i in range(len(near))]
    for axes, key, rate in zip(panels, keys, ("200", "2,000"), strict=True):
        texts = [words.get_text() for words in axes.texts]
        assert texts == [f"torch.matmul {rate} GFLOP/s", "copy 20.0 GB/s", *numbers]
        assert [words.get_text() for words in key.texts] == [f"{i}  {name}" for i, (*_, name) in enumerate(near, 1)]
        # Drawn by then, so that they are where they will be.
        boxes = [Text.get_window_extent(words) for words in (*axes.texts, *key.texts)]
        assert all(box.count_overlaps(boxes) == 1 for box in boxes), "each with itself only"
        assert all(box.x1 <= figure.bbox.x1 for box in boxes)


def test_blocks_behind_are_orange():
    cases = result_files._blocks(Path("x"), samples.blocks())
    text = plots.svg(plots.blocks(list(cases)), "").splitlines()
    colors = {
        name: "var(--lose)" in next(line for line in text if name in line) for name in ("stem", "layer1", "layer4")
    }
    assert colors == {"stem": False, "layer1": False, "layer4": True}


def test_points_on_the_roofline(device):
    work, moved = (sum(row[key] for row in samples.PLAN_ROWS) for key in ("flops", "bytes"))
    points = plots.model_points(device, "fp32")
    assert [name for *_, name in points] == ["resnet18, batch 1", "resnet18, batch 16"], "the main job has no bytes"
    assert points[0][:2] == pytest.approx((work / moved, work * 12.0 / 1e9))
    assert points[1][1] == pytest.approx(work / 16 * 12.0 / 1e9)
    parts = plots.block_points(device, "fp32")
    stem = samples.PLAN_ROWS[0]
    assert [name.split()[0] for *_, name in parts] == ["stem", "layer1.0", "layer4.1"]
    assert parts[0][:2] == pytest.approx((stem["flops"] / stem["bytes"], stem["flops"] * 12.0 / 1e9))
    assert plots.block_points(device, "bf16") == []


def test_blocks_from_before_peers_took_part_are_shown(results):
    folder = results / "some-processor"
    samples.write(samples.old_blocks(), folder / "blocks" / "resnet18.json")
    device = result_files.load(folder)
    speeds = [plots.block_speeds(case) for case in device.blocks]
    assert speeds[0] == pytest.approx({"best": 2.0, "layer-fused": 2.0, "fast": 4.0, "strict": 4.0})
    assert speeds[2] == pytest.approx({"best": 1.5, "layer-fused": 1.5, "fast": 3 / 2.1, "strict": 3 / 2.2})
    stem, *_ = plots.block_points(device, "fp32")
    work, moved = samples.PLAN_ROWS[0]["flops"], samples.PLAN_ROWS[0]["bytes"]
    assert stem == pytest.approx((work / moved, work / 1e-3 / 1e9, "stem 3x224x224")), "by the plan of the model"
    text = checked(report.write(folder)).text
    assert "Speed-up per block" in text
    assert "tensorrt not installed (3 of 4 cases)" in text, "no peers took part in the blocks"


def test_what_a_block_shows(device):
    speeds = [plots.block_speeds(case) for case in device.blocks]
    assert speeds[0] == pytest.approx({"best": 11 / 8, "layer-fused": 10 / 8, "fast": 13 / 8, "strict": 12 / 8})
    (case, *_) = device.blocks
    assert plots.block_speeds(replace(case, lines=case.lines[2:])) == {}, "eager was not timed"
    assert "not measured" in plots.svg(plots.blocks([replace(case, lines=())]), "")


def test_without_peers_there_is_a_page_of_what_there_is(tmp_path):
    samples.write(samples.main_job(("fp32",)), tmp_path / "main.json")
    text = " ".join(checked(report.write(tmp_path)).text.split())
    assert "fastest in 1 of 1 cases" in text and "Roofline" not in text and "Not measured" not in text
    assert {path.stem for path in tmp_path.glob("*.png")} == {"main", "peers", "throughput-resnet50", "setup"}


def test_blocks_alone(tmp_path):
    samples.write(samples.blocks(), tmp_path / "blocks.json")
    assert "Speed-up per block" in checked(report.write(tmp_path)).text


def test_interrupted_and_failing_runs_are_shown(tmp_path):
    result = samples.with_peers() | {"interrupted": True}
    for row in result["rows"][1:]:
        row |= {"status": "failed", "detail": "<interrupted> & gone", "images_per_s": None, "ms_median": None}
        row |= {"ms_p20": None, "ms_p80": None, "error": float("nan")}
    samples.write(result, tmp_path / "peers.json")
    page = report.write(tmp_path)
    text = " ".join(checked(page).text.split())
    assert "resnet18, batch 1, fp32 (interrupted)" in text
    assert "fused failed: <interrupted> & gone" in text
    assert "<interrupted>" not in page.read_text(), "what a peer says is escaped"


# --- the README ---------------------------------------------------------------------------------------------------


README = "\n".join(
    f"before {name}\n<!-- {name} -->\nold\n<!-- end -->" for name in ("results", "peers", "compatibility")
)


def test_readme(results, tmp_path):
    text = report.rendered(README, results, tmp_path)
    assert "\nold\n" not in text and text.count("<!-- end -->") == 3
    assert "](benchmarks/results/some-processor/main.png)" in text
    assert "](benchmarks/results/some-processor/peers.png)" in text
    assert "| resnet18 | 1 | fp32 | 12.0 | OpenVINO | 11.0 | **1.09x** |" in text
    assert "| resnet18 | 1 | fp32 fast | 13.0 | OpenVINO | 11.0 | **1.18x** |" in text
    assert "| resnet50 | 16 | bf16 | 10.0 | OpenVINO | 11.0 | 0.91x |" in text
    assert "OpenVINO is 1.10 times as fast as fused" in text
    assert "TensorRT absent: tensorrt not installed (everywhere)." in text
    assert "resnet50 | 16 | fp32 |" not in text, "no peer was timed on it"
    assert report.rendered(text, results, tmp_path) == text
    with pytest.raises(InputError, match="must have the marker <!-- peers -->"):
        report.rendered(README.replace("<!-- peers -->", ""), results, tmp_path)


def test_check_writes_nothing(results, monkeypatch, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(README)
    for name, value in (("README", readme), ("RESULTS", results), ("ROOT", tmp_path)):
        monkeypatch.setattr(report, name, value)
    monkeypatch.setattr(report.rendered, "__defaults__", (results, tmp_path))
    app = report.typer.Typer()
    app.command()(report.main)
    assert CliRunner().invoke(app, ["--check"]).exit_code == 1
    assert readme.read_text() == README
    readme.write_text(report.rendered(README))
    assert CliRunner().invoke(app, ["--check"]).exit_code == 0
    samples.write(samples.with_peers() | {"schema": 7}, results / "some-processor" / "new.json")
    outcome = CliRunner().invoke(app, ["--check"])
    assert outcome.exit_code == 2 and "schema version 1, got 7" in outcome.stderr


def test_the_readme_shows_the_committed_results():
    command = [sys.executable, ROOT / "benchmarks" / "report.py", "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "run: python benchmarks/report.py"
