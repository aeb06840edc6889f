"""After a trace, ``torch.autograd.Function`` has lost its ``apply``.

NNI deletes it, where torch before 2.0 only inherited it; since then it is a method of the class, without which
``torch.func`` cannot transform a user's function that has a ``setup_context``.
"""

from __future__ import annotations

import functools
from typing import Any

from nni_plugins.compat.defects.tiny_trace import keeping_apply, trace_around
from nni_plugins.compat.hook import Patch


def _defect(module: Any) -> bool:
    return trace_around(module, lambda: None)


def _mend(module: Any) -> None:
    trace_graph = module.ConcreteTracer.trace

    @functools.wraps(trace_graph)
    def trace(self: Any, *args: Any, **kwargs: Any) -> Any:
        with keeping_apply():
            return trace_graph(self, *args, **kwargs)

    module.ConcreteTracer.trace = trace


PATCH = Patch(
    name="function-apply",
    module="nni.common.concrete_trace_utils.concrete_tracer",
    mends="a trace leaves torch.autograd.Function without its apply: torch.func.vmap and grad of a custom "
    "function fail from then on",
    defect=_defect,
    mend=_mend,
)
