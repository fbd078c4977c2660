"""The check behind every matcher: on random weights, does the op compute what the original modules do?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..folding import Layer, Selection
from ..fusion import Fusion, unfused
from ..mixins import FUSED_ATTRIBUTES, original_class
from .layers import Refused, pair

TOLERANCE = 1e-4  # of the output's largest magnitude, in float32: a sum in another order differs by 1e-6
_POOL = 65537  # a prime: repeated along a weight, no row starts where another does


class Prober:
    """Probes the blocks of one model; blocks that differ in nothing but the values of their tensors are probed once."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._noise = torch.randn(_POOL, generator=self._generator, device="cpu")
        self._known: dict[Any, int | str] = {}

    def choose(self, candidates: Sequence[Fusion], what: str) -> Fusion:
        """The candidate that computes the same as the modules it stands for; all candidates stand for the same modules.

        Weights and statistics are random during the check (a fresh model's last BatchNorm may be all zeros, which would
        hide its whole branch), and put back afterwards.

        Raises:
            Refused: none does; `what` names the modules.
        """
        key = (*(signature(step) for step in candidates[0].steps), *(candidate.op for candidate in candidates))
        if key not in self._known:
            try:
                self._known[key] = self._try(candidates)
            except Refused as error:
                self._known[key] = str(error)
        outcome = self._known[key]
        if isinstance(outcome, str):
            raise Refused(f"{what} {outcome}")
        return candidates[outcome]

    def _try(self, candidates: Sequence[Fusion]) -> int:
        first = candidates[0]
        device = first.convs[0].weight.device
        x = (torch.randn(probe_shape(first), generator=self._generator, device="cpu") * 3).to(device)
        with (
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            unfused(),
            random_tensors(first.layers, self._noise),
        ):
            expected = run_original(first.steps, x)
            limit = TOLERANCE * expected.abs().max().item()
            for i, candidate in enumerate(candidates):
                y = candidate.compute(x, candidate.fold(), "reference", "strict")
                if y.shape == expected.shape and (y - expected).abs().max().item() <= limit:  # false for NaN
                    return i
        kinds = " or ".join(dict.fromkeys(candidate.op for candidate in candidates))
        raise Refused(f"looks like {kinds} but computes something else")


def signature(module: nn.Module) -> tuple[Any, ...]:
    """All that a module's forward depends on, but the values of its tensors."""

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(map(plain, value))
        return value if isinstance(value, (bool, int, float, str, type, type(None))) else id(value)

    own = set(nn.Module().__dict__)
    return tuple(
        (
            name,
            original_class(m),
            tuple((k, plain(v)) for k, v in m.__dict__.items() if k not in own and k not in FUSED_ATTRIBUTES),
            tuple((k, t if t is None else t.shape) for store in (m._parameters, m._buffers) for k, t in store.items()),
        )
        for name, m in module.named_modules()
    )


def probe_shape(fusion: Fusion) -> tuple[int, int, int, int]:
    """A small input: two images, high and wide enough for a few outputs, not square."""
    conv = fusion.convs[0]
    (r, s), (stride_h, stride_w), (dil_h, dil_w) = pair(conv.kernel_size), pair(conv.stride), pair(conv.dilation)
    pool = fusion.options.get("pool_kernel", 1)
    return (
        2,
        conv.in_channels,
        dil_h * (r - 1) + (2 + pool) * stride_h,
        dil_w * (s - 1) + (3 + pool) * stride_w,
    )


def run_original(steps: Sequence[nn.Module], x: Tensor) -> Tensor:
    """The output of the original modules."""
    state = torch.get_rng_state()
    y = x.clone()
    try:
        for step in steps:
            y = original_class(step).forward(step, y)
    except Exception as error:
        message = " ".join(str(error).split())[:100]
        raise Refused(f"does not run on one image tensor: {message}") from None
    if not torch.equal(state, torch.get_rng_state()):
        torch.set_rng_state(state)
        raise Refused("draws random numbers in eval mode")
    if not isinstance(y, Tensor):
        raise Refused(f"returns a {type(y).__name__}, not a tensor")
    return y


@contextmanager
def random_tensors(layers: Sequence[Layer | Selection], noise: Tensor) -> Iterator[None]:
    """Put random float32 tensors in place of the layers' own, scaled so that every layer's output is of order one."""
    drawn = 0

    def draw(shape: torch.Size) -> Tensor:
        nonlocal drawn
        start = drawn % _POOL
        drawn += shape.numel()
        return noise.repeat((start + shape.numel()) // _POOL + 1)[start : start + shape.numel()].reshape(shape)

    saved: list[tuple[Any, str, Tensor]] = []
    try:
        for layer in layers:
            conv, norm = layer.conv, layer.norm
            fan_in = 1 if conv is None else conv.weight[0].numel()
            for module in filter(None, (conv, norm)):
                stores: tuple[Any, ...] = (module._parameters, module._buffers)
                for store in stores:
                    for name, tensor in list(store.items()):
                        if tensor is None or not tensor.is_floating_point():
                            continue
                        value = draw(tensor.shape)
                        if module is conv and norm is None:
                            value = value / fan_in**0.5
                        elif name == "running_var":
                            value = (value.abs() + 0.5) * fan_in * 4
                        elif name == "running_mean":
                            value = value * fan_in**0.5
                        elif module is norm:
                            value = value * 2
                        saved.append((store, name, tensor))
                        store[name] = value.to(tensor.device)
        yield
    finally:
        for store, name, tensor in saved:
            store[name] = tensor
