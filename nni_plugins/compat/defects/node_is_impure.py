"""``torch.fx.Node.is_impure`` takes ``impure_random``; NNI's replacement of it during dead code removal does not."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from nni_plugins.compat.hook import Patch


def _parameters(function: Any) -> int:
    # follow_wrapped: NNI's wrapper claims, by functools.wraps, the signature of what it wraps.
    return len(inspect.signature(function, follow_wrapped=False).parameters)


def _defect(module: Any) -> bool:
    wanted, taken = module.Node.is_impure, module.node_is_impure_wrapper
    return _parameters(wanted) > _parameters(taken) and not hasattr(taken, "__nni_plugins__")


def _mend(module: Any) -> None:
    theirs = module.node_is_impure_wrapper

    @functools.wraps(theirs)
    def node_is_impure_wrapper(node: Any, *args: Any, **kwargs: Any) -> bool:
        return theirs(node)

    node_is_impure_wrapper.__nni_plugins__ = True  # type: ignore[attr-defined]
    module.node_is_impure_wrapper = node_is_impure_wrapper


PATCH = Patch(
    name="node-is-impure",
    module="nni.common.concrete_trace_utils.concrete_tracer",
    mends="concrete_trace fails with 'node_is_impure_wrapper() takes 1 positional argument but 2 were given'",
    defect=_defect,
    mend=_mend,
)
