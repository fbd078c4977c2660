"""ResNets in torchvision's structure, of plain modules: `fuse` makes them fast."""

from .resnet import ResNet as ResNet
from .resnet import randomize_batchnorms as randomize_batchnorms
from .resnet import resnet18, resnet34, resnet50, resnet101, resnet152

# The constructors only: the names a model can be asked for by.
__all__ = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
