"""Forwards of flexible width, for modules whose own forward takes the number of heads or their width for granted.

``nn.MultiheadAttention`` works out the width of a head from the width of its input, so no attribute can make it run
with fewer heads. Such a module is *exchanged*: its class is replaced by a subclass whose forward computes the same from
the sizes of the weights. Parameters, buffers, hooks and names stay; while a model is watched the exchange is there for
a moment only, and in a compact model it stays for modules that lost something.

A class joins the table by one line under :func:`flexible`::

    @flexible(MyAttention)
    class FlexibleMyAttention(MyAttention):
        def forward(self, x): ...
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

Class = TypeVar("Class", bound=type)

#: Full name of a module class -> 'module:class' of its exchange, imported only where a model has such a module.
FLEXIBLE: dict[str, str] = {
    "torch.nn.modules.activation.MultiheadAttention": f"{__name__}.attention:FlexibleMultiheadAttention",
    "torch.nn.modules.transformer.TransformerEncoder": f"{__name__}.attention:FlexibleTransformerEncoder",
    "torchvision.models.swin_transformer.ShiftedWindowAttention": f"{__name__}.windows:FlexibleWindowAttention",
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": f"{__name__}.windows:FlexibleWindowAttentionV2",
}


def flexible(original: type[nn.Module]) -> Callable[[Class], Class]:
    """Register a class as the exchange of ``original``, of which it must be a subclass with the same state.

    It computes what ``original`` computes at full width, and runs when its parameters have lost heads or channels.

    Raises
    ------
    TypeError
        If the class is no subclass of ``original``: then hooks, pickles and ``isinstance`` would break.
    """

    def register(exchange: Class) -> Class:
        if not issubclass(exchange, original):
            raise TypeError(f"{exchange.__name__} must be a subclass of {original.__name__} to take its place")
        FLEXIBLE[_name(original)] = f"{exchange.__module__}:{exchange.__qualname__}"
        _join(original, exchange)
        return exchange

    return register


_classes: dict[type, type] = {}


def _join(original: type, exchange: type) -> None:
    exchange.__name__ = original.__name__  # by which configurations select it; pickles go by the qualified name
    _classes[original] = exchange


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def is_flexible(kind: type) -> bool:
    """Whether modules of exactly this class have an exchange."""
    return kind in _classes or _name(kind) in FLEXIBLE


def flexible_class(kind: type) -> type:
    """Return the class to exchange ``kind`` for; a class without an exchange, or that is one, stays itself."""
    if kind not in _classes and _name(kind) in FLEXIBLE:
        module, _, name = FLEXIBLE[_name(kind)].partition(":")
        _join(kind, getattr(importlib.import_module(module), name))
    return _classes.get(kind, kind)


def exchange(module: nn.Module) -> Callable[[], None]:
    """Give a module its flexible class. What it must remember of its full width becomes attributes.

    Returns
    -------
    Callable
        Takes it back.
    """
    old, new = type(module), flexible_class(type(module))
    own = module.__dict__.get("forward")  # left by a compressor that was unwrapped: the class's own, but bound
    if own is not None and getattr(own, "__func__", None) is not old.forward:
        return lambda: None  # a forward of somebody else's is run as it is
    remember: Any = getattr(new, "remembered", None)
    added = remember(module) if remember is not None and new is not old else {}
    added = {attribute: value for attribute, value in added.items() if not hasattr(module, attribute)}
    for attribute, value in added.items():
        setattr(module, attribute, value)
    module.__dict__.pop("forward", None)
    module.__class__ = new

    def take_back() -> None:
        module.__class__ = old
        if own is not None:
            module.__dict__["forward"] = own
        for attribute in added:
            delattr(module, attribute)

    return take_back


@contextmanager
def all_flexible(model: nn.Module) -> Iterator[None]:
    """Exchange every module that has an exchange, for the time being."""
    undo: list[Callable[[], None]] = []
    try:
        undo += [exchange(module) for module in model.modules() if is_flexible(type(module))]
        yield
    finally:
        for take_back in undo:
            take_back()
