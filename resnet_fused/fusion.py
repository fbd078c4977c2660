"""How a piece of a model runs as one op: the folded BatchNorms, the op's arguments, and when it has to run unfused."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import operator
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from types import FrameType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils import _pytree as pytree

from . import ops
from .folding import Arguments, Layer, Selection
from .kernels import cpu, native, packing
from .kernels.layout import channels_last
from .settings import resolve_backend

address = Tensor.data_ptr
version = operator.attrgetter("_version")


def count_fused_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Hook after the steps of all optimizers: those with `fused=True` do not count what they do to parameters.

    All others do, and what is folded, packed and recorded here goes by that count.
    """
    if not torch.compiler.is_compiling():
        changed = [group["params"] for group in optimizer.param_groups if group.get("fused")]
        torch.autograd.graph.increment_version(itertools.chain.from_iterable(changed))


register_optimizer_step_post_hook(count_fused_step)


class _State(threading.local):
    # Set per thread in __init__, not on the class: torch.compile guards on what it finds in the instance.
    def __init__(self) -> None:
        self.unfused = False
        # Changed in place only: what torch.compile makes of an assignment does not reach the thread-local value.
        self.running: list[tuple[nn.Module, FrameType | None]] = []  # owner, the frame of its call
        self.covered: list[tuple[nn.Module, nn.Module, Tensor]] = []  # owner, a module that is done, what it gave


_state = _State()


@contextlib.contextmanager
def unfused() -> Iterator[None]:
    """Run fused models through their original modules, in this thread: what `verify` compares with."""
    previous = _state.unfused
    _state.unfused = True
    try:
        yield
    finally:
        _state.unfused = previous


