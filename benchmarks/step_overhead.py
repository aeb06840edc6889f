"""What each pruner adds to a training step outside its updates, on a net for digits.

    python benchmarks/step_overhead.py [--pruners magnitude taylor ...] [--rounds 40] [--batch 64] [--json FILE]

For each pruner a plain net and one under the pruner advance in turns, 10 steps each, in one process and one thread.
Time is the process's own (CPU seconds). The figure is the median over the rounds of the ratio of the two, less 1. The
pruner is in the middle of its training: masks are set, and its next update is beyond the steps that are timed. Taylor
and L0 have no steps between updates: what is timed is their collecting of gradients and their gates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import nni
import torch
from nni.compression import TorchEvaluator
from sklearn.datasets import load_digits
from torch import nn

from benchmarks.dynamic_overhead import network
from nni_plugins import pruners
from nni_plugins.report.environment import environment

FAR = 1_000_000
CONFIG = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


def _made(name: str, **arguments: Any) -> Callable[[nn.Module, Any], Any]:
    return lambda model, evaluator: pruners.PRUNERS[name](model, CONFIG, evaluator, **arguments)


WAITS = {"shape": "linear", "times": 2, "interval_steps": FAR}
PRUNERS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "magnitude": _made("magnitude", schedule=WAITS),
    "taylor (collecting)": _made("taylor", training_steps=FAR),
    "l0 (gates)": _made("l0", training_steps=FAR),
    "synaptic strength": _made("synaptic", training_steps=FAR),
    "weight magnitude": _made("weight_magnitude", schedule=WAITS),
    "weight gradient (collecting)": _made("weight_gradient", training_steps=FAR),
    "dynamic sparse": _made("dynamic_sparse", total_steps=FAR, update_every=FAR // 10),
    "hybrid": _made("hybrid", total_steps=FAR, update_every=FAR // 10),
}
"""By name; what a pruner does not have is left out of the table."""


def steps_of(
    model: nn.Module, optimizer: Any, loss: Callable[[Any, nn.Module], Any], batch: int
) -> Callable[[int], float]:
    """Return a function that makes some steps and says how many CPU seconds they took."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None]
    images, labels = (images - images.mean()) / images.std(), torch.tensor(data.target)
    at = 0

    def advance(steps: int) -> float:
        nonlocal at
        began = time.process_time()
        for _ in range(steps):
            at = (at + batch) % (len(images) - batch)
            optimizer.zero_grad()
            loss((images[at : at + batch], labels[at : at + batch]), model).backward()
            optimizer.step()
        return time.process_time() - began

    return advance


def _loss(batch: Any, model: nn.Module) -> Any:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def overhead(make: Callable[[nn.Module, Any], Any], width: int, batch: int, rounds: int) -> float:
    """What a pruner adds to a step, as a fraction: inside its own evaluator's training."""
    plain = network(width)
    dense = steps_of(plain, torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9), _loss, batch)
    ratios: list[float] = []

    def training(model: nn.Module, optimizer: Any, step: Any, *_: Any) -> None:
        under = steps_of(model, optimizer, step, batch)
        dense(10), under(10)
        for turn in range(rounds):
            first, second = (dense, under) if turn % 2 else (under, dense)
            times = {first: first(10), second: second(10)}
            ratios.append(times[under] / times[dense])

    model = network(width)
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01, momentum=0.9)
    evaluator = TorchEvaluator(training, optimizer, _loss, dummy_input=torch.zeros(2, 1, 8, 8))
    pruner = make(model, evaluator)
    if not pruner.needs_training:
        pruner.prune(0.5)
    evaluator.bind_model(model, pruner._get_param_names_map())
    pruner._fuse_preprocess(evaluator)
    evaluator.train(max_steps=FAR)
    return statistics.median(ratios) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pruners", nargs="+", choices=PRUNERS, default=list(PRUNERS))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| pruner | added to a step |\n|---|---|")
    found = {}
    for name in options.pruners:
        found[name] = overhead(PRUNERS[name], options.width, options.batch, options.rounds)
        print(f"| {name} | {100 * found[name]:+.1f}% |", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"overhead": found, "machine": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
