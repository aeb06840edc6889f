import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.pruners.chain import SCOPES
from nni_plugins.pruners.errors import BudgetError
from nni_plugins.pruners.scope import neighbourhoods
from nni_plugins.pruners.select import Pool, select, unit_multiple
from nni_plugins.pruners.targets import TARGETS, unit_costs

from .nets import NETS, X, make

_GRAPHS: dict = {}


def graph_of(name):
    if name not in _GRAPHS:
        net = make(name)
        _GRAPHS[name] = (ChannelGraph.watch(net, X), neighbourhoods(net, ChannelGraph.watch(net, X)))
    return _GRAPHS[name]


class Clock:
    """Stands for a latency table that is known: a nanosecond for each MAC, two for each parameter, a tenth of overhead."""

    has_curves = True

    def __init__(self, graph):
        self.graph, self.overhead_ms = graph, graph.cost().macs * 1e-7

    def total_ms(self, counts):
        macs, params = self.graph.cost_model.totals(counts)
        return self.overhead_ms + macs * 1e-6 + params * 2e-6

    def modules(self, kept):
        return {name: macs * 1e-6 + params * 2e-6 for name, (macs, params) in self.graph.cost(kept).modules.items()}


def pool_of(name, sparsity, scope="global", **kwargs):
    graph, classes = graph_of(name)
    kwargs.setdefault("latency", Clock(graph))
    groups = tuple(group.name for group in graph.groups if group.prunable)
    return Pool("config_list[0]", groups, sparsity=sparsity, scope=scope, classes=classes, **kwargs)


def random_scores(graph, seed=0):
    random = np.random.default_rng(seed)
    return {group.name: random.gamma(2.0, size=group.size) for group in graph.groups if group.prunable}


def removed_fraction(graph, kept, target, pool):
    counts = {name: int(mask.sum()) for name, mask in kept.items()}
    return 1 - TARGETS[target](graph, counts, pool) / TARGETS[target](graph, {}, pool)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", NETS)
def test_budget_is_met_on_every_structure(name, scope, target):
    graph, _ = graph_of(name)
    for sparsity in (0.3, 0.5, 0.7):
        pool = pool_of(name, sparsity, scope)
        kept = select(graph, [pool], random_scores(graph), target=target)
        removed = removed_fraction(graph, kept, target, pool)
        assert removed == pytest.approx(sparsity, abs=0.02)
        plan = Plan(graph, kept)  # what the plan says it costs is what was budgeted
        if target in ("macs", "params"):
            dense = getattr(graph.cost(), target)
            assert 1 - getattr(plan.cost(), target) / dense == pytest.approx(removed, abs=1e-6)


def test_macs_land_under_the_budget_where_a_state_there_is_near():
    for name in NETS:
        graph, _ = graph_of(name)
        pool = pool_of(name, 0.5)
        kept = select(graph, [pool], random_scores(graph), target="macs")
        assert removed_fraction(graph, kept, "macs", pool) >= 0.5


def test_channels_of_a_local_pool_are_the_ratio_of_each_group():
    graph, _ = graph_of("residual")
    kept = select(graph, [pool_of("residual", 0.25, "local")], random_scores(graph))
    sizes = {group.name: group.size for group in graph.groups}
    assert {name: 1 - mask.mean() for name, mask in kept.items()} == dict.fromkeys(kept, 0.25)
    assert set(kept) == {name for name in sizes if graph.group(name).prunable}


def test_the_number_of_channels_is_rounded_to_the_nearest():
    graph, _ = graph_of("plain")
    for sparsity, removed in ((0.25, 6), (0.26, 6), (0.27, 6), (0.28, 7), (0.01, 0)):
        pool = Pool("p", ("conv2",), sparsity=sparsity)
        kept = select(graph, [pool], random_scores(graph))
        assert 24 - int(kept.get("conv2", np.ones(24)).sum()) == removed


def test_lowest_scores_go_and_normalisation_matters():
    graph, _ = graph_of("plain")
    scores = {"conv1": np.arange(1.0, 17), "conv2": 1000 * np.arange(1.0, 25)}
    pool = Pool("p", ("conv1", "conv2"), sparsity=0.25, scope="global")
    raw = select(graph, [pool], scores, normalise=None)
    assert {name: int((~m).sum()) for name, m in raw.items()} == {"conv1": 10}
    fair = select(graph, [pool], scores, normalise="mean")
    assert {name: int((~m).sum()) for name, m in fair.items()} == {"conv1": 4, "conv2": 6}
    assert fair["conv1"].tolist() == [False] * 4 + [True] * 12


