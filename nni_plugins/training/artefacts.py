"""What a compression leaves in its folder, and how it is read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from nni_plugins.files import write_whole
from nni_plugins.training.data import Data, build_data
from nni_plugins.training.errors import CompressionError, first_line
from nni_plugins.training.loop import Loop
from nni_plugins.training.models import build_model
from nni_plugins.training.prune import Masks
from nni_plugins.training.recipe import Recipe
from nni_plugins.training.weights import load_weights

COMPACT, MASKED, MASKS = "compact.safetensors", "masked.safetensors", "masks.safetensors"
PLAN, METRICS, RECIPE = "plan.json", "metrics.json", "recipe.yml"
RANKING, GRIDS = "ranking.json", "grids.json"


def evaluate_test(recipe: Recipe, path: str | Path) -> dict[str, Any]:
    """Evaluate a finished model on the test split: the only reader of that split.

    Parameters
    ----------
    recipe
        Of the model.
    path
        A compact model (``compact.safetensors``), an ONNX file, or dense weights (:attr:`DenseBaseline.path`).

    Returns
    -------
    dict
        ``accuracy`` (``train.metric`` on the test split), ``metric`` (its name) and ``higher_is_better``.
    """
    data = build_data(recipe)
    loop = Loop(recipe, data, "test")
    model = loop.place(load_model(recipe, data, Path(path)))
    value = loop.evaluate(model, data.read_test())
    return {"accuracy": value, "metric": loop.metric.name, "higher_is_better": loop.metric.higher_is_better}


def load_model(recipe: Recipe, data: Data, path: Path) -> nn.Module:
    """Read a compact model, an ONNX file, or dense weights, of a recipe."""
    if path.suffix == ".onnx":
        from nni_plugins.training.export import OnnxModel

        return OnnxModel(path)
    from safetensors import safe_open

    from nni_plugins.speedup import load_compact

    def build() -> nn.Module:
        return build_model(recipe, data.shape, data.classes, recipe.seed)

    try:
        with safe_open(path, "pt") as file:
            compact = bool(file.metadata())
    except Exception as error:  # safetensors has its own kinds
        raise CompressionError(f"{path} cannot be read as a model: {first_line(error)}") from error
    if compact:
        try:
            return load_compact(path, build)
        except ValueError as error:
            raise CompressionError(first_line(error)) from error
    model = build()
    load_weights(model, path)
    return model


def save_masks(masks: Masks, path: Path) -> None:
    """Write masks as safetensors of bools, named ``module.parameter``."""
    from safetensors.torch import save_file

    flat = {
        f"{module}.{name}" if module else name: (mask != 0).cpu().contiguous()
        for module, targets in masks.items()
        for name, mask in targets.items()
    }
    write_whole(path, lambda part: save_file(flat, part))


def load_masks(path: str | Path) -> Masks:
    """Read masks back in NNI's shapes, as floats."""
    from safetensors.torch import load_file

    masks: Masks = {}
    for key, mask in load_file(path).items():
        module, _, name = key.rpartition(".")
        masks.setdefault(module, {})[name] = mask.float()
    return masks
