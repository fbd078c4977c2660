"""The sm_90a kernels on the CPU: launch geometry, every instance, sanitizers, planted bugs, and which one is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from cuda_emulated import A100, H100, EmulatedError, bottleneck, build, conv_bn_act, kernels, needs_toolkit, rotated
from cuda_programs import Bug, assert_passes, program, run
from support import assert_parity, bottleneck_case, conv_case
from torch import Tensor

from resnet_fused.kernels import cuda
from resnet_fused.samples import sample
from resnet_fused.shapes import BottleneckChain

pytestmark = needs_toolkit

PARTS = ("SHARED", "PING_PONG", "SPLIT", "DUAL", "BOTTLENECK", "ROTATED", "STREAMED")
"""Of tests/cuda/small_sm90.cu."""
SCHEDULES = [
    {"EMULATOR_ORDER": "forward", "EMULATOR_ASYNC": "late"},
    {"EMULATOR_ORDER": "reverse", "EMULATOR_ASYNC": "early"},
    {"EMULATOR_ORDER": "random", "EMULATOR_ASYNC": "random"},
]


def test_geometry() -> None:
    """Tiles, shares of the depth, tensor maps and shared memory, as functions of the problem."""
    assert_passes(run(build("emulated", "test_sm90_geometry") / "test_sm90_geometry"))


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_every_instance(name: str) -> None:
    """Integers bit for bit, random values by the parity rule, NaN and infinity, odd sizes, channel slices."""
    assert_passes(run(build("emulated", "test_sm90") / "test_sm90", f"_{name}_"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sm90")


def small(folder: Path, parts: Sequence[str], sanitizer: str = "", bug: Bug | None = None) -> Path:
    return program(folder, "test_sm90.cpp", "small_sm90.cu", [f"SMALL_{part}" for part in parts], sanitizer, bug)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: "-".join(schedule.values()))
def test_schedules(folder: Path, schedule: dict[str, str]) -> None:
    """Neither the order of the warps nor the moment at which copies and products land changes anything."""
    assert_passes(run(small(folder, PARTS), "", "integers", **schedule))


@pytest.mark.parametrize(
    ("sanitizer", "parts"),
    [
        ("address,undefined", PARTS[:-1]),
        pytest.param("address,undefined", PARTS[-1:], marks=pytest.mark.thorough),
        pytest.param("thread", PARTS, marks=pytest.mark.thorough),
    ],
)
def test_sanitized(folder: Path, sanitizer: str, parts: Sequence[str]) -> None:
    """No access out of bounds, and none that a barrier should have ordered and did not."""
    assert_passes(run(small(folder, parts, sanitizer), "", "integers"))


BUGS = {
    # The ring
    "producer does not wait for the stage": (
        "SHARED",
        Bug("sm90/pipeline.h", "ptx::mbar_wait(empty(p.stage()), p.phase() ^ 1);", ""),
    ),
    "consumer waits for the other parity": (
        "SHARED",
        Bug("sm90/pipeline.h", "mbar_wait(full(p.stage()), p.phase())", "mbar_wait(full(p.stage()), p.phase() ^ 1)"),
    ),
    "one arrival too few": ("SHARED", Bug("sm90/conv.h", "ring.init(T::kReleases);", "ring.init(T::kReleases - 1);")),
    "expects the weights' bytes only": (
        "SHARED",
        Bug("sm90/conv.h", "ring.acquire(position, T::kStageBytes);", "ring.acquire(position, T::kBytesW);"),
    ),
    "a stage let go one step early": ("SHARED", Bug("sm90/conv.h", "ptx::wg_wait<1>();  //", "ptx::wg_wait<2>();  //")),
    "the wrong stage let go": (
        "SHARED",
        Bug("sm90/conv.h", "        release(position.use - 1);\n      }", "        release(position.use);\n      }"),
    ),
    "rows of taps are not counted": (
        "SPLIT",
        Bug("sm90/conv.h", "tap_w = 0, ++tap_h;", "tap_w = 0;"),
    ),
    "the kernel ahead may still write": ("SPLIT", Bug("sm90/conv.h", "  take_turn();\n", "")),
    "the shares may not be there": ("SPLIT", Bug("sm90/conv_reduce.h", "  take_turn();\n", "")),
    "groups do not take turns": ("PING_PONG", Bug("sm90/conv.h", "turns.wait(it);", "")),
    "only a cluster's first block learns of a free stage": (
        "PING_PONG",
        Bug("sm90/pipeline.h", "if (lane < kCluster)", "if (lane < 1)"),
    ),
    "a block leaves while others write to it": (
        "PING_PONG",
        Bug("sm90/conv.h", "    ptx::cluster_sync();  // a block that is gone", "    // a block that is gone"),
    ),
    # Products
    "rows of the second half of a tile": (
        "PING_PONG",
        Bug("sm90/conv.h", "(m * 64 * kRowBytes + kk * 32) / 16", "(kk * 32) / 16"),
    ),
    "depth step of a descriptor": ("SPLIT", Bug("sm90/conv.h", "w + kk * 32 / 16", "w + kk * 16 / 16")),
    "accumulators read before the last product": (
        "SPLIT",
        Bug(
            "sm90/conv.h",
            "      ptx::wg_wait<0>();\n      release(position.use - 1);",
            "      release(position.use - 1);",
        ),
    ),
    "rows and columns of the taps swapped": (
        "SPLIT",
        Bug("sm90/conv.h", "c, tap_w, tap_h, work.n0);", "c, tap_h, tap_w, work.n0);"),
    ),
    "last step of a share left out": (
        "SPLIT",
        Bug("sm90/conv.h", "(split + 1) / a.splits);", "(split + 1) / a.splits) - (a.splits > 1);"),
    ),
    "a share of the sum left out": (
        "SPLIT",
        Bug("sm90/conv_reduce.h", "int split = 0; split < a.splits", "int split = 1; split < a.splits"),
    ),
    "second sum starts from the first": (
        "DUAL",
        Bug("sm90/conv.h", "i != 0 || kk != 0);", "i != 0 || kk != 0 || behind);"),
    ),
    # The epilogue
    "staging buffer reused while it is stored": (
        "PING_PONG",
        Bug("sm90/conv.h", "    if (leader()) {\n      ptx::tma_store_wait<0>();", "    if (leader()) {"),
    ),
    "stores not shown to TMA": ("SPLIT", Bug("sm90/conv.h", "    ptx::fence_async();\n", "")),
    "TMA stores before every warp has written": (
        "DUAL",
        Bug("sm90/conv.h", "    ptx::fence_async();\n    group_sync();", "    ptx::fence_async();"),
    ),
    "scales read before they are there": (
        "DUAL",
        Bug(
            "sm90/conv.h", "    group_sync();  // scale and shift are there, the staging buffer is free\n", "", "thread"
        ),
    ),
    "residual of the tile before": (
        "PING_PONG",
        Bug("sm90/conv.h", "store_tile(work, tiles++ & 1);", "store_tile(work, 0);"),
    ),
    "residual not waited for": (
        "SHARED",
        Bug("sm90/conv.h", "    if (a.residual) ptx::mbar_wait(residual_full, residual_phase);\n", ""),
    ),
    # The bottleneck
    "h1 overwritten under the other warps": (
        "BOTTLENECK",
        Bug("sm90/bottleneck64.h", "    group_sync();  // every warp is past GEMM 2", "    //", "thread"),
    ),
    "h1 not shown to wgmma": ("BOTTLENECK", Bug("sm90/bottleneck64.h", "    ptx::fence_async();\n", "")),
    "h1 read before every warp has written": (
        "BOTTLENECK",
        Bug("sm90/bottleneck64.h", "    ptx::fence_async();\n    group_sync();", "    ptx::fence_async();", "thread"),
    ),
    "h1 is relu(b1) outside of the image": (
        "BOTTLENECK",
        Bug("sm90/bottleneck64.h", "if (tile.h == 0 || tile.w == 0 ||", "if (false &&"),
    ),
    "no turns in the bottleneck": ("BOTTLENECK", Bug("sm90/bottleneck64.h", "turns.wait(it);", "")),
    "a slice let go one step early": (
        "BOTTLENECK",
        Bug("sm90/bottleneck64.h", "ptx::wg_wait<1>();", "ptx::wg_wait<2>();"),
    ),
    "second weights not waited for": (
        "BOTTLENECK",
        Bug("sm90/bottleneck64.h", "if (it < 2) ptx::mbar_wait(weights_full + 8, 0);", ""),
    ),
    "taps of the 3x3 shifted": ("BOTTLENECK", Bug("sm90/bottleneck64.h", "kHalo + tap % 3)", "kHalo + tap % 2)")),
    "rows of W3 not permuted": (
        "BOTTLENECK",
        Bug("sm90/bottleneck64_geometry.h", "rows[] = {0, 1, 8, 2, 32}", "rows[] = {0, 1, 2, 8, 32}"),
    ),
    # The streamed bottleneck
    "slots let go one group of products early": (
        "STREAMED",
        Bug("sm90/bottleneck_streamed.h", "ptx::wg_wait<1>();", "ptx::wg_wait<2>();"),
    ),
    "sums read before the last products": (
        "STREAMED",
        Bug("sm90/bottleneck_streamed.h", "    ptx::wg_wait<0>();\n", ""),
    ),
    "slot full before the other block's share is there": (
        "STREAMED",
        Bug("sm90/bottleneck_streamed.h", "position, T::kWeightBytes);", "position, T::kWeightBytes / T::kCluster);"),
    ),
    "every block fetches the first share": (
        "STREAMED",
        Bug("sm90/bottleneck_streamed.h", "row + rank * kShare);", "row);"),
    ),
    "cluster left early": (
        "STREAMED",
        Bug("sm90/bottleneck_streamed.h", "  if constexpr (T::kCluster > 1) ptx::cluster_sync();", ""),
    ),
    "h1 replaces what is being stored": (
        "STREAMED",
        Bug(
            "sm90/bottleneck_streamed.h",
            "    if (leader()) ptx::tma_store_wait<0>();\n    sync();",
            "    sync();",
        ),
    ),
    "h1 replaced under the other group": (
        "STREAMED",
        Bug("sm90/bottleneck_streamed.h", "    sync();  // the tile before", "    //", "thread"),
    ),
    "streamed h1 is relu(b1) outside of the image": (
        "STREAMED",
        Bug("sm90/bottleneck_streamed.h", "? columns[half] : 0u", "? columns[half] : ~0u"),
    ),
    "streamed h1 is relu(b1) beside the image": (
        "STREAMED",
        Bug("sm90/bottleneck_streamed.h", "? 0xffff0000u : 0u", "? 0xffff0000u : 0xffff0000u"),
    ),
    "streamed h1 not shown to wgmma": (
        "STREAMED",
        Bug(
            "sm90/bottleneck_streamed.h",
            "    ptx::fence_async();\n    sync();\n  }",
            "    sync();\n  }",
        ),
    ),
    "h2 read before the other group has written": (
        "STREAMED",
        Bug("sm90/bottleneck_streamed.h", "    sync();  // h2 is there", "    //", "thread"),
    ),
    "rows of the halo too narrow": (
        "STREAMED",
        Bug("sm90/bottleneck_streamed.h", "tap / 3 * T::kHaloW", "tap / 3 * T::kTileW"),
    ),
    "pixels beside the tile stored": (
        "STREAMED",
        Bug("sm90/bottleneck_streamed.h", "pixel < T::kTileW ?", "true ?"),
    ),
    "shortcut of the pass before": (
        "STREAMED",
        Bug("sm90/bottleneck_streamed.h", "(shortcuts++) & 1", "shortcuts & 1"),
    ),
    "shortcut fetched over a store": (
        "STREAMED",
        Bug(
            "sm90/bottleneck_streamed.h",
            "        ptx::tma_store_wait<0>();\n        ptx::mbar_expect_tx",
            "        ptx::mbar_expect_tx",
        ),
    ),
    "result stored before every warp has written": (
        "STREAMED",
        Bug("sm90/bottleneck_streamed.h", "      group_sync();\n", "", "thread"),
    ),
    # The rotated chain
    "h1 let go one step early": ("ROTATED", Bug("sm90/rotated.h", "ptx::wg_wait<1>();", "ptx::wg_wait<2>();")),
    "y read before its products are done": (
        "ROTATED",
        Bug("sm90/rotated.h", "      ptx::wg_wait<0>();\n      if (chunk > 0)", "      if (chunk > 0)"),
    ),
    "W1 let go under its products": (
        "ROTATED",
        Bug(
            "sm90/rotated.h",
            "        ptx::wg_commit();\n      }\n",
            "        ptx::wg_commit();\n        release(position.use);\n      }\n",
        ),
    ),
    "columns of W1 of the first chunk": (
        "ROTATED",
        Bug("sm90/rotated.h", "maps.w1, chunk * kDepth, 0);", "maps.w1, 0, 0);"),
    ),
    "second slice of W3 is the first": ("ROTATED", Bug("sm90/rotated.h", "kk / 4 * (kMatrixBytes / 16)", "0")),
    "bytes of W1 awaited at the end of a chain": (
        "ROTATED",
        Bug("sm90/rotated.h", "a.next ? 2 * T::kBytesW : T::kBytesW", "2 * T::kBytesW"),
    ),
    "every block fetches the first share of the chain's weights": (
        "ROTATED",
        Bug("sm90/rotated.h", "row + rank * kShare);", "row);"),
    ),
    "first pixel of a tile without its padding": (
        "ROTATED",
        Bug("sm90/rotated.h", "w = m0 % a.width - 1;", "w = m0 % a.width;"),
    ),
    "x of the first group": (
        "ROTATED",
        Bug("sm90/rotated.h", "(first + rank) * T::kTile + group * T::kGroupTile);", "(first + rank) * T::kTile);"),
    ),
    "x of the tile before": (
        "ROTATED",
        Bug("sm90/rotated.h", "rank + static_cast<int>(tile) * gridDim.x;", "rank;"),
    ),
    "x not waited for": (
        "ROTATED",
        Bug("sm90/rotated.h", "    ptx::mbar_wait(full + use % T::kSides * 8, use / T::kSides & 1);\n", ""),
    ),
    "buffer of the next h1 not announced": ("ROTATED", Bug("sm90/rotated.h", "      ptx::mbar_arrive(landed);\n", "")),
    "x fetched over a store": ("ROTATED", Bug("sm90/rotated.h", "        ptx::tma_store_wait<1>();\n", "")),
    "y not shown to TMA": ("ROTATED", Bug("sm90/rotated.h", "    ptx::fence_async();\n", "")),
    "y stored before every warp has written": (
        "ROTATED",
        Bug("sm90/rotated.h", "    ptx::bar_sync(1 + group, 128);\n", "", "thread"),
    ),
    "y in the channels of the first chunk": (
        "ROTATED",
        Bug("sm90/rotated.h", "sides.store(maps.y, chunk * kDepth, row);", "sides.store(maps.y, 0, row);"),
    ),
    "a block of the chain leaves while others write to it": (
        "ROTATED",
        Bug("sm90/rotated.h", "    ptx::cluster_sync();  // a block that is gone", "    // a block that is gone"),
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs(name: str, folder: Path) -> None:
    part, bug = BUGS[name]
    executable = small(folder, [part], bug.sanitizer, bug)
    results = (run(executable, "", "integers", **schedule) for schedule in SCHEDULES)
    assert any(result.returncode != 0 for result in results), "the bug passes"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kernel", ["implicit_gemm", "split_k"])
def test_convolution_is_torchs(dtype: torch.dtype, kernel: str) -> None:
    torch.manual_seed(0)
    for options in ({"padding": 1}, {"r": 1, "s": 1, "stride": 2}, {"r": 5, "padding": (2, 0), "activation": "none"}):
        case = conv_case(2, 64, 9, 8, 72, dtype=dtype, residual="nhwc", **options)
        del case.options["groups"]
        names = [k.name for k in kernels("conv", 90) if k.algorithm == kernel and k.dtype == dtype]
        for name in names[::2]:
            assert_parity(conv_bn_act(*case.args, **case.options, kernel=name, device=H100), case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_bottleneck_is_torchs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for channels, projection in ((256, False), (64, True)):
        case = bottleneck_case(1, channels, 9, 8, 64, 256, dtype=dtype, projection=projection)
        for name in ("groups", "stride"):
            del case.options[name]
        short = "bf16" if dtype == torch.bfloat16 else "fp16"
        kernel = f"bottleneck90_{short}_64_{'projection' if projection else 'identity'}"
        assert_parity(bottleneck(*case.args, **case.options, kernel=kernel, device=H100), case)
    case = bottleneck_case(1, 512, 9, 16, 128, 512, dtype=dtype)
    for name in ("groups", "stride"):
        del case.options[name]
    kernel = f"bottleneck90_{short}_128_identity"
    assert_parity(bottleneck(*case.args, **case.options, kernel=kernel, device=H100), case)


@pytest.mark.parametrize(("mid", "dtype"), [(64, torch.bfloat16), (64, torch.float16), (128, torch.bfloat16)])
def test_chain_is_torchs(mid: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend's own function, with the emulated kernels in the place of the ops."""

    def layer(x: Tensor, w: Tensor, s: Tensor | None, b: Tensor, stride: int) -> Tensor:
        return conv_bn_act(x, w, s, b, stride=stride, kernel="implicit_gemm", device=H100)

    monkeypatch.setattr(cuda, "_layer", layer)
    monkeypatch.setattr(cuda, "_rotated", lambda *tensors, algorithm: rotated(*tensors, kernel=algorithm))
    call = sample(BottleneckChain(2, 4 * mid, 9, 8, mid, 3 if mid == 64 else 2), dtype, torch.device("cpu"))
    y = call.run_kernel(cuda, "rotated")
    exact = call.to(torch.float64).run("reference")
    allowed = 2 * (call.run("reference") - exact).abs().max() + torch.finfo(dtype).eps / 2 * exact.abs().max()
    assert y.dtype == dtype
    assert (y - exact).abs().max() <= allowed


