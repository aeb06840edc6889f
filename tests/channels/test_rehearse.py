"""A rehearsal finds what a forward holds: attributes that must follow, and sizes that keep a group from going."""

import copy
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.channels.replay import Replay
from nni_plugins.speedup import ModelSpeedup


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


class Stale(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        self.tail = nn.Linear(6, 2)

    def forward(self, x):
        return self.tail(self.inner(x).view(-1, 2, 3).flatten(1))


def test_a_size_written_into_the_forward_freezes_its_group():
    model, x = Stale(), torch.randn(2, 4)
    assert any(g.prunable for g in ChannelGraph.watch(model, x, rehearse=False).groups)
    graph = ChannelGraph.watch(model, x)
    assert not any(g.prunable for g in graph.groups)
    assert "its forward holds a fixed size" in {f.reason for f in graph.frozen}
    assert any("aten.view in the model" in g.reason for g in graph.groups)


class Attention(nn.Module):
    """As people write it: heads and widths in attributes."""

    def __init__(self, width, heads, written):
        super().__init__()
        self.heads, self.all, self.written = heads, width, written
        self.head_dim = width // heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, n, c = x.shape
        head_dim = c // self.heads if self.written else self.head_dim
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, head_dim).permute(2, 0, 3, 1, 4)
        x = F.softmax(q @ k.transpose(-2, -1) * 0.25, dim=-1) @ v
        return self.out(x.transpose(1, 2).reshape(b, n, c if self.written else self.all))


class Block(nn.Module):
    def __init__(self, width, heads, written):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, written)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class Transformer(nn.Module):
    def __init__(self, depth=3, width=32, heads=4, written=False):
        super().__init__()
        self.first = nn.Linear(5, width)
        self.blocks = nn.ModuleList(Block(width, heads, written) for _ in range(depth))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=1))


X = torch.randn(2, 7, 5)


def test_attributes_follow_heads():
    model = Transformer()
    before, attributes = state_of(model), dict(vars(model.blocks[1].attention))
    graph = ChannelGraph.watch(model, X)
    heads = [g for g in graph.groups if g.kind == "heads"]
    assert [(g.size, g.exact, g.prunable) for g in heads] == [(4, True, True)] * 3
    assert {("blocks.1.attention", "heads"), ("blocks.1.attention", "all")} <= set(graph.learnt)
    plan = Plan(graph, {heads[1].name: [0, 2, 3]})
    assert plan.sizes()["blocks.1.attention", "heads"] == {4: 3}
    assert plan.sizes()["blocks.1.attention", "all"] == {32: 24}
    assert Replay(plan, X).run(model) is None
    assert vars(model.blocks[1].attention) == attributes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_heads_that_the_forward_counts_on_go_with_the_width_and_hidden_units_alone():
    graph = ChannelGraph.watch(Transformer(written=True), X)
    assert {g.kind for g in graph.groups if g.prunable and g.exact} == {"hidden"}
    assert sum(g.prunable and g.exact for g in graph.groups) == 3
    assert ["normalised across channels" in g.reason for g in graph.groups if g.kind == "heads"] == [True]


def test_head_dimensions_on_request():
    model = Transformer()
    graph = ChannelGraph.watch(model, X, units="head_dim")
    dims = [g for g in graph.groups if g.kind == "head_dim" and g.prunable and g.exact]
    assert len(dims) == 3
    assert {g.size for g in dims} == {8}
    assert Replay(Plan(graph, {dims[0].name: range(5)}), X).run(model) is None
    with pytest.raises(ValueError, match="units is 'rows'; it must be"):
        ChannelGraph.watch(model, X, units="rows")


@pytest.mark.parametrize("written", [False, True])
def test_the_number_of_replays_does_not_grow_with_depth(written, monkeypatch):
    count = []
    run = Replay.run
    monkeypatch.setattr(Replay, "run", lambda self, model, *until: count.append(1) or run(self, model, *until))
    counts = []
    for depth in (2, 12):
        count.clear()
        ChannelGraph.watch(Transformer(depth, written=written), X)
        counts.append(len(count))
    assert counts[0] == counts[1] < 20


