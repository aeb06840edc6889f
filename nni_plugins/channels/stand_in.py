"""What takes the place of a removed module: it passes an argument on, or returns zeros. Needs torch only."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Mapping
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class Gone:
    """What a tensor of a removed module was like, for parents that ask: ``layer.weight.dtype``."""

    def __init__(self, holder: nn.Module, shape: tuple[int, ...]) -> None:
        self._holder = holder
        self.shape = torch.Size(shape)
        self.ndim = len(shape)

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        return self._like.device

    @property
    def _like(self) -> Tensor:
        return self._holder._stand_in_like  # type: ignore[return-value]

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim


class StandIn(nn.Module):
    """In place of a removed module: it has no parameters, and takes any arguments.

    What it returns is plain data. A path is a position or a keyword, and then places in what is nested there.

    - ``{'pass': path, 'copy': bool, 'order': order}``: an argument, or a copy of it
    - ``{'zeros': path, 'shape': sizes, 'order': order}``: zeros like an argument; a size is the name of an attribute or
      a dimension of an argument and the windows that were slid along it
    - ``{'object': path}``: an object that it is given; ``{'plain': value}``: a value
    - ``{'tuple': [...]}``, ``{'list': [...]}``, ``{'dict': {...}}`` of these

    The order is that of the dimensions in memory, outermost first; None where it is the usual one, or the argument's.
    """

    _stand_in_result: dict[str, Any]
    _stand_in_names: list[str]  # of the arguments of the module that it stands in for
    _stand_in_like: Tensor  # empty; of the type and place of the parameters that are gone

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._stand_in_like = fn(self._stand_in_like)
        return super()._apply(fn, recurse)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._made(self._stand_in_result, args, kwargs)

    def _made(self, result: dict[str, Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        if "pass" in result:
            given = self._given(result["pass"], args, kwargs)
            if result["order"] is not None:
                given = given.permute(result["order"]).contiguous().permute(_inverse(result["order"]))
            return given.clone() if result["copy"] else given
        if "zeros" in result:
            like: Tensor = self._given(result["zeros"], args, kwargs)
            shape = [self._size(size, args, kwargs) for size in result["shape"]]
            order = result["order"]
            if order is None:
                return like.new_zeros(shape)
            return like.new_zeros([shape[dim] for dim in order]).permute(_inverse(order))
        if "object" in result:
            return self._given(result["object"], args, kwargs)
        if "tuple" in result:
            return tuple([self._made(item, args, kwargs) for item in result["tuple"]])
        if "list" in result:
            return [self._made(item, args, kwargs) for item in result["list"]]
        if "dict" in result:
            return {key: self._made(item, args, kwargs) for key, item in result["dict"].items()}
        return result["plain"]

    def _size(self, size: Any, args: tuple, kwargs: dict[str, Any]) -> int:
        if isinstance(size, str):
            return int(getattr(self, size))
        path, dim, windows = size
        length: int = self._given(path, args, kwargs).shape[dim]
        for kernel, stride, padding, dilation, over in windows:
            room = length + padding - dilation * (kernel - 1) - 1
            count = (room + (stride - 1 if over else 0)) // stride + 1
            length = count - 1 if over and (count - 1) * stride >= length + padding // 2 else count
        return length

    def _given(self, path: list[Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        first = path[0]
        if isinstance(first, int):  # given by position when it was watched, perhaps by name now, or the other way
            value = args[first] if first < len(args) else kwargs[self._stand_in_names[first]]
        elif first in kwargs or first not in self._stand_in_names:
            value = kwargs[first]
        else:
            value = args[self._stand_in_names.index(first)]
        for place in path[1:]:
            value = value[place]
        return value


def _inverse(order: list[int]) -> list[int]:
    return [order.index(dim) for dim in range(len(order))]


class Passing(StandIn):
    """In place of a removed module whose result now equals an argument."""

    def extra_repr(self) -> str:
        return "an argument"


class Nothing(StandIn):
    """In place of a removed module whose result now is zero, or is not needed."""

    def extra_repr(self) -> str:
        return "zeros"


def stand_in(module: nn.Module, result: Mapping[str, Any]) -> Callable[[], None]:
    """Turn ``module`` into a stand-in, which returns what ``result`` says.

    It stays the same object, in the same places, with its mode, its forward hooks and its plain attributes, since
    parents read some; also what they read of its children (``layer.self_attn.batch_first``), but these are no modules
    any more. Of its parameters and buffers there is what they were like (:class:`Gone`).

    Returns
    -------
    Callable
        Takes it back.
    """
    own, kind = dict(module.__dict__), type(module)
    kept = {**_of_class(kind), **_attributes(module, module)}
    tensors = sorted([*module.parameters(), *module.buffers()], key=lambda tensor: not tensor.is_floating_point())
    kept["_stand_in_like"] = tensors[0].detach().new_empty(0) if tensors else torch.empty(0)
    for key in _HOOKS:
        kept[key] = type(own[key])((i, hook) for i, hook in own[key].items() if not _is_of(hook, module))
    kept["training"] = own["training"]
    kept["_stand_in_result"] = _with_attributes(dict(result), kept)
    kept["_stand_in_names"] = _argument_names(module)
    module.__class__ = Passing if _passes(result) else Nothing
    module.__dict__.clear()
    nn.Module.__init__(module)
    module.__dict__.update(kept)

    def take_back() -> None:
        module.__class__ = kind
        module.__dict__.clear()
        module.__dict__.update(own)

    return take_back


def _with_attributes(result: Any, attributes: dict[str, Any]) -> Any:
    """Turn numbers in shapes into attributes, so that a later speedup finds them when what they count shrinks."""
    if isinstance(result, dict) and "zeros" in result:
        shape = list(result["shape"])
        for place, size in enumerate(shape):
            if isinstance(size, int):
                name = f"_stand_in_size_{sum(key.startswith('_stand_in_size_') for key in attributes)}"
                attributes[name], shape[place] = size, name
        return {**result, "shape": shape}
    if isinstance(result, dict):
        return {key: _with_attributes(item, attributes) for key, item in result.items()}
    return [_with_attributes(item, attributes) for item in result] if isinstance(result, list) else result


def _passes(result: Any) -> bool:
    if isinstance(result, dict):
        return "pass" in result or any(_passes(item) for item in result.values())
    return isinstance(result, list) and any(_passes(item) for item in result)


#: Hooks that a user may have put there to look at what goes in and comes out.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
          "_forward_hooks_always_called")  # fmt: skip


def _is_of(hook: Any, module: nn.Module) -> bool:
    """Whether a hook is the module's own, or makes a weight (old weight and spectral norm, pruning)."""
    return getattr(hook, "__self__", None) is module or type(hook).__module__.startswith("torch.nn.utils.")


