import torch

from nni_plugins.channels import ChannelGraph
from nni_plugins.pruners.score import group_sums, member_sums

from .nets import X, make


def test_group_sums_add_producers_norms_and_consumers():
    net = make("residual")
    graph = ChannelGraph.watch(net, X)
    values = {name: p.detach().abs() for name, p in net.named_parameters()}
    stream = graph.group("stem")
    expected = sum(values[f"{layer}.weight"].sum((1, 2, 3)) for layer in ("stem", "a2", "b2"))
    expected = expected + sum(values[f"{n}.{p}"] for n in ("bn", "na2", "nb2") for p in ("weight", "bias"))
    expected = expected + sum(values[f"{layer}.weight"].sum((0, 2, 3)) for layer in ("a1", "b1"))
    expected = expected + values["fc.weight"].sum(0)
    torch.testing.assert_close(group_sums(stream, values), expected.double(), rtol=1e-6, atol=0)


def test_roles_and_parameters_can_be_left_out():
    net = make("plain")
    graph = ChannelGraph.watch(net, X)
    values = {name: p.detach().abs() for name, p in net.named_parameters()}
    group = graph.group("conv2")
    rows = values["conv2.weight"].sum((1, 2, 3), dtype=torch.float64)
    weights = {name: value for name, value in values.items() if not name.endswith("bias")}
    torch.testing.assert_close(group_sums(group, weights, roles=("out",)), rows)
    assert group_sums(group, {}) is None


def test_a_unit_that_owns_several_indices_sums_them():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 9, 5))
    graph = ChannelGraph.watch(net, torch.randn(1, 3, 5, 5))
    member = next(m for m in graph.group("0").members if m.role == "in")
    weight = net[2].weight.detach()
    torch.testing.assert_close(member_sums(weight, member), weight.double().sum(0).view(4, 9).sum(1))
