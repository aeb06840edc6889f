"""The distinct operators of a run, and their times: taken once, then known from the cache."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from nni_plugins.channels.latency.cache import Cache
from nni_plugins.channels.latency.clock import Clock, Variant
from nni_plugins.channels.latency.curves import Axis, Curve, axis, curve, points
from nni_plugins.channels.latency.operators import TimedOperator, key_of, operands
from nni_plugins.channels.latency.sizes import CONSTANT

#: Called with ``(done, total, name)``.
Progress = Callable[[int, int, str], Any]

_OPERATOR_S = 0.4
_MODEL_S = 2.0


class CallOf(NamedTuple):
    """One operator of the run: the module whose forward called it, its entry, and the groups that go through it."""

    module: str
    entry: int
    groups: frozenset[int]


@dataclass
class Entry:
    """Operators of a run that are called alike and shrink alike.

    Attributes
    ----------
    operator
        One of them.
    rows
        The rows of :class:`Sizes` by which it shrinks.
    axes
        The sizes at which it is timed: one an independent row. An operator with more than two (a concatenation) has one
        axis, along which all shrink alike.
    count
        How many there are.
    within_ms
        What one takes within the model's run.
    curve
        How that depends on sizes; None where it does not, or where that is not known.
    """

    operator: TimedOperator
    rows: tuple[int, ...]
    axes: tuple[Axis, ...]
    key: str
    count: int = 0
    within_ms: float = 0.0
    curve: Curve | None = None

    def weights(self, place: int) -> dict[int, float]:
        """Return the rows, and their weights, that make the fraction along one axis."""
        if len(self.rows) == len(self.axes):
            return {self.rows[place]: 1.0}
        found: dict[int, float] = {}
        total = 0.0
        for operand, rows in zip(operands((self.operator.args, self.operator.kwargs)), self.operator.rows, strict=True):
            varying = [row for row in rows if row != CONSTANT]
            size = math.prod(operand.shape)
            total += size
            for row in varying:
                found[row] = found.get(row, 0.0) + size / len(varying)
        return {row: weight / total for row, weight in found.items()}

    def at(self, sizes: Sequence[int]) -> dict[int, float]:
        """Return the fraction of each row where the axes have ``sizes``."""
        shares = [size / one.full for size, one in zip(sizes, self.axes, strict=True)]
        return dict(zip(self.rows, shares * (len(self.rows) if len(self.rows) > len(self.axes) else 1), strict=True))


def entries_of(recorded: Sequence[TimedOperator]) -> tuple[list[Entry], list[CallOf]]:
    """Return the distinct operators of a run, and its operators in order."""
    found: dict[tuple, int] = {}
    entries: list[Entry] = []
    calls: list[CallOf] = []
    for operator in recorded:
        key = key_of(operator.func, operator.args, operator.kwargs)
        index = found.setdefault((key, tuple(operator.rows)), len(entries))
        if index == len(entries):
            rows = operator.variables
            bases = [operator.base(row) for row in rows]
            axes = tuple(map(axis, bases if len(bases) <= 2 else [max(bases)]))
            entries.append(Entry(operator, rows, axes, key))
        entries[index].count += 1
        calls.append(CallOf(operator.module, index, operator.groups))
    return entries, calls


def time_run(
    model: nn.Module,
    dummy_input: Any,
    entries: Sequence[Entry],
    calls: Sequence[CallOf],
    clock: Clock,
    cache: Cache,
    again: bool = False,
) -> float:
    """Set what each entry takes within the model's run, and return the milliseconds of the whole run.

    With ``again``, the run is timed even where it is known, and the quicker of the two counts: the machine may have
    been busy with something else.
    """
    steps = "\n".join(f"{module} {entries[index].key}" for module, index, _ in calls)
    key = f"run {hashlib.sha256(steps.encode()).hexdigest()[:32]}"
    found = cache.get_list(key, 1 + len(calls))
    if found is None or again:
        with clock.ready():
            whole, parts = clock.time_model(model, dummy_input, _MODEL_S)
        if found is None or whole < found[0]:
            found = [whole, *parts]
            cache.put(key, found)
    for entry in entries:
        entry.within_ms = 0.0
    for (_, index, _), part in zip(calls, found[1:], strict=True):
        entries[index].within_ms += part / entries[index].count
    return found[0]


def time_curves(
    entries: Sequence[Entry], clock: Clock, cache: Cache, end: float, progress: Progress | None = None
) -> None:
    """Time every entry that shrinks at several sizes; after ``end`` the rest, the quickest, count as proportional."""
    order = sorted((entry for entry in entries if entry.axes), key=lambda entry: -entry.within_ms)
    known: dict[tuple, Curve | None] = {}
    for done, entry in enumerate(order):
        if progress is not None:
            progress(done, len(order), entry.operator.name)
        layout = tuple(
            entry.rows.index(row) if row in entry.rows else CONSTANT for rows in entry.operator.rows for row in rows
        )
        if (entry.key, layout) not in known:
            hurry = time.perf_counter() > end
            known[entry.key, layout] = _curve_of(entry, clock, cache, hurry)
        entry.curve = known[entry.key, layout]


def _curve_of(entry: Entry, clock: Clock, cache: Cache, hurry: bool) -> Curve:
    places = points(entry.axes)
    known = all(_key(entry, _variant(entry, entry.at(at)), clock) in cache for at in places)
    found = times_at(entry, [entry.at(at) for at in places], clock, cache) if known or not hurry else []
    return curve(entry.axes, {at: value for at, value in zip(places, found, strict=False) if value is not None})


def times_at(entry: Entry, fractions: Sequence[Mapping[int, float]], clock: Clock, cache: Cache) -> list[float | None]:
    """Return the milliseconds of an entry, alone, where its rows keep ``fractions``; None where it cannot be called."""
    variants = [_variant(entry, wanted) for wanted in fractions]
    keys = [_key(entry, variant, clock) for variant in variants]
    missing = {key: variant for key, variant in zip(keys, variants, strict=True) if key not in cache}
    if missing:
        full = _variant(entry, {})
        whole = _key(entry, full, clock)
        taken = {whole: full, **missing}  # the full one again, to compare with in the machine's state of this moment
        with clock.ready():
            times = dict(zip(taken, clock.time(list(taken.values()), _OPERATOR_S), strict=True))
        before, now = cache.get(whole), times[whole]
        drift = before / now if before and now else 1.0
        for key in missing:
            value = times[key]
            cache.put(key, None if value is None else value * drift)
    return [cache.get(key) for key in keys]


def _variant(entry: Entry, fractions: Mapping[int, float]) -> Variant:
    return (entry.operator.func, *entry.operator.at(fractions))


def _key(entry: Entry, variant: Variant, clock: Clock) -> str:
    operator = entry.operator
    cold = clock.cold and any(one.held for one in operands((operator.args, operator.kwargs)))
    return ("cold " if cold else "") + key_of(*variant)
