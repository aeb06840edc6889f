"""Ratios that a search found, fine-tuned, beside uniform and global magnitude at equal MACs and equal fine-tuning.

    python benchmarks/best_ratios.py [--seeds 5] [--trials 60] [--sparsity 0.5 0.75] [--results FILE]
    python benchmarks/best_ratios.py --data cifar10 --root cifar10.npz --seeds 1 --sparsity 0.5 --folder models

For each seed a ResNet-8 is trained on scikit-learn's digits, or on CIFAR-10: the net, split and training of
benchmarks/cifar10.py, whose dense weights ``--dense`` takes. `OptunaTuner` (TPE, with `recipe`, so that every trial
meets the budget) searches the share that each channel group loses, in quick trials: pruned by magnitude, batch norm
recalibrated, judged on validation, not fine-tuned. Its best ratios, uniform ratios and a global magnitude threshold are
then fine-tuned alike, in one recipe that differs in `prune` only. Test is read once for each, after the last epoch;
paired differences over seeds with their 95% intervals. The seconds of the search are beside, not in the fine-tuning.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from scipy.stats import t as student

import nni_plugins  # noqa: F401  (NNI on today's Python)
from nni_plugins.channels import ChannelGraph
from nni_plugins.experiment.folders import METRICS
from nni_plugins.report.environment import environment
from nni_plugins.search import OptunaTuner
from nni_plugins.search.amc_state import GraphEnvironment
from nni_plugins.training import build_data, compress, evaluate_test, prepare_dense
from nni_plugins.training.dense import dense_model
from nni_plugins.training.recipe import recipe_from_dict

RESULTS = ROOT / "benchmarks" / "results"
PRUNE = {"pruner": "magnitude", "target": "macs"}
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {
        "model": {"name": "resnet8"},
        "data": {"name": "digits", "validation": 0.4},
        "train": {"epochs": 30, "learning_rate": 0.1, "threads": 1},
        "finetune": {"epochs": 8, "learning_rate": 0.02},
        "prune": PRUNE,
        "speedup": {"recalibrate_batches": 20},
    },
    "cifar10": {
        "folder": str(ROOT),
        "model": {"name": "benchmarks.cifar.nets:resnet"},
        "data": {"name": "cifar10", "batch_size": 128, "validation": 0.1, "augment": "crop_flip"},
        "train": {"epochs": 20, "threads": 1, "channels_last": True},
        "finetune": {"epochs": 6, "learning_rate": 0.05},
        "prune": PRUNE,
        "speedup": {"recalibrate_batches": 50},
    },
}


def search(recipe: Any, dense: Any, folder: Path, trials: int, seed: int) -> dict[str, float]:
    """The ratios of the best quick trial, by field of the recipe."""
    data = build_data(recipe)
    graph = ChannelGraph.watch(dense_model(recipe, data, dense.path), data.example)
    names = [f"prune.groups.{group.name}" for group in graph.groups if group.prunable and group.exact]
    space = {name: {"_type": "uniform", "_value": [0.0, 0.9]} for name in names}
    (folder / "recipe.yml").parent.mkdir(parents=True, exist_ok=True)
    recipe.with_values({"prune.target": "channels"}).save(folder / "recipe.yml")
    surroundings = GraphEnvironment.from_recipe(folder / "recipe.yml", names, {"macs": 1 - recipe.prune.sparsity})
    tuner = OptunaTuner("tpe", seed=seed, environment=surroundings)
    tuner.update_search_space(space)
    quick = recipe.with_values({"search.mode": "quick", "prune.target": "channels", "prune.scope": "local"})
    best: tuple[float, dict[str, float]] = (-np.inf, {})
    for number in range(trials):
        (values,) = tuner.generate_multiple_parameters([number], st_callback=None)
        metrics = compress(quick.with_values(values), folder / "quick", dense)
        tuner.receive_trial_result(number, values, metrics)
        tuner.trial_end(number, True)
        best = max(best, (metrics["default"], values), key=lambda one: one[0])
    return best[1]


def recipe_of(options: argparse.Namespace, seed: int, sparsity: float) -> Any:
    """What all contenders of a seed share."""
    changes: dict[str, Any] = {"seed": seed, "prune.sparsity": sparsity}
    tree = copy.deepcopy(RECIPES[options.data])
    if options.root:
        tree["data"]["root"] = str(Path(options.root).resolve())
    if options.dense:
        changes["model.checkpoint"] = str(Path(options.dense.format(seed=seed)).expanduser().resolve())
    return recipe_from_dict(tree).with_values(changes)


def compare(recipe: Any, seed: int, sparsity: float, trials: int, folder: Path) -> dict[str, Any]:
    """Test accuracy and MACs of each contender for one seed."""
    dense = prepare_dense(recipe, folder / "dense", lambda line: None)
    kept = folder / "found.json"
    if not kept.exists():
        begun = time.monotonic()
        found = search(recipe, dense, folder / "search", trials, seed)
        kept.write_text(json.dumps([found, time.monotonic() - begun]), encoding="utf-8")
    found, seconds = json.loads(kept.read_text(encoding="utf-8"))
    contenders = {
        "found": {**found, "prune.target": "channels", "prune.scope": "local"},
        "uniform": {"prune.scope": "local"},
        "global magnitude": {"prune.scope": "global"},
    }
    result: dict[str, Any] = {"seed": seed, "sparsity": sparsity, "search_seconds": round(seconds, 1)}
    result["dense"] = float(evaluate_test(recipe, dense.path)["accuracy"])
    for name, changes in contenders.items():
        own = recipe.with_values(changes)
        output = folder / name.replace(" ", "-")
        made = output / METRICS  # written last
        metrics = json.loads(made.read_text(encoding="utf-8")) if made.exists() else compress(own, output, dense)
        test = float(evaluate_test(own, output / "compact.safetensors")["accuracy"])
        result[name] = {"test": test, "validation": metrics["accuracy"], "macs": metrics["macs"] / dense.macs}
    return result


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a table: means, and paired differences of the found ratios with their intervals."""
    lines = ["| MACs removed | contender | MACs left | test | found less this (95%) |", "|---|---|---|---|---|"]
    for sparsity in sorted({row["sparsity"] for row in rows}):
        part = [row for row in rows if row["sparsity"] == sparsity]
        for name in ("found", "uniform", "global magnitude"):
            tests = np.array([row[name]["test"] for row in part])
            macs = np.mean([row[name]["macs"] for row in part])
            ahead = np.array([row["found"]["test"] for row in part]) - tests
            words = ""
            if name != "found" and len(part) > 1:
                half = student.ppf(0.975, len(part) - 1) * ahead.std(ddof=1) / len(part) ** 0.5
                words = f"{100 * ahead.mean():+.2f} ± {100 * half:.2f} points"
            lines.append(f"| {sparsity:.0%} | {name} | {macs:.1%} | {100 * tests.mean():.2f}% | {words} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", choices=RECIPES, default="digits")
    parser.add_argument("--root", help="of cifar10: a .npz of JPEG streams or cifar-10-batches-py")
    parser.add_argument("--dense", help="trained dense weights; {seed} in the path is the seed")
    parser.add_argument("--folder", type=Path, help="where models stay, so that a stopped run goes on")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.75])
    parser.add_argument("--results", type=Path, help="by default best_ratios.json or best_ratios_cifar10.json")
    options = parser.parse_args()
    if (options.data == "cifar10") != bool(options.root):
        parser.error("--data cifar10 needs --root, and only it takes one")
    name = "best_ratios.json" if options.data == "digits" else f"best_ratios_{options.data}.json"
    file = options.results or RESULTS / name
    logging.disable(logging.INFO)
    rows: list[dict[str, Any]] = []
    if file.exists():
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    for sparsity in options.sparsity:
        for seed in range(options.seeds):
            if any(row["seed"] == seed and row["sparsity"] == sparsity for row in rows):
                continue
            with tempfile.TemporaryDirectory() as temporary:
                place = (options.folder or Path(temporary)) / f"{options.data}-{seed}-{sparsity:g}"
                recipe = recipe_of(options, seed, sparsity)
                rows.append(compare(recipe, seed, sparsity, options.trials, place))
            found = {"environment": environment(), "trials": options.trials, "rows": rows}
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print("\n".join(summary(rows)))


if __name__ == "__main__":
    main()
