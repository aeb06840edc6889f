import itertools

import numpy as np
import pytest
import torch
from torch import nn

from nni_plugins.channels import Plan
from nni_plugins.pruners import BudgetError, MagnitudePruner, PruningError, RandomPruner, TaylorPruner
from nni_plugins.pruners.base import GroupPruner
from nni_plugins.speedup import ModelSpeedup

from .nets import EVERYTHING, NETS, X, make

HALF = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


def kept_of(pruner):
    return {name: units.tolist() for name, units in pruner.plan.kept.items()}


@pytest.mark.parametrize("target", ["channels", "macs", "params"])
@pytest.mark.parametrize("name", NETS)
def test_budget_is_met_and_masked_equals_removed(name, target):
    net = make(name)
    config = [{"op_types": EVERYTHING, "sparse_ratio": 0.5}]
    pruner = MagnitudePruner(net, config, dummy_input=X, scope="global", target=target)
    model, masks = pruner.compress()
    dense, cost = pruner.graph.cost(), pruner.plan.cost()
    if target != "channels":
        assert getattr(cost, target) / getattr(dense, target) == pytest.approx(0.5, abs=0.02)
    masked = model(X)
    pruner.unwrap_model()
    speedup = ModelSpeedup(net, X, masks)
    compact = speedup.speedup_model()
    torch.testing.assert_close(compact(X), masked, rtol=0, atol=1e-5)
    assert sum(p.numel() for p in compact.parameters()) == cost.params
    assert speedup.report.macs_after == cost.macs


def test_masks_are_the_plan_for_every_member():
    net = make("residual")
    pruner = MagnitudePruner(net, HALF, dummy_input=X)
    pruner.compress()
    masks = pruner.get_masks()
    pruner.unwrap_model()
    expected = pruner.plan.masks(net)
    assert set(expected) <= set(masks)
    for module, targets in masks.items():
        for target, mask in targets.items():
            wanted = expected.get(module, {}).get(target, torch.ones_like(mask))
            assert torch.equal(mask, wanted), (module, target)
    assert masks["bn"]["weight"].tolist() == masks["bn"]["bias"].tolist() == masks["na2"]["weight"].tolist()


def test_finished_pruners_do_nothing_when_run_again():
    net = make("plain")
    pruner = MagnitudePruner(net, HALF, dummy_input=X)
    pruner.compress()
    before = kept_of(pruner)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.uniform_(-1, 1)
    pruner.compress()
    assert kept_of(pruner) == before


def test_settings_per_entry():
    config = [{"op_names": ["conv1"], "sparse_ratio": 0.25}, {"op_names": ["conv2", "conv3"], "sparse_ratio": 0.5}]
    pruner = MagnitudePruner(make("plain"), config, dummy_input=X)
    pruner.compress()
    assert {name: len(units) for name, units in pruner.plan.kept.items()} == {"conv1": 12, "conv2": 12, "conv3": 16}


def test_threshold_and_bounds_from_the_configuration():
    net = make("plain")
    raw = MagnitudePruner(net, HALF, dummy_input=X)
    threshold = float(raw._scores()["conv1"].sort().values[5])
    raw.unwrap_model()
    config = [{"op_names": ["conv1"], "sparse_threshold": threshold}]
    pruner = MagnitudePruner(net, config, dummy_input=X)
    pruner.compress()
    assert len(pruner.plan.kept["conv1"]) == 11
    pruner.unwrap_model()
    bounded = MagnitudePruner(net, [{**config[0], "max_sparse_ratio": 0.25}], dummy_input=X)
    bounded.compress()
    assert len(bounded.plan.kept["conv1"]) == 12


