"""resnet_fused/_bindings.py, for the Pythons that a wheel has no pybind11 module for, says what the module says."""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import pytest
import torch

import resnet_fused
from resnet_fused.kernels import native
from resnet_fused.shapes import Bottleneck, Conv, DenseBlock

pytestmark = pytest.mark.skipif(not native.available(), reason="the native library is not built")

SHAPES = [
    Conv(2, 64, 14, 14, 64, 3, 3, padding=(1, 1)),
    Bottleneck(8, 256, 56, 56, 64, 256),
    DenseBlock(1, 64, 8, 8, 32, 2),
]


@pytest.fixture(scope="module")
def plain() -> ModuleType:
    path = Path(resnet_fused.__file__).parent / "_bindings.py"
    spec = importlib.util.spec_from_file_location("plain_bindings", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def functions(module: ModuleType) -> set[str]:
    return {name for name, value in vars(module).items() if callable(value) and name[0] != "_" and name != "Any"}


def test_same_functions(plain: ModuleType) -> None:
    assert native.bindings is not None
    assert functions(plain) == functions(native.bindings)


def test_same_answers(plain: ModuleType) -> None:
    compiled = native.bindings
    assert compiled is not None
    for name in ("isa", "isas", "kernel_table", "cached_bytes", "pool_limit"):
        assert getattr(plain, name)() == getattr(compiled, name)(), name
    for shape in SHAPES:
        arguments = (shape.op, shape.dims(), "float32", "direct", 2)
        assert plain.cost(*arguments) == compiled.cost(*arguments)


def test_same_cuda_answers(plain: ModuleType) -> None:
    if not hasattr(native.bindings, "cuda_kernel_table"):
        pytest.skip("the package was built without CUDA kernels")
    assert plain.cuda_kernel_table() == native.bindings.cuda_kernel_table()
    conv = {**SHAPES[0].dims(), "projection": 0}
    for op, dims in (("conv", conv), ("bottleneck", SHAPES[1].dims())):
        for arch in (80, 90, 75):
            arguments = (op, dims, "bfloat16", arch, 132, 232448)
            assert plain.cuda_candidates(*arguments) == native.bindings.cuda_candidates(*arguments)


def test_settings(plain: ModuleType) -> None:
    isa, limit = plain.isa(), plain.pool_limit()
    try:
        plain.set_isa("portable")
        plain.set_pool_limit(12345)
        assert (native.bindings.isa(), native.bindings.pool_limit()) == ("portable", 12345)
    finally:
        plain.set_isa(isa)
        plain.set_pool_limit(limit)
    plain.release_memory()
    plain.poison_workspaces()


def test_wrong_arguments(plain: ModuleType) -> None:
    for module in (plain, native.bindings):
        with pytest.raises(ValueError, match="z80"):
            module.set_isa("z80")
        with pytest.raises(ValueError, match="dims: missing n"):
            module.cost("conv", {}, "float32", "direct", 1)
        with pytest.raises(ValueError, match="dtype: expected float32 or bfloat16, got int8"):
            module.cost("conv", {}, "int8", "direct", 1)


UNCHANGED = {
    "value": lambda store, tensor: store.update(a=2.0),
    "equal value": lambda store, tensor: store.update(a=float("1.5")),
    "entry gone": lambda store, tensor: store.pop("a"),
    "entry that was not there": lambda store, tensor: store.update(b=1),
    "size": lambda store, tensor: store.update(c=0),
    "in place": lambda store, tensor: tensor.zero_(),
    "memory": lambda store, tensor: setattr(tensor, "data", tensor.clone()),
    "strides": lambda store, tensor: setattr(tensor, "data", tensor.data.t()),
    "sizes": lambda store, tensor: setattr(tensor, "data", tensor.data[:2]),
    "dimensions": lambda store, tensor: setattr(tensor, "data", tensor.data[None]),
    "dtype": lambda store, tensor: setattr(tensor, "data", tensor.data.view(torch.int32)),
}


@pytest.mark.parametrize("change", [None, *UNCHANGED])
@pytest.mark.parametrize("which", ["compiled", "compiled, seen before", "plain"])
def test_unchanged(plain: ModuleType, which: str, change: str | None) -> None:
    bindings = plain if which == "plain" else native.bindings
    assert bindings is not None
    value, tensor, other = float("1.5"), torch.ones(3, 3), torch.ones(2)
    store = {"a": value, "none": None}
    entries = (store, "a", value, store, "b", None, store, "none", None)
    sizes = ({}, 0, {1: 2}, 1) + ((store, 2) if change == "size" else ())
    watched = torch.ops.resnet_fused._watch.default([other, tensor])
    versions = (other, other._version, tensor, tensor._version)
    dictionaries = bindings.dictionaries(entries, sizes)
    if which == "compiled, seen before":
        assert bindings.unchanged(entries, sizes, versions, watched, dictionaries)
    if change is not None:
        UNCHANGED[change](store, tensor)
    assert bindings.unchanged(entries, sizes, versions, watched) is (change is None)
    for _ in range(2):
        assert bindings.unchanged(entries, sizes, versions, watched, dictionaries) is (change is None)


def test_unchanged_after_other_changes(plain: ModuleType) -> None:
    """A dictionary that was changed, and not where a recording depends on it, is looked into again."""
    for bindings in (plain, native.bindings):
        assert bindings is not None
        value, store = object(), OrderedDict()
        store["a"] = value
        entries, sizes = (store, "a", value, store, "b", None), (store, 1)
        of_all = (entries, sizes, (), torch.ops.resnet_fused._watch.default([torch.ones(1)]))
        dictionaries = bindings.dictionaries(entries, sizes)
        assert bindings.unchanged(*of_all, dictionaries)
        store["c"] = 0
        assert not bindings.unchanged(*of_all, dictionaries)
        del store["c"]
        assert bindings.unchanged(*of_all, dictionaries)
        store["a"] = object()
        assert not bindings.unchanged(*of_all, dictionaries)


def test_dictionaries_belong_to_their_entries() -> None:
    assert native.bindings is not None
    if not hasattr(native.bindings, "_Versions"):
        pytest.skip("no compiled bindings")
    watched, store = torch.ops.resnet_fused._watch.default([torch.ones(1)]), {"a": 1}
    entries = (store, "a", store["a"])
    dictionaries = native.bindings.dictionaries(entries, ())
    with pytest.raises(ValueError, match="dictionaries: expected what was made of the same entries and sizes"):
        native.bindings.unchanged((*entries, *entries), (), (), watched, dictionaries)
    with pytest.raises(TypeError, match="expected dictionaries"):
        native.bindings.dictionaries((1, "a", None), ())


def test_only_what_watch_made_is_unchanged_or_not(plain: ModuleType) -> None:
    good = torch.ops.resnet_fused._watch.default([torch.ones(1)])
    for bad in (torch.zeros(3, dtype=torch.uint8), torch.zeros_like(good)):
        with pytest.raises(RuntimeError, match="made by _watch"):
            plain.unchanged((), (), (), bad)
