"""``torch._C._TensorBase`` calls itself ``TensorBase`` since torch 2.1.

NNI's concrete tracer recognises the methods of a tensor by the prefix ``'_TensorBase'`` of their qualified name.
The prefix is a constant of ``ConcreteTracer.trace``; ``str.startswith`` takes a tuple as well.
"""

from __future__ import annotations

from typing import Any

from nni_plugins.compat.hook import Patch

OLD = "_TensorBase"


def _qualified_name(module: Any) -> str:
    return module.torch._C._TensorBase.add.__qualname__.split(".")[0]


def _defect(module: Any) -> bool:
    name = _qualified_name(module)
    return not name.startswith(OLD) and OLD in module.ConcreteTracer.trace.__code__.co_consts


def _mend(module: Any) -> None:
    trace = module.ConcreteTracer.trace
    names = (OLD, _qualified_name(module))
    constants = tuple(names if constant == OLD else constant for constant in trace.__code__.co_consts)
    trace.__code__ = trace.__code__.replace(co_consts=constants)


PATCH = Patch(
    name="tensor-base",
    module="nni.common.concrete_trace_utils.concrete_tracer",
    mends="concrete_trace (and so ModelSpeedup) does not record the methods of tensors",
    defect=_defect,
    mend=_mend,
)
