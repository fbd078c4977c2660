"""Do the checks of the Triton kernels notice a bug? One planted bug after another, each in a process of its own.

`python tests/triton_mutants.py [TEXT]` prints one JSON line for every mutant (with TEXT in its file or bug): which
check caught it, or null; `--list` only names them. A mutant may write where it likes, so it must not share a process
with anything; forking one that has imported torch and Triton costs little.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

os.environ["TRITON_INTERPRET"] = "1"

import interpreter_guard
import torch
import triton.language

import resnet_fused

FOLDER = Path(resnet_fused.__file__).parent / "kernels" / "triton"
PACKAGE = "resnet_fused.kernels.triton"


class Mutant(NamedTuple):
    """A bug: in which file, what it is, text that becomes other text, and the kernels whose cases should show it."""

    file: str
    bug: str
    old: str
    new: str
    kernels: tuple[str, ...]


def _m(file: str, bug: str, old: str, new: str, *kernels: str) -> Mutant:
    return Mutant(file, bug, old, new, kernels or (file,))


GEMM, TMA, BOTTLENECK, BASIC = "implicit_gemm", "tma_conv", "whole_bottleneck", "whole_basic_block"
MUTANTS = [
    _m(
        GEMM,
        "rows past the last are read",
        "mask = in_rows[:, None] & in_image",
        "mask = (rm >= 0)[:, None] & in_image",
    ),
    _m(
        GEMM,
        "row below the image is read",
        "h = h0 + r * DIL_H\n            v = w0 + s * DIL_W\n            in_image = ((h >= 0) & (h < H)",
        "h = h0 + r * DIL_H\n            v = w0 + s * DIL_W\n            in_image = ((h >= 0) & (h <= H)",
    ),
    _m(
        GEMM,
        "column before the image is read",
        "(h >= 0) & (h < H) & (v >= 0) & (v < W))[:, None]",
        "(h >= 0) & (h < H) & (v < W))[:, None]",
    ),
    _m(
        GEMM,
        "channels past the last are read",
        "(v < W))[:, None] & (c < C)[None, :]",
        "(v < W))[:, None] & (c >= 0)[None, :]",
    ),
    _m(GEMM, "taps past the last are read", "& (tap < R * S)[None, :]", "& (tap >= 0)[None, :]"),
    _m(GEMM, "vertical dilation forgotten", "h = h0 + r * DIL_H", "h = h0 + r"),
    _m(GEMM, "all groups read the first's channels", "x_pitch + group * C", "x_pitch"),
    _m(GEMM, "stride of rows forgotten", "rm // Q % P * STRIDE_H", "rm // Q % P"),
    _m(
        GEMM,
        "pixel offsets in 32 bits",
        "((rm // (P * Q)).to(tl.int64) * H + h0) * W + w0",
        "((rm // (P * Q)) * H + h0) * W + w0",
    ),
    _m(GEMM, "pixel offsets of 1x1 in 32 bits", "pixel = rm.to(tl.int64)", "pixel = rm"),
    _m(GEMM, "output offsets in 32 bits", "rows = rm.to(tl.int64)\n    columns", "rows = rm\n    columns"),
    _m(
        GEMM,
        "a part of the split sum ends early",
        "last = tl.minimum(first + share, blocks)",
        "last = tl.minimum(first + share, blocks) - 1",
    ),
    _m(GEMM, "parts of the split sum overlap", "rows += tl.program_id(2).to(tl.int64) * M", "rows += 0 * M"),
    _m(GEMM, "the last part is not added", "for _ in tl.range(0, SPLIT):", "for _ in tl.range(0, SPLIT - 1):"),
    _m(
        GEMM,
        "padding goes through the prologue",
        "tl.where(mask, relu(affine(a, scale, shift, 1)), 0.0)",
        "relu(affine(a, scale, shift, 1))",
    ),
    _m(
        GEMM,
        "prologue without ReLU",
        "tl.where(mask, relu(affine(a, scale, shift, 1)), 0.0)",
        "tl.where(mask, affine(a, scale, shift, 1), 0.0)",
    ),
    _m(
        GEMM,
        "residual after the ReLU",
        "    v = affine(acc, scale, shift, 1)\n",
        "    v = relu(affine(acc, scale, shift, 1))\n",
    ),
    _m(
        GEMM,
        "channels past the last of the residual are read",
        "in_rows[:, None] & (columns < N)[None, :]\n        v +=",
        "in_rows[:, None] & (columns >= 0)[None, :]\n        v +=",
        GEMM,
        TMA,
    ),
    _m(
        GEMM,
        "channels past the last are written",
        "mask = in_rows[:, None] & (rn < K)[None, :]\n    channels",
        "mask = in_rows[:, None] & (rn >= 0)[None, :]\n    channels",
    ),
    _m(
        GEMM,
        "sums not brought to the projection's scale",
        "acc = acc * (scale / out)[None, :]",
        "acc = acc * (out / out)[None, :]",
    ),
    _m(
        GEMM,
        "the projection's shift forgotten",
        "return acc, out, shift + vector(shift2_ptr, rn, K)",
        "return acc, out, shift",
    ),
    _m("common", "ReLU drops NaN", ", propagate_nan=tl.PropagateNan.ALL", "", GEMM),
    _m(
        "common",
        "division by a projection's scale of 0",
        "tl.abs(scale) < TINY_SCALE",
        "tl.abs(scale) < 0.0",
        GEMM,
        TMA,
    ),
    _m("common", "vectors read past their end", "mask=index < count", "mask=index <= count", "pointwise"),
    _m("pointwise", "the last tile is left out", "tl.cdiv(M, BM) * tiles_n", "tl.cdiv(M, BM) * tiles_n - 1"),
    _m("pointwise", "both column parts are stored at the left one", "y, m, n + HALF,", "y, m, n,"),
    _m("pointwise", "the prologue's shift is its scale", "vector(in_shift_ptr, k, C)", "vector(in_scale_ptr, k, C)"),
    _m(
        "pointwise",
        "rows past the last of the residual are read",
        "rm.to(tl.int64), rn, rm < M,",
        "rm.to(tl.int64), rn, rm >= 0,",
    ),
    _m(TMA, "wrong parity of rows", "row_parity = (r * DIL_H + PAD_H) % 2", "row_parity = r * DIL_H % 2"),
    _m(TMA, "a tap at the edge is skipped", "last = tl.minimum(TAPS,", "last = tl.minimum(TAPS - 1,"),
    _m(TMA, "horizontal dilation forgotten", "v = w0 + s * DIL_W - PAD_W", "v = w0 + s - PAD_W"),
    _m(TMA, "images past the last of the residual are read", "(image < N) & (h < P)", "(image <= N) & (h < P)"),
    _m(TMA, "taps transposed", "w.load([r * S + s, k0, c])", "w.load([s * S + r, k0, c])"),
    _m(TMA, "sums not brought to the projection's scale", "ratio = scale / out", "ratio = out / out"),
    _m(
        "bands",
        "the band begins a pixel late",
        "p % Q * STRIDE - 1, 0)",
        "p % Q * STRIDE, 0)",
        "bottleneck",
        "basic_block",
    ),
    _m("bands", "the band ends a pixel early", "p % Q * STRIDE + 2", "p % Q * STRIDE + 1", "bottleneck", "basic_block"),
    _m("bands", "the right neighbour is left out", "(v + 2 < W)", "(v + 3 < W)", "bottleneck", "bottleneck_chain"),
    _m(
        "bands",
        "pixels past the last are read",
        "inside_h = tl.where(q < pixels, inside_h, 0)",
        "inside_h = inside_h",
        "bottleneck_chain",
        "basic_block",
    ),
    _m(
        "bands",
        "padding channels keep the NaN of an infinity",
        "h = tl.where((c < count)[None, :], h, 0.0)",
        "h = tl.where((c >= 0)[None, :], h, 0.0)",
        "bottleneck",
    ),
    _m(
        "bands",
        "channels past the last of the weights are read",
        "mask=(rn < N)[:, None] & (rc < C)[None, :], other=0.0)",
        "mask=(rn < N)[:, None] & (rc >= 0)[None, :], other=0.0)",
        "bottleneck",
    ),
    _m(
        "bands",
        "masked pixels without a value",
        "& (rc < C)[None, :], other=0.0)\n\n\n@triton.jit\ndef store_tile",
        "& (rc < C)[None, :])\n\n\n@triton.jit\ndef store_tile",
        "bottleneck",
        "transition",
    ),
    _m(
        "bands",
        "every other pixel of a row forgotten",
        "* STRIDE) * W + q % Q * STRIDE",
        "* STRIDE) * W + q % Q",
        "bottleneck",
        "basic_block",
    ),
    _m(
        BOTTLENECK,
        "no barrier before h1 is written again",
        "        tl.debug_barrier()  # every warp has read the previous band's h1\n",
        "",
        "bottleneck",
    ),
    _m(
        BOTTLENECK,
        "no barrier before h1 is read",
        "        tl.debug_barrier()  # bar.sync orders",
        "        # bar.sync orders",
        "bottleneck",
    ),
    _m(
        BOTTLENECK,
        "programs share one scratch",
        "h1 + tl.program_id(0).to(tl.int64) * capacity * MB",
        "h1",
        "bottleneck",
    ),
    _m(
        BOTTLENECK,
        "h1 is stored past the band's end",
        "mask=(q < end)[:, None])",
        "mask=(q < end + 99)[:, None])",
        "bottleneck",
    ),
    _m(BOTTLENECK, "no shortcut", "out += pixel_tile(side,", "out += 0 * pixel_tile(side,", "bottleneck"),
    _m(
        BOTTLENECK,
        "the projection has the last scale",
        "scaled(shortcut, sd, bd,",
        "scaled(shortcut, s3, bd,",
        "bottleneck",
    ),
    _m(
        BASIC,
        "one tile of h1's channels",
        "for n in tl.range(0, MB, BN):",
        "for n in tl.range(0, BN, BN):",
        "basic_block",
    ),
    _m(
        BASIC,
        "no barrier before h1 is read",
        "        tl.debug_barrier()  # bar.sync orders",
        "        # bar.sync orders",
        "basic_block",
    ),
    _m(
        "rotated",
        "the next block reads sums before their ReLU",
        "out = relu(out).to(dtype)\n",
        "out = out.to(dtype)\n",
        "bottleneck_chain",
    ),
    _m(
        "rotated",
        "the next 1x1 has one tile of weights",
        "weight_tile(w1, 0, 0, n,",
        "weight_tile(w1, 0, 0, 0,",
        "bottleneck_chain",
    ),
    _m(
        "rotated",
        "NaN past the last channel reach the next block",
        "RAGGED_K=out % bn != 0",
        "RAGGED_K=False",
        "bottleneck_chain",
    ),
    _m(
        "rotated",
        "every block has the first's 3x3",
        "*layers[i + 1], *layers[i + 2]",
        "*layers[1], *layers[i + 2]",
        "bottleneck_chain",
    ),
    _m("whole_stem", "pooling takes columns outside", "(v >= 0) & (v < Q)", "(v >= 0)", "stem"),
    _m("whole_stem", "the first pooled row lacks a row", "tl.where(i == first, 0, OVERLAP)", "OVERLAP", "stem"),
    _m(
        "whole_stem",
        "the image is a column off",
        "w = q % PADDED_W - padding",
        "w = q % PADDED_W - padding + 1",
        "stem",
    ),
    _m("whole_stem", "the window's neighbours are read", "& (rk % ROW < R * CP)", "& (rk % ROW < ROW)", "stem"),
    _m(
        "dense",
        "no ReLU before the 1x1",
        "return relu(v.to(tl.float32)",
        "return (v.to(tl.float32)",
        "dense_block",
        "transition",
    ),
    _m(
        "dense", "programs share one scratch", "h1 + tl.program_id(0).to(tl.int64) * capacity * MB", "h1", "dense_block"
    ),
    _m("dense", "a pixel counts twice in the mean", "tap // 2 * W + tap % 2", "tap % 2 * W + tap % 2", "transition"),
    _m(
        "pooled_head",
        "a pixel of the next image is added",
        "(p + rp < PIXELS)[:, None]",
        "(p + rp <= PIXELS)[:, None]",
        "head",
    ),
    _m("pooled_head", "the linear layer lacks its bias", "bias.float()", "bias.float() * 0", "head"),
]


class _Finder(importlib.abc.MetaPathFinder):
    """Imports a kernel module from another file."""

    def __init__(self, name: str, file: str) -> None:
        self.name, self.file = name, file

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_file_location(name, self.file) if name == self.name else None


def mutate(mutant: Mutant) -> str:
    """The mutated source.

    Raises:
        ValueError: the text is not there.
    """
    source = (FOLDER / f"{mutant.file}.py").read_text()
    if mutant.old not in source:
        raise ValueError(f"{mutant.file}.py must contain the text that the mutant changes, got none: {mutant.old!r}")
    return source.replace(mutant.old, mutant.new)


def caught_by(mutant: Mutant) -> str | None:
    """Import the mutated kernels and run the cases of its kernels until one fails; returns that check.

    A mutant whose bug is in 32 bits is run on more than 2**31 elements only.
    """
    name = f"{PACKAGE}.{mutant.file}"
    assert name not in sys.modules, f"{name} was imported before it could be mutated"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{mutant.file}.py"
        file.write_text(mutate(mutant))
        sys.meta_path.insert(0, _Finder(name, str(file)))
        import triton_cases

        cases, far = (
            [c for c in some if c.kernel in mutant.kernels] for some in (triton_cases.CASES, triton_cases.FAR)
        )
        checks = [(values, case) for values in triton_cases.VALUES for case in cases]
        checks = [("far", case) for case in far if "32 bits" in mutant.bug] or checks
        for values, case in checks:
            try:
                if values == "far":
                    triton_cases.check_far(case)
                else:
                    with interpreter_guard.guard():
                        triton_cases.check(case, values)
            except Exception as error:
                return f"{values}, {case}: {_last(error)}"
    return None


def _last(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip().splitlines()[-1][:200]


def in_a_child(mutant: Mutant) -> dict[str, str | None]:
    """What caught the mutant, in a forked process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            found = {"caught": caught_by(mutant)}
        except BaseException as error:
            found = {"caught": None, "error": f"{type(error).__name__}: {error}"}
        os.write(writer, json.dumps(found).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    result = json.loads(said) if said else {"caught": f"crash, status {status}"}
    return {"file": mutant.file, "bug": mutant.bug, **result}


def main() -> None:
    torch.set_num_threads(1)  # forking with more is unsafe
    assert triton.language is not None
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    for mutant in MUTANTS:
        name = f"{mutant.file}: {mutant.bug}"
        if wanted == "--list":
            print(name)
        elif wanted in name:
            print(json.dumps(in_a_child(mutant)), flush=True)


if __name__ == "__main__":
    main()
