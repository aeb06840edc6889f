"""``report.md``: everything that one needs to believe the result and to get it again, on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nni_plugins.report.findings import Candidate, Findings
from nni_plugins.report.table import amount, comparison, markdown_table, proof_lines, quality


def save_page(findings: Findings, path: Path, plot: str = "pareto.png", files: Sequence[str] = ()) -> None:
    """Write the page.

    Parameters
    ----------
    findings
        What it shows.
    path
        The file to write.
    plot
        The Pareto plot, relative to the page.
    files
        What lies beside it: lines of Markdown.
    """
    path.write_text(page(findings, plot, files), encoding="utf-8")


def page(findings: Findings, plot: str = "pareto.png", files: Sequence[str] = ()) -> str:
    """The page as text."""
    parts = [f"# {findings.title}: the compact model", _headline(findings), markdown_table(*comparison(findings))]
    parts += [f"![{findings.metric} against MACs, all trials]({plot})"]
    parts += ["## Proof", *proof_lines(findings)]
    if len(findings.front()) > 1:
        parts += ["## Pareto front", FRONT, markdown_table(*_front(findings), left=(0, 4))]
    parts += ["## Trials", _counts(findings), markdown_table(*_trials(findings), left=(0, 3, 4))]
    if files:
        parts += ["## Files", "\n".join(f"- {line}" for line in files)]
    if findings.commands:
        parts += ["## The same again", "```sh\n" + "\n".join(findings.commands) + "\n```"]
    if findings.recipe:
        parts += ["The winner's recipe (`nni-plugins compress best/recipe.yml` runs it without NNI):"]
        parts += [f"```yaml\n{findings.recipe.strip()}\n```"]
    parts += [
        "## Environment",
        markdown_table(["", ""], [[name, value] for name, value in findings.environment.items()]),
    ]
    if findings.experiment:
        parts += [
            "NNI experiment: " + ", ".join(f"{name} `{value}`" for name, value in findings.experiment.items()) + "."
        ]
    return "\n\n".join(parts) + "\n"


def _headline(findings: Findings) -> str:
    macs = 100 * findings.compact.macs / findings.dense.macs
    params = 100 * findings.compact.params / findings.dense.params
    text = f"**{macs:.0f}% of the MACs and {params:.0f}% of the parameters** are left"
    tested = findings.dense.test is not None and findings.compact.test is not None
    if findings.dense.test is not None and findings.compact.test is not None:
        before, after = quality(findings.dense.test, findings.metric), quality(findings.compact.test, findings.metric)
        text += f"; test {findings.metric} goes from {before} to {after}"
    source = f"trial {findings.chosen} of {len(findings.candidates)}"
    seen = "There is no test split; the figures are of validation, which the search saw."
    if tested:
        seen = "The search saw validation only; the test split was read once, at the end, for these two models."
    return f"{text} ({source}). {seen}"


def _counts(findings: Findings) -> str:
    counts: dict[str, int] = {}
    for one in findings.candidates:
        counts[one.status] = counts.get(one.status, 0) + 1
    words = ", ".join(f"{number} {status.lower().replace('_', ' ')}" for status, number in sorted(counts.items()))
    took = f" in {findings.seconds / 60:.1f} minutes" if findings.seconds else ""
    bounds = ", ".join(f"{name} {value:g}" for name, value in findings.bounds.items())
    return f"{words}{took}" + (f"; bounds of the objective: {bounds}." if bounds else ".")


FRONT = "The trials within the bounds that no other one beats in the metric, MACs and latency at once (on validation)."


def _front(findings: Findings) -> tuple[list[str], list[list[str]]]:
    """Cheapest first."""
    rows = []
    for one in findings.front():
        name = f"**{one.id}** (chosen)" if one.id == findings.chosen else one.id
        cost = f"{amount(one.macs or 0)} ({100 * (one.macs or 0) / findings.dense.macs:.0f}%)"
        latency = "–" if one.latency_ms is None else f"{one.latency_ms:.2f} ms"
        rows.append([name, quality(one.metric, findings.metric), cost, latency, _tried(one)])
    return ["trial", f"validation {findings.metric}", "MACs", "latency", "what it tried"], rows


def _tried(one: Candidate) -> str:
    values = one.parameters.items()
    return ", ".join(f"{key.removeprefix('prune.')} {_short(value)}" for key, value in values)


def _trials(findings: Findings) -> tuple[list[str], list[list[str]]]:
    """Best first; those without a figure at the end, with their reason."""

    def rank(one: Candidate) -> tuple[bool, float, int]:
        return one.default is None, -(one.default or 0.0), one.sequence

    rows = []
    for one in sorted(findings.candidates, key=rank):
        name = f"**{one.id}** (chosen)" if one.id == findings.chosen else one.id
        cost = "–" if one.macs is None else f"{amount(one.macs)} ({100 * one.macs / findings.dense.macs:.0f}%)"
        ended = one.status.lower().replace("_", " ") + (f": {one.note}" if one.note else "")
        rows.append([name, quality(one.metric, findings.metric), cost, _tried(one), ended])
    return ["trial", f"validation {findings.metric}", "MACs", "what it tried", "end"], rows


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
