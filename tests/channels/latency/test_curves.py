"""Interpolation: exact at the sizes that were measured, near between them, sound outside."""

from __future__ import annotations

import numpy as np
import pytest

from nni_plugins.channels.latency.curves import Curve, Curves, axis, curve, points


@pytest.mark.parametrize("full", [1, 2, 3, 7, 8, 12, 15, 16, 17, 20, 64, 100, 512, 3072])
def test_sizes_are_in_range_and_ascending(full: int) -> None:
    one = axis(full)
    for sizes in (one.even, one.odd, *one.coarse):
        assert list(sizes) == sorted(set(sizes))
        assert all(1 <= size <= full for size in sizes)
    assert one.even[-1] == one.coarse_even[-1] == full
    assert set(one.coarse_even) <= set(one.even)
    assert set(one.coarse_odd) <= set(one.odd)
    assert all(size % 8 for size in one.odd)
    if full >= 16:
        assert all(size % 8 == 0 for size in one.even[:-1])
        assert one.odd
    assert len(one.even) <= 9
    assert len(one.coarse_even) <= 3 >= len(one.coarse_odd)


def made(function, *full: int) -> Curves:
    axes = [axis(size) for size in full]
    return Curves([curve(axes, {at: function(*at) for at in points(axes)})])


def asked(curves: Curves, full: tuple[int, ...], *sizes: int) -> float:
    fractions = np.ones((2, 1))
    for place, (size, whole) in enumerate(zip(sizes, full, strict=True)):
        fractions[place] = size / whole
    return float(curves.shares(fractions)[0])


def test_what_was_measured_is_what_is_answered() -> None:
    rng = np.random.default_rng(0)
    full = (64, 48)
    axes = [axis(size) for size in full]
    times = {at: rng.uniform(1, 2) * at[0] * at[1] for at in points(axes)}
    curves = Curves([curve(axes, times)])
    for (a, b), value in times.items():
        if (a % 8 == 0) == (b % 8 == 0) or full[0] == a or full[1] == b:
            assert asked(curves, full, a, b) == pytest.approx(value / times[full], rel=1e-9), (a, b)


def test_a_product_and_a_call_are_found_between_the_knots() -> None:
    def work(a: int, b: int) -> float:
        return 5.0 + 0.01 * a * b + 0.02 * a

    curves, full = made(work, 512, 256), (512, 256)
    for a, b in np.random.default_rng(1).integers(32, 256, (200, 2)):
        expected = work(int(a), int(b)) / work(*full)
        assert asked(curves, full, int(a), int(b)) == pytest.approx(expected, rel=0.25)
    on_eighths = [asked(curves, full, a, 256) / (work(a, 256) / work(*full)) for a in range(64, 512, 8)]
    assert on_eighths == pytest.approx([1.0] * len(on_eighths), rel=1e-6)


def test_sizes_that_are_no_multiples_of_eight_have_a_curve_of_their_own() -> None:
    def work(a: int) -> float:
        return float(a) if a % 8 == 0 else 2.0 * a

    curves = made(work, 256)
    assert asked(curves, (256,), 128) == pytest.approx(0.5)
    assert asked(curves, (256,), 130) == pytest.approx(260 / 256, rel=0.02)


def test_below_the_smallest_size_a_time_stays_between_nothing_and_that_of_the_smallest() -> None:
    for work in (lambda a: float(a), lambda a: 10.0 + a, lambda a: float(a) ** 2, lambda a: 100.0 / a):
        curves = made(work, 64)
        smallest = work(8) / work(64)
        for size in (1, 2, 3, 4, 6, 7):
            assert 0 < asked(curves, (64,), size) <= max(smallest, work(5) / work(64)) * 1.0001


def test_two_sizes_that_are_both_no_multiples_have_a_grid_of_their_own() -> None:
    def work(a: int, b: int) -> float:
        return a * b * (1.5 if a % 8 and b % 8 else 1.0)

    curves, full = made(work, 256, 128), (256, 128)
    assert asked(curves, full, 128, 64) == pytest.approx(0.25)
    assert asked(curves, full, 131, 64) == pytest.approx(131 / 512, rel=0.05)
    assert asked(curves, full, 131, 67) == pytest.approx(1.5 * 131 * 67 / (256 * 128), rel=0.05)


def test_what_does_not_shrink_takes_what_it_takes() -> None:
    constant = Curves([Curve([])])
    assert constant.shares(np.array([[0.1], [0.3]])).tolist() == [1.0]


def test_tiny_dimensions() -> None:
    for full in (1, 2, 3, 5):
        curves = made(lambda a: 1.0 + a, full)
        for size in range(1, full + 1):
            assert asked(curves, (full,), size) == pytest.approx((1 + size) / (1 + full))


def test_what_could_not_be_measured_is_taken_as_proportional() -> None:
    axes = [axis(64), axis(32)]
    nothing = Curves([curve(axes, {})])
    assert float(nothing.shares(np.array([[0.5], [0.25]]))[0]) == pytest.approx(0.125)
    times = {at: 1.0 + at[0] / 64 for at in points(axes) if at[1] == 32}
    half = Curves([curve(axes, times)])
    assert float(half.shares(np.array([[0.5], [1.0]]))[0]) == pytest.approx(0.75)
    assert float(half.shares(np.array([[1.0], [0.5]]))[0]) == pytest.approx(0.5)
