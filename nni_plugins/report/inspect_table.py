"""What ``nni-plugins inspect`` prints: a table of groups, and what is frozen."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from nni_plugins.report.inspect import WIDTHS
from nni_plugins.report.table import amount, quality

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

STYLES = {"exact": "", "inexact": "yellow", "frozen": "dim"}
MEMBERS = 6
"""So many modules of a group are named; --json has all."""
MODULES = 16
"""Columns without which modules are not named at all."""
WIDEST = 10_000
PIPED = 200
"""Columns where the output is no terminal."""


def show(found: dict[str, Any], console: Console | None = None) -> None:
    """Print the tables, wide where nobody's screen sets the width."""
    from rich.console import Console

    if console is None:
        console = Console(markup=False, emoji=False)
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console = Console(markup=False, emoji=False, width=PIPED)

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    counts = found["counts"]
    say(f"{found['model']}: {found['class']} on {found['input']}")
    say(f"{amount(found['macs'])} MACs, {amount(found['params'])} parameters{_latency(found)}")
    say(
        f"{counts['groups']} groups: {counts['exact']} exact (removing a unit equals masking it), "
        f"{counts['inexact']} inexact (left out unless asked for), {counts['frozen']} frozen (cannot go)"
    )
    console.print()
    width = console.measure(group_table(found), options=console.options.update(width=WIDEST)).maximum
    rest = console.width - width - 2
    table = group_table(found, rest if rest >= MODULES else None)
    console.width = max(console.width, width)  # a figure that is cut off is worse than a line that the terminal breaks
    console.print(table)
    console.print()
    say("Shares are of all that a group's units go through; an operator between two groups counts in both.")
    reasons = reasons_table(found)
    if reasons is not None:
        console.print()
        console.print(reasons)


def group_table(found: dict[str, Any], modules: int | None = None) -> Table:
    """One row a group, and the whole model last; with a column of its modules, so wide."""
    from rich.table import Table

    timed, sensitivity = found["latency"] is not None, found.get("sensitivity")
    curves = any("model_ms_at" in group for group in found["groups"])
    table = Table(title="Groups", title_justify="left", show_footer=True, box=None, pad_edge=False)
    table.add_column("group", "the whole model", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("MACs", f"{amount(found['macs'])}  100%", justify="right", no_wrap=True)
    table.add_column("parameters", f"{amount(found['params'])}  100%", justify="right", no_wrap=True)
    if timed:
        table.add_column("latency", _share(found["latency"]["measured_ms"], 1.0), justify="right", no_wrap=True)
    if curves:
        for width in WIDTHS:
            table.add_column(f"at {width:.0%}", justify="right", no_wrap=True)
    if sensitivity:
        dense = quality(sensitivity["dense"], sensitivity["metric"])
        for sparsity in sensitivity["sparsities"]:
            table.add_column(f"-{sparsity:.0%}", dense, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    if modules is not None:
        table.add_column("modules", overflow="ellipsis", no_wrap=True, max_width=modules)
    for group in found["groups"]:
        row = [
            group["name"],
            group["kind"],
            str(group["size"]),
            f"{amount(group['macs'])} {group['macs_share']:>5.0%}",
            f"{amount(group['params'])} {group['params_share']:>5.0%}",
        ]
        if timed:
            row.append(_share(group["latency_ms"], group["latency_share"]))
        if curves:
            row += [_change(found, group, f"{width:g}") for width in WIDTHS]
        if sensitivity:
            values = group["sensitivity"] or {}
            row += [_quality(values, f"{sparsity:g}", sensitivity["metric"]) for sparsity in sensitivity["sparsities"]]
        row.append(group["state"])
        if modules is not None:
            row.append(collapsed([member["module"] or member["parameter"] for member in group["members"]]))
        table.add_row(*row, style=STYLES[group["state"]])
    notes = []
    if curves:
        notes.append("at 50%: latency of the model, against now, where the group keeps half its units")
    if sensitivity:
        better = "more" if sensitivity["higher_is_better"] else "less"
        notes.append(f"-50%: {sensitivity['metric']} ({better} is better) where the group alone loses half its units")
    table.caption = "; ".join(notes) or None
    table.caption_justify = "left"
    return table


def reasons_table(found: dict[str, Any]) -> Table | None:
    """Why groups are inexact or frozen, one row a reason; None where all are exact."""
    from rich.table import Table

    rows: dict[tuple[str, str], tuple[list[str], list[str]]] = {}
    for group in found["groups"]:
        if group["reason"]:
            why, _, place = group["reason"].partition(" (")
            places, names = rows.setdefault((group["state"], why), ([], []))
            places.append(place.removesuffix(")"))
            names.append(f"{group['name']} ({group['size']})")
    for one in found["frozen"]:
        if not any(state == "frozen" and why == one["reason"] for state, why in rows):
            rows["frozen", one["reason"]] = ([one["operator"]], [f"{one['module'] or 'the model'} ({one['size']})"])
    if not rows:
        return None
    table = Table(title="Why not", title_justify="left", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("why", overflow="fold")
    table.add_column("where", overflow="fold")
    table.add_column("groups (units)", overflow="fold")
    for (state, why), (places, names) in sorted(rows.items(), key=lambda item: item[0][0], reverse=True):
        table.add_row(state, why, _listed(places, 3), _listed(names, 8), style=STYLES[state])
    return table


def _listed(items: list[str], most: int) -> str:
    distinct = list(dict.fromkeys(item for item in items if item))
    return ", ".join(distinct[:most]) + (f", +{len(distinct) - most}" if len(distinct) > most else "")


def collapsed(modules: list[str], most: int = MEMBERS) -> str:
    """Name modules shortly: those of one parent together, and not more than ``most``."""
    names = list(dict.fromkeys(modules))
    rest = len(names) - most
    parents: dict[str, list[str]] = {}
    for name in names[:most]:
        parent, _, own = name.rpartition(".")
        parents.setdefault(parent, []).append(own)
    parts: list[str] = []
    for parent, children in parents.items():
        inner = children[0] if len(children) == 1 else f"{{{','.join(children)}}}"
        parts.append(f"{parent}.{inner}" if parent else ", ".join(children))
    return ", ".join(parts) + (f", +{rest}" if rest > 0 else "")


def _latency(found: dict[str, Any]) -> str:
    latency = found["latency"]
    if latency is None:
        return ""
    machine = latency["machine"]
    threads = machine.get("threads")
    cores = f", {threads} thread{'s' if threads > 1 else ''}" if threads else ""
    source = "timed now" if latency["taken"] else "known from before"
    return f", {_milliseconds(latency['measured_ms'])} ({machine['processor']}{cores}; {source})"


def _share(milliseconds: float, share: float) -> str:
    return f"{_milliseconds(milliseconds)} {share:>5.0%}"


def _milliseconds(value: float) -> str:
    return f"{value:.3g} ms" if value < 100 else f"{value:.0f} ms"


def _change(found: dict[str, Any], group: dict[str, Any], width: str) -> str:
    if width not in group.get("model_ms_at", {}):
        return ""
    return f"{group['model_ms_at'][width] / found['latency']['measured_ms'] - 1:+.1%}"


def _quality(values: dict[str, float | None], sparsity: str, metric: str) -> str:
    if sparsity not in values:
        return ""
    value = values[sparsity]
    return "NaN" if value is None else quality(value, metric)
