"""Stands in for the `cudnn` package: the part of its graph API that the peer uses, computed by torch.

It knows of cuDNN what its documentation says, no more: that a call is right here does not mean that it is there.
"""

from types import SimpleNamespace

import torch

data_type = SimpleNamespace(FLOAT=torch.float32, BFLOAT16=torch.bfloat16, HALF=torch.float16)
heur_mode = SimpleNamespace(A="A", FALLBACK="fallback")
numerical_note = SimpleNamespace(TENSOR_CORE="tensor core")
refused: set[int] = set()  # channels of images for whose convolution there is no plan
streams: list[int] = []  # that were set


class cudnnGraphNotSupportedError(RuntimeError):
    pass


def create_handle():
    return "handle"


def set_stream(handle, stream):
    assert handle == "handle"
    streams.append(stream)


class Node:
    """A tensor of a graph; `compute` makes it from the graph's buffers."""

    def __init__(self, compute, dim=None, stride=None):
        self.compute, self.dim, self.stride, self.output = compute, dim, stride, False

    def set_output(self, output):
        self.output = output
        return self

    def set_data_type(self, kind):
        self.kind = kind
        return self

    def set_dim(self, dim):
        self.dim = dim
        return self

    def set_stride(self, stride):
        self.stride = stride
        return self


class pygraph:
    def __init__(self, handle, io_data_type, intermediate_data_type, compute_data_type):
        assert intermediate_data_type is compute_data_type is data_type.FLOAT
        self.done, self.notes, self.image = [], [], None

    def tensor(self, dim, stride, data_type):
        node = Node(lambda buffers: buffers[node].as_strided(dim, stride).to(torch.float32), dim, stride)
        return node

    def conv_fprop(self, image, weight, padding, stride, dilation):
        self.image = image

        def compute(buffers):
            x, w = image.compute(buffers), weight.compute(buffers)
            return torch.conv2d(x, w, None, stride, padding, dilation, x.shape[1] // w.shape[1])

        return Node(compute)

    def bias(self, input, bias):
        return Node(lambda buffers: input.compute(buffers) + bias.compute(buffers))

    def add(self, a, b):
        return Node(lambda buffers: a.compute(buffers) + b.compute(buffers))

    def relu(self, input):
        self.result = Node(lambda buffers: input.compute(buffers).relu())
        return self.result

    def validate(self):
        self.done.append("validate")

    def build_operation_graph(self):
        self.done.append("build_operation_graph")

    def create_execution_plans(self, modes):
        self.done.append("create_execution_plans")

    def deselect_numeric_notes(self, notes):
        self.notes += notes

    def check_support(self):
        self.done.append("check_support")
        if self.image.dim[1] in refused:
            raise cudnnGraphNotSupportedError("no engine")

    def build_plans(self):
        assert self.done == ["validate", "build_operation_graph", "create_execution_plans", "check_support"]
        self.done.append("build_plans")

    def get_workspace_size(self):
        return 7

    def execute(self, buffers, workspace, handle):
        assert self.done[-1] == "build_plans"
        assert workspace.numel() >= 7
        (output,) = (node for node in buffers if node.output)
        value = output.compute(buffers)
        assert list(value.shape) == output.dim
        buffers[output].as_strided(output.dim, output.stride).copy_(value)
