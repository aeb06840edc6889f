"""The models that a recipe can name; each is a function of the data's shape, its classes and its own arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nni_plugins.training.errors import RecipeError
from nni_plugins.training.models.mobilenet import mobilenetv2
from nni_plugins.training.models.plain import mlp, small_cnn
from nni_plugins.training.models.resnet import resnet8, resnet20, resnet56
from nni_plugins.training.models.staged import staged
from nni_plugins.training.recipe import Recipe

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "small_cnn": small_cnn,
    "resnet8": resnet8,
    "resnet20": resnet20,
    "resnet56": resnet56,
    "mobilenetv2": mobilenetv2,
    "staged": staged,
}


def build_model(
    recipe: Recipe, shape: tuple[int, ...] | None = None, classes: int | None = None, seed: int | None = None
) -> nn.Module:
    """Build the dense model of a recipe, untrained.

    Parameters
    ----------
    recipe
        Its ``model`` section decides.
    shape, classes
        ``(channels, height, width)`` of the images and number of classes, which a shipped model needs unless
        ``model.arguments`` say them (``shape``, ``classes``). A user's function gets only ``model.arguments``.
    seed
        Seed of the weights; null leaves the random state of torch to decide. That state is untouched otherwise.

    Raises
    ------
    RecipeError
        A function that is not there, does not fit its arguments or does not return a module.
    """
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        model = _build(recipe, shape, classes)
    if not isinstance(model, nn.Module):
        raise RecipeError(f"model.name is {recipe.model.name}: it returned {type(model).__name__}, not a torch module")
    return model


def _build(recipe: Recipe, shape: tuple[int, ...] | None, classes: int | None) -> Any:
    name, arguments = recipe.model.name, dict(recipe.model.arguments)
    if ":" in name:
        from nni_plugins.training.resolve import call

        return call(name, recipe.folder, "model.name", **arguments)
    function = MODELS[name]
    known = list(inspect.signature(function).parameters)
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        from nni_plugins.training.schema import closest

        raise RecipeError(f"model.arguments.{unknown[0]} is not an argument of {name}; {closest(unknown[0], known)}")
    arguments = {"shape": shape, "classes": classes, **arguments}
    for key in ("shape", "classes"):
        if arguments[key] is None:
            raise RecipeError(f"model.arguments.{key} is missing: the data of {recipe.data.name} does not say it")
    try:
        return function(**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RecipeError(f"model.arguments do not fit {name}: {error}") from None
