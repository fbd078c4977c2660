"""The ops on a GPU as torch uses them: streams, graphs, threads, opcheck, torch.compile, autocast, misuse."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu_cases import SHAPES, TINY, moved, poison
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fused as rf
from resnet_fused import plan
from resnet_fused.errors import BackendError, InputError
from resnet_fused.kernels import cuda, triton
from resnet_fused.samples import Sample, sample
from resnet_fused.shapes import Conv, Shape

OPS = [name for name in SHAPES if name != "project"]
BF16 = torch.bfloat16


def first(op: str, device: torch.device) -> Shape:
    """A shape that every backend has a kernel for; the smallest where it is interpreted."""
    return (SHAPES if device.type == "cuda" else TINY)[op][0]


def called(op: str, device: torch.device, seed: int = 0) -> Sample:
    """A call of the op; another seed gives another image beside the same weights."""
    call = sample(first(op, device), BF16, device)
    x, *rest = call.args
    if seed:
        generator = torch.Generator(device).manual_seed(seed)
        fresh = torch.randn(x.shape, generator=generator, device=device).to(x.dtype)
        x = fresh.contiguous(memory_format=torch.channels_last)
    return replace(call, args=(x, *rest))


def ways(call: Sample, backend: str) -> Iterator[str]:
    """The algorithms of a backend for a call, and None for the op."""
    shape, device = call.shape, call.args[0].device
    kernels = plan.GPU_KERNELS.get(backend)
    if kernels is not None and not kernels.unsupported(shape, BF16, device):
        yield from (found.algorithm for found in kernels.candidates(shape, BF16, device))


def run(call: Sample, backend: str, algorithm: str | None) -> Tensor:
    """One algorithm, or the op."""
    return call.run(backend) if algorithm is None else call.run_kernel(plan.GPU_KERNELS[backend], algorithm)


@pytest.mark.parametrize("op", OPS)
def test_side_stream(op: str, backend: str, gpu: torch.device) -> None:
    """Kernels wait for what their stream has to do before them, and for nothing else to be launched elsewhere."""
    call, late = called(op, gpu), called(op, gpu, seed=1)
    for algorithm in [None, *ways(call, backend)]:
        with torch.inference_mode():
            expected = run(late, backend, algorithm)
            run(call, backend, algorithm)  # packs its weights: that would wait, and the test not see what it is for
            torch.cuda.synchronize()
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                x = call.args[0].clone(memory_format=torch.channels_last)
                torch.cuda._sleep(20_000_000)  # some 10 ms, in which a kernel on another stream would read the old x
                x.copy_(late.args[0])
                y = run(replace(call, args=(x, *call.args[1:])), backend, algorithm)
            side.synchronize()
            assert torch.equal(y, expected), algorithm


@pytest.mark.parametrize("op", OPS)
def test_cuda_graph(op: str, backend: str, gpu: torch.device) -> None:
    """Captured after a warm-up, replayed on other values, as often as one likes."""
    for algorithm in [None, *ways(called(op, gpu), backend)]:
        call = called(op, gpu)
        with torch.inference_mode():
            torch.cuda.synchronize()  # the arguments are there
            with torch.cuda.stream(torch.cuda.Stream()):
                run(call, backend, algorithm)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = run(call, backend, algorithm)
            for seed in (1, 2, 1):
                other = called(op, gpu, seed)
                call.args[0].copy_(other.args[0])
                y.fill_(float("nan"))
                graph.replay()
                assert torch.equal(y, run(other, backend, algorithm)), algorithm


@pytest.mark.parametrize("op", OPS)
def test_two_threads(op: str, backend: str, gpu: torch.device) -> None:
    """Each on a stream of its own, both with the same weights, which the first call packs."""
    calls = [called(op, gpu, seed) for seed in (1, 2)]
    calls[1] = replace(calls[0], args=(calls[1].args[0], *calls[0].args[1:]))
    results: list[list[Tensor]] = [[], []]
    torch.cuda.synchronize()
    start = threading.Barrier(2)

    def work(i: int) -> None:
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
            start.wait()
            results[i] = [calls[i].run(backend) for _ in range(10)]
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for call, found in zip(calls, results, strict=True):
        expected = call.run(backend)
        assert len(found) == 10
        assert all(torch.equal(y, expected) for y in found)


@pytest.mark.parametrize("op", OPS)
def test_250_runs_give_the_same_bits(op: str, backend: str, gpu: torch.device) -> None:
    """While another stream keeps the multiprocessors busy now and then, so that blocks come in other orders."""
    call = called(op, gpu)
    for algorithm in [None, *ways(call, backend)]:
        busy, a = torch.cuda.Stream(), torch.randn(1024, 1024, device=gpu)
        with torch.inference_mode():
            expected = run(call, backend, algorithm)
            different = torch.zeros((), dtype=torch.int64, device=gpu)
            for i in range(250):
                if i % 5 == 0:
                    with torch.cuda.stream(busy):
                        a @ a
                    poison(gpu)
                different += (run(call, backend, algorithm) != expected).any()
        assert int(different) == 0, f"{algorithm}: {int(different)} of 250 runs differed from the first"


class _Calls(TorchDispatchMode):
    """Notes the package's ops and what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "resnet_fused":
            self.found.append((func, args, kwargs or {}))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, backend: str, device: torch.device) -> None:
    with _Calls() as calls:
        called(op, device).run(backend)
    function, args, options = calls.found[0]
    assert function.name() == f"resnet_fused::{op}"
    torch.library.opcheck(function, args, options)


