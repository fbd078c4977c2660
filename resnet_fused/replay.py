"""Fused pieces on a CPU, recorded once for an input's shape and then run by one call.

Between two blocks a model spends its time in Python: whether the piece may still run fused, its arguments, the op's
checks, the plan, two dispatchers. After a kernel that has filled the caches all of that comes from far away, and takes
0.25 to 0.4 ms a block: a quarter of ResNet-50 at batch 1 in bfloat16. What does not change from call to call is
therefore recorded: the blocks as the native library runs them, and everything that decided it. As long as that is
unchanged, neighbouring blocks of an nn.Sequential are one call.

Whatever wants to see the ops gets them one by one: tracing, torch.compile, dispatch and function modes, transforms of
torch.func, the profiler, hooks on all modules, gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from . import plan
from .fusion import CALL_ATTRIBUTES, Fusion, Watched, hook_stores, is_watched, transformed
from .kernels import native
from .settings import resolve_backend

if TYPE_CHECKING:
    from .route import Route

CPU = torch.device("cpu")

RECORDINGS_PER_FUSION = 32
"""Of as many input shapes; the one that was not used for longest makes room.

One of ResNet-50 takes 0.3 MB, one of CIFAR's preactivation ResNet-164, which has the most blocks, 1 MB.
"""

_uses = itertools.count()


class Recording:
    """Neighbouring pieces as they run on one kind of input, and what that depends on.

    Args:
        fusions: the pieces, as many as could be recorded.
        blocks: the modules around them whose own hooks and forward are passed by.
        route: what else is passed by.
        handles: one for each piece, made by the native library; from now on they are one program.
        choices: what the plan decided, for `explain`.
    """

    def __init__(
        self,
        fusions: Sequence[Fusion],
        blocks: Sequence[nn.Module],
        route: Route | None,
        handles: list[Tensor],
        choices: list[plan.Choice],
    ) -> None:
        self.used = 0  # by `_uses`
        self.count = len(handles)
        self.program = torch.ops.resnet_fused._cpu_link.default(handles) if handles else None
        self.choices = choices
        self._watched = watched = _watched(fusions, route)
        self.tensors = watched.tensors()
        self._aliases = [t.detach() for t in self.tensors]  # so that no other tensor can come by the same address
        entries = [
            *watched.entries(),
            *((fusion.__dict__, "kept", fusion.kept) for fusion in fusions),
            *((block.__dict__, name, None) for block in blocks for name in CALL_ATTRIBUTES),
            *(() if route is None else route.entries()),
        ]
        hooks = [*watched.hooks, *(store for block in blocks for store in hook_stores(block))]
        counted = [t for t in self.tensors if not t.is_inference()]  # the others have no version
        flat = tuple(itertools.chain.from_iterable(entries))
        sizes = tuple(itertools.chain.from_iterable((store, len(store)) for store in (*hooks, *watched.whole)))
        assert native.bindings is not None
        self._guard = (
            flat,
            sizes,
            tuple(itertools.chain.from_iterable((t, t._version) for t in counted)),
            torch.ops.resnet_fused._watch.default(self.tensors),
            native.bindings.dictionaries(flat, sizes),
        )

    def holds(self) -> bool:
        """Whether all is as it was."""
        assert native.bindings is not None
        watched = self._watched
        if watched.where_unfused(CPU) is not None or (watched.contents and watched.contents_changed()):
            return False
        return bool(native.bindings.unchanged(*self._guard))

    def run(self, x: Tensor) -> Tensor:
        """The output of the last piece."""
        plan.note(*self.choices)
        return torch.ops.resnet_fused._cpu_replay.default(x, self.program)


def run(
    fusions: Sequence[Fusion],
    x: Tensor,
    blocks: Sequence[nn.Module] = (),
    route: Route | None = None,
    whole: bool = False,
) -> tuple[Tensor, int]:
    """Run as many of the pieces as may run as one call.

    Args:
        fusions: neighbours, each of which takes the output of the one before.
        x: input of the first.
        blocks: the modules that are not called for it, where `fusions` are theirs; none of them may have a hook.
        route: goes through more modules than `blocks`, and may end behind some of the pieces only (`Route.stops`).
        whole: run all of them or none.

    Returns:
        The output of the last one that was run, and how many were; x and 0 if they have to be called.
    """
    if not _plain(x):
        return x, 0
    first = fusions[0].settings
    backend = resolve_backend(first.backend)
    if backend not in ("auto", "cpu"):
        return x, 0
    if first.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    pieces = (tuple(fusions), tuple(blocks)) if route is None else route  # which has those
    key = (pieces, x.shape, x.stride(), x.dtype, backend, plan.state(x.device))
    kept = fusions[0].recordings
    recording = kept.get(key)
    if recording is None or not recording.holds():
        kept.pop(key, None)
        recording = _record(fusions, blocks, route, x)
        if recording is None:
            return x, 0
        while len(kept) >= RECORDINGS_PER_FUSION:
            kept.pop(min(list(kept.items()), key=lambda item: item[1].used)[0], None)
        kept[key] = recording
    recording.used = next(_uses)
    if recording.count < (len(fusions) if whole else 1) or _wants_gradients(x, recording.tensors):
        return x, 0
    return recording.run(x), recording.count


def _plain(x: Tensor) -> bool:
    """Whether nothing but the result is of interest: no graph, no mode, no profile."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.device.type == "cpu"
        and x.dim() == 4
        and native.available()
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and not transformed()
        and not torch.autograd._profiler_enabled()
        and not _has_any_global_hook()
    )


