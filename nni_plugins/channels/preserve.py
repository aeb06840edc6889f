"""Leave a model exactly as it was found: modes, hooks, attributes, buffers, and the random state."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import copy
from operator import is_
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn


@contextmanager
def preserved(model: nn.Module, *, buffers: bool = True) -> Iterator[None]:
    """Put back, on leaving, whatever a run changes in ``model``.

    Every module's ``__dict__``, what it holds (hooks, caches, lists in dictionaries, plain objects) and what those hold
    are put back; with ``buffers`` also the values of buffers and of other tensors that are no parameters, which a run
    on real data may change. So is the random state of torch, NumPy and Python.
    """
    with random_state_kept():
        found = _Found([module.__dict__ for module in model.modules()])
        tensors = {id(tensor): tensor for tensor in [*model.buffers(), *found.tensors]} if buffers else {}
        values = [(tensor, tensor.detach().clone()) for tensor in tensors.values()]
        try:
            yield
        finally:
            for container, content in found.containers:
                if not _same(container, content):
                    _refill(container, content)
            for tensor, value in values:
                tensor.data.copy_(value)


#: Longer ones (a vocabulary, a data set) are put back, but what they hold is not looked at.
_LONG = 1000
_OPAQUE = (nn.Module, nn.Parameter, type, ModuleType, FunctionType, BuiltinFunctionType, str, bytes, int, float)
_MUTABLE = (dict, list, set, deque)
_kinds: dict[type, str] = {bool: "", type(None): "", int: "", float: "", str: ""}


def _kind_of(kind: type) -> str:
    """What to do with values of a type: '' for nothing."""
    if issubclass(kind, _OPAQUE):
        return ""
    if issubclass(kind, torch.Tensor):
        return "tensor"
    if issubclass(kind, _MUTABLE):
        return "container"
    return "tuple" if issubclass(kind, (tuple, frozenset)) else "object"


class _Found:
    """Containers with a copy of what they hold, and tensors, all that can be reached from some dictionaries."""

    def __init__(self, roots: list[dict]) -> None:
        self.containers: list[tuple[Any, Any]] = []
        self.tensors: list[torch.Tensor] = []
        seen: set[int] = set()
        waiting: list[Any] = list(reversed(roots))
        while waiting:
            value = waiting.pop()
            kind = _kinds.get(type(value))
            if kind is None:
                kind = _kinds[type(value)] = _kind_of(type(value))
            if not kind or id(value) in seen:
                continue
            seen.add(id(value))
            if kind == "container":
                self.containers.append((value, copy(value) if value else None))
                if value and len(value) <= _LONG:
                    waiting.extend(value.values() if isinstance(value, dict) else value)
            elif kind == "tensor":
                if not isinstance(value, nn.Parameter):  # a tensor may say that it is one
                    self.tensors.append(value)
            elif kind == "tuple":
                if len(value) <= _LONG:
                    waiting.extend(value)
            elif isinstance(getattr(value, "__dict__", None), dict):
                waiting.append(value.__dict__)


def set_mode(model: nn.Module, training: bool) -> None:
    """Set training or eval mode; a program from ``torch.export`` has none, and says so."""
    with suppress(NotImplementedError):
        model.train(training)


def drop_caches(model: nn.Module) -> None:
    """Let modules drop what they worked out in eval mode and keep, such as biases picked from a table; modes stay.

    Such a module (LeViT's attention) drops it on ``train()``, when its parameters may change.
    """
    modes = [(module, module.training) for module in model.modules()]
    set_mode(model, True)
    for module, training in modes:
        module.training = training


def tensors_held(model: nn.Module) -> list[torch.Tensor]:
    """Return the tensors that modules hold beside their parameters and buffers, as attributes or in containers."""
    return _Found([module.__dict__ for module in model.modules()]).tensors


def _refill(container: Any, content: Any) -> None:
    container.clear()
    if content is None:
        return
    if isinstance(container, (list, deque)):
        container.extend(content)
    else:
        container.update(content)


def _same(value: Any, content: Any) -> bool:
    if content is None:
        return not value
    if len(value) != len(content):
        return False
    if isinstance(value, dict):
        return all(map(is_, value, content)) and all(map(is_, value.values(), content.values()))
    if isinstance(value, (list, deque)):
        return all(map(is_, value, content))
    return bool(value == content)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the random state of torch (every device in use), NumPy and Python back on leaving."""
    import numpy as np  # not at the top: a compact model is loaded where NumPy is not installed

    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)
