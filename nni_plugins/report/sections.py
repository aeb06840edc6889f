"""What the pages say, as plain sentences and rows: the same in Markdown and in HTML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from nni_plugins.report.figures import shortened
from nni_plugins.report.findings import Candidate, Findings, Importance
from nni_plugins.report.importance import flat
from nni_plugins.report.importance_plot import words_of
from nni_plugins.report.layers_plot import MOST as MOST_LAYERS
from nni_plugins.report.layers_plot import kind_of
from nni_plugins.report.table import amount, named, quality, size

Rows = tuple[list[str], list[list[str]]]
MOST_TRIALS = 50
"""So many trials are in the table of the Markdown page, the best ones."""
LONGEST = 80
STATES = {
    "running": "It is still running: the figures are of the trials so far, and the test split has not been read.",
    "stopped": "It was stopped before its last trial, and can be resumed.",
}
FRONT = "The trials within the bounds that no other one beats in the metric, MACs and latency at once (on validation)."


def headline(findings: Findings) -> tuple[str, str]:
    """What is left of the model, and the sentences that go on from there."""
    dense, compact = findings.dense, findings.compact
    total = f"trial {findings.chosen} of {len(findings.candidates)}"
    if dense is None or compact is None:
        best = next((one for one in findings.candidates if one.id == findings.chosen), None)
        if best is None:
            return "No trial has a result", "."
        value = quality(best.metric, findings.metric)
        lead = f"The best {named('validation', findings.metric)} is {value}"
        where = "" if best.macs is None else f" at {amount(best.macs)} MACs"
        return lead, f"{where} ({total}). " + NO_MODEL[findings.state == "running"]
    macs = 100 * compact.macs / dense.macs if dense.macs else 100.0
    params = 100 * compact.params / dense.params if dense.params else 100.0
    lead = f"{macs:.0f}% of the MACs and {params:.0f}% of the parameters"
    text = " are left"
    tested = dense.test is not None and compact.test is not None
    if tested:
        before, after = quality(dense.test, findings.metric), quality(compact.test, findings.metric)
        text += f"; test {findings.metric} goes from {before} to {after}"
    source = "" if findings.state == "single" else f" ({total})"
    return lead, f"{text}{source}. {_seen(findings, tested)}"


NO_MODEL = {
    False: "Its trials report numbers; there is no compact model of theirs here.",
    True: "The chosen model is proved, timed and tested when the search is over.",
}


def _seen(findings: Findings, tested: bool) -> str:
    if findings.state == "single" and tested:
        return "The test split was read once, at the end, for these two models."
    if findings.state == "running":
        return "The figures are of validation; the test split is read at the end."
    if not tested:
        if any("test" in note for note in findings.notes):
            return "The figures are of validation, which the search saw."
        return "There is no test split; the figures are of validation, which the search saw."
    if len(findings.tested) > 1:
        return (
            f"The search saw validation only; the test split was read {len(findings.tested)} times, "
            f"as other trials became the best ({', '.join(findings.tested)})."
        )
    return "The search saw validation only; the test split was read once, at the end, for these two models."


def counts(findings: Findings) -> str:
    """How many trials ended how, in what time, and under which bounds."""
    ended = Counter(one.status for one in findings.candidates)
    words = ", ".join(f"{number} {status.lower().replace('_', ' ')}" for status, number in sorted(ended.items()))
    wanted = findings.trials_wanted
    open_ended = findings.state in ("running", "stopped")
    of = f" (of {wanted} wanted)" if open_ended and wanted and wanted > len(findings.candidates) else ""
    took = f" in {findings.seconds / 60:.1f} minutes" if findings.seconds else ""
    bounds = ", ".join(f"{name} {value:g}" for name, value in findings.bounds.items())
    return f"{words}{of}{took}" + (f"; bounds of the objective: {bounds}." if bounds else ".")


def state_line(findings: Findings) -> str:
    """That the search is not over; empty for one that is."""
    return STATES.get(findings.state, "")


def front_rows(findings: Findings, mark: Callable[[str], str] = str) -> Rows:
    """The front, cheapest first."""
    costs = _costs(findings)
    rows = []
    for one in findings.front():
        row = [_name(one, findings, mark), quality(one.metric, findings.metric)]
        rows.append([*row, *(form(one, findings) for form in costs.values()), tried(one)])
    return ["trial", named("validation", findings.metric), *costs, "what it tried"], rows


def trial_rows(findings: Findings, mark: Callable[[str], str] = str, most: int | None = None) -> Rows:
    """The trials: the best first, those without a figure at the end, with their reason; ``most`` with a figure."""
    found = findings.best_first()
    if most is not None:
        found = [one for one in found if one.default is not None][:most]
    costs = _costs(findings)
    others = list(dict.fromkeys(name for one in found for name in one.others))[:6]
    rows = []
    for one in found:
        ended = one.status.lower().replace("_", " ") + (f": {one.note}" if one.note else "")
        row = [_name(one, findings, mark), quality(one.metric, findings.metric)]
        row += [form(one, findings) for form in costs.values()]
        row += [f"{one.others[name]:.4g}" if name in one.others else "–" for name in others]
        rows.append([*row, tried(one), ended])
    return ["trial", named("validation", findings.metric), *costs, *others, "what it tried", "end"], rows


def failures(findings: Findings) -> list[tuple[str, list[str]]]:
    """The reasons of the trials that failed, the most frequent first, with their ids."""
    found: dict[str, list[str]] = {}
    for one in findings.candidates:
        if one.status == "FAILED":
            found.setdefault(one.note or "no reason is known", []).append(one.id)
    return sorted(found.items(), key=lambda item: -len(item[1]))


def layers_line(findings: Findings) -> str:
    """How much of the layers is left, in words."""
    layers = findings.layers
    if not layers:
        return ""
    whole, kept = sum(layer.size for layer in layers), sum(layer.kept for layer in layers)
    text = f"{kept:,} of {whole:,} units in {len(layers)} channel groups are kept"
    if kind_of(layers) == "weights":
        text = (
            f"No channel is removed; {kept:,} of {whole:,} weights in {len(layers)} layers are kept, the rest is zero"
        )
    least = min(layers, key=lambda layer: layer.kept / max(layer.size, 1))
    if least.kept < least.size:
        text += f"; {shortened(least.name, LONGEST)} keeps the least, {100 * least.kept / least.size:.0f}%"
    if findings.blocks:
        text += f". Removed as a whole: {', '.join(shortened(name, LONGEST) for name in findings.blocks)}"
    if len(layers) > MOST_LAYERS:
        text += f". The {MOST_LAYERS} groups that lose the most are drawn"
    return text + "."


def importance_line(found: Importance) -> str:
    """What the bars are, or why there are none."""
    left = f" Left out, as only some trials have them: {', '.join(found.left_out)}." if found.left_out else ""
    target = words_of(found.target)
    if found.note:
        return f"{target}: {found.note}.{left}"
    explained = 0.0 if found.explained is None else found.explained
    return (
        f"{target}: functional ANOVA over {found.trials} trials, without interactions; lines are one standard "
        f"deviation over resampled trials. The parameters predict unseen trials with R² {explained:.2f}.{left}"
    )


def search_rows(findings: Findings) -> list[list[str]]:
    """The space: parameter, kind, values."""
    rows = []
    space = findings.search.get("space")
    for name, item in space.items() if isinstance(space, dict) else ():
        kind = item.get("_type", "") if isinstance(item, dict) else ""
        values = item.get("_value", item) if isinstance(item, dict) else item
        text = ", ".join(map(_short, values)) if isinstance(values, list) else _short(values)
        rows.append([str(name), str(kind), shortened(text, 200)])
    return rows


def tried(one: Candidate) -> str:
    """A trial's parameters in a line."""
    return ", ".join(f"{key.removeprefix('prune.')} {_short(value)}" for key, value in flat(one.parameters).items())


