"""Customised replacers: what they shrink in place is not shrunk again, and what they did can be taken back."""

import copy
import logging

import pytest
import torch
from nni.compression.speedup.replacer import DefaultReplacer, Replacer
from torch import nn

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.speedup import REPLACERS, ModelSpeedup
from tests.random_networks import trained_like

X = torch.randn(2, 3, 4, 4, 4)


@pytest.fixture(autouse=True)
def _quiet():
    level = logging.root.manager.disable
    logging.disable(logging.INFO)
    yield
    logging.disable(level)


def net():
    model = nn.Sequential(nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))
    trained_like(model)
    return model.eval()


def masks_of(model):
    return Plan(ChannelGraph.watch(model, X), {"0": [0, 2, 3, 6, 7]}).masks(model)


def masked_output(model, masks):
    model = copy.deepcopy(model)
    for module, targets in masks.items():
        for target, mask in targets.items():
            getattr(model.get_submodule(module), target).data.mul_(mask)
    return model(X)


def test_replacers_that_slice_in_place():
    model = net()
    masks = masks_of(model)
    expected = masked_output(model, masks)
    norm = model[1]
    compact = ModelSpeedup(model, X, masks, customized_replacers=REPLACERS).speedup_model()
    assert compact[1] is norm
    assert (compact[0].out_channels, norm.num_features, compact[4].in_features) == (5, 5, 40)
    assert torch.allclose(compact(X), expected, atol=1e-5)


class Fails(Replacer):
    def replace_modules(self, speedup):
        raise MemoryError("no")


def test_replacers_are_taken_back_when_one_fails():
    model = net()
    masks, before, modules = masks_of(model), copy.deepcopy(model.state_dict()), list(model)

    def linear(module, masks):
        return nn.Linear(40, 4)

    replacers = [*REPLACERS, DefaultReplacer({"Linear": linear}), Fails()]
    with pytest.raises(MemoryError):
        ModelSpeedup(model, X, masks, customized_replacers=replacers).speedup_model()
    assert all(a is b for a, b in zip(model, modules, strict=True))
    assert (model[0].out_channels, model[1].num_features) == (8, 8)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
