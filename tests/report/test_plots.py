"""Plots hold what they should, and nothing in them lies over anything else."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nni_plugins.report.curves_plot import draw_curves, draw_progress
from nni_plugins.report.figures import inline_svg, shortened
from nni_plugins.report.findings import Candidate, Findings, Importance, Layer
from nni_plugins.report.importance_plot import draw_importance
from nni_plugins.report.layers_plot import MOST, draw_layers, shown_layers
from nni_plugins.report.pareto import COSTS, draw_pareto
from nni_plugins.report.plots import draw_all, save_all

Make = Callable[..., Findings]
LONG = "encoder.stage{}.block{}.bottleneck.depthwise_separable_convolution_{}.pointwise_projection"


def _boxes(figure: Any, texts: list[Any]) -> list[Any]:
    renderer = figure.canvas.get_renderer()
    return [text.get_window_extent(renderer) for text in texts if text.get_text() and text.get_visible()]


def _ticks(axes: Any) -> list[Any]:
    low, high = axes.get_xlim()
    return [tick.label1 for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]


def _apart(figure: Any, texts: list[Any]) -> None:
    """Nothing is cut off, and nothing covers anything."""
    boxes = _boxes(figure, texts)
    width, height = figure.canvas.get_width_height()
    for box in boxes:
        assert min(box.x0, box.y0) >= -1
        assert box.x1 <= width + 1
        assert box.y1 <= height + 1
    for one, two in itertools.combinations(boxes, 2):
        assert not one.shrunk(0.9, 0.9).overlaps(two.shrunk(0.9, 0.9))


@pytest.mark.parametrize("count", [1, 3, 50])
def test_names_of_layers_stay_apart(count: int) -> None:
    layers = [Layer(LONG.format(i // 10, i % 10, i), 2 ** (4 + i // 10), 2 ** (3 + i // 10)) for i in range(count)]
    figure = draw_layers(layers)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    _apart(figure, [*axes.get_yticklabels(), axes.xaxis.label])
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert len(set(names)) == count
    assert [text.get_text() for text in axes.texts] == [f"{layer.kept}/{layer.size}" for layer in layers]


def test_bars_have_the_lengths_of_the_layers() -> None:
    figure = draw_layers([Layer("a", 16, 4), Layer("b", 32, 32)])
    assert [bar.get_width() for bar in figure.axes[0].patches] == [16, 32, 4, 32]
    figure = draw_layers([Layer("a", 16, 4), Layer("b", 2048, 1024)])  # too wide a range for one scale
    assert [bar.get_width() for bar in figure.axes[0].patches] == [100, 100, 25, 50]


def test_of_very_many_layers_those_that_lose_the_most_are_drawn() -> None:
    layers = [Layer(f"l{i}", 100, 100 - i) for i in range(MOST + 40)]
    assert [layer.name for layer in shown_layers(layers)] == [f"l{i}" for i in range(40, MOST + 40)]


def _costly(make_findings: Make, **changes: Any) -> Findings:
    numbers = random.Random(0)
    base = make_findings(30, **changes)
    trials = [
        replace(
            one,
            latency_ms=None if one.macs is None else one.macs / 5e5 + numbers.random(),
            file_bytes=None if one.macs is None else one.macs // 2,
            curve=() if one.metric is None else tuple(one.metric * part for part in (0.3, 0.9, 0.95, 0.97, 1.0)),
        )
        for one in base.candidates
    ]
    return replace(base, candidates=trials)


@pytest.mark.parametrize("cost", ["macs", "latency_ms", "file_bytes"])
def test_the_legend_covers_no_point(make_findings: Make, cost: str) -> None:
    findings = _costly(make_findings, title="a title")
    figure = draw_pareto(findings, COSTS[cost])
    figure.draw_without_rendering()
    (legend,) = figure.legends
    axes = figure.axes[0]
    renderer = figure.canvas.get_renderer()
    assert not legend.get_window_extent(renderer).overlaps(axes.get_window_extent(renderer))
    _apart(figure, [*_ticks(axes), axes.xaxis.label, axes._left_title, *axes.texts, *legend.get_texts()])
    names = [text.get_text() for text in legend.get_texts()]
    assert {"trial", "chosen", "dense", "Pareto front"} <= set(names)


def test_bound_and_points_are_where_they_belong(make_findings: Make) -> None:
    figure = draw_pareto(_costly(make_findings), COSTS["macs"])
    axes = figure.axes[0]
    vertical = [line for line in axes.lines if len(set(line.get_xdata())) == 1 and line.get_linestyle() == "--"]
    assert [line.get_xdata()[0] for line in vertical] == [pytest.approx(1.3)]  # half of 2.6 MMACs
    assert axes.get_xlabel() == "MMACs of one input"
    assert axes.get_ylabel() == "validation accuracy (%)"
    figure = draw_pareto(_costly(make_findings, metric="mse", higher_is_better=False), COSTS["latency_ms"])
    assert figure.axes[0].get_ylabel() == "validation mse"
    assert figure.axes[0].get_xlabel() == "latency of one input (ms)"


def test_trials_over_the_bounds_do_not_squeeze_the_others(make_findings: Make) -> None:
    findings = _costly(make_findings)
    lost = [Candidate(f"x{n}", 90 + n, "SUCCEEDED", 0.1, 2_000_000, -5.0, feasible=False) for n in range(15)]
    figure = draw_pareto(replace(findings, candidates=[*findings.candidates, *lost]), COSTS["macs"])
    assert figure.axes[0].get_ylim()[0] > 85
    assert any("15 trials beyond" in text.get_text() for text in figure.axes[0].texts)
    assert draw_progress(replace(findings, candidates=[*findings.candidates, *lost])).axes[0].get_ylim()[0] > 85


def test_curves_show_the_chosen_one_last_and_breaks_as_breaks(make_findings: Make) -> None:
    findings = _costly(make_findings)
    broken = Candidate("nan", 77, "FAILED", curve=(0.5, None, 0.7))
    figure = draw_curves(replace(findings, candidates=[*findings.candidates, broken]))
    lines = figure.axes[0].lines
    assert len(lines) == 31
    assert lines[-1].get_label() == "chosen"
    assert max(line.get_zorder() for line in lines) == lines[-1].get_zorder()
    (odd,) = [line for line in lines if len(line.get_xdata()) == 3]
    assert odd.get_ydata()[1] != odd.get_ydata()[1]
    assert figure.axes[0].get_ylim()[0] > 40  # the first epoch of all is far below the rest


def test_progress_counts_the_best_so_far_in_its_direction(make_findings: Make) -> None:
    trials = [Candidate(f"t{n}", n, "SUCCEEDED", value, default=value) for n, value in enumerate((3.0, 2.0, 5.0, 1.0))]
    for maximize, expected in ((True, [3, 3, 5, 5]), (False, [3, 2, 2, 1])):
        figure = draw_progress(make_findings(candidates=trials, metric="default", maximize=maximize, chosen="t3"))
        (line,) = [line for line in figure.axes[0].lines if line.get_label() == "best so far"]
        assert list(line.get_ydata()) == expected


def test_names_with_dollars_letters_of_other_scripts_and_breaks_are_drawn(tmp_path: Path) -> None:
    odd = {"a$b_{x^2}$c": 0.5, "数据\n名": 0.3, r"\frac{": 0.1, "x" * 200: 0.05, "": 0.05}
    figure = draw_importance(Importance("$\\sum$", 40, odd, dict.fromkeys(odd, 0.02), 0.8))
    text = inline_svg(figure, "p")
    assert text.startswith("<svg")
    assert text.endswith("</svg>")
    assert "<!--" not in text
    save_all({"importance": (figure, "")}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"importance.png", "importance.pdf"}
    inline_svg(draw_layers([Layer(name, 3, 1) for name in odd]), "q")


def test_the_findings_decide_which_plots_there_are(make_findings: Make, tmp_path: Path) -> None:
    assert set(draw_all(make_findings())) == {"pareto-macs", "progress"}
    full = _costly(
        make_findings, layers=[Layer("a", 4, 2)], importance=[Importance("macs", 20, {"p": 1.0}, {"p": 0.0})]
    )
    names = {"pareto-macs", "pareto-latency_ms", "pareto-file_bytes", "layers", "progress", "curves", "importance-macs"}
    assert set(draw_all(full)) == names
    assert draw_all(make_findings(candidates=[Candidate("a", 0, "FAILED")])) == {}


def test_the_same_figures_make_the_same_files(make_findings: Make) -> None:
    texts = [inline_svg(draw_pareto(make_findings(), COSTS["macs"]), "f0") for _ in range(2)]
    assert texts[0] == texts[1]


def test_shortened_names_keep_both_ends() -> None:
    assert shortened("abc", 10) == "abc"
    assert shortened("a" * 20 + "the_end", 12) == "aaa…_the_end"[:3] + "…" + ("a" * 20 + "the_end")[-8:]
    assert "\n" not in shortened("a\nb", 10)


@pytest.mark.parametrize(("bound", "drawn"), [(1.2, True), (80.0, False)])
def test_a_bound_far_beyond_all_trials_takes_no_room(make_findings: Make, bound: float, drawn: bool) -> None:
    findings = _costly(make_findings, bounds={"latency_ms": bound})
    figure = draw_pareto(findings, COSTS["latency_ms"])
    figure.draw_without_rendering()
    assert any("bound" in text.get_text() for text in figure.axes[0].texts) is drawn
    assert figure.axes[0].get_xlim()[1] < 6


def test_many_points_are_stored_as_a_bitmap(make_findings: Make) -> None:
    many = [Candidate(f"t{n}", n, "SUCCEEDED", 0.5 + n / 2000, 1000 + n, 0.5) for n in range(700)]
    text = inline_svg(draw_pareto(make_findings(candidates=many), COSTS["macs"]), "f")
    assert "data:image/png;base64," in text
    assert len(text) < 400_000
