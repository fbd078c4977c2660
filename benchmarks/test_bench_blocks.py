"""pytest-benchmark over every distinct block of ResNet-18 and ResNet-50: `pytest benchmarks`.

`--benchmark-group-by=group` (the default) puts the contenders of a block side by side. Every result names its
contender, and those of the package their reference, so that baseline.py can compare ratios.
"""

import pytest
import torch
from blocks import Block, distinct_blocks

import resnet_fused as rf

BATCH = 4
REFERENCE = "layer-fused"


def contender(block: Block, name: str) -> torch.nn.Module:
    if name == "eager":
        return block.module
    if name == REFERENCE:
        return rf.fuse(block.module, backend="vendor")
    return rf.fuse(block.module, accuracy=name)


@pytest.fixture(scope="module")
def blocks() -> dict[tuple[str, str], list[Block]]:
    return {}


CASES = [
    (model, dtype, index)
    for model, count in (("resnet18", 8), ("resnet50", 9))
    for dtype in ("fp32", "bf16")
    for index in range(count)
]


@pytest.mark.parametrize("name", ["eager", REFERENCE, "strict", "fast"])  # varies fastest: a block's run in a row
@pytest.mark.parametrize(("model", "dtype", "index"), CASES)
def test_block(model, dtype, index, name, blocks, benchmark):
    if (model, dtype) not in blocks:
        blocks[model, dtype] = distinct_blocks(model, BATCH, dtype)
    assert len(blocks[model, dtype]) == len({i for m, d, i in CASES if (m, d) == (model, dtype)})
    block = blocks[model, dtype][index]
    module = contender(block, name)
    benchmark.group = f"{model} {block.label} {dtype}"
    benchmark.extra_info.update(contender=name, reference=REFERENCE if name in ("strict", "fast") else None)
    with torch.inference_mode():
        benchmark.pedantic(module, (block.x,), rounds=20, warmup_rounds=2)
