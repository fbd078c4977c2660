"""The distinct blocks of a model, each with a real-sized input, for the block benchmarks."""

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
    """Return the residual blocks of a ResNet, one for each combination of layers and input shape, in order.

    The inputs are what the blocks see when the model runs on real pictures.
    """
    model = bench.make_model(model_name).to(memory_format=torch.channels_last, dtype=bench.DTYPES[dtype])
    x = bench.real_pictures(batch).to(memory_format=torch.channels_last, dtype=bench.DTYPES[dtype])
    found: dict[tuple[str, torch.Size], Block] = {}

    def keep(module: nn.Module, inputs: tuple[Tensor]) -> None:
        kind = (repr(module), inputs[0].shape)
        if kind not in found:
            _, channels, height, width = inputs[0].shape
            label = f"{model_name} {names[module]} {channels}x{height}x{width}"
            found[kind] = Block(label, module, inputs[0].clone(memory_format=torch.preserve_format))

    names = {
        module: name for name, module in model.named_modules() if name.startswith("layer") and name.count(".") == 1
    }
    handles = [module.register_forward_pre_hook(keep) for module in names]
    with torch.inference_mode():
        model(x)
    for handle in handles:
        handle.remove()
    return list(found.values())
