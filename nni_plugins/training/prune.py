"""The prune step: a recipe's pruner on a model, ours, NNI's or the user's, by one way."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nni_plugins.training.allocate import affine
from nni_plugins.training.errors import CompressionError, RecipeError, first_line, where
from nni_plugins.training.loop import Loop
from nni_plugins.training.methods import (
    GROUPS,
    WEIGHTS,
    Kind,
    check_arguments,
    check_settings,
    entries_of,
    kind_of,
    parameters_of,
)
from nni_plugins.training.recipe import Recipe
from nni_plugins.training.schema import closest
from nni_plugins.training.sections import AUTO

if TYPE_CHECKING:
    from nni_plugins.channels import ChannelGraph, Plan
    from nni_plugins.channels.latency import LatencyTable

OFFERED = ("evaluator", "dummy_input", "scope", "target", "round_to", "exact_only", "seed", "affine", "compact")
"""Arguments of a pruner that come from other fields of the recipe."""
Masks = dict[str, dict[str, Tensor]]
NONE = "none"  # the pruner that leaves the model whole


@dataclass
class Pruned:
    """What a pruner decided.

    Attributes
    ----------
    masks
        NNI's shapes: ``{module: {parameter: mask}}``, 1 where kept.
    plan
        Which units of each group are kept; None where NNI's pruners decided.
    scores
        How important each unit of each group was found to be; empty where NNI's pruners decided.
    """

    masks: Masks
    plan: Plan | None
    scores: dict[str, Tensor] = field(default_factory=dict)


def pruner_class(recipe: Recipe) -> Callable[..., Any]:
    """Return the class that ``prune.pruner`` names: in our registry, ``nni:ClassName``, or ``module:Class``."""
    name = recipe.prune.pruner
    if name.startswith("nni:"):
        import nni.compression.pruning as theirs

        known = [item for item in dir(theirs) if item.endswith("Pruner")]
        if name[4:] not in known:
            raise RecipeError(f"prune.pruner is {name}, which NNI does not have; {closest(name[4:], known)}")
        return getattr(theirs, name[4:])
    if ":" in name:
        from nni_plugins.training.resolve import resolve

        found = resolve(name, recipe.folder, "prune.pruner")
        if not callable(found):
            raise RecipeError(f"prune.pruner is {name}, which is not a class but {type(found).__name__}")
        return found
    from nni_plugins.pruners import PRUNERS

    if name not in list(PRUNERS):
        raise RecipeError(f"prune.pruner is {name}, which is no pruner; {closest(name, list(PRUNERS))}")
    return PRUNERS[name]


def check_prune(recipe: Recipe) -> tuple[Callable[..., Any], Kind, Mapping[str, inspect.Parameter]]:
    """Refuse what the pruner does not have, as far as the recipe alone says it; return the pruner and what it takes.

    Raises
    ------
    RecipeError
        No such pruner, or fields and arguments that it does not take.
    """
    settings, maker = recipe.prune, pruner_class(recipe)
    kind = kind_of(maker, settings.arguments)
    parameters = parameters_of(maker, kind)
    check_settings(settings, kind)
    if recipe.rank.candidates and kind is not GROUPS:
        raise RecipeError(
            f"rank.candidates: {settings.pruner} removes {kind.units}, and rank spreads channels; leave it out"
        )
    if "compact" in parameters and settings.arguments.get("compact"):
        raise RecipeError("prune.arguments.compact: a recipe takes channels out by its speedup; leave it out")
    if settings.round_to == AUTO and "round_to" not in parameters and not settings.groups:
        raise RecipeError(f"prune.round_to: {settings.pruner} does not round; leave it out")
    if "affine" not in parameters and (settings.scales or settings.shifts):
        given = "scales" if settings.scales else "shifts"
        raise RecipeError(f"prune.{given}: {settings.pruner} ranks no channel groups; leave it out")
    check_arguments(settings, parameters, OFFERED)
    return maker, kind, parameters


def prune(recipe: Recipe, model: nn.Module, loop: Loop, graph: ChannelGraph) -> Pruned:
    """Run the recipe's pruner on a trained model.

    Parameters
    ----------
    recipe
        Its ``prune`` section.
    model
        Left unwrapped, with its weights zero where masks are zero.
    loop
        Drives pruners that train or look at data.
    graph
        The model's channels.

    Raises
    ------
    RecipeError
        No such pruner, or arguments that it does not take.
    CompressionError
        The budget is out of reach.
    """
    from nni_plugins.training.evaluator import RecipeEvaluator

    if recipe.prune.pruner == NONE:
        from nni_plugins.channels import Plan

        return Pruned({}, Plan(graph, {}))
    if recipe.prune.round_to == AUTO:
        raise RecipeError("prune.round_to: auto is for nni-plugins compress and the trials of a search; write a number")
    maker, kind, parameters = check_prune(recipe)
    settings, example = recipe.prune, loop.place(loop.data.example)

    @functools.cache
    def latency() -> LatencyTable:
        from nni_plugins.pruners.targets import latency_table

        return latency_table(graph, model, example, None)

    entries, target = entries_of(
        settings, kind, model, graph, lambda kept: latency().total_ms(graph.cost_model.counts(kept))
    )
    spread = kind is GROUPS and settings.groups and settings.target != "channels"
    offered = {
        "evaluator": lambda: RecipeEvaluator(loop),
        "dummy_input": lambda: example,
        "scope": lambda: "local" if spread else settings.scope,
        "target": lambda: target,
        "round_to": lambda: settings.round_to,
        "exact_only": lambda: settings.exact_only,
        "seed": lambda: recipe.seed,
        "affine": lambda: affine(settings),
        "compact": lambda: 0.0,  # channels are taken out by the speedup, and masks fit the model as it is built
    }
    if kind is WEIGHTS and settings.arguments.get("density") not in (None, "global"):
        del offered["scope"]  # a density of each layer's own is a local scope
    arguments = {name: make() for name, make in offered.items() if name in parameters}
    arguments.update(settings.arguments)
    missing = [
        name
        for name, item in parameters.items()
        if item.default is inspect.Parameter.empty
        and item.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        and name not in ("model", "config_list", *arguments)
    ]
    if missing:
        raise RecipeError(f"prune.arguments.{missing[0]} is missing: {settings.pruner} needs it")
    try:
        try:
            pruner = maker(model, entries, **arguments)
        except (TypeError, AttributeError) as error:
            raise RecipeError(f"prune.arguments do not fit {settings.pruner}: {where(error)}") from error
        _, masks = pruner.compress()
        pruner.unwrap_model()
    except RecipeError:
        raise
    except (ValueError, AssertionError) as error:  # BudgetError of our pruners is a ValueError
        raise CompressionError(f"prune ({settings.pruner}): {first_line(error)}") from error
    masks = {
        module: {name: mask for name, mask in targets.items() if mask is not None} for module, targets in masks.items()
    }
    apply_masks(model, masks)
    scores = getattr(pruner, "scores", None)
    return Pruned(masks, getattr(pruner, "plan", None), dict(scores) if isinstance(scores, dict) else {})


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Masks) -> None:
    """Set masked weights to zero, in place."""
    for weight, mask in mask_pairs(model, masks):
        weight.mul_(mask)


def masks_left(model: nn.Module, masks: Masks) -> Masks:
    """Return what masks still mask in the model that they have been taken out of: single weights and kernels.

    Parameters
    ----------
    model
        Compact, just made: what is masked in it is zero.
    masks
        Of the whole model.
    """
    left: Masks = {}
    own = dict(model.named_parameters(remove_duplicate=False))
    for module, targets in masks.items():
        for name, mask in targets.items():
            parameter = own.get(f"{module}.{name}" if module else name)
            if parameter is not None and int((mask != 0).sum()) < parameter.numel():
                left.setdefault(module, {})[name] = (parameter.detach() != 0).to(parameter)
    return left


def mask_pairs(model: nn.Module, masks: Masks) -> list[tuple[Tensor, Tensor]]:
    """Return each masked parameter with its mask, on its device."""
    modules = dict(model.named_modules(remove_duplicate=False))
    pairs = []
    for module, targets in masks.items():
        for name, mask in targets.items():
            weight = getattr(modules[module], name, None)
            if weight is not None:
                pairs.append((weight, mask.to(weight)))
    return pairs
