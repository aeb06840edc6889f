"""Budgets of a model that has become smaller since they were given."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np

from nni_plugins.pruners.base import GroupPruner
from nni_plugins.pruners.errors import BudgetError
from nni_plugins.pruners.scope import make_pools
from nni_plugins.pruners.select import Pool
from nni_plugins.pruners.targets import TARGETS

_logger = logging.getLogger(__name__)


class Rebased(GroupPruner):
    """A group pruner whose model may lose channels between two prunings; its budgets count what it was at first.

    Attributes
    ----------
    floor : float
        Fraction of each group's units, as they were at first, that stays where no ``max_sparse_ratio`` is given.
    """

    floor: float = 0.0
    _kept_state: tuple[str, ...] = ("_dense", "_sizes")

    def _remember_dense(self) -> None:
        """Take the model as it is for what budgets count."""
        self._dense, self._sizes = self._costs(), {group.name: group.size for group in self.graph.groups}

    def _current_settings(self, fraction: float) -> dict[str, dict[str, Any]]:
        """The settings, told of the model as it was at first, in terms of what is left of it."""
        current = super()._current_settings(fraction)
        for setting in current.values():
            if setting["max_sparse_ratio"] is None:
                setting["max_sparse_ratio"] = max(1 - self.floor, setting["min_sparse_ratio"] or 0.0)
        return self._in_terms_of_now(current)

    def _asked_settings(self) -> dict[str, float | None]:
        final = self._current_settings(1.0)
        return {name: setting["sparse_ratio"] for name, setting in final.items()}

    def _on_the_way(self, pool: Pool, final: float | None) -> Pool:
        keys = (str(key) for key, claims in self.resolved.pool_keys().items() if claims[0].group.name in pool.groups)
        return replace(super()._on_the_way(pool, final), whole=self._dense.get(next(keys)))

    def _select(self, scores: dict[str, np.ndarray], fraction: float, *, strict: bool = True) -> dict[str, np.ndarray]:
        """In the middle of a training, the nearest state under a budget that units are too coarse for is taken."""
        try:
            return super()._select(scores, fraction, strict=strict)
        except BudgetError as error:
            if error.reachable < error.asked:
                raise
            _logger.warning(
                "%s: sparsity %.4g of %s was asked; channels are coarse, and %.4g is removed",
                type(self).__name__, error.asked, self.target, error.reachable,
            )  # fmt: skip
            return super()._select(scores, fraction, strict=False)

    def _in_terms_of_now(self, settings: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        sizes = {group.name: group.size for group in self.graph.groups}
        now = self._costs()
        for key, claims in self.resolved.pool_keys().items():
            left = self._dense.get(str(key), now[str(key)]) / max(now[str(key)], 1e-12)
            for claim in claims:
                name, setting = claim.group.name, settings[claim.group.name]
                if setting["sparse_ratio"] is not None:
                    setting["sparse_ratio"] = max(0.0, 1 - (1 - setting["sparse_ratio"]) * left)
                grown = self._sizes.get(name, sizes[name]) / sizes[name]
                for bound in ("min_sparse_ratio", "max_sparse_ratio"):
                    if setting[bound] is not None:
                        setting[bound] = max(0.0, 1 - (1 - setting[bound]) * grown)
        return settings

    def _costs(self) -> dict[str, float]:
        """What each pool of groups costs as the graph is, by the pool's key."""
        settings = {name: {"sparse_ratio": 0.0} for name in self._claimed}
        pools = make_pools(self.resolved, settings, scope=self.scope, classes=self._classes, latency=self.latency)
        keys = self.resolved.pool_keys()
        return {str(key): TARGETS[self.target](self.graph, {}, pool) for key, pool in zip(keys, pools, strict=True)}
