"""The latency table of real models, against clocks and against itself."""

from __future__ import annotations

import copy
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.channels.latency import LatencyTable
from nni_plugins.channels.latency.clock import Clock
from nni_plugins.speedup import ModelSpeedup


def conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


def net(width: int = 32, depth: int = 2) -> nn.Sequential:
    middle = [conv(width, width) for _ in range(depth)]
    return nn.Sequential(conv(3, width), *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)).eval()


X = torch.randn(1, 3, 24, 24)


def table_of(model: nn.Module, x: Any = X, **options: Any) -> LatencyTable:
    return LatencyTable.measure(ChannelGraph.watch(model, x), model, x, **options)


def halves(graph: ChannelGraph, share: float = 0.5) -> dict[str, int]:
    return {g.name: max(1, round(share * g.size)) for g in graph.groups if g.prunable}


def cpu_ratio(small: nn.Module, large: nn.Module, x: torch.Tensor, turns: int = 15) -> float:
    """CPU time of one model in shares of another's, in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for turn in range(turns):
            for model, found in zip((small, large), times, strict=True):
                model(x)
                start = time.thread_time()
                model(x)
                if turn > 2:
                    found.append(time.thread_time() - start)
    return statistics.median(times[0]) / statistics.median(times[1])


def test_the_full_model_takes_what_was_measured_and_its_modules_make_it_up() -> None:
    model = net()
    table = table_of(model)
    assert table.taken > 10
    assert table.measured_ms > 0.05
    assert table.latency_ms() == pytest.approx(table.measured_ms)
    assert table.latency_ms({}) == pytest.approx(table.measured_ms)
    modules = table.modules()
    assert sum(modules.values()) + table.overhead_ms == pytest.approx(table.measured_ms)
    assert set(modules) <= {name for name, _ in model.named_modules()}
    assert modules["1.0"] > modules["1.2"]  # a convolution against a ReLU
    smaller = table.modules(halves(table.graph))
    assert sum(smaller.values()) + table.overhead_ms == pytest.approx(table.latency_ms(halves(table.graph)))
    assert table.timed_ms() == pytest.approx(table.measured_ms)


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_a_smaller_model_is_predicted(share: float) -> None:
    model = net(64, 4)
    graph = ChannelGraph.watch(model, X)
    plan = Plan(graph, {name: np.arange(kept) for name, kept in halves(graph, share).items()})
    compact = copy.deepcopy(model)
    compact = ModelSpeedup(compact, X, plan.masks(compact)).speedup_model().eval()
    errors = []
    for _ in range(4):  # other processes may disturb one or the other
        table = LatencyTable.measure(graph, model, X, cache=False)
        predicted = [table.latency_ms(plan.counts), table.timed_ms(plan.counts)]
        truth = cpu_ratio(compact, model, X) * table.measured_ms
        errors.append(max(abs(value / truth - 1) for value in predicted))
        if errors[-1] < 0.3:
            return
    pytest.fail(f"off by {errors}")


def test_what_is_known_is_not_measured_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    first = table_of(model)
    known = first.timed_ms({"0.0": 13})
    (file,) = cache.glob("*.json")

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Clock, "time", never)
    monkeypatch.setattr(Clock, "time_model", never)
    before = file.stat().st_mtime_ns
    second = table_of(model)
    assert second.taken == 0
    assert second.latency_ms({"0.0": 12}) == first.latency_ms({"0.0": 12})
    assert second.timed_ms({"0.0": 13}) == known
    assert file.stat().st_mtime_ns == before
    with pytest.raises(AssertionError):
        table_of(model, fresh=True)
    with pytest.raises(AssertionError):
        table_of(net(24))
    with pytest.raises(AssertionError):
        table_of(model, cache=False)


def test_equal_operators_are_timed_once() -> None:
    few, many = table_of(net(16, 2), cache=False), table_of(net(16, 12), cache=False)
    assert many.taken <= few.taken + 1  # its run is timed twice


def test_shares_only() -> None:
    model = net()
    table = table_of(model, curves=False)
    assert not table.has_curves
    assert table.taken == 2 + len({entry.key for entry in table._entries})
    assert table.latency_ms() == pytest.approx(table.measured_ms)
    with pytest.raises(ValueError, match="curves=True"):
        table.latency_ms({"0.0": 3})


def test_groups_take_what_goes_through_them() -> None:
    table = table_of(net(), curves=False)
    graph, modules = table.graph, table.modules()
    assert table.group_ms("1.0") == pytest.approx(sum(modules[f"1.{i}"] for i in range(3)) + modules["2.0"], rel=0.05)
    frozen = [g for g in graph.groups if not g.prunable]
    assert table.group_ms(frozen[-1]) == pytest.approx(modules["5"], rel=0.5)
    assert table.group_ms(frozen[-1]) <= modules["5"]
    with pytest.raises(KeyError, match="no channel group"):
        table.group_ms("nothing")


def test_what_is_out_of_time_is_taken_as_proportional() -> None:
    model = net(32)
    table = table_of(model, seconds=0.0)
    assert table.taken <= 2
    half = table.latency_ms(halves(table.graph))
    assert 0.2 * table.measured_ms < half < 0.7 * table.measured_ms


def test_sizes_that_an_operator_refuses_are_left_out() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 64, 1), nn.Conv2d(64, 8, 1)
            self.grouped = nn.Conv2d(64, 64, 3, padding=1, groups=16)  # four channels a group: 61 are refused

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.relu(self.grouped(torch.relu(self.first(x)))))

    table = table_of(Grouped().eval())
    (entry,) = [e for e in table._entries if "convolution" in e.operator.name and e.operator.args[8] == 16]
    assert entry.curve is not None
    ((along, shares, _),) = entry.curve.axes
    assert along.odd == ()
    assert len(along.even) > 4
    assert list(shares) != pytest.approx([size / along.full for size in along.even], rel=0.01)  # measured, not assumed
    (group,) = [g for g in table.graph.groups if g.prunable]
    assert group.size == 16
    assert table.latency_ms({group.name: 8}) < 0.9 * table.measured_ms


def test_a_search_can_ask_often() -> None:
    table = table_of(net(16, 12), seconds=0.0)
    counts = table.graph.cost_model.counts(halves(table.graph))
    assert table.total_ms(counts) == pytest.approx(table.latency_ms(halves(table.graph)))
    start = time.thread_time()
    for _ in range(100):
        table.total_ms(counts)
    assert (time.thread_time() - start) / 100 < 0.002


def test_measuring_leaves_everything_as_it_was() -> None:
    model = net().train()
    before = copy.deepcopy(model.state_dict())
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    calls: list[tuple[int, int]] = []
    table_of(model, seconds=0.0, threads=2, progress=lambda done, total, name: calls.append((done, total)))
    assert model.training
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [done for done, _ in calls] == list(range(len(calls)))
    assert {total for _, total in calls} == {len(calls)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    table = table_of(net(16).to(dtype), X.to(dtype))
    assert 0 < table.latency_ms(halves(table.graph)) < 1.5 * table.measured_ms


def test_integers_dictionaries_and_channels_last() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.hidden, self.head = nn.Embedding(50, 16), nn.Linear(16, 32), nn.Linear(32, 3)

        def forward(self, words: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
            x = torch.relu(self.hidden(self.table(words))) * mask.unsqueeze(-1)
            return {"scores": self.head(x)}

    x = {"words": torch.arange(20).view(2, 10), "mask": torch.ones(2, 10, dtype=torch.bool)}
    table = table_of(Words(), x)
    assert 0 < table.latency_ms(halves(table.graph)) < 2 * table.measured_ms
    last = net(16).to(memory_format=torch.channels_last)
    table = table_of(last, X.contiguous(memory_format=torch.channels_last))
    assert any("/[" in key for key in table._timer.cache._times)  # strides of channels last
    assert 0 < table.latency_ms(halves(table.graph)) < 1.5 * table.measured_ms
