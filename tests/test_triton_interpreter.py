"""The repairs of Triton's interpreter, and the arithmetic that the kernels share, against torch's."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from resnet_fused.kernels.triton import interpreter  # noqa: E402
from resnet_fused.kernels.triton.common import relu, round_to_tf32  # noqa: E402

pytestmark = pytest.mark.skipif(not interpreter.INTERPRETED, reason="Triton was imported without TRITON_INTERPRET=1")

# Ties of bfloat16 and TF32, to even and to odd; the largest number, a subnormal one; the NaN that CUDA gives.
BITS = (0x3F808000, 0x3F818000, 0x3F80FFFF, 0x7F7FFFFF, 0x00008001, 0x3F801000, 0x3F803000, 0x80000000, 0xFF800000)
NAN = 0x7FFFFFFF


@triton.jit
def elementwise_kernel(x, y, OP: tl.constexpr, N: tl.constexpr):
    v = tl.load(x + tl.arange(0, N))
    if OP == "relu":
        v = relu(v)
    if OP == "tf32":
        v = round_to_tf32(v)
    if OP == "multiply add":
        v = v * v + v
    if OP == "negate":
        v = -v
    tl.store(y + tl.arange(0, N), v.to(y.dtype.element_ty))


@triton.jit
def dot_kernel(a, b, y, PRECISION: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(y + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision=PRECISION))


def numbers(dtype):
    special = torch.tensor([bit - (bit >> 31 << 32) for bit in (*BITS, NAN)], dtype=torch.int32).view(torch.float32)
    return torch.cat([special, torch.randn(64 - len(special)) * 1e3]).to(dtype)


def elementwise(op, x, dtype):
    y = torch.empty(len(x), dtype=dtype)
    elementwise_kernel[(1,)](x, y, OP=op, N=len(x))
    return y


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_casts_round_to_nearest(dtypes):
    x = numbers(dtypes[0])
    y = elementwise("none", x, dtypes[1])
    torch.testing.assert_close(y, x.to(dtypes[1]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("op", "torch_op"),
    [("multiply add", lambda v: v * v + v), ("negate", lambda v: -v), ("relu", torch.relu)],
)
def test_bfloat16_arithmetic(op, torch_op):
    x = numbers(torch.bfloat16)
    torch.testing.assert_close(elementwise(op, x, x.dtype), torch_op(x), rtol=0, atol=0, equal_nan=True)


def test_rounding_to_tf32():
    x = numbers(torch.float32)
    y = elementwise("tf32", x, torch.float32)
    assert torch.equal(y.isnan(), x.isnan())
    assert (y.nan_to_num().view(torch.int32) & 0x1FFF == 0)[: len(BITS)][y[: len(BITS)].isfinite()].all()
    finite = x.isfinite() & (x.abs() < 1e38) & (x.abs() > 1e-38)
    assert ((y - x).abs() <= x.abs() * 2**-11)[finite].all()
    assert y[5] == 1 + 2**-10  # ties go away from zero
    assert y[8] == -torch.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_16_bit_numbers_are_summed_in_float32(dtype):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype)
    y = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, y, PRECISION="ieee", N=16)
    torch.testing.assert_close(y, a.float() @ b.float(), rtol=1e-6, atol=1e-5)


def test_tf32_products_drop_what_the_matrix_unit_drops():
    a, b = torch.full((16, 16), 1 + 2**-10 + 2**-11), torch.eye(16)
    y = torch.empty(16, 16)
    for precision, expected in (("tf32", 1 + 2**-10), ("ieee", a[0, 0].item())):
        dot_kernel[(1,)](a, b, y, PRECISION=precision, N=16)
        assert (y == expected).all()
