"""Folders that a command writes to: tried before the work, and left as they were when it fails."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nni_plugins.experiment.errors import ExperimentError

UNFINISHED = {"recipe.yml"}
"""What a compression that failed before it pruned leaves: a copy of what it was told."""


def check_writable(path: Path, what: str) -> None:
    """Refuse a folder that could not be written in the end, hours later.

    Parameters
    ----------
    path
        It need not exist; nothing is left in it.
    what
        The option that names it, for the message.

    Raises
    ------
    ExperimentError
        In one line.
    """
    path = path.expanduser().absolute()
    existing = next(place for place in (path, *path.parents) if place.exists())
    if not existing.is_dir():
        raise ExperimentError(f"{what} {path}: the folder cannot be made, {existing} is no folder")
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".nni-plugins-"):
            pass
    except OSError as error:
        raise ExperimentError(
            f"{what} {path}: {existing} cannot be written ({error.strerror}); choose another place"
        ) from None


@contextlib.contextmanager
def undone_if_empty(*folders: Path) -> Iterator[None]:
    """Remove the folders again that were made in vain, if the work fails."""
    made = {place for folder in folders for place in (folder, *folder.parents) if not place.exists()}
    try:
        yield
    except BaseException:
        for place in sorted(made, key=lambda place: len(place.parts), reverse=True):
            with contextlib.suppress(OSError):
                left = list(place.iterdir())
                if {item.name for item in left} <= UNFINISHED:
                    for item in left:
                        item.unlink()
                    place.rmdir()
        raise
