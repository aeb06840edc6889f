"""Parameters that get smaller in place stay what they were to autograd and to memory formats."""

import numpy as np
import torch
from torch import nn

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.speedup.compact import Compaction, sliced

X = torch.randn(4, 6)


def compaction(model):
    return Compaction(model, Plan(ChannelGraph.watch(model, X), {"0": np.arange(3)}))


def test_an_earlier_loss_does_not_hold_the_old_shapes():
    """Training loops keep their last loss alive; hooks of parameters keep the node that adds gradients up."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    calls = []
    model[2].weight.register_post_accumulate_grad_hook(lambda p: calls.append(tuple(p.grad.shape)))
    loss = model(X).sum()
    loss.backward()
    change = compaction(model)
    change.apply()
    assert model[2].weight.grad.shape == (2, 3)
    model(X).sum().backward()
    assert calls == [(2, 8), (2, 3)]
    change.undo()
    model(X).sum().backward()
    assert calls[-1] == (2, 8)
    assert loss.requires_grad


def test_what_is_taken_back_is_as_before():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    change = compaction(model)
    change.apply()
    assert (model[2].in_features, change.sizes["2"]) == (3, {"in_features": 3})
    change.undo()
    assert (model[2].in_features, change.sizes) == (8, {})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_memory_formats_stay():
    for rank, order in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        tensor = torch.randn(6, 4, *[3] * (rank - 2)).to(memory_format=order)
        out = sliced(tensor, {0: torch.arange(4), 1: torch.tensor([0, 2, 3])})
        assert out.is_contiguous(memory_format=order)
        assert torch.equal(out, tensor[:4][:, [0, 2, 3]])
