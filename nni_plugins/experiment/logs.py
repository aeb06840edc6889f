"""What NNI's own logs say of what went wrong: of its manager, and of the process that runs the tuner."""

from __future__ import annotations

import re
from pathlib import Path

LINE = re.compile(r"^\[[^\]]*\] (?P<level>[A-Z]+) (?:\((?P<source>[^)]*)\))?(?P<text>.*)$")
TAIL = 200_000


def manager_error(experiment: Path) -> str:
    """The first line of the last error in ``log/nnimanager.log``, with the error that it names; empty without one."""
    lines = _tail(experiment / "log" / "nnimanager.log")
    for index in range(len(lines) - 1, -1, -1):
        match = LINE.match(lines[index])
        if match and match["level"] in ("ERROR", "CRITICAL", "FATAL"):
            words = match["text"].strip()
            following = lines[index + 1].strip() if index + 1 < len(lines) else ""
            if words.endswith(":") and following and not LINE.match(following):
                words = f"{words} {following}"
            return words
    return ""


def tuner_error(experiment: Path) -> str:
    """The last line of the last traceback of the tuner's process; empty without one."""
    for name in ("dispatcher.log", "nnictl_stderr.log"):
        lines = _tail(experiment / "log" / name)
        begun = [index for index, line in enumerate(lines) if line.endswith("Dispatcher started")]
        lines = lines[begun[-1] :] if begun else lines  # what an earlier run died of is over
        starts = [index for index, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
        if starts:
            for line in lines[starts[-1] + 1 :]:
                if line and not line[0].isspace() and ":" in line:
                    return line.strip()
    return ""


def _tail(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL))
            return file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []
