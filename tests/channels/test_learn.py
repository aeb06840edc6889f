"""Sizes that modules hold in lists and tuples, or in several attributes of which each alone does not help."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.channels.attributes import size_at, sizes_held
from nni_plugins.channels.replay import Replay
from nni_plugins.speedup import ModelSpeedup, load_compact, save_compact
from tests.speedup.test_model_speedup import masked_output

X = torch.randn(2, 7, 5)


class Parts(nn.Module):
    """A wide layer, cut into parts of which each goes its own way."""

    def __init__(self, sizes, held):
        super().__init__()
        torch.manual_seed(1)
        self.up = nn.Linear(5, sum(sizes))
        self.downs = nn.ModuleList(nn.Linear(size, 3) for size in sizes)
        self.held = held
        if held == "list":
            self.sizes = list(sizes)
        elif held == "tuple":
            self.sizes = tuple(sizes)
        else:
            for name, size in zip("abc", sizes, strict=False):
                setattr(self, name, size)

    def forward(self, x):
        sizes = [getattr(self, name) for name in "abc" if hasattr(self, name)] or self.sizes
        parts = F.gelu(self.up(x)).split(sizes, dim=-1)
        return sum(down(part) for down, part in zip(self.downs, parts, strict=True))


class Rows(nn.Module):
    """Attention whose heads and width of a head are one tuple."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.shape = (4, 4)
        self.qkv, self.out = nn.ModuleList(nn.Linear(5, 16) for _ in range(3)), nn.Linear(16, 5)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, *self.shape).transpose(1, 2) for layer in self.qkv)
        x = F.softmax(q @ k.transpose(-2, -1) / 2, dim=-1) @ v
        return self.out(x.transpose(1, 2).reshape(b, n, self.shape[0] * self.shape[1]))


class State(nn.Module):
    """Holds the width of a state, which the module around it reads (as RAFT does)."""

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.cell = nn.Linear(width, width)

    def forward(self, state):
        return state + torch.tanh(self.cell(state))


class StateAndContext(nn.Module):
    """Cuts what it makes at the width that a module below it holds."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.up, self.state, self.down = nn.Linear(5, 18), State(8), nn.Linear(18, 5)

    def forward(self, x):
        x = self.up(x)
        state, context = torch.split(x, [self.state.width, x.shape[-1] - self.state.width], dim=-1)
        return self.down(torch.cat([self.state(torch.tanh(state)), F.relu(context)], dim=-1))


class Cells(nn.Module):
    """Makes the states that torch's own cells begin with, of the width that these hold."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.down = nn.GRUCell(5, 8), nn.LSTMCell(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        state = x.new_zeros(len(x), self.first.hidden_size)
        own = (x.new_zeros(len(x), self.second.hidden_size),) * 2
        for step in x.unbind(1):
            state = self.first(step, state)
            own = self.second(state, own)
        return self.down(own[0])


CASES = {
    "a list": lambda: Parts([8, 16], "list"),
    "a tuple": lambda: Parts([8, 16], "tuple"),
    "elements alike": lambda: Parts([8, 8, 16], "list"),
    "all alike": lambda: Parts([8, 8, 8], "list"),
    "two attributes": lambda: Parts([8, 16], "attributes"),
    "three attributes": lambda: Parts([8, 12, 16], "attributes"),
    "heads and their width": Rows,
}

ONE_GROUP = {"heads and their width", "all alike"}  # equal parts lose the same units: a chunk would be cut again


def random_plan(graph, seed=1):
    rng = np.random.default_rng(seed)
    kept = {g.name: rng.permutation(g.size)[: g.size - 1 - i] for i, g in enumerate(graph.groups) if g.prunable}
    return Plan(graph, kept)