def test_kept_channels_are_multiples():
    graph, _ = graph_of("plain")
    kept = select(graph, [pool_of("plain", 0.5)], random_scores(graph), round_to=8)
    assert kept
    assert all(mask.sum() % 8 == 0 for mask in kept.values())


def test_multiple_counts_the_channels_that_a_unit_owns():
    graph, _ = graph_of("grouped")
    for group in graph.groups:
        if group.prunable and any(m.role == "out" for m in group.members):
            repeat = next(m.indices.shape[1] for m in group.members if m.role == "out")
            assert unit_multiple(group, 8) * repeat % 8 == 0


def test_bounds_hold():
    graph, _ = graph_of("residual")
    names = [group.name for group in graph.groups if group.prunable]
    bounds = {names[0]: (0.0, 0.25), names[1]: (0.75, 1.0)}
    kept = select(graph, [pool_of("residual", 0.5, bounds=bounds)], random_scores(graph), target="macs")
    lost = {name: 1 - kept[name].mean() if name in kept else 0.0 for name in names}
    assert lost[names[0]] <= 0.25
    assert lost[names[1]] >= 0.75


def test_dead_units_stay_dead_and_count():
    graph, _ = graph_of("plain")
    dead = {"conv1": np.arange(16) < 8}
    pool = Pool("p", ("conv1", "conv2"), sparsity=0.5, scope="local")
    kept = select(graph, [pool], random_scores(graph), dead=dead)
    assert not kept["conv1"][:8].any()
    assert sum(int((~mask).sum()) for mask in kept.values()) == 20
    other = select(graph, [Pool("p", ("conv2",), sparsity=0.5)], random_scores(graph), dead=dead)
    assert other["conv1"].tolist() == (~dead["conv1"]).tolist()


def test_threshold_takes_what_is_below_it():
    graph, _ = graph_of("plain")
    scores = {"conv1": np.arange(16.0), "conv2": np.zeros(24)}
    kept = select(graph, [Pool("p", ("conv1", "conv2"), threshold=5.0)], scores)
    assert kept["conv1"].tolist() == [False] * 5 + [True] * 11
    assert kept["conv2"].sum() == 1  # never an empty layer
    bounded = Pool("p", ("conv2",), threshold=5.0, bounds={"conv2": (0.0, 0.5)})
    assert select(graph, [bounded], scores)["conv2"].sum() == 12


def test_pools_meet_their_own_budgets_though_their_costs_are_coupled():
    graph, _ = graph_of("residual")
    first = frozenset({"stem", "a1", "a2"})
    second = frozenset({"b1", "b2", "fc"})
    pools = [
        Pool("one", ("stem", "a1"), sparsity=0.6, scope="global", modules=first),
        Pool("two", ("b1",), sparsity=0.7, scope="global", modules=second),
    ]
    kept = select(graph, pools, random_scores(graph), target="macs", tolerance=0.03)
    for pool in pools:
        assert removed_fraction(graph, kept, "macs", pool) == pytest.approx(pool.sparsity, abs=0.03)


def test_out_of_reach_says_asked_reachable_and_limit():
    graph, _ = graph_of("residual")
    groups = tuple(group.name for group in graph.groups if group.prunable)
    pool = Pool("config_list[0]", groups, sparsity=0.9, bounds=dict.fromkeys(groups, (0.0, 0.5)))
    with pytest.raises(BudgetError) as caught:
        select(graph, [pool], random_scores(graph), target="macs")
    text = str(caught.value)
    assert "config_list[0]: sparsity 0.9 of macs is out of reach: at most 0.7" in text
    assert "max_sparse_ratio" in text
    assert "\n" not in text
    assert caught.value.asked == 0.9
    assert 0.7 < caught.value.reachable < 0.8


def test_steps_too_large_for_the_tolerance_are_named():
    graph, _ = graph_of("plain")
    with pytest.raises(BudgetError, match=r"cannot be met within 2%: the nearest are 0.333\d* and 0.6667"):
        select(graph, [Pool("p", ("conv2",), sparsity=0.5)], random_scores(graph), round_to=8)
    kept = select(graph, [Pool("p", ("conv2",), sparsity=0.5)], random_scores(graph), round_to=8, tolerance=0.2)
    assert kept["conv2"].sum() == 8