def test_a_second_pruner_on_the_same_layers_adds_to_the_first():
    """NNI gives a second pruner on a layer no target; here it adopts what is there, and counts what is gone."""
    net = make("residual")
    first = RandomPruner(net, [{"op_names": ["a1", "stem"], "sparse_ratio": 0.25}], dummy_input=X)
    first.compress()
    gone = kept_of(first)
    second = MagnitudePruner.from_compressor(first, HALF, dummy_input=X, scope="global")
    model, masks = second.compress()
    for name, units in kept_of(second).items():
        assert set(units) <= set(gone.get(name, units))
    assert sum(len(units) for units in second.plan.kept.values()) == (16 + 24 + 24) / 2
    masked = model(X)
    second.unwrap_model()
    compact = ModelSpeedup(net, X, masks).speedup_model()
    torch.testing.assert_close(compact(X), masked, rtol=0, atol=1e-5)


def test_it_continues_from_nnis_own_pruner():
    from nni.compression.pruning import L1NormPruner

    net = make("plain")
    theirs = L1NormPruner(net, [{"op_names": ["conv2"], "sparse_ratio": 0.5}])
    _, masks = theirs.compress()
    dead = (masks["conv2"]["weight"].flatten(1).sum(1) == 0).numpy()
    ours = MagnitudePruner.from_compressor(
        theirs, [{"op_names": ["conv1", "conv2"], "sparse_ratio": 0.5}], dummy_input=X
    )
    ours.compress()
    assert set(np.flatnonzero(dead)).isdisjoint(kept_of(ours)["conv2"])
    assert {name: len(units) for name, units in ours.plan.kept.items()} == {"conv1": 8, "conv2": 12}


def test_unstructured_masks_of_an_earlier_pruner_are_kept():
    from nni.compression.pruning import LevelPruner

    net = make("plain")
    theirs = LevelPruner(net, [{"op_names": ["conv2"], "sparse_ratio": 0.3}])
    _, before = theirs.compress()
    ours = MagnitudePruner.from_compressor(theirs, [{"op_names": ["conv2"], "sparse_ratio": 0.5}], dummy_input=X)
    _, after = ours.compress()
    assert (after["conv2"]["weight"] <= before["conv2"]["weight"]).all()
    assert after["conv2"]["weight"].mean() < 0.5


def test_gradual_pruning_follows_the_schedule(make_evaluator, digits):
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 20, 3, padding=1), torch.nn.BatchNorm2d(20), torch.nn.ReLU(), torch.nn.Conv2d(20, 20, 3),
        torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(20, 10),
    )  # fmt: skip
    evaluator = make_evaluator(net)
    seen = []

    class Watched(MagnitudePruner):
        def prune(self, fraction=1.0):
            masks = super().prune(fraction)
            seen.append((self._step, fraction, {name: set(units) for name, units in kept_of(self).items()}))
            return masks

    pruner = Watched(net, HALF, evaluator, schedule={"shape": "linear", "times": 5, "interval_steps": 3})
    pruner.compress()
    assert evaluator.steps == [15]
    assert [(step, round(fraction, 1)) for step, fraction, _ in seen] == [
        (3, 0.2),
        (6, 0.4),
        (9, 0.6),
        (12, 0.8),
        (15, 1.0),
    ]
    counts = [sum(len(units) for units in kept.values()) for _, _, kept in seen]
    assert counts == [36, 32, 28, 24, 20]
    for (_, _, earlier), (_, _, later) in itertools.pairwise(seen):
        assert all(later[name] <= earlier[name] for name in later)


def test_nnis_agp_drives_our_pruners(make_evaluator):
    from nni.compression.pruning import AGPPruner

    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 10),
    )  # fmt: skip
    ours = MagnitudePruner(net, HALF, make_evaluator(net))
    _, masks = AGPPruner(ours, interval_steps=2, total_times=3).compress(8, None)
    assert ours.finished
    assert masks["0"]["weight"].mean() == masks["2"]["bias"].mean() == 0.5
    assert masks["2"]["weight"].mean() == 0.25


def test_fused_with_a_second_pruner_one_training_serves_both(make_evaluator, digits):
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 10),
    )  # fmt: skip
    evaluator = make_evaluator(net)
    first = MagnitudePruner(net, [{"op_names": ["0"], "sparse_ratio": 0.5}], evaluator)
    second = TaylorPruner.from_compressor(first, [{"op_names": ["2"], "sparse_ratio": 0.5}], 4)
    second.compress()
    assert evaluator.steps == [4]
    assert first.finished
    assert second.finished
    assert {name: len(units) for name, units in second.plan.kept.items()} == {"0": 8, "2": 8}


