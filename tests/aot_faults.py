"""Compiles kernels that are each wrong in one way, and prints what the ahead-of-time checks say, one JSON line each."""

import json
import os

os.environ.pop("TRITON_INTERPRET", None)

import aot
import torch
import triton
import triton.language as tl


@triton.jit
def product(x, y, z, B: tl.constexpr, STEP: tl.constexpr, DEPTH: tl.constexpr):
    """A [B, DEPTH] times [DEPTH, B] product; STEP of 2 makes every load narrow."""
    i = tl.arange(0, B)
    acc = tl.zeros((B, B), tl.float32)
    for k in tl.range(0, DEPTH * 4, DEPTH):
        r = k + tl.arange(0, DEPTH)
        a = tl.load(x + i[:, None] * 4096 + r[None, :] * STEP)
        b = tl.load(y + i[:, None] * 4096 + r[None, :] * STEP)
        acc = tl.dot(a, b.T, acc)
    tl.store(z + i[:, None] * B + i[None, :], acc.to(z.dtype.element_ty))


@triton.jit
def not_a_product(x, y, B: tl.constexpr):
    """Sums in the place of a matrix product."""
    i = tl.arange(0, B)
    tl.store(y + i, tl.load(x + i) + 1)


def main() -> None:
    x, y, z = (torch.empty(4096 * 256, dtype=torch.bfloat16) for _ in range(3))
    for name, options in {
        "sound": {"B": 64, "STEP": 1, "DEPTH": 64, "num_warps": 4},
        "spills": {"B": 256, "STEP": 1, "DEPTH": 64, "num_warps": 4},
        "too much shared memory": {"B": 256, "STEP": 1, "DEPTH": 128, "num_warps": 8, "num_stages": 4},
        "narrow loads": {"B": 64, "STEP": 2, "DEPTH": 64, "num_warps": 4},
        "too small for wgmma": {"B": 32, "STEP": 1, "DEPTH": 64, "num_warps": 4},
    }.items():
        with aot.captured() as launches:
            product[(1,)](x, y, z, **options)
        print(json.dumps({"kernel": name, "problems": aot.compiled(launches[0], 90).problems()}), flush=True)
    with aot.captured() as launches:
        not_a_product[(1,)](x, y, B=64)
    print(json.dumps({"kernel": "no product", "problems": aot.compiled(launches[0], 90).problems()}))


if __name__ == "__main__":
    main()