def test_scores_that_are_not_finite_are_refused():
    graph, _ = graph_of("plain")
    with pytest.raises(BudgetError, match="conv2: its scores are not finite"):
        select(graph, [Pool("p", ("conv2",), sparsity=0.5)], {"conv2": np.full(24, np.nan)})


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(NETS)),
    scope=st.sampled_from(SCOPES),
    target=st.sampled_from(list(TARGETS)),
    sparsity=st.floats(0.05, 0.8),
    round_to=st.sampled_from([1, 1, 2, 4]),
    seed=st.integers(0, 10**6),
)
def test_any_budget_is_met_or_refused_in_one_line(name, scope, target, sparsity, round_to, seed):
    graph, _ = graph_of(name)
    pool = pool_of(name, sparsity, scope)
    scores = random_scores(graph, seed)
    kept, refusal = None, BudgetError("", 0, 0)
    try:
        kept = select(graph, [pool], scores, target=target, round_to=round_to)
    except BudgetError as error:
        refusal = error
    if kept is None:
        assert "\n" not in str(refusal)
        assert abs(refusal.reachable - sparsity) > 0.02
        assert round_to > 1 or sparsity > 0.7 or name == "grouped", refusal  # eight units, of four channels each
        return
    assert removed_fraction(graph, kept, target, pool) == pytest.approx(sparsity, abs=0.0201)
    for group, mask in kept.items():
        assert mask.any()
        assert mask.sum() % unit_multiple(graph.group(group), round_to) == 0
    again = select(graph, [pool], scores, target=target, round_to=round_to)
    assert all(np.array_equal(kept[group], again[group]) for group in again)


@pytest.mark.alone
def test_selection_is_fast_for_many_groups():
    """100 groups: a budget search takes tens of milliseconds, not seconds."""
    import time

    import torch
    from torch import nn

    layers = []
    for _ in range(100):
        layers += [nn.Conv2d(32, 32, 1), nn.ReLU()]
    graph = ChannelGraph.watch(nn.Sequential(*layers), torch.randn(1, 32, 2, 2))
    groups = tuple(group.name for group in graph.groups if group.prunable)
    scores = random_scores(graph)
    start = time.process_time()
    select(graph, [Pool("p", groups, sparsity=0.5, scope="global")], scores, target="macs")
    assert time.process_time() - start < 1.0


def test_scores_for_each_cost_take_what_saves_most():
    """With equal scores, the channels of the dearest group go; with scores in proportion to cost, all go alike."""
    graph, _ = graph_of("plain")
    names = ("conv1", "conv2", "conv3")
    sizes = {name: graph.group(name).size for name in names}
    pool = Pool("p", names, sparsity=0.3, scope="global")
    costs = unit_costs(graph, pool, "params", {})
    half = {name: graph.cost({name: sizes[name] // 2}).params for name in names}
    assert costs == {
        name: pytest.approx((graph.cost().params - half[name]) / (sizes[name] - sizes[name] // 2)) for name in names
    }
    equal = {name: np.ones(size) for name, size in sizes.items()}
    kept = select(graph, [pool], equal, target="params", normalise="cost")
    assert list(kept) == [max(costs, key=costs.get)]
    assert set(select(graph, [pool], equal, target="params", normalise=None)) != set(kept)  # the first of equal ones
    fair = {name: np.linspace(0.5, 1.5, size) * costs[name] for name, size in sizes.items()}
    assert set(select(graph, [pool], fair, target="params", normalise="cost")) == set(names)


def test_latency_out_of_reach_says_what_holds_it():
    graph, _ = graph_of("plain")
    with pytest.raises(
        BudgetError, match=r"sparsity 0\.99 of latency is out of reach: .*holds \d+% of what stays"
    ) as error:
        select(graph, [pool_of("plain", 0.99)], random_scores(graph), target="latency")
    assert "\n" not in str(error.value)
    assert 0.5 < error.value.reachable < 0.99


def test_latency_of_several_pools_counts_their_modules():
    graph, _ = graph_of("plain")
    table = Clock(graph)
    pools = [
        Pool("a", ("conv1",), sparsity=0.25, modules=frozenset({"conv1", "bn1"}), latency=table),
        Pool("b", ("conv3",), sparsity=0.5, modules=frozenset({"conv3"}), latency=table),
    ]
    kept = select(graph, pools, random_scores(graph), target="latency")
    counts = {name: int(mask.sum()) for name, mask in kept.items()}
    for pool, share in zip(pools, (0.75, 0.5), strict=True):
        times = [sum(table.modules(one)[name] for name in pool.modules) for one in (counts, {})]
        assert times[0] / times[1] == pytest.approx(share, abs=0.03)
