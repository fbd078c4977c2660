"""Weights in the order a kernel reads them, kept as long as the weight they were made from.

A pack is found by the weight tensor itself (weakly: it goes with the weight) and is made again once the weight is not
what it was: changed in place, or given other storage. A write through `weight.data` is seen only if it brings new
storage, and one into an inference tensor is not seen at all: torch counts neither. `forget` is for those.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

PACKS_PER_WEIGHT = 4
"""A weight may be packed for several algorithms, instruction sets and (oneDNN) input sizes; the oldest makes room."""


class _Source(NamedTuple):
    """What a tensor was when a pack was made of it."""

    state: tuple[Hashable, ...]
    storage: StorageWeakRef  # once the storage is gone, another may have its address

    def still(self, t: Tensor) -> bool:
        return self.state == _state(t) and not self.storage.expired()


class _Pack(NamedTuple):
    value: Any
    weight: _Source
    scale: _Source | None


class _Packs(NamedTuple):
    """The packs of one weight."""

    owner: weakref.ref[Tensor]
    by_key: dict[Hashable, _Pack]


_all: dict[int, _Packs] = {}  # by id of the weight: a third of the time that torch's WeakTensorKeyDictionary takes
_lock = threading.Lock()


def _state(t: Tensor) -> tuple[Hashable, ...]:
    return 0 if t.is_inference() else t._version, t.data_ptr(), t.stride(), t.dtype


def _source(t: Tensor) -> _Source:
    return _Source(_state(t), StorageWeakRef(t.untyped_storage()))


def _packs(weight: Tensor) -> dict[Hashable, _Pack]:
    packs = _all.get(id(weight))
    return packs.by_key if packs is not None and packs.owner() is weight else {}


def _find(weight: Tensor, key: Hashable, scale: Tensor | None) -> _Pack | None:
    pack = _packs(weight).get(key)
    if pack is None or not pack.weight.still(weight):
        return None
    same_scale = pack.scale is None if scale is None else pack.scale is not None and pack.scale.still(scale)
    return pack if same_scale else None


def packed(weight: Tensor, key: Hashable, make: Callable[[], Any], scale: Tensor | None = None) -> Any:
    """The pack of `weight` under `key`, from `make()` if there is none yet or it is out of date. Safe between threads.

    Args:
        weight: the tensor that owns the pack.
        key: tells its packs apart: backend, layout, instruction set, sizes.
        make: computes the pack.
        scale: a second tensor that the pack is made from, if any.
    """
    pack = _find(weight, key, scale)
    if pack is not None:
        return pack.value
    with _lock:
        pack = _find(weight, key, scale)  # another thread may have made it meanwhile
        if pack is None:
            sources = _source(weight), None if scale is None else _source(scale)
            # Not as inference tensors, which autograd could not save, whatever mode the first call comes in.
            with torch.inference_mode(False), torch.no_grad():
                pack = _Pack(make(), *sources)
            wait_for(weight.device)
            by_key = dict(_packs(weight))  # replaced, not changed: other threads read without the lock
            by_key.pop(key, None)
            while len(by_key) >= PACKS_PER_WEIGHT:
                del by_key[next(iter(by_key))]
            by_key[key] = pack
            _all[id(weight)] = _Packs(weakref.ref(weight, functools.partial(_forget, id(weight))), by_key)
    return pack.value


def wait_for(device: torch.device) -> None:
    """Wait for what the current stream has to do: a pack that is kept may be read on any other stream from now on.

    Inside a CUDA graph's capture, where no one may wait, packs are the graph's own until its first replay.
    """
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(device).synchronize()


def forget(weight: Tensor) -> None:
    """Drop the packs of this weight: for changes that leave no trace on it."""
    if _packs(weight):
        _all.pop(id(weight), None)


def _forget(key: int, owner: weakref.ref[Tensor]) -> None:
    packs = _all.get(key) if _all else None  # None when the interpreter shuts down
    if packs is not None and packs.owner is owner:
        del _all[key]


def count(weight: Tensor) -> int:
    """How many packs of this weight are kept."""
    return len(_packs(weight))
