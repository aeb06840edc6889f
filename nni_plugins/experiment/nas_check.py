"""Load compact models in a process that has nothing else of them, and evaluate each on validation again.

    python -m nni_plugins.experiment.nas_check FOLDER ...

A folder holds ``compact.safetensors``, ``recipe.yml`` and ``metrics.json``; the validation metric has to be the one
that the trial reported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from nni_plugins.experiment.folders import METRICS, read_json

TOLERANCE = 0.005  # another machine may round otherwise, and turn an image or two


def check(folder: Path) -> str:
    """Return what was found, in a line.

    Raises
    ------
    ValueError
        It is another model.
    """
    from nni_plugins.training.artefacts import COMPACT, load_model
    from nni_plugins.training.data import build_data
    from nni_plugins.training.loop import Loop
    from nni_plugins.training.recipe import load_recipe

    recipe, metrics = load_recipe(folder / "recipe.yml"), read_json(folder / METRICS) or {}
    data = build_data(recipe)
    loop = Loop(recipe, data, "check")
    model = loop.place(load_model(recipe, data, folder / COMPACT))
    params, value = sum(p.numel() for p in model.parameters()), loop.evaluate(model)
    if params != metrics["params"]:
        raise ValueError(f"{folder}: the model that was loaded has {params:,} parameters, not {metrics['params']:,}")
    if not abs(value - metrics["accuracy"]) <= TOLERANCE * max(1.0, abs(metrics["accuracy"])):
        raise ValueError(f"{folder}: loaded again its {loop.metric.name} is {value:.4f}, not {metrics['accuracy']:.4f}")
    return f"{folder.name}: loaded again in a process of its own: {loop.metric.name} {value:.4f}, {params:,} parameters"


def main(arguments: Sequence[str] | None = None) -> int:
    """Check each folder; 1 with a line on standard error if one is not what it was."""
    for name in sys.argv[1:] if arguments is None else arguments:
        try:
            print(check(Path(name)))
        except (ValueError, KeyError, OSError, RuntimeError) as error:
            print(" ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
