"""``target='latency'`` against the clock: models pruned to a share of their latency, and the share that they take.

    python benchmarks/latency_target.py [--models resnet18,mobilenetv2,mlp,resnet20] [--sparsity 0.3,0.5] [--json FILE]

For each model the latency table is measured afresh (no cache), MagnitudePruner takes the asked share of the latency
away, globally, and the speedup makes the compact model. Dense and compact are then timed in turns, several times over.
``off`` is the compact model's share of the dense one's time against the asked one: 0.55 of the time where 0.5 was asked
is +10%. The goal is to be within 10%.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import platform
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
warnings.simplefilter("ignore")

import torch

from benchmarks.latency_table import CASES
from nni_plugins.channels import ChannelGraph
from nni_plugins.channels.latency import LatencyTable
from nni_plugins.pruners import MagnitudePruner
from nni_plugins.report.environment import environment
from nni_plugins.speedup import ModelSpeedup
from nni_plugins.training.measure import in_turns

GOAL = 0.1
RESULTS = Path(__file__).resolve().parent / "results" / "latency_target.json"


def case(name: str, sparsities: list[float], threads: int, rounds: int) -> list[dict[str, Any]]:
    """Prune one model to each share, and time what comes of it."""
    torch.manual_seed(0)
    model, x = CASES[name]()
    model.eval()
    graph = ChannelGraph.watch(model, x)
    table = LatencyTable.measure(graph, model, x, threads=threads, cache=False)
    rows = []
    for sparsity in sparsities:
        pruned = copy.deepcopy(model)
        config = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": sparsity}]
        try:
            pruner = MagnitudePruner(
                pruned, config, dummy_input=x, target="latency", latency=table, scope="global"
            )  # fmt: skip
            _, masks = pruner.compress()
        except ValueError as error:
            print(f"{name} {sparsity:.0%}: {error}")
            rows.append({"model": name, "asked": 1 - sparsity, "note": str(error)})
            continue
        pruner.unwrap_model()
        predicted = table.latency_ms(pruner.plan.counts) / table.measured_ms
        macs = pruner.plan.cost().macs / graph.cost().macs
        compact = ModelSpeedup(pruned, x, masks).speedup_model().eval()
        found = [in_turns([model, compact], x, threads) for _ in range(rounds)]
        shares = [small / dense for dense, small in found]
        share = statistics.median(shares)
        off = share / (1 - sparsity) - 1
        rows.append(
            {
                "model": name,
                "asked": 1 - sparsity,
                "predicted": predicted,
                "measured": share,
                "rounds": shares,
                "off": off,
                "macs": macs,
                "dense_ms": statistics.median(dense for dense, _ in found),
                "within": abs(off) <= GOAL,
            }
        )
        print(
            f"{name:12} asked {1 - sparsity:.2f}  predicted {predicted:.3f}  measured {share:.3f} "
            f"({min(shares):.3f} to {max(shares):.3f})  off {off:+.1%}  {macs:.0%} of the MACs",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="resnet18,mobilenetv2,mlp,resnet20")
    parser.add_argument("--sparsity", default="0.3,0.5")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.disable(logging.INFO)
    torch.set_num_threads(options.threads)
    sparsities = [float(item) for item in options.sparsity.split(",")]
    names = options.models.split(",")
    known = json.loads(options.results.read_text(encoding="utf-8"))["rows"] if options.results.exists() else []
    rows = [row for row in known if row["model"] not in names]  # of the others, from a run before
    for name in names:
        rows += case(name, sparsities, options.threads, options.rounds)
        made = {"rows": rows, "threads": options.threads, "machine": platform.processor(), "environment": environment()}
        options.results.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    measured = [row for row in rows if "off" in row]
    print(f"{sum(row['within'] for row in measured)} of {len(rows)} within {GOAL:.0%}")


if __name__ == "__main__":
    main()
