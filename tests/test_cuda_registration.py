"""The CUDA ops beside a torch without a GPU: what loads, what is told, what would be chosen where."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace

import pytest
import torch

import resnet_fused as rf
from resnet_fused.errors import BackendError
from resnet_fused.kernels import cuda, native
from resnet_fused.kernels.cuda import Device
from resnet_fused.kernels.layout import nhwc, pixel_pitch
from resnet_fused.shapes import BasicBlock, Bottleneck, BottleneckChain, Conv, DenseBlock, Shape, Stem

A100, H100, T4 = Device(80, 108, 166912), Device(90, 132, 232448), Device(75, 40, 65536)
RTX4090, B200 = Device(89, 128, 101376), Device(100, 148, 232448)
CL = torch.channels_last

needs_kernels = pytest.mark.skipif(cuda.built() is not None, reason=str(cuda.built()))

RESNET50 = [
    Conv(8, 64, 56, 56, 64, 1, 1),
    Conv(8, 64, 56, 56, 64, 3, 3, padding=(1, 1)),
    Conv(8, 128, 56, 56, 128, 3, 3, (2, 2), (1, 1)),
    Conv(8, 256, 56, 56, 512, 1, 1, (2, 2)),
    Conv(8, 512, 7, 7, 2048, 1, 1, residual=True),
    Conv(8, 64, 56, 56, 64, 3, 3, padding=(2, 2), dilation=(2, 2)),
    Conv(8, 64, 32, 32, 128, 1, 1, prologue=True),
]


# ---- the library ---------------------------------------------------------------------------------------------------
@needs_kernels
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_stable_abi() -> None:
    """Nothing of torch's C++ interface, and the current stream by a weak symbol: the library loads beside any torch."""
    command = ["nm", "-D", "--undefined-only", str(native.LIBRARY_PATH)]
    symbols = [line.split() for line in subprocess.run(command, capture_output=True, text=True).stdout.splitlines()]
    names = {symbol[-1]: symbol[-2] for symbol in symbols}
    assert names["aoti_torch_get_current_cuda_stream"] in "wv"
    assert [name for name in names if name.startswith(("_ZN2at", "_ZN3c10", "_ZN5torch"))] == []
    assert [name for name in names if name.startswith(("cuda", "cuTensor"))] == []


@needs_kernels
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_library_needs_no_cuda_library() -> None:
    text = subprocess.run(["readelf", "-d", native.LIBRARY_PATH], capture_output=True, text=True).stdout
    assert "libtorch.so" in text
    assert "libcuda" not in text


@needs_kernels
def test_op_on_cpu_tensors() -> None:
    x, w = torch.zeros(1, 8, 4, 4).to(memory_format=CL), torch.zeros(8, 8, 1, 1)
    v = torch.zeros(8)
    ops = torch.ops.resnet_fused
    with pytest.raises(RuntimeError, match="x: expected a CUDA tensor"):
        ops._cuda_conv(x, w, v, v, None, None, None, None, None, None, 1, [1, 1], [0, 0], [1, 1], True, "implicit_gemm")
    with pytest.raises(RuntimeError, match="x: expected a CUDA tensor"):
        ops._cuda_stem(x, w, v, v, 2, 3, 3, 2, 1, "")
    with pytest.raises(RuntimeError, match="x: expected a CUDA tensor"):
        ops._cuda_rotated(x, w, v, v, w, None, v, x, None, None, None, "rotated")


