import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nni_plugins.pruners.patterns import Pattern
from nni_plugins.pruners.regrow import (
    clear_state,
    drop_and_grow,
    drop_and_grow_all,
    drop_fraction,
    start_grown,
    top,
)


def make(shape, density, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight, gradient = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    mask = (torch.rand(shape, generator=generator) < density).float()
    return weight, mask, gradient


def test_the_smallest_go_and_the_steepest_grow():
    weight = torch.tensor([5.0, 1.0, 4.0, 3.0, 9.0, 9.0, 9.0, 9.0])
    mask = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0])
    gradient = torch.tensor([0.0, 0.0, 9.0, 0.0, 0.1, -0.5, 0.2, 0.3])
    assert drop_and_grow(weight, mask, gradient, 0.5).tolist() == [1, 0, 1, 0, 0, 1, 0, 1]
    assert mask.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    # what was dropped may grow again at once, as in RigL
    gradient[1] = 7.0
    assert drop_and_grow(weight, mask, gradient, 0.5).tolist() == [1, 1, 1, 0, 0, 1, 0, 0]


def test_it_is_invariant_to_the_scale_of_the_gradient():
    weight, mask, gradient = make((20, 30), 0.2)
    assert torch.equal(drop_and_grow(weight, mask, gradient, 0.3), drop_and_grow(weight, mask, gradient * 2.0**16, 0.3))


def test_random_growth_is_the_generators():
    weight, mask, _ = make((40, 40), 0.1)
    draw = lambda seed: drop_and_grow(weight, mask, None, 0.3, torch.Generator().manual_seed(seed))  # noqa: E731
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert draw(0).sum() == mask.sum()


def test_nothing_grows_where_it_is_not_allowed():
    weight, mask, gradient = make((20, 30), 0.3)
    allowed = torch.ones(20, 30, dtype=torch.bool)
    allowed[:10] = False
    new = drop_and_grow(weight, mask, gradient, 0.3, allowed=allowed)
    assert not ((new == 1) & (mask == 0))[:10].any()
    assert new.sum() == mask.sum()
    # nowhere at all: the mask stays
    assert torch.equal(drop_and_grow(weight, mask, gradient, 0.3, allowed=torch.zeros(20, 30)), mask)


@pytest.mark.parametrize("shape", [(8, 12), (4, 6, 3, 3)])
def test_a_pattern_is_kept_block_by_block(shape):
    weight, _, gradient = make(shape, 1.0)
    pattern = Pattern(2, 4)
    mask = pattern.mask(weight.abs()).float()
    new = drop_and_grow(weight, mask, gradient, 0.4, pattern=pattern)
    assert pattern.holds(new)
    assert torch.equal(pattern.blocks(new).sum(1), pattern.blocks(mask).sum(1))
    assert not torch.equal(new, mask)


def test_weights_move_between_layers_when_they_are_ranked_together():
    low, high = make((10, 10), 0.5, 0), make((10, 10), 0.5, 1)
    weights = {"low": low[0] * 1e-3, "high": high[0]}
    masks, gradients = {"low": low[1], "high": high[1]}, {"low": low[2] * 1e-3, "high": high[2]}
    new = drop_and_grow_all(weights, masks, gradients, 0.3)
    assert sum(int(m.sum()) for m in new.values()) == sum(int(m.sum()) for m in masks.values())
    assert new["low"].sum() < masks["low"].sum() < masks["high"].sum() + 100
    assert new["high"].sum() > masks["high"].sum()
    least = int(masks["low"].sum()) - 3
    held = drop_and_grow_all(weights, masks, gradients, 0.3, bounds={"low": (least, 100), "high": (1, 55)})
    assert held["low"].sum() >= least
    assert held["high"].sum() <= 55
    assert drop_and_grow_all(weights, masks, gradients, 1.0)["low"].sum() >= 1  # no layer is emptied


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), density=st.floats(0.05, 0.95), fraction=st.floats(0, 1), random=st.booleans())
def test_the_number_of_weights_stays(seed, density, fraction, random):
    weight, mask, gradient = make((7, 9), density, seed)
    generator = torch.Generator().manual_seed(seed)
    new = drop_and_grow(weight, mask, None if random else gradient, fraction, generator)
    assert new.sum() == mask.sum()
    assert ((new == 0) | (new == 1)).all()
    kept = (new == 1) & (mask == 1)
    assert kept.sum() >= mask.sum() - round(fraction * float(mask.sum()))


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.integers(0, 5), max_size=30), count=st.integers(-1, 31))
def test_top_takes_the_first_of_equal_ones(values, count):
    found = top(torch.tensor(values, dtype=torch.float32), count)
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert set(found.nonzero().flatten().tolist()) == set(order[: max(count, 0)])


def test_the_fraction_falls_as_a_cosine():
    assert drop_fraction(0, 100) == pytest.approx(0.3)
    assert drop_fraction(50, 100) == pytest.approx(0.15)
    assert drop_fraction(100, 100) == drop_fraction(101, 100) == 0
    assert drop_fraction(0, 100, alpha=0.5) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad,
             torch.optim.NAdam, torch.optim.Adamax, torch.optim.Rprop, torch.optim.Adadelta, torch.optim.ASGD],
)  # fmt: skip
def test_grown_weights_start_at_zero_with_no_memory_in_any_optimizer(kind):
    parameter = torch.nn.Parameter(torch.randn(4, 5))
    optimizer = kind([parameter], lr=0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    for _ in range(3):
        parameter.grad = torch.randn(4, 5)
        optimizer.step()
    old, new = torch.ones(4, 5), torch.ones(4, 5)
    old[0], new[1] = 0, 0
    grown = start_grown(parameter, old, new)
    clear_state(optimizer, parameter, grown)
    assert torch.equal(grown, (new == 1) & (old == 0))
    assert (parameter[0] == 0).all()
    assert (parameter[1:] != 0).all()
    states = [v for v in optimizer.state[parameter].values() if torch.is_tensor(v) and v.shape == (4, 5)]
    assert states
    for value in states:
        assert (value[0] == 0).all()
        assert (value[1:] != 0).any() or (value == 0).all()
    optimizer.step()
    assert torch.isfinite(parameter).all()
