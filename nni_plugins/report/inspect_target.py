"""What ``nni-plugins inspect`` looks at: a model by ``module:function``, by file, or by recipe, and an input for it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nni_plugins.report.inspect import InspectError
from nni_plugins.training.errors import CompressionError
from nni_plugins.training.loaders import map_tensors
from nni_plugins.training.loop import Loop, pick_device
from nni_plugins.training.models import build_model
from nni_plugins.training.recipe import load_recipe
from nni_plugins.training.resolve import call, resolve
from nni_plugins.training.weights import load_weights

RECIPES = (".yml", ".yaml")

_INPUT = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<sizes>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")


@dataclass
class Target:
    """A model and an input for it.

    Attributes
    ----------
    evaluate
        Returns the name of a recipe's metric, whether more is better, and its value for ``model`` on validation.
    """

    name: str
    model: nn.Module
    dummy_input: Any
    evaluate: Callable[[], tuple[str, bool, float]] | None = None

    def input_text(self) -> str:
        """Return shapes and types of the input: ``1x3x224x224, mask=1x16:int64``."""
        return input_text(self.dummy_input)


def find_target(
    name: str,
    inputs: Sequence[str] = (),
    inputs_function: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    checkpoint: Path | None = None,
    device: str | None = None,
) -> Target:
    """Build the model and its input.

    Parameters
    ----------
    name
        ``module:function``, ``folder/file.py:function`` or a recipe.
    inputs
        As in ``--input``: ``1x3x224x224``, ``name=1x16:int64``.
    inputs_function
        As in ``--inputs``: ``module:function`` that returns a dummy input.
    arguments
        Keyword arguments of the model's function.
    checkpoint
        Trained weights.
    device
        Where the model is put; by default where its function or the recipe puts it.

    Raises
    ------
    RecipeError, CompressionError
        With one line.
    """
    if inputs and inputs_function:
        raise InspectError("--input and --inputs are both given; one of them says what the model takes")
    given: Any = parse_inputs(inputs) if inputs else None
    if inputs_function:
        given = _called(inputs_function, "--inputs", {})
        if given is None:
            raise InspectError(f"--inputs {inputs_function} returned None; it must return what the model takes")
    if ":" not in name and not name.lower().endswith(RECIPES):
        raise InspectError(f"{name}: write module:function, path/to/file.py:function or a recipe (.yml)")
    if name.lower().endswith(RECIPES):
        return _from_recipe(name, given, dict(arguments or {}), checkpoint, device)
    if given is None:
        raise InspectError(
            f"{name}: say what the model takes: --input 1x3x224x224 (several times for several inputs), or "
            "--inputs module:function that returns an input"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _model(name, dict(arguments or {}))
    if checkpoint is not None:
        load_weights(model, checkpoint)
    if device is not None:
        place = _device(device)
        model, given = model.to(place), map_tensors(given, lambda tensor: tensor.to(place))
    return Target(name, model.eval(), given)


def named(reference: str, what: str) -> Any:
    """Import ``module:function`` or ``folder/file.py:function``."""
    place, colon, attribute = reference.rpartition(":")
    if not colon or not place or not attribute:
        raise InspectError(f"{what} {reference}: write module:function or path/to/file.py:function")
    if not place.endswith(".py"):
        return resolve(reference, None, what)
    path = Path(place).expanduser()
    if not path.is_file():
        raise InspectError(f"{what} {reference}: there is no file {path}")
    return resolve(f"{path.stem}:{attribute}", str(path.parent.absolute()), what)


def parse_inputs(specs: Sequence[str]) -> Any:
    """Return a dummy input as ``--input`` describes it: a tensor, a tuple of several, or a dict of named ones."""
    found = [_parse_input(spec) for spec in specs]
    names = [name for name, _ in found]
    if not any(names):
        tensors = tuple(tensor for _, tensor in found)
        return tensors[0] if len(tensors) == 1 else tensors
    if not all(names):
        raise InspectError("--input: either all inputs have a name (name=1x16) or none has")
    if len(set(names)) < len(names):
        raise InspectError(f"--input: {max(names, key=names.count)} is given twice")
    return {str(name): tensor for name, tensor in found}


def input_text(value: Any) -> str:
    """Return shapes and types of what stands in an input."""
    if isinstance(value, torch.Tensor):
        kind = "" if value.dtype == torch.float32 else f":{str(value.dtype).removeprefix('torch.')}"
        return "x".join(map(str, value.shape)) + kind
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={input_text(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(input_text, value))
    return type(value).__name__


def _parse_input(spec: str) -> tuple[str | None, torch.Tensor]:
    match = _INPUT.fullmatch(spec.strip())
    if match is None:
        raise InspectError(
            f"--input {spec}: write sizes as 1x3x224x224, with name= before them and :dtype after them where needed "
            "(mask=1x16:int64)"
        )
    shape = tuple(map(int, match["sizes"].split("x")))
    dtype = getattr(torch, match["dtype"] or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise InspectError(f"--input {spec}: {match['dtype']} is no type of torch; int64, bool or float16 would be")
    if 0 in shape or math.prod(shape) > 1 << 31:
        raise InspectError(f"--input {spec}: {'a size is 0' if 0 in shape else 'that is more than 2**31 numbers'}")
    if not dtype.is_floating_point:
        return match["name"], torch.ones(shape, dtype=dtype)
    return match["name"], torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _model(name: str, arguments: dict[str, Any]) -> nn.Module:
    found = named(name, "model")
    if isinstance(found, nn.Module):
        if arguments:
            raise InspectError(f"{name} is a model, not a function: it takes no --argument")
        return found
    model = _called(name, "model", arguments)
    if not isinstance(model, nn.Module):
        raise InspectError(f"{name} returned {type(model).__name__}; it must return a torch module")
    return model


def _called(reference: str, what: str, arguments: dict[str, Any]) -> Any:
    named(reference, what)
    place, _, attribute = reference.rpartition(":")
    if not place.endswith(".py"):
        return call(reference, None, what, **arguments)
    path = Path(place).expanduser()
    return call(f"{path.stem}:{attribute}", str(path.parent.absolute()), what, **arguments)


def _device(name: str) -> torch.device:
    try:
        return pick_device(name)
    except CompressionError:
        raise InspectError(f"--device {name} does not work here; cpu does") from None


def _from_recipe(
    name: str, given: Any, arguments: dict[str, Any], checkpoint: Path | None, device: str | None
) -> Target:
    from nni_plugins.training.data import build_data

    recipe = load_recipe(name)
    changes: dict[str, Any] = {f"model.arguments.{key}": value for key, value in arguments.items()}
    if device is not None:
        changes["train.device"] = device
    recipe = recipe.with_values(changes, "--argument" if arguments else "--device")
    data = build_data(recipe)
    loop = Loop(recipe, data, "inspect")
    model = build_model(recipe, data.shape, data.classes, recipe.seed)
    weights = checkpoint or (recipe.path_of(recipe.model.checkpoint) if recipe.model.checkpoint else None)
    if weights is not None:
        load_weights(model, weights)
    model = loop.place(model).eval()

    def evaluate() -> tuple[str, bool, float]:
        if weights is None:
            raise InspectError(
                f"{name}: --sensitivity needs trained weights: set model.checkpoint, or --checkpoint FILE"
            )
        return loop.metric.name, loop.metric.higher_is_better, loop.evaluate(model)

    return Target(name, model, loop.place(data.example if given is None else given), evaluate)
