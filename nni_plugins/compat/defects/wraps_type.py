"""``functools.wraps(type)``, with which NNI's tracer makes its stand-in for ``type``, fails on Python 3.12.

``wraps`` also copies ``__type_params__`` there, which of ``type`` itself is no tuple. The tracer's module gets a
``functools`` whose ``wraps`` leaves it out.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

from nni_plugins.compat.hook import Patch


def wraps(wrapped: Any, *args: Any, **kwargs: Any) -> Any:
    """``functools.wraps``, but for type parameters that are none."""
    if not args and "assigned" not in kwargs and not isinstance(getattr(wrapped, "__type_params__", ()), tuple):
        kwargs["assigned"] = tuple(name for name in functools.WRAPPER_ASSIGNMENTS if name != "__type_params__")
    return functools.wraps(wrapped, *args, **kwargs)


def _defect(module: Any) -> bool:
    try:
        module.functools.wraps(type)(lambda: None)
    except TypeError:
        return True
    return False


def _mend(module: Any) -> None:
    module.functools = SimpleNamespace(**{**vars(functools), "wraps": wraps})


PATCH = Patch(
    name="wraps-type",
    module="nni.common.concrete_trace_utils.concrete_tracer",
    mends="concrete_trace fails on Python 3.12 ('__type_params__ must be set to a tuple')",
    defect=_defect,
    mend=_mend,
)
