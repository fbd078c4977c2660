"""`fuse` and `unfuse`: which modules of a model run as fused ops."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from .errors import InputError
from .fusion import OWN_HOOKS, Fusion, Settings, enter, leave, restore_format
from .matchers.blocks import match_block
from .matchers.chains import match_chain, sequential_runs, traced_runs
from .matchers.layers import Model, Refused, is_norm
from .matchers.probe import Prober
from .mixins import FUSED_ATTRIBUTES, Fused, FusedSequential, Skipped, fused_class, original_class
from .nn._drop_in import DropIn
from .settings import ACCURACIES, BACKENDS, one_of

M = TypeVar("M", bound=nn.Module)


def fuse(model: M, backend: str = "auto", accuracy: str = "strict", inplace: bool = False) -> M:
    """Make the residual blocks, stems and convolution + BatchNorm (+ ReLU) layers of a model run as fused ops.

    The result computes the same in eval mode, keeps every parameter, buffer and name (so a state_dict of the original
    loads, strictly, and the other way round), and runs its original modules after `train()`. Blocks are found by
    structure and checked numerically on random weights; what cannot be fused is left alone, and `explain` says why.
    Scales and shifts follow `load_state_dict`, in-place changes and `.to(...)`; only after writing through `.data` in
    place call `eval()`.

    Args:
        model: any module in eval mode: torchvision's, transformers', your own.
        backend: `"auto"`, or one by name for every op.
        accuracy: `"strict"`: the parity rule of `verify`; `"fast"`: float32 Winograd F(4x4, 3x3) is allowed.
        inplace: change `model` itself instead of a deep copy.

    Returns:
        The fused model; a fused model is fused again with the new settings.

    Raises:
        InputError: an unknown name, no module, a model in train mode, or nothing in it can be fused. The model is then
            as it was.
    """
    one_of("backend", backend, BACKENDS)
    one_of("accuracy", accuracy, ACCURACIES)
    check_model("model", model)
    target = model if inplace else copy.deepcopy(model)
    found = find(target, Settings(backend, accuracy, channels_last=True))
    if not found.changes:
        convs = sum(isinstance(m, nn.Conv2d) for m in target.modules())
        why = f": {next(iter(found.reasons.values()))}" if found.reasons else ""
        raise InputError(
            f"model must have a convolution followed by a BatchNorm that can be fused, got {type(model).__name__} with "
            f"{convs} convolutions and none{why}"
        )
    found.apply(target)
    return target


def unfuse(model: M, inplace: bool = False) -> M:
    """Give a fused model its original modules back.

    Args:
        model: what `fuse` returned; any other module comes back as it is.
        inplace: change `model` itself instead of a deep copy.

    Returns:
        The model, unfused. Modules of `resnet_fused.nn` fuse themselves, so they stay as they are.
    """
    target = model if inplace else copy.deepcopy(model)
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


def check_model(argument: str, model: object) -> None:
    """Raise InputError unless `model` is a module in eval mode."""
    if not isinstance(model, nn.Module):
        raise InputError(f"{argument} must be a torch.nn.Module, got {type(model).__name__}")
    if model.training:
        raise InputError(f"{argument} must be in eval mode, got {type(model).__name__} in train mode (call eval())")


# --- finding ------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What `fuse` is going to do: nothing of it is done yet.

    Attributes:
        changes: for each module, its mixin and the attributes it gets.
        owners: modules inside whose forward a chain runs fused.
        reasons: for each path of a convolution that stays as it is, why.
    """

    changes: dict[nn.Module, tuple[type[Fused], dict[str, Any]]] = field(default_factory=dict)
    owners: list[nn.Module] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)

    def apply(self, model: nn.Module) -> None:
        """Do it, in place of what an earlier `fuse` did."""
        # The modules of resnet_fused.nn have the mixin already.
        classes = {
            module: cls if issubclass(cls := original_class(module), Fused) else fused_class(mixin, cls)
            for module, (mixin, _) in self.changes.items()
        }
        restore(model)
        for module, (_, attributes) in self.changes.items():
            module.__dict__.update(attributes)
            module.__class__ = classes[module]
        for owner in self.owners:
            owner.register_forward_pre_hook(enter)
            owner.register_forward_hook(leave, always_call=True)
        model.register_forward_hook(restore_format, with_kwargs=True)
        model.__dict__["_unfused_reasons"] = self.reasons


