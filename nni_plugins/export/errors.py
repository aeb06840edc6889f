"""The one error of exports: a line that names the thing, what is wrong and what to do."""

from __future__ import annotations


class ExportError(ValueError):
    """A model that cannot be exported, a file that does not compute what the model computes, or a missing package."""
