"""Test-only memcheck, racecheck and initcheck for kernels run by Triton's interpreter.

Inside `guard()` every launch is watched, element by element, and an AssertionError names the first of these:

- out of bounds: an unmasked lane outside the elements of every tensor argument (the gaps of a channel slice are
  outside); a descriptor that declares more than its tensor holds. Reads past a descriptor's edge are zeros and writes
  past it are dropped, as the hardware does, and are legal;
- a race between programs: two write one element, or one reads or overwrites what another touched;
- a missing barrier: a program reads what it wrote, or overwrites what it read or wrote, without `tl.debug_barrier`;
- a missing proxy fence: memory written in this launch is read through a descriptor, or written through one and read;
- an int32 sum or product that overflows.

What is not initialised shows in the result: a masked-off lane loaded without `other` is NaN (the interpreter alone
gives a kind 0), and `torch.empty` gives NaN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

Builder, Executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
Triple = tuple[int, int, int]
SEVERAL = -1  # readers; a program's own number starts at 1, 0 is nobody


@dataclasses.dataclass
class _Shadow:
    """What a launch did to one storage. Arrays have an element for every `unit` bytes; epochs count barriers."""

    start: int
    unit: int
    owned: np.ndarray  # whether an argument of the launch holds this element
    writer: np.ndarray
    written: np.ndarray  # epoch
    reader: np.ndarray
    read: np.ndarray  # epoch
    by_descriptor: np.ndarray  # whether the last write came through a descriptor

    @staticmethod
    def of(tensors: list[Tensor]) -> _Shadow:
        """The untouched shadow of the storage that these tensors share."""
        storage = tensors[0].untyped_storage()
        unit = min(t.element_size() for t in tensors)
        size = storage.nbytes() // unit
        owned = torch.zeros(size, dtype=torch.bool)
        for t in tensors:
            ratio = t.element_size() // unit
            for byte in range(ratio):
                strides = [s * ratio for s in t.stride()]
                owned.as_strided(t.shape, strides, t.storage_offset() * ratio + byte).fill_(True)
        arrays = [np.zeros(size, np.int32) for _ in range(4)]
        return _Shadow(storage.data_ptr(), unit, owned.numpy(), *arrays, np.zeros(size, bool))

    @property
    def end(self) -> int:
        return self.start + self.owned.size * self.unit

    def elements(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Indices of the elements that accesses of `size` bytes touch."""
        first = (addresses - np.uint64(self.start)).astype(np.int64) // self.unit
        if size == self.unit:
            return first
        return (first[:, None] + np.arange(size // self.unit)).reshape(-1)


class _Watch:
    """One launch: its tensors' shadows, and which program runs."""

    def __init__(self, tensors: list[Tensor]) -> None:
        shared: dict[int, list[Tensor]] = {}
        for t in tensors:
            if t.numel():
                shared.setdefault(t.untyped_storage().data_ptr(), []).append(t)
        self.shadows = [_Shadow.of(group) for group in shared.values()]
        self.program, self.epoch, self.through_descriptor = 0, 0, False

    def start(self, program: int) -> None:
        """Another program's turn."""
        self.program = program
        self.epoch += 1

    def located(self, kind: str, pointers: Any, mask: Any, size: int) -> Iterator[tuple[_Shadow, np.ndarray]]:
        """Check the bounds of an access, and give the elements it touches, storage by storage."""
        active = np.broadcast_to(mask, pointers.shape)
        addresses = pointers[active].astype(np.uint64)
        inside = np.zeros(addresses.size, bool)
        for shadow in self.shadows:
            here = (addresses >= shadow.start) & (addresses < shadow.end)
            if here.any():
                elements = shadow.elements(addresses[here], size)
                ok = (elements < shadow.owned.size) & shadow.owned[np.minimum(elements, shadow.owned.size - 1)]
                inside[here] = ok.reshape(-1, size // shadow.unit).all(1)
                yield shadow, elements[ok]
        outside = int((~inside).sum())
        assert not outside, (
            f"out of bounds: {kind} of {outside} of {addresses.size} lanes outside every argument's elements"
        )

    def load(self, pointers: Any, mask: Any, size: int) -> None:
        """Check a load, and note it."""
        for shadow, at in self.located("load", pointers, mask, size):
            writer = shadow.writer[at]
            written = writer != 0
            if written.any():
                assert not (written & (writer != self.program)).any(), (
                    f"race: program {self.program} reads what another one wrote"
                )
                assert not (written & (shadow.written[at] == self.epoch)).any(), (
                    "no barrier between a store and a load of one element"
                )
                assert not (written & (shadow.by_descriptor[at] | self.through_descriptor)).any(), (
                    "no proxy fence between a store and a load of one element, one of them through a descriptor"
                )
            reader = shadow.reader[at]
            shadow.reader[at] = np.where((reader == 0) | (reader == self.program), self.program, SEVERAL)
            shadow.read[at] = self.epoch

    def store(self, pointers: Any, mask: Any, size: int) -> None:
        """Check a store, and note it."""
        for shadow, at in self.located("store", pointers, mask, size):
            writer, reader = shadow.writer[at], shadow.reader[at]
            assert np.unique(at).size == at.size, "race: two lanes of one store write one element"
            assert not ((writer != 0) & (writer != self.program)).any(), (
                f"race: program {self.program} writes what another one wrote"
            )
            assert not ((reader != 0) & (reader != self.program)).any(), (
                f"race: program {self.program} writes what another one reads"
            )
            for what, number, epoch in (("store", writer, shadow.written[at]), ("load", reader, shadow.read[at])):
                assert not ((number == self.program) & (epoch == self.epoch)).any(), (
                    f"no barrier between a {what} and a store of one element"
                )
            shadow.writer[at], shadow.written[at] = self.program, self.epoch
            shadow.by_descriptor[at] = self.through_descriptor

    def declare(self, base: int, shape: list[int], strides: list[int], size: int) -> None:
        """Check that a descriptor declares no more than its tensor holds."""
        addresses = np.array(base, np.int64)
        for extent, stride in zip(shape, strides, strict=True):
            addresses = addresses[..., None] + np.arange(extent) * stride * size
        for _ in self.located("descriptor", addresses.astype(np.uint64), True, size):
            pass


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a kernel's arguments."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, TensorDescriptor):
        yield from _tensors(value.base)
    elif hasattr(value, "data_ptr"):
        yield interpreter._unwrap_tensor(value)


def _nan(element: Any, shape: tuple[int, ...]) -> Any:
    """A handle full of NaN, or of -1 for integers."""
    dtype = interpreter._get_np_dtype(element)
    bits = np.array(0x7FC0, np.uint16) if element.scalar.name == "bf16" else None
    fill = bits if bits is not None else np.nan if dtype.kind == "f" else np.array(-1).astype(dtype)
    return interpreter.TensorHandle(np.full(shape, fill, dtype=dtype), element)


@contextmanager
def guard() -> Iterator[None]:
    """Check every launch of an interpreted kernel, see the module."""
    watch = _Watch([])
    init, load, store = Executor._init_args_hst, Builder.create_masked_load, Builder.create_masked_store
    descriptor_load, descriptor_store = Builder.create_descriptor_load, Builder.create_descriptor_store
    set_grid_idx, make_descriptor = Builder.set_grid_idx, Builder.create_make_tensor_descriptor

    def watched_init(self: Any, args: Any, kwargs: Any) -> Any:
        nonlocal watch
        found = init(self, args, kwargs)
        watch = _Watch([t for part in (found[0], list(found[1].values())) for t in _tensors(part)])
        return found

    def watched_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        set_grid_idx(self, x, y, z)
        _, ny, nz = self.grid_dim
        watch.start(1 + (x * ny + y) * nz + z)

    def watched_load(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
        element = ptrs.get_element_ty()
        watch.load(ptrs.data, mask.data, interpreter._get_np_dtype(element).itemsize)
        return load(self, ptrs, mask, _nan(element, ptrs.data.shape) if other is None else other, *rest, **named)

    def watched_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        watch.store(ptrs.data, mask.data, interpreter._get_np_dtype(ptrs.get_element_ty()).itemsize)
        return store(self, ptrs, value, mask, *rest)

    def through_descriptor(method: Any) -> Any:
        def watched(*args: Any) -> Any:
            with mock.patch.object(watch, "through_descriptor", True):
                return method(*args)

        return watched

    def watched_descriptor(self: Any, base: Any, shape: Any, strides: Any, *rest: Any) -> Any:
        size = interpreter._get_np_dtype(base.get_element_ty()).itemsize
        extents, steps = ([int(np.asarray(s.data).item()) for s in part] for part in (shape, strides))
        watch.declare(int(base.data.item()), extents, steps, size)
        return make_descriptor(self, base, shape, strides, *rest)

    def watched_barrier(self: Any) -> None:
        watch.epoch += 1

    with ExitStack() as stack:
        for owner, name, replacement in (
            (Executor, "_init_args_hst", watched_init),
            (Builder, "set_grid_idx", watched_grid_idx),
            (Builder, "create_masked_load", watched_load),
            (Builder, "create_masked_store", watched_store),
            (Builder, "create_descriptor_load", through_descriptor(descriptor_load)),
            (Builder, "create_descriptor_store", through_descriptor(descriptor_store)),
            (Builder, "create_make_tensor_descriptor", watched_descriptor),
            (Builder, "create_barrier", watched_barrier),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        stack.enter_context(_uninitialised_is_nan())
        stack.enter_context(overflow_checked())
        yield


@contextmanager
def _uninitialised_is_nan() -> Iterator[None]:
    """Have `torch.empty` and its relatives return NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.utils.deterministic fills by default
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def overflow_checked() -> Iterator[None]:
    """Have a sum, difference or product of int32 that overflows raise."""
    builder = interpreter.interpreter_builder
    with mock.patch.object(builder, "options", dataclasses.replace(builder.options, debug=True)):
        yield


@contextmanager
def as_program(index: Triple, of: Triple | None = None) -> Iterator[None]:
    """Have a launch run a single program, which takes itself for program `index` of a grid of `of` (of the real one).

    For tensors of more than 2**31 elements, whose pages no other program then touches. Negative indices count from the
    grid's end.
    """
    call = Executor.__call__
    grid: Triple = (1, 1, 1)

    def call_one(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal grid
        assert not callable(self.grid)
        grid = of or (*self.grid, 1, 1)[:3]
        self.grid = (1, 1, 1)
        call(self, *args, **kwargs)

    def handle(value: int) -> Any:
        return interpreter.TensorHandle(np.array([value], dtype=np.int32), interpreter.tl.int32)

    with (
        mock.patch.object(Executor, "__call__", call_one),
        mock.patch.object(Executor, "_restore_args_dev", lambda *_: None),  # CPU tensors are used in place
        mock.patch.object(Builder, "create_get_program_id", lambda _, axis: handle(index[axis] % grid[axis])),
        mock.patch.object(Builder, "create_get_num_programs", lambda _, axis: handle(grid[axis])),
    ):
        yield
