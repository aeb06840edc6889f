"""The Pareto front is exactly the set of points that no other one beats."""

from __future__ import annotations

import json
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from nni_plugins.report.findings import Candidate, Findings, Importance, Layer, StockCheck, pareto_front

POINTS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=30)


@settings(deadline=None)
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


def test_findings_come_back_from_their_file(make_findings: Callable[..., Findings]) -> None:
    findings = make_findings(
        layers=[Layer("conv1", 16, 10)],
        importance=[Importance("accuracy", 20, {"a": 1.0}, {"a": 0.1}, 0.5, left_out=["b"])],
        notes=["a note"],
        stock=StockCheck(False, float("nan"), "no masks"),
    )
    data = json.loads(json.dumps(findings.to_dict()))
    again = Findings.from_dict({**data, "of a later version": 1})
    assert again.to_dict() == findings.to_dict()
    assert [one.id for one in again.front()] == data["front"]


def test_an_older_file_has_less_in_it(make_findings: Callable[..., Findings]) -> None:
    data = make_findings().to_dict()
    for name in ("layers", "importance", "notes", "state", "search", "tested", "trials_wanted", "blocks", "maximize"):
        del data[name]
    for one in data["candidates"]:
        for name in ("curve", "params", "file_bytes", "finetuned", "dense_macs", "others", "seconds"):
            del one[name]
    assert Findings.from_dict(data).best_first()[0].id == data["chosen"]


def test_trials_without_macs_have_a_front_of_metric_and_latency(make_findings: Callable[..., Findings]) -> None:
    trials = [
        Candidate(f"t{n}", n, "SUCCEEDED", m, latency_ms=t)
        for n, (m, t) in enumerate([(0.9, 2.0), (0.8, 1.0), (0.7, 3.0)])
    ]
    assert {one.id for one in make_findings(candidates=trials).front()} == {"t0", "t1"}
