"""`fuse` and `unfuse`: which modules of a model run as fused ops."""

from __future__ import annotations

import copy
import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .errors import InputError
from .fusion import OWN_HOOKS, Fusion, Settings, enter, leave, original_class, restore_format
from .matchers.search import Search
from .mixins import FUSED_ATTRIBUTES, Fused, Whole, fused_class
from .nn._drop_in import DropIn
from .route import Route
from .settings import ACCURACIES, BACKENDS, one_of

M = TypeVar("M", bound=nn.Module)


def fuse(model: M, backend: str = "auto", accuracy: str = "strict", inplace: bool = False) -> M:
    """Make the residual blocks, stems and convolution + BatchNorm (+ ReLU) layers of a model run as fused ops.

    The result computes the same in eval mode, keeps every parameter, buffer and name (so a state_dict of the original
    loads, strictly, and the other way round), and runs its original modules after `train()`. Blocks are found by
    structure and checked numerically on random weights; what cannot be fused is left alone, and `explain` says why.
    Scales and shifts follow `load_state_dict`, in-place changes and `.to(...)`; after writing in place through `.data`,
    or to tensors made in inference mode, which torch does not count as a change, call `eval()`. The original modules
    also run under autocast, and while a module inside a block has a hook or is in train mode.

    Args:
        model: any module in eval mode: torchvision's, transformers', your own.
        backend: `"auto"`, or one by name for every op.
        accuracy: `"strict"`: the parity rule of `verify`; `"fast"`: float32 Winograd F(4x4, 3x3) is allowed.
        inplace: change `model` itself instead of a deep copy.

    Returns:
        The fused model; a fused model is fused again with the new settings.

    Raises:
        InputError: an unknown name, no module, a model in train mode or that cannot be copied, or nothing in it can be
            fused. The model is then as it was.
    """
    one_of("backend", backend, BACKENDS)
    one_of("accuracy", accuracy, ACCURACIES)
    check_model("model", model)
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(f"model must be the module it was scripted or traced from, got {type(model).__name__}")
    target = model if inplace else copied(model)
    found = Search(target, Settings(backend, accuracy, channels_last=True))
    if not found.changes:
        convs = sum(isinstance(m, nn.Conv2d) for m in target.modules())
        why = f": {next(iter(found.reasons.values()))}" if found.reasons else ""
        raise InputError(
            f"model must have a convolution followed by a BatchNorm that can be fused, got {type(model).__name__} with "
            f"{counted(convs)} and none{why}"
        )
    if hooks := [why for why in found.reasons.values() if why.startswith("a hook on")]:
        warnings.warn(f"{counted(len(hooks))} left unfused so that hooks run: {hooks[0]}", stacklevel=2)
    apply(found, target)
    return target


def unfuse(model: M, inplace: bool = False) -> M:
    """Give a fused model its original modules back.

    Args:
        model: what `fuse` returned; any other module comes back as it is.
        inplace: change `model` itself instead of a deep copy.

    Returns:
        The model, unfused. Modules of `resnet_fused.nn` fuse themselves, so they stay as they are.

    Raises:
        InputError: `model` is no module, or cannot be copied.
    """
    check_module("model", model)
    target = model if inplace else copied(model)
    restore(target)
    for module in target.modules():
        if isinstance(module, DropIn) and not module.training:
            module.fuse()
    return target


def fusions(model: nn.Module) -> dict[str, Fusion]:
    """Everything in a model that runs as a fused op, by the path of what it replaces, in the order of registration."""
    names = {id(module): name for name, module in model.named_modules()}
    order = {key: i for i, key in enumerate(names)}
    every = [f for module in model.modules() if isinstance(module, Fused) for f in module.fusions()]
    found = {}
    for fusion in sorted(every, key=lambda fusion: order[id(fusion.steps[0])]):
        # A module that was replaced since has no path; then the fusion does not run either.
        first, *rest = (names.get(id(step), "") for step in fusion.steps)
        found[f"{first}..{rest[-1].rpartition('.')[2]}" if rest else first] = fusion
    return found


