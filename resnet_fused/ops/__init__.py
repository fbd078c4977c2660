"""The public ops: each file has an op's schema, checks, fake, autograd formula and public function."""

from ..kernels.layers import DenseLayer
from .basic_block import basic_block
from .bottleneck import bottleneck
from .bottleneck_chain import bottleneck_chain
from .conv_bn_act import conv_bn_act
from .dense_block import dense_block
from .head import head
from .preact_block import preact_block
from .stem import stem
from .transition import transition

__all__ = [
    "DenseLayer",
    "basic_block",
    "bottleneck",
    "bottleneck_chain",
    "conv_bn_act",
    "dense_block",
    "head",
    "preact_block",
    "stem",
    "transition",
]
