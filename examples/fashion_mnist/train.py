"""Train the Fashion-MNIST net and write weights.safetensors and the sample beside this file.

    apt-get install dataset-fashion-mnist
    python examples/fashion_mnist/train.py

The committed weights reach 92.8% test accuracy; training takes 10 to 20 CPU minutes. The seed is fixed, but the bits
still depend on the CPU and on torch's version.
"""

import gzip
import struct
import time
from pathlib import Path

import torch
import typer
from model import DATASET, SAMPLE, WEIGHTS, FashionNet, load_split, read_idx
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Flip every picture left-right with probability one half and shift the batch by up to two pixels."""
    flip = torch.rand(x.shape[0], 1, 1, 1, generator=generator) < 0.5
    x = torch.where(flip, x.flip(3), x)
    top, left = torch.randint(0, 5, (2,), generator=generator).tolist()
    return F.pad(x, (2, 2, 2, 2), value=x.min().item())[:, :, top : top + 28, left : left + 28]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of right predictions."""
    model.eval()
    return torch.cat([model(x).argmax(1) for x in images.split(1000)]).eq(labels).float().mean().item()


def write_sample(count: int = 512) -> None:
    """Write the first `count` test images and labels, in the data set's format."""
    SAMPLE.mkdir(exist_ok=True)
    for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        data = read_idx(DATASET / name)[:count]
        header = struct.pack(f">HBB{data.dim()}I", 0, 0x08, data.dim(), *data.shape)
        (SAMPLE / name).write_bytes(gzip.compress(header + data.numpy().tobytes(), mtime=0))


def main(epochs: int = 12, batch: int = 128, learning_rate: float = 0.15, seed: int = 0, out: Path = WEIGHTS) -> None:
    """Train, report the test accuracy and write the weights."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = load_split("train", DATASET)
    test_images, test_labels = load_split("t10k", DATASET)
    model = FashionNet().to(memory_format=torch.channels_last)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")

    optimizer = torch.optim.SGD(model.parameters(), learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, epochs * steps, pct_start=0.25)
    started = time.perf_counter()
    for epoch in range(epochs):
        model.train()
        total = 0.0
        for index in torch.randperm(len(images), generator=generator)[: steps * batch].view(steps, batch):
            x = augment(images[index], generator).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(x), labels[index], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        test = accuracy(model, test_images, test_labels)
        print(f"epoch {epoch + 1}: loss {total / steps:.4f}, test {test:.2%}, {time.perf_counter() - started:.0f} s")

    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, out)
    write_sample()


if __name__ == "__main__":
    typer.run(main)
