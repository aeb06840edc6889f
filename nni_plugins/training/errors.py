"""The two ways in which a recipe can fail, each with a text of one line meant for its author."""

from __future__ import annotations


class RecipeError(ValueError):
    """The recipe is wrong: names the file, the field, what is wrong and what to do."""


class CompressionError(RuntimeError):
    """The recipe is sound, yet this run of it cannot work (budget out of reach, diverged, unfit checkpoint)."""


def first_line(error: BaseException) -> str:
    """Return what an exception says, cut to one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
