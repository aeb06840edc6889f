"""Processes that a manager left behind: found by their environment, and ended, even where they are stubborn."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from nni_plugins.experiment.left import end, of_worker, trials

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[tuple[Path, list[subprocess.Popen[bytes]]]]:
    """A worker's folder, and what runs for it: its keeper, a stubborn trial, and a trial of another worker."""
    folder = tmp_path / "EXP" / "environments" / "remote-worker1"
    other = tmp_path / "EXP" / "environments" / "remote-worker10"

    def start(*words: str, **variables: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", STUBBORN, *words], env={"PATH": "", **variables}, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        return process

    found = [
        start("/nni_node/common/trial_keeper/main.js", str(folder / "trial_keeper")),
        start(NNI_EXP_ID="EXP", NNI_OUTPUT_DIR=str(folder / "trials" / "A")),
        start(NNI_EXP_ID="EXP", NNI_OUTPUT_DIR=str(other / "trials" / "B")),
        start(NNI_EXP_ID="OTHER", NNI_OUTPUT_DIR=str(folder / "trials" / "C")),
    ]
    try:
        yield folder, found
    finally:
        for process in found:
            process.kill()
            process.communicate()


def test_what_is_left_of_a_worker_ends_and_nothing_else(
    worker: tuple[Path, list[subprocess.Popen[bytes]]],
) -> None:
    folder, (keeper, own, *others) = worker
    assert {one.pid for one in of_worker(folder)} == {keeper.pid, own.pid}
    begun = time.monotonic()
    ended, stubborn = end(lambda: of_worker(folder), seconds=1.0)
    assert ended == sorted([keeper.pid, own.pid])
    assert stubborn == []
    assert time.monotonic() - begun < 3
    assert [one.poll() for one in others] == [None, None]
    assert end(lambda: of_worker(folder)) == ([], [])


def test_what_does_not_end_is_named(worker: tuple[Path, list[subprocess.Popen[bytes]]]) -> None:
    _, found = worker
    immortal = psutil.Process(found[1].pid)
    immortal.kill = immortal.terminate  # type: ignore[method-assign]
    ended, stubborn = end(lambda: [immortal] if immortal.is_running() else [], seconds=0.5)
    assert ended == stubborn == [immortal.pid]
    assert [one.pid for one in trials("EXP", lambda variables: "A" in variables["NNI_OUTPUT_DIR"])] == ended
