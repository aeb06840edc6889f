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
from nni_plugins.channels.latency.clock import Clock, Variant, cache_bytes
from nni_plugins.channels.latency.curves import Axis, Curve, axis, curve, points
from nni_plugins.channels.latency.operators import TimedOperator, key_of, operands
from nni_plugins.channels.latency.sizes import CONSTANT

#: Called with ``(done, total, name)``.
Progress = Callable[[int, int, str], Any]

_OPERATOR_S = 0.4
_FULL_S = 0.1
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
        What one takes within the model's run, while operators are timed.
    alone_ms
        What one takes alone; None where it cannot be called so.
    curve
        How that depends on sizes; None where it does not, or where that is not known.
    """

    operator: TimedOperator
    rows: tuple[int, ...]
    axes: tuple[Axis, ...]
    key: str
    count: int = 0
    within_ms: float = 0.0
    alone_ms: float | None = None
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

    def layout(self) -> tuple[int, ...]:
        """Return which dimensions shrink together: what decides, with the key, how the entry shrinks."""
        return tuple(
            self.rows.index(row) if row in self.rows else CONSTANT for rows in self.operator.rows for row in rows
        )

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


@dataclass
class Timer:
    """Times the entries of one model, unless the cache knows them.

    Attributes
    ----------
    clock, cache
        What takes times, and what keeps them.
    held
        Bytes of the model's parameters and buffers.
    """

    clock: Clock
    cache: Cache
    held: int

    def __post_init__(self) -> None:
        self.room = cache_bytes(self.clock.device) / 2  # for weights: activations go through the cache, too
        if "call" not in self.cache:
            self.cache.put("call", self.clock.time_call())
        self.clock.call_ms = self.cache.get("call") or 0.0

    def run(
        self,
        model: nn.Module,
        dummy_input: Any,
        entries: Sequence[Entry],
        calls: Sequence[CallOf],
        again: bool = False,
    ) -> float:
        """Set what each entry takes within the model's run, and return the milliseconds of the whole run.

        With ``again``, the run is timed even where it is known, and the quicker of the two counts: the machine may have
        been busy with something else.
        """
        steps = "\n".join(f"{module} {entries[index].key}" for module, index, _ in calls)
        key = f"run {hashlib.sha256(steps.encode()).hexdigest()[:32]}"
        found = self.cache.get_list(key, 1 + len(calls))
        if found is None or again:
            with self.clock.ready():
                whole, parts = self.clock.time_model(model, dummy_input, _MODEL_S)
            if found is None or whole < found[0]:
                found = [whole, *parts]
                self.cache.put(key, found)
        for entry in entries:
            entry.within_ms = 0.0
        for (_, index, _), part in zip(calls, found[1:], strict=True):
            entries[index].within_ms += part / entries[index].count
        return found[0]

    def alone(self, entries: Sequence[Entry], curves: bool, end: float, progress: Progress | None = None) -> None:
        """Time every entry alone, at its full size, and with ``curves`` also at smaller ones.

        The longest come first; after ``end`` the rest is taken to shrink in proportion to its sizes.
        """
        order = sorted(entries, key=lambda entry: -entry.within_ms * entry.count)
        known: dict[tuple, Curve] = {}
        for done, entry in enumerate(order):
            if progress is not None:
                progress(done, len(order), entry.operator.name)
            hurry = time.perf_counter() > end
            if curves and entry.axes:
                layout = entry.layout()
                if (entry.key, layout) not in known:
                    known[entry.key, layout] = _curve_of(entry, self, hurry)
                entry.curve = known[entry.key, layout]
            full = self.variant(entry, {}).key
            entry.alone_ms = self.times(entry, [{}])[0] if not hurry or full in self.cache else None

    def times(
        self, entry: Entry, fractions: Sequence[Mapping[int, float]], left: float | None = None
    ) -> list[float | None]:
        """Return the milliseconds of an entry, alone, where its rows keep ``fractions``; None where it cannot be.

        ``left`` is the share of all parameters that is left; by default the model is taken to shrink as the entry does.
        """
        variants = [self.variant(entry, wanted, left) for wanted in fractions]
        missing = {variant.key: variant for variant in variants if variant.key not in self.cache}
        if missing:
            full = self.variant(entry, {})
            taken = {full.key: full, **missing}  # the full one again, to compare with in the machine's state right now
            with self.clock.ready():
                times = dict(
                    zip(
                        taken,
                        self.clock.time(list(taken.values()), _FULL_S if len(taken) == 1 else _OPERATOR_S),
                        strict=True,
                    )
                )
            before, now = self.cache.get(full.key), times[full.key]
            drift = before / now if before and now else 1.0
            for key in missing:
                value = times[key]
                self.cache.put(key, None if value is None else value * drift)
        return [self.cache.get(variant.key) for variant in variants]

    def variant(self, entry: Entry, fractions: Mapping[int, float], left: float | None = None) -> Variant:
        """Return the call of an entry at other sizes, and whether its weights would come from memory."""
        operator = entry.operator
        args, kwargs = operator.at(fractions)
        whole, own = (
            sum(math.prod(one.shape) for one in operands(found) if one.held)
            for found in ((operator.args, operator.kwargs), (args, kwargs))
        )
        share = left if left is not None else own / whole if whole else 0.0
        return Variant(operator.func, args, kwargs, bool(own) and share * self.held > self.room)


def _curve_of(entry: Entry, timer: Timer, hurry: bool) -> Curve:
    places = points(entry.axes)
    wanted = [entry.at(at) for at in places]
    known = all(timer.variant(entry, fractions).key in timer.cache for fractions in wanted)
    found = timer.times(entry, wanted) if known or not hurry else []
    return curve(entry.axes, {at: value for at, value in zip(places, found, strict=False) if value is not None})
