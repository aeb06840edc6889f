"""Leave a model exactly as it was found: modes, hooks, attributes, buffers, and the random state."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import numpy as np
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
        found = _Found()
        for module in model.modules():
            found.look_at(module.__dict__)
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


class _Found:
    """Containers with a copy of what they hold, and tensors, all that can be reached from a module's attributes."""

    def __init__(self) -> None:
        self.containers: list[tuple[Any, Any]] = []
        self.tensors: list[torch.Tensor] = []
        self._seen: set[int] = set()

    def look_at(self, value: Any) -> None:
        if value is None or isinstance(value, _OPAQUE) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, torch.Tensor):
            self.tensors.append(value)
        elif isinstance(value, (dict, list, set, deque)):
            self.containers.append((value, copy(value) if isinstance(value, deque) else value.copy()))
            self._look_into(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, (tuple, frozenset)):
            self._look_into(value)
        elif isinstance(getattr(value, "__dict__", None), dict):
            self.look_at(value.__dict__)

    def _look_into(self, values: Any) -> None:
        if len(values) <= _LONG:
            for value in values:
                self.look_at(value)


def tensors_held(model: nn.Module) -> list[torch.Tensor]:
    """Return the tensors that modules hold beside their parameters and buffers, as attributes or in containers."""
    found = _Found()
    for module in model.modules():
        found.look_at(module.__dict__)
    return found.tensors


def _refill(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, (list, deque)):
        container.extend(content)
    else:
        container.update(content)


def _same(value: Any, content: Any) -> bool:
    if len(value) != len(content):
        return False
    if isinstance(value, dict):
        return all(k is j and v is w for (k, v), (j, w) in zip(value.items(), content.items(), strict=True))
    if isinstance(value, (list, deque)):
        return all(v is w for v, w in zip(value, content, strict=True))
    return bool(value == content)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the random state of torch (every device in use), NumPy and Python back on leaving."""
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
