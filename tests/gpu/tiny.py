"""Every kernel once, on the smallest shapes: the program that compute-sanitizer executes.

    compute-sanitizer --tool racecheck --error-exitcode 9 python tests/gpu/tiny.py --backend cuda --op stem

Prints each variant before it runs, so that a report can be told to its kernel. `--device cpu` tries the program out in
Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if "cpu" not in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "0")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import gpu_cases  # noqa: E402
import torch  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backend", choices=("triton", "cuda"), required=True)
    parser.add_argument("--op", choices=sorted(gpu_cases.TINY), default=None)
    parser.add_argument("--configs", type=int, default=1, help="of every Triton kernel")
    parser.add_argument("--dtypes", default="bf16,tf32")
    given = parser.parse_args(arguments)
    device = torch.device("cuda", 0) if given.device == "cuda" else torch.device("cpu")
    options = {"op": given.op, "precisions": given.dtypes.split(","), "most": given.configs, "tiny": True}
    ran = 0
    for variant in gpu_cases.variants(device, (given.backend,), **options):
        print(variant, flush=True)
        with gpu_cases.precision(variant.precision, device), torch.inference_mode():
            call = gpu_cases.moved(gpu_cases._call(variant.op, variant.shape, variant.dtype, "random"), device)
            try:
                outputs = variant.run(call)
            except RuntimeError as error:
                if not (variant.by_name and "cannot run this: " in str(error)):
                    raise
                print("  skipped: it is made for other shapes", flush=True)
                continue
            # Read on the host: initcheck then sees what no thread has written.
            assert all(y.cpu().isfinite().all() for y in outputs)
        ran += 1
    print(f"{ran} variants ran")
    return 0 if ran else 1


if __name__ == "__main__":
    sys.exit(main())
