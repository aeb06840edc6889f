"""Ties, products and freezing, solved to their fixpoint."""

import numpy as np
import pytest

from nni_plugins.channels.labels import Cause, Labels

HERE = Cause("net", "op", "why")


def free_classes(labels, array, solution):
    """The classes of ``array`` where they are free, None where frozen."""
    return [None if solution.frozen[c] else int(c) for c in solution.classes[array]]


def test_ties_join_and_freezing_spreads():
    labels = Labels()
    a, b, c = labels.fresh(3), labels.fresh(3), labels.fresh(3)
    labels.tie(a, b, HERE)
    labels.tie(b, c, HERE)
    labels.freeze(c[1:2], HERE)
    solution = labels.solve()
    assert (solution.classes[a] == solution.classes[c]).all()
    assert solution.frozen[solution.classes[a]].tolist() == [False, True, False]
    assert solution.why_frozen(int(solution.classes[a[1]])) == HERE


def test_a_tie_to_nothing_freezes():
    labels = Labels()
    a = labels.fresh(2)
    labels.tie(a, None, HERE)
    assert labels.solve().frozen[labels.solve().classes[a]].all()


@pytest.mark.parametrize(("frozen", "free"), [("outer", "inner"), ("inner", "outer")])
def test_a_frozen_factor_ties_the_product_to_the_other(frozen, free):
    labels = Labels()
    factors = {"outer": labels.fresh(2), "inner": labels.fresh(3)}
    whole = labels.fresh(6)
    labels.relate(whole, factors["outer"], factors["inner"], HERE)
    labels.freeze(factors[frozen], HERE)
    solution = labels.solve()
    table = solution.classes[whole].reshape(2, 3)
    expected = solution.classes[factors[free]]
    assert (table == (expected[None, :] if free == "inner" else expected[:, None])).all()
    assert not solution.frozen[solution.classes[whole]].any()


def test_a_frozen_product_freezes_both_factors():
    labels = Labels()
    outer, inner, whole = labels.fresh(2), labels.fresh(3), labels.fresh(6)
    labels.relate(whole, outer, inner, HERE)
    labels.freeze(whole, HERE)
    solution = labels.solve()
    assert solution.frozen[solution.classes[np.concatenate([outer, inner])]].all()


def test_of_two_free_factors_the_preferred_one_stays_free():
    for prefer_outer in (False, True):
        labels = Labels()
        outer, inner, whole = labels.fresh(2), labels.fresh(3), labels.fresh(6)
        labels.relate(whole, outer, inner, HERE)
        labels.prefer(outer if prefer_outer else inner)
        solution = labels.solve()
        assert solution.frozen[solution.classes[inner]].all() == prefer_outer
        assert solution.frozen[solution.classes[outer]].all() != prefer_outer


def test_of_two_free_factors_the_exact_one_stays_free():
    """Groups that a norm mixes are no better for being groups: the channels in each can go exactly."""
    labels = Labels()
    outer, inner, whole = labels.fresh(2), labels.fresh(3), labels.fresh(6)
    labels.relate(whole, outer, inner, HERE)
    labels.prefer(outer)
    mixed, other = labels.fresh(8), labels.fresh(4)
    labels.relate(mixed, outer, other, HERE)
    labels.mark_inexact(mixed, HERE)  # a norm over what shares the outer factor
    solution = labels.solve()
    assert solution.frozen[solution.classes[outer]].all()
    free = solution.classes[inner]
    assert not solution.frozen[free].any()
    assert not solution.inexact[free].any()
    asked = labels.solve(preferred=False)  # one kind of unit is asked for: exactness does not change it
    assert asked.frozen[asked.classes[outer]].all()


def test_without_a_preference_the_finer_factor_stays_free():
    labels = Labels()
    outer, inner, whole = labels.fresh(2), labels.fresh(3), labels.fresh(6)
    labels.relate(whole, outer, inner, HERE)
    solution = labels.solve()
    assert len(set(free_classes(labels, whole, solution))) == 3


def test_the_same_product_cut_twice_ties_the_factors():
    labels = Labels()
    whole, twin = labels.fresh(6), labels.fresh(6)
    labels.tie(whole, twin, HERE)
    first, second = (labels.split(w, (2, 3), HERE) for w in (whole, twin))
    labels.prefer(first[0])
    solution = labels.solve()
    assert (solution.classes[first[0]] == solution.classes[second[0]]).all()
    assert not solution.frozen[solution.classes[second[0]]].any()


def test_merging_what_was_split_gives_the_whole_back():
    labels = Labels()
    whole = labels.fresh(12)
    outer, inner = labels.split(whole, (3, 4), HERE)
    assert labels.merge(outer, inner, HERE) is whole or (labels.merge(outer, inner, HERE) == whole).all()


def test_a_repeated_pattern_is_cut_without_a_product():
    labels = Labels()
    channels = labels.fresh(4)
    assert (labels.split(np.tile(channels, 3), (3, 4), HERE)[1] == channels).all()
    assert (labels.split(np.repeat(channels, 3), (4, 3), HERE)[0] == channels).all()


def test_three_factors_are_cut_in_two_steps():
    labels = Labels()
    whole = labels.fresh(24)
    three, heads, _ = labels.split(whole, (3, 2, 4), HERE)
    labels.freeze(three, HERE)
    labels.prefer(heads)
    solution = labels.solve()
    table = solution.classes[whole].reshape(3, 2, 4)
    assert (table == solution.classes[heads][None, :, None]).all()
