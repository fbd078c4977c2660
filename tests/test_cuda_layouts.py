"""The emulator's register and swizzle layouts against an independent source: Triton's linear layouts."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Sequence

import cuda_emulated
import pytest

triton = pytest.importorskip("triton")
gluon = pytest.importorskip("triton.experimental.gluon")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

pytestmark = cuda_emulated.needs_toolkit

found: dict[str, object] = {}


@gluon.constexpr_function
def keep(name, layout):
    found[name] = layout
    return 0


@gluon.jit
def layouts_kernel():
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
    keep("a2", gl.to_linear_layout(gl.DotOperandLayout(0, mma, 2), [16, 16]))
    keep("b2", gl.to_linear_layout(gl.DotOperandLayout(1, mma, 2), [16, 8]))
    keep("a1", gl.to_linear_layout(gl.DotOperandLayout(0, mma, 1), [16, 8]))
    keep("b1", gl.to_linear_layout(gl.DotOperandLayout(1, mma, 1), [8, 8]))
    keep("d", gl.to_linear_layout(mma, [16, 8]))
    wgmma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    keep("w", gl.to_linear_layout(wgmma, [64, 64]))
    keep("s128", gl.to_linear_layout(gl.NVMMASharedLayout(128, 16, 2), [8, 64]))
    keep("s64", gl.to_linear_layout(gl.NVMMASharedLayout(64, 16, 2), [8, 32]))
    keep("s32", gl.to_linear_layout(gl.NVMMASharedLayout(32, 16, 2), [8, 16]))


@functools.cache
def triton_layouts() -> dict[str, object]:
    source = GluonASTSource(fn=layouts_kernel, signature={}, constexprs={}, attrs={})
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True  # from its cache, nothing would call keep
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    return found


@functools.cache
def emulator_layouts() -> dict[str, list[tuple[int, ...]]]:
    tree = cuda_emulated.build("plain", "test_emulator", "-O1")
    lines = subprocess.run([tree / "test_emulator", "layouts"], capture_output=True, text=True, check=True).stdout
    rows: dict[str, list[tuple[int, ...]]] = {}
    for line in lines.splitlines():
        name, *numbers = line.split()
        rows.setdefault(name, []).append(tuple(map(int, numbers)))
    return rows


def place(bases: Sequence[Sequence[int]], index: int) -> tuple[int, int]:
    """Where a linear layout puts an index: the exclusive or of the bases of its bits."""
    row = column = 0
    for i, base in enumerate(bases):
        if index >> i & 1:
            row ^= base[0]
            column ^= base[1]
    return row, column


@pytest.mark.parametrize("name", ["a1", "a2", "b1", "b2", "d", "w"])
def test_registers(name: str) -> None:
    layout = triton_layouts()[name]
    rows = emulator_layouts()[name]
    assert len(rows) == len(set(rows))
    for thread, register, row, column in rows:
        parts = (
            place(layout.lane_bases, thread % 32),
            place(layout.warp_bases, thread // 32),
            place(layout.reg_bases, register),
        )
        expected = [0, 0]
        for part in parts:
            expected = [expected[0] ^ part[0], expected[1] ^ part[1]]
        assert [row, column] == expected, (thread, register)


@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_swizzle(swizzle: int) -> None:
    """Byte offsets of a tile of 8 rows as TMA lays it out."""
    bases = triton_layouts()[f"s{swizzle}"].offset_bases
    for offset, swizzled, _, _ in emulator_layouts()[f"s{swizzle}"]:
        row, column = place(bases, swizzled // 2)  # which element lies there
        assert row * swizzle + column * 2 == offset
