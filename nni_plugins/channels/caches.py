"""Functions that remember their results (``functools.lru_cache``) must not remember tensors of a watched run.

A model that works out a table of indices once for all (BEiT's relative positions) keeps it with the function, not with
a module. Without data that table is empty memory: the model would go on with it after the watch, and be wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import _lru_cache_wrapper
from types import FunctionType
from typing import Any

from torch import nn

_found: dict[type, list[Any]] = {}


@contextmanager
def functions_forget(model: nn.Module) -> Iterator[None]:
    """Clear, before and after, what functions in the files of the model's classes remember.

    Before, so that each run calls the same operators; after, so that nothing of it stays. Results are worked out again.
    """
    caches = {id(cache): cache for kind in {type(module) for module in model.modules()} for cache in _caches_of(kind)}
    _clear(caches.values())
    try:
        yield
    finally:
        _clear(caches.values())


def _clear(caches: Any) -> None:
    for cache in caches:
        if cache.cache_info().currsize:
            cache.cache_clear()


def _caches_of(kind: type) -> list[Any]:
    """Return the caches of a class's methods, and of functions beside it in its file; torch's own have none."""
    if kind not in _found:
        values: list[Any] = []
        for base in kind.__mro__:
            if not base.__module__.startswith(("torch.", "builtins")):
                values += vars(base).values()
                values += vars(sys.modules.get(base.__module__, base)).values()
        seen: dict[int, Any] = {}
        for value in values:
            _look(value, seen, 4)
        _found[kind] = [item for item in seen.values() if isinstance(item, _lru_cache_wrapper)]
    return _found[kind]


def _look(value: Any, seen: dict[int, Any], depth: int) -> None:
    """Look through decorators: what they wrap is in their closure."""
    value = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
    if not isinstance(value, (FunctionType, _lru_cache_wrapper)) or id(value) in seen or not depth:
        return
    seen[id(value)] = value
    for cell in getattr(value, "__closure__", None) or ():
        try:
            _look(cell.cell_contents, seen, depth - 1)
        except ValueError:  # a cell that is still empty
            continue
