"""Leave a model exactly as it was found: modes, hooks, attributes, buffers, and the random state."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def preserved(model: nn.Module, *, buffers: bool = True) -> Iterator[None]:
    """Put back, on leaving, whatever a run changes in ``model``.

    Every module's ``__dict__`` and the containers in it (hooks, caches, lists) are put back; with ``buffers`` also the
    values of the buffers, which a run on real tensors may change. So is the random state of torch, NumPy and Python.
    """
    with random_state_kept():
        modules = [(module, _snapshot(module.__dict__)) for module in model.modules()]
        values = [(b, b.detach().clone()) for b in model.buffers()] if buffers else []
        try:
            yield
        finally:
            for module, snapshot in modules:
                _restore(module.__dict__, snapshot)
            for buffer, value in values:
                buffer.data.copy_(value)


def _snapshot(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {
        key: (value, value.copy() if isinstance(value, (dict, list, set)) else None)
        for key, value in attributes.items()
    }


def _restore(attributes: dict[str, Any], snapshot: dict[str, tuple[Any, Any]]) -> None:
    if list(attributes) != list(snapshot) or any(attributes[k] is not v for k, (v, _) in snapshot.items()):
        attributes.clear()
        attributes.update({key: value for key, (value, _) in snapshot.items()})
    for value, content in snapshot.values():
        if content is None or _same(value, content):
            continue
        if isinstance(value, list):
            value[:] = content
        else:
            value.clear()
            value.update(content)


def _same(value: Any, content: Any) -> bool:
    if len(value) != len(content):
        return False
    if isinstance(value, dict):
        return all(k is j and v is w for (k, v), (j, w) in zip(value.items(), content.items(), strict=True))
    if isinstance(value, list):
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
