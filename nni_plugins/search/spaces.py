"""Search spaces: read and checked before an experiment starts, and written for any model from its channel graph.

A space is NNI's: a dictionary from names to ``{_type, _value}``. The names are fields of the recipe by dotted path, so
whether a space fits a recipe can be tried: the ends of every range and all choices are put into it.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from nni_plugins.search.errors import SearchError

if TYPE_CHECKING:
    from nni_plugins.channels import ChannelGroup
    from nni_plugins.training.recipe import Recipe

Space = dict[str, dict[str, Any]]

NUMBERS = {
    "uniform": "[low, high]",
    "quniform": "[low, high, step]",
    "loguniform": "[low, high]",
    "qloguniform": "[low, high, step]",
    "normal": "[mean, deviation]",
    "qnormal": "[mean, deviation, step]",
    "lognormal": "[mean, deviation]",
    "qlognormal": "[mean, deviation, step]",
    "randint": "[low, high), whole numbers",
}
"""NNI's types of numbers, and what their ``_value`` is."""
KINDS = ("choice", *NUMBERS)


def load_space(path: str | Path) -> Space:
    """Read and check a search space.

    Parameters
    ----------
    path
        YAML or JSON.

    Raises
    ------
    SearchError
        In one line: the file, the parameter, what is wrong and what to write.
    """
    from nni_plugins.training.errors import RecipeError
    from nni_plugins.training.yaml_file import read_yaml

    path = Path(path)
    try:
        space = read_yaml(path)
    except RecipeError as error:
        raise SearchError(str(error)) from None
    return check_space(space, path.name)


def check_space(space: Any, source: str = "search space") -> Space:
    """Check what a search space is made of; returns it.

    Raises
    ------
    SearchError
        With one line.
    """
    if not isinstance(space, Mapping) or not space:
        raise SearchError(f"{source} is {short(space)}; it must be names, each with _type and _value")
    for name, spec in space.items():
        _check_parameter(name, spec, f"{source}: {name}")
    return {str(name): dict(spec) for name, spec in space.items()}


def check_against(space: Space, recipe: Recipe, source: str = "search space") -> None:
    """Try a space on a recipe: every name must be a field of it, and take the ends of its range and all its choices.

    Raises
    ------
    RecipeError
        With one line, as the trial would say it.
    """
    from nni_plugins.training.errors import RecipeError

    recipe.with_values({name: _values(spec)[0] for name, spec in space.items()}, source)
    for name, spec in space.items():
        for value in _values(spec):
            recipe.with_values({name: value}, source)
    goal, searched = recipe.objective, next((name for name in space if name.startswith("model.")), None)
    if searched and goal.metric != "accuracy" and goal.reference is None:
        raise RecipeError(
            f"{source}: {searched} gives every trial a dense model of its own; objective.metric: {goal.metric} needs "
            "objective.reference, a number that all are shares of"
        )


def sparsity_space(
    groups: Sequence[ChannelGroup], per: str = "group", lowest: float = 0.0, highest: float = 0.8, levels: int = 0
) -> Space:
    """Return a space of the share that each group, or each stage, loses.

    Parameters
    ----------
    groups
        Those that can be pruned.
    per
        ``group`` or ``stage`` (see :func:`stages`).
    lowest, highest
        Ends of the range.
    levels
        So many evenly spread choices in place of a range; 0 for a range.
    """
    if not 0 <= lowest < highest < 1:
        raise SearchError(f"lowest {lowest} and highest {highest}: shares to remove must rise, within [0, 1)")
    if levels == 1 or levels < 0:
        raise SearchError(f"levels is {levels}; it must be 0 for a range, or at least 2")
    steps = [round(lowest + (highest - lowest) * index / (levels - 1), 4) for index in range(levels)] if levels else []
    spec = {"_type": "choice", "_value": steps} if levels else {"_type": "uniform", "_value": [lowest, highest]}
    return {f"prune.groups.{name}": dict(spec) for name in places(groups, per)}


def ranking_space(groups: Sequence[ChannelGroup], per: str = "group", factor: float = 4.0, shift: float = 1.0) -> Space:
    """Return a space of corrections of scores (LeGR): a factor and a shift of each group, or each stage.

    Parameters
    ----------
    groups, per
        As for :func:`sparsity_space`.
    factor
        Scales lie between ``1 / factor`` and ``factor``, by their logarithm.
    shift
        Shifts lie between ``-shift`` and ``shift``, in means of all groups' scores.
    """
    space: Space = {}
    for name in places(groups, per):
        space[f"prune.scales.{name}"] = {"_type": "loguniform", "_value": [1 / factor, factor]}
        space[f"prune.shifts.{name}"] = {"_type": "uniform", "_value": [-shift, shift]}
    return space


def places(groups: Sequence[ChannelGroup], per: str) -> list[str]:
    """Return the names that a space gives values to: the groups' own, or those of their stages."""
    if per not in ("group", "stage"):
        raise SearchError(f"per is {per!r}; it must be group or stage")
    names = [group.name for group in groups]
    return stages(names) if per == "stage" else names


