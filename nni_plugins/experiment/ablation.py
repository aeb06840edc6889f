"""What the teacher added: the winner's recipe once more without it, on the test split beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nni_plugins.experiment.folders import METRICS, read_json

if TYPE_CHECKING:
    from nni_plugins.training import DenseBaseline, Recipe

ABLATION = "ablation"
ALONE = {"distill.method": "none", "quantize.method": "none", "export.formats": (), "search.mode": "full"}


def without_teacher(
    recipe: Recipe, compact: Path, folder: Path, dense: DenseBaseline, say: Callable[[str], Any]
) -> dict[str, float] | None:
    """Fine-tune without the teacher, and read the test split for both.

    Parameters
    ----------
    recipe
        The winner's. Nothing is done where it has no teacher, or where ``distill.ablation`` says so.
    compact
        The winner's compact model in float.
    folder
        Where the other one goes; what is there already is not made again.
    dense
        The dense baseline of both.
    say
        Called with one line.

    Returns
    -------
    dict or None
        ``with_teacher`` and ``alone``: the test metric.
    """
    from nni_plugins.training import compress, evaluate_test, load_recipe
    from nni_plugins.training.errors import NoTestSplit

    if recipe.distill.method == "none" or not recipe.distill.ablation or recipe.finetune.epochs == 0:
        return None
    multiple = (read_json(compact.parent / METRICS) or {}).get("round_to") or {}
    same = {"prune.round_to": multiple["chosen"]} if multiple else {}  # what was chosen by timing is not chosen again
    alone = recipe.with_values(ALONE | same)
    known = read_json(folder / METRICS)
    if known is None or load_recipe(folder / "recipe.yml") != alone:
        say(f"fine-tuning once more without the teacher (distill.method: {recipe.distill.method})")
        compress(alone, folder, dense)
    try:
        return {
            "with_teacher": float(evaluate_test(recipe, compact)["accuracy"]),
            "alone": float(evaluate_test(alone, folder / "compact.safetensors")["accuracy"]),
        }
    except NoTestSplit:
        return None
