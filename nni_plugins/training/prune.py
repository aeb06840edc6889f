"""The prune step: a recipe's pruner on a model, ours, NNI's or the user's, by one way."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nni_plugins.training.allocate import affine, config_list
from nni_plugins.training.errors import CompressionError, RecipeError, first_line, where
from nni_plugins.training.loop import Loop
from nni_plugins.training.recipe import Recipe
from nni_plugins.training.schema import closest

if TYPE_CHECKING:
    from nni_plugins.channels import ChannelGraph, Plan

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
    settings, maker = recipe.prune, pruner_class(recipe)
    entries, target = config_list(settings, model, graph)
    parameters = inspect.signature(maker).parameters
    anything = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters.values())
    offered = {
        "evaluator": lambda: RecipeEvaluator(loop),
        "dummy_input": lambda: loop.place(loop.data.example),
        "scope": lambda: "local" if settings.groups and settings.target != "channels" else settings.scope,
        "target": lambda: target,
        "round_to": lambda: settings.round_to,
        "exact_only": lambda: settings.exact_only,
        "seed": lambda: recipe.seed,
        "affine": lambda: affine(settings),
        "compact": lambda: 0.0,  # channels are taken out by the speedup, and masks fit the model as it is built
    }
    if "compact" in parameters and settings.arguments.get("compact"):
        raise RecipeError("prune.arguments.compact: a recipe takes channels out by its speedup; leave it out")
    if "affine" not in parameters and (settings.scales or settings.shifts):
        given = "scales" if settings.scales else "shifts"
        raise RecipeError(f"prune.{given}: {settings.pruner} ranks no channel groups; leave it out")
    for name in settings.arguments:
        if name in ("model", "config_list") or (name not in parameters and not anything):
            known = [item for item in parameters if item not in ("model", "config_list", *offered)]
            raise RecipeError(f"prune.arguments.{name} is not an argument of {settings.pruner}; {closest(name, known)}")
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
