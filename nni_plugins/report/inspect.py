"""``nni-plugins inspect``: what can go from a model, what each part of it costs, and what cannot go, and why."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nni_plugins.training.errors import RecipeError, first_line, where

if TYPE_CHECKING:
    from rich.console import Console

    from nni_plugins.channels import ChannelGraph, ChannelGroup
    from nni_plugins.channels.latency import LatencyTable
    from nni_plugins.report.inspect_target import Target

PLOTS = (".png", ".svg", ".pdf")
WIDTHS = (0.25, 0.5, 0.75)
"""Shares kept of a group for which its effect on latency is told."""


class InspectError(RecipeError):
    """What was asked for cannot be inspected; one line says why."""


def run(
    model: str,
    inputs: tuple[str, ...],
    inputs_function: str | None,
    arguments: tuple[str, ...],
    checkpoint: Path | None,
    device: str | None,
    sparsities: str,
    plot: Path | None,
    as_json: bool,
    no_latency: bool,
    progress: bool | None = None,
    **options: Any,
) -> None:
    """Run the command: the options of ``nni-plugins inspect``, as they were given.

    Raises
    ------
    RecipeError, CompressionError
        With one line.
    """
    from nni_plugins.command import show as say
    from nni_plugins.command.values import parse_change

    if plot is not None and plot.suffix.lower() not in PLOTS:
        raise InspectError(f"--plot {plot}: its ending must be {' or '.join(PLOTS)}")
    shares = parse_sparsities(sparsities)
    values = dict(parse_change(argument, "--argument") for argument in arguments)
    console = say.progress(progress)
    with contextlib.redirect_stdout(sys.stderr):  # what the user's own code prints must not get between the JSON
        from nni_plugins.report.inspect_target import find_target

        target = find_target(model, inputs, inputs_function, values, checkpoint, device)
        found = inspect_model(target, console, latency=not no_latency, sparsities=shares, **options)
    if plot is not None:
        from nni_plugins.report.inspect_plot import save_groups

        try:
            save_groups(found, plot)
        except OSError as error:
            raise InspectError(f"--plot {plot} cannot be written: {error.strerror or error}") from None
        console.print(f"plot: {plot}", highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    from nni_plugins.report.inspect_table import show

    show(found)


def parse_sparsities(text: str) -> tuple[float, ...]:
    """Return ``0.25,0.5`` as numbers in (0, 1)."""
    try:
        values = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        values = ()
    if not values or not all(0 < value < 1 for value in values):
        raise InspectError(f"--sparsities {text}: write numbers between 0 and 1, as 0.25,0.5,0.75")
    return values


def inspect_model(
    target: Target,
    console: Console,
    *,
    units: str = "heads",
    threads: int = 1,
    latency: bool = True,
    curves: bool = False,
    fresh: bool = False,
    metric: str | None = None,
    sensitivity: bool = False,
    sparsities: tuple[float, ...] = (),
) -> dict[str, Any]:
    """Return all that is known of a model's groups, as plain data.

    Parameters
    ----------
    target
        The model and its input.
    console
        Where progress is shown.
    units
        What of attention can go: 'heads' or 'head_dim'.
    threads
        CPU threads of the latency.
    latency, curves, fresh
        Time the model's operators; at smaller sizes too; again, in place of what the cache knows.
    metric
        ``module:function`` that takes the model and returns a number, more is better; a recipe has its own.
    sensitivity, sparsities
        Prune each group alone by so much, and evaluate.

    Raises
    ------
    InspectError
        With one line.
    """
    measure = evaluator(target, metric) if sensitivity or metric is not None else None
    graph = watch(target, units)
    table = time_operators(graph, target, console, threads, curves, fresh) if latency else None
    found = describe(target, graph, table)
    if measure is not None:
        from nni_plugins.report.inspect_sensitivity import sensitivity_of

        result = sensitivity_of(target.model, graph, measure, sparsities, console)
        for group in found["groups"]:
            group["sensitivity"] = result["groups"].pop(group["name"], None)
        found["sensitivity"] = {key: value for key, value in result.items() if key != "groups"}
    return found


def watch(target: Target, units: str) -> ChannelGraph:
    """Return the channel graph of the target, with the failure of its forward as one line."""
    from nni_plugins.channels import ChannelGraph

    try:
        return ChannelGraph.watch(target.model, target.dummy_input, units=units)  # type: ignore[arg-type]
    except Exception as error:  # whatever a forward raises
        if type(error) is ValueError and "nni_plugins" in where(error):
            raise InspectError(f"{target.name}: {first_line(error)}") from error
        raise InspectError(f"{target.name}: the model fails on {target.input_text()}: {where(error)}") from error


def time_operators(
    graph: ChannelGraph, target: Target, console: Console, threads: int, curves: bool, fresh: bool
) -> LatencyTable:
    """Return the latency table of the target, with progress."""
    from nni_plugins.channels.latency import LatencyTable

    with progress_of(console, "timing operators") as step:
        return LatencyTable.measure(
            graph,
            target.model,
            target.dummy_input,
            threads=threads,
            curves=curves,
            fresh=fresh,
            progress=lambda done, total, name: step(done, total),
        )


@contextlib.contextmanager
def progress_of(console: Console, what: str) -> Any:
    """Show how far something is, where somebody looks; yields a function of ``(done, total)``."""
    from nni_plugins.command.progress import bar_of

    with bar_of(console) as bar:
        task = bar.add_task(what, total=None, text="")

        def step(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield step


def describe(target: Target, graph: ChannelGraph, table: LatencyTable | None) -> dict[str, Any]:
    """Return what the graph and the latency table say, as plain data."""
    cost = graph.cost()
    groups = [_group(graph, table, group) for group in graph.groups]
    times = table.modules() if table is not None else {}
    names = dict.fromkeys([*cost.modules, *times])
    states = [group["state"] for group in groups]
    return {
        "model": target.name,
        "class": type(target.model).__name__,
        "input": target.input_text(),
        "macs": cost.macs,
        "params": cost.params,
        "latency": None if table is None else _latency(table),
        "counts": {"groups": len(groups), **{state: states.count(state) for state in ("exact", "inexact", "frozen")}},
        "groups": groups,
        "frozen": [
            {"module": one.module, "operator": one.operator, "reason": one.reason, "size": one.size}
            for one in graph.frozen
        ],
        "modules": [
            {
                "name": name,
                "macs": cost.modules.get(name, (0, 0))[0],
                "params": cost.modules.get(name, (0, 0))[1],
                **({} if table is None else {"latency_ms": times.get(name, 0.0)}),
            }
            for name in names
        ],
    }


def _latency(table: LatencyTable) -> dict[str, Any]:
    return {
        "measured_ms": table.measured_ms,
        "overhead_ms": table.overhead_ms,
        "taken": table.taken,
        "seconds": round(table.seconds, 3),
        "machine": table.machine,
    }


def _group(graph: ChannelGraph, table: LatencyTable | None, group: ChannelGroup) -> dict[str, Any]:
    total, touched = graph.cost(), graph.group_cost(group)
    found: dict[str, Any] = {
        "name": group.name,
        "kind": group.kind,
        "size": group.size,
        "state": "frozen" if not group.prunable else "exact" if group.exact else "inexact",
        "reason": group.reason,
        "members": [
            {"module": m.module, "parameter": m.parameter, "dim": m.dim, "role": m.role, "repeat": m.indices.shape[1]}
            for m in group.members
        ],
        "macs": touched.macs,
        "macs_share": touched.macs / total.macs if total.macs else 0.0,
        "params": touched.params,
        "params_share": touched.params / total.params if total.params else 0.0,
    }
    if table is not None:
        found["latency_ms"] = table.group_ms(group)
        found["latency_share"] = found["latency_ms"] / table.measured_ms if table.measured_ms else 0.0
        if table.has_curves and group.prunable:
            counts = {share: max(1, round(share * group.size)) for share in WIDTHS}
            found["model_ms_at"] = {
                f"{share:g}": table.latency_ms({group.name: kept}) for share, kept in counts.items()
            }
    return found


def evaluator(target: Target, metric: str | None) -> Callable[[], tuple[str, bool, float]]:
    """Return a function that evaluates the target's model: the metric's name, whether more is better, and its value."""
    if metric is None:
        if target.evaluate is None:
            raise InspectError(
                "--sensitivity needs --metric module:function (from the model to a number, more is better), or a "
                "recipe in place of the model"
            )
        return target.evaluate
    from nni_plugins.report.inspect_target import named

    function = named(metric, "--metric")
    if not callable(function):
        raise InspectError(f"--metric {metric} is no function but {type(function).__name__}")
    name = metric.rpartition(":")[2]

    def evaluate() -> tuple[str, bool, float]:
        try:
            value = function(target.model)
        except Exception as error:  # the user's own function
            raise InspectError(f"--metric {metric} fails: {where(error)}") from error
        try:
            return name, True, float(value)
        except (TypeError, ValueError):
            raise InspectError(f"--metric {metric} returned {type(value).__name__}; it must be a number") from None

    return evaluate
