"""Train plain and residual nets, shallow and deep, on Fashion-MNIST, and write results.json beside this file.

    apt-get install dataset-fashion-mnist
    python examples/degradation/train.py
    python examples/degradation/plot.py

The four nets take about 12 CPU minutes. They train through their original modules; every error rate is measured on the
fused net.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

import resnet_fused as rf
from resnet_fused.models.plain import PlainBlock

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
sys.path.insert(0, str(HERE.parent / "fashion_mnist"))
from model import DATASET, load_split  # noqa: E402

Data = tuple[Tensor, Tensor]


def make_net(kind: str, depth: int) -> nn.Module:
    """A CIFAR net of the ResNet paper with half of its width, for grey pictures; kind is "plain" or "residual"."""
    block, shortcut = {"plain": (PlainBlock, None), "residual": (rf.nn.BasicBlock, "A")}[kind]
    net = rf.models.CifarResNet(depth, block=block, shortcut=shortcut, in_channels=1, widths=(8, 16, 32))
    return net.to(memory_format=torch.channels_last)


def load(split: str) -> Data:
    """Pictures at half size, float32 [N, 1, 14, 14], and labels, int64 [N], of split "train" or "t10k"."""
    images, labels = load_split(split, DATASET)
    return F.avg_pool2d(images, 2), labels


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """The predicted classes, int64 [N]."""
    return torch.cat([model(batch).argmax(1) for batch in images.split(500)])


def error(net: nn.Module, data: Data) -> float:
    """Share of wrong predictions, 0 to 1, of the fused net; the net is left in train mode."""
    images, labels = data
    wrong = predict(rf.fuse(net.eval()), images).ne(labels).double().mean().item()
    net.train()
    return wrong


def train(net: nn.Module, data: Data, test: Data, steps: int, every: int, batch: int, rate: float) -> dict[str, Any]:
    """Train a net with SGD in place.

    Args:
        net: the net.
        data: pictures and labels to train on.
        test: pictures and labels to test on.
        steps: number of batches.
        every: steps between measurements.
        batch: pictures in a batch.
        rate: the largest learning rate, reached after a tenth of the steps.

    Returns:
        The loss of every step, and steps, training error and test error of every measurement; the training error is
        that of as many training pictures as there are test pictures.
    """
    images, labels = data
    measured = (images[: len(test[0])], labels[: len(test[0])])
    optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1, cycle_momentum=False)
    order = torch.cat([torch.randperm(len(images)) for _ in range(1 + steps * batch // len(images))])
    curves: dict[str, Any] = {"loss": [], "step": [], "train_error": [], "test_error": []}
    net.train()
    for step in range(1, steps + 1):
        index = order[(step - 1) * batch : step * batch]
        loss = F.cross_entropy(net(images[index].contiguous(memory_format=torch.channels_last)), labels[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        curves["loss"].append(round(loss.item(), 4))
        if step % every == 0 or step == steps:
            curves["step"].append(step)
            curves["train_error"].append(error(net, measured))
            curves["test_error"].append(error(net, test))
    return curves


def main(
    shallow: int = 8,
    deep: int = 44,
    steps: int = 1400,
    every: int = 200,
    batch: int = 128,
    rate: float = 0.1,
    seed: int = 0,
    out: Path = RESULTS,
) -> None:
    """Train the four nets one after another and write their curves and layer responses."""
    data, test = load("train"), load("t10k")
    settings = {"steps": steps, "batch": batch, "rate": rate, "seed": seed, "torch": torch.__version__}
    nets = []
    for kind in ("plain", "residual"):
        for depth in (shallow, deep):
            torch.manual_seed(seed)
            net = make_net(kind, depth)
            started = time.process_time()
            curves = train(net, data, test, steps, every, batch, rate)
            seconds = time.process_time() - started
            net.eval()
            flipped = predict(rf.fuse(net), test[0]).ne(predict_unfused(net, test[0])).sum().item()
            responses = rf.layer_responses(net, test[0][:1000]).to_dict()["rows"]
            name = f"{kind}-{depth}"
            parameters = sum(p.numel() for p in net.parameters())
            final = f"training error {curves['train_error'][-1]:.2%}, test error {curves['test_error'][-1]:.2%}"
            print(f"{name}: {final}, {flipped} predictions flipped, {seconds:.0f} CPU s", flush=True)
            nets.append({"name": name, "parameters": parameters, "flipped": flipped, **curves, "responses": responses})
            out.write_text(json.dumps({"settings": settings, "nets": nets}) + "\n")


def predict_unfused(net: nn.Module, images: Tensor) -> Tensor:
    """The classes that the net's original modules predict, int64 [N]."""
    with rf.nn.unfused():
        return predict(net, images)


if __name__ == "__main__":
    typer.run(main)
