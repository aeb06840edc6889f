"""Class arguments of tuners, checked with one-line errors."""

from __future__ import annotations

import inspect
import math
from typing import Any

from nni_plugins.search.errors import SearchError


def refuse_unknown(tuner: type, given: dict[str, Any], hidden: tuple[str, ...] = ()) -> None:
    """Raise where a class argument is not one of the tuner's."""
    known = [name for name in inspect.signature(tuner).parameters if name not in hidden]
    for name in given:
        if name not in known:
            raise SearchError(f"{tuner.__name__}: {name} is not a class argument; known: {', '.join(known)}")


def check_seed(seed: Any) -> None:
    """Raise where a seed is no whole number."""
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**32):
        raise SearchError(f"seed is {seed!r}; it must be a whole number in [0, 4294967296)")


def check_number(name: str, value: Any, kind: type, low: float, high: float) -> None:
    """Raise where an argument is not a number of this kind in ``[low, high]``."""
    right = type(value) is int or (kind is float and type(value) is float and math.isfinite(value))
    if not right or not low <= value <= high:
        what = "whole number" if kind is int else "number"
        raise SearchError(f"{name} is {value!r}; it must be a {what} in [{low:g}, {high:g}]")
