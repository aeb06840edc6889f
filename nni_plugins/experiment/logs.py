"""What NNI's own logs say of what went wrong: of its manager, and of the process that runs the tuner."""

from __future__ import annotations

import re
from pathlib import Path

LINE = re.compile(r"^\[[^\]]*\] (?P<level>[A-Z]+) (?:\((?P<source>[^)]*)\))?(?P<text>.*)$")
START = re.compile(r"^Experiment \S+ start: (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)")
"""What NNI writes into ``nnictl_stderr.log`` before each start of a manager."""
STAMP = re.compile(r"^\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\]")
LOST_MANAGER = ("websockets.", "ConnectionRefusedError", "ConnectionResetError", "ConnectionError", "TimeoutError")
"""Begin the errors of a tuner whose manager is gone: it has not died of itself."""
CHANNEL = re.compile(r"[/\\](command_channel|websockets)[/\\]")
"""In the path of a frame: NNI's own connection to the manager, which ends in many ways when that is gone."""
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
    """The last line of the last traceback of the tuner's process since the last start; empty without one."""
    said = _tail(experiment / "log" / "nnictl_stderr.log")
    starts = [(index, match) for index, line in enumerate(said) if (match := START.match(line))]
    begun = starts[-1][1][1][:19] if starts else ""
    said = said[starts[-1][0] :] if starts else said
    own = _tail(experiment / "log" / "dispatcher.log")
    started = [index for index, line in enumerate(own) if line.endswith("Dispatcher started")]
    own = own[started[-1] :] if started else own  # what an earlier run died of is over
    if own and (stamp := STAMP.match(own[0])) and stamp[1] < begun:
        own = []  # the process of this run has not come so far
    for lines in (own, said):
        tracebacks = [index for index, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
        for begin in reversed(tracebacks):
            frames: list[str] = []
            error = ""
            for line in lines[begin + 1 :]:
                if line and not line[0].isspace() and ":" in line:
                    error = line.strip()
                    break
                frames.append(line)
            if error and not error.startswith(LOST_MANAGER) and not any(CHANNEL.search(line) for line in frames):
                return error
    return ""


def tuner_has_no_more(experiment: Path) -> bool:
    """Whether the manager's log says so of its last run, which a bare nnictl may have started."""
    states = [line for line in _tail(experiment / "log" / "nnimanager.log") if "Change NNIManager status from" in line]
    last = next((line for line in reversed(states) if not line.endswith((" STOPPING", " STOPPED"))), "")
    return last.endswith(" TUNER_NO_MORE_TRIAL")


def _tail(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL))
            whole, _, _ = file.read().rpartition(b"\n")  # the last line may be half written
            return whole.decode("utf-8", "replace").splitlines()
    except OSError:
        return []
