"""A function that remembers a table of indices remembers none of a watched run."""

from functools import lru_cache, wraps

import pytest
import torch
from torch import nn

from nni_plugins.channels import ChannelGraph


@lru_cache(maxsize=4)
def places(size):
    return torch.arange(size).flip(0)


def decorated(function):
    cached = lru_cache(maxsize=4)(function)

    @wraps(function)
    def call(*args):
        return cached(*args)

    return call


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    @staticmethod
    @decorated
    def own(size):
        return torch.arange(size).flip(0)


class ByFunction(Table):
    def forward(self, x):
        return self.last(self.first(x)[places(len(x))])


class ByMethod(Table):
    def forward(self, x):
        return self.last(self.first(x)[self.own(len(x))])


@pytest.mark.parametrize("kind", [ByFunction, ByMethod])
def test_a_model_that_is_watched_first_computes_what_it_should(kind):
    model, x = kind(), torch.randn(5, 4)
    graph = ChannelGraph.watch(model, x)
    assert graph.group("first").prunable
    with torch.no_grad():
        assert torch.equal(model(x), model.last(model.first(x).flip(0)))
        ChannelGraph.watch(model, x)
        assert torch.equal(model(x), model.last(model.first(x).flip(0)))
