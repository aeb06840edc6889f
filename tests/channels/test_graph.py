"""The graph of small nets, by hand; costs against torch's counter; the model left as it was."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from nni_plugins.channels import ChannelGraph, Plan
from tests.random_networks import RandomCNN


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.an = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6 * 16, 4)

    def forward(self, x):
        y = F.relu(self.an(self.a(x)))
        y = y + self.b(y)
        return self.fc(F.relu(self.c(y)).flatten(1))


X = torch.randn(2, 3, 4, 4)


def members(graph, name):
    return {(m.name, m.dim, m.role) for m in graph.group(name).members}


def test_groups_by_hand():
    graph = ChannelGraph.watch(Block(), X)
    assert members(graph, "a") == {
        ("a.weight", 0, "out"),
        ("an.weight", 0, "scale"),
        ("an.bias", 0, "scale"),
        ("an.running_mean", 0, "statistic"),
        ("an.running_var", 0, "statistic"),
        ("b.weight", 0, "out"),
        ("b.weight", 1, "in"),
        ("b.bias", 0, "out"),
        ("c.weight", 1, "in"),
    }
    assert members(graph, "c") == {("c.weight", 0, "out"), ("c.bias", 0, "out"), ("fc.weight", 1, "in")}
    flat = next(m for m in graph.group("c").members if m.name == "fc.weight")
    assert (flat.indices == np.arange(96).reshape(6, 16)).all()
    assert [g.name for g in graph.groups if g.prunable] == ["a", "c"]
    assert graph.group("fc").reason.startswith("the model's output")
    assert {f.reason for f in graph.frozen} == {"the model's output", "joined to something of fixed size"}


def test_an_unknown_group_name_gets_a_hint():
    with pytest.raises(KeyError, match="did you mean 'fc'"):
        ChannelGraph.watch(Block(), X).group("fcc")


class ResNet18(nn.Module):
    """torchvision's ResNet-18, as published."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        layers, cin = [], 64
        for cout, stride in [(64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)]:
            layers.append(BasicBlock(cin, cout, stride))
            cin = cout
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(512, 1000)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.fc(F.adaptive_avg_pool2d(self.layers(x), 1).flatten(1))


class BasicBlock(nn.Module):
    def __init__(self, cin, cout, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
        self.short = nn.Sequential()
        if stride != 1 or cin != cout:
            self.short = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.short(x))


