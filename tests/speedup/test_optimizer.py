"""An optimizer from before a speedup goes on after it, with its momentum."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.speedup import ModelSpeedup, fit_optimizer
from tests.speedup.nets import Residual

X = torch.randn(4, 3, 8, 8)
OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, centered=True, momentum=0.9),
}


def stepped(model, make, steps=3):
    optimizer = make(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(X), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
    return optimizer


def sped_up(model, step=2):
    graph = ChannelGraph.watch(model, X)
    plan = Plan(graph, {g.name: range(0, g.size, step) for g in graph.groups if g.prunable and g.exact})
    speedup = ModelSpeedup(model, X, plan.masks(model))
    speedup.speedup_model()
    return speedup


def test_lbfgs_begins_anew():
    """It keeps vectors of all parameters in one, and their number."""
    torch.manual_seed(0)
    model = Residual()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(model(X), torch.tensor([0, 1, 2, 3]))
        value.backward()
        return value

    optimizer.step(loss)
    fit_optimizer(optimizer, sped_up(model))
    first = optimizer.step(loss).item()
    assert optimizer.step(loss).item() < first


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_loses_the_same_indices(name):
    torch.manual_seed(0)
    model = Residual()
    optimizer = stepped(model, OPTIMIZERS[name])
    weight = model.conv1.weight
    before = {k: v.clone() for k, v in optimizer.state[weight].items() if isinstance(v, torch.Tensor) and v.dim() == 4}
    speedup = sped_up(model)
    fit_optimizer(optimizer, speedup)
    kept = speedup.plan.dimensions("conv1.weight")
    for key, old in before.items():
        wanted = old[torch.as_tensor(kept[0])][:, torch.as_tensor(kept[1])]
        assert torch.equal(optimizer.state[weight][key], wanted)
    assert len(before) > 0
    assert weight.shape == wanted.shape
    for parameter, state in optimizer.state.items():
        assert all(v.shape == parameter.shape for v in state.values() if isinstance(v, torch.Tensor) and v.dim())
    once = copy.deepcopy(optimizer.state_dict()["state"])
    fit_optimizer(optimizer, speedup)
    assert str(once) == str(optimizer.state_dict()["state"])
    moved = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.zero_grad()
    F.cross_entropy(model.train()(X), torch.tensor([0, 1, 2, 3])).backward()
    optimizer.step()
    assert all(not torch.equal(p, moved[n]) for n, p in model.named_parameters())


def test_without_it_an_optimizer_with_momentum_fails_aloud():
    model = Residual()
    optimizer = stepped(model, OPTIMIZERS["momentum"])
    sped_up(model)
    F.cross_entropy(model.train()(X), torch.tensor([0, 1, 2, 3])).backward()
    with pytest.raises(RuntimeError, match=r"must match the size|output with shape"):
        optimizer.step()


class Folds(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1, bias=False)
        nn.init.constant_(self.n.bias, 0.7)

    def forward(self, x):
        return self.b(torch.relu(self.n(self.a(x)))).mean((2, 3))


@pytest.mark.parametrize("named", [False, True])
def test_an_added_bias_trains_too(named):
    model = Folds()
    try:
        optimizer = torch.optim.SGD(model.named_parameters() if named else model.parameters(), 0.1)
    except TypeError:
        pytest.skip("this torch takes no named parameters")
    mask = torch.ones(8, 3, 1, 1)
    mask[5:] = 0
    speedup = ModelSpeedup(model, X, {"a": {"weight": mask}})
    speedup.speedup_model()
    assert model.b.bias is not None
    fit_optimizer(optimizer, speedup)
    fit_optimizer(optimizer, speedup)
    held = optimizer.param_groups[0]["params"]
    assert sum(p is model.b.bias for p in held) == 1
    assert len(held) == len(list(model.parameters()))
    if named:
        assert optimizer.param_groups[0]["param_names"][-1] == "b.bias"
    before = model.b.bias.detach().clone()
    model(X).pow(2).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.b.bias)


def test_a_bias_that_was_left_out_stays_out():
    model = Residual()
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if not n.endswith("bias")], 0.1)
    count = len(optimizer.param_groups[0]["params"])
    fit_optimizer(optimizer, sped_up(model))
    assert len(optimizer.param_groups[0]["params"]) == count


def test_what_does_not_fit_is_refused_in_one_line_and_nothing_is_changed():
    model = Residual()
    speedup = ModelSpeedup(model, X, {})
    optimizer = stepped(model, OPTIMIZERS["adamw"])
    with pytest.raises(ValueError, match="speedup has not run"):
        fit_optimizer(optimizer, speedup)
    optimizer.state[model.conv2.weight]["exp_avg_sq"] = torch.ones(7)
    speedup = sped_up(model)
    with pytest.raises(
        ValueError, match=r"'exp_avg_sq' of conv2.weight has shape \(7,\).*make a new optimizer"
    ) as caught:
        fit_optimizer(optimizer, speedup)
    assert "\n" not in str(caught.value)
    assert optimizer.state[model.conv1.weight]["exp_avg"].shape == (12, 8, 3, 3)
