"""While it traces, NNI puts objects in the place of ``tuple``, ``list``, ``dict``, ``int`` … that are not types.

``tuple[int, int]``, ``int | tuple``, ``class Pair(tuple)`` and an ``isinstance`` that runs in C then fail inside the
model's forward ("'clz_wrapper_clz' object is not subscriptable"). The objects are given what a type has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from nni_plugins.compat.hook import Patch

FACTORIES = ("_create_wrapped_leaf_class", "_create_wrapped_leaf_iterable_class")


def _like_a_type(wrapper: Any, clz: Any) -> Any:
    """Teach the wrapper of `clz` to be used where a type is expected. Each wrapper has a class of its own."""

    def original(other: Any) -> Any:
        return getattr(other, "__wrapped_class__", other)

    members: dict[str, Callable[..., Any]] = {
        "__getattr__": lambda self, name: getattr(clz, name),
        "__getitem__": lambda self, item: clz.__class_getitem__(item),
        "__or__": lambda self, other: clz | original(other),
        "__ror__": lambda self, other: original(other) | clz,
        "__mro_entries__": lambda self, bases: (clz,),
        "__instancecheck__": lambda self, instance: isinstance(instance, clz),
        "__subclasscheck__": lambda self, subclass: issubclass(original(subclass), clz),
    }
    if not hasattr(clz, "__class_getitem__"):
        del members["__getitem__"]
    kind = type(wrapper)
    for name, member in members.items():
        setattr(kind, name, member)
    kind.__wrapped_class__ = clz
    return wrapper


def _defect(module: Any) -> bool:
    wrapper = module._create_wrapped_leaf_iterable_class(None, tuple)
    try:
        return bool(wrapper[int] != tuple[int])
    except TypeError:
        return True


def _mend(module: Any) -> None:
    for name in FACTORIES:
        create = getattr(module, name)

        def factory(tracer: Any, clz: Any, create: Callable[..., Any] = create) -> Any:
            return _like_a_type(create(tracer, clz), clz)

        setattr(module, name, functools.wraps(create)(factory))


PATCH = Patch(
    name="class-wrapper",
    module="nni.common.concrete_trace_utils.concrete_tracer",
    mends="concrete_trace fails where a forward uses tuple[int, int] or int | tuple ('clz_wrapper_clz' object is "
    "not subscriptable)",
    defect=_defect,
    mend=_mend,
)
