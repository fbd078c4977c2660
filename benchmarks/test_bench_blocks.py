"""pytest-benchmark over every distinct block of ResNet-18 and ResNet-50: `pytest benchmarks`.

`--benchmark-group-by=group` (the default) puts the contenders of a block side by side. Every result names its
contender, and those of the package their reference, so that baseline.py can compare ratios.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused import bench, blocks

BATCH = 4
REFERENCE = "layer-fused"


def contender(block: nn.Module, name: str) -> nn.Module:
    if name == "eager":
        return block
    if name == REFERENCE:
        return rf.fuse(block, backend="vendor")
    return rf.fuse(block, accuracy=name)


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], list[tuple[str, nn.Module, Tensor]]]:
    return {}


def distinct_blocks(model: str, dtype: str) -> list[tuple[str, nn.Module, Tensor]]:
    """The label, module and input of every distinct block, in channels_last."""
    whole, x = bench.prepare(bench.Job(model, BATCH), "fp32")
    moved = {"memory_format": torch.channels_last, "dtype": bench.DTYPES[dtype]}
    made = []
    for name, size in blocks.distinct(whole, x).items():
        block, given = blocks.cut(whole, name, x)
        made.append((f"{name} {'x'.join(map(str, size))}", copy.deepcopy(block).to(**moved), given.to(**moved)))
    return made


CASES = [
    (model, dtype, index)
    for model, count in (("resnet18", 8), ("resnet50", 9))
    for dtype in ("fp32", "bf16")
    for index in range(count)
]


@pytest.mark.parametrize("name", ["eager", REFERENCE, "strict", "fast"])  # varies fastest: a block's run in a row
@pytest.mark.parametrize(("model", "dtype", "index"), CASES)
def test_block(model, dtype, index, name, found, benchmark):
    if (model, dtype) not in found:
        found[model, dtype] = distinct_blocks(model, dtype)
    assert len(found[model, dtype]) == len({i for m, d, i in CASES if (m, d) == (model, dtype)})
    label, block, x = found[model, dtype][index]
    module = contender(block, name)
    benchmark.group = f"{model} {label} {dtype}"
    benchmark.extra_info.update(contender=name, reference=REFERENCE if name in ("strict", "fast") else None)
    with torch.inference_mode():
        benchmark.pedantic(module, (x,), rounds=20, warmup_rounds=2)
