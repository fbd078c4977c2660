"""Small nets for the tests of fuse, and what is asked of every fused model."""

import torch
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused.nn import plain


class TinyResNet(nn.Module):
    """Stem, bottlenecks and basic blocks with and without projection; the attributes as in torchvision's ResNet."""

    def __init__(self, norm_layer=nn.BatchNorm2d, bottleneck=plain.Bottleneck, basic_block=plain.BasicBlock):
        super().__init__()

        def projection(c, k, stride):
            return nn.Sequential(nn.Conv2d(c, k, 1, stride, bias=False), norm_layer(k))

        def make(block, *args):
            return block(*args, norm_layer=norm_layer)

        self.conv1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False)
        self.bn1 = norm_layer(16)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(make(bottleneck, 16, 8, 1, projection(16, 32, 1)), make(bottleneck, 32, 8))
        self.layer2 = nn.Sequential(make(basic_block, 32, 24, 2, projection(32, 24, 2)), make(basic_block, 24, 24))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(24, 10)

    def features(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer2(self.layer1(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.avgpool(self.features(x)), 1))


class TinyBackbone(TinyResNet):
    """Gives images."""

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


BLOCKS = ["conv1..maxpool", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "avgpool..fc"]


def tiny(cls=TinyResNet, **kwargs) -> TinyResNet:
    return rf.models.randomize_batchnorms(cls(**kwargs)).eval()


def images(n=2, size=32, dtype=torch.float32, channels=3) -> Tensor:
    return torch.randn(n, channels, size, size).to(dtype)


def ops_run(model: nn.Module, x: Tensor) -> list[str]:
    """What runs fused, by the plan of a run."""
    return [row.block for row in rf.explain(model, x).rows if row.kernel != "unfused"]


def assert_parity(model: nn.Module, fast: nn.Module, x: Tensor) -> None:
    report = rf.verify(model, fast, x)
    assert report.ok, f"\n{report}"
