"""Masks of NNI's pruners that train: Taylor, Slim, movement, AGP, through NNI's own evaluator, into our speedup."""

import copy

import nni
import pytest
import torch
from nni.compression.pruning import AGPPruner, L1NormPruner, LinearPruner, MovementPruner, SlimPruner, TaylorPruner
from nni.compression.utils import TorchEvaluator
from torch import nn
from torch.nn import functional as F

from nni_plugins.speedup import ModelSpeedup
from tests.random_networks import trained_like

X = torch.randn(16, 3, 8, 8)
Y = torch.randint(0, 4, (16,))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.an = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.bn = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)
        trained_like(self)

    def forward(self, x):
        x = F.relu(self.an(self.a(x)))
        return self.fc(F.relu(self.bn(self.b(x))).mean((2, 3)))


def train(model, optimizer, training_step, lr_scheduler=None, max_steps=None, max_epochs=None):
    for _ in range(max_steps or 4):
        optimizer.zero_grad()
        training_step((X, Y), model).backward()
        optimizer.step()


def evaluator(model):
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01)
    return TorchEvaluator(train, optimizer, lambda batch, m: F.cross_entropy(m(batch[0]), batch[1]))


CONVS = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
NORMS = [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}]
MAKE = {
    "taylor": lambda m, e: TaylorPruner(m, CONVS, e, training_steps=3),
    "slim": lambda m, e: SlimPruner(m, NORMS, e, training_steps=3),
    "agp": lambda m, e: AGPPruner(L1NormPruner(m, CONVS, e), 1, 2),
    "linear": lambda m, e: LinearPruner(L1NormPruner(m, CONVS, e), 1, 2),
    "movement": lambda m, e: MovementPruner(m, CONVS, e, warmup_step=1, cooldown_begin_step=3),
}


@pytest.mark.parametrize("name", MAKE)
def test_the_compact_model_equals_the_masked_one(name):
    torch.manual_seed(0)
    model = Net()
    pruner = MAKE[name](model, evaluator(model))
    _, masks = pruner.compress(None if name in ("taylor", "slim") else 4, None)
    pruner.unwrap_model()
    expected = copy.deepcopy(model).eval()
    with torch.no_grad():
        for module, targets in masks.items():
            for target, mask in targets.items():
                if mask is not None:
                    getattr(expected.get_submodule(module), target).mul_(mask)
        expected = expected(X)
    speedup = ModelSpeedup(model, X, masks)
    compact = speedup.speedup_model().eval()
    report = speedup.report
    error = (compact(X) - expected).abs().max() / expected.abs().max()
    if report.inexact:
        assert all("zero padding" in line for line in report.inexact)
    else:
        assert error < 1e-5
    assert not report.put_back
    if name != "movement":  # it masks single weights
        assert report.macs_after < 0.7 * report.macs_before
