"""Forwards that do the same on every call: one call after another.

What torch.fx traces is one call. A forward with a branch, a loop, a context or something that it keeps may do something
else on the next one, or with what passes between its modules, and the trace would not show it.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from torch import nn

from ..fusion import original_class

TENSOR_METHODS = ("contiguous", "flatten", "mean", "relu", "reshape", "size", "squeeze", "view")


def is_straight(owner: nn.Module) -> bool:
    """Whether the forward of a module is assignments of calls to local names, and a return.

    It may call the module's children and torch's functions, and methods of its own that are like that, too. An
    nn.Sequential is such a module. Without the source it is none.
    """
    return straight_methods(owner) is not None


def straight_methods(owner: nn.Module) -> dict[str, Any] | None:
    """The methods that a straight forward is made of, itself included; None for any other."""
    forward = original_class(owner).forward
    if forward is nn.Sequential.forward:
        return {"forward": forward}
    found: dict[str, Any] = {}
    return found if _is_straight(owner, "forward", found) else None


def _is_straight(owner: nn.Module, name: str, found: dict[str, Any]) -> bool:
    """Whether a method is, with those that it calls; `found` gets them."""
    function: Any = getattr(original_class(owner), name, None)
    if name in owner.__dict__ or not inspect.isfunction(function) or hasattr(function, "__wrapped__"):
        return False
    try:
        definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, SyntaxError, TypeError):
        return False
    if not isinstance(definition, ast.FunctionDef) or definition.decorator_list or not definition.args.args:
        return False
    names = definition.args
    if names.vararg or names.kwarg or names.kwonlyargs or names.defaults:
        return False
    found[name] = function
    me = names.args[0].arg
    local = {argument.arg for argument in names.args[1:]}

    def call(node: ast.Call) -> bool:
        """Whether what is called is known."""
        path: list[str] = []
        root = function_node = node.func
        while isinstance(root, ast.Attribute):
            path.insert(0, root.attr)
            root = root.value
        if not isinstance(root, ast.Name) or root.id in local:
            return (
                isinstance(function_node, ast.Attribute)
                and function_node.attr in TENSOR_METHODS
                and value(function_node.value)
            )
        if root.id == me:
            return _is_child(owner, path) or (
                len(path) == 1 and (path[0] in found or _is_straight(owner, path[0], found))
            )
        # A function of constants, as torch.manual_seed, would run in the trace and not be in it.
        takes_local = any(isinstance(part, ast.Name) and part.id in local for part in ast.walk(node))
        return takes_local and _is_torchs(function, [root.id, *path])

    def value(node: ast.expr) -> bool:
        """Whether an expression is made of local names, constants and calls that are known."""
        if isinstance(node, ast.Name):
            return node.id in local
        if isinstance(node, ast.Call):
            return call(node) and all(map(value, node.args)) and all(value(k.value) for k in node.keywords)
        if isinstance(node, ast.Tuple | ast.List):
            return all(map(value, node.elts))
        return isinstance(node, ast.Constant) or (isinstance(node, ast.UnaryOp) and value(node.operand))

    for statement in definition.body:
        if isinstance(statement, ast.Assign):
            targets, result = statement.targets, statement.value
            if not (len(targets) == 1 and isinstance(targets[0], ast.Name) and value(result)):
                return False
            local.add(targets[0].id)
        elif isinstance(statement, ast.Return):
            if statement.value is None or not value(statement.value):
                return False
        elif not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):  # the docstring
            return False
    return True


def _is_child(owner: nn.Module, path: list[str]) -> bool:
    """Whether a path of names leads to a module below `owner`."""
    module: Any = owner
    for name in path:
        module = module._modules.get(name) if isinstance(module, nn.Module) else None
    return isinstance(module, nn.Module) and module is not owner


def _is_torchs(function: Callable[..., Any], path: list[str]) -> bool:
    """Whether a path of names, as `function` sees them, leads to a function of torch that changes nothing in place."""
    found: Any = function.__globals__.get(path[0])
    for name in path[1:]:
        found = getattr(found, name, None)
    module = getattr(found, "__module__", None) or ""
    return callable(found) and module.partition(".")[0] == "torch" and not path[-1].endswith("_")
