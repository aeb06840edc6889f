import numpy as np
import torch

from nni_plugins.pruners.lagrangian import Lagrangian

SIZES = {"a": 8, "b": 12}


def product(kept):
    return np.array([kept["a"] * kept["b"] / 96])


def test_the_expected_cost_is_exact_at_whole_numbers_and_close_between():
    lagrangian = Lagrangian(product, SIZES, np.array([0.5]), 10, 100)
    for closed in (0, 3, 7):
        probability = torch.ones(20)
        probability[:closed] = 0
        lagrangian.read(probability)
        torch.testing.assert_close(lagrangian.expected(probability), torch.tensor([(8 - closed) / 8]))
    probability = torch.full((20,), 0.55)
    lagrangian.read(probability)
    assert abs(float(lagrangian.expected(probability)) - 0.55**2) < 0.01


def test_what_a_unit_costs_is_the_derivative():
    lagrangian = Lagrangian(product, SIZES, np.array([0.5]), 10, 100)
    probability = torch.ones(20)
    probability[:4] = 0
    lagrangian.read(probability)
    torch.testing.assert_close(lagrangian.per_unit[0], torch.tensor([12 / 96] * 8 + [4 / 96] * 12))


def test_multipliers_climb_until_the_budget_holds():
    """Gates that want to stay open with different force: the weakest close, and the cost is what was asked."""
    lagrangian = Lagrangian(product, SIZES, np.array([0.5]), 100, 400)
    logits = torch.full((20,), 2.5)
    wish = torch.linspace(0.02, 0.4, 20)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    lagrangian.begin(logits.sigmoid())
    for step in range(1, 401):
        probability = logits.sigmoid()
        logits.grad = (lagrangian.push(probability, step) - wish) * probability * (1 - probability)
        optimizer.step()
        logits.clamp_(-4, 4)
    lagrangian.read(logits.sigmoid())
    assert abs(float(lagrangian.expected(logits.sigmoid())) - 0.5) < 0.02
    assert logits[:8].argmin() < logits[:8].argmax()


def test_the_target_tightens_from_the_present_cost():
    lagrangian = Lagrangian(product, SIZES, np.array([0.5]), 10, 100)
    lagrangian.begin(torch.ones(20))
    excess = []
    for step in (1, 5, 10, 50):
        before = lagrangian.multipliers.clone()
        lagrangian.push(torch.ones(20), step)
        excess.append(float((lagrangian.multipliers - before)[0] / lagrangian._rise[0]))
    np.testing.assert_allclose(excess, [0.05, 0.25, 0.5, 0.5], rtol=1e-4)


def test_a_cost_that_moves_in_jumps_still_has_a_slope():
    lagrangian = Lagrangian(lambda kept: np.array([np.ceil(kept["c"] / 16) / 4]), {"c": 64}, np.array([0.5]), 1, 10)
    probability = torch.full((64,), 0.5)
    lagrangian.read(probability)
    assert float(lagrangian.per_unit[0, 0]) > 0
