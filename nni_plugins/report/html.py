"""``report.html``: the report as one file, with its plots in it; nothing is fetched, nothing runs.

Names, reasons and parameters come from elsewhere, so that everything is escaped but the plots, which are made here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nni_plugins import __version__
from nni_plugins.files import write_whole
from nni_plugins.report import sections
from nni_plugins.report.figures import inline_svg
from nni_plugins.report.findings import Findings
from nni_plugins.report.plots import draw_all, safe_name
from nni_plugins.report.table import comparison, proof_lines

BEST = 20
"""So many trials are in sight; a fold holds the rest."""


def save_html(
    findings: Findings, path: Path, files: Sequence[str] = (), drawn: Mapping[str, tuple[Any, str]] | None = None
) -> None:
    """Write the page.

    Parameters
    ----------
    findings
        What it shows.
    path
        The file to write.
    files
        What lies beside it: lines, with names between backquotes.
    drawn
        The plots, of :func:`nni_plugins.report.plots.draw_all`; drawn here where they are left out.
    """
    write_text(path, html(findings, files, drawn))


def html(findings: Findings, files: Sequence[str] = (), drawn: Mapping[str, tuple[Any, str]] | None = None) -> str:
    """The page as text."""
    figures = inlined(draw_all(findings) if drawn is None else drawn)
    lead, text = sections.headline(findings)
    found = sections.trial_rows(findings, most=BEST)
    return render(
        "report.html",
        findings=findings,
        lead=lead,
        text=text,
        state=sections.state_line(findings),
        cards=sections.cards(findings),
        comparison=comparison(findings),
        proof=proof_lines(findings),
        front=sections.front_rows(findings) if len(findings.front()) > 1 else None,
        front_words=sections.FRONT,
        layers=sections.layers_line(findings),
        counts=sections.counts(findings),
        best=found,
        everything=sections.trial_rows(findings) if len(findings.candidates) > len(found[1]) else None,
        failures=sections.failures(findings),
        importance=[
            (sections.importance_line(one), figures.get(f"importance-{safe_name(one.target)}"))
            for one in findings.importance
        ],
        space=sections.search_rows(findings),
        figures=figures,
        has_pareto=any(name.startswith("pareto") for name in figures),
        files=files,
    )


def render(template: str, **values: Any) -> str:
    """Fill in a template of ours; every value is escaped that is not a plot."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    pages = Environment(
        loader=PackageLoader("nni_plugins.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["spoken"] = spoken
    return pages.get_template(template).render(version=__version__, **values)


def spoken(text: str) -> Any:
    """A sentence, escaped, with what stands between backquotes as code."""
    from markupsafe import Markup, escape

    parts = str(text).split("`")
    if len(parts) % 2 == 0:
        return escape(text)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if index % 2 else escape(part) for index, part in enumerate(parts)
    )


def inlined(drawn: Mapping[str, tuple[Any, str]]) -> dict[str, dict[str, Any]]:
    """Each plot as SVG that may stand in a page, with its words."""
    from markupsafe import Markup

    return {
        name: {"svg": Markup(inline_svg(figure, f"f{number}")), "words": words, "name": name}
        for number, (name, (figure, words)) in enumerate(drawn.items())
    }


def write_text(path: Path, text: str) -> None:
    """Write a page whole: who looks at it while it is written again sees the old one."""
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8", errors="replace"))
