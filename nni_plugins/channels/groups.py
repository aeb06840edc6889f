"""From classes of labels to channel groups: units that live in the same dimensions of the same parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd, lcm

import numpy as np

from nni_plugins.channels.call import Info
from nni_plugins.channels.labels import Array, Cause, Solution
from nni_plugins.channels.trace import Trace


@dataclass(frozen=True)
class Member:
    """One dimension of one parameter (or buffer) that a group reaches.

    Attributes
    ----------
    module
        The name of the module that owns it, as in ``named_modules()`` ('' is the model itself).
    parameter
        The parameter's name in that module, such as ``'weight'``.
    dim
        The dimension.
    indices
        int64, shape ``[group.size, repeat]``: row ``u`` holds the indices along ``dim`` that unit ``u`` owns.
    role
        'out' (rows of a convolution or linear layer, and their bias), 'scale' (elementwise: norm weight and bias,
        PReLU, LayerScale), 'in' (the contracted dimension of a consumer), or 'statistic' (buffers).
    """

    module: str
    parameter: str
    dim: int
    indices: Array
    role: str

    @property
    def name(self) -> str:
        """The parameter's full name, as in ``named_parameters()``."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter

    def __repr__(self) -> str:
        return f"Member({self.name!r}, dim={self.dim}, role={self.role!r}, repeat={self.indices.shape[1]})"


@dataclass
class ChannelGroup:
    """Units that must be removed at once, all in the same dimensions of the same parameters.

    Attributes
    ----------
    name
        The module of the first producer, numbered where it has several groups ('conv1', 'fc1:1'). Stable for a model.
    size
        The number of units.
    members
        Where the units live.
    exact
        Whether removing a unit equals masking it.
    prunable
        Whether units can be removed at all. A group that is prunable but not exact is left out unless asked for.
    reason
        Why it is not prunable, or not exact; '' where it is both.
    kind
        What a unit is: 'heads' or 'head_dim' of attention, 'channels' of convolutions, 'hidden' units between linear
        layers, 'embedding' where a norm runs across the units (the width of a transformer).
    multiple
        How many units stay must be a multiple of this: a kernel takes no other numbers.
    """

    name: str
    size: int
    members: list[Member]
    exact: bool
    prunable: bool
    reason: str
    classes: Array
    cause: Cause | None = None
    kind: str = "channels"
    multiple: int = 1

    @property
    def producers(self) -> list[Member]:
        """The members whose rows make the units."""
        return [member for member in self.members if member.role == "out"]

    @property
    def consumers(self) -> list[Member]:
        """The members that contract the units away."""
        return [member for member in self.members if member.role == "in"]

    def __repr__(self) -> str:
        state = "" if self.prunable and self.exact else f", {'inexact' if self.prunable else 'frozen'}: {self.reason}"
        return f"ChannelGroup({self.name!r}, size={self.size}, members={len(self.members)}{state})"


def collect_groups(trace: Trace, solution: Solution, is_buffer: dict[str, bool]) -> list[ChannelGroup]:
    """Return the channel groups of a solved trace, in the order in which the run first used their parameters."""
    dims = [
        (name, dim, a) for name, labels in trace.parameters.items() for dim, a in enumerate(labels) if a is not None
    ]
    if not dims:
        return []
    klass = np.concatenate([solution.classes[array] for _, _, array in dims])
    place = np.repeat(np.arange(len(dims)), [len(array) for _, _, array in dims])
    index = np.concatenate([np.arange(len(array)) for _, _, array in dims])
    order = np.argsort(klass, kind="stable")  # within a class by place and index, as they are
    klass, place, index = klass[order], place[order], index[order]

    units = _units_by_signature(klass, place)
    roles = _Roles(trace, is_buffer)
    groups: list[ChannelGroup] = []
    for starts, length in units:
        rows = starts[:, None] + np.arange(length)[None, :]
        places = place[rows[0]]
        if all(roles.ignored(dims[p][0], dims[p][1]) for p in set(places.tolist())):
            continue
        group = _make_group(dims, klass[starts], places, index[rows], solution, roles)
        if group is not None:
            groups.append(group)
    _count_in_multiples(groups, trace, solution)
    _name(groups, trace)
    return groups


def _units_by_signature(klass: Array, place: Array) -> list[tuple[Array, int]]:
    """Group the runs of equal ``klass`` by the sequence of their places; return each group's starts and length."""
    bounds = np.flatnonzero(np.r_[True, klass[1:] != klass[:-1]])
    lengths = np.diff(np.r_[bounds, len(klass)])
    found: list[tuple[Array, int]] = []
    for length in np.unique(lengths):
        starts = bounds[lengths == length]
        table = place[starts[:, None] + np.arange(length)[None, :]]
        found += [(starts[rows], int(length)) for rows in _equal_rows(table)]
    return sorted(found, key=lambda item: (int(place[item[0][0]]), int(item[0][0])))