def counted(convolutions: int) -> str:
    """Their number in words of a sentence."""
    return f"{convolutions} convolution{'' if convolutions == 1 else 's'}"


def copied(model: M) -> M:
    """A deep copy; raises InputError where the model holds what cannot be copied."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        why = " ".join(str(error).split())[:160]
        raise InputError(f"model must allow a deep copy, or be changed itself with inplace=True: {why}") from error


def check_module(argument: str, model: object) -> nn.Module:
    """Return `model`; raises InputError unless it is a module."""
    if not isinstance(model, nn.Module):
        raise InputError(f"{argument} must be a torch.nn.Module, got {type(model).__name__}")
    return model


def check_model(argument: str, model: object) -> None:
    """Raise InputError unless `model` is a module in eval mode."""
    if check_module(argument, model).training:
        raise InputError(f"{argument} must be in eval mode, got {type(model).__name__} in train mode (call eval())")


def check_tensor(argument: str, value: object) -> None:
    """Raise InputError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise InputError(f"{argument} must be a torch.Tensor, got {type(value).__name__}")


def arguments_of(x: object) -> tuple[tuple[Any, ...], Tensor]:
    """What a model is called with for the input `x`: that, or its items if it is a tuple; and the first tensor in it.

    Raises:
        InputError: there is no floating-point tensor in it.
    """
    arguments = x if isinstance(x, tuple) else (x,)
    tensors = floating_tensors(arguments)
    if not tensors:
        raise InputError(f"x must be a floating-point torch.Tensor, or a tuple of arguments with one, got {_kind(x)}")
    return arguments, tensors[0]


def floating_tensors(value: Any) -> list[Tensor]:
    """The floating-point tensors in a model's arguments or output."""
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point()]


def _kind(x: object) -> str:
    return f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__


def apply(found: Search, model: nn.Module) -> None:
    """Fuse what was found, in place of what an earlier `fuse` did."""
    classes: dict[nn.Module, type[nn.Module]] = {}
    for module, (mixin, _) in found.changes.items():
        cls = original_class(module)
        # The modules of resnet_fused.nn have the mixin already.
        classes[module] = cls if issubclass(cls, Fused) else fused_class(mixin, cls)  # type: ignore[arg-type]
    wholes = {c.owner: whole for c in found.routes if c.ending and (whole := whole_class(c.owner)) is not None}
    restore(model)
    for module, (_, attributes) in found.changes.items():
        module.__dict__.update(attributes)
        module.__class__ = classes[module]
    routes = [route for candidate in found.routes if len((route := Route(candidate)).stops) > 1]
    for route in routes:
        for member in route.fused:
            member.__dict__["_fused_route"] = route.of(member)
        if route.is_whole() and route.owner in wholes:
            route.owner.__dict__["_fused_whole"] = route
            route.owner.__class__ = wholes[route.owner]
    for owner in dict.fromkeys((*found.owners, *(route.owner for route in routes))):
        owner.register_forward_pre_hook(enter)
        owner.register_forward_hook(leave, always_call=True)
    model.register_forward_hook(restore_format, with_kwargs=True)
    model.__dict__["_unfused_reasons"] = found.reasons


def whole_class(owner: nn.Module) -> type[nn.Module] | None:
    """The class of a module whose forward may run as one call; None: its own allows no subclass, or fuses itself.

    A GraphModule makes its class anew with every change and copy of its graph.
    """
    cls = original_class(owner)
    try:
        return None if issubclass(cls, (Fused, fx.GraphModule)) else fused_class(Whole, cls)  # type: ignore[arg-type]
    except Exception:  # what its own __init_subclass__ may raise
        return None


def restore(model: nn.Module) -> None:
    """Take every trace of `fuse` off a model."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in OWN_HOOKS]:
                del hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)
        module.__dict__.pop("_unfused_reasons", None)
        if isinstance(module, (Fused, Whole)):
            for name in FUSED_ATTRIBUTES:
                module.__dict__.pop(name, None)
            module.__class__ = original_class(module)  # type: ignore[assignment]