@pytest.mark.alone
def test_a_deep_transformer_is_watched_in_bounded_time():
    start = time.process_time()
    graph = ChannelGraph.watch(Transformer(48, written=True), X)
    assert sum(g.prunable and g.exact for g in graph.groups) == 48
    assert time.process_time() - start < 60


class Fickle(nn.Module):
    """Runs one operator more each time."""

    runs = 0

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        Fickle.runs += 1
        x = self.a(x)
        for _ in range(Fickle.runs):
            x = F.relu(x)
        return self.b(x)


def test_a_model_that_never_runs_twice_alike_is_watched_all_the_same(caplog):
    graph = ChannelGraph.watch(Fickle(), torch.randn(2, 4))
    assert graph.groups
    assert "does not run twice in the same way" in caplog.text


class Picks(nn.Module):
    """Goes on with the places whose score is above zero: how many these are depends on the values."""

    def __init__(self):
        super().__init__()
        self.body, self.score = nn.Linear(4, 8), nn.Linear(8, 1)
        self.hidden, self.head = nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, x):
        x = F.relu(self.body(x))
        places = torch.nonzero(F.relu(self.score(x).flatten()))
        return self.head(F.relu(self.hidden(x[places.flatten()])))


def test_how_many_places_a_forward_picks_freezes_nothing():
    torch.manual_seed(0)
    model, x = Picks(), torch.randn(200, 4)
    graph = ChannelGraph.watch(model, x)
    assert graph.trace.data == "real"
    assert [(g.name, g.size) for g in graph.groups if g.prunable and g.exact] == [("body", 8), ("hidden", 16)]


