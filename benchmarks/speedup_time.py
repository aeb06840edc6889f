"""Time of a speedup, ours and NNI's stock one, side by side in one run: ResNet-18 at 224 x 224, half of every channel.

    python benchmarks/speedup_time.py [--repeats 3] [--json FILE]

Both get the same masks, of every second channel of every group, and a fresh copy of the same model. Ours is the whole
of watch, masks, removal and replay; the proof (two forwards) is timed apart. Stock runs with this package's patches,
without which it does not run on today's torch at all. Repeats alternate; medians are compared.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import platform
import statistics
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
warnings.simplefilter("ignore")

import torch
from nni.compression.speedup import ModelSpeedup as StockSpeedup

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.speedup import ModelSpeedup
from nni_plugins.speedup.verify import largest_error, outputs_of, random_like
from tests.channels.test_graph import ResNet18
from tests.random_networks import trained_like


def timed(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    quiet = logging.getLogger("quiet")
    quiet.setLevel(logging.CRITICAL)
    logging.disable(logging.INFO)

    model, x = ResNet18().eval(), torch.randn(1, 3, 224, 224)
    trained_like(model)
    graph = ChannelGraph.watch(model, x)
    masks = Plan(graph, {g.name: range(0, g.size, 2) for g in graph.groups if g.prunable}).masks(model)
    inputs = random_like(x)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, targets in masks.items():
            for target, mask in targets.items():
                getattr(masked.get_submodule(name), target).mul_(mask)
    expected = outputs_of(masked, inputs)

    ours, stock, proof, report = [], [], [], None
    for _ in range(options.repeats):
        mine, theirs = copy.deepcopy(model), copy.deepcopy(masked)
        speedup = ModelSpeedup(mine, x, masks)
        speedup.speedup_model()
        seconds = speedup.report.seconds
        ours.append(sum(seconds.values()) - seconds["proof"])
        proof.append(seconds["proof"])
        stock.append(timed(lambda: StockSpeedup(theirs, x, copy.deepcopy(masks), logger=quiet).speedup_model())[0])  # noqa: B023
        report = speedup.report
        errors = [largest_error(outputs_of(m, inputs), expected)[1] for m in (mine, theirs)]
    figures = {
        "ours_s": statistics.median(ours),
        "ours_by_step_s": report.seconds,
        "proof_s": statistics.median(proof),
        "stock_s": statistics.median(stock),
        "ratio_stock_to_ours": statistics.median(s / o for s, o in zip(stock, ours, strict=True)),
        "our_error_of_output": errors[0],
        "stock_error_of_output": errors[1],
        "macs_before": report.macs_before,
        "macs_after": report.macs_after,
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "versions": f"python {platform.python_version()}, torch {torch.__version__}",
    }
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
