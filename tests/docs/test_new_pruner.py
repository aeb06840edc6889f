"""The page on adding a pruner: its code is run, and does what it says."""

import re
from pathlib import Path

import pytest
import torch

from tests.pruners.conftest import digits, make_evaluator  # noqa: F401
from tests.pruners.nets import X, make
from tests.pruners.resuming import assert_resumes

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "new-pruner.md"
CONFIG = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


@pytest.fixture(scope="module")
def names():
    """What the page's code defines, run from top to bottom, with a net and an input given."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 3
    found = {"__name__": "page", "model": make("residual"), "x": X}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), found)
    return found


def test_the_method_is_short(names):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks[0].splitlines()) <= 60


def test_the_budget_of_the_page_is_met(names):
    plan = names["pruner"].plan
    assert plan.cost().macs / names["pruner"].graph.cost().macs == pytest.approx(0.5, abs=0.02)
    assert sum(p.numel() for p in names["compact"].parameters()) == plan.cost().params


def test_scores_are_distances_to_the_other_units(names):
    net = make("plain")
    weight = net.conv1.weight.detach().double().flatten(1)
    pruner = names["MedianPruner"](net, CONFIG, dummy_input=X)
    pruner.compress()
    expected = torch.stack([(weight - row).norm(dim=1).sum() for row in weight])
    torch.testing.assert_close(pruner.scores["conv1"], expected, rtol=1e-6, atol=1e-5)


def test_the_one_that_watches_training_averages_and_resumes(names, digits, tmp_path):  # noqa: F811
    def net():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(), torch.nn.Linear(8, 10),
        )  # fmt: skip

    def pruner(model, evaluator):
        return names["AveragedMedianPruner"](model, CONFIG, evaluator, training_steps=6)

    assert_resumes(net, pruner, digits, tmp_path / "state.pt", 4)
