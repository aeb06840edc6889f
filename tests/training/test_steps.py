"""The order of steps: what cannot work is refused before anything is trained."""

from __future__ import annotations

import itertools

import pytest

from nni_plugins.training.errors import RecipeError
from nni_plugins.training.pipeline import STEPS as FUNCTIONS
from nni_plugins.training.recipe import recipe_from_dict
from nni_plugins.training.steps import STEPS, USUAL, check_order

GOOD = [
    USUAL,
    ("prune", "speedup"),
    ("prune", "speedup", "finetune"),
    ("prune", "finetune", "speedup", "export"),
    ("prune", "speedup", "finetune", "quantize", "export"),
    ("prune", "speedup", "quantize"),
    ("prune", "speedup", "export", "quantize"),
]
BAD = {
    ("quantize", "prune", "speedup"): "what pruning does to the ranges is not known before it",
    ("prune", "quantize", "speedup"): "quantize comes before speedup",
    ("prune", "speedup", "quantize", "finetune"): "finetune comes after quantize",
    ("speedup", "prune"): "speedup takes out what prune masks",
    ("finetune", "prune", "speedup"): "finetune comes before prune",
    ("prune", "speedup", "prune"): "stands there twice",
    ("prune", "finetune"): "speedup is missing",
    (): "prune is missing",
    ("prune", "export", "speedup"): "what is exported is the compact model",
    ("prune", "sped"): "sped is no step",
}


@pytest.mark.parametrize("steps", GOOD)
def test_orders_that_work(steps):
    check_order(steps)


@pytest.mark.parametrize(("steps", "says"), BAD.items())
def test_orders_that_do_not(steps, says):
    with pytest.raises(RecipeError, match=says) as error:
        check_order(steps)
    assert "\n" not in str(error.value)


def test_every_order_is_either_right_or_refused():
    for length in range(len(USUAL) + 1):
        for steps in itertools.permutations(USUAL, length):
            try:
                check_order(steps)
            except RecipeError:
                continue
            assert steps.index("prune") < steps.index("speedup")
            if "quantize" in steps:
                assert max(map(steps.index, {"prune", "speedup", "finetune"} & set(steps))) < steps.index("quantize")


def test_a_recipe_says_it_in_one_line():
    with pytest.raises(RecipeError, match=r"^recipe: steps: quantize comes before prune .*not known before it$"):
        recipe_from_dict({"steps": ["quantize", "prune", "speedup"]})
    with pytest.raises(RecipeError, match="steps: quantize is missing"):
        recipe_from_dict({"steps": ["prune", "speedup"], "quantize": {"method": "qat"}})
    with pytest.raises(RecipeError, match="steps: export is missing"):
        recipe_from_dict({"steps": ["prune", "speedup"], "export": {"formats": ["onnx"]}})


def test_what_would_be_exported_too_early_is_refused_where_both_are_asked_for():
    steps = ["prune", "speedup", "export", "quantize"]
    recipe_from_dict({"steps": steps, "export": {"formats": ["onnx"]}})
    with pytest.raises(RecipeError, match="the files would not be quantised"):
        recipe_from_dict({"steps": steps, "export": {"formats": ["onnx"]}, "quantize": {"method": "ptq"}})


def test_a_range_that_falls_is_refused():
    with pytest.raises(RecipeError, match=r"rank\.lowest is 0\.9; it must be below rank\.highest, 0\.8"):
        recipe_from_dict({"rank": {"lowest": 0.9}})


@pytest.mark.parametrize("method", ["kd", "dkd"])
def test_classes_are_not_distilled_where_there_are_none(method):
    recipe_from_dict({"distill": {"method": method}})
    with pytest.raises(RecipeError, match=f"distill.method is {method}.*train.loss mse has none; take feature"):
        recipe_from_dict({"distill": {"method": method}, "train": {"loss": "mse"}})
    recipe_from_dict({"distill": {"method": "feature"}, "train": {"loss": "mse"}})


def test_every_step_of_the_table_can_be_run():
    assert list(FUNCTIONS) == list(STEPS)
