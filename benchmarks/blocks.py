"""The distinct blocks of a model, each with the input it gets in the model, for the block benchmarks."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resnet_fused import bench


@dataclass(frozen=True)
class Block:
    """One block of a model (unfused, eval, channels_last) and an input for it (channels_last)."""

    label: str
    module: nn.Module
    x: Tensor


def distinct_blocks(model_name: str, batch: int, dtype: str) -> list[Block]:
    """Return the stem and the residual blocks of a ResNet, in order, one for each make-up and input shape.

    The inputs are what the blocks see when the model runs on real pictures.
    """
    model = bench.make_model(model_name).to(memory_format=torch.channels_last, dtype=bench.DTYPES[dtype])
    x = bench.real_pictures(batch).to(memory_format=torch.channels_last, dtype=bench.DTYPES[dtype])
    stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool).eval()
    blocks = {"stem": stem} | {
        f"{stage}.{index}": block
        for stage in ("layer1", "layer2", "layer3", "layer4")
        for index, block in enumerate(model.get_submodule(stage))
    }
    found: dict[tuple[str, torch.Size], Block] = {}
    with torch.inference_mode():
        for name, block in blocks.items():
            label = f"{name} {'x'.join(map(str, x.shape[1:]))}"
            found.setdefault((repr(block), x.shape), Block(label, block, x))
            x = block(x)
    return list(found.values())
