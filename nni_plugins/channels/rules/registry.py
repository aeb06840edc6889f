"""The table of label rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nni_plugins.channels.call import Rule

RULES: dict[str, Rule] = {}
_found: dict[Any, tuple[str, Rule | None]] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a label rule for operators by name, ``'aten.add'``; the in-place form ``aten.add_`` comes with it."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        _found.clear()
        return function

    return register


def rule_for(func: Any) -> tuple[str, Rule | None]:
    """Return the name of an operator, and its rule or None; pointwise operators without their own share one."""
    found = _found.get(func)
    if found is None:
        name = str(func.overloadpacket)
        plain = name.rstrip("_") if name.endswith("_") and not name.endswith("__") else name
        function = RULES.get(name) or RULES.get(plain)
        if function is None and torch.Tag.pointwise in func.tags:
            function = RULES["pointwise"]
        found = _found[func] = (name, function)
    return found
