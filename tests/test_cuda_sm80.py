"""The sm_80 kernels on the CPU: every instance, parity with torch, sanitizers, planted bugs, and the choice of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_emulated import A100, EmulatedError, basic_block, bottleneck, build, conv_bn_act, kernels, needs_toolkit, stem
from cuda_emulated import options as schedule
from cuda_programs import Bug, assert_passes, program, run
from support import (
    Case,
    assert_parity,
    basic_block_case,
    bottleneck_case,
    conv_case,
    stem_case,
)

pytestmark = needs_toolkit

ASAN, TSAN = "address,undefined", "thread"
TYPES = ("bf16", "fp16", "tf32")
PARTS = ("CONV", "ACTIVATED", "DUAL", "BOTTLENECK", "BASIC_BLOCK", "STEM")
"""Of tests/cuda/small_sm80.cu."""


@pytest.mark.parametrize("name", TYPES)
def test_every_instance(name: str) -> None:
    """Integers bit for bit, random values by the parity rule, NaN and infinity, odd sizes, slices, all schedules."""
    tree = build("emulated", "test_sm80")
    assert_passes(run(tree / "test_sm80", f"_{name}_"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sm80")


def small(folder: Path, parts: Sequence[str], sanitizer: str = "", bug: Bug | None = None) -> Path:
    return program(folder, "test_sm80.cpp", "small_sm80.cu", [f"SMALL_{part}" for part in parts], sanitizer, bug)


@pytest.mark.parametrize("sanitizer", [pytest.param(ASAN, marks=pytest.mark.thorough), TSAN])
def test_sanitized(folder: Path, sanitizer: str) -> None:
    """No access out of bounds, and none that a barrier should have ordered and did not."""
    assert_passes(run(small(folder, PARTS, sanitizer), "--quick"))


RING = "    __syncthreads();  // the step's data are there; and nobody reads the stage of the step before any more\n"
BUGS = {
    "ring: no barrier": Bug("pipeline.h", RING, ""),
    "ring: waits for one group too few": Bug("pipeline.h", "cp_wait<kStages - 2>", "cp_wait<kStages - 1>"),
    "ring: last steps close no group": Bug(
        "pipeline.h",
        "load(free_stage, step + kStages - 1);\n    ptx::cp_commit();",
        "{ load(free_stage, step + kStages - 1); ptx::cp_commit(); }",
    ),
    "ring: another stage": Bug("pipeline.h", "    compute(stage, step);", "    compute(free_stage, step);"),
    "ring: stages past its end": Bug("pipeline.h", "free_stage + 1 == kStages ? 0", "free_stage > kStages ? 0"),
    "tile: lanes of A for B": Bug("warp_tile.h", "lane % 8 + lane / 16 * 8", "lane % 16"),
    "tile: chunks of B exchanged": Bug("warp_tile.h", "lane / 8 % 2", "1 - lane / 8 % 2"),
    "pixels: above and below the image": Bug(
        "operands.h", "static_cast<unsigned>(y_[i] + dy) < static_cast<unsigned>(window_.h)", "y_[i] + dy < window_.h"
    ),
    "pixels: past the last tap": Bug("operands.h", "tap_y_ < window_.r && ", ""),
    "pixels: past the last image": Bug("conv.h", "if (m >= p.n * p.p * p.q) return Origin::nowhere();", "", ASAN),
    "pixels: dilation of the other axis": Bug("operands.h", "tap_x_ * window_.dil_w", "tap_x_ * window_.dil_h"),
    "weights: past the last channel": Bug(
        "operands.h", "k_ < depth_ && i * Pattern::kRowStep < rows_left_", "k_ < depth_", ASAN
    ),
    "weights: past the depth": Bug("operands.h", "k_ < depth_ && i *", "i *", ASAN),
    "activation: of the padding": Bug("operands.h", "if ((present >> i & 1) == 0) continue;", ""),
    "activation: another step's pixels": Bug("operands.h", "present_ >> stage * Pattern::kCopies", "present_"),
    "activation: before its copies land": Bug(
        "pipeline.h",
        "    ptx::cp_wait<kStages - 2>();\n    landed(stage, step);",
        "    landed(stage, step);\n    ptx::cp_wait<kStages - 2>();",
    ),
    "epilogue: strips while the ring is read": Bug(
        "conv.h", "  __syncthreads();  // the ring has been read: the strips, or the second product, take its place", ""
    ),
    "epilogue: ReLU before the residual": Bug("epilogue.h", "float v = sum[f] +", "float v = ptx::relu(sum[f]) +"),
    "epilogue: ReLU stops NaN": Bug("epilogue.h", "to.relu ? ptx::relu(v)", "to.relu ? fmaxf(v, 0.f)"),
    "epilogue: past the last channel": Bug("epilogue.h", "k < to.channels ? pixel(", "true ? pixel("),
    "dual: scale of the first for both": Bug("conv.h", "sum, side.scale, nullptr", "sum, p.conv.scale, nullptr"),
    "split: a part left out": Bug("split_k.h", "int split = 0;", "int split = 1;"),
    "block: h1 before it is written": Bug(
        "bottleneck.h", "    __syncthreads();  // h1 is there, and the ring free\n", ""
    ),
    "block: shift in the padding of h1": Bug(
        "epilogue.h", "place.inside ? ptx::relu(acc[i][j][2 * half]) : 0.f", "ptx::relu(acc[i][j][2 * half])"
    ),
    "block: taps transposed": Bug("block_tile.h", "tap / 3 * kHaloW + tap % 3", "tap % 3 * kHaloW + tap / 3"),
    "block: ring free for the next channels": Bug(
        "bottleneck.h",
        "    scale_and_shift(grid, acc, p.conv3.scale, p.conv3.shift, first, p.k);\n    __syncthreads();",
        "    scale_and_shift(grid, acc, p.conv3.scale, p.conv3.shift, first, p.k);",
    ),
    "basic block: strips while the ring is read": Bug(
        "basic_block.h",
        "p.conv2.shift, 0, Tile::kChannels);\n  __syncthreads();",
        "p.conv2.shift, 0, Tile::kChannels);",
        TSAN,
    ),
    "stem: results before they are there": Bug(
        "stem.h", "    __syncthreads();\n    pool_stem", "    pool_stem"
    ),
    "stem: next patch while this one is read": Bug(
        "stem.h", "    __syncthreads();  // weights and patch are there; the last tile has been pooled\n", ""
    ),
    "stem: values past a row of taps": Bug("stem.h", "left >= kWord ? 0xffffffffu", "true ? 0xffffffffu"),
    "stem: pooling stops NaN": Bug("stem.h", "v > largest[e] || v != v", "v > largest[e]"),
}  # fmt: skip


def part_of(name: str) -> str:
    """The part of the kernels that a bug is in, by the first word of its name."""
    parts = {
        "activation": "ACTIVATED",
        "dual": "DUAL",
        "block": "BOTTLENECK",
        "basic block": "BASIC_BLOCK",
        "stem": "STEM",
    }
    return parts.get(name.split(":")[0], "CONV")


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs(name: str, folder: Path) -> None:
    bug = BUGS[name]
    planted = replace(bug, header=f"sm80/{bug.header}")
    executable = small(folder, [part_of(name)], bug.sanitizer, planted)
    assert run(executable, "--quick").returncode != 0, "the bug passes"


def without(case: Case, *names: str) -> dict[str, Any]:
    """The options of a case that the kernels' wrappers take as they are."""
    return {name: value for name, value in case.options.items() if name not in names}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kernel", ["implicit_gemm", "split_k"])