def enter(owner: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of a module whose children run fused, but only inside its own forward (see `Fusion.owner`)."""
    frame = None
    if not torch.compiler.is_compiling():
        frame = sys._getframe(1)
        if _state.running:
            _state.running[:] = [entry for entry in _state.running if _is_on(entry[1])]
    _state.running.append((owner, frame))


def leave(owner: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook that ends what `enter` began, and all within that; not called after a KeyboardInterrupt."""
    for i in reversed(range(len(_state.running))):
        if _state.running[i][0] is owner:
            del _state.running[i:]
            break
    if _state.covered:
        _state.covered[:] = [entry for entry in _state.covered if entry[0] is not owner]


def is_running(owner: nn.Module) -> bool:
    """Whether the forward of an owner is running in this thread."""
    compiling = torch.compiler.is_compiling()
    return any([m is owner and (compiling or _is_on(frame)) for m, frame in _state.running])


def _is_on(frame: FrameType | None) -> bool:
    """Whether a call is going on, if it was not compiled."""
    if frame is None:
        return True
    try:
        frame.clear()
    except RuntimeError:  # only what is over can be cleared
        return True
    return False


def cover(owner: nn.Module, modules: Sequence[nn.Module], output: Tensor) -> None:
    """Let each of these modules pass `output` on when `owner`'s forward, which is running, comes to it."""
    _state.covered += [(owner, module, output) for module in modules]


def uncover(module: nn.Module, x: Any) -> bool:
    """Whether a module's output is computed already, and is `x`; then it is so no longer."""
    for i, (_, covered, output) in enumerate(_state.covered):
        if covered is module and output is x:
            del _state.covered[i]
            return True
    return False


def restore_format(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a fused model: gives 4-D outputs the memory format that the unfused model would have given them.

    That is channels_last if the first 4-D input is, or if the weights are; contiguous otherwise.
    """
    if (isinstance(output, Tensor) and output.dim() != 4) or transformed():
        return output
    images = [t for t in pytree.tree_leaves(output) if is_image(t) and only_channels_last(t)]
    if not images:
        return output
    inputs = [t for t in pytree.tree_leaves((args, kwargs)) if is_image(t)]
    weights = (p for p in module.parameters() if is_image(p))
    if not inputs or channels_last(inputs[0]) or any(map(only_channels_last, weights)):
        return output
    contiguous = {id(t): t.contiguous() for t in images}
    return pytree.tree_map(lambda t: contiguous.get(id(t), t), output)


def is_image(value: Any) -> bool:
    """Whether a value is a 4-D tensor."""
    return isinstance(value, Tensor) and value.dim() == 4


def only_channels_last(t: Tensor) -> bool:
    """Whether a tensor is channels_last and not also contiguous, as every tensor of 1x1 images is."""
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def transformed() -> bool:
    """Whether tensors are more than their values: inside jvp, vmap or grad of torch.func, or a dual level."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


OWN_HOOKS = (enter, leave, restore_format)

CALL_ATTRIBUTES = ("forward", "_compiled_call_impl")
"""What in a module's own dictionary takes the place of its class's forward; the latter is of nn.Module.compile."""


@dataclass(frozen=True)
class Settings:
    """How a fusion runs.

    Attributes:
        backend: as in `fuse`.
        accuracy: as in `fuse`.
        channels_last: convert the input, so that the output is channels_last as well.
    """

    backend: str = "auto"
    accuracy: str = "strict"
    channels_last: bool = False


class Kept(NamedTuple):
    """Scales and shifts, and what their sources were when they were folded."""

    sources: list[Tensor]
    aliases: list[Tensor]  # hold the sources' storage, so that no other tensor can come by the same address
    addresses: list[int]  # show `.data = ...`
    versions: list[int] | None  # show changes in place; inference tensors have none
    eps: list[float]
    vectors: list[tuple[Tensor, Tensor]]

    def current(self, sources: list[Tensor], eps: list[float]) -> bool:
        """Whether these are the sources, unchanged."""
        return (
            all(map(operator.is_, sources, self.sources))
            and all(map(operator.eq, map(address, sources), self.addresses))
            and (self.versions is None or all(map(operator.eq, map(version, sources), self.versions)))
            and eps == self.eps
        )


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before it was fused."""
    return getattr(type(module), "original_class", type(module))


def hook_stores(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """Where a module holds the hooks that its call runs."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def is_watched(block: nn.Module) -> bool:
    """Whether something looks at a block's input or output, or replaces its forward."""
    return any(hook_stores(block)) or any(name in block.__dict__ for name in CALL_ATTRIBUTES)


IRRELEVANT = (
    *("inplace", "momentum", "transposed", "output_padding", "affine", "track_running_stats"),
    "_reversed_padding_repeated_twice",  # padding, once more
    *("eps", "kernel_size", "in_channels", "out_channels", "num_features"),  # read anew, or off the tensors
)
"""Attributes of torch's modules that may change without a change of what a fused op has to compute."""


Attribute = tuple[nn.Module, str, Any]
"""A module, the name of an attribute, and its value or None. Not its dictionary: copying a module makes another one."""


def attributes(module: nn.Module) -> list[Attribute]:
    """All of a module's own attributes, on which its forward may depend, and those of its classes that it may hide."""
    store = module.__dict__
    classes = [cls for cls in original_class(module).__mro__ if cls.__module__.partition(".")[0] != "torch"]
    of_class = {name for cls in classes for name, value in vars(cls).items() if _is_constant(value)}
    return [(module, name, store.get(name)) for name in {**store, **dict.fromkeys(sorted(of_class))} if is_own(name)]


def attributes_read(module: nn.Module, names: Iterable[str]) -> list[Attribute]:
    """Those of these names that no other part of what is watched looks at."""
    children = {*module._modules, *module._parameters, *module._buffers}
    own = [name for name in names if is_own(name) and name not in children and not hasattr(nn.Module, name)]
    return [(module, name, module.__dict__.get(name)) for name in own]


_MODULE = frozenset(nn.Module().__dict__)


def is_own(name: str) -> bool:
    """Whether an attribute is a module's own, and not torch's or this package's."""
    return name not in (*_MODULE, *IRRELEVANT, *CALL_ATTRIBUTES) and not name.startswith(("__", "_fused", "_unfused"))


def _is_constant(value: Any) -> bool:
    """Whether what a class holds stays out of its instances, as a property that keeps its value there does not."""
    return inspect.isfunction(value) or not hasattr(value, "__get__")


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str))


def same(now: Any, before: Any) -> bool:
    """Whether an attribute is what it was: the same object, or numbers, flags and names that are equal."""
    return now is before or (_is_plain(before) and _is_plain(now) and now == before)


