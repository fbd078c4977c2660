"""The vendor's layers on a GPU, with torch's operators for cuDNN's: this machine has none."""

import pytest
import torch
from torch import Tensor

from resnet_fused.kernels import cudnn, packing

GEOMETRY = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 1), "groups": 2}


def relu(x, weight, shift, stride, padding, dilation, groups):
    return torch.conv2d(x, weight, shift, stride, padding, dilation, groups).relu()


def add_relu(x, weight, residual, alpha, shift, *geometry):
    assert alpha == 1
    return (torch.conv2d(x, weight, shift, *geometry) + residual).relu()


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    for name, function in (("cudnn_convolution_relu", relu), ("cudnn_convolution_add_relu", add_relu)):
        assert hasattr(torch, name)
        monkeypatch.setattr(torch, name, function)
    monkeypatch.setattr(cudnn, "_without_engine", set())


def call(dtype: torch.dtype, residual: bool) -> tuple[Tensor | None, ...]:
    x = torch.randn(2, 4, 8, 8).to(dtype)
    weight, scale, shift = torch.randn(6, 2, 3, 3).to(dtype), torch.rand(6) + 0.5, torch.randn(6)
    return x, weight, scale, shift, torch.randn(2, 6, 4, 6).to(dtype) if residual else None, None, None


def exact(x, weight, scale, shift, residual, *_, activation):
    sizes = (GEOMETRY["stride"], GEOMETRY["padding"], GEOMETRY["dilation"], GEOMETRY["groups"])
    y = torch.conv2d(x.double(), weight.double(), None, *sizes) * scale[:, None, None] + shift[:, None, None]
    y = y if residual is None else y + residual.double()
    return y.relu() if activation == "relu" else y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_layers(dtype, residual, activation):
    args = call(dtype, residual)
    for _ in range(2):  # with and without packing
        y = cudnn.conv_bn_act(*args, **GEOMETRY, activation=activation)
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        wanted = exact(*args, activation=activation)
        assert (y.double() - wanted).abs().max() <= 4 * torch.finfo(dtype).eps * wanted.abs().max()


def test_shift_is_cast_once_and_again_when_it_changed():
    args = call(torch.bfloat16, False)
    shift = args[3]
    before = cudnn.conv_bn_act(*args, **GEOMETRY, activation="none")
    casts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", lambda self, *_: casts.append(self))
        assert torch.equal(cudnn.conv_bn_act(*args, **GEOMETRY, activation="none"), before)
    assert not casts
    shift.add_(1)
    after = cudnn.conv_bn_act(*args, **GEOMETRY, activation="none")
    assert torch.allclose(after.float(), before.float() + 1, atol=0.1)
    packing.forget(args[1])


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("words", cudnn.NO_ENGINE)
def test_a_shape_that_cudnn_has_no_fused_kernel_for(monkeypatch, residual, words):
    args = call(torch.float32, residual)
    wanted = cudnn.conv_bn_act(*args, **GEOMETRY, activation="relu")
    tried = []

    def lacks(*_):
        tried.append(1)
        raise RuntimeError(f"cuDNN: {words}.")

    monkeypatch.setattr(torch, "cudnn_convolution_relu", lacks)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", lacks)
    with pytest.warns(UserWarning, match=r"cuDNN has no fused kernel for a convolution of \(2, 4, 8, 8\)"):
        y = cudnn.conv_bn_act(*args, **GEOMETRY, activation="relu")
    assert torch.equal(y, wanted)
    assert torch.equal(cudnn.conv_bn_act(*args, **GEOMETRY, activation="relu"), wanted)
    assert len(tried) == 1, "it is not asked again"


def test_other_errors_are_passed_on(monkeypatch):
    def fails(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "cudnn_convolution_relu", fails)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        cudnn.conv_bn_act(*call(torch.float32, False), **GEOMETRY, activation="relu")
