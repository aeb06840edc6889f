"""Latency: what a pass takes that nothing interrupts, with the threads that were asked for."""

import time

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


class Interrupted(nn.Module):
    """Two passes in three have to wait."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        time.sleep(0.002 if self.calls % 3 == 0 else 0.03)
        return x


def test_passes_that_had_to_wait_do_not_count():
    assert latency_ms(Interrupted(), torch.ones(1), warmup=0, runs=30, seconds=5) < 15


def test_time_is_bounded():
    model = Slow()
    start = time.monotonic()
    latency_ms(model, torch.ones(1), warmup=3, runs=10_000, seconds=0.2)
    assert time.monotonic() - start < 1
    assert model.calls >= 8
