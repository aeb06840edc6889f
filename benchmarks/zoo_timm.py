"""The smallest model of every architecture module of timm: half of every group goes, the rest must equal, and train.

    python benchmarks/zoo_timm.py [names…] [--modes exact,all] [--results FILE] [--failed]
    python benchmarks/zoo_timm.py --smallest     # which model is the smallest of each module; takes half an hour

Weights are random. An image has the size that the model asks for; where that is more than 256 and any other will do, a
smaller one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.zoo.runner import main

#: Module -> [model, number of parameters], found by ``--smallest``.
SMALLEST = Path(__file__).resolve().parent / "zoo" / "timm_smallest.json"


def names() -> list[str]:
    """Return the smallest model of every module."""
    return [model for model, _ in json.loads(SMALLEST.read_text())["smallest"].values()]


def build(name: str) -> tuple[Any, Any]:
    """Return a model and an input for it."""
    import timm
    import torch

    model = timm.create_model(name, pretrained=False).eval()
    return model, torch.randn(1, *_image_size(model.pretrained_cfg), generator=torch.Generator().manual_seed(0))


def _image_size(asked: dict[str, Any]) -> tuple[int, int, int]:
    channels, height, width = asked.get("input_size", (3, 224, 224))
    if max(height, width) <= 256 or asked.get("fixed_input_size"):
        return channels, height, width
    least = (asked.get("min_input_size") or (channels, 128, 128))[-1]
    return channels, 2 * least, 2 * least


def find_smallest() -> None:
    """Count the parameters of every model of timm on the device "meta", a process a module, and write the smallest."""
    import timm

    found: dict[str, list[Any]] = {}
    for module in timm.list_modules():
        counted = subprocess.run(
            [sys.executable, __file__, "--count", module], capture_output=True, text=True, timeout=3600
        )
        if counted.returncode or not counted.stdout.strip():
            print(f"{module}: {counted.stderr.strip().splitlines()[-1:]}", flush=True)
            continue
        found[module] = json.loads(counted.stdout.strip().splitlines()[-1])
        print(module, found[module], flush=True)
        lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(found.items()))
        SMALLEST.write_text(f'{{\n"timm": "{timm.__version__}",\n"smallest": {{\n{lines}\n}}\n}}\n')


def count(module: str) -> None:
    """Print the smallest model of a module and its number of parameters."""
    import warnings

    import timm
    import torch

    warnings.simplefilter("ignore")
    best: list[Any] = []
    for name in timm.list_models(module=module):
        if name.startswith("test_"):
            continue  # a toy of timm's own tests
        try:
            with torch.device("meta"):
                model = timm.create_model(name, pretrained=False)
        except Exception as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        size = sum(p.numel() for p in model.parameters())
        if not best or size < best[1]:
            best = [name, size]
    print(json.dumps(best))


if __name__ == "__main__":
    if sys.argv[1:] == ["--smallest"]:
        find_smallest()
    elif sys.argv[1:2] == ["--count"]:
        count(sys.argv[2])
    else:
        import timm  # noqa: F401  (before the fork)

        main("timm", names, build)
