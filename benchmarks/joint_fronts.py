"""Pruning and architecture search together, against each alone, at equal total time of their trials, on digits.

    python -m benchmarks.joint_fronts --seconds 300 --plot docs/images/joint_fronts.png

Three arms search the space of ``experiments/digits_nas`` for accuracy on validation and for few MACs:

- *pruning*: the default architecture, the shares of its stages free;
- *architecture*: the choices free, nothing pruned;
- *joint*: both free.

All use one search, an evolution of the front: a few random samples, then mutations of members of the front. Where both
are free, three mutations of four stay in their parent's architecture, whose dense model is there already. A trial is
what ``nni-plugins run`` does: the architecture is trained dense (once for each architecture, and the time counts for
the trial that needed it first), pruned by magnitude, fine-tuned and compacted. An arm stops when its trials have used
the CPU seconds it was given, so that arms with cheap trials try more. Models on a front are evaluated on the test split
once, at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nni_plugins.experiment.nas_evaluation import recipe_for
from nni_plugins.search.pruned_space import PrunedSpace, space_of
from nni_plugins.training import compress, evaluate_test, load_recipe, prepare_dense
from nni_plugins.training.recipe import Recipe

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "digits_nas"
SPACE = "space:digits_space"
STAY = 0.75
"""Of the mutations, the share that keeps the parent's architecture: its dense training is what a trial mostly costs."""
ARMS = {"pruning": "keep:", "architecture": "", "joint": ""}


class Front:
    """An evolution of the front of accuracy and MACs.

    Parameters
    ----------
    space
        Its mutables.
    arm
        Which of them are free.
    seed
        Of the samples.
    start
        Random samples before the first mutation.
    """

    def __init__(self, space: PrunedSpace, arm: str, seed: int, start: int = 6) -> None:
        self.random, self.start = np.random.RandomState(seed), start
        mutables = space.simplify()
        keeps = {label for label in mutables if label.startswith("keep:")}
        free = keeps if arm == "pruning" else set(mutables) - keeps if arm == "architecture" else set(mutables)
        self.free = {label: list(mutables[label].values) for label in mutables if label in free}
        self.fixed = {**space.survey.default, **dict.fromkeys(keeps, 1.0)}
        self.done: list[dict[str, Any]] = []

    def suggest(self) -> dict[str, Any] | None:
        """Return a sample that was not tried, or None where there is none to be found."""
        tried = [entry["sample"] for entry in self.done]
        for _ in range(200):
            sample = {**self.fixed, **self._draw()}
            if sample not in tried:
                return sample
        return None

    def _draw(self) -> dict[str, Any]:
        if len(self.done) < self.start:
            return {label: self._one(values) for label, values in self.free.items()}
        members = front(self.done)
        parent = members[self.random.randint(len(members))]["sample"]
        changing = {label for label in self.free if label.startswith("keep:")}
        if not changing or self.random.rand() >= STAY:
            changing = set(self.free)
        rate = max(0.2, 1.5 / len(changing))
        return {
            label: self._one(values) if label in changing and self.random.rand() < rate else parent[label]
            for label, values in self.free.items()
        }

    def _one(self, values: list[Any]) -> Any:
        return values[self.random.randint(len(values))]


