"""Versions and machine, as a report names them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

PACKAGES = ("nni-plugins", "nni", "torch", "numpy", "scikit-learn", "optuna", "onnxruntime")
ENVIRONMENT = "environment.json"
"""Where a trial writes it, in its own folder."""


def environment() -> dict[str, str]:
    """Python, the packages that decide the result, the system, the processor, and the GPU where torch has one."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["system"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    found["processor"] = f"{_processor()}, {os.cpu_count()} cores"
    torch = sys.modules.get("torch")  # who has not used it so far did not use its GPU
    if torch is not None and torch.cuda.is_available():
        found["GPU"] = f"{torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}"
    return found


def save_environment(folder: Path) -> None:
    """Write it into a trial's folder, for the report: the trial may have run on another machine."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ENVIRONMENT).write_text(json.dumps(environment(), indent=1), encoding="utf-8")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