class Contents:
    """What a list, dictionary or tensor holds, to see that it is changed in place; a tensor's are its version.

    Args:
        holder: the list, dictionary or tensor. What is in it is looked at, not what is in that.
    """

    def __init__(self, holder: Any) -> None:
        self.holder = holder
        self.is_tensor = isinstance(holder, Tensor)
        self.seen = self.now()

    @classmethod
    def of(cls, value: Any) -> list[Contents]:
        """Those of an attribute and of the tensors in it; none of what cannot be changed in place, or is unknown."""
        holds = isinstance(value, (list, dict, Tensor))
        whole = [cls(value)] if holds else []
        return [*whole, *(cls(each) for content in whole for each in content.seen if isinstance(each, Tensor))]

    def now(self) -> list[Any]:
        """What is there now."""
        if self.is_tensor:
            return [-1 if self.holder.is_inference() else self.holder._version]
        return [*self.holder, *self.holder.values()] if isinstance(self.holder, dict) else [*self.holder]

    def changed(self) -> bool:
        """Whether it holds anything else."""
        now = self.now()
        return len(now) != len(self.seen) or not all(map(same, now, self.seen))

    def restore(self) -> None:
        """Put back what was in a list or dictionary."""
        if isinstance(self.holder, dict):
            half = len(self.seen) // 2
            self.holder.clear()
            self.holder.update(zip(self.seen[:half], self.seen[half:], strict=True))
        elif not self.is_tensor:
            self.holder[:] = self.seen

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a tensor counts its versions anew.
        return {**self.__dict__, "seen": [None] if self.is_tensor and self.changed() else self.seen}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.is_tensor and self.seen != [None]:
            self.seen = self.now()


@dataclass
class Watched:
    """What is looked at on every call of a piece of a model, or of neighbouring ones, before it runs fused.

    Attributes:
        present: modules that must be in eval mode.
        hooks: where those hold their hooks; there must be none.
        inside: (dictionary of the parent's children, name) of the modules that the op replaces.
        modules: what was there when the model was fused.
        whole: dictionaries of children that must not grow either.
        size: how many children they had.
        owners: modules whose forward has to be running.
        attributes: what the forwards may read that is no parameter, buffer or module, with the values when fused.
        contents: of those that can be changed in place.
        norms: BatchNorms whose eps is read.
        sources: where the tensors are kept that scales and shifts depend on, as (dictionary, key).
        weights: where those of the convolutions are.
        plain: which of the convolutions had no bias.
    """

    present: list[nn.Module]
    hooks: list[Any]
    inside: list[tuple[dict[str, nn.Module | None], str]]
    modules: list[nn.Module | None]
    whole: list[dict[str, nn.Module | None]]
    size: int
    owners: list[nn.Module]
    attributes: list[Attribute]
    contents: list[Contents]
    norms: list[Any]
    sources: list[tuple[dict[str, Tensor], str]]
    weights: list[tuple[dict[str, Tensor], str]]
    plain: list[bool]

    def watch(self, modules: Sequence[nn.Module]) -> None:
        """Look at the mode and hooks of these modules, and of no others."""
        self.present = list(modules)
        self.hooks = [hooks for m in modules for hooks in hook_stores(m)]

    def watch_attributes(self, found: Iterable[Attribute]) -> None:
        """Look at these attributes, and at no others."""
        self.attributes = list(found)
        self.contents = [content for _, _, value in self.attributes for content in Contents.of(value)]

    def changed(self) -> bool:
        """Whether the modules inside are no longer those that were fused."""
        return (
            sum(map(len, self.whole)) != self.size
            or [children.get(name) for children, name in self.inside] != self.modules
        )

    def attributes_changed(self) -> bool:
        """Whether an attribute is no longer what it was, or was changed in place."""
        others = [(m.__dict__.get(k), value) for m, k, value in self.attributes if m.__dict__.get(k) is not value]
        return not all([same(now, before) for now, before in others]) or self.contents_changed()

    def contents_changed(self) -> bool:
        """Whether an attribute was changed in place."""
        return any([content.changed() for content in self.contents])

    def lacks(self) -> bool:
        """Whether a tensor was taken away since, or a convolution got a bias or lost it."""
        return any([store.get(name) is None for store, name in (*self.sources, *self.weights)]) or any(
            [(store.get("bias") is None) != none for (store, _), none in zip(self.weights, self.plain, strict=True)]
        )

    def why_unfused(self, device: torch.device | None) -> str | None:
        """Why the original modules have to run now, or None if the op can."""
        return self.why_changed() or self.where_unfused(device)

    def why_changed(self) -> str | None:
        """`why_unfused`, as far as it is a matter of the modules and not of where the call comes from."""
        if any(self.hooks):
            return "a hook on a module inside it"
        if self.changed():
            return "a module inside it was replaced after fusing"
        if torch.compiler.is_compiling() and any([content.is_tensor for content in self.contents]):
            return "torch.compile does not see when a tensor among the attributes of a module inside it changes"
        if self.attributes_changed():
            return "an attribute of a module inside it was changed after fusing"
        if any([m.training for m in self.present]):
            return "a module inside it is in train mode"
        # torch.compile would take a parameter that is looked at here for one of variable size.
        if not torch.compiler.is_compiling() and self.lacks():
            return "a parameter or buffer inside it was added or taken away"
        if any([name in m.__dict__ for m in self.present for name in CALL_ATTRIBUTES]):
            return "the forward of a module inside it was replaced"
        return None

    def where_unfused(self, device: torch.device | None) -> str | None:
        """`why_unfused`, as far as it is a matter of where the call comes from and not of the modules."""
        if _state.unfused:
            return "inside unfused()"
        if self.owners and not all([is_running(owner) for owner in self.owners]):
            return "called from outside of the model's own forward"
        if any(["forward" in owner.__dict__ for owner in self.owners]):
            return "the model's forward was replaced"
        if device is not None and device.type != "meta" and torch.is_autocast_enabled(device.type):  # which has none
            return "autocast is on"
        if transformed():
            return "inside a transform of torch.func or forward-mode differentiation"
        return None

    def eps(self) -> list[float]:
        """Of the BatchNorms."""
        return [norm.eps for norm in self.norms]

    def tensors(self) -> list[Tensor]:
        """What scales and shifts depend on, then the weights."""
        return [store[name] for store, name in (*self.sources, *self.weights)]

    def entries(self) -> list[tuple[dict[str, Any], str, Any]]:
        """Modules, modes, eps and tensors as (dictionary, key, value there now): what says that all is as it was."""
        places: list[tuple[dict[str, Any], str]] = [
            *self.inside,
            *((module.__dict__, name) for module in self.present for name in ("training", *CALL_ATTRIBUTES)),
            *((norm.__dict__, "eps") for norm in self.norms),
            *((module.__dict__, name) for module, name, _ in self.attributes),
            *self.sources,
            *self.weights,
            *((store, "bias") for store, _ in self.weights),
        ]
        return [(store, name, store.get(name)) for store, name in places]

    @classmethod
    def all_of(cls, pieces: Sequence[Watched]) -> Watched:
        """What is looked at for neighbours that run as one."""

        def joined(name: str) -> list[Any]:
            return [item for piece in pieces for item in getattr(piece, name)]

        names = [field.name for field in fields(cls)]
        return cls(**{name: joined(name) for name in names if name != "size"}, size=sum(p.size for p in pieces))


