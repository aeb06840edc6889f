"""All plots of a report, by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nni_plugins.report.curves_plot import draw_curves, draw_progress, has_curves
from nni_plugins.report.figures import save_figure
from nni_plugins.report.findings import Findings
from nni_plugins.report.importance_plot import draw_importance, words_of
from nni_plugins.report.layers_plot import draw_layers, kind_of
from nni_plugins.report.pareto import costs_of, draw_pareto
from nni_plugins.report.table import amount


def draw_all(findings: Findings) -> dict[str, tuple[Any, str]]:
    """Each plot that the findings are enough for: a figure of matplotlib, and what it shows in a sentence.

    Names: ``pareto-macs``, ``pareto-latency_ms`` …, ``layers``, ``progress``, ``curves``, ``importance-accuracy`` …
    """
    found: dict[str, tuple[Any, str]] = {}
    if sum(one.metric is not None for one in findings.candidates):
        for cost in costs_of(findings)[: 1 if findings.state == "single" else None]:
            found[f"pareto-{cost.name}"] = draw_pareto(findings, cost, title=False), _pareto_words(findings, cost.name)
    if findings.layers:
        what, where = ("Weights", "layers") if kind_of(findings.layers) == "weights" else ("Units", "channel groups")
        words = f"{what} kept in each of {len(findings.layers)} {where} of the chosen model, and of the dense one."
        found["layers"] = draw_layers(findings.layers), words
    if sum(one.default is not None for one in findings.candidates) > 1:
        found["progress"] = draw_progress(findings), "The result of each trial in the order of their start."
    if has_curves(findings):
        found["curves"] = draw_curves(findings), "What each trial reported while it ran; the chosen one stands out."
    for one in findings.importance:
        if one.shares:
            words = f"The share of the variance of {words_of(one.target)} that each parameter explains."
            found[f"importance-{safe_name(one.target)}"] = draw_importance(one), words
    return found


def _pareto_words(findings: Findings, cost: str) -> str:
    against = {"macs": "MACs", "latency_ms": "latency", "file_bytes": "size of the file", "params": "parameters"}[cost]
    if findings.state == "single":
        return f"Validation {findings.metric} against {against}: the dense and the compact model."
    text = f"Validation {findings.metric} against {against}: all trials, the Pareto front, and the chosen one."
    if findings.dense is not None and findings.dense.validation is not None:
        text += " Dotted: the dense model" + (f" ({amount(findings.dense.macs)} MACs)." if cost == "macs" else ".")
    if cost == "latency_ms" and findings.compact is not None and findings.compact.latency_ms is not None:
        text += " Trials were timed beside each other; dense and chosen in turns, at the end."
    return text


def save_all(drawn: dict[str, tuple[Any, str]], folder: Path, endings: tuple[str, ...] = (".png", ".pdf")) -> None:
    """Store the plots: bitmaps for pages, PDF for papers. What an earlier report left there goes."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (path for ending in endings for path in folder.glob(f"*{ending}")):
        stale.unlink()
    for name, (figure, _) in drawn.items():
        for ending in endings:
            save_figure(figure, folder / f"{name}{ending}", 160)


def safe_name(text: str) -> str:
    """A name from elsewhere as part of a file's."""
    return re.sub(r"[^A-Za-z0-9_.]+", "_", text)[:60].strip("._") or "figure"
