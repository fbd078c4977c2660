"""The public ops: each file has an op's schema, checks, fake, autograd formula and public function."""

from .basic_block import basic_block
from .bottleneck import bottleneck
from .conv_bn_act import conv_bn_act
from .stem import stem

__all__ = ["basic_block", "bottleneck", "conv_bn_act", "stem"]
