"""Rank allocations without training them: prune, refresh batch-norm statistics, look at validation.

Li et al., "EagleEye: Fast Sub-net Evaluation for Efficient Neural Network Pruning", ECCV 2020: the accuracy of a pruned
model whose batch-norm statistics are its own tells how good it will be once it is fine-tuned; with the dense model's
statistics it tells next to nothing.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from nni_plugins.training.allocate import Latency, fit, group_ratios, prunable_groups, whole
from nni_plugins.training.errors import CompressionError
from nni_plugins.training.loop import Loop
from nni_plugins.training.prune import Masks, Pruned, apply_masks, prune
from nni_plugins.training.recalibrate import recalibrate
from nni_plugins.training.recipe import Recipe

if TYPE_CHECKING:
    from nni_plugins.channels import ChannelGraph


@dataclass(frozen=True)
class Ranked:
    """One allocation that was tried.

    Attributes
    ----------
    sparsities
        Share of its units that each group loses, by group name.
    metric
        ``train.metric`` on validation, recalibrated.
    macs, params
        Its cost.
    """

    sparsities: dict[str, float]
    metric: float
    macs: int
    params: int


def rank(
    recipe: Recipe, model: nn.Module, loop: Loop, graph: ChannelGraph, say: Callable[[str], Any] | None = None
) -> tuple[Pruned, list[Ranked]]:
    """Try allocations under the budget of the prune section, and prune the model by the best.

    Each group is given a sparsity between ``rank.lowest`` and ``rank.highest`` at random (one for all groups below a
    prefix that ``prune.groups`` names); all are scaled together to ``prune.sparsity`` of ``prune.target``. The first
    candidate is what the prune section says by itself. Which units a group loses, its pruner's scores say: they are
    measured once.

    Parameters
    ----------
    recipe
        Its ``prune`` and ``rank`` sections, and the seed.
    model
        The dense model; in the end its weights are zero where the best candidate's masks are.
    loop
        Evaluates.
    graph
        The model's channels.
    say
        Called with one line at a time.

    Returns
    -------
    tuple
        The best candidate, and all of them, best first.

    Raises
    ------
    CompressionError
        The pruner gives no scores of whole groups, or no candidate meets the budget.
    """
    from nni_plugins.channels import Plan

    settings, better = recipe.rank, loop.metric.better
    first = prune(dataclasses.replace(recipe, rank=type(settings)()), copy.deepcopy(model), loop, graph)
    if first.plan is None or not first.scores:
        raise CompressionError(
            f"rank: {recipe.prune.pruner} scores no channel groups, so no allocations can be ranked; use one of our "
            "pruners of channels (magnitude, taylor, random)"
        )
    scores = {name: score.detach().cpu().numpy() for name, score in first.scores.items()}
    tried: list[tuple[Ranked, Masks, Plan]] = []
    latency: Latency | None = None
    if recipe.prune.target == "latency":
        from nni_plugins.pruners.targets import latency_table

        table = latency_table(graph, model, loop.place(loop.data.example), None)
        latency = lambda kept: table.total_ms(graph.cost_model.counts(kept))  # noqa: E731

    def consider(plan: Plan) -> None:
        trial = copy.deepcopy(model)
        masks = plan.masks(trial)
        apply_masks(trial, masks)
        recalibrate(trial, loop, settings.batches)
        cost, value = plan.cost(), float(loop.evaluate(trial))
        lost = {name: 1 - len(units) / graph.group(name).size for name, units in plan.kept.items()}
        tried.append((Ranked(lost, value, int(cost.macs), int(cost.params)), masks, plan))

    consider(Plan(graph, first.plan.kept))
    random = np.random.default_rng(recipe.seed)
    seen = {str(tried[0][2].counts)}
    for _ in range(20 * settings.candidates):
        if len(tried) >= settings.candidates:
            break
        counts = _sample(recipe, model, graph, random, scores, latency)
        if str(counts) in seen:
            continue
        seen.add(str(counts))
        consider(
            Plan(
                graph, {name: np.sort(np.argsort(-scores[name], kind="stable")[:kept]) for name, kept in counts.items()}
            )
        )
    tried.sort(key=lambda item: -better(item[0].metric) if np.isfinite(item[0].metric) else np.inf)
    best, masks, plan = tried[0]
    if say is not None:
        say(f"rank: {len(tried)} allocations, {loop.metric.name} {tried[-1][0].metric:.4f} to {best.metric:.4f}")
    apply_masks(model, masks)
    return Pruned(masks, plan, first.scores), [item[0] for item in tried]


def _sample(
    recipe: Recipe, model: nn.Module, graph: ChannelGraph, random: np.random.Generator, scores: dict[str, Any],
    latency: Latency | None,
) -> dict[str, int]:  # fmt: skip
    """Return how many units each group keeps in one random allocation that meets the budget."""
    settings, ranks = recipe.prune, recipe.rank
    groups = [group for group in prunable_groups(settings, model, graph) if group.name in scores]
    sizes = {group.name: group.size for group in groups}
    prefixes = {prefix: float(random.uniform(ranks.lowest, ranks.highest)) for prefix in settings.groups}
    drawn = {group.name: float(random.uniform(ranks.lowest, ranks.highest)) for group in groups}
    if prefixes:
        chosen = dataclasses.replace(settings, groups=prefixes)
        drawn = {**group_ratios(chosen, groups)}
    if settings.target == "channels":
        total = sum(sizes.values())
        scale = settings.sparsity * total / max(sum(drawn[name] * size for name, size in sizes.items()), 1e-9)
        kept = {name: whole(size, min(drawn[name] * scale, 0.95), settings) for name, size in sizes.items()}
    else:
        kept = fit(settings, graph, sizes, drawn, latency)
    return {name: count for name, count in kept.items() if count < sizes[name]}
