"""Every Triton kernel under the interpreter's guard: in bounds, without races, nothing uninitialised, right."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

pytest.importorskip("triton")

import interpreter_guard
import triton_cases
from triton_cases import CASES, FAR, VALUES

from resnet_fused import tune
from resnet_fused.kernels.triton import configs, interpreter
from resnet_fused.shapes import BasicBlock, Conv, DenseBlock

pytestmark = pytest.mark.skipif(not interpreter.INTERPRETED, reason="Triton was imported without TRITON_INTERPRET=1")


@pytest.fixture
def guarded():
    with interpreter_guard.guard():
        yield


# Random numbers: the parity of every kernel is tested without the guard as well.
@pytest.mark.parametrize(
    "values", [pytest.param(v, marks=[pytest.mark.thorough] if v == "random" else []) for v in VALUES]
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_under_the_guard(case, values, guarded):
    triton_cases.check(case, values)


@pytest.mark.parametrize("case", FAR, ids=str)
def test_more_than_two_to_the_31_elements(case):
    triton_cases.check_far(case)


@pytest.mark.parametrize(
    "shape",
    [Conv(2, 16, 4, 4, 16, 1, 1), BasicBlock(1, 16, 4, 4, 16, 16), DenseBlock(1, 16, 4, 4, 16, 2, 16)],
    ids=lambda shape: shape.op,
)
def test_tuning_finds_every_configuration_right(shape, monkeypatch):
    """What `resnet-fused tune` would time, in the interpreter: each contender runs, and agrees with the reference."""
    monkeypatch.setattr(configs, "SM90", configs.SM80)  # fewer configurations than on sm_90
    configs.architecture.cache_clear()
    timed = []

    def measure(calls, seconds):
        timed.append(list(calls))
        return {name: [1e-3] for name in calls}

    found = tune.tune_one(shape, torch.bfloat16, torch.device("cpu"), 1.0, measure)
    configs.architecture.cache_clear()
    assert found.rejected == ()
    assert timed[0]
    algorithms = {name.split()[1].rstrip(",") for name in timed[0]}
    assert {f"triton {name}" for name in algorithms} == set(found.seconds)


def test_every_kernel_has_a_case():
    assert {case.kernel for case in CASES} == set(configs._kernels)
