"""Sizes that modules hold in attributes: whole numbers, and the elements of tuples and lists of them.

An attribute is named ``heads``, an element of one ``split_sizes[1]``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

_ELEMENT = re.compile(r"(.+)\[(\d+)\]$")

#: Longer ones hold data, not sizes.
_LONG = 16


def sizes_held(module: nn.Module | None) -> Iterator[tuple[str, int]]:
    """Yield ``(name, size)`` of every whole number that a module holds.

    The one number of a tuple of length 1 (``normalized_shape``) goes by the name of the attribute.
    """
    for name, value in list(vars(module).items()) if module is not None else []:
        if _is_size(value):
            yield name, value
        elif _are_sizes(value):
            for place, size in enumerate(value):
                if _is_size(size):
                    yield (name if len(value) == 1 else f"{name}[{place}]"), size


def size_at(module: nn.Module | None, name: str) -> int | None:
    """Return the size that :func:`sizes_held` yields by a name, or None."""
    attribute, place = element(name)
    value: Any = getattr(module, attribute, None)
    if _are_sizes(value) and (place is not None or len(value) == 1):
        value = value[place or 0] if len(value) > (place or 0) else None
    elif place is not None:
        return None
    return value if _is_size(value) else None


def element(name: str) -> tuple[str, int | None]:
    """Return the attribute that a name is of, and the place of the element, if it is one."""
    found = _ELEMENT.match(name)
    return (found[1], int(found[2])) if found else (name, None)


def with_sizes(value: Any, places: Mapping[int, int]) -> Any:
    """Return a tuple or list like ``value`` with other elements at ``places``."""
    return as_kind(value, [places.get(place, held) for place, held in enumerate(value)])


def as_kind(like: Any, values: list) -> Any:
    """Return ``values`` as a list, a size or a tuple, whichever ``like`` is."""
    return values if isinstance(like, list) else torch.Size(values) if isinstance(like, torch.Size) else tuple(values)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_sizes(value: Any) -> bool:
    return type(value) in (tuple, list, torch.Size) and len(value) <= _LONG
