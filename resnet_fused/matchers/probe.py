"""The check behind every matcher: on random weights, does the op compute what the original modules do?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..fusion import Contents, Fusion, is_own, original_class, unfused
from ..graph import GraphFusion
from ..mixins import FUSED_ATTRIBUTES
from .forwards import check_forward
from .layers import Refused, is_norm, pair

TOLERANCE = 1e-4  # of the output's largest magnitude, in float32: a sum in another order differs by 1e-6
_POOL = 65537  # a prime: repeated along a weight, no row starts where another does


class Prober:
    """Probes the blocks of one model; blocks that differ in nothing but the values of their tensors are probed once."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._noise = Noise(self._generator)
        self._known: dict[Any, int | str] = {}

    def choose(self, candidates: Sequence[Fusion], what: str) -> Fusion:
        """The candidate that computes the same as the modules it stands for; all candidates stand for the same modules.

        Weights and statistics are random during the check (a fresh model's last BatchNorm may be all zeros, which would
        hide its whole branch), and put back afterwards.

        Raises:
            Refused: none does; `what` names the modules.
        """
        key = (*(signature(step) for step in candidates[0].steps), *map(type, candidates))
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
            full_precision(),
            random_tensors(first, self._noise),
        ):
            given = x.clone()  # a block may change its input in place; then its op has to, too
            expected = run_original(first.steps, given)
            limit = TOLERANCE * expected.abs().max().item()
            for i, candidate in enumerate(candidates):
                taken = x.clone()
                y = run_candidate(candidate, taken)
                if (taken - given).abs().max().item() > limit:
                    continue
                if y.shape == expected.shape and (y - expected).abs().max().item() <= limit:  # false for NaN
                    if not isinstance(candidate, GraphFusion):  # which runs what it does not fuse
                        for step in first.steps:
                            check_forward(step, x.shape[1])
                    return i
        kinds = " or ".join(dict.fromkeys(candidate.op for candidate in candidates))
        raise Refused(f"looks like {kinds} but computes something else")


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions and products of float32 as such: in TF32, cuDNN's default, their errors hide what is looked for."""
    backends = (torch.backends.cudnn.conv, torch.backends.cuda.matmul, torch.backends.mkldnn.conv)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


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
    if isinstance(fusion, GraphFusion):
        return (2, fusion.channels, 8, 12)
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
    """The output of the original modules.

    Raises:
        Refused: they do something besides.
    """
    state = torch.get_rng_state()
    before = [Before(module) for step in steps for module in step.modules()]
    y = x
    try:
        for step in steps:
            y = original_class(step).forward(step, y)
    except Exception as error:
        message = " ".join(str(error).split())[:100]
        raise Refused(f"does not run on one image tensor: {message}") from None
    finally:
        stored = [name for each in before for name in each.restore()]
    if stored:
        raise Refused(f"stores {stored[0]} in its forward")
    if not torch.equal(state, torch.get_rng_state()):
        torch.set_rng_state(state)
        raise Refused("draws random numbers in eval mode")
    if not isinstance(y, Tensor):
        raise Refused(f"returns a {type(y).__name__}, not a tensor")
    return y


class Before:
    """The attributes of a module as they are now."""

    def __init__(self, module: nn.Module) -> None:
        self._store = module.__dict__
        self._attributes = dict(self._store)
        self._contents = {name: Contents.of(value) for name, value in self._store.items() if is_own(name)}

    def restore(self) -> list[str]:
        """Give the module the attributes back that it had, and return the names of those that were others."""
        before, now = self._attributes, self._store
        stored = [name for name in {**before, **now} if now.get(name, now) is not before.get(name, now)]
        now.update(before)
        for name in now.keys() - before.keys():
            del now[name]
        for name, contents in self._contents.items():
            if any([content.changed() for content in contents]):
                stored.append(name)
                for content in contents:
                    content.restore()
        return stored


def run_candidate(candidate: Fusion, x: Tensor) -> Tensor:
    """The output of the op, or of the steps that run instead of the original modules."""
    try:
        return candidate.compute(x, candidate.fold(), "reference", "strict")
    except Exception as error:
        if not isinstance(candidate, GraphFusion):
            raise
        message = " ".join(str(error).split())[:100]
        raise Refused(f"does not run step by step: {message}") from None


class Noise:
    """Random numbers in any quantity, always the same."""

    def __init__(self, generator: torch.Generator) -> None:
        self._pool = torch.randn(_POOL, generator=generator, device="cpu")
        self._repeated = self._pool

    def draw(self, shape: torch.Size, skip: int) -> Tensor:
        """A tensor of the noise from its `skip`-th number on: a view, so that a large weight costs nothing."""
        start, count = skip % _POOL, shape.numel()
        if self._repeated.numel() < start + count:
            self._repeated = self._pool.repeat((start + count) // _POOL + 1)
        return self._repeated[start : start + count].view(shape)


@contextmanager
def random_tensors(fusion: Fusion, noise: Noise) -> Iterator[None]:
    """Put random float32 tensors in place of the modules' own, scaled so that every layer's output is of order one."""
    # A convolution's output is as large as its weight has rows; the BatchNorm after it sees to that.
    fan_ins = {
        layer.norm: layer.conv.weight[0].numel()
        for layer in fusion.layers
        if layer.conv is not None and layer.norm is not None
    }
    normalised = {layer.conv for layer in fusion.layers if layer.norm is not None}
    drawn = 0
    saved: list[tuple[Any, str, Tensor]] = []
    try:
        for module in dict.fromkeys(m for step in fusion.steps for m in step.modules()):
            stores: tuple[Any, ...] = (module._parameters, module._buffers)
            for store in stores:
                for name, tensor in list(store.items()):
                    if tensor is None or is_lazy(tensor) or not tensor.is_floating_point():
                        continue
                    value = noise.draw(tensor.shape, drawn)
                    drawn += tensor.numel()
                    fan_in = fan_ins.get(module, 1)
                    if name == "running_var":
                        value = (value.abs() + 0.5) * fan_in * 4
                    elif name == "running_mean":
                        value = value * fan_in**0.5
                    elif is_norm(module):
                        value = value * 2
                    elif value.dim() > 1 and module not in normalised:
                        value = value / value[0].numel() ** 0.5
                    saved.append((store, name, tensor))
                    store[name] = value.to(tensor.device)
        yield
    finally:
        for store, name, tensor in saved:
            store[name] = tensor
