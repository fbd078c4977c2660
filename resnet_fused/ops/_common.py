"""What the ops share: checks of their arguments, the memory-format rule, and registration."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, ParamSpec

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import InputError
from ..kernels import cpu, cuda, reference, triton
from ..kernels.layout import channels_last, nchw, nhwc
from ..kernels.native import library
from ..kernels.packing import packed
from ..settings import ACCURACIES, BACKENDS, one_of
from ..shapes import Head, Shape, conv_out

KERNELS: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda, "triton": triton}
"""The backends made of this package's own kernels, which share one interface."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

P = ParamSpec("P")

WRONG_TYPE = re.compile(r"Expected a value of type '(.+?)' for argument '(.+?)' but instead found type '(.+?)'")
"""What torch's dispatcher says, before it prints the argument itself."""


def typed(op: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Decorator of the public ops: an argument of a wrong type is an InputError like every other wrong one."""

    @functools.wraps(op)
    def call(*args: P.args, **options: P.kwargs) -> Tensor:
        try:
            return op(*args, **options)
        except RuntimeError as error:
            found = WRONG_TYPE.search(str(error))
            if found is None:
                raise
            expected, name, given = found.groups()
            message = f"{name} must be of type {expected}, got {given}"
        raise InputError(message)

    return call


Spec = tuple[torch.Size, torch.dtype, torch.device]
"""What a check needs of a tensor. Plain and hashable, so that checks of the same shapes are done once."""


def spec(t: Tensor) -> Spec:
    """Shape, dtype and device of a tensor."""
    if t is None:
        raise InputError("x and every weight and shift must be tensors, got None")
    if forward_ad._current_level >= 0:  # a tangent would be lost; whether there is one cannot be seen inside jvp
        raise InputError("x must not be differentiated in forward mode: inside jvp or a dual level call fused modules")
    return t.shape, t.dtype, t.device


def optional_spec(t: Tensor | None) -> Spec | None:
    """`spec`, None for None."""
    return None if t is None else spec(t)


def check_input(x: Spec) -> None:
    """The input of every op: rank 4, at least one pixel, a floating-point dtype."""
    shape, dtype, _ = x
    if len(shape) != 4:
        raise InputError(f"x must have 4 dimensions (N, C, H, W), got {len(shape)}: shape {tuple(shape)}")
    if 0 in shape[2:]:
        raise InputError(f"x must have at least one pixel, got an image of {shape[2]}x{shape[3]}")
    if dtype not in FLOATS:
        raise InputError(f"x.dtype must be one of {', '.join(map(str, FLOATS))}, got {dtype}")


def check_like(name: str, t: Spec, x: Spec, shape: Sequence[int]) -> None:
    """A tensor of the input's dtype and device and of the given shape."""
    check_kind(name, t, x)
    if tuple(t[0]) != tuple(shape):
        raise InputError(f"{name}.shape must be {tuple(shape)}, got {tuple(t[0])}")


def check_kind(name: str, t: Spec, x: Spec) -> None:
    """A tensor of the input's dtype and device."""
    if t[1] != x[1]:
        raise InputError(f"x.dtype and {name}.dtype must be the same, got {x[1]} and {t[1]}")
    check_device(name, t, x)


def check_device(name: str, t: Spec, x: Spec) -> None:
    """A tensor on the input's device."""
    if t[2] != x[2]:
        raise InputError(f"{name}.device must be that of x, {x[2]}, got {t[2]}")


def check_vector(name: str, t: Spec | None, x: Spec, channels: int) -> None:
    """A scale or shift: one float32 per channel (float64 is allowed beside a float64 input)."""
    if t is None:
        return
    if t[1] != torch.float32 and not t[1] == x[1] == torch.float64:
        raise InputError(f"{name}.dtype must be torch.float32, got {t[1]}")
    check_device(name, t, x)
    if tuple(t[0]) != (channels,):
        raise InputError(f"{name}.shape must be ({channels},), got {tuple(t[0])}")


def check_prologue(x: Spec, in_scale: Spec | None, in_shift: Spec | None) -> None:
    """Scale and shift of the input, both or neither."""
    if (in_scale is None) != (in_shift is None):
        given, missing = ("in_shift", "in_scale") if in_scale is None else ("in_scale", "in_shift")
        raise InputError(f"{missing} must be given together with {given}, got None")
    check_vector("in_scale", in_scale, x, x[0][1])
    check_vector("in_shift", in_shift, x, x[0][1])


def check_weight(name: str, t: Spec, x: Spec, channels: int, groups: int, taps: tuple[int, int] | None = None) -> None:
    """A convolution weight [K, channels / groups, R, S]; `taps` fixes R and S."""
    check_kind(name, t, x)
    shape = t[0]
    if len(shape) != 4:
        raise InputError(f"{name} must have 4 dimensions (K, C / groups, R, S), got {len(shape)}: shape {tuple(shape)}")
    if min(shape) < 1:
        raise InputError(f"{name}.shape must have no zero, got {tuple(shape)}")
    if channels != shape[1] * groups:
        raise InputError(
            f"the channels coming in must be {name}.shape[1] times groups, {shape[1]} * {groups}, "
            f"got {channels} channels"
        )
    if shape[0] % groups:
        raise InputError(f"{name}.shape[0] must be a multiple of groups, {groups}, got {shape[0]}")
    if taps is not None and tuple(shape[2:]) != taps:
        raise InputError(f"{name}.shape[2:] must be {taps}, got {tuple(shape[2:])}")


def check_projection(x: Spec, wd: Spec | None, bd: Spec | None, sd: Spec | None, out: int, stride: int) -> None:
    """The shortcut of a block: a 1x1 projection with its shift, or the input itself where that fits."""
    check_shortcut(x, wd, out, stride)
    if wd is None:
        for name, t in (("bd", bd), ("sd", sd)):
            if t is not None:
                raise InputError(f"{name} must be None where wd is None, got a tensor of shape {tuple(t[0])}")
        return
    if bd is None:
        raise InputError(f"bd must be given where wd is, got None beside wd of shape {tuple(wd[0])}")
    check_vector("bd", bd, x, out)
    check_vector("sd", sd, x, out)


def check_shortcut(x: Spec, wd: Spec | None, out: int, stride: int) -> None:
    """The weight of a 1x1 projection to `out` channels, or None where the input itself fits."""
    if wd is not None:
        check_weight("wd", wd, x, x[0][1], 1, (1, 1))
        if wd[0][0] != out:
            raise InputError(f"wd.shape[0] must be the block's {out} output channels, got {wd[0][0]}")
    elif stride != 1 or x[0][1] != out:
        raise InputError(
            f"wd must be given unless the input fits the output: {x[0][1]} channels in, {out} out, stride {stride}"
        )


def check_outputs(name: str, weight: Spec, channels: int) -> None:
    """A weight with this many output channels."""
    if weight[0][0] != channels:
        raise InputError(f"{name}.shape[0] must be {channels}, got {weight[0][0]}")


MOST = 2**20
"""Of a stride, padding or dilation: the kernels compute positions in 32 bits."""


def check_number(least: int, **values: int) -> None:
    """Integers that must not be below `least`, nor above `MOST`."""
    for name, value in values.items():
        if not least <= value <= MOST:
            raise InputError(f"{name} must be at least {least} and at most {MOST}, got {value}")


def check_pair(least: int, **values: Sequence[int]) -> None:
    """Pairs of integers that must not be below `least`, nor above `MOST`."""
    for name, value in values.items():
        if len(value) != 2 or not least <= min(value) <= max(value) <= MOST:
            raise InputError(f"{name} must be one or two integers from {least} to {MOST}, got {tuple(value)}")


def check_window(
    name: str,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int] = (1, 1),
) -> None:
    """A kernel or pooling window that fits the padded image at least once."""
    for i in (0, 1):
        if conv_out(size[i], kernel[i], stride[i], padding[i], dilation[i]) < 1:
            raise InputError(
                f"{name} of size {tuple(kernel)} and dilation {tuple(dilation)} must fit the image of "
                f"{tuple(size)} padded by {tuple(padding)}"
            )