def _wants_gradients(x: Tensor, tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or any([t.requires_grad for t in tensors]))


def _watched(fusions: Sequence[Fusion], route: Route | None) -> Watched:
    """What is looked at for these pieces, and for what else the route goes through."""
    around = [] if route is None else [route.watched]
    return Watched.all_of([*(fusion.watched for fusion in fusions), *around])


def _record(fusions: Sequence[Fusion], blocks: Sequence[nn.Module], route: Route | None, x: Tensor) -> Recording | None:
    """The pieces up to the first that other kernels take part in; None if one may not run fused now."""
    if any(map(is_watched, blocks)):
        return None
    watched = _watched(fusions, route)
    if route is not None and any([store.get(key) is not value for store, key, value in route.entries()]):
        return None
    if watched.why_unfused(CPU) is not None or _wants_gradients(x, watched.tensors()):
        return None
    before = _states(watched.tensors())
    handles: list[Tensor] = []
    choices: list[list[plan.Choice]] = []
    for fusion in fusions:
        if not fusion.recordable or fusion.settings != fusions[0].settings:
            break
        with plan.record() as choice:
            handle, y = _handle(fusion, x)
        if not handle.numel():
            break
        handles.append(handle)
        choices.append(choice)
        x = y
    if route is not None:
        del handles[max((stop for stop in route.stops if stop <= len(handles)), default=0) :]
    # One that cannot be recorded is watched all the same: it is not tried again at every call.
    count = max(1, len(handles))
    noted = [choice for each in choices[: len(handles)] for choice in each]
    recording = Recording(fusions[:count], blocks[:count], route, handles, noted)
    # What another thread changed meanwhile may be in what was folded and packed, or not: then it is recorded again.
    return recording if _states(watched.tensors()) == before else None


def _states(tensors: Sequence[Tensor]) -> list[tuple[int, int, int]]:
    """Which tensors these are, where, and of which version; inference tensors have none."""
    return [(id(t), t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors]


def _handle(fusion: Fusion, x: Tensor) -> tuple[Tensor, Tensor]:
    """A piece as the native library runs it, empty if that is not all of it; and an output, not computed."""
    torch.ops.resnet_fused._cpu_record.default(x)
    y = x
    try:
        y = fusion.run(x)
    finally:
        handle = torch.ops.resnet_fused._cpu_recorded.default(y)
    return handle, y
