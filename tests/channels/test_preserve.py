"""A watched run leaves nothing behind, wherever a forward puts things."""

import collections
import types

import torch
from torch import nn

from nni_plugins.channels import ChannelGraph

X = torch.randn(2, 3)


class Hoarder(nn.Module):
    """Keeps what it sees in nested containers, in an object, in tensors; looks at values, so that it runs on real ones."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.nested = {"outer": {"inner": []}}
        self.recent = collections.deque(maxlen=3)
        self.state = types.SimpleNamespace(last=None, seen=[])
        self.by_name = collections.defaultdict(list)
        self.pair = ([], {"k": set()})
        self.count = torch.zeros(2)
        self.held = {"tensor": torch.zeros(2)}
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x):
        y = torch.relu(self.a(x))
        self.nested["outer"]["inner"].append(y)
        self.recent.append(y)
        self.state.last = y
        self.state.seen.append(y)
        self.by_name["a"].append(y)
        self.pair[0].append(y)
        self.pair[1]["k"].add(1)
        self.count += 1
        self.held["tensor"].add_(1)
        self.runs.add_(1)
        self.made = [y]
        return self.b(y) if y.sum() < 1e9 else y[:, :2]


def test_nothing_stays_of_what_a_forward_keeps():
    model = Hoarder()
    attributes = list(model.__dict__)
    count, held = model.count, model.held["tensor"]
    graph = ChannelGraph.watch(model, X)
    assert graph.trace.data == "real"
    assert list(model.__dict__) == attributes
    assert model.nested == {"outer": {"inner": []}}
    assert not model.recent
    assert model.recent.maxlen == 3
    assert vars(model.state) == {"last": None, "seen": []}
    assert not model.by_name
    assert model.pair == ([], {"k": set()})
    assert model.count is count
    assert not count.any()
    assert model.held["tensor"] is held
    assert not held.any()
    assert model.runs == 0