def test_empty_batch() -> None:
    x = torch.empty(0, 64, 7, 7, dtype=torch.bfloat16)
    for kernel in ("conv90_bf16_128x128_ping_pong", "conv90_bf16_64x64_split"):
        weight = torch.empty(72, 64, 1, 1, dtype=torch.bfloat16)
        assert conv_bn_act(x, weight, None, torch.empty(72), kernel=kernel, device=H100).shape == (0, 72, 7, 7)
    case = bottleneck_case(0, 64, 7, 7, 64, 256, dtype=torch.bfloat16, projection=True)
    kernel = "bottleneck90_bf16_64_projection"
    assert bottleneck(*case.args[:9], kernel=kernel, device=H100).shape == (0, 256, 7, 7)
    y, h1 = rotated(*_chain_arguments(0, 64, 7))
    assert y.shape == (0, 256, 7, 7)
    assert h1.shape == (0, 64, 7, 7)


def _chain_arguments(n: int, mid: int, size: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Of `rotated`, without values."""

    def image(channels: int) -> Tensor:
        return torch.empty(n, channels, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)

    def layer(k: int, c: int, taps: int) -> list[Tensor]:
        return [torch.empty(k, c, taps, taps, dtype=dtype), torch.empty(k), torch.empty(k)]

    k = 4 * mid
    return [image(mid), *layer(mid, mid, 3), *layer(k, mid, 1), image(k), *layer(mid, k, 1)]


def test_choice() -> None:
    """Batches take the large tiles; at batch 1 the depth is split where the outputs fill few multiprocessors."""

    def chosen(n: int, c: int, size: int, k: int, taps: int) -> str:
        x = torch.empty(n, size, size, c, dtype=torch.bfloat16).permute(0, 3, 1, 2)
        weight = torch.empty(k, taps, taps, c, dtype=torch.bfloat16).permute(0, 3, 1, 2)
        return conv_bn_act(x, weight, None, torch.empty(k), padding=taps // 2, device=H100, only_choose=True)

    assert chosen(64, 64, 56, 64, 3).startswith("conv90_bf16_128x64")
    assert chosen(64, 512, 7, 512, 3).startswith("conv90_bf16_128x")
    assert chosen(64, 256, 14, 1024, 1).startswith("conv90_bf16_128x")
    for shape in [(1, 512, 7, 512, 3), (1, 2048, 7, 512, 1), (1, 256, 14, 256, 3)]:
        assert chosen(*shape).endswith("_split")


@pytest.mark.parametrize(("mid", "size"), [(64, 56), (128, 28), (256, 14)])
def test_bottleneck_choice(mid: int, size: int) -> None:
    """An H100 takes the kernel made for it, an A100 (where mid 256 has none) another."""
    case = bottleneck_case(8, 4 * mid, size, size, mid, 4 * mid, dtype=torch.bfloat16)
    arguments = case.args[:7]
    assert bottleneck(*arguments, device=H100, only_choose=True) == f"bottleneck90_bf16_{mid}_identity"
    assert bottleneck(*arguments, kernel="whole", device=H100, only_choose=True) == f"bottleneck90_bf16_{mid}_identity"


@pytest.mark.parametrize(("mid", "size"), [(64, 56), (128, 28)])
@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_chain_choice(mid: int, size: int, dtype: torch.dtype, name: str) -> None:
    assert rotated(*_chain_arguments(8, mid, size, dtype), only_choose=True) == f"rotated90_{name}_{mid}"


@pytest.mark.parametrize(
    ("mid", "dtype", "device", "reason"),
    [
        (256, torch.bfloat16, H100, "rotated90_bf16_64: it is made for 64 channels inside and 256 outside"),
        (64, torch.bfloat16, A100, "rotated90_bf16_128: it is made for sm_90a, the device is sm_80"),
        (64, torch.float32, H100, "rotated90_bf16_128: it is compiled for another dtype"),
    ],
)
def test_chains_without_a_kernel(mid: int, dtype: torch.dtype, device: tuple[int, int, int], reason: str) -> None:
    with pytest.raises(EmulatedError, match=reason):
        rotated(*_chain_arguments(1, mid, 7, dtype), device=device, only_choose=True)


def test_table() -> None:
    """What the table says of every kernel fits the machine."""
    rows = kernels(arch=90)
    assert {row.op for row in rows} == {"conv", "bottleneck", "bottleneck_chain"}
    for row in rows:
        assert row.tile[2] == 64
        assert row.threads in (256, 384)
        assert row.shared_bytes <= H100[2]
