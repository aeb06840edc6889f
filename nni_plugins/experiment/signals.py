"""Ctrl-C, a closed terminal and a polite kill: each asks for an orderly stop, that nothing cuts off half-way."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP in the list that this yields, so that nothing is cut off half-way through.

    The second Ctrl-C acts at once. A SIGHUP that ``nohup`` keeps away stays away.
    """
    received: list[int] = []
    watched = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
        watched.append(hangup)
    before = {number: signal.getsignal(number) for number in watched}

    def note(number: int, _frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)  # a closed terminal may say so twice

    for number in watched:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