def test_a_method_that_cannot_be_fused_says_so():
    class Alone(MagnitudePruner):
        fusible = False

    first = MagnitudePruner(make("plain"), [{"op_names": ["conv1"], "sparse_ratio": 0.5}], dummy_input=X)
    with pytest.raises(PruningError, match="Alone trains several times and cannot be fused"):
        Alone.from_compressor(first, HALF, dummy_input=X)


def test_it_is_an_nni_pruner_and_a_missing_input_is_named(make_evaluator):
    from nni.compression.base.compressor import Pruner

    assert issubclass(GroupPruner, Pruner)
    net = make("plain")
    with pytest.raises(PruningError, match="no dummy_input is known"):
        MagnitudePruner(net, HALF)
    with pytest.raises(PruningError, match="no dummy_input is known"):
        MagnitudePruner(net, HALF, make_evaluator(net, dummy=False))
    with pytest.raises(PruningError, match="scope is 'layer'"):
        MagnitudePruner(net, HALF, dummy_input=X, scope="layer")
    with pytest.raises(PruningError, match="target is 'flops'"):
        MagnitudePruner(net, HALF, dummy_input=X, target="flops")
    with pytest.raises(PruningError, match="needs an evaluator"):
        MagnitudePruner(net, HALF, dummy_input=X, schedule={"shape": "linear", "times": 2}).compress()


def test_a_budget_out_of_reach_leaves_the_model_dense():
    net = make("plain")
    pruner = MagnitudePruner(net, [{"op_types": ["Conv2d"], "sparse_ratio": 0.99}], dummy_input=X, target="params")
    with pytest.raises(BudgetError, match=r"sparsity 0\.99 of params is out of reach"):
        pruner.compress()
    assert all(mask.all() for targets in pruner.get_masks().values() for mask in targets.values())
    assert pruner.plan.kept == {}


def test_the_plan_is_one_of_channels_and_costs_what_it_says():
    pruner = MagnitudePruner(make("concat"), HALF, dummy_input=X)
    assert isinstance(pruner.plan, Plan)
    assert pruner.plan.cost().macs == pruner.graph.cost().macs


def test_an_unreachable_budget_is_refused_before_training(make_evaluator):
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 10),
    )  # fmt: skip
    evaluator = make_evaluator(net)
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.9, "max_sparse_ratio": 0.5}]
    with pytest.raises(BudgetError, match="out of reach"):
        TaylorPruner(net, config, evaluator, 5, target="macs").compress()
    assert evaluator.steps == []


