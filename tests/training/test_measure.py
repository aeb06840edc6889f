"""Latency: what a pass takes that nothing interrupts, with the threads that were asked for."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nni_plugins.training import latency_ms


class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0
        self.threads = set()

    def forward(self, x):
        self.calls += 1
        self.threads.add(torch.get_num_threads())
        assert not self.training
        assert not torch.is_grad_enabled()
        time.sleep(0.005 if self.calls > 3 else 0.05)
        return x


@pytest.mark.alone
def test_after_warm_up():
    torch.set_num_threads(2)
    model = Slow().train()
    assert latency_ms(model, torch.ones(1), threads=1, warmup=3, runs=9) == pytest.approx(5, rel=0.6)
    assert model.calls == 12
    assert model.threads == {1}
    assert torch.get_num_threads() == 2
    assert model.training


class Taking(nn.Module):
    """Each pass takes what it is told, by a clock that nothing else moves."""

    def __init__(self, monkeypatch, milliseconds):
        super().__init__()
        self.calls, self.now, self.milliseconds = 0, 0.0, milliseconds
        monkeypatch.setattr("nni_plugins.training.measure.time", SimpleNamespace(perf_counter=lambda: self.now))

    def forward(self, x):
        self.calls += 1
        self.now += self.milliseconds(self.calls) / 1000
        return x


def test_passes_that_had_to_wait_do_not_count(monkeypatch):
    model = Taking(monkeypatch, lambda call: 2 if call % 3 == 0 else 30)  # two passes in three
    assert latency_ms(model, torch.ones(1), warmup=0, runs=30, seconds=5) == pytest.approx(2)
    assert model.calls == 30


def test_time_is_bounded(monkeypatch):
    model = Taking(monkeypatch, lambda call: 50 if call <= 3 else 5)
    assert latency_ms(model, torch.ones(1), warmup=3, runs=10_000, seconds=0.2) == pytest.approx(5)
    assert model.calls in (13, 14)
    slow = Taking(monkeypatch, lambda call: 1000)
    assert latency_ms(slow, torch.ones(1), warmup=3, runs=10_000, seconds=0.2) == pytest.approx(1000)
    assert slow.calls == 5
