"""Search: tuners and spaces for NNI, over what to prune, how much, and what to prune it from.

NNI is imported when a name is first asked for, not when this package is.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nni_plugins.search.amc import AMCTuner
    from nni_plugins.search.legr import LeGRTuner
    from nni_plugins.search.optuna_tuner import OptunaTuner
    from nni_plugins.search.pruned_space import PrunedSpace

_HOMES = {
    "AMCTuner": "nni_plugins.search.amc",
    "LeGRTuner": "nni_plugins.search.legr",
    "OptunaTuner": "nni_plugins.search.optuna_tuner",
    "PrunedSpace": "nni_plugins.search.pruned_space",
}

__all__ = ["AMCTuner", "LeGRTuner", "OptunaTuner", "PrunedSpace"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
