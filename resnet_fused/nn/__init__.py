"""Drop-in modules: torchvision's arguments, attributes and keys; plain in training, one fused op in eval mode."""

from ..fusion import unfused
from .basic_block import BasicBlock
from .bottleneck import Bottleneck
from .conv_bn_act import ConvBNAct
from .stem import Stem

__all__ = ["BasicBlock", "Bottleneck", "ConvBNAct", "Stem", "unfused"]
