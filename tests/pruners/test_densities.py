import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nni_plugins.pruners.densities import kept_counts, layer_densities

RESNET = {"stem": (64, 3, 7, 7), "a": (64, 64, 3, 3), "b": (512, 512, 3, 3), "fc": (1000, 512)}


def total(shapes, densities):
    sizes = {name: np.prod(shape) for name, shape in shapes.items()}
    return sum(densities[name] * sizes[name] for name in shapes) / sum(sizes.values())


def test_erk_is_proportional_to_the_sides_over_the_size_below_one():
    found = layer_densities(RESNET, 0.1, "erk")
    raw = {name: sum(shape) / np.prod(shape) for name, shape in RESNET.items()}
    epsilons = {name: found[name] / raw[name] for name in RESNET if found[name] < 1}
    assert len(epsilons) >= 2
    assert max(epsilons.values()) == pytest.approx(min(epsilons.values()))
    assert total(RESNET, found) == pytest.approx(0.1)


def test_a_layer_that_would_exceed_one_is_dense_and_the_others_are_solved_again():
    shapes = {"small": (4, 4), "large": (100, 100)}
    found = layer_densities(shapes, 0.5, "erk")
    assert found["small"] == 1
    assert found["large"] == pytest.approx((0.5 * 10016 - 16) / 10000)


def test_uniform_and_its_bounds():
    assert layer_densities({"a": (4, 5), "b": (10, 2)}, 0.25, "uniform") == pytest.approx({"a": 0.25, "b": 0.25})
    held = layer_densities({"a": (4, 5), "b": (10, 2)}, 0.5, "uniform", {"a": (0.8, 1.0)})
    assert held == pytest.approx({"a": 0.8, "b": 0.2})


def test_counts_have_the_right_total_where_they_share_a_budget():
    shapes = {str(i): (3, 1) for i in range(10)}
    densities = dict.fromkeys(shapes, 0.5)
    assert sum(kept_counts(shapes, densities).values()) == 15
    assert set(kept_counts(shapes, densities, joint=False).values()) == {2}
    assert kept_counts({"a": (5, 5)}, {"a": 0.0}) == {"a": 1}  # no layer is emptied


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=1, max_size=8),
    density=st.floats(0, 1),
    how=st.sampled_from(["uniform", "erk"]),
)
def test_any_density_is_met_within_the_bounds(shapes, density, how):
    named = {str(i): tuple(shape) for i, shape in enumerate(shapes)}
    found = layer_densities(named, density, how)
    assert all(0 <= value <= 1 + 1e-12 for value in found.values())
    assert total(named, found) == pytest.approx(density, abs=1e-9)
