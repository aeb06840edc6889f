"""How an operator's time depends on one or two sizes: measured at some, interpolated between them.

Times are not smooth in a size: kernels work on blocks of channels, so they rise by steps, and sizes that are no
multiple of eight may take another kernel. Along each size there are therefore two curves, of multiples of eight (even)
and of others (odd). Where two sizes change at once, their shares are multiplied, and corrected by what a coarse grid
measured, one where both are even and one where both are odd.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from nni_plugins.channels.labels import Array

MULTIPLE = 8
_STEPS = 8
_OFF = 3  # sizes that are no multiples lie so far below one
_COARSE = 3  # knots along each size of the grid


class Axis(NamedTuple):
    """The sizes, ascending, at which one dimension of an operator is timed."""

    full: int
    even: tuple[int, ...]
    odd: tuple[int, ...]
    coarse_even: tuple[int, ...]
    coarse_odd: tuple[int, ...]

    @property
    def coarse(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Knots along this size of the grids: the even one and the odd one."""
        return self.coarse_even, self.coarse_odd


def axis(full: int) -> Axis:
    """Choose sizes for a dimension: eighths of it, as multiples of eight where it is large enough, and some others."""
    unit = MULTIPLE if full >= 2 * MULTIPLE else 1
    rounded = {max(unit, round(full * step / _STEPS / unit) * unit) for step in range(1, _STEPS)}
    even = sorted({size for size in rounded if size < full} | {unit, full})
    odd: set[int] = set()
    if unit > 1:
        odd = {size - _OFF for size in (even[1::2] if len(even) > 4 else even[1:])} | {MULTIPLE - _OFF}
    off = sorted(odd)
    coarse_even = {even[round((len(even) - 1) * part)] for part in (0.25, 0.5)} | {full}
    coarse_odd = {off[round((len(off) - 1) * part)] for part in (0.25, 0.5, 1.0)} if off else set()
    return Axis(full, tuple(even), tuple(off), tuple(sorted(coarse_even)), tuple(sorted(coarse_odd)))


def points(axes: Sequence[Axis]) -> list[tuple[int, ...]]:
    """Return the sizes at which an operator is timed, the full one first."""
    full = tuple(one.full for one in axes)
    found: dict[tuple[int, ...], None] = {full: None}
    for place, one in enumerate(axes):
        for size in (*one.even, *one.odd):
            found[_with(full, place, size)] = None
    if len(axes) == 2:
        for first, second in zip(axes[0].coarse, axes[1].coarse, strict=True):
            found.update(dict.fromkeys((a, b) for a in first for b in second))
    return list(found)


def _with(sizes: tuple[int, ...], place: int, size: int) -> tuple[int, ...]:
    return (*sizes[:place], size, *sizes[place + 1 :])


@dataclass
class Curve:
    """Shares of an operator's full time: along each axis at its even and its odd sizes, and corrections on grids."""

    axes: list[tuple[Axis, Array, Array]]
    grids: list[Array | None] = field(default_factory=lambda: [None, None])


def curve(axes: Sequence[Axis], times: Mapping[tuple[int, ...], float]) -> Curve:
    """Make a curve of times at :func:`points`; where sizes along an axis are missing, it is taken as proportional."""
    full = tuple(one.full for one in axes)
    share = {at: value / times[full] for at, value in times.items()} if full in times else {}
    made = []
    for place, one in enumerate(axes):
        even, odd = ([size for size in part if _with(full, place, size) in share] for part in (one.even, one.odd))
        if len(even) < min(2, len(one.even)):
            made.append((one._replace(odd=()), np.array(one.even) / one.full, np.zeros(0)))
            continue
        on_even, on_odd = (np.array([share[_with(full, place, size)] for size in part]) for part in (even, odd))
        made.append((one._replace(even=tuple(even), odd=tuple(odd)), on_even, on_odd))
    found = Curve(made)
    if len(axes) == 2:
        found.grids = [_grid(made, odd, share) for odd in (0, 1)]
    return found


def _grid(along: list[tuple[Axis, Array, Array]], odd: int, share: Mapping[tuple[int, ...], float]) -> Array | None:
    """Return by what the product of the shares along two axes is off, at the knots of the even or of the odd grid."""
    knots = [one[0].coarse[odd] for one in along]
    corners = [[(x, y) for y in knots[1]] for x in knots[0]]
    if not all(knots) or not all(at in share for row in corners for at in row):
        return None
    first, second = (
        np.interp(wanted, one[0].odd if odd else one[0].even, one[2] if odd else one[1])
        for one, wanted in zip(along, knots, strict=True)
    )
    return np.array([[share[at] for at in row] for row in corners]) / np.outer(first, second)