def find(root: nn.Module, settings: Settings) -> Found:
    """What can be fused in a model."""
    model, prober = Model(root), Prober()
    found = Found()
    taken: set[nn.Module] = set()  # convolutions that are fused
    refused: dict[nn.Module, str] = {}

    def refuse(modules: Iterator[nn.Module], error: Refused) -> None:
        for module in modules:
            if isinstance(module, nn.Conv2d):
                refused[module] = str(error)

    def take_block(module: nn.Module, residual: bool) -> bool:
        try:
            candidates = match_block(module, model, settings, residual)
            if not candidates:
                return False
            fusion = prober.choose(candidates, model.name(module))
        except Refused as error:
            refuse(module.modules(), error)
            return False
        taken.update(layer.conv for layer in fusion.layers)
        found.changes[module] = (Fused, {"_fusion": fusion})
        return True

    def take_chain(modules: list[nn.Module], places: Any, owner: nn.Module | None) -> tuple[int, Fusion] | None:
        if modules[0] in taken:
            return None
        try:
            length, candidates = match_chain(modules, places, model, settings, owner)
            fusion = prober.choose(candidates, model.name(modules[0]))
        except Refused as error:
            refuse(iter(modules[:1]), error)
            return None
        taken.add(modules[0])
        return length, fusion

    # Residual blocks, the innermost module that is one; then in what is left stems and layers, the outermost.
    def residual_blocks(module: nn.Module) -> bool:
        inner = [residual_blocks(child) for child in module.children()]
        return any(inner) or take_block(module, residual=True)

    def layers(module: nn.Module) -> None:
        if module in found.changes or take_block(module, residual=False):
            return
        for child in module.children():
            layers(child)
        if original_class(module).forward is nn.Sequential.forward:
            sequential(module)
        elif any(isinstance(c, nn.Conv2d) and c not in taken for c in module.children()) and any(
            is_norm(c) for c in module.children()
        ):
            traced(module)

    def sequential(module: nn.Sequential) -> None:
        starts = {}
        for i, modules, places in sequential_runs(module):
            if (chain := take_chain(modules, places, None)) is not None:
                starts[i] = chain
        if not starts:
            return
        plan, i, children = [], 0, list(module)
        while i < len(children):
            length, fusion = starts.get(i, (1, None))
            plan.append((tuple(children[i : i + length]), fusion))
            i += length
        found.changes[module] = (FusedSequential, {"_plan": (children, plan)})

    def traced(module: nn.Module) -> None:
        try:
            runs = list(traced_runs(module))
        except Refused as error:
            refuse((c for c in module.children() if c not in taken and c not in refused), error)
            return
        for modules, places in runs:
            chain = take_chain(modules, places, module)
            if chain is not None:
                length, fusion = chain
                found.changes[modules[0]] = (Fused, {"_fusion": fusion})
                found.changes |= {m: (Skipped, {"_fusion": fusion}) for m in modules[1:length]}
                if module not in found.owners:
                    found.owners.append(module)

    residual_blocks(root)
    layers(root)
    found.reasons = {model.name(conv): reason for conv, reason in refused.items() if conv not in taken}
    return found


def restore(model: nn.Module) -> None:
    """Take every trace of `fuse` off a model."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in OWN_HOOKS]:
                del hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)
        module.__dict__.pop("_unfused_reasons", None)
        if isinstance(module, Fused):
            for name in FUSED_ATTRIBUTES:
                module.__dict__.pop(name, None)
            module.__class__ = original_class(module)
