"""Options and order of the tests that need a GPU: which backend and op, results as they come, one process a fault.

    TRITON_INTERPRET=0 pytest tests/gpu --backend triton --op conv_bn_act --configs 2

An illegal access leaves a process without its GPU: the run ends there, and the next one with the same `--results` file
goes on behind the test that did it. `--device cpu --tiny` tries these tests themselves out, without a GPU: Triton's
kernels run in its interpreter then.
"""

from __future__ import annotations

import faulthandler
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import resnet_fused as rf
from resnet_fused.kernels import cuda, triton

HERE = Path(__file__).parent
BACKENDS = ("triton", "cuda", "vendor")
GPU_LOST = 75
"""Exit status of a run that ended because the GPU no longer answers this process."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu", "tests/gpu")
    group.addoption(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cpu: try the tests out in the interpreter"
    )
    group.addoption("--backend", default=None, choices=BACKENDS, help="only this one")
    group.addoption("--op", default=None, help="only this key of gpu_cases.SHAPES: conv_bn_act, bottleneck, ...")
    group.addoption(
        "--configs", type=int, default=None, help="at most so many configurations of a kernel; all if left out"
    )
    group.addoption("--shapes", type=int, default=None, help="at most so many shapes of an op; all if left out")
    group.addoption("--tiny", action="store_true", help="the smallest shapes only")
    group.addoption("--dtypes", default="bf16,fp16,tf32,fp32", help="of bf16, fp16, tf32, fp32 (without TF32)")
    group.addoption("--results", type=Path, default=None, help="append every outcome here, a JSON object a line")
    group.addoption("--test-timeout", type=float, default=180.0, help="seconds, after which the process ends")


def unusable(config: pytest.Config) -> str | None:
    """Why these tests cannot run, None if they can."""
    if config.getoption("--device", "cuda") == "cpu":
        return None if triton._interpreted() else "with --device cpu they need TRITON_INTERPRET=1"
    if not torch.cuda.is_available():
        return f"needs a CUDA GPU, torch {torch.__version__} sees none"
    if triton._interpreted():
        return "Triton's kernels would be interpreted: set TRITON_INTERPRET=0"
    return None


def chosen_device(config: pytest.Config) -> torch.device:
    """Where the kernels run."""
    name = config.getoption("--device", "cuda")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device("cpu")


def chosen_backends(config: pytest.Config) -> tuple[str, ...]:
    """The backends to test: the one asked for, else all that this device has."""
    wanted = config.getoption("--backend", None)
    if wanted:
        return (wanted,)
    return tuple(name for name in BACKENDS if name != "cuda" or cuda.built() is None)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(min(4, torch.get_num_threads()))  # several of these runs share the machine
    results = config.getoption("--results", None)
    if results:
        config.pluginmanager.register(_Results(results, config.getoption("--test-timeout")), "gpu-results")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    why = unusable(config)
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("gpu")
            if why:
                item.add_marker(pytest.mark.skip(reason=why))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`variant`: every way to compute every shape; `backend`: those to test."""
    config = metafunc.config
    if unusable(config):
        for name in ("variant", "backend"):
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, [None], ids=["none"])
        return
    if "variant" in metafunc.fixturenames:
        import gpu_cases

        found = list(
            gpu_cases.variants(
                chosen_device(config),
                chosen_backends(config),
                config.getoption("--op"),
                config.getoption("--dtypes").split(","),
                config.getoption("--configs"),
                config.getoption("--shapes"),
                config.getoption("--tiny"),
            )
        )
        metafunc.parametrize("variant", found, ids=str)
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", chosen_backends(config))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the kernels run."""
    return chosen_device(request.config)


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """The same for what only a GPU can show: streams, graphs, large tensors."""
    if device.type != "cuda":
        pytest.skip("needs a real GPU")
    return device


@pytest.fixture(autouse=True)
def _own_settings() -> Iterator[None]:
    """Precision switches and the backend context are left as they were."""
    switches = (torch.backends.cudnn.conv, torch.backends.mkldnn.conv)
    before = [switch.fp32_precision for switch in switches]
    with rf.backend("auto"):
        yield
    for switch, precision in zip(switches, before, strict=True):
        switch.fp32_precision = precision


class _Results:
    """Writes outcomes as they come, skips what the file has already, ends the process when the GPU is lost."""

    def __init__(self, path: Path, timeout: float) -> None:
        self.path, self.timeout = path, timeout
        self.trace = path.with_suffix(".trace").open("a")  # stderr is pytest's, and lost with the process
        lines = path.read_text().splitlines() if path.exists() else []
        self.known = {json.loads(line)["name"] for line in lines}

    def _write(self, test: str, outcome: str, **more: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"name": test, "outcome": outcome, **more}) + "\n")

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        left = [item for item in items if item.nodeid not in self.known]
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self.known])
        items[:] = left

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(nodeid, "started")  # the last word on a test that takes its process with it
        faulthandler.dump_traceback_later(self.timeout, exit=True, file=self.trace)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            text = "" if report.passed else str(report.longrepr)[-4000:]
            self._write(report.nodeid, report.outcome, seconds=report.duration, message=text)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        faulthandler.cancel_dump_traceback_later()
        if not torch.cuda.is_available() or not torch.cuda.is_initialized():
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            self._write(nodeid, "failed", message=f"the GPU is lost to this process: {error}"[:4000])
            os._exit(GPU_LOST)