def check_choices(backend: str, accuracy: str) -> None:
    """The two names every op takes."""
    one_of("backend", backend, BACKENDS)
    one_of("accuracy", accuracy, ACCURACIES)


def like_format(y: Tensor, x: Tensor) -> Tensor:
    """`y` in the memory format that follows from `x`."""
    return nhwc(y) if channels_last(x) else nchw(y)


def empty_like_format(shape: Sequence[int], x: Tensor) -> Tensor:
    """An uninitialised output of this shape, of the dtype, device and memory format that follow from `x`."""
    memory_format = torch.channels_last if channels_last(x) else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=x.dtype, device=x.device, memory_format=memory_format)


def pad(values: Sequence[Any], count: int, fill: Any = None) -> tuple[Any, ...]:
    """The dispatcher leaves out trailing arguments that equal their defaults: this puts them back."""
    return (*values, *[fill] * (count - len(values)))


class Layer(NamedTuple):
    """The tensors of one layer of a block, and the rest of its arguments by name."""

    weight: Tensor
    scale: Tensor | None
    shift: Tensor
    geometry: dict[str, Any]


def residual_block(run: Callable[..., Tensor], x: Tensor, path: Sequence[Layer], shortcut: Layer | None) -> Tensor:
    """A residual block out of single layers, each computed by `run`; `path`'s last layer adds the shortcut."""
    h = x
    for layer in path[:-1]:
        h = run(h, layer.weight, layer.scale, layer.shift, **layer.geometry)
    if shortcut is not None:
        x = run(x, shortcut.weight, shortcut.scale, shortcut.shift, activation="none", **shortcut.geometry)
    last = path[-1]
    return run(h, last.weight, last.scale, last.shift, x, **last.geometry)


