"""``prune.round_to: auto``: of several multiples, the one that makes most of the saving in MACs one of time.

Each candidate is pruned by the recipe, made compact and timed, dense and compact models in turns, so that a busy moment
hits all of them. What can be measured decides, and not what a kernel is said to like.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from nni_plugins.training.checkpoint import seed_everything
from nni_plugins.training.errors import CompressionError, first_line
from nni_plugins.training.loop import Loop
from nni_plugins.training.measure import in_turns
from nni_plugins.training.prune import NONE, prune
from nni_plugins.training.recipe import Recipe
from nni_plugins.training.sections import AUTO

if TYPE_CHECKING:
    from nni_plugins.channels import ChannelGraph

CANDIDATES = (1, 4, 8, 16)
NEAR = 0.05
"""Quotients nearer than this count as equal, and the smaller multiple, which binds the pruner less, is taken."""


@dataclass(frozen=True)
class Tried:
    """One multiple.

    Attributes
    ----------
    round_to
        Which.
    macs, time
        Of the compact model, in shares of the dense one's.
    realised
        ``(1 − time) / (1 − macs)``: how much of the saving in MACs is one of time.
    note
        Why there are no figures.
    """

    round_to: int
    macs: float | None = None
    time: float | None = None
    realised: float | None = None
    note: str = ""


def choose(recipe: Recipe, model: nn.Module, loop: Loop, graph: ChannelGraph) -> tuple[int, list[Tried]]:
    """Prune by each candidate, time what it leaves, and say which is best.

    Parameters
    ----------
    recipe
        Its ``prune`` section.
    model
        The dense model; it is not changed.
    loop
        Drives pruners that look at data.
    graph
        The model's channels.

    Returns
    -------
    tuple
        The best multiple, and all that were tried.

    Raises
    ------
    CompressionError
        No candidate meets the budget.
    """
    if recipe.prune.pruner == NONE:
        return 1, []
    dense_macs = graph.cost().macs
    models: dict[int, nn.Module] = {}
    notes: dict[int, str] = {}
    shares: dict[int, float] = {}
    for multiple in CANDIDATES:
        try:
            models[multiple], macs = compact_of(fixed(recipe, multiple), model, loop, graph)
            shares[multiple] = macs / dense_macs
        except CompressionError as error:
            notes[multiple] = first_line(error)
    if not models:
        raise CompressionError(
            f"prune.round_to: auto: no multiple of {', '.join(map(str, CANDIDATES))} fits: {notes[1]}"
        )
    times = in_turns([model, *models.values()], loop.place(loop.data.example))
    found = {}
    for multiple, taken in zip(models, times[1:], strict=True):
        ratio, macs = taken / times[0], shares[multiple]
        realised = (1 - ratio) / (1 - macs) if macs < 1 else None
        found[multiple] = Tried(multiple, macs, ratio, realised, "" if macs < 1 else "it removes nothing")
    tried = [found.get(multiple) or Tried(multiple, note=notes[multiple]) for multiple in CANDIDATES]
    return best(tried), tried


def best(tried: list[Tried]) -> int:
    """Return the multiple of which most of the saving is real; of near ones, or where none is real, the smallest."""
    real = {one.round_to: one.realised for one in tried if one.realised is not None}
    most = max(real.values(), default=0.0)
    if most <= 0:
        return min(one.round_to for one in tried if one.macs is not None)
    return min(multiple for multiple, realised in real.items() if realised >= most - NEAR)


def said(chosen: int, tried: list[Tried]) -> dict[str, Any]:
    """What ``metrics.json`` says of it."""
    return {"chosen": chosen, "tried": [dataclasses.asdict(one) for one in tried]}


def fixed(recipe: Recipe, chosen: int) -> Recipe:
    """Return the recipe with the multiple that was chosen."""
    return recipe.with_values({"prune.round_to": chosen}) if recipe.prune.round_to == AUTO else recipe


def compact_of(recipe: Recipe, model: nn.Module, loop: Loop, graph: ChannelGraph) -> tuple[nn.Module, float]:
    """Prune a copy of a model and make it compact, without training; return it and its MACs.

    Raises
    ------
    CompressionError
        The budget is out of reach.
    """
    from nni_plugins.channels import ChannelGraph
    from nni_plugins.speedup import ModelSpeedup

    example = loop.place(loop.data.example)
    made = copy.deepcopy(model)
    seed_everything(recipe.seed + 1)  # what the pipeline will begin with
    pruned = prune(recipe, made, loop, graph)
    made.eval()
    try:
        compact = ModelSpeedup(made, example, pruned.masks, exact_only=recipe.prune.exact_only).speedup_model()
    except ValueError as error:
        raise CompressionError(f"speedup: {first_line(error)}") from error
    return compact.eval(), ChannelGraph.watch(compact, example).cost().macs
