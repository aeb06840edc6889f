"""The peak memory of a model: what a process of its own needs beyond its imports to load it and run it.

python -m nni_plugins.report.bench_memory eager model.pt inputs.pt
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

RUNS = 3


def peak_mib(runtime: str, model: nn.Module | Path, inputs: Any, threads: int = 1) -> float | None:
    """Measure in a fresh process.

    Parameters
    ----------
    runtime
        ``eager`` for a module, ``onnx`` for a file.
    model
        The module, which must be one that can be pickled, or the file.
    inputs
        Nested tensors, on the CPU.
    threads
        CPU threads.

    Returns
    -------
    float or None
        MiB; None where the process fails (a module that cannot be pickled).
    """
    with tempfile.TemporaryDirectory() as scratch:
        place, given = Path(scratch) / "model.pt", Path(scratch) / "inputs.pt"
        try:
            torch.save(inputs, given)
            if isinstance(model, Path):
                place = model
            else:
                torch.save(model, place)
        except Exception:  # whatever pickling raises
            return None
        command = [sys.executable, "-m", __name__, runtime, str(place), str(given), str(threads), json.dumps(sys.path)]
        answer = subprocess.run(command, capture_output=True, text=True)
    return float(answer.stdout.splitlines()[-1]) if answer.returncode == 0 and answer.stdout else None


def _kib() -> int:
    """The most memory that this process has held; what Linux counts in ``ru_maxrss`` begins with the parent's."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak // 1024 if sys.platform == "darwin" else peak


def main(runtime: str, model: str, inputs: str, threads: str, path: str) -> None:
    """Load, run, and print MiB."""
    sys.path[:] = json.loads(path)  # the model's own module may lie anywhere
    torch.set_num_threads(int(threads))
    given = torch.load(inputs, weights_only=False)  # written by the parent just now, as is the model
    from nni_plugins.training.loaders import apply

    if runtime == "eager":
        import nni_plugins.speedup  # noqa: F401  (classes of compact models)

        before = _kib()
        loaded = torch.load(model, weights_only=False).eval()
        with torch.no_grad():
            for _ in range(RUNS):
                apply(loaded, given)
    else:
        from nni_plugins.export.onnx import feed_of, session_of

        before = _kib()
        session = session_of(model, int(threads))
        for _ in range(RUNS):
            session.run(None, feed_of(session, given))
    print(max(0, _kib() - before) / 1024)


if __name__ == "__main__":
    main(*sys.argv[1:])
