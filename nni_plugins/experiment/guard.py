"""What keeps a trial process alone in its folder, and no longer alive than its manager.

NNI resumes an experiment by starting the unfinished trials again under the same ids and in the same folders. When a
manager was killed (SIGKILL, out of memory), its trials run on, and two processes would write to one folder.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def die_with_manager(poll_seconds: float = 1.0) -> None:
    """End this process by the signal that NNI stops trials with, and when the process that started it is gone.

    NNI stops a trial with SIGINT and tells a cancelled or early-stopped trial from a failed one by the signal that
    ended it, so that signal gets its default effect back. No effect outside NNI; on Windows the parent is not watched.
    """
    if "NNI_PLATFORM" not in os.environ:
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "win32":
        return
    import psutil

    above = psutil.Process().parents()  # a shell and torchrun may stand between
    manager = next((one for one in above if "node" in one.name().lower()), above[0] if above else None)
    parent = os.getppid()

    def gone() -> bool:
        try:
            alive = manager is not None and manager.is_running() and manager.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            alive = False
        return os.getppid() != parent or not alive

    def watch() -> None:
        while not gone():
            time.sleep(poll_seconds)
        print("NNI's manager is gone; this trial ends, and starts again on resume", file=sys.stderr)
        os._exit(1)

    threading.Thread(target=watch, name="manager-watch", daemon=True).start()


@contextmanager
def only_writer(output: Path, wait_seconds: float = 15.0) -> Iterator[None]:
    """Hold the trial's folder for this process alone.

    Raises
    ------
    TimeoutError
        When another process still holds it after `wait_seconds`.
    """
    from filelock import FileLock, Timeout

    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(output / ".writer.lock"), timeout=wait_seconds)
    try:
        lock.acquire()
    except Timeout:
        raise TimeoutError(
            f"another process of this trial still writes to {output}; stop it, then resume the experiment"
        ) from None
    try:
        yield
    finally:
        lock.release()