def counted(model, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() // 2


def test_cost_of_resnet18_is_the_published_one():
    model = ResNet18().eval()
    x = torch.randn(1, 3, 224, 224)
    cost = ChannelGraph.watch(model, x).cost()
    assert (cost.macs, cost.params) == (1_814_073_344, 11_689_512)
    assert cost.macs == counted(model, x)
    assert cost.modules["fc"] == (512_000, 513_000)


@pytest.mark.parametrize("seed", range(8))
def test_cost_equals_torchs_counter_before_and_after(seed):
    model = RandomCNN(seed).eval()
    x = torch.randn(2, 3, 8, 8)
    graph = ChannelGraph.watch(model, x)
    assert graph.cost().macs == counted(model, x)
    assert graph.cost().params == sum(p.numel() for p in model.parameters())
    plan = Plan(graph, {g.name: range(max(1, g.size // 2)) for g in graph.groups if g.prunable and g.exact})
    from nni_plugins.speedup import ModelSpeedup

    speedup = ModelSpeedup(model, x, plan.masks(model))
    compact = speedup.speedup_model()
    assert plan.cost().macs == counted(compact, x) == graph.cost(plan.counts).macs
    assert plan.cost().params == sum(p.numel() for p in compact.parameters())
    ours = graph.cost(plan.counts)
    assert (ours.macs, ours.params) == (plan.cost().macs, plan.cost().params)


class Restless(nn.Module):
    """Changes itself, caches tensors, draws random numbers and counts calls in its forward."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4, track_running_stats=True)
        self.calls, self.seen, self.cache = 0, [], {}
        self.register_buffer("steps", torch.zeros(()))
        self.conv.register_forward_hook(lambda module, args, out: out * 2)

    def forward(self, x):
        self.calls += 1
        self.seen.append(x)
        self.cache["last"] = x
        self.steps += 1
        self.late = x
        torch.rand(2), random.random(), np.random.rand()
        return self.norm(self.conv(x))


class BehindWhatHasNoRule(nn.Module):
    """A linear layer, and a product with a vector, of what no rule follows."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 6), nn.Parameter(torch.randn(6))

    def forward(self, x):
        x = self.b(torch.fft.fft(self.a(x)).real)
        return torch.fft.fft(x).real @ self.c


def test_a_group_behind_what_is_frozen_costs_what_reads_it():
    graph = ChannelGraph.watch(BehindWhatHasNoRule(), torch.randn(3, 5))
    macs = {(m.name, m.role): graph.group_cost(g).macs for g in graph.groups for m in g.members}
    assert macs["a.weight", "out"] == 3 * 5 * 8
    assert macs["b.weight", "in"] == 3 * 8 * 6
    assert [graph.group_cost(g).macs for g in graph.groups if "c" in {m.name for m in g.members}] == [3 * 6]
    assert graph.cost().macs == 3 * (5 * 8 + 8 * 6 + 6)


def test_the_model_is_left_exactly_as_it_was():
    model = Restless().train()
    model.norm.eval()
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = {name: id(p) for name, p in model.named_parameters()}
    hooks = list(model.conv._forward_hooks)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    ChannelGraph.watch(model, torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    drawn = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    assert drawn == (torch.rand(1).item(), random.random(), np.random.rand())
    assert (model.calls, model.seen, model.cache, hasattr(model, "late")) == (0, [], {}, False)
    assert (model.training, model.norm.training, model.conv.training) == (True, False, True)
    assert parameters == {name: id(p) for name, p in model.named_parameters()}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(model.conv.weight.grad, torch.ones_like(model.conv.weight))
    assert list(model.conv._forward_hooks) == hooks
    assert not model._forward_hooks
    assert torch.is_grad_enabled()


class Looks(nn.Module):
    """Looks at values: no run without data can decide which way to go."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        y = self.norm(self.a(x))
        return self.b(y * 2 if y.sum().item() > 1e9 else F.relu(y))


def test_a_forward_that_looks_at_values_is_run_on_real_ones():
    model = Looks()
    graph = ChannelGraph.watch(model, torch.randn(3, 4))
    assert graph.trace.data == "real"
    assert graph.group("a").prunable
    assert graph.group("a").size == 6


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(5, 6)
        self.heads = nn.ModuleDict({"one": nn.Linear(6, 2), "two": nn.Linear(6, 3)})

    def forward(self, left, right):
        y = F.relu(self.a(left) + self.b(right))
        return {"one": self.heads["one"](y), "more": [self.heads["two"](y), (y.sum(1),)]}


@pytest.mark.parametrize("kind", ["tuple", "list", "dict"])
def test_several_inputs_and_outputs(kind):
    left, right = torch.randn(2, 4), torch.randn(2, 5)
    inputs = {"tuple": (left, right), "list": [left, right], "dict": {"right": right, "left": left}}[kind]
    graph = ChannelGraph.watch(Two(), inputs)
    assert graph.group("a").prunable
    assert {m.module for m in graph.group("a").members} == {"a", "b", "heads.one", "heads.two"}
    assert not graph.group("heads.one").prunable
    assert not graph.group("heads.two").prunable


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.again, self.b = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.twin = nn.Linear(6, 6)
        self.twin.weight = self.again.weight
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        x = self.a(x)
        for layer in (self.again, self.again, self.twin):
            x = F.relu(layer(x))
        return self.b(x)


def test_reused_and_tied_weights_are_one_group():
    model = Reused()
    graph = ChannelGraph.watch(model, torch.randn(2, 4))
    group = graph.group("a")
    assert group.size == 6
    assert {(m.name, m.dim) for m in group.members} >= {("again.weight", 0), ("again.weight", 1), ("twin.bias", 0)}
    assert "unused.weight was not used in the watched run" in {f.reason for f in graph.frozen}
    masks = Plan(graph, {"a": [0, 2]}).masks(model)
    assert torch.equal(masks["twin"]["weight"], masks["again"]["weight"])
    assert masks["again"]["weight"].sum() == 4


def test_a_single_unit_is_not_prunable():
    net = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 1))
    graph = ChannelGraph.watch(net, X)
    assert [g.name for g in graph.groups if g.prunable] == ["1"]


def test_frozen_parameters_stay_in_the_graph():
    model = Block()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert [g.name for g in ChannelGraph.watch(model, X).groups if g.prunable] == ["a", "c"]


def test_plans_are_checked():
    graph = ChannelGraph.watch(Block(), X)
    for kept, words in [
        ({"a": []}, "keep at least one"),
        ({"a": [8]}, "has 8 units"),
        ({"a": np.ones(3, dtype=bool)}, "has shape"),
        ({"fc": [0]}, "cannot lose units"),
    ]:
        with pytest.raises(ValueError, match=words):
            Plan(graph, kept)
    assert Plan(graph, {"a": range(8)}).kept == {}


def test_masks_cover_every_member_and_nothing_else():
    model = Block()
    graph = ChannelGraph.watch(model, X)
    masks = Plan(graph, {"a": [0, 1, 2]}).masks(model)
    assert set(masks) == {"a", "an", "b", "c"}
    assert masks["b"]["weight"].sum() == 3 * 3 * 9
    assert masks["an"]["bias"].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert masks["c"]["weight"][:, 3:].sum() == 0


def test_a_wrapped_model_is_refused():
    from nni.compression.pruning import L1NormPruner

    model = Block()
    L1NormPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    with pytest.raises(ValueError, match="unwrap_model"):
        ChannelGraph.watch(model, X)


def test_watching_twice_gives_the_same():
    model = RandomCNN(3)
    first, second = (ChannelGraph.watch(copy.deepcopy(model), torch.randn(2, 3, 8, 8)) for _ in range(2))
    assert [(g.name, g.size, len(g.members)) for g in first.groups] == [
        (g.name, g.size, len(g.members)) for g in second.groups
    ]


def test_roles_of_scales_and_of_weights_made_from_parameters():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.gain = nn.Parameter(torch.randn(8, 3, 1, 1)), nn.Parameter(torch.rand(8, 1, 1, 1))
            self.act, self.scale = nn.PReLU(8), nn.Parameter(torch.ones(8))
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x):
            return self.head(self.act(F.conv2d(x, self.weight * self.gain)) * self.scale.view(1, -1, 1, 1))

    groups = ChannelGraph.watch(Net(), X).groups
    roles = {(m.name, m.dim): m.role for g in groups if g.prunable for m in g.members}
    assert roles == {
        ("weight", 0): "out",
        ("gain", 0): "out",
        ("act.weight", 0): "scale",
        ("scale", 0): "scale",
        ("head.weight", 1): "in",
    }


class Wrapped:
    def __init__(self, logits):
        self.logits = logits


def test_an_output_without_tensors_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 4)

        def forward(self, x):
            return Wrapped(self.a(x))

    with pytest.raises(ValueError, match="returned a Wrapped, in which no tensor was found"):
        ChannelGraph.watch(Net(), torch.randn(2, 3))


def test_what_leaves_the_watch_is_frozen():
    """A detour over NumPy hides who reads the first layer."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.b(torch.from_numpy(self.a(x).numpy()))

    group = ChannelGraph.watch(Net(), torch.randn(2, 3)).group("a")
    assert not group.prunable
    assert group.reason == "nothing that was watched reads it (a)"


def test_parameters_without_a_shape_are_refused():
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet"):
        ChannelGraph.watch(nn.Sequential(nn.LazyLinear(4)), torch.randn(2, 3))


def test_kept_units_are_bool_or_integers():
    graph = ChannelGraph.watch(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(2, 3))
    with pytest.raises(ValueError, match="bool or integers, not as float64"):
        Plan(graph, {"0": [1.0, 0.0, 1.0, 1.0]})
    with pytest.raises(KeyError, match="no channel group is called 'x'"):
        graph.cost({"x": 3})
