"""The table of subnets as trials: a tuner's parameters in, the dictionary that a trial reports out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.subnets.build import RECIPE
from nni_plugins.search.amc_state import GraphEnvironment

RESULTS = Path(__file__).resolve().parent.parent / "results" / "subnets.npz"
PENALTY = 10.0  # objective.penalty of the recipe


class Table:
    """Every subnet of the grid, evaluated once.

    Parameters
    ----------
    budget
        Share of the dense model's MACs.
    """

    def __init__(self, budget: float = 0.5, path: Path = RESULTS) -> None:
        with np.load(path) as file:
            self.groups = [str(name) for name in file["groups"]]
            self.kept = file["kept"]
            self.accuracy = file["correct"][..., 0] / file["images"][0]
            self.test = file["correct"][..., 1] / file["images"][1]
            self.share = file["macs"] / file["dense"][0]
            self.macs = file["macs"].astype(int)
            scores = [file[f"scores.{name}"].astype(float) for name in self.groups]
        self.budget = budget
        self.scores = [one / one.mean() for one in scores]
        self.reward = self.accuracy - PENALTY * np.maximum(self.share / budget - 1, 0)

    def ratios(self) -> dict[str, Any]:
        """A search space: the sparsity of each group, on the grid."""
        most = round(1 - float(self.kept[-1]), 6)
        spec = {"_type": "quniform", "_value": [0.0, most, most / (len(self.kept) - 1)]}
        return {f"prune.groups.{name}": dict(spec) for name in self.groups}

    def affine(self) -> dict[str, Any]:
        """A search space: scale and shift of each group's scores."""
        scales = {f"prune.scales.{name}": {"_type": "loguniform", "_value": [0.2, 5.0]} for name in self.groups}
        shifts = {f"prune.shifts.{name}": {"_type": "uniform", "_value": [-1.0, 1.0]} for name in self.groups}
        return {**scales, **shifts}

    def levels(self, parameters: dict[str, Any]) -> tuple[int, ...]:
        """The subnet of a trial's parameters, of either space."""
        if any(name.startswith("prune.scales.") for name in parameters):
            return self._ranked(parameters)
        wanted = [1 - parameters[f"prune.groups.{name}"] for name in self.groups]
        return tuple(int(np.abs(self.kept - one).argmin()) for one in wanted)

    def report(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """What a trial reports."""
        at = self.levels(parameters)
        excess = float(self.share[at]) / self.budget - 1
        return {
            "default": float(self.reward[at]),
            "accuracy": float(self.accuracy[at]),
            "macs": int(self.macs[at]),
            "share": float(self.share[at]),
            "feasible": excess <= 0,
            "broken_bounds": {"macs": excess} if excess > 0 else {},
        }

    def environment(self, names: list[str]) -> GraphEnvironment:
        """What AMC sees: the channel graph of the same net."""
        from nni_plugins.channels import ChannelGraph
        from nni_plugins.training.data import build_data
        from nni_plugins.training.models import build_model
        from nni_plugins.training.recipe import recipe_from_dict

        recipe = recipe_from_dict({**RECIPE, "prune": {"target": "channels"}})
        data = build_data(recipe)
        model = build_model(recipe, data.shape, data.classes, 0)
        return GraphEnvironment(recipe, model, ChannelGraph.watch(model, data.example), names, {"macs": self.budget})

    def _ranked(self, parameters: dict[str, Any]) -> tuple[int, ...]:
        """One ranking over all groups, down to the budget; each group then has the level that is nearest."""
        scores = [
            parameters[f"prune.scales.{name}"] * one + parameters[f"prune.shifts.{name}"]
            for name, one in zip(self.groups, self.scores, strict=True)
        ]
        thresholds = np.sort(np.concatenate(scores))

        def at(threshold: float) -> tuple[int, ...]:
            shares = [max(float((one > threshold).mean()), 1e-9) for one in scores]
            return tuple(int(np.abs(self.kept - share).argmin()) for share in shares)

        low, high = -1, len(thresholds) - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.share[at(thresholds[middle])] <= self.budget else (middle, high)
        return at(thresholds[high])


def hypervolume(points: np.ndarray) -> float:
    """The area that points (accuracy, share of MACs) dominate, from accuracy 0 and all MACs."""
    area, best = 0.0, 0.0
    order = points[np.argsort(points[:, 1], kind="stable")]
    edges = np.append(order[1:, 1], 1.0)
    for (accuracy, share), edge in zip(order, edges, strict=True):
        best = max(best, accuracy)
        area += best * (edge - share)
    return float(area)
