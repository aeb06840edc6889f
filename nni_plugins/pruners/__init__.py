"""Pruners of channel groups and of single weights: subclasses of nni's ``Pruner``, one file per method.

NNI is imported when a pruner is first asked for, not when this package is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from nni_plugins.pruners.errors import BudgetError, PruningError
from nni_plugins.pruners.schedule import Schedule

if TYPE_CHECKING:
    from nni_plugins.pruners.base import GroupPruner
    from nni_plugins.pruners.blocks import BlockPruner
    from nni_plugins.pruners.dynamic import DynamicSparsePruner
    from nni_plugins.pruners.hybrid import HybridPruner
    from nni_plugins.pruners.l0 import L0Pruner
    from nni_plugins.pruners.lottery import LotteryTicketPruner
    from nni_plugins.pruners.magnitude import MagnitudePruner
    from nni_plugins.pruners.order import OrderPruner
    from nni_plugins.pruners.random import RandomPruner
    from nni_plugins.pruners.synaptic import SynapticStrengthPruner
    from nni_plugins.pruners.taylor import TaylorPruner
    from nni_plugins.pruners.weight_gradient import GradientWeightPruner
    from nni_plugins.pruners.weight_magnitude import MagnitudeWeightPruner
    from nni_plugins.pruners.weights import WeightPruner

_METHODS = {
    "block": ("nni_plugins.pruners.blocks", "BlockPruner"),
    "dynamic_sparse": ("nni_plugins.pruners.dynamic", "DynamicSparsePruner"),
    "lottery_ticket": ("nni_plugins.pruners.lottery", "LotteryTicketPruner"),
    "weight_gradient": ("nni_plugins.pruners.weight_gradient", "GradientWeightPruner"),
    "weight_magnitude": ("nni_plugins.pruners.weight_magnitude", "MagnitudeWeightPruner"),
    "hybrid": ("nni_plugins.pruners.hybrid", "HybridPruner"),
    "l0": ("nni_plugins.pruners.l0", "L0Pruner"),
    "magnitude": ("nni_plugins.pruners.magnitude", "MagnitudePruner"),
    "order": ("nni_plugins.pruners.order", "OrderPruner"),
    "synaptic": ("nni_plugins.pruners.synaptic", "SynapticStrengthPruner"),
    "random": ("nni_plugins.pruners.random", "RandomPruner"),
    "taylor": ("nni_plugins.pruners.taylor", "TaylorPruner"),
}
_LAZY = {name: module for module, name in _METHODS.values()} | {
    "GroupPruner": "nni_plugins.pruners.base",
    "WeightPruner": "nni_plugins.pruners.weights",
}

__all__ = [
    "PRUNERS",
    "BlockPruner",
    "BudgetError",
    "DynamicSparsePruner",
    "GradientWeightPruner",
    "GroupPruner",
    "HybridPruner",
    "L0Pruner",
    "LotteryTicketPruner",
    "MagnitudePruner",
    "MagnitudeWeightPruner",
    "OrderPruner",
    "PruningError",
    "RandomPruner",
    "Schedule",
    "SynapticStrengthPruner",
    "TaylorPruner",
    "WeightPruner",
]


class _Registry(Mapping[str, Any]):
    """Pruner classes by the name that a recipe gives them; each is imported when it is read."""

    def __getitem__(self, name: str) -> Any:
        module, attribute = _METHODS[name]
        return getattr(import_module(module), attribute)

    def __iter__(self) -> Iterator[str]:
        return iter(_METHODS)

    def __len__(self) -> int:
        return len(_METHODS)


PRUNERS: Mapping[str, Any] = _Registry()
"""Pruner classes by recipe name: ``magnitude``, ``weight_magnitude``, ``taylor`` ..."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
