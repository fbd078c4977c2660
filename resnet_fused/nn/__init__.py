"""Drop-in modules: torchvision's arguments, attributes and keys; plain in training, one fused op in eval mode.

The blocks of pre-activation and dense networks are plain modules that `resnet_fused.fuse` knows.
"""

from ..fusion import unfused
from .basic_block import BasicBlock
from .bottleneck import Bottleneck
from .conv_bn_act import ConvBNAct
from .dense import DenseBlock, DenseLayer, Transition
from .preact import PreActBasicBlock, PreActBottleneck
from .shortcut import PadShortcut
from .stem import Stem

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ConvBNAct",
    "DenseBlock",
    "DenseLayer",
    "PadShortcut",
    "PreActBasicBlock",
    "PreActBottleneck",
    "Stem",
    "Transition",
    "unfused",
]
