"""Everything in a model that can be fused, found without changing the model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise
from typing import Any

from torch import fx, nn

from ..fusion import Fusion, HeadFusion, Settings, original_class
from ..mixins import Fused, Skipped
from ..route import Candidate, Place
from ..stages import FusedSequential, FusedStage, is_stage
from .blocks import match_block
from .chains import last_of_sequential, match_chain, sequential_runs, traced_modules, traced_runs
from .graphs import match_graph, module_of, only_user
from .heads import is_flatten, match_heads
from .layers import Model, Refused, is_norm, is_nothing
from .probe import Prober
from .straight import straight_methods

IMAGE_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)


class Search:
    """What can be fused in a model.

    Residual blocks come first, each the innermost module that is one; then, in what is left, blocks whose layers can
    take the addition with them; then stems and single layers, each the outermost module that is one; then neighbours in
    an nn.Sequential, and chains in the forward of a module. Last, where something was found, the end of a classifier.

    Attributes:
        changes: for each module that is going to change, its mixin and the attributes it gets.
        owners: modules inside whose forward a chain runs fused.
        routes: for each of those, and the model itself, modules that its forward calls one after another.
    """

    def __init__(self, root: nn.Module, settings: Settings) -> None:
        self.changes: dict[nn.Module, tuple[type[Fused], dict[str, Any]]] = {}
        self.owners: list[nn.Module] = []
        self.routes: list[Candidate] = []
        self._settings = settings
        self._model = Model(root)
        self._prober = Prober()
        self._taken: set[nn.Module] = set()  # convolutions that are fused
        self._refused: dict[nn.Module, str] = {}
        self._residual_blocks(root)
        self._graphs(root)
        self._layers(root)
        self._heads(root)
        self._stages(root)
        for owner in dict.fromkeys((*self.owners, root)):
            self._routes(owner)

    @property
    def reasons(self) -> dict[str, str]:
        """For each path of a convolution that stays as it is although there is a normalization beside it, why."""
        refused = norms_of_the_image(self._model) | self._refused
        return {self._model.paths[id(conv)]: why for conv, why in refused.items() if conv not in self._taken}

    def _residual_blocks(self, module: nn.Module) -> bool:
        inner = [self._residual_blocks(child) for child in module.children()]
        return any(inner) or self._block(module, residual=True)

    def _graphs(self, module: nn.Module) -> bool:
        if module in self.changes:
            return True
        inner = [self._graphs(child) for child in module.children()]
        return any(inner) or (self._is_open(module) and self._graph(module))

    def _graph(self, module: nn.Module) -> bool:
        containers = (nn.Conv2d, nn.Sequential, nn.ModuleList, nn.ModuleDict)
        if isinstance(module, containers) or is_norm(module) or takes_more_than_an_image(module):
            return False
        try:
            candidates = match_graph(module, self._model, self._settings, self._refused)
            if not candidates:
                return False
            fusion = self._prober.choose(candidates, self._model.name(module))
        except Refused:  # its layers may still be fused, without the addition
            return False
        self._taken.update(fusion.convs)
        self.changes[module] = (Fused, {"_fused_op": fusion})
        return True

    def _is_open(self, module: nn.Module) -> bool:
        """Whether there is a convolution in a module that nothing fuses yet."""
        return any(isinstance(m, nn.Conv2d) and m not in self._taken for m in module.modules())

    def _layers(self, module: nn.Module) -> None:
        if not self._is_open(module):
            return
        children = list(module.children())
        if module in self.changes:  # a block that runs step by step
            for child in children:
                self._layers(child)
            return
        if self._block(module, residual=False):
            return
        for child in children:
            self._layers(child)
        if isinstance(module, nn.Sequential) and original_class(module).forward is nn.Sequential.forward:
            self._sequential(module)
        elif any(map(is_norm, children)) and any(self._open(child) for child in children):
            self._traced(module)

    def _open(self, child: nn.Module) -> bool:
        """Whether a child is a convolution that nothing fuses yet, or an nn.Sequential that ends in one."""
        last, _ = last_of_sequential(child, ({}, ""))
        return isinstance(last, nn.Conv2d) and last not in self._taken

    def _block(self, module: nn.Module, residual: bool) -> bool:
        if takes_more_than_an_image(module):  # then its caller may give it more, and it would never run fused
            return False
        try:
            candidates = match_block(module, self._model, self._settings, residual)
            if not candidates:
                return False
            fusion = self._prober.choose(candidates, self._model.name(module))
        except Refused as error:
            self._refuse(module.modules(), error)
            return False
        self._taken.update(fusion.convs)
        self.changes[module] = (Fused, {"_fused_op": fusion})
        return True

    def _sequential(self, sequential: nn.Sequential) -> None:
        chains = {i: self._chain(modules, places, None) for i, modules, places in sequential_runs(sequential)}
        if not any(chains.values()):
            return
        children, steps = list(sequential), []
        i = 0
        while i < len(children):
            length, fusion = chains.get(i) or (1, None)
            steps.append((tuple(children[i : i + length]), fusion))
            i += length
        self.changes[sequential] = (FusedSequential, {"_fused_steps": (children, steps)})

    def _traced(self, owner: nn.Module) -> None:
        try:
            runs = list(traced_runs(owner, self._model))
        except Refused as error:
            self._refuse((c for c in owner.children() if c not in self._refused), error)
            return
        chains = [(modules, self._chain(modules, places, owner)) for modules, places in runs]
        for modules, chain in chains:
            if chain is not None:
                length, fusion = chain
                self.changes[modules[0]] = (Fused, {"_fused_op": fusion})
                self.changes |= {m: (Skipped, {"_fused_op": fusion}) for m in modules[1:length]}
        if any(chain for _, chain in chains):
            self.owners.append(owner)

    def _chain(
        self, modules: Sequence[nn.Module], places: Sequence[Place], owner: nn.Module | None
    ) -> tuple[int, Fusion] | None:
        """How many of the modules one op replaces, and that op."""
        if modules[0] in self._taken:
            return None
        try:
            length, candidates = match_chain(modules, places, self._model, self._settings, owner)
            fusion = self._prober.choose(candidates, self._model.name(modules[0]))
        except Refused as error:
            self._refuse(modules[:1], error)
            return None
        self._taken.add(modules[0])
        return length, fusion

    def _heads(self, root: nn.Module) -> None:
        """Of the modules that hold one, the innermost is the owner."""
        for owner in reversed(list(root.modules() if self.changes else ())):
            try:
                found = [f for f in match_heads(owner, self._model, self._settings) if f.steps[0] not in self.changes]
            except Refused:
                continue
            for fusion in found:
                pool, linear = fusion.steps
                self.changes |= {pool: (Fused, {"_fused_op": fusion}), linear: (Skipped, {"_fused_op": fusion})}
            if found and owner not in self.owners:
                self.owners.append(owner)

    def _stages(self, root: nn.Module) -> None:
        for module in root.modules():
            plain = isinstance(module, nn.Sequential) and original_class(module).forward is nn.Sequential.forward
            changes = [self.changes.get(child) for child in module._modules.values() if child is not None]
            fusions = [None if change is None else change[1].get("_fused_op") for change in changes]
            if plain and module not in self.changes and is_stage(fusions):
                self.changes[module] = (FusedStage, {})

    def _routes(self, owner: nn.Module) -> None:
        methods = None if owner in self.changes else straight_methods(owner)
        if methods is None:
            return
        try:
            runs = list(traced_modules(owner, self._model))
        except Refused:
            return
        for run in runs:
            passed = [
                (called.module in self.changes or is_nothing(called.module))
                and all(self._model.places[id(children[name])] == 1 for children, name in called.places)
                for called in run
            ]
            for wanted, group in groupby(zip(run, passed, strict=True), key=lambda item: item[1]):
                members = [item[0] for item in group]
                while members and members[0].module not in self.changes:  # nothing to run the others
                    del members[0]
                if wanted and len(members) > 1:
                    modules, places, nodes = zip(*members, strict=True)
                    self.routes.append(Candidate(owner, modules, places, methods, self._ending(owner, nodes)))

    def _ending(self, owner: nn.Module, nodes: Sequence[fx.Node]) -> str | None:
        """What `owner`'s forward makes of the last node, if it does nothing else; see `Candidate`."""
        head = self._head(nodes[-1], owner)

        def is_heads(node: fx.Node) -> bool:
            module = module_of(owner, node)
            known = module in head.steps or (module in head.watched.modules and is_nothing(module))  # type: ignore
            return is_flatten(owner, node) or known

        rest = [only_user(nodes[-1])]
        while rest[-1] is not None and rest[-1].op != "output":
            if head is None or not is_heads(rest[-1]):
                return None
            rest.append(only_user(rest[-1]))
        inputs = [node for node in nodes[0].graph.nodes if node.op == "placeholder"]
        alone = len(inputs) == 1 and nodes[0].args == (inputs[0],) and not nodes[0].kwargs
        if not alone or rest[-1] is None or len(nodes[0].graph.nodes) != len(inputs) + len(nodes) + len(rest):
            return None
        if rest[-1].args != (rest[-2] if len(rest) > 1 else nodes[-1],):
            return None  # a tuple, or a dictionary
        return "output" if head is None else "flattened"

    def _head(self, node: fx.Node, owner: nn.Module) -> HeadFusion | None:
        """What the module that a node calls runs as, if that is the end of a classifier."""
        module = module_of(owner, node)
        fusion = self.changes[module][1].get("_fused_op") if module in self.changes else None
        return fusion if isinstance(fusion, HeadFusion) else None

    def _refuse(self, modules: Iterable[nn.Module], error: Refused) -> None:
        self._refused |= {m: str(error) for m in modules if isinstance(m, nn.Conv2d)}


def norms_of_the_image(model: Model) -> dict[nn.Module, str]:
    """For each convolution registered next to a normalization that cannot be folded, why that is so."""
    order = [m for m in model.root.modules() if isinstance(m, (nn.Conv2d, *IMAGE_NORMS)) or is_norm(m)]
    found: dict[nn.Module, str] = {}
    # The norm after a convolution counts before the one in front of it.
    for conv, norm in (*((b, a) for a, b in pairwise(order)), *pairwise(order)):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, IMAGE_NORMS):
            kind = next(base.__name__ for base in type(norm).__mro__ if base.__module__.startswith("torch."))
            found[conv] = f"{model.paths[id(norm)]} is a {kind}: its statistics depend on the image"
    return found


def takes_more_than_an_image(module: nn.Module) -> bool:
    """Whether a module's forward has other arguments than one, such as a shortcut computed elsewhere."""
    parameters = list(inspect.signature(original_class(module).forward).parameters.values())[1:]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return len(named) > 1