@pytest.mark.parametrize("op", OPS)
def test_compile(op: str, backend: str, gpu: torch.device) -> None:
    torch.compiler.reset()
    call = called(op, gpu)
    function = torch.compile(lambda x: replace(call, args=(x, *call.args[1:])).run(backend).relu(), fullgraph=True)
    with torch.inference_mode():
        assert torch.equal(function(call.args[0]), call.run(backend).relu())


@pytest.mark.parametrize("op", OPS)
def test_gradients_are_those_of_the_reference(op: str, backend: str, gpu: torch.device) -> None:
    call = called(op, gpu)

    def gradient(name: str) -> Tensor:
        x = call.args[0].detach().clone(memory_format=torch.channels_last).requires_grad_()
        (found,) = torch.autograd.grad(replace(call, args=(x, *call.args[1:])).run(name).float().sum(), x)
        return found.double()

    mine, reference = gradient(backend), gradient("reference")
    assert (mine - reference).abs().max() <= 4e-2 * reference.abs().max()


def test_autocast(backend: str, gpu: torch.device) -> None:
    call = sample(SHAPES["conv_bn_act"][0], torch.float32, gpu)
    cast = [value.to(BF16) if value is not None and value.dim() == 4 else value for value in call.args]
    with torch.inference_mode():
        wanted = replace(call, args=tuple(cast)).run(backend)
        with torch.autocast("cuda", BF16):
            given = call.run(backend)
    assert given.dtype == BF16
    assert torch.equal(given, wanted)


def test_other_memory_formats(backend: str, device: torch.device) -> None:
    """NCHW, a view of every second pixel, a slice from an odd channel on, and no images at all."""
    call = called("conv_bn_act", device)
    x, weight, scale, shift, *rest = call.args
    n, c, h, w = x.shape
    odd = torch.randn(n, c + 3, h, w, device=device).to(BF16).contiguous(memory_format=torch.channels_last)
    views = [
        x.contiguous(),
        torch.randn(n, c, 2 * h, 2 * w, device=device).to(BF16)[:, :, ::2, 1::2],
        odd[:, 3:],
    ]
    options = dict(call.options, backend=backend)
    with torch.inference_mode():
        for view in views:
            same = view.contiguous(memory_format=torch.channels_last)
            given = rf.ops.conv_bn_act(view, weight, scale, shift, *rest, **options)
            wanted = rf.ops.conv_bn_act(same, weight, scale, shift, *rest, **{**options, "backend": "reference"})
            assert (given.double() - wanted.double()).abs().max() <= 2.0**-7 * wanted.double().abs().max()
        rest[0] = None if rest[0] is None else rest[0][:0]
        assert rf.ops.conv_bn_act(x[:0], weight, scale, shift, *rest, **options).shape[0] == 0


# --- misuse -------------------------------------------------------------------------------------------------------


def test_tensors_of_two_devices(backend: str, gpu: torch.device) -> None:
    call = called("conv_bn_act", gpu)
    x, weight, *rest = call.args
    with pytest.raises(InputError, match=r"weight\.device must be that of x"):
        rf.ops.conv_bn_act(x, weight.cpu(), *rest, **call.options, backend=backend)


def test_backend_of_another_device(gpu: torch.device) -> None:
    call = called("conv_bn_act", gpu)
    with pytest.raises(BackendError, match="backend='cpu' cannot run this"):
        call.run("cpu")
    for backend in ("cuda", "triton"):
        with pytest.raises(BackendError, match=f"backend='{backend}' cannot run this"):
            moved(call, torch.device("cpu")).run(backend)


def test_float32_without_tf32(gpu: torch.device) -> None:
    call = sample(SHAPES["conv_bn_act"][0], torch.float32, gpu)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    with pytest.raises(BackendError, match="TF32"):
        call.run("cuda")


@pytest.mark.skipif(cuda.built() is not None, reason=str(cuda.built()))
def test_private_ops_say_what_they_expect(gpu: torch.device) -> None:
    def conv(x: Tensor, weight: Tensor, shift: Tensor, algorithm: str = "") -> Tensor:
        rest = (None, None, None, None, None, None, 1, [1, 1], [0, 0], [1, 1], True, algorithm)
        return torch.ops.resnet_fused._cuda_conv(x, weight, None, shift, *rest)

    x = torch.zeros(2, 16, 4, 4, dtype=BF16, device=gpu).contiguous(memory_format=torch.channels_last)
    weight, shift = torch.zeros(8, 16, 1, 1, dtype=BF16, device=gpu), torch.zeros(8, device=gpu)
    for arguments, message in (
        ((x.contiguous(), weight, shift), "x: expected channels_last"),
        ((x, weight.half(), shift), "weight: expected the dtype of x"),
        ((x, weight, shift.cpu()), "shift: expected a CUDA tensor"),
        ((x, weight, shift[:4]), "shift: expected a contiguous float32 vector of 8"),
        ((x, weight, shift, "no_such_kernel"), "no kernel is called no_such_kernel"),
    ):
        with pytest.raises(RuntimeError, match=message):
            conv(*arguments)


def test_algorithm_that_cannot(device: torch.device) -> None:
    shape = Conv(1, 16, 5, 5, 16, 3, 3, padding=(1, 1))
    with pytest.raises(BackendError, match="algorithm 'pointwise' of backend 'triton' cannot run"):
        sample(shape, BF16, device).run_kernel(triton, "pointwise")