def test_steps_of_a_schedule_may_be_too_coarse_as_long_as_its_end_is_met(make_evaluator):
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 10),
    )  # fmt: skip
    schedule = {"shape": "linear", "times": 20, "interval_steps": 1}
    pruner = MagnitudePruner(net, HALF, make_evaluator(net), target="params", schedule=schedule, tolerance=0.05)
    pruner.compress()
    assert pruner.plan.cost().params / pruner.graph.cost().params == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("config", "kwargs", "message"),
    [
        ([{"op_types": ["Linear"], "sparse_ratio": "0.5"}], {}, "config_list[0]: Key 'sparse_ratio' error: '0.5'"),
        ([{"op_types": ["Linear"], "sparce_ratio": 0.5}], {}, "config_list[0]: Wrong key 'sparce_ratio'"),
        ({"op_types": ["Linear"], "sparse_ratio": 0.5}, {}, "config_list must be a list of dictionaries"),
        (None, {}, "config_list must be a list of dictionaries"),
        ([{"op_names": ["zero"], "sparse_ratio": 0.5}], {}, "config_list[0].op_names: the model has no module 'zero'"),
        ([{"op_names_re": ["[0"], "sparse_ratio": 0.5}], {}, "config_list[0].op_names_re: '[0' is no regular"),
        (
            [
                {"op_names": ["0"], "sparse_ratio": 0.5, "global_group_id": "a"},
                {"op_names": ["2"], "sparse_threshold": 0.5, "global_group_id": "a"},
            ],
            {},
            "global_group_id a: its entries ask for different",
        ),
        (None, {"round_to": 1.5}, "round_to is 1.5; it must be a whole number"),
        (None, {"round_to": "8"}, "round_to is '8'; it must be a whole number"),
        (None, {"tolerance": "a"}, "tolerance is 'a'; it must be a number"),
        (None, {"schedule": 3}, "schedule is 3; it must be a Schedule"),
        (None, {"schedule": {"tims": 3}}, "schedule has no field 'tims'; known: shape, times"),
        (None, {"schedule": {"times": "3"}}, "schedule.times is '3'; it must be a whole number"),
    ],
)
def test_wrong_settings_are_named_in_one_line(config, kwargs, message):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    if kwargs:
        config = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
    with pytest.raises(PruningError) as caught:
        MagnitudePruner(model, config, dummy_input=torch.randn(2, 4), **kwargs).compress()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_legacy_entry_that_excludes_is_read_as_nni_reads_it():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    legacy = [{"op_types": ["Linear"], "sparsity": 0.5}, {"op_names": ["0"], "exclude": True}]
    pruner = MagnitudePruner(model, legacy, dummy_input=torch.randn(2, 4))
    pruner.compress()
    assert {name: len(kept) for name, kept in pruner.plan.kept.items() if len(kept) < 8} == {"2": 4}


@pytest.mark.parametrize("entry", [{"op_names": ["0"]}, {"op_names_re": ["0$"], "op_types": ["Linear"]}])
def test_an_entry_that_excludes_counts_beside_entries_of_the_present_form(entry):
    """NNI reads it in lists of the old form only; it was dropped without a word."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.5}, {**entry, "exclude": True}]
    pruner = MagnitudePruner(model, config, dummy_input=torch.randn(2, 4))
    pruner.compress()
    assert {name: len(kept) for name, kept in pruner.plan.kept.items() if len(kept) < 8} == {"2": 4}


def test_unwrapping_keeps_the_order_of_parameters_and_can_be_done_twice():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    before = [name for name, _ in model.named_parameters()]
    pruner = MagnitudePruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}], dummy_input=torch.randn(2, 4))
    pruner.compress()
    pruner.unwrap_model()
    pruner.unwrap_model()
    assert [name for name, _ in model.named_parameters()] == before


def test_from_compressor_takes_the_methods_own_arguments_in_order(make_evaluator):
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3), torch.nn.Flatten())
    first = MagnitudePruner(net, HALF, make_evaluator(net))
    with pytest.raises(TypeError, match="multiple values for keyword argument 'training_steps'"):
        TaylorPruner.from_compressor(first, HALF, 4, training_steps=5)
    with pytest.raises(TypeError, match="too many positional arguments"):
        TaylorPruner.from_compressor(first, HALF, 4, None, 5)
    second = TaylorPruner.from_compressor(first, HALF, 4, None)
    assert second.schedule.interval_steps == 4
    assert second.evaluator is first.evaluator


@pytest.mark.parametrize("normed", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_masks_make_no_zero_by_zero_of_a_weight_norm(normed):
    model = nn.Sequential(normed(nn.Linear(4, 8)), nn.ReLU(), normed(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 2))
    x, groups = torch.randn(5, 4), [{"op_types": ["Linear", "ParametrizedLinear"], "sparse_ratio": 0.5}]
    pruner = MagnitudePruner(model, groups, dummy_input=x)
    _, masks = pruner.compress()
    masked = model(x)
    assert torch.isfinite(masked).all()
    assert sorted(int(dead.sum()) for dead in pruner._dead_units().values()) == [3, 4]
    pruner.unwrap_model()
    compact = ModelSpeedup(model, x, masks).speedup_model()
    assert torch.allclose(compact(x), masked, atol=1e-5)
    assert [compact[i].weight.shape[0] for i in (0, 2)] == [4, 3]