@needs_kernels
def test_driver_without_a_gpu() -> None:
    """No driver is not one that is too old."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert native.bindings.cuda_driver_lack() == ""


@needs_kernels
def test_old_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "_driver_lack", lambda: "update the driver")
    assert cuda.unsupported(RESNET50[0], torch.bfloat16, torch.device("cuda")) == "update the driver"


def test_prologue_vectors_are_aligned() -> None:
    """Kernels read them four numbers at a time; a slice may start anywhere."""
    vector = torch.arange(9.0)
    odd = cuda._aligned_vector(vector[1:])
    assert odd.data_ptr() % 16 == 0
    assert torch.equal(odd, vector[1:])
    assert cuda._aligned_vector(vector[4:]).data_ptr() == vector[4:].data_ptr()
    assert cuda._aligned_vector(None) is None


def test_backend_by_name_on_a_cpu() -> None:
    x, w, v = torch.zeros(1, 8, 4, 4), torch.zeros(8, 8, 1, 1), torch.zeros(8)
    with pytest.raises(BackendError, match="backend='cuda' cannot run this: "):
        rf.ops.conv_bn_act(x, w, v, v, backend="cuda")


def test_unsupported_without_a_gpu() -> None:
    why = cuda.unsupported(RESNET50[0], torch.bfloat16, torch.device("cpu"))
    assert why is not None
    assert cuda.built() in (why, None)
    assert cuda.candidates(RESNET50[0], torch.bfloat16, torch.device("cpu")) == []


# ---- what is chosen where ------------------------------------------------------------------------------------------
@needs_kernels
@pytest.mark.parametrize("device", [A100, RTX4090, H100, B200], ids=["A100", "RTX4090", "H100", "B200"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_layer_of_resnet50_has_a_kernel(device: Device, dtype: torch.dtype) -> None:
    for shape in RESNET50:
        found, why = cuda._search(shape, dtype, device)
        assert found, (shape, why)
        assert len({c.algorithm for c in found}) == len(found)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_blocks_have_kernels(dtype: torch.dtype) -> None:
    for shape in (
        Bottleneck(8, 256, 56, 56, 64, 256),
        Bottleneck(8, 64, 56, 56, 64, 256, projection=True),
        Bottleneck(8, 512, 28, 28, 128, 512),
        Bottleneck(8, 1024, 14, 14, 256, 1024),
        BasicBlock(8, 64, 56, 56, 64, 64),
        Stem(8, 3, 224, 224, 64, 7, 7),
    ):
        found, why = cuda._search(shape, dtype, H100)
        assert found, (shape, why)


@needs_kernels
@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_chains_have_kernels(dtype: torch.dtype, name: str) -> None:
    """Those of ResNet-50's first two stages, on an H100."""
    for mid, size in ((64, 56), (128, 28)):
        for n in (1, 128):
            shape = BottleneckChain(n, 4 * mid, size, size, mid, 2)
            assert cuda._search(shape, dtype, H100) == ([("rotated", f"rotated90_{name}_{mid}")], None)


