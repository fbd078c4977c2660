"""Convolution, BatchNorm (, ReLU (, max pooling)) as separate modules that their parent calls one after another.

In an nn.Sequential the order is known. Elsewhere the parent's forward is traced once by torch.fx, with its children as
opaque calls: a chain is fused only if the trace shows that each member is called once and that nothing else uses what
passes between them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import fx, nn

from ..fusion import Fusion, Settings, original_class
from ..route import Place
from .blocks import single_layer
from .layers import Model, Refused, activation, check_inside, is_norm, make_layer, places_within
from .tracing import trace


def match_chain(
    modules: Sequence[nn.Module], places: Sequence[Place], model: Model, settings: Settings, owner: nn.Module | None
) -> tuple[int, list[Fusion]]:
    """How many of the modules, called in this order, one op replaces, and what that op may be.

    Raises:
        Refused: the first two are a convolution and a BatchNorm but cannot be fused.
    """
    conv, norm, *rest = modules
    assert isinstance(conv, nn.Conv2d)
    layer = make_layer(conv, norm, model)
    relu = (
        0 if layer.relu else 1 if is_relu(rest[:1], model, owner) else None
    )  # modules that make the ReLU, None: no ReLU
    length = 2 + (relu or 0)
    common: dict[str, Any] = {"settings": settings, "owner": owner}
    if owner is not None:
        common["read"] = model.read[owner]

    def candidates(length: int, pool: nn.MaxPool2d | None) -> list[Fusion]:
        chain = modules[:length]
        inside = [*places[:length], *(place for module in chain for place in places_within(module))]
        found = single_layer(layer, pool, steps=chain, inside=inside, **common)
        return found[1:] if relu is None else found[:1]  # with ReLU comes first

    pool = modules[length] if relu is not None and len(modules) > length else None
    if isinstance(pool, nn.MaxPool2d) and is_free(pool, model, owner):
        try:
            return length + 1, candidates(length + 1, pool)
        except Refused:
            pass  # a pooling that no kernel fuses; the layer before it is still one
    return length, candidates(length, None)


def is_relu(modules: Sequence[nn.Module], model: Model, owner: nn.Module | None) -> bool:
    """Whether there is a module, and it is a ReLU that may be left out."""
    return bool(modules) and activation(modules[0]) == "relu" and is_free(modules[0], model, owner)


def is_free(module: nn.Module, model: Model, owner: nn.Module | None) -> bool:
    """Whether a module after the BatchNorm may be left out."""
    try:
        check_inside(module, model)
    except Refused:
        return False
    return owner is None or model.places[id(module)] == 1


def sequential_runs(sequential: nn.Sequential) -> Iterator[tuple[int, list[nn.Module], list[Place]]]:
    """Where a convolution and a BatchNorm are neighbours: the index, the modules from there on and their places."""
    modules: Any = sequential._modules
    places: list[Place] = [(modules, name) for name in modules]
    children = list(sequential)
    for i, (first, second) in enumerate(itertools.pairwise(children)):
        if isinstance(first, nn.Conv2d) and is_norm(second):
            yield i, children[i : i + 4], places[i : i + 4]


def _calls(owner: nn.Module, graph: fx.Graph) -> Counter[nn.Module]:
    """How often a forward calls each module."""
    return Counter(owner.get_submodule(str(n.target)) for n in graph.nodes if n.op == "call_module")


def traced_runs(owner: nn.Module, model: Model) -> Iterator[tuple[list[nn.Module], list[Place]]]:
    """Each convolution followed by a BatchNorm in `owner`'s forward, with what follows, and their places.

    Raises:
        Refused: torch.fx cannot trace the forward.
    """
    graph = trace(owner, model)
    calls = _calls(owner, graph)

    for node in graph.nodes:
        run: list[fx.Node] = []
        while node.op == "call_module" and len(run) < 4 and calls[owner.get_submodule(str(node.target))] == 1:
            if run and (node.args != (run[-1],) or node.kwargs):
                break
            run.append(node)
            if len(node.users) != 1:
                break
            node = next(iter(node.users))
        modules, places = (
            [owner.get_submodule(str(n.target)) for n in run],
            [place_of(owner, str(n.target)) for n in run],
        )
        if modules:
            modules[0], places[0] = last_of_sequential(modules[0], places[0])
        if len(modules) > 1 and isinstance(modules[0], nn.Conv2d) and is_norm(modules[1]):
            yield modules, places


class Called(NamedTuple):
    """A module that a forward calls.

    Attributes:
        module: the module.
        places: where it is looked up on the way from the owner of the forward to it.
        node: the call.
    """

    module: nn.Module
    places: list[Place]
    node: fx.Node


def traced_modules(owner: nn.Module, model: Model) -> Iterator[list[Called]]:
    """Modules that `owner`'s forward calls one after another, each once and for nothing else than the next one's input.

    The last one's output may go anywhere.

    Raises:
        Refused: torch.fx cannot trace the forward.
    """
    graph = trace(owner, model)
    calls = _calls(owner, graph)

    def alone(node: fx.Node) -> bool:
        return node.op == "call_module" and calls[owner.get_submodule(str(node.target))] == 1

    def follows(node: fx.Node) -> bool:
        before = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        return isinstance(before, fx.Node) and alone(before) and len(before.users) == 1

    def places(path: str) -> list[Place]:
        names = path.split(".")
        return [(owner.get_submodule(".".join(names[:i]))._modules, name) for i, name in enumerate(names)]

    for first in graph.nodes:
        if not alone(first) or follows(first):
            continue
        run = [first]
        while len(run[-1].users) == 1 and alone(node := next(iter(run[-1].users))) and follows(node):
            run.append(node)
        yield [Called(owner.get_submodule(str(node.target)), places(str(node.target)), node) for node in run]


def place_of(owner: nn.Module, path: str) -> Place:
    """Where a module below `owner` is kept."""
    parent, _, name = path.rpartition(".")
    return owner.get_submodule(parent)._modules, name


def last_of_sequential(module: nn.Module, place: Place) -> tuple[nn.Module, Place]:
    """The last child of an nn.Sequential and its place: what the module after the Sequential takes its input from."""
    while original_class(module).forward is nn.Sequential.forward and module._modules:
        name = next(reversed(module._modules))
        place = (module._modules, name)
        module = module._modules[name]  # type: ignore[assignment]
    return module, place
