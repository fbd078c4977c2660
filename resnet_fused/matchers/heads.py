"""The end of a classifier: global average pooling, flatten and a linear layer in the forward of a module.

The forward is traced by torch.fx. These are torch's own modules and functions, so the trace proves what they compute,
and nothing is tried on random weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import Tensor, fx, nn
from torch import flatten as flatten_function

from ..folding import Layer
from ..fusion import HeadFusion, Settings, original_class
from .chains import is_free, place_of
from .graphs import calls, module_of, only_user
from .layers import Model, Refused, check_tensors, check_weight, is_norm, is_nothing
from .straight import is_straight
from .tracing import trace


def match_heads(owner: nn.Module, model: Model, settings: Settings) -> Iterator[HeadFusion]:
    """Each head in `owner`'s forward; its steps are the pooling and the linear layer.

    Raises:
        Refused: torch.fx cannot trace the forward.
    """
    if not is_straight(owner):
        return
    opened = list(to_open(owner))
    within = [*owner.children(), *(child for module in opened for child in module.children())]
    if not any(map(is_global_pool, within)) or not any(map(is_linear, within)):
        return
    graph = trace(owner, model, opened)
    called = Counter(module_of(owner, node) for node in graph.nodes)
    for node in graph.nodes:
        chain = list(follow(owner, node))
        modules = [module for each in chain if (module := module_of(owner, each)) is not None]
        if not modules or not is_linear(modules[-1]):
            continue
        pool, linear = modules[0], modules[-1]
        try:
            check_tensors(linear, model)
            check_weight(linear, model)
        except Refused:
            continue
        if not all(called[m] == 1 for m in modules):
            continue
        if not all(is_free(m, model, owner) for m in (*modules, *opened)):
            continue
        parents = [*opened, *([owner] if isinstance(owner, nn.Sequential) else [])]
        yield HeadFusion(
            [Layer(linear)],  # type: ignore[arg-type]  # as a 1x1 convolution of one pixel
            steps=(pool, linear),
            inside=[
                *(place_of(owner, str(each.target)) for each in chain if each.op == "call_module"),
                *((owner._modules, name) for name, child in owner.named_children() if child in opened),
            ],
            options={},
            settings=settings,
            whole=[parent._modules for parent in parents],
            owner=owner,
        )


def to_open(owner: nn.Module) -> Iterator[nn.Module]:
    """The children to look into: those made of a pooling or linear layers, without a convolution or BatchNorm."""
    for child in owner.children():
        inner = [m for m in child.modules() if m is not child]
        holds = any(is_global_pool(m) or is_linear(m) for m in inner)
        if holds and is_straight(child) and not any(isinstance(m, nn.Conv2d) or is_norm(m) for m in inner):
            yield child


def is_global_pool(module: nn.Module) -> bool:
    """Whether a module averages over all pixels of an image."""
    return original_class(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1), [1, 1])


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer and nothing else."""
    plain = isinstance(module, nn.Linear) and not module._modules
    return plain and original_class(module).forward is nn.Linear.forward


def follow(owner: nn.Module, node: fx.Node) -> Iterator[fx.Node]:
    """A global pooling, a flatten, and what follows up to a linear layer, while nothing else reads between them."""
    module = module_of(owner, node)
    if module is None or not is_global_pool(module) or not takes_one(node):
        return
    yield node
    after = only_user(node)
    if after is None or not is_flatten(owner, after):
        return
    yield after
    following = only_user(after)
    while following is not None and takes_one(following):
        module = module_of(owner, following)
        if module is None:
            return
        yield following
        following = only_user(following) if is_nothing(module) else None


def takes_one(node: fx.Node) -> bool:
    """Whether a node takes another one's output and nothing else."""
    return len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)


def is_flatten(owner: nn.Module, node: fx.Node) -> bool:
    """Whether a node flattens all but the first dimension."""
    module = module_of(owner, node)
    if module is not None:
        flat = original_class(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
        return flat and takes_one(node)
    if not calls(node, (flatten_function, Tensor.flatten, "flatten")):
        return False
    dims = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | node.kwargs
    return {"end_dim": -1, **dims} == {"start_dim": 1, "end_dim": -1}
