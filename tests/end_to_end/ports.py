"""Ports for servers that are started a moment later: nobody else takes them meanwhile."""

from __future__ import annotations

import os
import random
import socket

FIRST, SPAN = 20_000, 1_000
"""Below the ports that systems give to connections and to whoever asks for any; as many for each process of a run."""


def free_ports(count: int = 1) -> int:
    """The first of so many free ports in a row."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 10
    chance = random.SystemRandom()  # another run may be on this machine
    while True:
        first = FIRST + SPAN * worker + chance.randrange(SPAN - count)
        if all(_free(port) for port in range(first, first + count)):
            return first


def _free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
        return True