def front(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries that none beats in both, by rising MACs."""
    found: list[dict[str, Any]] = []
    for entry in sorted(entries, key=lambda one: (one["macs"], -one["accuracy"])):
        if not found or entry["accuracy"] > found[-1]["accuracy"]:
            found.append(entry)
    return found


def volume(entries: list[dict[str, Any]], most: float, key: str = "accuracy", least: float = 0.8) -> float:
    """Return the share of the area between ``least`` and 1, and 1% and all of ``most`` MACs (by logarithm), covered."""
    area, edge = 0.0, np.log(most)
    low = np.log(most / 100)
    for entry in reversed(front([{**one, "accuracy": one[key]} for one in entries])):
        left = float(np.clip(np.log(entry["macs"]), low, edge))
        area += (edge - left) * max(0.0, entry["accuracy"] - least)
        edge = left
    return float(area / ((1 - least) * np.log(100)))


def run_arm(
    arm: str, base: Recipe, space: PrunedSpace, seconds: float, seed: int, folder: Path
) -> list[dict[str, Any]]:
    """Search until the time is used; returns the trials."""
    search, used = Front(space, arm, seed), 0.0
    kept = folder / f"{arm}-{seed}" / "trials.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    for entry in json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else []:  # of a run that was cut off
        search.suggest()
        search.done.append(entry)
        used = entry["used"]
    while used < seconds:
        sample = search.suggest()
        if sample is None:
            break
        start = time.process_time()
        recipe = recipe_for(base, SPACE, sample)
        output = folder / f"{arm}-{seed}" / str(len(search.done))
        with contextlib.redirect_stdout(io.StringIO()):
            metrics = compress(recipe, output, prepare_dense(recipe, folder / f"{arm}-{seed}" / "dense"))
        used += time.process_time() - start
        search.done.append(
            {
                "sample": sample,
                "accuracy": metrics["accuracy"],
                "macs": metrics["macs"],
                "used": round(used, 1),
                "folder": str(output),
            }
        )
        kept.write_text(json.dumps(search.done), encoding="utf-8")
        print(f"{arm} {seed}: {used:.0f} s, {metrics['macs']:,} MACs, {metrics['accuracy']:.4f}", flush=True)
    return search.done


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw every trial, and the fronts on validation and on test."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    colours = {"pruning": "tab:blue", "architecture": "tab:orange", "joint": "tab:green"}
    for arm, entries in results.items():
        best = front(entries)
        axes[0].scatter(
            [e["macs"] for e in entries], [e["accuracy"] for e in entries], s=10, alpha=0.35, color=colours[arm]
        )
        for axis, key in zip(axes, ("accuracy", "test"), strict=True):
            label = f"{arm} ({len(entries)} trials)"
            axis.plot([e["macs"] for e in best], [e[key] for e in best], "o-", ms=4, color=colours[arm], label=label)
    for axis, title in zip(axes, ("validation", "test, of the models on the front"), strict=True):
        axis.set(xscale="log", xlabel="MACs", title=title, ylim=(0.8, 1.005))
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right")
    axes[0].set_ylabel("accuracy")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the arms, and write what they found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300, help="CPU seconds of trials, for each arm")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("outputs/joint_fronts"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = load_recipe(EXPERIMENT / "recipe.yml").with_values({"objective.macs": None})
    space = space_of(SPACE, EXPERIMENT)
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for seed in range(options.seeds):
        for arm in ARMS:
            entries = run_arm(arm, base, space, options.seconds, seed, options.folder)
            for entry in front(entries):
                folder = Path(entry["folder"])
                recipe = load_recipe(folder / "recipe.yml")
                entry["test"] = evaluate_test(recipe, folder / "compact.safetensors")["accuracy"]
            results[arm] += [{**entry, "seed": seed} for entry in entries]
    most = max(entry["macs"] for entries in results.values() for entry in entries)
    figures: dict[str, Any] = {"seconds": options.seconds, "seeds": options.seeds, "arms": {}}
    for arm, entries in results.items():
        own = [[entry for entry in entries if entry["seed"] == seed] for seed in range(options.seeds)]
        figures["arms"][arm] = {
            "trials": [len(one) for one in own],
            "architectures": [len({json.dumps(_inside(e["sample"]), sort_keys=True) for e in one}) for one in own],
            "volume": [round(volume(one, most), 4) for one in own],
            "test_volume": [round(volume([e for e in one if "test" in e], most, "test"), 4) for one in own],
            "front": [
                [{k: e.get(k) for k in ("macs", "accuracy", "test", "sample")} for e in front(one)] for one in own
            ],
        }
    shown = {arm: {k: v for k, v in own.items() if k != "front"} for arm, own in figures["arms"].items()}
    print(json.dumps(shown, indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    if options.plot is not None:
        plot({arm: [e for e in entries if e["seed"] == 0] for arm, entries in results.items()}, options.plot)


def _inside(sample: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sample.items() if not name.startswith("keep:")}


if __name__ == "__main__":
    main()
