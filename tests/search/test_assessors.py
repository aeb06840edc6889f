"""NNI's assessors on what our trials report while they fine-tune: the objective after each epoch."""

from __future__ import annotations

import pytest
from nni.algorithms.hpo.curvefitting_assessor import CurvefittingAssessor
from nni.algorithms.hpo.medianstop_assessor import MedianstopAssessor
from nni.assessor import AssessResult

from nni_plugins.training.dense import prepare_dense
from nni_plugins.training.pipeline import compress
from nni_plugins.training.recipe import recipe_from_dict

TREE = {
    "model": {"name": "small_cnn", "arguments": {"widths": [8, 16]}},
    "data": {"limit": 600},
    "train": {"epochs": 6, "threads": 1},
    "finetune": {"epochs": 8, "learning_rate": 0.02},
    "objective": {"macs": 0.6},
}


@pytest.fixture(scope="module")
def histories(tmp_path_factory):
    """What trials report: two that learn, and one whose learning rate is far too small for what was taken away."""
    home = tmp_path_factory.mktemp("trials")
    found = []
    for changes in ({}, {"seed": 1}, {"finetune.learning_rate": 1e-7, "prune.sparsity": 0.85}):
        recipe = recipe_from_dict(TREE).with_values(changes)
        seen: list[float] = []
        compress(recipe, home / str(len(found)), prepare_dense(recipe, home / "dense", lambda line: None), seen.append)
        found.append(seen)
    return found


def test_each_epoch_is_one_number(histories):
    assert [len(history) for history in histories] == [8, 8, 8]
    assert all(isinstance(value, float) for history in histories for value in history)
    assert histories[0][-1] > 0.8 > histories[2][-1]


def test_median_stop(histories):
    assessor = MedianstopAssessor(optimize_mode="maximize", start_step=2)
    for number, history in enumerate(histories[:2]):
        assert assessor.assess_trial(str(number), history) is AssessResult.Good
        assessor.trial_end(str(number), True)
    assert assessor.assess_trial("slow", histories[2][:4]) is AssessResult.Bad


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::scipy.optimize.OptimizeWarning")
def test_curve_fitting(histories):
    assessor = CurvefittingAssessor(epoch_num=8, start_step=5, threshold=0.95)
    assert assessor.assess_trial("a", histories[0]) is AssessResult.Good
    assessor.trial_end("a", True)
    assert assessor.assess_trial("slow", histories[2][:6]) is AssessResult.Bad
