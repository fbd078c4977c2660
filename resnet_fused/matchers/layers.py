"""The roles of single modules: which are a convolution, a foldable BatchNorm, a ReLU or nothing at all in eval mode."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..fusion import OWN_HOOKS, Layer
from ..mixins import original_class

NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


class Refused(Exception):
    """Something is not fused; the message says why, for `explain`."""


@dataclass
class Model:
    """What the matchers know about the model they look at."""

    root: nn.Module
    paths: dict[int, str] = field(default_factory=dict)
    places: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        for name, module in self.root.named_modules():
            self.paths[id(module)] = name
            self.places.update(id(child) for child in module._modules.values() if child is not None)

    def name(self, module: nn.Module) -> str:
        """What to call a module in a message: its path, with its class unless that is torch's."""
        path, cls = self.paths[id(module)], original_class(module)
        return f"{path} ({cls.__name__})" if path and not cls.__module__.startswith("torch.") else path or cls.__name__


def has_own_tensors(module: nn.Module) -> bool:
    """Whether a module holds parameters or buffers itself, not in its children."""
    return any(t is not None for store in (module._parameters, module._buffers) for t in store.values())


def leaves(module: nn.Module) -> Iterator[nn.Module]:
    """The modules without children in a module, each once, in the order they were registered."""
    return (m for m in module.modules() if not any(c is not None for c in m._modules.values()))


def is_norm(module: nn.Module) -> bool:
    """Whether a module has the four tensors of a BatchNorm (or would have, with `track_running_stats`)."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    held = {*module._parameters, *module._buffers}
    return held >= set(NORM_TENSORS) and isinstance(module._buffers.get("running_var"), Tensor)


def norm_channels(norm: Any) -> int:
    """How many channels a module of `is_norm` normalises."""
    return norm.num_features if isinstance(norm, nn.modules.batchnorm._BatchNorm) else norm.running_var.numel()


def activation(module: nn.Module) -> str | None:
    """`"relu"` or `"none"` if that is what a module without tensors computes in eval mode, else None."""
    if isinstance(module, (nn.Identity, nn.modules.dropout._DropoutNd)):
        return "none"
    if original_class(module) is nn.ReLU:
        return "relu"
    if has_own_tensors(module):
        return None
    # From -1e4 to 1e4, dense around zero: what bends there is no ReLU, nor is what saturates.
    x = (torch.linspace(-1, 1, 2 * 8 * 4 * 5, device="cpu") ** 5 * 1e4).reshape(2, 8, 4, 5)
    try:
        with torch.no_grad():
            y = module(x.clone())
    except Exception:  # whatever it wants, it is no activation
        return None
    if not isinstance(y, Tensor):
        return None
    return "none" if torch.equal(y, x) else "relu" if torch.equal(y, x.relu()) else None


def hooked(module: nn.Module) -> bool:
    """Whether calling a module runs more than its class's forward."""
    stores = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" in module.__dict__ or any(hook not in OWN_HOOKS for hooks in stores for hook in hooks.values())


def check_inside(module: nn.Module, model: Model) -> None:
    """Refuse a module whose call cannot be left out."""
    name = model.name(module)
    if hooked(module):
        raise Refused(f"a hook on {name}")
    if module.training:
        raise Refused(f"{name} is in train mode")


def make_layer(conv: nn.Conv2d, norm: Any, model: Model) -> Layer:
    """The layer made of a convolution and the BatchNorm after it.

    Raises:
        Refused: they cannot be folded.
    """
    for module in (conv, norm):
        check_inside(module, model)
        if model.places[id(module)] > 1:
            raise Refused(f"{model.name(module)} is shared: the model holds it in {model.places[id(module)]} places")
        tensors = [t for store in (module._parameters, module._buffers) for t in store.values() if t is not None]
        if any(is_lazy(t) for t in tensors):
            raise Refused(f"{model.name(module)} has no parameters yet: run the model once")
        special = [t for t in tensors if type(t) not in (Tensor, nn.Parameter)]
        if special:
            raise Refused(f"{model.name(module)} holds a {type(special[0]).__name__}")
        if any(t.device.type == "meta" for t in tensors):
            raise Refused(f"{model.name(module)} is on the meta device")
    if conv._parameters.get("weight") is None:
        raise Refused(f"the weight of {model.name(conv)} is computed by a parametrization")
    if conv.padding_mode != "zeros":
        raise Refused(f"{model.name(conv)} pads with {conv.padding_mode!r}, not zeros")
    if norm.running_mean is None or norm.running_var is None:
        raise Refused(f"{model.name(norm)} has no running statistics")
    if norm_channels(norm) != conv.out_channels:
        raise Refused(f"{model.name(norm)} has {norm_channels(norm)} channels, {model.name(conv)} {conv.out_channels}")
    return Layer(conv, norm, find_eps(norm, model))


def find_eps(norm: Any, model: Model) -> float | None:
    """The eps of a BatchNorm look-alike, found by trying what it computes; None if it is `norm.eps`."""
    if original_class(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return None
    # A copy with variances so small that eps shows, in float64.
    trial = copy.copy(norm)
    trial._parameters, trial._buffers = dict(norm._parameters), dict(norm._buffers)
    generator = torch.Generator().manual_seed(0)
    channels = norm.running_var.numel()
    vectors = {
        name: torch.rand(channels, generator=generator, dtype=torch.float64, device="cpu") + 0.5
        for name in NORM_TENSORS
        if getattr(norm, name) is not None
    }
    vectors["running_var"] *= 1e-4
    for name, value in vectors.items():
        (trial._parameters if name in norm._parameters else trial._buffers)[name] = value
    x = torch.randn(2, channels, 1, 2, generator=generator, dtype=torch.float64, device="cpu")
    try:
        with torch.no_grad():
            y = trial(x.clone())
    except Exception as error:
        raise Refused(f"{model.name(norm)} does not run on its own: {error}") from None
    own = getattr(norm, "eps", None)
    for eps in (own,) if isinstance(own, float) else (1e-5, 1e-3, 1e-6, 0.0):
        mean, var, weight, bias = (vectors.get(n) for n in ("running_mean", "running_var", "weight", "bias"))
        expected = torch.nn.functional.batch_norm(x, mean, var, weight, bias, eps=eps)
        if isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y, expected, rtol=1e-9, atol=1e-9):
            return None if own == eps else eps
    raise Refused(f"{model.name(norm)} computes something else than BatchNorm")


def pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    """One number or two as two."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def conv_geometry(conv: nn.Conv2d) -> dict[str, tuple[int, int]]:
    """Stride, padding and dilation of a convolution, two numbers each.

    Raises:
        Refused: padding "same" that is not the same on both sides.
    """
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    if left != right or top != bottom:
        raise Refused(f"padding {conv.padding!r} is not the same on both sides")
    return {"stride": pair(conv.stride), "padding": (top, left), "dilation": pair(conv.dilation)}
