"""The roles of single modules: which are a convolution, a foldable BatchNorm, a ReLU or nothing at all in eval mode."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from ..folding import Layer
from ..fusion import OWN_HOOKS, hook_stores, original_class

NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


class Refused(Exception):
    """Something is not fused; the message says why, for `explain`."""


@dataclass
class Model:
    """What the matchers know about the model they look at.

    Attributes:
        root: the model.
        paths: of its modules, by id.
        places: how often a module is held, by id.
        graphs: of the forwards that were traced.
        read: names of the attributes that those read and do not change themselves.
    """

    root: nn.Module
    paths: dict[int, str] = field(default_factory=dict)
    places: Counter[int] = field(default_factory=Counter)
    graphs: dict[nn.Module, fx.Graph] = field(default_factory=dict)
    read: dict[nn.Module, list[str]] = field(default_factory=dict)

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
    """The convolutions, BatchNorms and modules without children in a module, each once, in the order of registration.

    What a BatchNorm holds, such as an activation, is part of it; what a convolution holds comes after it.
    """
    seen: set[nn.Module] = set()

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        if module in seen:
            return
        seen.add(module)
        children = [] if is_norm(module) else [child for child in module._modules.values() if child is not None]
        if not children or isinstance(module, nn.Conv2d):
            yield module
        for child in children:
            yield from walk(child)

    return walk(module)


def places_within(module: nn.Module) -> list[tuple[dict[str, nn.Module | None], str]]:
    """Where a module and those below it keep their children: the dictionary and the name of each."""
    return [(parent._modules, name) for parent in module.modules() for name in parent._modules]


def is_norm(module: nn.Module) -> bool:
    """Whether a module has the four tensors of a BatchNorm (or would have, with `track_running_stats`)."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    held = {*module._parameters, *module._buffers}
    return held >= set(NORM_TENSORS) and isinstance(module._buffers.get("running_var"), Tensor)


def norm_channels(norm: Any) -> int:
    """How many channels a module of `is_norm` normalises."""
    return norm.num_features if isinstance(norm, nn.modules.batchnorm._BatchNorm) else norm.running_var.numel()


_NOTHING = tuple(
    cls.forward
    for cls in (
        nn.Identity,
        nn.Dropout,
        nn.Dropout1d,
        nn.Dropout2d,
        nn.Dropout3d,
        nn.AlphaDropout,
        nn.FeatureAlphaDropout,
    )
)


def is_nothing(module: nn.Module) -> bool:
    """Whether a module is one of torch's that give their input back in eval mode; a subclass may do otherwise."""
    return original_class(module).forward in _NOTHING


def activation(module: nn.Module) -> str | None:
    """`"relu"` or `"none"` if that is what a module without tensors computes in eval mode, else None."""
    if is_nothing(module):
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
    stores = hook_stores(module)
    return "forward" in module.__dict__ or any(hook not in OWN_HOOKS for hooks in stores for hook in hooks.values())


def check_inside(module: nn.Module, model: Model) -> None:
    """Refuse a module whose call cannot be left out."""
    name = model.name(module)
    if hooked(module):
        raise Refused(f"a hook on {name}")
    if module.training:
        raise Refused(f"{name} is in train mode")


def check_tensors(module: nn.Module, model: Model) -> None:
    """Refuse a module whose call cannot be left out, or whose parameters and buffers no op can read."""
    for each in module.modules():
        check_inside(each, model)
    if model.places[id(module)] > 1:
        raise Refused(f"{model.name(module)} is shared: the model holds it in {model.places[id(module)]} places")
    tensors = [t for store in (module._parameters, module._buffers) for t in store.values() if t is not None]
    if any(is_lazy(t) for t in tensors):
        raise Refused(f"{model.name(module)} has no parameters yet: run the model once")
    special = [t for t in tensors if type(t) not in (Tensor, nn.Parameter)]
    if special:
        raise Refused(f"{model.name(module)} holds a {type(special[0]).__name__}")
    unusual = [t for t in tensors if t.layout != torch.strided or t.is_complex()]
    if unusual:
        kind = "complex" if unusual[0].is_complex() else str(unusual[0].layout).removeprefix("torch.")
        raise Refused(f"{model.name(module)} holds a {kind} tensor")
    if any(t.device.type == "meta" for t in tensors):
        raise Refused(f"{model.name(module)} is on the meta device")


def check_weight(module: nn.Module, model: Model) -> None:
    """Refuse a convolution or linear layer whose weight is no parameter of its own."""
    if module._parameters.get("weight") is None:
        raise Refused(f"the weight of {model.name(module)} is computed by a parametrization")


def make_layer(conv: nn.Conv2d | None, norm: Any, model: Model) -> Layer:
    """The layer made of a convolution and the BatchNorm after it, of a convolution alone, or of a BatchNorm alone.

    Raises:
        Refused: they cannot be folded.
    """
    for module in filter(None, (conv, norm)):
        check_tensors(module, model)
    if conv is not None:
        check_weight(conv, model)
        if conv.padding_mode != "zeros":
            raise Refused(f"{model.name(conv)} pads with {conv.padding_mode!r}, not zeros")
    if norm is None:
        return Layer(conv)
    if norm.running_mean is None or norm.running_var is None:
        raise Refused(f"{model.name(norm)} has no running statistics")
    if conv is not None and norm_channels(norm) != conv.out_channels:
        raise Refused(f"{model.name(norm)} has {norm_channels(norm)} channels, {model.name(conv)} {conv.out_channels}")
    return Layer(conv, norm, *norm_form(norm, model))


def norm_form(norm: Any, model: Model) -> tuple[float | None, bool]:
    """The eps of a BatchNorm look-alike, None if it is `norm.eps`, and whether it ends in ReLU: by trying it."""
    if original_class(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return None, False
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
    x = torch.randn(2, channels, 4, 5, generator=generator, dtype=torch.float64, device="cpu")
    try:
        with torch.no_grad():
            y = trial(x.clone())
    except Exception as error:
        raise Refused(f"{model.name(norm)} does not run on its own: {error}") from None
    own = getattr(norm, "eps", None)
    for eps in (own,) if isinstance(own, float) else (1e-5, 1e-3, 1e-6, 0.0):
        mean, var, weight, bias = (vectors.get(n) for n in ("running_mean", "running_var", "weight", "bias"))
        expected = torch.nn.functional.batch_norm(x, mean, var, weight, bias, eps=eps)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            continue
        for relu in (False, True):
            if torch.allclose(y, expected.relu() if relu else expected, rtol=1e-9, atol=1e-9):
                return None if own == eps else eps, relu
    raise Refused(f"{model.name(norm)} computes something else than BatchNorm, or BatchNorm and ReLU")


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