@pytest.mark.parametrize("case", CASES)
def test_all_that_a_module_holds_follows_and_is_loaded_again(case, tmp_path):
    model = CASES[case]().eval()
    held = dict(sizes_held(model))
    graph = ChannelGraph.watch(model, X)
    groups = [g for g in graph.groups if g.prunable]
    assert len(groups) == (1 if case in ONE_GROUP else len(model.downs))
    assert dict(sizes_held(model)) == held
    plan = random_plan(graph)
    assert Replay(plan, X).run(model) is None
    masks = plan.masks(model)
    expected = masked_output(model, masks, X)
    speedup = ModelSpeedup(model, X, masks)
    compact = speedup.speedup_model()
    assert speedup.plan.counts == plan.counts
    assert not speedup.report.put_back
    assert torch.allclose(compact(X), expected, atol=1e-5)
    kind = type(getattr(model, "sizes", None) or getattr(model, "shape", None))
    now = dict(sizes_held(model))
    assert now != held
    save_compact(compact, tmp_path / "compact.safetensors")
    loaded = load_compact(tmp_path / "compact.safetensors", CASES[case])
    assert torch.equal(loaded(X), compact(X))
    assert dict(sizes_held(loaded)) == now
    assert type(getattr(loaded, "sizes", None) or getattr(loaded, "shape", None)) is kind
    again = random_plan(ChannelGraph.watch(loaded, X), seed=2)
    masks = again.masks(loaded)
    expected = masked_output(loaded, masks, X)
    assert torch.allclose(ModelSpeedup(loaded, X, masks).speedup_model()(X), expected, atol=1e-5)


def test_a_size_that_a_module_below_holds_follows(tmp_path):
    model = StateAndContext().eval()
    graph = ChannelGraph.watch(model, X)
    assert {g.name: g.size for g in graph.groups if g.prunable} == {"up": 8, "up:1": 10}
    masks = Plan(graph, {"up": [0, 3, 7], "up:1": [1, 2, 5, 9]}).masks(model)
    expected = masked_output(model, masks, X)
    compact = ModelSpeedup(model, X, masks).speedup_model()
    assert compact.state.width == 3
    assert torch.allclose(compact(X), expected, atol=1e-5)
    save_compact(compact, tmp_path / "compact.safetensors")
    loaded = load_compact(tmp_path / "compact.safetensors", StateAndContext)
    assert torch.equal(loaded(X), compact(X))


def test_a_size_that_a_module_of_torchs_holds_follows(tmp_path):
    model = Cells().eval()
    graph = ChannelGraph.watch(model, X)
    assert {g.name: g.size for g in graph.groups if g.prunable} == {"first": 8, "second": 8}
    masks = Plan(graph, {"first": [0, 3, 7], "second": [1, 2, 5, 6]}).masks(model)
    expected = masked_output(model, masks, X)
    compact = ModelSpeedup(model, X, masks).speedup_model()
    assert (compact.first.hidden_size, compact.second.hidden_size) == (3, 4)
    assert torch.allclose(compact(X), expected, atol=1e-5)
    save_compact(compact, tmp_path / "compact.safetensors")
    assert torch.equal(load_compact(tmp_path / "compact.safetensors", Cells)(X), compact(X))


def test_what_one_module_teaches_holds_for_lists_of_others_too(monkeypatch):
    runs = []
    run = Replay.run
    monkeypatch.setattr(Replay, "run", lambda self, model, *until: runs.append(1) or run(self, model, *until))
    found = []
    for depth in (1, 6):
        runs.clear()
        model = nn.Sequential(*(nn.Sequential(Parts([8, 16], "list"), nn.Linear(3, 5)) for _ in range(depth)))
        graph = ChannelGraph.watch(model, X)
        assert sum(g.prunable and {8, 16} >= {g.size} for g in graph.groups) == 2 * depth
        found.append(len(runs))
    assert found[1] <= found[0] + 2


def test_a_size_that_is_written_down_stays_though_a_list_holds_another_one_like_it():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.sizes = [8, 16]
            self.up, self.down = nn.Linear(5, 24), nn.Linear(24, 3)

        def forward(self, x):
            return self.down(torch.cat(F.gelu(self.up(x)).split([8, 16], dim=-1), dim=-1))

    model = Written()
    graph = ChannelGraph.watch(model, X)
    assert not any(g.prunable for g in graph.groups)
    assert not any(graph.learnt.values())
    assert model.sizes == [8, 16]


def test_sizes_by_name():
    module = nn.Module()
    module.heads, module.flag, module.shape, module.one = 4, True, [2, "x", 8], (6,)
    module.data = list(range(100))
    assert {name: size for name, size in sizes_held(module) if name != "training"} == {
        "heads": 4,
        "shape[0]": 2,
        "shape[2]": 8,
        "one": 6,
    }
    assert [size_at(module, n) for n in ("heads", "shape[2]", "one", "flag", "shape[1]", "shape[7]", "nothing")] == [
        4, 8, 6, None, None, None, None,
    ]  # fmt: skip
