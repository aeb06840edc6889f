"""What a trial costs before its first training step, and how quickly the command line answers.

    python benchmarks/trial_overhead.py [--repeats 5] [--json FILE]

A trial is a whole process, ``python -m nni_plugins.trial`` on the digits experiment's model with trained dense weights:
imports, data, the watch, pruning, and fine-tuning until the optimizer's first step. For comparison, what
``import nni.compression.pruning`` costs in a process without this package. Medians; run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {"trial": 6.0, "help": 0.5}
PROBE = """
import os, time, torch

class FirstStep(torch.optim.SGD):
    def step(self, closure=None):
        with open(os.environ["FIRST_STEP"], "w") as file:
            file.write(repr(time.time()))
        os._exit(0)

def optimizer(groups, lr):
    return FirstStep(groups, lr=lr)
"""
WEIGHTS = """
from nni_plugins.training import build_data, build_model, load_recipe
from nni_plugins.training.weights import save_weights
from pathlib import Path
recipe = load_recipe("recipe.yml")
data = build_data(recipe)
save_weights(build_model(recipe, data.shape, data.classes, 0), Path("dense.safetensors"))
"""


def seconds(command: list[str], folder: Path, environment: dict[str, str]) -> float:
    """Wall time of a whole process."""
    start = time.time()
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return time.time() - start


def first_step(folder: Path, environment: dict[str, str]) -> float:
    """Seconds from the start of a trial's process to its first training step."""
    mark = folder / "first_step"
    mark.unlink(missing_ok=True)
    start = time.time()
    subprocess.run(
        [sys.executable, "-m", "nni_plugins.trial", "recipe.yml"],
        cwd=folder,
        env={**environment, "FIRST_STEP": str(mark)},
        check=True,
        capture_output=True,
    )
    return float(mark.read_text()) - start


def prepare(folder: Path, environment: dict[str, str]) -> None:
    """The digits recipe with dense weights given, so that the first step of the process is the trial's own."""
    recipe = yaml.safe_load((ROOT / "experiments" / "digits" / "recipe.yml").read_text(encoding="utf-8"))
    (folder / "probe.py").write_text(PROBE, encoding="utf-8")
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    subprocess.run([sys.executable, "-c", WEIGHTS], cwd=folder, env=environment, check=True)
    recipe["model"]["checkpoint"] = "dense.safetensors"
    recipe["train"]["optimizer"] = "probe:optimizer"
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    first_step(folder, environment)  # evaluates the dense model once, and warms the disk's cache


def main() -> int:
    """Measure and print; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NNI_")}
    stock = "import nni.compression.pruning"
    times: dict[str, list[float]] = {"trial": [], "help": [], "stock import": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, environment)
        for _ in range(options.repeats):
            times["trial"].append(first_step(folder, environment))
            times["help"].append(seconds([sys.executable, "-m", "nni_plugins.cli", "--help"], folder, environment))
            times["stock import"].append(seconds([sys.executable, "-c", stock], folder, environment))
    medians = {what: statistics.median(values) for what, values in times.items()}
    print(f"process start to first training step: {medians['trial']:.2f} s (at most {TARGETS['trial']:.0f} s)")
    print(f"nni-plugins --help: {medians['help']:.2f} s (at most {TARGETS['help']} s)")
    print(f"import nni.compression.pruning without this package: {medians['stock import']:.2f} s")
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, Python {platform.python_version()}")
    if options.json:
        options.json.write_text(json.dumps({"medians": medians, "all": times}, indent=1), encoding="utf-8")
    return int(any(medians[what] > limit for what, limit in TARGETS.items()))


if __name__ == "__main__":
    sys.exit(main())
