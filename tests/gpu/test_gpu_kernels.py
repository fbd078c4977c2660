"""Every kernel in every configuration: integers bit for bit, random numbers, NaN and infinity, slices, repeats."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import BY_OP, Variant, check, check_repeats, check_slices

from resnet_fused.shapes import Conv

VALUES = ("integers", "random", "special")


def test_kernel(variant: Variant, device: torch.device) -> None:
    """One configuration; every check is made, and the failure names those that did not hold."""
    # A NaN beside the middle needs a second column.
    checks = {
        values: lambda values=values: check(variant, values, device)
        for values in VALUES
        if values != "special" or variant.shape.w > 1
    }
    if variant.op == "conv_bn_act" and isinstance(variant.shape, Conv) and variant.algorithm != BY_OP:
        checks["slices"] = lambda: check_slices(variant, device)
    checks["repeats"] = lambda: check_repeats(variant, device, 20 if device.type == "cuda" else 1)
    failed = []
    for name, run in checks.items():
        try:
            run()
        except AssertionError as error:
            failed.append(f"{name}: {error}")
        except RuntimeError as error:
            if variant.by_name and "cannot run this: " in str(error):
                pytest.skip(str(error).splitlines()[0])
            raise
    assert not failed, "; ".join(failed)
