"""Dense against compact, as rows of text: for the terminal and for the page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nni_plugins.report.findings import Findings

if TYPE_CHECKING:
    from rich.table import Table

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def comparison(findings: Findings) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row a quantity, one column a model, and what the compact one saves."""
    dense, compact = findings.dense, findings.compact
    if dense is None or compact is None:
        return ["", "chosen"], _of_one(findings)
    rows: list[list[str]] = []
    for label, name in ((named(split, findings.metric), split) for split in ("test", "validation")):
        before, after = getattr(dense, name), getattr(compact, name)
        if before is not None or after is not None:
            change = quality_change(before, after, findings.metric)
            rows.append([label, quality(before, findings.metric), quality(after, findings.metric), change])
    rows.append(["MACs", amount(dense.macs), amount(compact.macs), share(dense.macs, compact.macs)])
    rows.append(["parameters", amount(dense.params), amount(compact.params), share(dense.params, compact.params)])
    if dense.latency_ms and compact.latency_ms:
        times = f"{dense.latency_ms:.2f} ms", f"{compact.latency_ms:.2f} ms"
        rows.append(["latency", *times, share(dense.latency_ms, compact.latency_ms)])
    if dense.file_bytes and compact.file_bytes:
        sizes = size(dense.file_bytes), size(compact.file_bytes)
        rows.append(["file", *sizes, share(dense.file_bytes, compact.file_bytes)])
    return ["", dense.name, compact.name, "change"], rows


def _of_one(findings: Findings) -> list[list[str]]:
    """What is known of the best trial, where there is no model to compare."""
    best = next((one for one in findings.candidates if one.id == findings.chosen), None)
    if best is None:
        return []
    rows = [[named("validation", findings.metric), quality(best.metric, findings.metric)]]
    rows += [["MACs", amount(best.macs)]] if best.macs is not None else []
    rows += [["parameters", amount(best.params)]] if best.params is not None else []
    rows += [["latency", f"{best.latency_ms:.2f} ms"]] if best.latency_ms is not None else []
    rows += [["file", size(best.file_bytes)]] if best.file_bytes is not None else []
    return rows + [[name, f"{value:.4g}"] for name, value in best.others.items()]


def rich_table(findings: Findings) -> Table:
    """The comparison for a terminal."""
    from rich.table import Table

    header, rows = comparison(findings)
    what = "dense and compact model" if findings.compact is not None else "the best trial"
    table = Table(title=f"{findings.title}: {what}", title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", style="bold" if index == 2 else None)
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(header: list[str], rows: list[list[str]], left: tuple[int, ...] = (0,)) -> str:
    """A GitHub-flavoured table; the columns `left` to the left, the others to the right."""
    marks = ["---" if index in left else "---:" for index in range(len(header))]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in (header, marks, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def proof_lines(findings: Findings) -> list[str]:
    """What was checked, in whole sentences."""
    lines = []
    if findings.relative_error is not None:
        verdict = "equals" if findings.relative_error <= findings.tolerance else "DIFFERS FROM"
        absolute = "" if findings.max_error is None else f"{findings.max_error:.1e} absolute; "
        lines.append(
            f"The compact model {verdict} the masked model: largest difference {findings.relative_error:.1e} of the "
            f"output's size ({absolute}allowed {findings.tolerance:.0e})."
        )
    stock = findings.stock
    if stock is not None and stock.note:
        lines.append(f"NNI's own ModelSpeedup with our replacers was not compared: {stock.note}.")
    elif stock is not None:
        shapes = "the same shapes" if stock.same_shapes else "OTHER SHAPES"
        outputs = f"outputs that differ by at most {stock.max_error:.1e} of their size"
        if stock.max_error == 0:
            outputs = "the same outputs, to the last bit"
        lines.append(f"NNI's own ModelSpeedup with our replacers makes a model of {shapes} and {outputs}.")
    if findings.realised is not None and findings.dense is not None and findings.compact is not None:
        macs = share(findings.dense.macs, findings.compact.macs)
        time = share(findings.dense.latency_ms or 1.0, findings.compact.latency_ms or 1.0)
        saved = f"Of the saving in MACs, {100 * findings.realised:.0f}% is a saving of time here"
        none = "The saving in MACs is none of time here (`prune.round_to: 8` or `prune.target: latency` may help)"
        lines.append(f"{saved if findings.realised > 0 else none}: {macs} of the MACs, {time} of the time.")
    if findings.round_to and findings.round_to["tried"]:
        lines.append(f"`prune.round_to: auto` took {findings.round_to['chosen']}; timed: {_tried(findings.round_to)}.")
    if findings.latency_budget:
        met = findings.latency_budget
        lines.append(
            f"`prune.target: latency` asked for {100 * met['asked']:.0f}% of the time; in turns with the dense model, "
            f"the pruned one took {100 * met['time']:.0f}% (models that were made for it: {len(met['tried'])})."
        )
    if len(findings.stages) > 1:
        after = ", ".join(f"{name} {quality(value, findings.metric)}" for name, value in findings.stages.items())
        lines.append(f"Validation {findings.metric} after each step: {after}.")
    if findings.ablation is not None:
        taught, alone = findings.ablation["with_teacher"], findings.ablation["alone"]
        lines.append(
            f"Test {findings.metric} with the teacher {quality(taught, findings.metric)}, without it "
            f"{quality(alone, findings.metric)} (both in float)."
        )
    return lines


def _tried(multiples: dict[str, Any]) -> str:
    """Each multiple that was timed, with the share of its saving in MACs that is one of time."""
    parts = []
    for one in multiples["tried"]:
        if one["realised"] is None:
            parts.append(f"{one['round_to']} does not fit")
        else:
            left = f"{100 * one['macs']:.0f}% of the MACs and {100 * one['time']:.0f}% of the time"
            parts.append(f"{one['round_to']} leaves {left} ({one['realised']:.2f} of the saving is real)")
    return "; ".join(parts)


def named(split: str, metric: str) -> str:
    """What a figure is called: ``validation accuracy``; a bare number that a trial reports is its result."""
    return "result" if metric == "default" else f"{split} {metric}"


def quality(value: float | None, metric: str) -> str:
    """A metric as people write it: accuracy in per cent, others with four digits."""
    if value is None:
        return "–"
    return f"{100 * value:.2f}%" if metric == "accuracy" and abs(value) <= 1 else f"{value:.4g}"


def quality_change(before: float | None, after: float | None, metric: str) -> str:
    """The difference, in points for accuracy."""
    if before is None or after is None:
        return ""
    shares = metric == "accuracy" and max(abs(before), abs(after)) <= 1
    return f"{100 * (after - before):+.2f} points" if shares else f"{after - before:+.4g}"


def amount(value: float) -> str:
    """A count with a unit: 41.3 M."""
    for factor, unit in UNITS:
        if abs(value) >= factor:
            return f"{value / factor:.4g} {unit}"
    return f"{value:g}"


def size(count: int) -> str:
    """Bytes with a unit."""
    return f"{count / 1024:.1f} KiB" if count < 1024**2 else f"{count / 1024**2:.2f} MiB"


def share(before: float, after: float) -> str:
    """What is left, and how many times less (or more) that is."""
    if not before or not after:
        return ""
    if before == after:
        return "the same"
    times = f"{before / after:.2f}x less" if after <= before else f"{after / before:.2f}x more"
    return f"{100 * after / before:.0f}% ({times})"
