"""``nni-plugins space``: the search space of a model, from its channel graph."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import click

from nni_plugins.search.errors import SearchError
from nni_plugins.search.spaces import Space, dump_space, places, ranking_space, sparsity_space
from nni_plugins.training.errors import CompressionError, RecipeError


def run(
    model: str,
    inputs: tuple[str, ...],
    inputs_function: str | None,
    arguments: tuple[str, ...],
    per: str,
    kind: str,
    lowest: float,
    highest: float,
    levels: int,
    inexact: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Run the command: the options of ``nni-plugins space``, as they were given.

    Raises
    ------
    RecipeError
        With one line.
    """
    from nni_plugins.command.values import parse_change
    from nni_plugins.pruners.affine import begins
    from nni_plugins.training.allocate import prunable_groups
    from nni_plugins.training.recipe import load_recipe
    from nni_plugins.training.sections import PruneSettings

    values = dict(parse_change(argument, "--argument") for argument in arguments)
    recipe = model.lower().endswith((".yml", ".yaml"))
    settings = load_recipe(model).prune if recipe else PruneSettings()
    with contextlib.redirect_stdout(sys.stderr):  # the user's own code may print
        from nni_plugins.report.inspect import watch
        from nni_plugins.report.inspect_target import find_target

        target = find_target(model, inputs, inputs_function, values)
        graph = watch(target, "heads")
    if inexact:
        settings = dataclasses.replace(settings, exact_only=False)
    try:
        groups = prunable_groups(settings, target.model, graph)
    except CompressionError as error:
        raise CompressionError(f"{target.name}: {error}") from None
    try:
        make = ranking_space if kind == "ranking" else sparsity_space
        options: dict[str, Any] = {} if kind == "ranking" else {"lowest": lowest, "highest": highest, "levels": levels}
        space: Space = make(groups, per, **options)
    except SearchError as error:
        raise RecipeError(str(error)) from None
    whole = graph.cost().macs or 1
    notes = {}
    for place in places(groups, per):
        members = [group for group in groups if begins(group.name, place)]
        saved = 1 - graph.cost({group.name: 1 for group in members if group.size > 1}).macs / whole
        sizes = ", ".join(str(group.size) for group in members[:6]) + (", ..." if len(members) > 6 else "")
        first = next(name for name in space if name.endswith(f".{place}"))
        notes[first] = f"{sizes} units; without them {100 * saved:.0f}% of the MACs less"
    header = (
        f"Search space of {target.name}, from its channel graph: {len(groups)} groups that can lose units.\n"
        "The names are fields of the recipe by dotted path."
    )
    text = json.dumps(space, indent=1) + "\n" if as_json else dump_space(space, header, notes)
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"--output {output} cannot be written: {error.strerror}") from None
