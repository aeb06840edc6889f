"""Masks for models that other libraries pruned: zeros in weights, and torch's own pruning."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from nni_plugins.speedup import ModelSpeedup, masks_of_torch_prune, masks_of_zeros
from tests.random_networks import trained_like

X = torch.randn(4, 3, 6, 6, dtype=torch.float64)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.a, self.n1 = nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.b, self.n2 = nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.hidden, self.head = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(self.n2(self.b(F.relu(self.n1(self.a(x))))) + x)
        return self.head(F.relu(self.hidden(x.mean((2, 3)))))


def make():
    torch.manual_seed(0)
    model = Net().double()
    trained_like(model)
    return model.eval()


def sizes(model):
    return model.stem.out_channels, model.a.out_channels, model.hidden.out_features


def speedup_equals(model, masks, left):
    expected = copy.deepcopy(model)(X)
    speedup = ModelSpeedup(model, X, masks)
    compact = speedup.speedup_model()
    assert sizes(compact) == left
    assert not speedup.report.inexact
    assert (compact(X) - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_zeros_in_weights():
    model = make()
    with torch.no_grad():
        model.stem.weight[[1, 4]] = 0
        model.b.weight[[1, 4, 5]] = 0
        model.b.weight[:, 2] = 0
        model.hidden.weight[3:9] = 0
    masks = masks_of_zeros(model)
    assert {name: sorted(targets) for name, targets in masks.items()} == {
        "stem": ["weight"], "b": ["weight"], "hidden": ["weight"],
    }  # fmt: skip
    assert masks["hidden"]["weight"].dtype == torch.float64
    speedup_equals(model, masks, (6, 5, 10))


def test_almost_zeros():
    model = make()
    with torch.no_grad():
        model.hidden.weight[3:9] *= 1e-9
        model.hidden.bias[3:9] = 0
    assert masks_of_zeros(model) == {"hidden": {"bias": pytest.approx((model.hidden.bias != 0).double())}}
    masks = masks_of_zeros(model, threshold=1e-6)
    assert (masks["hidden"]["weight"] == 0).all(1).sum() == 6
    with torch.no_grad():
        model.hidden.weight[3:9] = 0
    speedup_equals(model, masks, (8, 6, 10))


def test_what_only_started_at_zero_is_not_taken_for_pruned():
    """A residual block's last norm that starts at zero, biases that do: training would have changed them."""
    model = make()
    with torch.no_grad():
        model.n2.weight.zero_()
        model.head.bias.zero_()
        model.hidden.bias.zero_()
    assert masks_of_zeros(model) == {}
    with torch.no_grad():
        model.hidden.weight[:4] = 0
    masks = masks_of_zeros(model)
    assert masks["hidden"]["bias"].tolist() == [0] * 4 + [1] * 12  # where its rows are zero, a bias counts as pruned
    speedup_equals(model, masks, (8, 6, 12))


def test_a_negative_threshold_is_refused():
    for threshold in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=r"threshold is .*; it must be 0 or more"):
            masks_of_zeros(make(), threshold)


def test_the_model_is_not_changed():
    model = make()
    before = copy.deepcopy(model.state_dict())
    masks = masks_of_zeros(model, 0.1)
    assert masks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def pruned_by_torch(model):
    prune.ln_structured(model.stem, "weight", 0.25, n=1, dim=0)
    gone = torch.where((model.stem.weight_mask == 0).flatten(1).all(1))[0]
    mask = torch.ones(8, 6, 1, 1, dtype=torch.float64)
    mask[gone] = 0
    prune.custom_from_mask(model.b, "weight", mask)
    prune.ln_structured(model.b, "weight", 0.5, n=1, dim=1)  # a second one, over the first
    prune.ln_structured(model.hidden, "weight", 0.5, n=2, dim=0)
    rows = (model.hidden.weight_mask != 0).any(1).double()
    prune.custom_from_mask(model.hidden, "bias", rows)
    prune.l1_unstructured(model.head, "weight", 0.1)
    return model


def test_torchs_own_pruning():
    model = pruned_by_torch(make())
    model(X)
    expected = model(X)
    order = [name for name, _ in make().named_parameters()]
    masks = masks_of_torch_prune(model)
    assert sorted(masks) == ["b", "head", "hidden", "stem"]
    assert sorted(masks["hidden"]) == ["bias", "weight"]
    assert not prune.is_pruned(model)
    assert sorted(name for name, _ in model.named_parameters()) == sorted(order)
    assert torch.equal(model(X), expected)
    speedup_equals(model, masks, (6, 3, 8))


def test_torchs_own_pruning_is_named_where_it_is_given_as_it_is():
    model = pruned_by_torch(make())
    before = copy.deepcopy(model.state_dict())
    for masks in ({}, {"a": {"weight": torch.ones(6, 8, 1, 1)}}):
        with pytest.raises(ValueError, match=r"stem.weight is masked by torch.nn.utils.prune; .*masks_of_torch_prune"):
            ModelSpeedup(model, X, masks)
    assert prune.is_pruned(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="nothing in the model is masked by"):
        masks_of_torch_prune(make())


def test_parametrisations_that_do_not_prune_are_no_concern():
    model = make()
    nn.utils.parametrizations.weight_norm(model.hidden)
    mask = torch.ones(8, 3, 3, 3)
    mask[0] = 0
    expected = copy.deepcopy(model)
    ModelSpeedup(model, X, {"a": {"weight": torch.ones(6, 8, 1, 1)}}).speedup_model()
    assert torch.allclose(model(X), expected(X))
