"""What is loaded into NNI's manager, which is a Node.js program, before its own code.

NNI's manager listens on every address without a password, trusts every SSH server, and ends when a machine is lost.
The small files in ``js/`` mend that in memory; a manager that a bare ``nnictl`` starts does not have them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PRELOAD = Path(__file__).parent / "js" / "index.js"
LOOPBACK = "127.0.0.1"
HEAP = "--max-semi-space-size=2"
"""MiB for new objects; by default V8 lets them grow to three times 16, of which nothing comes back."""
COLLECT = 5
"""Seconds from one look at the garbage to the next; it is collected where there is some, see ``js/memory.js``."""
EVENTS = "machines.jsonl"
"""In the experiment's ``log`` folder: what happened to machines, and why no trial starts; one JSON object a line."""


def node_environment(
    environment: Mapping[str, str],
    listen: str = LOOPBACK,
    keys: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, str]:
    """The variables that make NNI's node load our files; it removes them from its own environment at once.

    Parameters
    ----------
    environment
        What the process would have without them.
    listen
        The address that its servers listen on.
    keys
        Of a manager with remote machines: for each ``host:port`` its host keys, base64 by type.
    """
    before = environment.get("NODE_OPTIONS", "")
    settings: dict[str, Any] = {"listen": listen, "nodeOptions": before, "collect": COLLECT}
    if keys is not None:
        settings["keys"] = {name: dict(known) for name, known in keys.items()}
    options = f"--require {json.dumps(str(PRELOAD))} {HEAP} {before}".strip()  # the user's own come last, and win
    return {"NODE_OPTIONS": options, "NNI_PLUGINS_NODE": json.dumps(settings)}


@contextmanager
def preloaded(listen: str = LOOPBACK, keys: Mapping[str, Mapping[str, str]] | None = None) -> Iterator[None]:
    """Let every node process that is started inside load our files; see :func:`node_environment`."""
    added = node_environment(os.environ, listen, keys)
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def events(experiment: Path) -> list[dict[str, Any]]:
    """What the manager noted of its machines, the oldest first; a line that was cut off is left out."""
    try:
        lines = (experiment / "log" / EVENTS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "kind" in event:
            found.append(event)
    return found
