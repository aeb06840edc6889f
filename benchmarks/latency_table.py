"""The latency table against the clock: predicted latency of compact models, and what they take when they are made.

    python benchmarks/latency_table.py [--models resnet18,mobilenetv2,mlp] [--threads 1] [--json FILE]

For each model: the table is measured afresh (no cache), then compact models at several sparsities, uniform and random,
are made by the speedup and timed in turn with the dense one. ``error`` is that of the predicted milliseconds;
``ratio error`` that of the predicted share of the dense model's time in the same turn, which is free of the machine's
mood between table and turn; ``by MACs`` what one would be wrong by who takes latency for proportional to MACs. Names
that are none of ours are taken from torchvision, if it is installed.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import platform
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
warnings.simplefilter("ignore")

import numpy as np
import torch
from torch import nn

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.channels.latency import LatencyTable
from nni_plugins.channels.latency.clock import typical
from nni_plugins.speedup import ModelSpeedup
from nni_plugins.training.models import MODELS
from tests.channels.test_graph import ResNet18

CASES: dict[str, Any] = {
    "resnet18": lambda: (ResNet18(), torch.randn(1, 3, 224, 224)),
    "mobilenetv2": lambda: (MODELS["mobilenetv2"]((3, 128, 128), 10), torch.randn(1, 3, 128, 128)),
    "mlp": lambda: (MODELS["mlp"]((3, 32, 32), 10, hidden=(1024, 1024, 512)), torch.randn(32, 3, 32, 32)),
    "resnet20": lambda: (MODELS["resnet20"]((3, 32, 32), 10), torch.randn(1, 3, 32, 32)),
}


def in_turn(models: list[nn.Module], x: torch.Tensor, threads: int, turns: int = 20) -> list[float]:
    """Milliseconds of each model, timed in turns."""
    now = time.thread_time if threads == 1 else time.perf_counter
    times: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for turn in range(turns + 3):
            for model, found in zip(models, times, strict=True):
                model(x)
                start = now()
                model(x)
                if turn >= 3:
                    found.append(now() - start)
    return [1000 * typical(found) for found in times]


def plans(graph: ChannelGraph) -> dict[str, dict[str, int]]:
    """Kept counts: a share of every exact group, and random shares."""
    groups = [group for group in graph.groups if group.prunable and group.exact]
    rng = np.random.default_rng(0)
    found = {f"{s:.0%} of all": {g.name: max(1, round(g.size * (1 - s))) for g in groups} for s in (0.25, 0.5, 0.75)}
    for index in (1, 2):
        found[f"random {index}"] = {g.name: max(1, round(g.size * rng.uniform(0.2, 1))) for g in groups}
    kept = {g.name: max(1, round(g.size * rng.uniform(0.2, 1))) for g in groups}
    found["random, multiples of 8"] = {g.name: min(g.size, max(8, kept[g.name] // 8 * 8)) for g in groups}
    return found


def case(name: str, threads: int) -> dict[str, Any]:
    if name in CASES:
        model, x = CASES[name]()
    else:
        import torchvision

        model, x = getattr(torchvision.models, name)(weights=None), torch.randn(1, 3, 224, 224)
    model.eval()
    graph = ChannelGraph.watch(model, x)
    table = LatencyTable.measure(graph, model, x, threads=threads, cache=False)
    counts = graph.cost_model.counts(None)
    start = time.thread_time()
    for _ in range(200):
        table.total_ms(counts)
    question_us = (time.thread_time() - start) / 200 * 1e6
    head = {"model": name, "table_s": table.seconds, "timings": table.taken, "question_us": question_us}
    print(
        f"{name}: {table.measured_ms:.2f} ms; table: {table.taken} timings in {table.seconds:.1f} s, "
        f"{question_us:.0f} µs a question"
    )
    rows = []
    for label, kept in plans(graph).items():
        plan = Plan(graph, {group: np.arange(count) for group, count in kept.items()})
        compact = copy.deepcopy(model)
        compact = ModelSpeedup(compact, x, plan.masks(compact)).speedup_model().eval()
        dense, real = in_turn([model, compact], x, threads)
        predicted, timed = table.latency_ms(plan.counts), table.timed_ms(plan.counts)
        macs = plan.cost().macs / graph.cost().macs
        row = {
            "plan": label,
            "macs_share": macs,
            "dense_ms": dense,
            "compact_ms": real,
            "predicted_ms": predicted,
            "error": predicted / real - 1,
            "ratio_error": predicted / table.measured_ms / (real / dense) - 1,
            "timed_ratio_error": timed / table.measured_ms / (real / dense) - 1,
            "by_macs_error": macs / (real / dense) - 1,
        }
        rows.append(row)
        print(
            f"  {label:24} {macs:4.0%} of MACs  {real:8.3f} ms, predicted {predicted:8.3f}  "
            f"error {row['error']:+5.0%}  ratio error {row['ratio_error']:+5.0%} "
            f"(operators timed at these sizes {row['timed_ratio_error']:+5.0%})  by MACs {row['by_macs_error']:+5.0%}",
            flush=True,
        )
    return {**head, "plans": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="resnet18,mobilenetv2,mlp,resnet20")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    found = [case(name, options.threads) for name in options.models.split(",")]
    errors = [abs(row["ratio_error"]) for one in found for row in one["plans"]]
    absolute = [abs(row["error"]) for one in found for row in one["plans"]]
    summary = {
        "median_ratio_error": float(np.median(errors)),
        "largest_ratio_error": max(errors),
        "median_error": float(np.median(absolute)),
        "largest_error": max(absolute),
        "median_by_macs_error": float(np.median([abs(r["by_macs_error"]) for one in found for r in one["plans"]])),
        "machine": f"{platform.processor() or platform.machine()}, {options.threads} threads",
        "versions": f"python {platform.python_version()}, torch {torch.__version__}",
    }
    print(json.dumps(summary, indent=2))
    if options.json:
        options.json.write_text(json.dumps({"summary": summary, "models": found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
