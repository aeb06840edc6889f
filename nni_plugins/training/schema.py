"""Checked settings: dataclasses whose fields carry their bounds, and one checker that reads them.

A section is a frozen dataclass; each field is made by :func:`option`, which records in the field's metadata
what may be written there. The annotation gives the type: ``int``, ``float``, ``bool``, ``str``, ``Any``,
``T | None``, ``tuple[T, ...]`` (a list in YAML), ``dict[str, T]`` and other sections.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from nni_plugins.training.errors import RecipeError

Section = TypeVar("Section")
REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_BOUNDS = ("low", "above", "high", "below")


def option(default: Any, doc: str, **limits: Any) -> Any:
    """Declare a field.

    Parameters
    ----------
    default
        Its value when it is not written. Lists and dictionaries are copied.
    doc
        What it means, in one line.
    **limits
        ``low``/``above`` (inclusive/exclusive lower bound), ``high``/``below``, ``choices`` (tuple of texts),
        ``word`` (a text that is let pass in place of a number),
        ``reference`` (``module:function`` is accepted besides the choices), ``needed_for`` (``(field, values)``:
        null is refused where the sibling field has one of the values). Bounds and choices hold for the items of
        a list or a dictionary too.
    """
    metadata = {"doc": doc, **limits}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(cls: type) -> Any:
    """Declare a field that is itself a section, with that section's defaults."""
    return dataclasses.field(default_factory=cls, metadata={"doc": (cls.__doc__ or "").strip().splitlines()[0]})


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a value stands: file, path of the key, and the top section (for suggestions)."""

    source: str
    path: str
    root: type

    def at(self, key: object) -> Place:
        return dataclasses.replace(self, path=f"{self.path}.{key}" if self.path else str(key))

    def fail(self, text: str) -> NoReturn:
        raise RecipeError(f"{self.source}: {self.path} {text}" if self.path else f"{self.source} {text}")


def check(cls: type[Section], value: Any, source: str) -> Section:
    """Build a section from plain data, or say in one line what is wrong with it.

    Parameters
    ----------
    cls
        The section's dataclass.
    value
        A mapping, as read from YAML or JSON.
    source
        Name of the file, for the message.

    Raises
    ------
    RecipeError
        Unknown key, wrong type or value out of range.
    """
    return _check_section(cls, value, {}, Place(source, "", cls))


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def field_paths(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """Yield ``(dotted path, type, field)`` of every leaf field below a section."""
    for field in dataclasses.fields(cls):
        kind = hints(cls)[field.name]
        if dataclasses.is_dataclass(kind):
            yield from field_paths(kind, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            yield prefix + field.name, kind, field


def closest(name: str, known: list[str]) -> str:
    """Suggest the nearest known name: ``'; did you mean X?'``, or the list when none is near."""
    near = difflib.get_close_matches(name, known, 1, 0.6)
    if near:
        return f"did you mean {near[0]}?"
    return f"known: {', '.join(known)}" if known else "nothing is known here"


def _suggest(place: Place, key: str, names: list[str]) -> str:
    near = difflib.get_close_matches(key, names, 1, 0.6)
    if near:
        return f"did you mean {place.at(near[0]).path}?"
    paths = [path for path, _, _ in field_paths(place.root)]
    tails = {path.rpartition(".")[2]: path for path in reversed(paths)}
    near = difflib.get_close_matches(key, list(tails), 1, 0.75)
    if near:
        return f"did you mean {tails[near[0]]}?"
    return f"known here: {', '.join(names)}"


def _check_section(cls: Any, value: Any, limits: Mapping[str, Any], place: Place) -> Any:
    if value is None:
        value = {}
    if not isinstance(value, Mapping):
        place.fail(f"is {show(value)}; it must be a section of fields")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in value:
        if key not in fields:
            place.at(key).fail(f"is not a field of the recipe; {_suggest(place, str(key), list(fields))}")
    built = {
        key: check_value(hints(cls)[key], item, fields[key].metadata, place.at(key)) for key, item in value.items()
    }
    made = cls(**built)
    for name, field in fields.items():
        sibling, values = field.metadata.get("needed_for", ("", ()))
        if sibling and getattr(made, sibling) in values and getattr(made, name) is None:
            place.at(name).fail(f"is missing; {place.at(sibling).path}: {getattr(made, sibling)} needs it")
    return made


def check_value(kind: Any, value: Any, limits: Mapping[str, Any], place: Place) -> Any:
    """Check one value against an annotation and its limits; return it in its final type."""
    if kind is Any:
        return value
    if get_origin(kind) in (Union, types.UnionType):
        inner = [item for item in get_args(kind) if item is not type(None)]
        return None if value is None else check_value(inner[0], value, limits, place)
    if isinstance(value, str) and value == limits.get("word"):
        return value
    checker = _check_section if dataclasses.is_dataclass(kind) else CHECKERS[get_origin(kind) or kind]
    return checker(kind, value, limits, place)


def _check_bool(kind: Any, value: Any, limits: Mapping[str, Any], place: Place) -> bool:
    if not isinstance(value, bool):
        place.fail(f"is {show(value)}; it must be true or false")
    return value


def _check_int(kind: Any, value: Any, limits: Mapping[str, Any], place: Place) -> int:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())  # quniform samples 8.0
    if isinstance(value, bool) or not whole:
        place.fail(f"is {show(value)}; it must be a whole number{_range(limits, ', ')}{_or_word(limits, ', or ')}")
    _check_bounds(value, limits, place)
    return int(value)


def _or_word(limits: Mapping[str, Any], before: str, mark: str = "") -> str:
    return f"{before}{mark}{limits['word']}{mark}" if "word" in limits else ""


def _check_float(kind: Any, value: Any, limits: Mapping[str, Any], place: Place) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        place.fail(f"is {show(value)}; it must be a number{_range(limits, ', ')}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        place.fail(f"is {show(value)}; it must be a finite number{_range(limits, ', ')}")
    _check_bounds(number, limits, place)
    return number


def _check_str(kind: Any, value: Any, limits: Mapping[str, Any], place: Place) -> str:
    if not isinstance(value, str):
        place.fail(f"is {show(value)}; it must be text")
    choices = limits.get("choices")
    if choices and value not in choices and not (limits.get("reference") and REFERENCE.fullmatch(value)):
        other = ", or module:function" if limits.get("reference") else ""
        near = difflib.get_close_matches(value, choices, 1, 0.6)
        hint = f"; did you mean {near[0]}?" if near else ""
        place.fail(f"is {value!r}; it must be one of {', '.join(choices)}{other}{hint}")
    return value


def _check_tuple(kind: Any, value: Any, limits: Mapping[str, Any], place: Place) -> tuple:
    if not isinstance(value, (list, tuple)):
        place.fail(f"is {show(value)}; it must be a list")
    item_kind = get_args(kind)[0]
    return tuple(check_value(item_kind, item, limits, place.at(index)) for index, item in enumerate(value))


def _check_dict(kind: Any, value: Any, limits: Mapping[str, Any], place: Place) -> dict:
    if not isinstance(value, Mapping):
        place.fail(f"is {show(value)}; it must be a section of names and values")
    for key in value:
        if not isinstance(key, str):
            place.fail(f"has the key {show(key)}; its keys must be text")
    item_kind = get_args(kind)[1]
    return {key: check_value(item_kind, item, limits, place.at(key)) for key, item in value.items()}


CHECKERS: dict[Any, Callable[[Any, Any, Mapping[str, Any], Place], Any]] = {
    bool: _check_bool,
    int: _check_int,
    float: _check_float,
    str: _check_str,
    tuple: _check_tuple,
    dict: _check_dict,
}


def _check_bounds(value: float, limits: Mapping[str, Any], place: Place) -> None:
    low, above, high, below = (limits.get(name) for name in _BOUNDS)
    inside = (low is None or value >= low) and (above is None or value > above)
    inside = inside and (high is None or value <= high) and (below is None or value < below)
    if not inside:
        place.fail(f"is {show(value)}; it must be {_range(limits)}")


def _range(limits: Mapping[str, Any], before: str = "") -> str:
    low, above, high, below = (limits.get(name) for name in _BOUNDS)
    lowest, highest = (low if above is None else above), (high if below is None else below)
    if lowest is None and highest is None:
        return ""
    if highest is None:
        return f"{before}{'at least' if above is None else 'above'} {lowest}"
    if lowest is None:
        return f"{before}{'at most' if below is None else 'below'} {highest}"
    return f"{before}in {'[' if above is None else '('}{lowest}, {highest}{']' if below is None else ')'}"


def show(value: Any) -> str:
    """Write a value as its author wrote it, short, on one line."""
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    kinds: dict[type, str] = {str: "text", list: "a list", tuple: "a list", dict: "a section"}
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    kind = kinds.get(type(value))
    return f"{text} ({kind})" if kind else text


def plain(value: Any) -> Any:
    """Turn a section back into what YAML and JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def reference(cls: type) -> str:
    """Write a section's fields as a Markdown table: name, what may be written, default, meaning."""
    lines = ["| field | value | default | meaning |", "|---|---|---|---|"]
    for path, kind, field in field_paths(cls):
        default = field.default if field.default is not dataclasses.MISSING else {}
        written = (
            {True: "true", False: "false", None: "null"}.get(default)
            if isinstance(default, (bool, type(None)))
            else None
        )
        text = written or str(plain(default))
        lines.append(f"| `{path}` | {_kind(kind, field.metadata)} | `{text}` | {field.metadata['doc']} |")
    return "\n".join(lines) + "\n"


KINDS: dict[Any, str] = {bool: "true or false", int: "whole number", float: "number", str: "text", Any: "anything"}


def _kind(kind: Any, limits: Mapping[str, Any]) -> str:
    if get_origin(kind) in (Union, types.UnionType):
        inner = next(item for item in get_args(kind) if item is not type(None))
        return f"{_kind(inner, limits)}, or null"
    if get_origin(kind) is tuple:
        return f"list: {_kind(get_args(kind)[0], limits)}"
    if get_origin(kind) is dict:
        return f"names and values: {_kind(get_args(kind)[1], limits)}"
    if limits.get("choices"):
        other = ", `module:function`" if limits.get("reference") else ""
        return ", ".join(f"`{choice}`" for choice in limits["choices"]) + other
    return KINDS[kind] + _range(limits, " ") + _or_word(limits, ", or ", "`")
