import copy
import math

import pytest
import torch

from nni_plugins.pruners.gates import HardConcrete, drawn, open_probability, settled


def test_the_probability_of_being_open_is_that_of_draws():
    log_alpha = torch.tensor([-3.0, -1.0, 0.0, 1.5])
    noise = torch.rand(20000, 4, generator=torch.Generator().manual_seed(0))
    values, _ = drawn(log_alpha, noise)
    assert (values.gt(0).float().mean(0) - open_probability(log_alpha)).abs().max() < 0.015
    assert float(values.min()) == 0.0
    assert float(values.max()) == 1.0


def test_at_test_time_a_gate_is_shut_exactly_from_minus_2_398_on():
    assert math.log(1 / 11) == pytest.approx(-2.398, abs=1e-3)
    gates = settled(torch.tensor([-4.6, -2.3985, -2.3970, 0.0, 2.3985, 4.6]))
    assert gates[:2].tolist() == [0.0, 0.0]
    assert gates[2] > 0
    assert gates[3] == pytest.approx(0.5)
    assert gates[4:].tolist() == [1.0, 1.0]


def test_the_derivative_of_a_draw_is_that_of_autograd():
    log_alpha = torch.linspace(-4, 4, 50, dtype=torch.float64, requires_grad=True)
    noise = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values, slope = drawn(log_alpha, noise)
    (expected,) = torch.autograd.grad(values.sum(), log_alpha)
    torch.testing.assert_close(slope.detach(), expected)
    assert (slope == 0).any()
    assert (slope > 0).any()


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_noise_at_the_edges_stays_finite(noise):
    values, slope = drawn(torch.tensor([-4.6, 0.0, 4.6]), torch.full((3,), noise))
    assert values.isfinite().all()
    assert slope.isfinite().all()


def test_draws_follow_the_generator_and_a_state_brings_them_back():
    one, two = (HardConcrete(6, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one.values, two.values)
    one.log_alpha.fill_(0.3)
    one.draw()
    assert not torch.equal(one.values, two.values)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    two.generator.set_state(one.generator.get_state())
    assert torch.equal(one.values, two.values)
    assert torch.equal(one.settled(), two.settled())
    one.draw()
    two.draw()
    assert torch.equal(one.values, two.values)
    assert copy.deepcopy(one) is one
