"""The recipe and what runs it: data, models, one training loop, and the way from dense to compact model.

Names are imported when first used, so that reading a recipe imports neither torch nor NNI.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nni_plugins.training.artefacts import evaluate_test
    from nni_plugins.training.data import Data, build_data
    from nni_plugins.training.dense import DenseBaseline, prepare_dense
    from nni_plugins.training.errors import CompressionError, RecipeError
    from nni_plugins.training.loop import Loop
    from nni_plugins.training.measure import latency_ms
    from nni_plugins.training.models import build_model
    from nni_plugins.training.pipeline import compress
    from nni_plugins.training.recipe import Recipe, load_recipe, recipe_from_dict

_HOMES = {
    "Data": "data",
    "build_data": "data",
    "DenseBaseline": "dense",
    "prepare_dense": "dense",
    "CompressionError": "errors",
    "RecipeError": "errors",
    "Loop": "loop",
    "latency_ms": "measure",
    "build_model": "models",
    "compress": "pipeline",
    "evaluate_test": "artefacts",
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "recipe_from_dict": "recipe",
}

__all__ = [
    "CompressionError",
    "Data",
    "DenseBaseline",
    "Loop",
    "Recipe",
    "RecipeError",
    "build_data",
    "build_model",
    "compress",
    "evaluate_test",
    "latency_ms",
    "load_recipe",
    "prepare_dense",
    "recipe_from_dict",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