def stages(names: Sequence[str]) -> list[str]:
    """Return the first part of names that tells groups apart: ``layer1``, ``features.3``, ``encoder.layers.0``."""
    parts = [name.partition(":")[0].split(".") for name in names]
    depth = 0
    while all(len(part) > depth + 1 for part in parts) and len({tuple(part[: depth + 1]) for part in parts}) == 1:
        depth += 1
    while len(found := list(dict.fromkeys(".".join(part[: depth + 1]) for part in parts))) == 1 and len(names) > 1:
        if not any(len(part) > depth + 1 for part in parts):
            break
        depth += 1
    return found


def dump_space(space: Space, header: str = "", notes: Mapping[str, str] | None = None) -> str:
    """Write a space as YAML, with a comment above each parameter that has a note."""
    lines = [f"# {line}" for line in header.splitlines()]
    for name, spec in space.items():
        if notes and name in notes:
            lines.append(f"# {notes[name]}")
        lines.append(yaml.safe_dump({name: spec}, default_flow_style=None, sort_keys=False, width=120).strip())
    return "\n".join(lines) + "\n"


def _check_parameter(name: Any, spec: Any, where: str) -> None:
    if not isinstance(name, str):
        raise SearchError(f"{where}: a name must be text, a field of the recipe such as prune.sparsity")
    if not isinstance(spec, Mapping) or "_type" not in spec or "_value" not in spec:
        raise SearchError(f"{where} is {short(spec)}; it must have _type and _value")
    unknown = set(spec) - {"_type", "_value"}
    if unknown:
        raise SearchError(f"{where} has {min(map(str, unknown))}, which means nothing there; it has _type and _value")
    kind, value = spec["_type"], spec["_value"]
    if kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, 1, 0.5)
        raise SearchError(f"{where}._type is {kind}; " + (f"did you mean {near[0]}?" if near else f"known: {KINDS}"))
    if not isinstance(value, (list, tuple)) or not value:
        raise SearchError(f"{where}._value is {short(value)}; {kind} takes {NUMBERS.get(kind, 'a list of values')}")
    if kind == "choice":
        branches = [option for option in value if isinstance(option, Mapping)]
        for option in branches:
            _check_branch(option, where)
        if branches and len(branches) < len(value):
            raise SearchError(
                f"{where}: some of its choices are sections and some are not; write each as {{_name: ...}}"
            )
        return
    numbers = all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in value)
    right = len(value) == (3 if kind.startswith("q") else 2)
    if not numbers or not right or not all(math.isfinite(item) for item in value):
        raise SearchError(f"{where}._value is {short(value)}; {kind} takes {NUMBERS[kind]}")
    low, high = value[0], value[1]
    if kind == "randint" and not all(float(item).is_integer() for item in value):
        raise SearchError(f"{where}._value is {short(value)}; randint takes {NUMBERS[kind]}")
    if "normal" in kind:
        if high <= 0:
            raise SearchError(f"{where}._value is {short(value)}; the deviation must be above 0")
    elif low > high or (kind == "randint" and low == high):
        raise SearchError(f"{where}._value is {short(value)}; low must be below high")
    elif "log" in kind and low <= 0:
        raise SearchError(f"{where}._value is {short(value)}; low must be above 0 for a logarithm")
    if kind.startswith("q") and value[2] <= 0:
        raise SearchError(f"{where}._value is {short(value)}; the step must be above 0")


def _check_branch(option: Mapping[str, Any], where: str) -> None:
    if "_name" not in option:
        raise SearchError(f"{where}: a choice that is a section needs _name, its value; {short(option)} has none")
    for name, spec in option.items():
        if name != "_name":
            _check_parameter(name, spec, f"{where}.{option['_name']}.{name}")


def _values(spec: Mapping[str, Any]) -> list[Any]:
    """What a parameter can be, as far as it matters to a check: all choices, both ends of a range."""
    kind, value = spec["_type"], spec["_value"]
    if kind == "choice":
        return [made for option in value for made in _branches(option)]
    if kind == "randint":
        return [int(value[0]), int(value[1]) - 1]
    if kind == "normal" or kind == "qnormal":
        return [value[0]]
    if kind == "lognormal" or kind == "qlognormal":
        return [math.exp(value[0])]
    return [value[0], value[1]]


def _branches(option: Any) -> Iterator[Any]:
    if not isinstance(option, Mapping):
        yield option
        return
    inner = {name: _values(spec) for name, spec in option.items() if name != "_name"}
    yield {"_name": option["_name"], **{name: values[0] for name, values in inner.items()}}
    for name, values in inner.items():
        for value in values[1:]:
            yield {"_name": option["_name"], **{other: found[0] for other, found in inner.items()}, name: value}


def short(value: Any) -> str:
    """Write a value for a message, cut where it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
