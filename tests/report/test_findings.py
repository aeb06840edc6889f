"""The Pareto front is exactly the set of points that no other one beats."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nni_plugins.report.findings import StockCheck, pareto_front

POINTS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=30)


@given(POINTS, st.booleans())
def test_front_is_what_nothing_beats(points: list[tuple[int, int]], higher: bool) -> None:
    sign = 1 if higher else -1
    expected = {
        point
        for point in points
        if not any(
            other != point and other[0] <= point[0] and sign * other[1] >= sign * point[1] for other in set(points)
        )
    }
    front = pareto_front([(float(cost), float(metric)) for cost, metric in points], higher)
    assert set(front) == expected
    assert front == sorted(front)


def test_stock_check_passes_only_when_it_was_made_and_agrees() -> None:
    assert StockCheck(True, 1e-7).passed
    assert not StockCheck(True, 1e-4).passed
    assert not StockCheck(False, 0.0).passed
    assert not StockCheck(True, 0.0, "no masks").passed