class Curves:
    """Many curves, asked at once."""

    def __init__(self, found: Sequence[Curve]) -> None:
        self._full = np.ones((2, len(found)))
        for index, one in enumerate(found):
            for place, (along, _, _) in enumerate(one.axes):
                self._full[place, index] = along.full
        self._tables = [[_Lines([_knots(c, place, odd) for c in found]) for odd in (False, True)] for place in (0, 1)]
        self._grids = []
        for odd in (0, 1):
            places = np.array([i for i, c in enumerate(found) if c.grids[odd] is not None], dtype=np.int64)
            self._grids.append((places, _Grids([found[i] for i in places], odd)))

    def shares(self, fractions: Array) -> Array:
        """Return the share of its full time that each operator takes where its sizes keep ``fractions``.

        Parameters
        ----------
        fractions
            Shape ``[2, operators]``; the second is 1 where there is but one size.
        """
        sizes = np.maximum(np.rint(self._full * fractions), 1.0)
        odd = (sizes % MULTIPLE != 0) & (sizes != self._full)
        value = np.ones(sizes.shape[1])
        for place, (even_lines, odd_lines) in enumerate(self._tables):
            value *= np.where(odd[place], odd_lines.at(sizes[place]), even_lines.at(sizes[place]))
        for (places, grids), fits in zip(self._grids, (~odd.any(axis=0), odd.all(axis=0)), strict=True):
            if len(places):
                value[places] *= np.where(fits[places], grids.at(sizes[:, places]), 1.0)
        return value


def _knots(found: Curve, place: int, odd: bool) -> tuple[Sequence[int], Array]:
    if place >= len(found.axes):
        return (1,), np.ones(1)
    one, even_shares, odd_shares = found.axes[place]
    return (one.odd, odd_shares) if odd and one.odd else (one.even, even_shares)


class _Lines:
    """Piecewise linear functions, one a row: before the first knot at least in proportion, flat after the last."""

    def __init__(self, rows: Sequence[tuple[Sequence[int], Array]]) -> None:
        width = max([2, *(len(x) for x, _ in rows)])
        self._x, self._y = np.empty((2, len(rows), width))
        for index, (x, y) in enumerate(rows):
            self._x[index, : len(x)], self._y[index, : len(x)] = x, y
            self._x[index, len(x) :] = x[-1] + np.arange(1, width - len(x) + 1)
            self._y[index, len(x) :] = y[-1]
        self._rows = np.arange(len(rows))

    def at(self, size: Array) -> Array:
        right = np.clip((self._x < size[:, None]).sum(axis=1), 1, self._x.shape[1] - 1)
        x0, x1 = self._x[self._rows, right - 1], self._x[self._rows, right]
        y0, y1 = self._y[self._rows, right - 1], self._y[self._rows, right]
        value = y0 + np.minimum((size - x0) / (x1 - x0), 1.0) * (y1 - y0)
        first, begin = self._y[:, 0], self._x[:, 0]
        return np.where(size < begin, np.clip(value, first * size / begin, first), value)


class _Grids:
    """Bilinear functions on coarse grids, one a curve; constant outside."""

    def __init__(self, found: Sequence[Curve], odd: int) -> None:
        self._x = np.empty((2, len(found), _COARSE))
        self._y = np.ones((len(found), _COARSE, _COARSE))
        for index, one in enumerate(found):
            grid = one.grids[odd]
            assert grid is not None
            for place, (along, _, _) in enumerate(one.axes):
                knots = along.coarse[odd]
                pad = _COARSE - len(knots)
                self._x[place, index] = [*(knots[0] - k for k in range(pad, 0, -1)), *knots]
            self._y[index] = np.pad(grid, [(_COARSE - length, 0) for length in grid.shape], mode="edge")
        self._rows = np.arange(len(found))

    def at(self, sizes: Array) -> Array:
        (i, u), (j, v) = (self._place(x, size) for x, size in zip(self._x, sizes, strict=True))
        rows, y = self._rows, self._y
        low = y[rows, i - 1, j - 1] * (1 - v) + y[rows, i - 1, j] * v
        high = y[rows, i, j - 1] * (1 - v) + y[rows, i, j] * v
        return low * (1 - u) + high * u

    def _place(self, x: Array, size: Array) -> tuple[Array, Array]:
        size = np.clip(size, x[:, 0], x[:, -1])
        right = np.clip((x < size[:, None]).sum(axis=1), 1, _COARSE - 1)
        x0, x1 = x[self._rows, right - 1], x[self._rows, right]
        return right, (size - x0) / (x1 - x0)