def _equal_rows(table: Array) -> Iterator[Array]:
    """Yield the numbers of the rows that are equal to each other, ascending."""
    weights = np.random.default_rng(0).integers(1, 2**63, table.shape[1], dtype=np.uint64)
    hashes = (table.astype(np.uint64) * weights).sum(axis=1, dtype=np.uint64)  # it may overflow: it wraps around
    order = np.argsort(hashes, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(hashes[order])) + 1):
        if (table[rows] == table[rows[0]]).all():
            yield rows
            continue
        by_key: dict[bytes, list[int]] = {}  # two kinds of rows that have one hash
        for row in rows.tolist():
            by_key.setdefault(table[row].tobytes(), []).append(row)
        yield from map(np.array, by_key.values())


def _names(info: Info, sources: dict[int, set[str]]) -> set[str]:
    return {info.parameter} if info.parameter else sources.get(id(info), set())


class _Roles:
    """What each dimension of each parameter does."""

    def __init__(self, trace: Trace, is_buffer: dict[str, bool]) -> None:
        self._is_buffer = is_buffer
        self._consumed = np.zeros(trace.labels.count, dtype=bool)
        for labels in trace.consumed:
            if labels is not None:
                self._consumed[labels] = True
        self._contracting: set[str] = set()
        sources: dict[int, set[str]] = {}  # what a weight was made from (weight norm, a transposed or packed weight)
        for op in trace.operators:
            made_of = set().union(*(_names(info, sources) for info in op.inputs if not info.dynamic))
            for contraction in op.contractions:
                for info in (contraction.right, contraction.bias):
                    if info is not None and not info.dynamic:
                        self._contracting |= _names(info, sources)
            for info in op.outputs:
                if not info.dynamic:
                    sources[id(info)] = made_of
        self._labels = trace.parameters

    def of(self, name: str, dim: int) -> str:
        if self._is_buffer.get(name, False):
            return "statistic"
        labels = self._labels[name][dim]
        if labels is not None and self._consumed[labels].any():
            return "in"
        return "out" if name in self._contracting else "scale"

    def rank(self, name: str) -> int:
        return len(self._labels[name])

    def ignored(self, name: str, dim: int) -> bool:
        return self._is_buffer.get(name, False)


def _make_group(
    dims: list[tuple[str, int, Array]],
    classes: Array,
    places: Array,
    indices: Array,
    solution: Solution,
    roles: _Roles,
) -> ChannelGroup | None:
    frozen = solution.frozen[classes]
    cause = None
    if frozen.any():
        causes = [solution.why_frozen(int(c)) for c in np.unique(classes[frozen])]
        named = [c for c in causes if c is not None]
        if not named and frozen.all():
            return None  # kernel positions and the like: nobody asks for them
        cause = named[0] if named else None
    order = np.argsort(indices[:, 0], kind="stable")
    members = []
    for p in dict.fromkeys(places.tolist()):
        name, dim, _ = dims[p]
        module, _, parameter = name.rpartition(".")
        table = np.ascontiguousarray(indices[:, places == p][order])
        members.append(Member(module, parameter, dim, table, roles.of(name, dim)))
    if all(member.role == "statistic" for member in members):
        return None
    inexact = solution.inexact[classes].any()
    prunable = not frozen.any() and len(classes) > 1
    reason = str(cause) if cause is not None else ("" if prunable else "a single unit cannot go")
    if prunable and inexact:
        first = int(classes[np.flatnonzero(solution.inexact[classes])[0]])
        reason = str(solution.why_inexact(first))
    kind = _kind(members, classes, solution, roles)
    return ChannelGroup("", len(classes), members, not inexact, prunable, reason, classes[order], cause, kind)


def _kind(members: list[Member], classes: Array, solution: Solution, roles: _Roles) -> str:
    if solution.heads[classes].any():
        return "heads"
    if solution.head_dims[classes].any():
        return "head_dim"
    if any(roles.rank(member.name) > 2 for member in members if member.role in ("out", "in")):
        return "channels"
    return "embedding" if any(member.role == "scale" for member in members) else "hidden"


def _count_in_multiples(groups: list[ChannelGroup], trace: Trace, solution: Solution) -> None:
    """Say of what number the units that stay must be a multiple; where they all are that, none can go."""
    for labels, number, cause in trace.multiples:
        count = np.bincount(solution.classes[labels], minlength=len(solution))
        for group in groups:
            each = int(count[group.classes].max())
            if each:
                group.multiple = lcm(group.multiple, number // gcd(number, each))
            if each and group.prunable and group.size <= group.multiple:
                group.prunable, group.cause, group.reason = False, cause, str(cause)


def _name(groups: list[ChannelGroup], trace: Trace) -> None:
    used: dict[str, int] = {}
    for group in groups:
        first = next((m for m in group.members if m.role == "out"), group.members[0])
        base = first.module or first.parameter
        count = used.get(base, 0)
        used[base] = count + 1
        group.name = f"{base}:{count}" if count else base