class Fusion:
    """A piece of a model that runs as one op.

    Args:
        layers: its convolutions with their BatchNorms in the order that the op takes them, a projection last.
        steps: what runs in its place when it is unfused, in order: one block, or a chain of modules.
        inside: the modules that the op replaces, as (dictionary of the parent's children, name): a hook on one of them,
            or another module in its place, and the original modules run.
        whole: dictionaries of children that must not grow either.
        options: the op's geometry.
        settings: how to run.
        owner: for a chain that `owner`'s forward calls by name: fused only inside that forward, so that calling one of
            its modules from elsewhere gives that module's own output.
        read: names of what that forward reads off its module and does not change itself.
    """

    op: ClassVar[str]
    recordable: ClassVar[bool] = True  # runs nothing but this package's ops

    kept: Kept | None = None  # scales and shifts, until what they come from changes

    def __init__(
        self,
        layers: Sequence[Layer | Selection],
        steps: Sequence[nn.Module],
        inside: Sequence[tuple[dict[str, nn.Module | None], str]],
        options: dict[str, Any],
        settings: Settings,
        whole: Sequence[dict[str, nn.Module | None]] = (),
        owner: nn.Module | None = None,
        read: Iterable[str] = (),
    ) -> None:
        self.layers = tuple(layers)
        self.steps = tuple(steps)
        self.options = options
        self.settings = settings
        self.recordings: dict[Any, Any] = {}  # of this piece and those behind it, see replay.py
        modules = [children[name] for children, name in inside]
        self.watched = Watched(
            present=[],
            hooks=[],
            inside=list(inside),
            modules=modules,
            whole=list(whole),
            size=sum(map(len, whole)),
            owners=[] if owner is None else [owner],
            attributes=[],
            contents=[],
            norms=[layer.norm for layer in layers if layer.norm is not None and layer.eps is None],
            sources=[source for layer in layers for source in layer.sources()],
            weights=[(conv._parameters, "weight") for conv in self.convs],  # type: ignore[misc]
            plain=[conv.bias is None for conv in self.convs],
        )
        self.watched.watch([m for m in modules if m is not None])
        self.watched.watch_attributes(
            [
                *(entry for m in dict.fromkeys((*self.steps, *self.watched.present)) for entry in attributes(m)),
                *(entry for m in self.watched.owners for entry in attributes_read(m, read)),
            ]
        )
        self._first = self.convs[0]

    def __getstate__(self) -> dict[str, Any]:
        # What is kept and recorded holds addresses, which mean nothing in a copy.
        return {**self.__dict__, "kept": None, "recordings": {}}

    def why_unfused(self, x: Any) -> str | None:
        """Why the original modules have to run now, or None if the op can."""
        return self.why_left(x) or self.watched.why_unfused(x.device if isinstance(x, Tensor) else None)

    def why_left(self, x: Any) -> str | None:
        """Why this input is left to the original modules, wherever the call comes from."""
        return None

    def changed(self) -> bool:
        """Whether the modules inside are no longer the ones it was made from."""
        return self.watched.changed()

    def run_steps(self, steps: Sequence[nn.Module], x: Tensor) -> Any:
        """The output of modules that stand where its steps do in another copy of the model, without their own hooks."""
        for step in steps:
            x = step.forward(x)
        return x

    @property
    def convs(self) -> list[nn.Conv2d]:
        """Its convolutions, in the order of the layers."""
        return [layer.conv for layer in self.layers if layer.conv is not None]

    def run(self, x: Tensor) -> Tensor:
        """The op's output for the input `x` [N, C, H, W]."""
        settings = self.settings
        if settings.channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return self.compute(x, self.arguments(), settings.backend, settings.accuracy)

    def arguments(self) -> Sequence[Arguments]:
        """Weight, scale and shift of every layer; scales and shifts are kept until what they come from changes."""
        if torch.compiler.is_compiling():
            return self.fold()
        sources = [store[name] for store, name in self.watched.sources]
        if torch.is_grad_enabled() and any([t.requires_grad for t in sources]):
            return self.fold()
        kept = self.kept
        if kept is None or not kept.current(sources, self.watched.eps()):
            with torch.inference_mode(False), torch.no_grad():
                kept = self.kept = Kept(
                    sources=sources,
                    aliases=[t.detach() for t in sources],
                    addresses=[*map(address, sources)],
                    versions=None if any(t.is_inference() for t in sources) else [*map(version, sources)],
                    eps=self.watched.eps(),
                    vectors=[layer.fold(self._first.weight) for layer in self.layers],
                )
        like = self._first.weight
        return [(layer.weight(like), *vectors) for layer, vectors in zip(self.layers, kept.vectors, strict=True)]

    def fold(self) -> Sequence[Arguments]:
        """`arguments`, computed afresh and differentiable."""
        like = self._first.weight
        return [(layer.weight(like), *layer.fold(like)) for layer in self.layers]

    def refold(self) -> None:
        """Forget the kept scales and shifts, the packed weights and what was recorded with them."""
        self.kept = None
        self.recordings.clear()
        for layer in self.layers:
            if (weight := layer.forget()) is not None:
                packing.forget(weight)

    def compute(self, x: Tensor, arguments: Sequence[Arguments], backend: str, accuracy: str) -> Tensor:
        """Call the op."""
        raise NotImplementedError


