"""From dense to 8 bits, step by step: accuracy, MACs, size, and time in onnxruntime.

    python benchmarks/shipping.py                     # digits, ResNet-20, 3 seeds
    python benchmarks/shipping.py --data cifar10 --root cifar10.npz --seeds 1

Dense; pruned to half the MACs in multiples of 8 channels; the same with the dense model as teacher; that in 8 bits
(QAT). All four share the dense nets and the budget of fine-tuning. The test split is read once for each, after the
last epoch; int8's metric is computed by onnxruntime. Times are taken in turns in one run (``nni-plugins bench``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from nni_plugins.report.bench import bench
from nni_plugins.report.environment import environment
from nni_plugins.training import build_data, compress, evaluate_test, prepare_dense, recipe_from_dict
from nni_plugins.training.artefacts import load_model
from nni_plugins.training.dense import dense_model

RESULTS = Path(__file__).resolve().parent / "results" / "shipping.json"
PRUNE: dict[str, Any] = {
    "pruner": "magnitude",
    "sparsity": 0.5,
    "target": "macs",
    "scope": "local",
    "round_to": 8,
    "arguments": {"tolerance": 0.1},  # in multiples of 8 a small net does not come nearer to half
}
"""Every group loses the same share, so that parameters fall with the MACs."""
TREES: dict[str, dict[str, Any]] = {
    "digits": {
        "model": {"name": "resnet20"},
        "train": {"epochs": 20},
        "prune": PRUNE,
        "finetune": {"epochs": 10, "learning_rate": 0.05},
    },
    "cifar10": {
        "model": {"name": "resnet8"},
        "data": {"name": "cifar10", "batch_size": 128, "validation": 0.1, "augment": "crop_flip"},
        "train": {"epochs": 20, "channels_last": True},
        "prune": PRUNE,
        "finetune": {"epochs": 6, "learning_rate": 0.05},
    },
}
STEPS: dict[str, dict[str, Any]] = {
    "pruned": {"export.formats": ["onnx"]},
    "+ teacher": {"export.formats": ["onnx"], "distill.method": "kd"},
    "+ int8": {"export.formats": ["onnx"], "distill.method": "kd", "quantize.method": "qat"},
}


def main() -> None:
    """Run it, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", choices=TREES, default="digits")
    parser.add_argument("--root", help="of cifar10")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for the models (default: a temporary one)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = [one_seed(options, seed, options.folder or Path(scratch)) for seed in range(options.seeds)]
    known = json.loads(options.results.read_text(encoding="utf-8")) if options.results.exists() else {}
    known[options.data] = {"seeds": rows, "environment": environment()}
    options.results.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


def one_seed(options: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """Return the figures of the dense model and of each step."""
    torch.set_num_threads(1)
    base = recipe_from_dict(TREES[options.data]).with_values({"seed": seed, "train.threads": 1})
    if options.root:
        base = base.with_values({"data.root": str(Path(options.root).resolve())})
    dense = prepare_dense(base, folder / "dense", lambda line: print(f"seed {seed}: {line}", flush=True))
    figures: dict[str, Any] = {
        "dense": {"test": evaluate_test(base, dense.path)["accuracy"], "macs": dense.macs, "bytes": dense.bytes}
    }
    data = build_data(base)
    models, files = {"dense": dense_model(base, data, dense.path)}, {}
    for name, changes in STEPS.items():
        recipe = base.with_values(changes)
        home = folder / f"{options.data}-{seed}" / name.replace("+ ", "")
        metrics = compress(recipe, home, dense)
        final = home / metrics["final"]
        figures[name] = {
            "test": evaluate_test(recipe, final)["accuracy"],
            "macs": metrics["macs"],
            "bytes": (home / ("int8.onnx" if "int8" in name else "compact.safetensors")).stat().st_size,
        }
        print(f"seed {seed}: {name}: {figures[name]}", flush=True)
        if name == "+ int8":
            models["compact"] = load_model(recipe, data, home / "compact.safetensors")
            files = {("compact", "onnx"): home / "compact.onnx", ("compact", "int8"): home / "int8.onnx"}
    times = bench(models, data.example, files=files, runtimes=("onnx", "int8"), batches=(1, 32), seconds=2.0)
    figures["times"] = [
        {"model": one.model, "runtime": one.runtime, "batch": one.batch, "median_ms": one.median_ms, "ratio": one.ratio}
        for one in times
    ]
    return figures


def table(rows: list[dict[str, Any]]) -> str:
    """Return the means over seeds as Markdown."""
    lines = ["| step | test accuracy | MACs | file | batch 1 | batch 32 |", "|---|---|---|---|---|---|"]
    runtimes = {"dense": ("dense", "onnx"), "+ teacher": ("compact", "onnx"), "+ int8": ("compact", "int8")}
    for name in ("dense", *STEPS):
        tests = [100 * row[name]["test"] for row in rows]
        spread = f" ± {statistics.stdev(tests):.2f}" if len(tests) > 1 else ""
        share = statistics.mean(row[name]["macs"] / row["dense"]["macs"] for row in rows)
        smaller = statistics.mean(row["dense"]["bytes"] / row[name]["bytes"] for row in rows)
        times = []
        for batch in (1, 32):
            found = [
                one["median_ms"] / base["median_ms"]
                for row in rows
                for one in row["times"]
                for base in row["times"]
                if (one["model"], one["runtime"], one["batch"]) == (*runtimes.get(name, ("", "")), batch)
                and (base["model"], base["runtime"], base["batch"]) == ("dense", "onnx", batch)
            ]
            times.append(f"{100 * statistics.mean(found):.0f}%" if found else "")
        lines.append(
            f"| {name} | {statistics.mean(tests):.2f}%{spread} | {100 * share:.0f}% | {smaller:.1f}x smaller | "
            f"{times[0]} | {times[1]} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