class OwnScale(nn.Module):
    """Scores divided by the root of a width that is read from a shape (as Falcon does), or held in an attribute."""

    def __init__(self, held):
        super().__init__()
        self.held, self.width = held, 6
        self.q, self.k, self.v, self.out = (nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8))

    def forward(self, x):
        b, t, _ = x.shape
        shape = (b, t, -1, self.width) if self.held else (b, t, 2, -1)
        q, k, v = (layer(x).view(*shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        width = self.width if self.held else q.shape[-1]
        y = (q @ k.transpose(-2, -1) / width**0.5).softmax(-1) @ v
        return x + self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("held", [False, True])
def test_a_scale_that_follows_the_width_keeps_the_width(held):
    model, x = nn.Sequential(OwnScale(held), OwnScale(held)), torch.randn(2, 5, 8)
    graph = ChannelGraph.watch(model, x, units="head_dim")
    for index in (0, 1):
        widths = [g for g in graph.groups if g.name in (f"{index}.q", f"{index}.k")]
        assert widths
        assert not any(g.prunable for g in widths)
        assert f"{index}.v" in [g.name for g in graph.groups if g.prunable and g.exact] or held
    reasons = [f.reason for f in graph.frozen]
    assert any("a number that follows the size" in reason for reason in reasons)


def test_scores_divided_by_a_width_that_stays_lose_heads():
    graph = ChannelGraph.watch(OwnScale(True), torch.randn(2, 5, 8))
    assert [g.kind for g in graph.groups if g.prunable and g.exact] == ["heads"]


class Boxes(nn.Module):
    """Cuts windows where the score is above ``least``, and flattens them for a linear layer."""

    def __init__(self, least):
        super().__init__()
        self.body, self.hidden, self.head = nn.Conv2d(3, 6, 1), nn.Linear(6 * 4, 10), nn.Linear(10, 2)
        self.least = least

    def forward(self, x):
        found = torch.nonzero(x.mean(1).flatten() > self.least).flatten()
        windows = F.adaptive_avg_pool2d(self.body(x), 2).expand(len(found), -1, -1, -1)
        return self.head(F.relu(self.hidden(windows.flatten(1))))


@pytest.mark.parametrize("least", [0.0, 100.0])
def test_where_nothing_was_found_channels_are_flattened_all_the_same(least):
    torch.manual_seed(0)
    model, x = Boxes(least), torch.randn(1, 3, 8, 8)
    graph = ChannelGraph.watch(model, x)
    assert [(g.name, g.size) for g in graph.groups if g.prunable and g.exact] == [("body", 6), ("hidden", 10)]
    assert Replay(Plan(graph, {"body": range(4)}), x).run(model) is None


class Sliced(nn.Module):
    """A part is taken by numbers that are written down, and another layer reads the whole."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(4, 4), nn.Linear(8, 2)

    def forward(self, x):
        y = self.a(x)
        return torch.cat([self.b(y[:, 2:6]), self.c(y)], 1)


def test_slices_by_fixed_numbers_keep_their_units():
    graph = ChannelGraph.watch(Sliced(), torch.randn(2, 3))
    assert not [g.name for g in graph.groups if g.prunable]
    assert [g.reason for g in graph.groups if g.name in ("a", "a:1")] == [
        "its forward holds a fixed size (aten.slice in the model)"
    ] * 2


class Shuffled(nn.Module):
    """Whole groups of a grouped convolution can go if the shuffle after it counts them anew."""

    def __init__(self, shuffle):
        super().__init__()
        self.up, self.middle, self.down = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 16, 1, groups=4),
            nn.Conv2d(16, 4, 1, groups=2),
        )
        self.shuffle = shuffle

    def forward(self, x):
        return self.down(self.shuffle(self.middle(self.up(x))))


@pytest.mark.parametrize("held", [True, False])
def test_a_channel_shuffle_counts_the_groups_that_are_left(held):
    model = Shuffled(nn.ChannelShuffle(4) if held else lambda x: torch.channel_shuffle(x, 4))
    graph = ChannelGraph.watch(model, torch.randn(2, 3, 4, 4))
    (group,) = [g for g in graph.groups if g.name == "up"]
    assert group.size == (4 if held else 2)  # groups, or the same channel of every group
    if held:
        sizes = Plan(graph, {"up": [0, 2]}).sizes()
        assert sizes["shuffle", "groups"] == {4: 2}


class Normed(nn.Module):
    """Divides by a norm that is read as a number: it follows values, not sizes."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = F.relu(self.body(x))
        return self.head(x / x.norm().item())


def test_a_number_that_is_read_from_a_tensor_follows_no_size():
    graph = ChannelGraph.watch(Normed(), torch.randn(5, 4))
    assert graph.trace.data == "real"
    assert [(g.name, g.size) for g in graph.groups if g.prunable and g.exact] == [("body", 8)]


class AsWideAsItsInput(nn.Module):
    """Attention over places whose forward takes the width of what it was given for that of its heads."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x):
        n, c, h, w = x.shape
        q, k, v = self.qkv(x).view(n, 3, self.heads, c // self.heads, h * w).transpose(0, 1)
        y = v @ (q.transpose(-2, -1) @ k).softmax(-1).transpose(-2, -1)
        return self.out(y.reshape(n, c, h, w))


class Wide(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 2, 1)
        self.attentions = nn.ModuleList(AsWideAsItsInput(24, 4) for _ in range(3))
        self.norms = nn.ModuleList(norm(24) for _ in range(3))

    def forward(self, x):
        x = self.a(x)
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            x = x + attention(norm(x))
        return self.b(x)


@pytest.mark.parametrize(("norm", "exact"), [(nn.BatchNorm2d, True), (lambda width: nn.GroupNorm(1, width), False)])
def test_a_width_that_a_forward_takes_for_that_of_its_heads_keeps_in_step_with_it(norm, exact):
    """Both were frozen: what is given, and the heads, can go only together, as many channels as a head has."""
    model, x = Wide(norm).eval(), torch.randn(2, 3, 4, 4)
    graph = ChannelGraph.watch(model, x)
    assert [(g.name, g.size, g.exact) for g in graph.groups if g.prunable] == [("a", 4, exact)]
    masks = Plan(graph, {"a": [0, 2, 3]}).masks(model)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for module, targets in masks.items():
            for target, mask in targets.items():
                getattr(masked.get_submodule(module), target).mul_(mask)
    speedup = ModelSpeedup(model, x, masks, exact_only=exact)
    compact = speedup.speedup_model()
    assert not speedup.report.put_back
    assert (compact.a.out_channels, compact.attentions[1].heads) == (18, 3)
    assert [tuple(a.qkv.weight.shape[:2]) for a in compact.attentions] == [(54, 18)] * 3
    if exact:
        torch.testing.assert_close(compact(x), masked(x))
