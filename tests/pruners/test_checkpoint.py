import copy

import pytest
import torch
from torch import nn

from nni_plugins.pruners import MagnitudePruner, PruningError, RandomPruner, TaylorPruner

from .nets import X, make
from .resuming import assert_resumes

CONFIG = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
CUBIC = {"shape": "cubic", "times": 3, "interval_steps": 4, "start_step": 2}


def net(width=8):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 12, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
    )


@pytest.mark.parametrize("at", [1, 6, 9])
def test_magnitude_resumes_bit_for_bit(at, digits, tmp_path):
    def pruner(model, evaluator):
        return MagnitudePruner(model, CONFIG, evaluator, scope="global", schedule=CUBIC)

    assert_resumes(net, pruner, digits, tmp_path / "state.pt", at)


@pytest.mark.parametrize("at", [5, 8])
@pytest.mark.parametrize(
    "kind", [{}, {"variant": "gate", "order": 2}, {"variant": "activation"}], ids=["weight", "gate", "activation"]
)
def test_taylor_resumes_bit_for_bit(kind, at, digits, tmp_path):
    def pruner(model, evaluator):
        return TaylorPruner(model, CONFIG, evaluator, scope="global", schedule=CUBIC, **kind)

    assert_resumes(net, pruner, digits, tmp_path / "state.pt", at)


def test_a_state_is_a_copy_and_brings_masks_plan_and_scores_back():
    first = MagnitudePruner(net(), CONFIG, dummy_input=torch.zeros(1, 1, 8, 8))
    before = first.state_dict()
    masks = copy.deepcopy(before["masks"])
    first.compress()
    assert all(torch.equal(before["masks"][m][t], mask) for m in masks for t, mask in masks[m].items())
    model = net()
    second = MagnitudePruner(model, CONFIG, dummy_input=torch.zeros(1, 1, 8, 8))
    second.load_state_dict(first.state_dict())
    assert second.finished
    assert {k: v.tolist() for k, v in second.plan.kept.items()} == {k: v.tolist() for k, v in first.plan.kept.items()}
    assert torch.equal(second.scores["0"], first.scores["0"])
    assert torch.equal(model[0]._nni_wrapper.weight_mask, first.get_masks()["0"]["weight"])


def test_another_class_other_shapes_and_other_things_are_refused_in_one_line():
    x = torch.zeros(1, 1, 8, 8)
    state = MagnitudePruner(net(), CONFIG, dummy_input=x).state_dict()
    wide = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    for pruner, given, message in (
        (RandomPruner(net(), CONFIG, dummy_input=x), state, "the state is of MagnitudePruner, this is RandomPruner"),
        (MagnitudePruner(net(10), wide, dummy_input=x), state, r"0\.weight: the saved mask has shape \[8, 1, 3, 3\]"),
        (MagnitudePruner(make("plain"), CONFIG, dummy_input=X), state, "is a target of"),
        (MagnitudePruner(net(), CONFIG, dummy_input=x), {"masks": {}}, "no state of a pruner"),
        (MagnitudePruner(net(), CONFIG, dummy_input=x), None, "no state of a pruner"),
        (MagnitudePruner(net(), CONFIG, dummy_input=x), {**state, "attributes": {}}, "another version"),
    ):
        before = pruner.get_masks()
        with pytest.raises(PruningError, match=message) as error:
            pruner.load_state_dict(given)
        assert "\n" not in str(error.value)
        after = pruner.get_masks()
        assert all(torch.equal(mask, after[m][t]) for m in before for t, mask in before[m].items() if mask is not None)


def test_a_subclass_adds_to_what_its_bases_keep():
    class Counting(RandomPruner):
        _kept_state = ("seen", "optimizer")

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.seen = {"times": 0, "at": [(1, torch.ones(2))]}
            self.optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.5, momentum=0.9)

    x = torch.zeros(1, 1, 8, 8)
    one, two = (Counting(net(), CONFIG, dummy_input=x) for _ in range(2))
    one.seen["times"] = 3
    one.optimizer.param_groups[0]["lr"] = 0.1
    state = one.state_dict()
    assert {"scores", "_kept_units", "seen"} <= set(state["attributes"])
    two.load_state_dict(state)
    assert two.seen["times"] == 3
    assert isinstance(two.seen["at"][0], tuple)
    assert two.optimizer.param_groups[0]["lr"] == 0.1
    one.seen = object()
    with pytest.raises(PruningError, match="seen holds a object"):
        one.state_dict()
