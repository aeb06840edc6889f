"""The two ways in which a recipe can fail, each with a text of one line meant for its author."""

from __future__ import annotations

from pathlib import Path


class RecipeError(ValueError):
    """The recipe is wrong: names the file, the field, what is wrong and what to do."""


class CompressionError(RuntimeError):
    """The recipe is sound, yet this run of it cannot work (budget out of reach, diverged, unfit checkpoint)."""


class NoTestSplit(RecipeError):
    """The data has no test split: everything else works, and the report goes without it."""


def where(error: BaseException) -> str:
    """Return kind, text and place of an exception raised by the user's code, on one line."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    place = f" ({Path(frame.tb_frame.f_code.co_filename).name}, line {frame.tb_lineno})" if frame else ""
    if isinstance(error, TypeError) and "required positional argument" in str(error) and "forward()" in str(error):
        place = "; give each of its inputs: several --input, or a dictionary or tuple from the data"
    return f"{type(error).__name__}: {first_line(error)}{place}"


def first_line(error: BaseException) -> str:
    """Return what an exception says, cut to one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