class ConvBNActFusion(Fusion):
    """Convolution, BatchNorm, and ReLU or no activation."""

    op = "conv_bn_act"

    def compute(self, x: Tensor, arguments: Sequence[Arguments], backend: str, accuracy: str) -> Tensor:  # noqa: D102
        return ops.conv_bn_act(x, *arguments[0], **self.options, backend=backend, accuracy=accuracy)


class StemFusion(Fusion):
    """Convolution, BatchNorm, ReLU, max pooling."""

    op = "stem"

    def compute(self, x: Tensor, arguments: Sequence[Arguments], backend: str, accuracy: str) -> Tensor:  # noqa: D102
        return ops.stem(x, *arguments[0], **self.options, backend=backend, accuracy=accuracy)


class BasicBlockFusion(Fusion):
    """Two 3x3 layers and the shortcut, its projection last."""

    op = "basic_block"

    def compute(self, x: Tensor, arguments: Sequence[Arguments], backend: str, accuracy: str) -> Tensor:  # noqa: D102
        (w1, s1, b1), (w2, s2, b2), *projection = arguments
        wd, sd, bd = projection[0] if projection else (None, None, None)
        options = {**self.options, "backend": backend, "accuracy": accuracy}
        return ops.basic_block(x, w1, b1, w2, b2, wd, bd, s1=s1, s2=s2, sd=sd, **options)


