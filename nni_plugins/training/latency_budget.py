"""``prune.target: latency`` that is met by the clock: what pruning leaves is timed, and asked for anew where it is off.

The latency table adds up operators that were timed alone; a whole model can take some per cent more or less. Dense and
compact models are timed in turns here, and the sparsity is corrected by what was found.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nni_plugins.pruners.ranks import as_on_rank_zero
from nni_plugins.training.allocate import group_ratios, prunable_groups
from nni_plugins.training.errors import CompressionError
from nni_plugins.training.loop import Loop
from nni_plugins.training.measure import in_turns
from nni_plugins.training.multiples import compact_of
from nni_plugins.training.recipe import Recipe

if TYPE_CHECKING:
    from nni_plugins.channels import ChannelGraph

NEAR, TRIES = 0.04, 4
"""What is this near to the budget, in shares of it, is not corrected; and how many models are made at most."""


@dataclass(frozen=True)
class Timed:
    """One model that was made.

    Attributes
    ----------
    sparsity
        What the pruner was asked for, by the table.
    time
        What the compact model takes, in shares of the dense one's time.
    """

    sparsity: float
    time: float


def meet(recipe: Recipe, model: nn.Module, loop: Loop, graph: ChannelGraph) -> list[Timed]:
    """Find the sparsity whose compact model takes the share of time that the recipe asks for.

    Parameters
    ----------
    recipe
        ``prune.sparsity`` is the share of time that must go.
    model
        The dense model; it is not changed.
    loop
        Drives pruners that look at data.
    graph
        The model's channels.

    Returns
    -------
    list of Timed
        All that were made, in order; :func:`nearest` is the one to take.

    Raises
    ------
    CompressionError
        The budget is out of reach for the table already.
    """
    budget = 1 - recipe.prune.sparsity
    sparsity, made = recipe.prune.sparsity, list[Timed]()
    example = loop.place(loop.data.example)
    while len(made) < TRIES:
        try:
            compact, _ = compact_of(corrected(recipe, sparsity, model, graph), model, loop, graph)
        except CompressionError:
            if not made:
                raise
            break  # nothing nearer can be had
        # each process would go on in its own way by a clock of its own
        dense_ms, compact_ms = as_on_rank_zero(in_turns([model, compact], example, torch.get_num_threads()))
        made.append(Timed(sparsity, compact_ms / dense_ms))
        if abs(made[-1].time / budget - 1) <= NEAR:
            break
        wanted = 1 - (1 - sparsity) * budget / made[-1].time
        if not 0 < wanted < 1:
            break
        sparsity = wanted
    return made


def corrected(recipe: Recipe, sparsity: float, model: nn.Module, graph: ChannelGraph) -> Recipe:
    """Return the recipe with another sparsity, spread over its ``prune.groups`` as before.

    Groups that ``prune.groups`` does not name take ``prune.sparsity`` as their part, which must not grow with it.
    """
    parts: dict[str, Any] = {}
    if recipe.prune.groups:
        parts = {"prune.groups": group_ratios(recipe.prune, prunable_groups(recipe.prune, model, graph))}
    return recipe.with_values({**parts, "prune.sparsity": sparsity})


def nearest(made: list[Timed], budget: float) -> Timed:
    """Return the model whose share of time is nearest to the budget."""
    return min(made, key=lambda one: abs(one.time - budget))


def said(asked: float, made: list[Timed]) -> dict[str, Any]:
    """What ``metrics.json`` says of it."""
    best = nearest(made, 1 - asked)
    return {"asked": 1 - asked, **dataclasses.asdict(best), "tried": [dataclasses.asdict(one) for one in made]}
