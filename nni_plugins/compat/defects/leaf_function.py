"""Inside a leaf operator, NNI's tracer calls the raw C function where torch's own is a Python one of the same name.

While a leaf such as ``F.normalize`` runs, ``torch.norm`` is still NNI's wrapper; it should then behave as
``torch.norm`` (``torch.functional.norm``, which prepares the arguments), and not as
``torch._C._VariableFunctions.norm``, which refuses them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from nni_plugins.compat.hook import Patch


def _defect(module: Any) -> bool:
    wrapper = module._create_wrapped_leaf_func(SimpleNamespace(temp_disable_call=True), lambda: "raw", lambda: "proper")
    return wrapper() == "raw"


def _mend(module: Any) -> None:
    create = module._create_wrapped_leaf_func

    @functools.wraps(create)
    def _create_wrapped_leaf_func(
        tracer: Any, func: Callable[..., Any], to_func: Callable[..., Any] | None, init_tracers: Any = ()
    ) -> Callable[..., Any]:
        wrapper = create(tracer, func, to_func, init_tracers)
        if to_func is None or to_func is func:
            return wrapper

        @functools.wraps(func)
        def func_wrapper(*args: Any, **kwargs: Any) -> Any:
            return (to_func if tracer.temp_disable_call else wrapper)(*args, **kwargs)

        return func_wrapper

    module._create_wrapped_leaf_func = _create_wrapped_leaf_func


PATCH = Patch(
    name="leaf-function",
    module="nni.common.concrete_trace_utils.concrete_tracer",
    mends="concrete_trace fails for models that use F.normalize, as Swin v2 does ('norm() received an invalid "
    "combination of arguments')",
    defect=_defect,
    mend=_mend,
)
