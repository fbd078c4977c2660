"""The guard of Triton's interpreter notices what it is for: one small kernel for each fault, and its correct twin."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import interpreter_guard
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ["TRITON_INTERPRET"] != "1", reason="the interpreter is switched off")


@triton.jit
def copy(x, y, n, OTHER: tl.constexpr, LIMIT: tl.constexpr, B: tl.constexpr):
    """LIMIT: how many elements past n the loads may touch."""
    at = tl.program_id(0) * B + tl.arange(0, B)
    if OTHER:  # noqa: SIM108 - Triton takes a constexpr only in a statement
        v = tl.load(x + at, mask=at < n + LIMIT, other=0.0)
    else:
        v = tl.load(x + at, mask=at < n + LIMIT)
    tl.store(y + at, v, mask=at < n)


@triton.jit
def overlap(x, y, STEP: tl.constexpr, B: tl.constexpr):
    """Programs STEP apart write B elements each."""
    at = tl.arange(0, B)
    tl.store(y + tl.program_id(0) * STEP + at, tl.load(x + at))


@triton.jit
def scatter(y, B: tl.constexpr):
    """Two lanes an element."""
    at = tl.arange(0, B)
    tl.store(y + at // 2, tl.full((B,), 1.0, tl.float32))


@triton.jit
def rotate(x, n):
    """Program i moves element i to i + 1 of the same tensor."""
    i = tl.program_id(0)
    tl.store(x + (i + 1) % n, tl.load(x + i))


@triton.jit
def through_memory(x, scratch, y, BARRIERS: tl.constexpr, B: tl.constexpr):
    """x reversed by way of scratch, twice."""
    at = tl.arange(0, B)
    for i in range(2):
        if BARRIERS != "none" and BARRIERS != "after":
            tl.debug_barrier()
        tl.store(scratch + at, tl.load(x + i * B + at))
        if BARRIERS != "none" and BARRIERS != "before":
            tl.debug_barrier()
        tl.store(y + i * B + at, tl.load(scratch + B - 1 - at))


@triton.jit
def with_descriptor(x, y, ROWS: tl.constexpr, B: tl.constexpr):
    """Boxes of ROWS x B, the last of which may reach over the edge."""
    y.store([tl.program_id(0) * ROWS, 0], x.load([tl.program_id(0) * ROWS, 0]))


@triton.jit
def written_then_loaded(x, box, y, FIRST: tl.constexpr, B: tl.constexpr):
    """A store and a load of one address, one of them through a descriptor."""
    at = tl.arange(0, B)
    if FIRST:
        tl.store(x + at, tl.full((B,), 1.0, tl.float32))
        tl.debug_barrier()
        v = box.load([0])
    else:
        box.store([0], tl.full((B,), 1.0, tl.float32))
        tl.debug_barrier()
        v = tl.load(x + at)
    tl.store(y + at, v)


@triton.jit
def far(x, y, n, WIDE: tl.constexpr):
    """Element 65536 * n of x."""
    i = tl.program_id(0) + n
    if WIDE:
        i = i.to(tl.int64)
    tl.store(y, tl.load(x + i * 65536))


@pytest.fixture(autouse=True)
def _guarded():
    with interpreter_guard.guard():
        yield


def box(t, *block, shape=None):
    return TensorDescriptor(t, list(shape or t.shape), list(t.stride()), list(block))


def fails(what):
    return pytest.raises(Exception, match=what)


def test_correct_kernels_pass_and_run():
    x, y = torch.arange(21.0), torch.empty(21)
    copy[(2,)](x, y, 21, OTHER=True, LIMIT=0, B=16)
    assert torch.equal(x, y)
    overlap[(3,)](x, y, STEP=4, B=4)
    through_memory[(1,)](x, torch.empty(4), y, BARRIERS="both", B=4)
    assert torch.equal(y[:8], x[[3, 2, 1, 0, 7, 6, 5, 4]])
    x, y = torch.rand(6, 4), torch.empty(6, 4)
    with_descriptor[(2,)](box(x, 4, 8), box(y, 4, 8), ROWS=4, B=8)
    assert torch.equal(x, y)


def test_out_of_bounds():
    x, y = torch.rand(21), torch.rand(21)
    with fails("out of bounds: load of 1 of 6"):
        copy[(2,)](x, y, 21, OTHER=True, LIMIT=1, B=16)
    with fails("out of bounds: store of 3 of 16"):
        copy[(1,)](x, y[:13], 16, OTHER=True, LIMIT=0, B=16)


def test_neighbouring_channels_are_out_of_bounds():
    x = torch.rand(4, 8)
    with fails("out of bounds: load of 12 of 28"):
        copy[(1,)](x[:, :4], torch.rand(32), 28, OTHER=True, LIMIT=0, B=32)


def test_descriptor_wider_than_its_tensor():
    x, y = torch.rand(6, 8), torch.empty(6, 8)
    with fails("out of bounds: descriptor of 8 of 56"):
        with_descriptor[(1,)](box(x, 4, 8, shape=(7, 8)), box(y, 4, 8), ROWS=4, B=8)
    with fails("out of bounds: descriptor of 24 of 48"):
        with_descriptor[(1,)](box(x[:, :4], 4, 8, shape=(6, 8)), box(y, 4, 8), ROWS=4, B=8)


def test_masked_lane_without_other_is_nan():
    x, y = torch.rand(3), torch.zeros(8)
    copy[(1,)](x, y, 8, OTHER=True, LIMIT=-5, B=8)
    assert not y.isnan().any()
    copy[(1,)](x, y, 8, OTHER=False, LIMIT=-5, B=8)
    assert y.isnan().tolist() == [False] * 3 + [True] * 5


def test_empty_is_nan():
    assert torch.empty(5).isnan().all()
    assert torch.rand(2, 3).bfloat16().new_empty(4).isnan().all()


def test_races_between_programs():
    with fails("race: program 2 writes what another one wrote"):
        overlap[(2,)](torch.rand(8), torch.rand(16), STEP=4, B=8)
    with fails("race: program 2 reads what another one wrote"):
        rotate[(4,)](torch.rand(4), 4)
    with fails("race: two lanes"):
        scatter[(1,)](torch.rand(8), B=8)


@pytest.mark.parametrize("barriers", ["none", "before", "after"])
def test_missing_barrier(barriers):
    with fails("no barrier between"):
        through_memory[(1,)](torch.rand(8), torch.empty(4), torch.empty(8), BARRIERS=barriers, B=4)


@pytest.mark.parametrize("first", [True, False])
def test_missing_proxy_fence(first):
    x = torch.rand(8)
    with fails("no proxy fence"):
        written_then_loaded[(1,)](x, box(x, 8), torch.empty(8), FIRST=first, B=8)


def test_overflow_and_single_program():
    x, y = torch.zeros(1), torch.empty(1)
    with fails("int32 overflow"):
        far[(1,)](x, y, 1 << 15, WIDE=False)
    x = torch.arange(65536 * 3.0)
    with interpreter_guard.as_program((2, 0, 0), of=(1 << 20, 1, 1)):
        far[(1,)](x, y, 0, WIDE=True)
    assert y.item() == 65536 * 2