def _argument_names(module: nn.Module) -> list[str]:
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


#: What nn.Module keeps for itself.
_INTERNAL = frozenset(vars(nn.Module())) | {"forward", "_compiled_call_impl"}


def _of_class(kind: type) -> dict[str, Any]:
    """Return the numbers and strings that a class holds for its modules."""
    classes = [c for c in reversed(kind.__mro__) if issubclass(c, nn.Module) and c is not nn.Module]
    found = {key: value for c in classes for key, value in vars(c).items()}
    return {
        key: value
        for key, value in found.items()
        if isinstance(value, (bool, int, float, str)) and not key.startswith("__") and not hasattr(nn.Module, key)
    }


def _attributes(module: nn.Module, holder: nn.Module) -> dict[str, Any]:
    """Return the plain attributes of a module, what its tensors were like, and a namespace of these for each child."""
    own = {key: value for key, value in module.__dict__.items() if key not in _INTERNAL}
    kept = {key: value for key, value in own.items() if _plain(value)}
    for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
        kept[key] = None if tensor is None else Gone(holder, tuple(tensor.shape))
    for name, child in module._modules.items():
        kept[name] = child
        if child is not None:
            inner = {**_of_class(type(child)), **_attributes(child, holder), "training": child.training}
            kept[name] = SimpleNamespace(**inner)
    return kept


#: Deeper than this nobody looks.
_DEPTH = 6


def _plain(value: Any, depth: int = _DEPTH) -> bool:
    """Whether an attribute holds no tensor, module or function of one, which would stay in memory."""
    if value is None or isinstance(
        value, (bool, int, float, complex, str, bytes, type, Enum, torch.dtype, torch.device)
    ):
        return True
    if isinstance(value, (Tensor, nn.Module, MethodType)) or depth == 0:
        return False
    if isinstance(value, (FunctionType, BuiltinFunctionType)):
        return getattr(value, "__closure__", None) is None
    if isinstance(value, partial):
        value = (value.func, value.args, value.keywords)
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list, set, frozenset, deque)):
        value = getattr(value, "__dict__", {}).values()
    return all(_plain(item, depth - 1) for item in value)
