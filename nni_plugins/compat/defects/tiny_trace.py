"""A trace of next to nothing, in 20 ms: how NNI's tracer behaves can be asked of it, rather than of its source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def keeping_apply() -> Iterator[list[str]]:
    """Give ``torch.autograd.Function`` its ``apply`` back at the end; yield a list that names it if it was lost."""
    import torch

    function: Any = torch.autograd.Function
    held = vars(function).get("apply")
    lost: list[str] = []
    try:
        yield lost
    finally:
        if held is not None and vars(function).get("apply") is not held:
            lost.append("apply")
            function.apply = held


def trace_around(module: Any, action: Callable[[], Any]) -> bool:
    """Trace a model whose forward takes `action`; torch is left as it was.

    Parameters
    ----------
    module
        ``nni.common.concrete_trace_utils.concrete_tracer``.
    action
        Called once, while NNI traces.

    Returns
    -------
    bool
        Whether ``torch.autograd.Function.apply`` had to be put back.
    """
    import torch

    class Model(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            action()
            return x

    options = {"use_operator_patch": False, "operator_patch_backlist": [], "forward_function_name": "forward"}
    with keeping_apply() as lost:
        module.ConcreteTracer().trace(Model(), concrete_args={"x": 1}, **options)
    return bool(lost)
