"""Errors of the pruners: one line that names the thing, what is wrong and what to do."""

from __future__ import annotations


class PruningError(ValueError):
    """A pruner was asked for something that it cannot do; the text is one line."""


class BudgetError(PruningError):
    """The asked budget cannot be met; the text says what was asked, what is reachable and what limits it.

    Attributes
    ----------
    asked : float
        Sparsity that was asked for.
    reachable : float
        The nearest sparsity that can be reached.
    """

    def __init__(self, message: str, asked: float, reachable: float):
        super().__init__(message)
        self.asked = asked
        self.reachable = reachable