class BottleneckFusion(Fusion):
    """1x1, 3x3 and 1x1 layers and the shortcut, its projection last."""

    op = "bottleneck"

    def compute(self, x: Tensor, arguments: Sequence[Arguments], backend: str, accuracy: str) -> Tensor:  # noqa: D102
        (w1, s1, b1), (w2, s2, b2), (w3, s3, b3), *projection = arguments
        wd, sd, bd = projection[0] if projection else (None, None, None)
        options = {**self.options, "backend": backend, "accuracy": accuracy}
        return ops.bottleneck(x, w1, b1, w2, b2, w3, b3, wd, bd, s1=s1, s2=s2, s3=s3, sd=sd, **options)


class PreActBlockFusion(Fusion):
    """Prologue, two or three convolutions with the BatchNorms after them, and the shortcut, its projection last.

    Args:
        prologue: whether the first layer is one.
        projection: whether the last layer is one.
        args: as in `Fusion`.
        kwargs: as in `Fusion`.
    """

    op = "preact_block"

    def __init__(self, *args: Any, prologue: bool, projection: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prologue = prologue
        self.projection = projection

    def compute(self, x: Tensor, arguments: Sequence[Arguments], backend: str, accuracy: str) -> Tensor:  # noqa: D102
        path = list(arguments)
        _, *ends = path.pop(0) if self.prologue else (None, None, None)
        wd = path.pop()[0] if self.projection else None
        weights, scales, shifts = (list(column) for column in zip(*path, strict=True))
        tensors = (*ends, weights, scales, shifts, wd)
        return ops.preact_block(x, *tensors, **self.options, backend=backend, accuracy=accuracy)


class DenseBlockFusion(Fusion):
    """The layers of a dense block, each a prologue, perhaps a 1x1 with its BatchNorm, and a 3x3."""

    op = "dense_block"

    def compute(self, x: Tensor, arguments: Sequence[Arguments], backend: str, accuracy: str) -> Tensor:  # noqa: D102
        each = self.options["convs"] + 1
        layers = []
        for i in range(0, len(arguments), each):
            (_, in_scale, in_shift), *first, (w2, _, _) = arguments[i : i + each]
            w1, s1, b1 = first[0] if first else (None, None, None)
            layers.append(ops.DenseLayer(in_scale, in_shift, w1, s1, b1, w2))
        return ops.dense_block(x, layers, backend=backend, accuracy=accuracy)


class TransitionFusion(Fusion):
    """Prologue, 1x1 convolution, average pooling."""

    op = "transition"

    def compute(self, x: Tensor, arguments: Sequence[Arguments], backend: str, accuracy: str) -> Tensor:  # noqa: D102
        (_, in_scale, in_shift), (weight, _, _) = arguments
        return ops.transition(x, in_scale, in_shift, weight, backend=backend, accuracy=accuracy)


class HeadFusion(Fusion):
    """Global average pooling, flatten and a linear layer, as one op in place of the pooling.

    It gives [N, K, 1, 1], which the model's own flatten makes [N, K], and the linear layer passes that on. With backend
    `"auto"` it runs where this package's CPU kernel does, and everything else is left to torch: on a GPU nothing was
    measured. Of the GPU's backends only `"triton"` has a kernel for it, so only that one runs it there.
    """

    op = "head"

    def why_left(self, x: Any) -> str | None:  # noqa: D102
        backend = resolve_backend(self.settings.backend)
        if isinstance(x, Tensor) and backend != "triton":
            if x.device.type != "cpu":
                return "on a GPU the end of a classifier is torch's"
            if backend == "auto" and not (x.dtype in cpu.DTYPES and native.available()):
                return "no kernel of this package takes it"
        return None

    def run_steps(self, steps: Sequence[nn.Module], x: Tensor) -> Any:  # noqa: D102
        pool, linear = steps
        return linear.forward(pool.forward(x).flatten(1))[:, :, None, None]

    def compute(self, x: Tensor, arguments: Sequence[Arguments], backend: str, accuracy: str) -> Tensor:  # noqa: D102
        ((weight, _, bias),) = arguments
        return ops.head(x, weight, bias, backend=backend, accuracy=accuracy)[:, :, None, None]
