"""NNI's wrappers: copied after a forward, and no emptying of the CUDA cache."""

import copy

import pytest
import torch
from nni.compression.distillation import DynamicLayerwiseDistiller
from nni.compression.pruning import L1NormPruner
from torch import nn
from torch.optim.swa_utils import AveragedModel


@pytest.fixture
def wrapped():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    pruner = L1NormPruner(model, [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}])
    pruner.compress()
    return model, pruner


def test_copy_after_a_forward_is_a_model_of_its_own(wrapped):
    model, _ = wrapped
    x = torch.randn(2, 3, 8, 8)
    model(x).sum().backward()
    copied = copy.deepcopy(copy.deepcopy(model))
    assert torch.equal(copied.eval()(x), model.eval()(x))
    inner = copied[0]._nni_wrapper
    assert inner is not model[0]._nni_wrapper
    assert inner.module is copied[0]
    with torch.no_grad():
        inner.weight += 1
    assert not torch.equal(copied(x), model(x))
    loss = copied(x).sum()
    loss.backward()
    assert inner.weight.grad.abs().sum() > 0


def test_gradients_of_the_original_survive_a_copy(wrapped):
    model, _ = wrapped
    loss = model(torch.randn(2, 3, 8, 8)).sum()
    left = model[0].weight
    copy.deepcopy(model)
    assert model[0].weight is left
    loss.backward()
    assert model[0]._nni_wrapper.weight.grad.abs().sum() > 0


def test_average_of_a_masked_model(wrapped):
    model, _ = wrapped
    x = torch.randn(2, 3, 8, 8)
    model(x)
    average = AveragedModel(model, avg_fn=lambda old, new, count: (old + new) / 2)
    average.update_parameters(model)
    assert torch.allclose(average.eval()(x), model.eval()(x))


def test_unwrapped_model_has_nothing_of_ours(wrapped):
    model, pruner = wrapped
    model(torch.randn(2, 3, 8, 8))
    pruner.unwrap_model()
    assert all("__deepcopy__" not in vars(module) for module in model.modules())
    copy.deepcopy(model)


def test_forward_does_not_empty_the_cache(wrapped, monkeypatch):
    model, _ = wrapped
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(1))
    model(torch.randn(2, 3, 8, 8))
    assert calls == []


def test_importing_the_wrapper_draws_no_random_number():
    import importlib

    import nni.compression.base.wrapper as module

    from nni_plugins.compat.defects.wrapped_deepcopy import PATCH

    assert importlib.util.find_spec(module.__name__)
    state = torch.get_rng_state()
    assert PATCH.defect(module) is False
    assert torch.equal(torch.get_rng_state(), state)


def test_distilled_state_is_copied_too():
    assert DynamicLayerwiseDistiller  # its target spaces keep the hidden state of the last forward
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(3, 4)
    from nni.compression.base.wrapper import register_wrappers

    wrappers, _ = register_wrappers(model, [{"op_names": ["2"], "lambda": 1.0, "apply_method": "mse"}], "distillation")
    for wrapper in wrappers.values():
        wrapper.wrap()
    model(x)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
