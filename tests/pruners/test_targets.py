"""The target latency end to end, with a table that is measured here."""

import pytest
import torch

from nni_plugins.channels import ChannelGraph
from nni_plugins.channels.latency import LatencyTable
from nni_plugins.pruners import BudgetError, MagnitudePruner, PruningError
from nni_plugins.speedup import ModelSpeedup

from .nets import X, make

IMAGE = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
CONFIG = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.2}]


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NNI_PLUGINS_CACHE", str(tmp_path_factory.mktemp("latency")))
        yield


def test_latency_is_measured_once_and_the_budget_met(tmp_path, monkeypatch):
    monkeypatch.setenv("NNI_PLUGINS_CACHE", str(tmp_path))  # where no other test of this file has measured
    net = make("plain")
    pruner = MagnitudePruner(net, CONFIG, dummy_input=IMAGE, scope="global", target="latency", tolerance=0.05)
    _, masks = pruner.compress()
    left = pruner.latency.latency_ms(pruner.plan.counts) / pruner.latency.latency_ms()
    assert left == pytest.approx(0.8, abs=0.05)
    pruner.unwrap_model()
    compact = ModelSpeedup(net, IMAGE, masks).speedup_model()
    assert sum(p.numel() for p in compact.parameters()) < sum(p.numel() for p in make("plain").parameters())
    again = MagnitudePruner(make("plain"), CONFIG, dummy_input=IMAGE, target="latency")
    assert pruner.latency.taken > 0
    assert again.latency.taken == 0


def test_a_latency_that_cannot_be_reached_is_refused_in_one_line():
    net = make("plain")
    pruner = MagnitudePruner(net, [{**CONFIG[0], "sparse_ratio": 0.999}], dummy_input=IMAGE, target="latency")
    with pytest.raises(BudgetError, match=r"sparsity 0\.999 of latency is out of reach") as error:
        pruner.compress()
    assert "\n" not in str(error.value)


def test_tables_of_other_models_or_without_curves_are_refused():
    net, other = make("plain"), make("residual")
    graph = ChannelGraph.watch(other, IMAGE)
    table = LatencyTable.measure(graph, other, IMAGE, curves=False)
    for model, message in ((net, "of another model"), (other, "knows no smaller model")):
        with pytest.raises(PruningError, match=message):
            MagnitudePruner(model, CONFIG, dummy_input=IMAGE, target="latency", latency=table)


def test_normalisation_by_cost_is_for_every_pruner():
    net = make("plain")
    by_cost = MagnitudePruner(net, CONFIG, dummy_input=X, scope="global", target="macs", normalise="cost")
    by_cost.compress()
    assert by_cost.plan.cost().macs / by_cost.graph.cost().macs == pytest.approx(0.8, abs=0.02)
    with pytest.raises(PruningError, match="normalise is 'costs'"):
        MagnitudePruner(make("plain"), CONFIG, dummy_input=X, normalise="costs")
