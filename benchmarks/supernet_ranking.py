"""Does a supernet rank subnets as fine-tuning does? Kendall's tau over random subnets of one net on digits.

    python -m benchmarks.supernet_ranking --subnets 50 --output benchmarks/results/supernet_ranking.json

Each subnet is a number of units kept in each channel group. The *ranking* is the validation metric of the supernet's
slice, statistics recalibrated; the *truth* is the same units' plan taken from the trained dense model by magnitude,
fine-tuned by the recipe. Slices of the dense model, recalibrated alike, are the ranking that needs no supernet. On
digits many subnets are equally accurate to an image, so validation loss is ranked too, and compared with loss.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau
from torch import nn

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.training import build_data, prepare_dense, recipe_from_dict
from nni_plugins.training.checkpoint import seed_everything
from nni_plugins.training.dense import dense_model
from nni_plugins.training.loaders import apply, split_batch
from nni_plugins.training.loop import Loop
from nni_plugins.training.pipeline import finetune_recipe
from nni_plugins.training.prune import apply_masks, mask_pairs
from nni_plugins.training.recalibrate import recalibrate
from nni_plugins.training.supernet import importance_order, prepare_supernet

RECIPE: dict[str, Any] = {
    "model": {"name": "resnet8", "arguments": {"width": 8}},
    "data": {"name": "digits", "batch_size": 64},
    "train": {"epochs": 15, "learning_rate": 0.1, "threads": 1},
    "finetune": {"epochs": 6, "learning_rate": 0.05},
    "supernet": {"epochs": 30, "samples": 2, "smallest": 0.125},
}


@torch.no_grad()
def measured(model: nn.Module, loop: Loop) -> tuple[float, float]:
    """Return accuracy and mean cross entropy on validation."""
    model.eval()
    losses, count = 0.0, 0
    for batch in loop.data.validation:
        inputs, target = split_batch(loop.place(batch))
        losses += float(nn.functional.cross_entropy(apply(model, inputs), target, reduction="sum"))
        count += len(target)
    return loop.evaluate(model), losses / count


def subnets(sizes: dict[str, int], number: int, smallest: float, seed: int) -> list[dict[str, int]]:
    """Draw widths: each group's share is uneven around a share of the whole net's."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(number):
        middle = random.uniform(smallest, 1)
        shares = np.clip(middle + random.uniform(-0.3, 0.3, len(sizes)), smallest, 1)
        found.append(
            {name: max(1, round(size * share)) for (name, size), share in zip(sizes.items(), shares, strict=True)}
        )
    return found


def ranked(values: list[float], truth: list[float], draws: int = 1000) -> dict[str, float]:
    """Kendall's tau-b, and its middle 95% over subnets drawn again."""
    tau = float(kendalltau(values, truth).statistic)
    random, both = np.random.default_rng(0), np.array([values, truth])
    again = []
    for _ in range(draws):
        one = both[:, random.integers(0, len(values), len(values))]
        again.append(kendalltau(one[0], one[1]).statistic)
    low, high = np.nanpercentile(again, [2.5, 97.5])
    return {"tau": round(tau, 3), "low": round(float(low), 3), "high": round(float(high), 3)}


def near(values: list[float], truth: list[float], macs: list[int], ratio: float = 1.25) -> dict[str, float]:
    """Tau over the pairs of about equal MACs, where size alone says nothing: (agree - disagree) / pairs not tied."""
    agree, disagree = 0, 0
    for one in range(len(macs)):
        for other in range(one):
            if max(macs[one], macs[other]) <= ratio * min(macs[one], macs[other]):
                sign = np.sign(values[one] - values[other]) * np.sign(truth[one] - truth[other])
                agree, disagree = agree + (sign > 0), disagree + (sign < 0)
    pairs = agree + disagree
    return {"tau": round(float((agree - disagree) / max(pairs, 1)), 3), "pairs": int(pairs)}


def main() -> None:
    """Measure, and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--subnets", type=int, default=50)
    parser.add_argument("--folder", type=Path, default=Path("outputs/supernet_ranking"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = recipe_from_dict(RECIPE)
    dense = prepare_dense(recipe, options.folder)
    supernet = prepare_supernet(recipe, dense, options.folder)
    data = build_data(recipe)
    loop = Loop(recipe, data, "ranking")
    tuning = Loop(finetune_recipe(recipe), data, "fine-tuning")

    def at(path: Path) -> nn.Module:
        return loop.place(dense_model(recipe, data, path))

    model = at(dense.path)
    graph = ChannelGraph.watch(model, data.example)
    orders = {
        "supernet": json.loads(supernet.order.read_text(encoding="utf-8")),
        "dense": importance_order(recipe, model, loop, graph),
    }
    sizes = {name: graph.group(name).size for name in orders["dense"]}
    kept = options.folder / "rows.json"
    rows: list[dict[str, Any]] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else []
    for number, widths in enumerate(subnets(sizes, options.subnets, recipe.supernet.smallest, 1)):
        if number < len(rows):
            continue  # of a run that was cut off
        row: dict[str, Any] = {"macs": graph.cost(widths).macs, "seconds": {}}
        for name, path in (("supernet", supernet.path), ("dense", dense.path)):
            start = time.process_time()
            one = at(path)
            plan = Plan(graph, {group: orders[name][group][:kept] for group, kept in widths.items()})
            masks = plan.masks(one)
            apply_masks(one, masks)
            recalibrate(one, loop, recipe.supernet.batches)
            row[name] = measured(one, loop)
            row["seconds"][name] = round(time.process_time() - start, 3)
        start = time.process_time()
        pairs = mask_pairs(one, masks)

        def keep(pairs: Any = pairs) -> None:
            with torch.no_grad():
                for weight, mask in pairs:
                    weight.mul_(mask)

        seed_everything(number)
        tuning.train(one, tuning.optimizer(one), after_step=keep)
        row["truth"] = measured(one, loop)
        row["seconds"]["truth"] = round(time.process_time() - start, 3)
        rows.append(row)
        kept.write_text(json.dumps(rows), encoding="utf-8")
        print(number, row, flush=True)
    figures: dict[str, Any] = {
        "subnets": len(rows),
        "recipe": RECIPE,
        "supernet_seconds": supernet.seconds,
        "supernet_accuracy": [supernet.accuracy, supernet.smallest],
        "dense_accuracy": dense.accuracy,
        "cpu_seconds_per_subnet": {
            name: round(float(np.median([row["seconds"][name] for row in rows if "seconds" in row])), 2)
            for name in ("supernet", "dense", "truth")
        },
        "tau": {},
        "rows": rows,
    }
    for index, metric in enumerate(("accuracy", "loss")):
        truth = [row["truth"][index] for row in rows]
        for name in ("supernet", "dense"):
            values = [row[name][index] for row in rows]
            figures["tau"][f"{name} {metric}"] = ranked(values, truth)
            figures["tau"][f"{name} {metric}, about equal MACs"] = near(values, truth, [row["macs"] for row in rows])
        sign = 1 if metric == "accuracy" else -1
        figures["tau"][f"macs {metric}"] = ranked([sign * row["macs"] for row in rows], truth)
    print(json.dumps({name: value for name, value in figures.items() if name != "rows"}, indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
