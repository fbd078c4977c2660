"""The blocks of a model, cut out: which there are, that they compute what they do in it, how they are asked for."""

import functools
import os

import pytest
import report_samples
import torch
from rich.console import Console
from typer.testing import CliRunner

import resnet_fused as rf
from resnet_fused import bench, blocks, cli
from resnet_fused.fuse import fusions

MODELS = {  # a model of each kind of block, and the kernels that its distinct blocks run in
    "resnet18": ["stem", *["basic_block"] * 7],
    "resnet50": ["stem", *["bottleneck"] * 8],
    "plain20_cifar": ["conv_bn_act"] * 6,
    "preact_resnet164_cifar": ["conv_bn_act", *["preact_block"] * 6],
    "densenet121": ["stem", *["dense_block", "transition"] * 3, "dense_block"],
    "identity_mappings_cifar": ["conv_bn_act", *["conv_bn_act", "basic_block"] * 2, "conv_bn_act"],
}


@pytest.mark.parametrize("name", MODELS)
def test_distinct_blocks_run_alone_as_in_the_model(name, monkeypatch):
    monkeypatch.setattr(blocks, "find", functools.cache(blocks.find))  # it fuses the whole model
    torch.manual_seed(0)
    model, x = bench.make_model(name), torch.randn(1, 3, 32, 32)
    inside = {}

    def keep(path):
        def hook(module, args, y):
            inside[path] = args[0].clone(), y.clone()

        return hook

    handles = [
        block.steps[0].register_forward_hook(keep(path))
        for path, block in blocks.find(model).items()
        if len(block.steps) == 1
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    kernels = []
    for path, size in blocks.distinct(model, x).items():
        block, given = blocks.cut(model, path, x)
        assert not block.training and given.shape[1:] == size and given.is_contiguous()
        before = given.clone()
        with torch.no_grad():
            y = block(given)
            fast = rf.fuse(block)
            torch.testing.assert_close(fast(given), y, rtol=1e-4, atol=1e-4 * y.abs().max().item())
        assert torch.equal(given, before), "the next call needs it"
        if path in inside:
            assert torch.equal(given, inside[path][0]) and torch.equal(y, inside[path][1])
        kernels += [fusion.op for fusion in fusions(fast).values()]
    assert kernels == MODELS[name]


def test_a_block_gets_what_real_pictures_become():
    block, x = bench.prepare(bench.Job("resnet20_cifar/layer2.1", 2), "bf16")
    model, pictures = bench.prepare(bench.Job("resnet20_cifar", 2), "fp32")
    with torch.no_grad():
        expected = model.layer2[0](model.layer1(model.relu(model.bn1(model.conv1(pictures)))))
    assert torch.equal(x, expected.bfloat16()) and x.is_contiguous()
    assert {p.dtype for p in block.parameters()} == {torch.bfloat16}


def run(*arguments):
    return CliRunner().invoke(cli.app, [*arguments, "--batch", "1"])


def test_explain_and_verify_take_a_block():
    for command, words in (("explain", "100.0% of the convolution FLOPs"), ("verify", "parity holds")):
        outcome = run(command, "resnet20_cifar/layer1.0")
        assert outcome.exit_code == 0 and words in outcome.stdout, outcome.output
        assert outcome.stdout.count("basic_block") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["explain", "resnet20_cifar/layer1.9"], "block must be one that explain shows (perhaps layer1."),
        (["bench", "resnet20_cifar/fc"], "(perhaps conv1..relu or layer1.0 or layer1.1 or layer1.2), got 'fc'"),
        (["bench", "resnet19/layer1.0", "--peers"], "model must be one of resnet_fused.models"),
        (["bench", "resnet20_cifar/layer1.0", "--blocks"], "model must be a whole one"),
        (["bench", "resnet20_cifar", "--blocks", "--plot", "a.png"], "--plot must be left out with --blocks"),
    ],
)
def test_bad_input_is_one_sentence(arguments, words):
    outcome = run(*arguments)
    assert outcome.exit_code == 2, outcome.output
    *steps, error = outcome.stderr.splitlines()
    assert words in error and not any("error" in line for line in steps)


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_command(monkeypatch, tmp_path, ok, code):
    result = report_samples.blocks() | {"parity": {"ok": ok, "reports": []}}
    result["rows"][-2] |= {"ms_median": None, "images_per_s": None, "status": "failed", "detail": "gone"}
    monkeypatch.setattr(cli.comparison, "run_blocks", lambda job, on_progress: result)
    monkeypatch.setattr(cli, "console", Console(width=120, record=True, file=open(os.devnull, "w")))  # noqa: SIM115
    path = tmp_path / "out.json"
    outcome = run("bench", "resnet18", "--blocks", "--json", str(path))
    assert outcome.exit_code == code, outcome.output
    assert path.exists()
    text = cli.console.export_text()
    rows = {line.split("│")[1].split()[0]: line for line in text.splitlines() if line.startswith("│")}
    for words in ("OpenVINO 90.9", "83.3", "1.09x", "76.9", "1.18x"):
        assert words in rows["stem"]
    assert "0.82x" in rows["layer4.1"] and "None" not in rows["layer4.1"]
    assert ("parity holds" in text) == ok
    assert "fp32 JAX: failed, no answer within 900 s (3 of 3 blocks)" in text
    assert "fp32 fused fast: failed, gone (layer4.1 512x7x7)" in text
