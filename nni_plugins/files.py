"""Files that others may read while they are written: whole under another name first, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under another name and rename it: readers see all of it or none.

    Parameters
    ----------
    path
        Of the file, in a folder that is there.
    write
        Called with the other name, of this process's own: of several processes, each may write.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole; what JSON has no form for is written as text."""
    text = json.dumps(value, indent=1, default=str) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))