def cards(findings: Findings) -> list[tuple[str, str, str]]:
    """The figures that one looks for first: what, how much, and beside it."""
    dense, compact, found = findings.dense, findings.compact, []
    if dense is None or compact is None:
        best = next((one for one in findings.candidates if one.id == findings.chosen), None)
        if best is not None:
            found.append(
                (
                    f"best {named('validation', findings.metric)}",
                    quality(best.metric, findings.metric),
                    f"trial {best.id}",
                )
            )
        return [*found, ("trials", str(len(findings.candidates)), counts(findings).split(";")[0].rstrip("."))]
    split = "test" if compact.test is not None else "validation"
    before, after = getattr(dense, split), getattr(compact, split)
    if after is not None:
        found.append(
            (f"{split} {findings.metric}", quality(after, findings.metric), f"dense {quality(before, findings.metric)}")
        )
    found.append(
        ("MACs", f"{100 * compact.macs / max(dense.macs, 1):.0f}%", f"{amount(dense.macs)} → {amount(compact.macs)}")
    )
    params = f"{amount(dense.params)} → {amount(compact.params)}"
    found.append(("parameters", f"{100 * compact.params / max(dense.params, 1):.0f}%", params))
    if dense.latency_ms and compact.latency_ms:
        times = f"{dense.latency_ms:.2f} → {compact.latency_ms:.2f} ms"
        found.append(("latency", f"{100 * compact.latency_ms / dense.latency_ms:.0f}%", times))
    if dense.file_bytes and compact.file_bytes:
        sizes = f"{size(dense.file_bytes)} → {size(compact.file_bytes)}"
        found.append(("file", f"{100 * compact.file_bytes / dense.file_bytes:.0f}%", sizes))
    if findings.relative_error is not None:
        verdict = "equals the masked model" if findings.relative_error <= findings.tolerance else "DIFFERS"
        found.append(
            ("largest difference", f"{findings.relative_error:.0e}" if findings.relative_error else "0", verdict)
        )
    return found


def _name(one: Candidate, findings: Findings, mark: Callable[[str], str]) -> str:
    return f"{mark(one.id)} (chosen)" if one.id == findings.chosen else one.id


def _costs(findings: Findings) -> dict[str, Callable[[Candidate, Findings], str]]:
    """The columns for what the trials cost, where any of them knows it."""
    found: dict[str, Callable[[Candidate, Findings], str]] = {}
    if any(one.macs is not None for one in findings.candidates):
        found["MACs"] = _macs
    if any(one.latency_ms is not None for one in findings.candidates):
        found["latency"] = _latency
    return found


def _macs(one: Candidate, findings: Findings) -> str:
    if one.macs is None:
        return "–"
    base = one.dense_macs or (findings.dense.macs if findings.dense is not None else None)
    return f"{amount(one.macs)} ({100 * one.macs / base:.0f}%)" if base else amount(one.macs)


def _latency(one: Candidate, findings: Findings) -> str:
    return "–" if one.latency_ms is None else f"{one.latency_ms:.2f} ms"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict) and "_name" in value:
        return str(value["_name"])
    return shortened(str(value), LONGEST)