@needs_kernels
@pytest.mark.parametrize(
    ("shape", "pays"),
    [
        (BottleneckChain(8, 512, 28, 28, 128, 3), True),  # 49 tiles beside 32 of a whole block
        (BottleneckChain(128, 512, 28, 28, 128, 3), False),  # 2.5 KB a pixel, 2 KB by whole blocks
        (BottleneckChain(128, 256, 56, 56, 64, 2), False),
        (BottleneckChain(128, 1024, 14, 14, 256, 5), False),  # no kernel
    ],
)
def test_where_a_chain_pays(shape: BottleneckChain, pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the estimates alone."""
    monkeypatch.setattr(cuda, "device_of", lambda device: H100)
    assert cuda.chain_pays(shape, torch.bfloat16, torch.device("cuda")) is pays


@needs_kernels
def test_a_launch_at_the_end_of_a_chain_is_shorter() -> None:
    chain = BottleneckChain(128, 256, 56, 56, 64, 2)
    longer, shorter = (
        native.bindings.cuda_candidates("bottleneck_chain", shape.dims(), "bfloat16", *H100)[0][0][2]
        for shape in (chain, replace(chain, depth=1))
    )
    assert 0 < shorter < longer


@needs_kernels
def test_dual_accumulation_where_there_is_a_projection() -> None:
    shape = Bottleneck(8, 256, 56, 56, 128, 512, stride2=2, projection=True)
    found, _ = cuda._search(shape, torch.bfloat16, A100)
    assert "dual" in [c.algorithm for c in found]
    found, _ = cuda._search(replace(shape, c=512, stride2=1, projection=False), torch.bfloat16, A100)
    assert "dual" not in [c.algorithm for c in found]


@needs_kernels
def test_sm90_kernels_only_where_they_run() -> None:
    rows = {row["kernel"]: row for row in native.bindings.cuda_kernel_table()}
    for device in (A100, RTX4090, B200):
        for shape in RESNET50:
            for candidate in cuda._search(shape, torch.bfloat16, device)[0]:
                row = rows[candidate.config]
                assert row["arch"] == "sm_80"
                assert row["shared_bytes"] <= device.shared_bytes


@needs_kernels
@pytest.mark.parametrize(
    ("shape", "dtype", "device", "phrase"),
    [
        (RESNET50[0], torch.float64, A100, "x.dtype is torch.float64"),
        (RESNET50[0], torch.bfloat16, T4, "the GPU has 7.5"),
        (Conv(1, 64, 8, 8, 64, 3, 3, groups=64), torch.bfloat16, A100, "groups=1"),
        (Conv(1, 12, 8, 8, 64, 1, 1), torch.bfloat16, A100, "multiples of 8"),
        (DenseBlock(1, 64, 8, 8, 32, 2), torch.bfloat16, A100, "whole dense_block"),
        (BottleneckChain(1, 1024, 14, 14, 256, 2), torch.bfloat16, H100, "64 channels inside and 256 outside"),
        (BottleneckChain(1, 256, 56, 56, 64, 2), torch.float32, H100, "compiled for another dtype"),
        (BottleneckChain(1, 256, 56, 56, 64, 2), torch.bfloat16, A100, "made for sm_90a, the device is sm_80"),
        (BottleneckChain(1, 256, 56, 56, 64, 2), torch.bfloat16, B200, "made for sm_90a, the device is sm_100"),
    ],
)
def test_reasons(shape: Shape, dtype: torch.dtype, device: Device, phrase: str) -> None:
    found, why = cuda._search(shape, dtype, device)
    assert found == []
    assert why is not None
    assert phrase in why


@needs_kernels
def test_kernel_table() -> None:
    rows = native.bindings.cuda_kernel_table()
    assert len({row["kernel"] for row in rows}) == len(rows)
    assert {row["op"] for row in rows} >= {"conv", "bottleneck", "basic_block", "bottleneck_chain", "stem"}
    for row in rows:
        assert row["threads"] % 32 == 0
        assert row["shared_bytes"] <= 227 * 1024
        if not torch.cuda.is_available():
            assert row["registers"] is None


@needs_kernels
def test_bindings_reject_what_they_do_not_know() -> None:
    with pytest.raises(ValueError, match="expected conv, bottleneck, basic_block, bottleneck_chain or stem, got pool"):
        native.bindings.cuda_candidates("pool", {}, "bfloat16", *A100)
    with pytest.raises(ValueError, match="missing n"):
        native.bindings.cuda_candidates("conv", {}, "bfloat16", *A100)
    with pytest.raises(ValueError, match="got int8"):
        native.bindings.cuda_candidates("conv", {}, "int8", *A100)


# ---- what the kernels are given ------------------------------------------------------------------------------------
def test_images_are_read_in_place_where_they_can_be() -> None:
    wide = torch.randn(2, 32, 4, 4, dtype=torch.bfloat16).to(memory_format=CL)
    for slice_ in (wide, wide[:, :16], wide[:, 8:24]):
        assert cuda._image(slice_).data_ptr() == slice_.data_ptr()
    for t in (wide[:, 1:9], wide[:, :, ::2], wide.contiguous(), wide[:, 3:19]):
        image = cuda._image(t)
        assert torch.equal(image, t)
        assert image.data_ptr() % 16 == 0
        assert pixel_pitch(image) == t.shape[1]
    assert cuda._image(None) is None


def test_weights_are_copied_once() -> None:
    plain = torch.randn(16, 8, 3, 3)
    first, second = cuda._weight(plain), cuda._weight(plain)
    assert first.data_ptr() == second.data_ptr() != plain.data_ptr()
    assert first.stride() == (72, 1, 24, 8)
    assert torch.equal(first, plain)
    pointwise = torch.randn(16, 8, 1, 1)
    assert cuda._weight(pointwise).data_ptr() == pointwise.data_ptr()
    ready = nhwc(torch.randn(16, 8, 3, 3))
    assert cuda._weight(ready).data_ptr() == ready.data_ptr()
