"""A small residual net for Fashion-MNIST: the model, its committed weights and the data reader.

The net is a torchvision-style ResNet of bottlenecks (stem with max pool, three stages, projection and identity
shortcuts), small enough (about 0.22 M parameters) to be trained on a CPU in a few minutes and committed to the project.
"""

import gzip
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from resnet_fused.nn.plain import Bottleneck

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights.safetensors"
SAMPLE = HERE / "sample"  # the first 512 test images, in the data set's own format
DATASET = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts the files
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


class FashionNet(nn.Module):
    """ResNet of bottlenecks for 28x28 grey pictures: float32 [N, 1, 28, 28] to logits [N, 10].

    The attributes are named as in torchvision's ResNet, so `resnet_fused.fuse` finds the stem and every block.
    """

    def __init__(self, planes: tuple[int, ...] = (16, 32, 64), blocks: int = 2, num_classes: int = 10) -> None:
        super().__init__()
        self.inplanes = 32
        self.conv1 = nn.Conv2d(1, self.inplanes, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._stage(planes[0], blocks, stride=1)
        self.layer2 = self._stage(planes[1], blocks, stride=2)
        self.layer3 = self._stage(planes[2], blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(self.inplanes, num_classes)

    def _stage(self, planes: int, blocks: int, stride: int) -> nn.Sequential:
        width = planes * Bottleneck.expansion
        downsample = nn.Sequential(nn.Conv2d(self.inplanes, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        first = Bottleneck(self.inplanes, planes, stride, downsample)
        self.inplanes = width
        return nn.Sequential(first, *(Bottleneck(width, planes) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a normalised batch."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


def load_model() -> FashionNet:
    """Return the trained net in eval mode, from the committed weights."""
    model = FashionNet()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def read_idx(path: Path) -> Tensor:
    """Read one gzipped IDX file (the MNIST format) of unsigned bytes as a uint8 tensor."""
    data = bytearray(gzip.decompress(path.read_bytes()))
    zero, kind, rank = struct.unpack_from(">HBB", data)
    if zero != 0 or kind != 0x08:
        raise ValueError(f"{path} must be an IDX file of unsigned bytes, but its magic number is {data[:4].hex()}")
    shape = struct.unpack_from(f">{rank}I", data, 4)
    return torch.frombuffer(data, dtype=torch.uint8, offset=4 + 4 * rank).reshape(shape)


def load_split(split: str, folder: Path) -> tuple[Tensor, Tensor]:
    """Return normalised images, float32 [N, 1, 28, 28], and labels, int64 [N], of split "train" or "t10k"."""
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz")
    return (images.float().div_(255.0).sub_(0.286).div_(0.353)).unsqueeze(1), labels.long()


def load_test_images() -> tuple[Tensor, Tensor]:
    """Return the 10,000 test images and labels where the data set is installed, else the committed sample of 512."""
    return load_split("t10k", DATASET if DATASET.is_dir() else SAMPLE)
