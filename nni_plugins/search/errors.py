"""The one error of the search: a line that names the thing, what is wrong and what to do."""

from __future__ import annotations


class SearchError(ValueError):
    """A tuner's arguments, a search space or a checkpoint that cannot be used."""
