"""Settings shared by all tests."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels run on the CPU; read when Triton is first imported

import hypothesis
import pytest
import torch

from resnet_fused import replay
from resnet_fused.kernels import native

# The same examples on every run, and no limit on the time of one: the first call of a shape is slower than the next.
hypothesis.settings.register_profile("default", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.load_profile("default")


SHARE_OF_PLANTED_BUGS = 12
"""Without --thorough, every so-many-th is run: all of them take half an hour."""


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="plant every bug, and run the tests marked thorough")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--thorough"):
        planted = [item for item in items if item.name.startswith("test_planted_bugs")]
        skipped = set(planted) - set(planted[::SHARE_OF_PLANTED_BUGS])
        skipped |= {item for item in items if item.get_closest_marker("thorough")}
        config.hook.pytest_deselected(items=list(skipped))
        items[:] = [item for item in items if item not in skipped]


def pytest_configure():
    if native.LIBRARY_PATH.exists() and not native.available():
        pytest.exit(f"the native library was built, but cannot be used: {native.reason()}", returncode=1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_test_changes_what_fresh_memory_holds():
    yield
    left_on = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)  # or the tests that follow would fail as well
    assert not left_on, "the test left torch.use_deterministic_algorithms on"


def pytest_generate_tests(metafunc):
    if "isa" in metafunc.fixturenames:
        reason = "the native library is not built"
        names = native.bindings.isas() if native.bindings else [pytest.param("none", marks=pytest.mark.skip(reason))]
        metafunc.parametrize("isa", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def isa(request):
    """Run the test once with every instruction set that this machine has."""
    previous = native.bindings.isa()
    native.bindings.set_isa(request.param)
    yield request.param
    native.bindings.set_isa(previous)


@pytest.fixture
def replays(monkeypatch):
    """How many pieces each replay ran, in order."""
    lengths, run = [], replay.Recording.run

    def counted(self, x):
        lengths.append(self.count)
        return run(self, x)

    monkeypatch.setattr(replay.Recording, "run", counted)
    return lengths
