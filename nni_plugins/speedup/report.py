"""What a speedup did: sizes before and after, the proof that compact equals masked, and what stayed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class SpeedupReport:
    """The result of one speedup.

    Attributes
    ----------
    macs_before, macs_after
        Multiply-accumulates of one run on the dummy input.
    params_before, params_after
        Numbers of parameters.
    max_error
        The largest absolute difference between the compact and the masked model's outputs on random input; None where
        it was not measured.
    relative_error
        ``max_error`` over the largest absolute value of the masked model's output.
    removed
        ``{group: (kept, size)}``.
    removed_blocks
        Names of the modules that went as a whole.
    frozen
        What could not be pruned and why, a line each.
    stayed
        Units that are masked and yet stay, by group, with the reason.
    put_back
        Groups that the masks asked to remove and that were put back, with the reason.
    inexact
        Where the compact model cannot equal the masked one exactly, and why.
    latency_before_ms, latency_after_ms
        Times of one run, where they are known: from a latency table that the speedup was given, or set by whoever
        measured them. Nothing is measured for them.
    seconds
        Time spent, by step: watch (rehearsal included), masks, replay, removal, proof.
    """

    macs_before: int = 0
    macs_after: int = 0
    params_before: int = 0
    params_after: int = 0
    max_error: float | None = None
    relative_error: float | None = None
    removed: dict[str, tuple[int, int]] = field(default_factory=dict)
    removed_blocks: list[str] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)
    stayed: list[str] = field(default_factory=list)
    put_back: list[str] = field(default_factory=list)
    inexact: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    latency_before_ms: float | None = None
    latency_after_ms: float | None = None

    @property
    def slower(self) -> bool:
        """Whether fewer MACs take as long as before or longer, as far as latencies are known."""
        before, after = self.latency_before_ms, self.latency_after_ms
        return before is not None and after is not None and after >= before and self.macs_after < self.macs_before

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"MACs    {self.macs_before:>14,} -> {self.macs_after:>14,}  ({_share(self.macs_after, self.macs_before)})",
            f"params  {self.params_before:>14,} -> {self.params_after:>14,}  "
            f"({_share(self.params_after, self.params_before)})",
        ]
        if self.latency_before_ms is not None and self.latency_after_ms is not None:
            before, after = self.latency_before_ms, self.latency_after_ms
            lines.append(f"latency {before:>11.3f} ms -> {after:>11.3f} ms  ({_share(after, before)})")
        if self.slower:
            lines.append("fewer MACs but not faster: odd channel counts, or time that is not spent on MACs")
        if self.max_error is not None:
            relative = f", {self.relative_error:.1e} of the output's size" if self.relative_error is not None else ""
            lines.append(f"largest error against the masked model: {self.max_error:.1e}{relative}")
        if self.removed_blocks:
            lines.append(f"removed as a whole: {', '.join(self.removed_blocks)}")
        lines += [f"masked, but stays: {line}" for line in self.stayed]
        lines += [f"put back: {line}" for line in self.put_back]
        lines += [f"not exact: {line}" for line in self.inexact]
        return "\n".join(lines)


def _share(after: float, before: float) -> str:
    return f"{after / before:.1%}" if before else "-"
