"""What a report says of latency: nothing unless it is known, and that fewer MACs are not faster where they are not."""

import pytest
import torch
from torch import nn

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.channels.latency import LatencyTable
from nni_plugins.speedup import ModelSpeedup
from nni_plugins.speedup.report import SpeedupReport

X = torch.randn(4, 16)
WORDS = "fewer MACs but not faster"


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


@pytest.mark.parametrize(
    ("macs", "latency", "slower"),
    [
        ((100, 50), (1.0, 1.2), True),
        ((100, 50), (1.0, 1.0), True),
        ((100, 50), (1.0, 0.9), False),
        ((100, 100), (1.0, 1.2), False),
        ((100, 50), (None, 1.2), False),
        ((100, 50), (1.0, None), False),
    ],
)
def test_fewer_macs_that_are_not_faster_are_named(macs, latency, slower):
    report = SpeedupReport(*macs, latency_before_ms=latency[0], latency_after_ms=latency[1])
    assert report.slower is slower
    assert (WORDS in str(report)) is slower
    assert ("latency" in str(report)) is (None not in latency)


def test_a_latency_table_says_what_the_compact_model_takes(tmp_path):
    model = make()
    graph = ChannelGraph.watch(model, X)
    table = LatencyTable.measure(graph, model, X, cache=tmp_path, seconds=5)
    plan = Plan(graph, {"0": range(32)})
    speedup = ModelSpeedup(model, X, plan.masks(model), latency=table)
    speedup.speedup_model()
    assert speedup.report.latency_before_ms == table.latency_ms()
    assert speedup.report.latency_after_ms == table.latency_ms({"0": 32})
    assert speedup.report.to_dict()["latency_after_ms"] == speedup.report.latency_after_ms
    other = ModelSpeedup(make(), X, plan.masks(make()))
    other.speedup_model()
    assert other.report.latency_before_ms is None
    assert "latency" not in str(other.report)


def test_a_table_of_another_model_says_nothing_of_the_compact_one(tmp_path):
    model, narrow = make(), nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    table = LatencyTable.measure(ChannelGraph.watch(narrow, X), narrow, X, cache=tmp_path, seconds=5)
    masks = Plan(ChannelGraph.watch(model, X), {"0": range(32)}).masks(model)
    speedup = ModelSpeedup(model, X, masks, latency=table)
    speedup.speedup_model()
    assert (speedup.report.latency_before_ms, speedup.report.latency_after_ms) == (None, None)
    assert not speedup.report.slower
