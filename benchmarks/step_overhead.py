"""What each pruner adds to a training step outside its updates, on a net for digits and on a wide one.

    python benchmarks/step_overhead.py [--net digits wide] [--pruners magnitude ...] [--rounds 40] [--json FILE]

The nets are ``digits``, a CNN of 16, 32 and 64 channels on pictures of 8 x 8, and ``wide``, the residual net of
benchmarks/hybrid_cost.py, of 32, 64 and 128 channels on pictures of 32 x 32. For each pruner a plain net and one under
the pruner advance in turns, 10 steps each (2 of the wide net), in one process and one thread. Time is the process's own
(CPU seconds). The figure is the median over the rounds of the ratio of the two, less 1. The pruner is in the middle of
its training: masks are set, and its next update is beyond the steps that are timed. Taylor
and L0 have no steps between updates: what is timed is their collecting of gradients and their gates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import nni
import torch
from nni.compression import TorchEvaluator
from sklearn.datasets import load_digits
from torch import nn

from benchmarks import dynamic_overhead, hybrid_cost
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


@dataclass(frozen=True)
class Net:
    """What is trained: a model by its width, its data, and how many steps are timed together."""

    build: Callable[[int], nn.Module]
    data: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    width: int
    steps: int


def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None]
    return (images - images.mean()) / images.std(), torch.tensor(data.target)


def _noise() -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of nothing: time does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1024, 3, 32, 32, generator=generator), torch.randint(10, (1024,), generator=generator)


NETS = {
    "digits": Net(dynamic_overhead.network, _digits, 16, 10),
    "wide": Net(hybrid_cost.network, _noise, 32, 2),
}


def steps_of(
    net: Net, model: nn.Module, optimizer: Any, loss: Callable[[Any, nn.Module], Any], batch: int
) -> Callable[[], float]:
    """Return a function that makes some steps and says how many CPU seconds they took."""
    images, labels = net.data()
    at = 0

    def advance() -> float:
        nonlocal at
        began = time.process_time()
        for _ in range(net.steps):
            at = (at + batch) % (len(images) - batch)
            optimizer.zero_grad()
            loss((images[at : at + batch], labels[at : at + batch]), model).backward()
            optimizer.step()
        return time.process_time() - began

    return advance


def _loss(batch: Any, model: nn.Module) -> Any:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def overhead(
    make: Callable[[nn.Module, Any], Any], net: Net, width: int, batch: int, rounds: int
) -> tuple[float, float]:
    """What a pruner adds to a step inside its own evaluator's training, as a fraction, and a plain step's seconds."""
    plain = net.build(width)
    dense = steps_of(net, plain, torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9), _loss, batch)
    ratios: list[float] = []
    seconds: list[float] = []

    def training(model: nn.Module, optimizer: Any, step: Any, *_: Any) -> None:
        under = steps_of(net, model, optimizer, step, batch)
        dense(), under()
        for turn in range(rounds):
            first, second = (dense, under) if turn % 2 else (under, dense)
            times = {first: first(), second: second()}
            ratios.append(times[under] / times[dense])
            seconds.append(times[dense] / net.steps)

    model = net.build(width)
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01, momentum=0.9)
    evaluator = TorchEvaluator(training, optimizer, _loss, dummy_input=net.data()[0][:2])
    pruner = make(model, evaluator)
    if not pruner.needs_training:
        pruner.prune(0.5)
    evaluator.bind_model(model, pruner._get_param_names_map())
    pruner._fuse_preprocess(evaluator)
    evaluator.train(max_steps=FAR)
    return statistics.median(ratios) - 1, statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--net", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--pruners", nargs="+", choices=PRUNERS, default=list(PRUNERS))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--width", type=int, help="channels of the first layer; by default 16 (digits) and 32 (wide)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    for name in options.net:
        net, found[name] = NETS[name], {}
        print(f"\n{name}:\n\n| pruner | added to a step | a plain step |\n|---|---|---|")
        for pruner in options.pruners:
            found[name][pruner], seconds = overhead(
                PRUNERS[pruner], net, options.width or net.width, options.batch, options.rounds
            )
            print(f"| {pruner} | {100 * found[name][pruner]:+.1f}% | {1000 * seconds:.1f} ms |", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"overhead": found, "machine": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
