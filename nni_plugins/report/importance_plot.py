"""Parameter importance as bars, with the spread over resampled trials."""

from __future__ import annotations

from typing import Any

from nni_plugins.report.figures import BLUE, INK, bare, new_figure, shortened, styled
from nni_plugins.report.findings import Importance

MOST = 20


def draw_importance(found: Importance) -> Any:
    """The bars of one target as a figure of matplotlib.

    Parameters
    ----------
    found
        With shares.
    """
    names = list(found.shares)[:MOST]
    shares = [100 * found.shares[name] for name in names]
    spread = [100 * found.spread.get(name, 0.0) for name in names]
    with styled():
        figure, axes = new_figure(5.4, 0.26 * max(len(names), 3) + 0.9)
        places = range(len(names))
        low = [min(share, wide) for share, wide in zip(shares, spread, strict=True)]
        axes.barh(places, shares, height=0.7, color=BLUE, linewidth=0)
        axes.errorbar(
            shares, places, xerr=[low, spread], fmt="none", ecolor=INK, elinewidth=0.9, capsize=2.5, capthick=0.9
        )  # fmt: skip
        axes.set_yticks(places, [shortened(name, 38) for name in names], fontsize=8)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"share of the variance of {shortened(words_of(found.target), 40)} (%)")
        bare(axes, "x")
        axes.tick_params(axis="y", length=0)
    return figure


def words_of(target: str) -> str:
    """A target as people call it."""
    return {"macs": "MACs", "latency_ms": "latency"}.get(target, target)
