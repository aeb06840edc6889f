"""``report.md``: everything that one needs to believe the result and to get it again, on one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from nni_plugins.report import sections
from nni_plugins.report.findings import Findings
from nni_plugins.report.plots import safe_name
from nni_plugins.report.table import comparison, markdown_table, proof_lines


def save_page(
    findings: Findings,
    path: Path,
    plot: str | None = "pareto.png",
    files: Sequence[str] = (),
    plots: Mapping[str, str] | None = None,
) -> None:
    """Write the page.

    Parameters
    ----------
    findings
        What it shows.
    path
        The file to write.
    plot
        The Pareto plot, relative to the page, or ``None`` where there is nothing to draw.
    files
        What lies beside it: lines of Markdown.
    plots
        Further pictures, by the names of :func:`nni_plugins.report.plots.draw_all`, relative to the page.
    """
    path.write_text(page(findings, plot, files, plots), encoding="utf-8")


def page(
    findings: Findings,
    plot: str | None = "pareto.png",
    files: Sequence[str] = (),
    plots: Mapping[str, str] | None = None,
) -> str:
    """The page as text."""
    pictures = dict(plots or {})
    title = f"{findings.title}: the compact model" if findings.compact is not None else findings.title
    lead, text = sections.headline(findings)
    parts = [f"# {title}", f"**{lead}**{text}"]
    parts += [line for line in (sections.state_line(findings),) if line]
    parts += [f"> {note}" for note in findings.notes]
    if (table := comparison(findings))[1]:
        parts.append(markdown_table(*table))
    if plot is not None:
        parts += [f"![{findings.metric} against MACs, all trials]({plot})"]
    parts += _pictures(pictures, "pareto", f"{findings.metric} against a cost, all trials")
    if lines := proof_lines(findings):
        parts += ["## Proof", *lines]
    if len(findings.front()) > 1:
        parts += ["## Pareto front", sections.FRONT]
        header, rows = sections.front_rows(findings, _bold)
        parts += [markdown_table(header, rows, left=(0, len(header) - 1))]
    if findings.layers:
        parts += [
            "## Layers",
            sections.layers_line(findings),
            *_pictures(pictures, "layers", "units kept in each layer"),
        ]
    parts += _search(findings, pictures)
    if files:
        parts += ["## Files", "\n".join(f"- {line}" for line in files)]
    parts += _again(findings)
    if findings.environment:
        rows = [[name, value] for name, value in findings.environment.items()]
        parts += ["## Environment", markdown_table(["", ""], rows)]
    if findings.experiment:
        parts += [
            "NNI experiment: " + ", ".join(f"{name} `{value}`" for name, value in findings.experiment.items()) + "."
        ]
    return "\n\n".join(parts) + "\n"


def _search(findings: Findings, pictures: Mapping[str, str]) -> list[str]:
    """Trials, curves, importance and the space."""
    parts = ["## Trials", sections.counts(findings)]
    header, rows = sections.trial_rows(findings, _bold)
    results = sum(one.default is not None for one in findings.candidates)
    if results > sections.MOST_TRIALS:
        rows = rows[: sections.MOST_TRIALS] + rows[results:]
        parts.append(f"The best {sections.MOST_TRIALS} of {results} with a result; `report.json` has all.")
    parts.append(markdown_table(header, rows, left=(0, len(header) - 2, len(header) - 1)))
    curves = _pictures(pictures, "progress", "the result of each trial, and the best so far")
    curves += _pictures(pictures, "curves", "what trials reported while they ran")
    parts += ["## Training curves", *curves] if curves else []
    if findings.importance:
        parts.append("## Parameter importance")
        for one in findings.importance:
            parts.append(sections.importance_line(one))
            parts += _pictures(
                pictures, f"importance-{safe_name(one.target)}", f"importance for {one.target}", whole=True
            )
    if rows := sections.search_rows(findings):
        parts += ["## Search space", markdown_table(["parameter", "kind", "values"], rows, left=(0, 1, 2))]
        if tuner := findings.search.get("tuner"):
            parts.append(f"Tuner: {tuner}.")
    return parts


def _again(findings: Findings) -> list[str]:
    parts = []
    if findings.commands:
        parts += ["## The same again", "```sh\n" + "\n".join(findings.commands) + "\n```"]
    if findings.recipe:
        parts += ["The winner's recipe (`nni-plugins compress best/recipe.yml` runs it without NNI):"]
        parts += [f"```yaml\n{findings.recipe.strip()}\n```"]
    return parts


def _pictures(pictures: Mapping[str, str], kind: str, words: str, whole: bool = False) -> list[str]:
    chosen = [path for name, path in pictures.items() if (name == kind if whole else name.split("-")[0] == kind)]
    return [f"![{words}]({path})" for path in chosen]


def _bold(text: str) -> str:
    return f"**{text}**"