Needs = tuple[bool, bool, bool]
Grads = tuple[Tensor | None, ...]


def residual_block_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    path: Sequence[Layer],
    shortcut: Layer | None,
    need_x: bool,
    path_needs: Sequence[Needs],
    shortcut_needs: Needs,
) -> tuple[Tensor | None, list[Grads], Grads]:
    """Gradients of `residual_block` to x, and to (weight, scale, shift) of each layer of the path and of the shortcut.

    Nothing but x and y is kept from the forward pass: the path's intermediates are computed again.
    """
    inputs = [x]
    for layer in path[:-1]:
        inputs.append(reference.conv_bn_act(inputs[-1], layer.weight, layer.scale, layer.shift, **layer.geometry))
    grads: list[Grads] = [(None, None, None)] * len(path)
    grad_x = grad_side = None
    out = y
    for i in reversed(range(len(path))):
        weight, scale, shift, geometry = path[i]
        lower = need_x or any(any(needs) for needs in path_needs[:i])
        grad_in, *rest, grad_sum = reference.conv_bn_act_backward(
            grad, inputs[i], weight, scale, shift, out, needs=(lower, *path_needs[i]), **geometry
        )
        grads[i] = tuple(rest)
        if i == len(path) - 1:
            grad_side = grad_sum
        if grad_in is None:
            break
        grad, out = grad_in, inputs[i]
        grad_x = grad_in
    side: Grads = (None, None, None)
    if shortcut is not None:
        weight, scale, shift, geometry = shortcut
        assert grad_side is not None
        grad_side, *rest, _ = reference.conv_bn_act_backward(
            grad_side, x, weight, scale, shift, None, needs=(need_x, *shortcut_needs), **geometry
        )
        side = tuple(rest)
    if need_x:
        assert grad_x is not None and grad_side is not None
        grad_x = grad_x + grad_side
    return (grad_x if need_x else None), grads, side


def _autocast(t: Any, dtype: torch.dtype) -> Any:
    """Images and weights take autocast's dtype; scales and shifts stay float32, as does what autocast leaves alone."""
    if isinstance(t, (list, tuple)):
        return [_autocast(item, dtype) for item in t]
    if not isinstance(t, Tensor) or t.dim() < 2 or t.dtype in (dtype, torch.float64) or not t.is_floating_point():
        return t
    # A weight is cast once, not at every call, and so packed once; tracing sees subclasses and always casts.
    if type(t) is torch.nn.Parameter and not (t.requires_grad and torch.is_grad_enabled()):
        return packed(t, ("autocast", dtype), lambda: t.to(dtype))
    return t.to(dtype)


SHAPES: dict[str, Callable[..., Shape]] = {}
"""By the name of an op: the shape that its arguments make, once they are checked."""


def _register(name: str, run: Callable[..., Tensor], shape: Callable[..., Shape]) -> Any:
    """Register an op's implementation (every device), its fake and its autocast rule; return the op."""

    def fake(x: Tensor, *args: Any, **options: Any) -> Tensor:
        made = shape(x, *args, **options)
        return x.new_empty(made.n, made.k) if isinstance(made, Head) else empty_like_format(made.output_shape, x)

    SHAPES[name] = shape
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"resnet_fused::{name}", fake, lib=library)
    op = getattr(torch.ops.resnet_fused, name).default
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def autocast(*args: Any, device: str = device, key: str = key, **options: Any) -> Tensor:
            dtype = torch.get_autocast_dtype(device)
            keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return op(*(_autocast(arg, dtype) for arg in args), **options)

        library.impl(name, autocast, key)
    return op


def register(
    name: str,
    run: Callable[..., Tensor],
    shape: Callable[..., Shape],
    setup_context: Callable[..., None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> None:
    """Register an op with an autograd formula of its own."""
    _register(name, run, shape)
    torch.library.register_autograd(f"resnet_fused::{name}", backward, setup_context=setup_context, lib=library)


def register_composed(
    name: str, run: Callable[..., Tensor], shape: Callable[..., Shape], compose: Callable[..., Tensor]
) -> None:
    """Register an op that runs as `compose`, out of differentiable operators, where gradients are wanted."""
    op = _register(name, run, shape)

    def autograd(*args: Any, **options: Any) -> Tensor:
        tensors = [t for arg in args for t in (arg if isinstance(arg, (list, tuple)) else (arg,))]
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            return compose(*args, **options)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args, **options)

    library.impl(name, autograd, "Autograd")
