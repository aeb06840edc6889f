"""A long experiment of short trials: are all results there, is memory flat, and what does a trial cost beside its work?

    python benchmarks/soak.py --trials 300 --concurrency 4 --output soak.json

The trials report one number and end. Memory is the resident set of NNI's manager and of its dispatcher, sampled each
second; it is flat where the mean of the last fifth is within a tenth of that of the second fifth. `open_files` are the
manager's after a fifth of the time and at its end. The overhead of a trial is the wall time of the experiment per trial
and slot, less the time that the trial's own process ran.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nni_plugins.experiment.manager import Manager
from nni_plugins.report.environment import environment

TRIAL = """
import time
import psutil
begun = psutil.Process().create_time()
import nni
x = nni.get_next_parameter()["x"]
nni.report_final_result({"default": x, "begun": begun, "ended": time.time()})
"""


def soak(trials: int, concurrency: int, port: int, tuner: str) -> dict[str, Any]:
    """Run the experiment; returns what was measured."""
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        (folder / "trial.py").write_text(TRIAL, encoding="utf-8")
        config = {
            "experimentName": "soak",
            "searchSpace": {"x": {"_type": "uniform", "_value": [0, 1]}},
            "trialCommand": "python trial.py",
            "trialCodeDirectory": str(folder),
            "trialConcurrency": concurrency,
            "maxTrialNumber": trials,
            "tuner": {"name": tuner},
            "trainingService": {"platform": "local"},
        }
        (folder / "config.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
        (folder / "home").mkdir()
        home = {"HOME": str(folder / "home"), "USERPROFILE": str(folder / "home"), "OMP_NUM_THREADS": "1"}
        command = [str(Path(sys.executable).parent / "nni-plugins"), "run", str(folder), "--port", str(port)]
        command += ["--experiments-folder", str(folder / "experiments"), "--output", str(folder / "report")]
        begun = time.monotonic()
        with (folder / "log").open("w", encoding="utf-8") as log:
            process = subprocess.Popen(command, env={**os.environ, **home}, stdout=log, stderr=log)
            samples = watch(process, port)
        wall = time.monotonic() - begun
        status = subprocess.run(
            [command[0], "status", "--json"], env={**os.environ, **home}, capture_output=True, text=True, check=True
        )
        return figures(json.loads(status.stdout)["trials"], samples, concurrency, wall)


def watch(process: subprocess.Popen[bytes], port: int) -> list[tuple[float, int, int, int]]:
    """Time, resident bytes of manager and dispatcher, and open files of the manager, each second until the end."""
    samples = []
    manager: psutil.Process | None = None
    while process.poll() is None:
        time.sleep(1)
        try:
            if manager is None:
                children = psutil.Process(process.pid).children()
                manager = next(one for one in children if "node" in one.name())
                Manager(port).status()
            dispatcher = next(one for one in manager.children(recursive=True) if "--exp_params" in one.cmdline())
            rss = (manager.memory_info().rss, dispatcher.memory_info().rss)
            samples.append((time.monotonic(), *rss, manager.num_fds()))
        except Exception:  # not there yet, or there no more
            continue
    return samples


def figures(
    trials: list[dict[str, Any]], samples: list[tuple[float, int, int, int]], concurrency: int, wall: float
) -> dict[str, Any]:
    """What the experiment shows."""
    done = [trial for trial in trials if trial["status"] == "SUCCEEDED" and trial["metrics"]]
    own = [trial["metrics"]["ended"] - trial["metrics"]["begun"] for trial in done]
    span = max(trial["ended"] for trial in done) - min(trial["started"] for trial in done)
    memory = {}
    for index, who in ((1, "manager"), (2, "dispatcher")):
        series = [sample[index] / 2**20 for sample in samples]
        fifth = max(1, len(series) // 5)
        early, late = statistics.mean(series[fifth : 2 * fifth]), statistics.mean(series[-fifth:])
        memory[who] = {"early_mib": round(early, 1), "late_mib": round(late, 1), "growth": round(late / early - 1, 3)}
    per_trial = span * concurrency / len(done)
    return {
        "trials": len(trials),
        "results": len(done),
        "concurrency": concurrency,
        "seconds": round(wall, 1),
        "slot_seconds_per_trial": round(per_trial, 3),
        "own_seconds_per_trial": round(statistics.mean(own), 3),
        "overhead_seconds_per_trial": round(per_trial - statistics.mean(own), 3),
        "memory": memory,
        "open_files": [samples[len(samples) // 5][3], samples[-1][3]],
        "flat": all(one["growth"] < 0.1 for one in memory.values()),
        "environment": environment(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--port", type=int, default=8097)
    parser.add_argument("--tuner", default="Random")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    found = soak(options.trials, options.concurrency, options.port, options.tuner)
    print(json.dumps(found, indent=1))
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if found["results"] == options.trials else 1


if __name__ == "__main__":
    sys.exit(main())
