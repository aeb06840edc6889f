"""What AMC's agent sees and may do: the channel groups of a model in turn, and the budget.

:class:`Environment` is all that the tuner asks for, so that a table of results can stand in for a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from nni_plugins.search.errors import SearchError

if TYPE_CHECKING:
    from torch import nn

    from nni_plugins.channels import ChannelGraph
    from nni_plugins.training.recipe import Recipe

PREFIX = "prune.groups."
REMEMBERED = 50_000
BUDGETS = ("macs", "params", "latency_ms")
KINDS = ("Conv1d", "Conv2d", "Conv3d", "Linear", "heads")


class Environment(Protocol):
    """Steps in the order of the network.

    Attributes
    ----------
    names
        The parameter of the search space that each step sets.
    features
        Float [steps, any]: what does not change, each column in [0, 1].
    rest
        Float [steps]: share of the MACs in later steps.
    """

    names: list[str]
    features: np.ndarray
    rest: np.ndarray

    def load(self, sparsities: Sequence[float]) -> float:
        """Return the cost in shares of the budget (the tightest one), at most 1 where it is met."""

    def saved(self, sparsities: Sequence[float]) -> float:
        """Return the share of the dense MACs that is gone."""


class GraphEnvironment:
    """The channel groups that a search space names, of a recipe's model.

    Parameters
    ----------
    recipe
        Its ``prune`` section says which groups there are, and how sparsities become whole units.
    model, graph
        The dense model (its weights do not count), and its channels.
    names
        Parameters of the search space, ``prune.groups.PREFIX``.
    budget
        ``macs``, ``params`` (shares of the dense model's up to 1, numbers above), ``latency_ms``.
    example
        The model's input, for a latency table; needed with ``latency_ms`` only.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        graph: ChannelGraph,
        names: Sequence[str],
        budget: Mapping[str, float],
        example: Any = None,
    ) -> None:
        from nni_plugins.training.allocate import group_ratios, prunable_groups

        self._settings, self._costs = recipe.prune, graph.cost_model
        groups = prunable_groups(recipe.prune, model, graph)
        prefixes = [name[len(PREFIX) :] for name in names]
        marked = dataclasses.replace(recipe.prune, groups={p: float(i) for i, p in enumerate(prefixes)}, sparsity=-1.0)
        step_of = {name: int(step) for name, step in group_ratios(marked, groups).items()}
        index = {group.name: i for i, group in enumerate(graph.groups)}
        first = {step: min(index[name] for name, own in step_of.items() if own == step) for step in range(len(names))}
        order = sorted(first, key=lambda step: first[step])
        self.names = [names[step] for step in order]
        self._groups = [[group for group in groups if step_of[group.name] == step] for step in order]
        self._columns = [np.array([index[group.name] for group in own]) for own in self._groups]
        self._sizes = [[group.size for group in own] for own in self._groups]
        self._start = np.array([float(group.size) for group in graph.groups])
        for group in groups:
            if step_of[group.name] < 0:  # it has no parameter: the recipe decides
                self._start[index[group.name]] = self._units(group.size, recipe.prune.sparsity)
        dense = np.array([float(group.size) for group in graph.groups])
        self._dense = dict(zip(("macs", "params"), self._costs.totals(dense), strict=True))
        self._limits = {name: _limit(name, value, self._dense) for name, value in budget.items()}
        self._known: dict[bytes, float] = {}  # the same few subnets are asked for again and again
        self._table = None
        if "latency_ms" in self._limits:
            from nni_plugins.channels.latency import LatencyTable

            self._table = LatencyTable.measure(graph, model, example)
            self._names_of = [group.name for group in graph.groups]
        costs = [sum(graph.cost_model.group_cost(group).macs for group in own) for own in self._groups]
        self.rest = 1 - np.cumsum(costs) / max(sum(costs), 1)
        modules = dict(model.named_modules())
        raw = np.array([self._describe(i, own, modules) for i, own in enumerate(self._groups)], dtype=np.float64)
        low, high = raw.min(axis=0), raw.max(axis=0)
        self.features = (raw - low) / np.where(high > low, high - low, 1.0)

    @classmethod
    def from_recipe(cls, path: Path, names: Sequence[str], budget: Mapping[str, float] | None) -> GraphEnvironment:
        """Build the recipe's model, watch it, and take the budget from its objective unless another one is given.

        Raises
        ------
        SearchError
            In one line.
        """
        from nni_plugins.channels import ChannelGraph
        from nni_plugins.training.data import build_data
        from nni_plugins.training.errors import CompressionError, RecipeError
        from nni_plugins.training.models import build_model
        from nni_plugins.training.recipe import load_recipe

        try:
            recipe = load_recipe(path)
            if recipe.prune.target != "channels":
                raise SearchError(
                    f"{path.name}: prune.target is {recipe.prune.target}; here the tuner meets the budget, so that "
                    "sparsities must be taken as written: set prune.target: channels"
                )
            if budget is None:
                bounds = {name: getattr(recipe.objective, name) for name in BUDGETS}
                budget = {name: value for name, value in bounds.items() if value is not None}
            if not budget:
                raise SearchError(
                    f"there is no budget; set objective.macs in {path.name}, or the class argument budget"
                )
            data = build_data(recipe)
            model = build_model(recipe, data.shape, data.classes, recipe.seed)
            graph = ChannelGraph.watch(model, data.example)
            return cls(recipe, model, graph, names, budget, data.example)
        except (RecipeError, CompressionError) as error:
            raise SearchError(str(error)) from None

    def load(self, sparsities: Sequence[float]) -> float:
        """Return the cost in shares of the budget, the tightest one."""
        kept = self._kept(sparsities)
        key = kept.tobytes()
        if key not in self._known:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[key] = self._load(kept)
        return self._known[key]

    def _load(self, kept: np.ndarray) -> float:
        cost = dict(zip(("macs", "params"), self._costs.totals(kept), strict=True))
        if self._table is not None:
            named = {name: int(k) for name, k, all_ in zip(self._names_of, kept, self._all, strict=True) if k < all_}
            cost["latency_ms"] = self._table.latency_ms(named)
        return max(cost[name] / limit for name, limit in self._limits.items())

    def saved(self, sparsities: Sequence[float]) -> float:
        """Return the share of the dense MACs that is gone."""
        return 1 - self._costs.totals(self._kept(sparsities))[0] / self._dense["macs"]

    @property
    def _all(self) -> np.ndarray:
        return self._costs.counts(None)

    def _kept(self, sparsities: Sequence[float]) -> np.ndarray:
        kept = self._start.copy()
        for sparsity, columns, sizes in zip(sparsities, self._columns, self._sizes, strict=True):
            kept[columns] = [self._units(size, sparsity) for size in sizes]
        return kept

    def _units(self, size: int, sparsity: float) -> int:
        from nni_plugins.training.allocate import whole

        return whole(size, sparsity, self._settings)

    def _describe(self, step: int, own: list[Any], modules: Mapping[str, nn.Module]) -> list[float]:
        """Index, kind, c_in, c_out, stride, kernel, size."""
        group = own[0]
        producer = next((member.module for member in group.producers if member.module in modules), "")
        module: Any = modules.get(producer)
        name = "heads" if group.kind in ("heads", "head_dim") else type(module).__name__
        kind = KINDS.index(name) if name in KINDS else len(KINDS)
        columns = float(getattr(module, "in_channels", getattr(module, "in_features", 0)))
        rows = float(getattr(module, "out_channels", getattr(module, "out_features", group.size)))
        stride, kernel = (_first(getattr(module, item, 1)) for item in ("stride", "kernel_size"))
        return [step, kind, columns, rows, stride, kernel, sum(one.size for one in own)]


def _first(value: Any) -> float:
    return float(value[0] if isinstance(value, (tuple, list)) else value)


def _limit(name: str, value: float, dense: Mapping[str, float]) -> float:
    return value * dense[name] if name in dense and value <= 1 else value