def test_convolution_is_torchs(dtype: torch.dtype, kernel: str) -> None:
    torch.manual_seed(0)
    for options in ({"padding": 1}, {"r": 1, "s": 1, "stride": 2}, {"r": 5, "padding": (2, 0), "activation": "none"}):
        case = conv_case(2, 64, 9, 8, 72, dtype=dtype, residual="nhwc", **options)
        assert_parity(conv_bn_act(*case.args, **without(case, "groups"), kernel=kernel), case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_blocks_are_torchs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    case = bottleneck_case(1, 64, 9, 8, 64, 72, dtype=dtype)
    assert_parity(bottleneck(*case.args, **without(case, "groups", "stride"), kernel="whole"), case)
    case = basic_block_case(1, 16, 9, 17, 32, 32, dtype=dtype, stride=2)
    assert_parity(basic_block(*case.args, **without(case, "groups"), kernel="whole"), case)
    case = stem_case(k=64, dtype=dtype)
    assert_parity(stem(*case.args, **case.options, kernel="whole"), case)


def test_split_adds_in_one_order() -> None:
    """The same input gives the same bits in whatever order the blocks and warps run."""
    case = conv_case(1, 512, 7, 7, 64, dtype=torch.bfloat16, padding=1)
    outputs = []
    for order in ("forward", "reverse", "random"):
        schedule(order)
        outputs.append(conv_bn_act(*case.args, **without(case, "groups"), kernel="split_k"))
    schedule()
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def chosen(n: int, c: int, size: int, k: int, taps: int, kernel: str = "") -> str:
    """The convolution that an A100 runs at stride 1."""
    x = torch.empty(n, size, size, c, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    weight = torch.empty(k, taps, taps, c, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    options = {"padding": taps // 2, "device": A100, "only_choose": True, "kernel": kernel}
    return conv_bn_act(x, weight, None, torch.empty(k), **options)


def test_choice() -> None:
    """Batches take the large tiles, few channels the narrow ones, and single small images split their depth."""
    assert chosen(64, 256, 14, 256, 3).startswith(("conv80_bf16_256x128", "conv80_bf16_128x128"))
    assert chosen(64, 64, 56, 64, 3).startswith(("conv80_bf16_128x64", "conv80_bf16_64x64"))
    for shape in [(1, 512, 7, 512, 3), (1, 2048, 7, 512, 1), (1, 256, 14, 256, 3)]:
        assert chosen(*shape).endswith("_split")
    assert chosen(64, 64, 56, 64, 3, "conv80_bf16_64x128x32_s4") == "conv80_bf16_64x128x32_s4"


def test_what_it_cannot_run_is_said() -> None:
    with pytest.raises(EmulatedError, match="channels in multiples of 8"):
        chosen(1, 12, 7, 16, 3)
    with pytest.raises(EmulatedError, match="no kernel is called conv80_bf16_1x1"):
        chosen(1, 16, 7, 16, 3, "conv80_bf16_1x1")
    case = bottleneck_case(1, 64, 9, 8, 48, 64, dtype=torch.bfloat16)
    with pytest.raises(EmulatedError, match="another width"):
        bottleneck(*case.args, **without(case, "groups", "stride"))


def test_no_images() -> None:
    case = conv_case(0, 16, 7, 7, 16, dtype=torch.bfloat16, padding=1)
    assert conv_bn_act(*case.args, **without(case, "groups"), kernel="implicit_gemm").shape == (0, 16, 7, 7)


def test_table() -> None:
    """What the table says of every kernel fits the machine."""
    rows = kernels(arch=80)
    assert {row.op for row in rows} == {"conv", "bottleneck", "basic_block", "stem"}
    for row in rows:
        assert row.threads in (128, 256)
        assert row.shared_bytes <= A100[2]
        assert row.stages in (1, 3, 4)
