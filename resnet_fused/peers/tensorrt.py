"""TensorRT from ONNX, and through Torch-TensorRT. Neither has been run on a GPU yet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.precision import allow_tf32
from .onnx_export import INPUT, MODULES, OUTPUT, exported
from .peer import PEER, Peer, Ready, Task, missing


def absent_tensorrt(task: Task) -> str | None:
    """TensorRT's Python package, and torch's exporter."""
    return missing("tensorrt", *MODULES)


def absent_torch_tensorrt(task: Task) -> str | None:
    """Torch-TensorRT."""
    return missing("torch_tensorrt")


def prepare(model: nn.Module, x: Tensor, task: Task) -> Ready:
    """Export, and build an engine whose types are those of the model; float32 is TF32 where torch allows that."""
    import tensorrt

    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(logger)
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, logger)
    with exported(model, x) as path:
        if not parser.parse_from_file(str(path)):
            raise RuntimeError(str(parser.get_error(0)))
    config = builder.create_builder_config()
    tf32 = allow_tf32(x.device)
    if not tf32:
        config.clear_flag(tensorrt.BuilderFlag.TF32)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("the engine could not be built")
    runtime = tensorrt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    with torch.no_grad():
        output = torch.empty_like(model(x))
    context.set_tensor_address(INPUT, x.data_ptr())
    context.set_tensor_address(OUTPUT, output.data_ptr())
    stream = torch.cuda.Stream()  # on the default one TensorRT synchronises more often

    def call() -> Tensor:
        if not context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError("the engine could not be run")
        return output

    return Ready(call, settings={"strongly_typed": True, "tf32": tf32}, alive=(runtime, engine, x))


def prepare_torch_tensorrt(model: nn.Module, x: Tensor, task: Task) -> Ready:
    """Compile ahead of time, with the model's own types."""
    import torch_tensorrt

    compiled = torch_tensorrt.compile(model, ir="dynamo", inputs=[x], use_explicit_typing=True)
    return Ready(lambda: compiled(x), settings={"ir": "dynamo", "use_explicit_typing": True})


TENSORRT = Peer("TensorRT", PEER, ("tensorrt",), prepare, absent_tensorrt)
TORCH_TENSORRT = Peer("Torch-TensorRT", PEER, ("torch-tensorrt",), prepare_torch_tensorrt, absent_torch_tensorrt)
