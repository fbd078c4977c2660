"""cuDNN's graph API through its Python frontend: one fused graph for each convolution.

It has not been run on a GPU yet. Without one, the frontend's own `validate()` (1.32) has passed the graphs of ResNet-18
and 50, CIFAR ResNet-56, DenseNet-121 and preact ResNet-164 in all three dtypes, which finds wrong calls, little else:
whether cuDNN has plans for them, and what those compute, only a GPU can tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..kernels.precision import allow_tf32
from .peer import PEER, Peer, Ready, Task, missing
from .torch_eager import channels_last, graphed
from .traced import traced

aten = torch.ops.aten
DATA_TYPE = {"fp32": "FLOAT", "bf16": "BFLOAT16", "fp16": "HALF"}


class Convolution(nn.Module):
    """A convolution, a bias, perhaps a residual to add, perhaps a ReLU: one cuDNN graph, planned when first called.

    Where cuDNN has no plan for it, torch's operators compute it, and `refusal` says why.

    Args:
        conv: its node in a graph of `traced`.
        module: that graph's module, which holds the weight and the bias.
        relu: whether there is a ReLU at the end.
        tf32: whether a float32 convolution may use tensor cores.
        dtype: `"fp32"`, `"bf16"` or `"fp16"`, of all tensors.
        handle: cuDNN's, whose stream is the one to run on.
    """

    def __init__(
        self, conv: fx.Node, module: fx.GraphModule, relu: bool, tf32: bool, dtype: str, handle: object
    ) -> None:
        super().__init__()
        _, weight, bias, *options = (*conv.args, None)[: max(3, len(conv.args))]
        self.weight = stored(module, weight).contiguous(memory_format=torch.channels_last)
        self.bias = None if bias is None else stored(module, bias)
        self.options = conv_options(*options)
        self.shape = tuple(conv.meta["val"].shape)
        self.relu, self.tf32, self.dtype, self.handle = relu, tf32, dtype, handle
        self.refusal = ""
        self.plan: Any = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Images [N, C, H, W], and a residual of the output's shape, to [N, K, P, Q]; all of them channels_last."""
        tensors = [x, self.weight, self.bias, residual]
        tensors = [t if t is None or t.dim() < 4 else t.contiguous(memory_format=torch.channels_last) for t in tensors]
        if self.plan is None and not self.refusal:
            self.build(tensors)
        if self.refusal:
            return self.unfused(x, residual)
        y = torch.empty(self.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        graph, places, size = self.plan
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
        buffers = [t for t in (*tensors, y) if t is not None]
        graph.execute(dict(zip(places, buffers, strict=True)), workspace, handle=self.handle)
        return y

    def build(self, tensors: Sequence[Tensor | None]) -> None:
        """Make the graph of these inputs (image, weight, bias, residual) and its plan, or set `refusal`."""
        import cudnn

        kind = getattr(cudnn.data_type, DATA_TYPE[self.dtype])
        single = cudnn.data_type.FLOAT
        graph = cudnn.pygraph(
            handle=self.handle, io_data_type=kind, intermediate_data_type=single, compute_data_type=single
        )
        places = [None if t is None else graph.tensor(**described(t), data_type=kind) for t in tensors]
        image, weight, bias, residual = places
        stride, padding, dilation, _ = self.options
        y = graph.conv_fprop(image=image, weight=weight, padding=padding, stride=stride, dilation=dilation)
        y = y if bias is None else graph.bias(input=y, bias=bias)
        y = y if residual is None else graph.add(a=y, b=residual)
        y = graph.relu(input=y) if self.relu else y
        y.set_output(True).set_data_type(kind).set_dim(list(self.shape)).set_stride(strides(self.shape))
        try:
            graph.validate()
            graph.build_operation_graph()
            graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
            if self.dtype == "fp32" and not self.tf32:
                graph.deselect_numeric_notes([cudnn.numerical_note.TENSOR_CORE])
            graph.check_support()
            graph.build_plans()
        except cudnn.cudnnGraphNotSupportedError as error:
            self.refusal = str(error) or "no plan"
            return
        self.plan = graph, [place for place in (*places, y) if place is not None], max(1, graph.get_workspace_size())

    def unfused(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The same by torch's operators."""
        y = torch.conv2d(x, self.weight, self.bias, *self.options)
        y = y if residual is None else y + residual
        return y.relu() if self.relu else y


def stored(module: fx.GraphModule, node: Any) -> Tensor:
    """The weight or bias that a node reads."""
    tensor: Tensor = attrgetter(node.target)(module).detach()
    return tensor


def conv_options(
    stride: Any = (1, 1), padding: Any = (0, 0), dilation: Any = (1, 1), groups: Any = 1
) -> tuple[list[int], list[int], list[int], int]:
    """What follows weight and bias in the arguments of `aten.conv2d`; cuDNN finds groups in the weight's shape."""
    return list(stride), list(padding), list(dilation), groups


def strides(shape: Sequence[int]) -> list[int]:
    """Those of a channels_last image; torch's own of an image of one pixel can be others."""
    _, channels, height, width = shape
    return [height * width * channels, 1, width * channels, channels]


def described(tensor: Tensor) -> dict[str, list[int]]:
    """Shape and strides of a channels_last image, or of a vector of channels as such an image."""
    shape = list(tensor.shape) if tensor.dim() == 4 else [1, tensor.numel(), 1, 1]
    return {"dim": shape, "stride": strides(shape)}


def fuse_convolutions(module: fx.GraphModule, **options: Any) -> list[Convolution]:
    """Replace every convolution, with the addition and the ReLU that alone read it, by a `Convolution`; return those.

    Args:
        module: of `traced`; changed in place.
        options: `tf32`, `dtype` and `handle`, as in `Convolution`.
    """
    graph = module.graph
    made: list[Convolution] = []
    for conv in list(graph.nodes):
        if conv.target is not aten.conv2d.default:
            continue
        last, residual = conv, None
        following = only_user(last, aten.add.Tensor)
        if following is not None:
            others = [arg for arg in following.args if arg is not conv]
            if len(others) == 1 and not following.kwargs and shape_of(others[0]) == shape_of(conv):
                last, residual = following, others[0]
        relu = only_user(last, aten.relu.default)
        last = last if relu is None else relu
        layer = Convolution(conv, module, relu is not None, **options)
        name = f"fused_{len(made)}"
        module.add_submodule(name, layer)
        with graph.inserting_before(last):
            call = graph.call_module(name, (conv.args[0], residual))
        call.meta = dict(last.meta)
        last.replace_all_uses_with(call)
        made.append(layer)
    graph.eliminate_dead_code()
    module.recompile()
    return made


def only_user(node: fx.Node, target: object) -> fx.Node | None:
    """The node's only user, if it is a call of this operator."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    return user if user is not None and user.target is target else None


def shape_of(value: Any) -> Any:
    """The shape of a traced activation, None of anything else."""
    return value.meta["val"].shape if isinstance(value, fx.Node) and "val" in value.meta else None


def absent(task: Task) -> str | None:
    """The frontend's Python package."""
    return missing("cudnn")


def prepare(model: nn.Module, x: Tensor, task: Task) -> Ready:
    """Trace, fold BatchNorms, fuse each convolution, and at batch 1 replay all of it as a CUDA graph.

    What is between the convolutions (pooling, concatenation, BatchNorms before a convolution) are torch's operators.

    Raises:
        RuntimeError: cuDNN has no plan for any of the model's convolutions.
    """
    import cudnn

    model, x = channels_last(model, x)
    handle = cudnn.create_handle()
    module = traced(model, x)
    layers = fuse_convolutions(module, tf32=allow_tf32(x.device), dtype=task.dtype, handle=handle)

    def call() -> Tensor:
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        y: Tensor = module(x)
        return y

    with torch.inference_mode():
        call()
    refusals = [layer.refusal for layer in layers if layer.refusal]
    if layers and len(refusals) == len(layers):
        raise RuntimeError(f"cuDNN has no fused plan for any convolution: {refusals[0]}")
    graph = task.device == "cuda" and task.batch == 1
    settings = {
        "memory_format": "channels_last",
        "heuristics": "A",
        "fused_convolutions": len(layers) - len(refusals),
        "unfused_convolutions": len(refusals),
        "cuda_graph": graph,
    }
    return Ready(graphed(call) if graph else call, settings=settings)


CUDNN_FRONTEND = Peer("cuDNN frontend", PEER, ("nvidia-cudnn-frontend",), prepare, absent)
