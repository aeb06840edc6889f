import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nni_plugins.pruners.chain import SCOPES, Chain, GroupRanking, normalised


def ranking(name, scores, dead=(), **kwargs):
    gone = np.zeros(len(scores), dtype=bool)
    gone[list(dead)] = True
    return GroupRanking(name, np.asarray(scores, dtype=float), gone, **kwargs)


def test_global_order_is_by_score_over_all_groups():
    chain = Chain([ranking("a", [5.0, 1.0, 3.0]), ranking("b", [2.0, 4.0])], "global")
    assert chain.events.key.tolist() == [1.0, 2.0, 3.0]  # a group keeps its best unit
    assert chain.removed(chain.state(2)) == {"a": 1, "b": 1}
    masks = chain.keep_masks(chain.state(3))
    assert masks["a"].tolist() == [True, False, False]
    assert masks["b"].tolist() == [False, True]


def test_local_order_takes_the_same_fraction_from_every_group():
    chain = Chain([ranking("a", np.arange(8)), ranking("b", 100.0 + np.arange(4))], "local")
    assert chain.removed(chain.state(6)) == {"a": 4, "b": 2}


def test_isomorphic_order_ranks_within_classes():
    wide, other = ranking("a", [1, 2, 3, 4], signature=1), ranking("b", [0.1, 0.2, 9, 9], signature=1)
    third = ranking("c", [100, 200, 300, 400], signature=2)
    chain = Chain([wide, other, third], "isomorphic")
    removed = chain.removed(chain.state(6))
    assert removed == {"a": 2, "b": 2, "c": 2}  # half of each class; within the first, the four smallest
    assert chain.removed(chain.state(3)) == {"a": 0, "b": 2, "c": 1}


@pytest.mark.parametrize(
    ("kwargs", "counts"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ({"multiple": 4}, [0, 2, 6]),
        ({"multiple": 16}, [0]),
        ({"lower": 0.25}, [3, 4, 5, 6, 7, 8, 9]),
        ({"upper": 0.5}, [0, 1, 2, 3, 4, 5]),
        ({"dead": [0, 9]}, [2, 3, 4, 5, 6, 7, 8, 9]),
        ({"dead": [0, 9], "upper": 0.1}, [2]),
        ({"dead": [0, 9], "multiple": 5}, [2, 5]),
    ],
)
def test_allowed_counts(kwargs, counts):
    assert ranking("a", np.arange(10), **kwargs).counts().tolist() == counts


def test_dead_units_go_first_whatever_their_score():
    chain = Chain([ranking("a", [9, 1, 2, 3], dead=[0])], "global")
    assert chain.keep_masks(chain.state(0))["a"].tolist() == [False, True, True, True]


def test_unknown_scope_and_normalisation():
    with pytest.raises(ValueError, match="scope is 'layer'"):
        Chain([], "layer")
    with pytest.raises(ValueError, match="normalise is 'sum'"):
        normalised({"a": np.ones(2)}, {}, "sum")


def test_normalised_leaves_dead_units_out():
    scores = {"a": np.array([1.0, 3.0, 100.0])}
    dead = {"a": np.array([False, False, True])}
    assert normalised(scores, dead, "mean")["a"][:2].tolist() == [0.5, 1.5]
    assert normalised(scores, dead, "max")["a"][1] == 1.0
    assert np.linalg.norm(normalised(scores, dead, "l2")["a"][:2]) == pytest.approx(1.0)
    assert normalised({"a": np.zeros(3)}, {}, "mean")["a"].tolist() == [0, 0, 0]


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 12), min_size=1, max_size=6),
    scope=st.sampled_from(SCOPES),
    multiple=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_chain_only_ever_removes_more_and_the_least_important(sizes, scope, multiple, seed):
    random = np.random.default_rng(seed)
    rankings = [
        ranking(f"g{i}", random.random(size), multiple=multiple, signature=i % 2) for i, size in enumerate(sizes)
    ]
    chain = Chain(rankings, scope)
    before = chain.keep_masks(chain.state(0))
    for position in range(len(chain) + 1):
        now = chain.keep_masks(chain.state(position))
        for ranked in rankings:
            kept = now[ranked.name]
            assert kept.any()
            assert kept.all() or kept.sum() % multiple == 0
            assert not (kept & ~before[ranked.name]).any()
            if not kept.all():
                assert ranked.scores[kept].min() >= ranked.scores[~kept].max()
        before = now
