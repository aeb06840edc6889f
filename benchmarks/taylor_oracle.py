"""How well TaylorPruner's scores agree with the oracle: the change of loss when one unit is left out.

    python benchmarks/taylor_oracle.py [--seeds 3]

A small CNN is trained on digits. Each unit of it is then left out by itself (its channel is zero after the norm), and
the loss is taken again, minibatch by minibatch: the oracle is the squared change, averaged over the minibatches
(Molchanov et al., CVPR 2019, equation 2). The scores come from the same minibatches. Correlations are over all units of
all layers: Spearman's of the ranks, and Pearson's of the absolute changes (square roots of both). Goal: a Spearman's of
at least 0.9 for TaylorPruner's default, ``weight``, and for ``gate`` of second order.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import nni
import numpy as np
import torch
from nni.compression import TorchEvaluator
from torch import Tensor, nn

from nni_plugins.pruners import MagnitudePruner, TaylorPruner

CONFIG = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
GOAL = 0.9
BATCH = 64


def small_cnn(widths: tuple[int, ...] = (12, 16, 24)) -> nn.Sequential:
    """Three convolutions with norms."""
    layers: list[nn.Module] = []
    inputs = 1
    for index, width in enumerate(widths):
        layers += [nn.Conv2d(inputs, width, 3, 2 if index else 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def digits() -> tuple[Tensor, Tensor]:
    """Images of mean 0 and deviation 1, in an order that is mixed once, and labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return ((images - images.mean()) / images.std())[order], torch.tensor(data.target)[order]


def batches(data: tuple[Tensor, Tensor], count: int) -> list[tuple[Tensor, Tensor]]:
    """The first so many minibatches."""
    return [(data[0][i * BATCH : (i + 1) * BATCH], data[1][i * BATCH : (i + 1) * BATCH]) for i in range(count)]


def trained(data: tuple[Tensor, Tensor], seed: int, epochs: int = 8, model: nn.Module | None = None) -> nn.Module:
    """A net trained with Adam on all minibatches."""
    torch.manual_seed(seed)
    model = small_cnn() if model is None else model
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    whole = batches(data, len(data[0]) // BATCH)
    for epoch in range(epochs):
        for index in torch.randperm(len(whole), generator=torch.Generator().manual_seed(1000 * seed + epoch)).tolist():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(whole[index][0]), whole[index][1]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def oracle(model: nn.Module, given: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Squared change of each minibatch's loss without a unit, averaged, by the name of its convolution."""

    def losses() -> Tensor:
        return torch.stack([nn.functional.cross_entropy(model(images), labels) for images, labels in given]).double()

    whole, found = losses(), {}
    modules = list(model.named_modules())
    for (name, conv), (_, norm) in pairwise(modules):
        if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
            continue
        changes = []
        for unit in range(conv.out_channels):
            saved = norm.weight[unit].clone(), norm.bias[unit].clone()
            norm.weight[unit] = norm.bias[unit] = 0.0
            changes.append(((losses() - whole) ** 2).mean())
            norm.weight[unit], norm.bias[unit] = saved
        found[name] = torch.stack(changes)
    return found


def scores(model: nn.Module, given: list[tuple[Tensor, Tensor]], maker: Any = TaylorPruner, **how: Any) -> Any:
    """A pruner's scores of a trained net on minibatches; the net is watched as it is, and not trained on."""

    def training(model, optimizer, training_step, scheduler=None, max_steps=None, max_epochs=None):  # type: ignore[no-untyped-def]
        model.eval()  # the statistics of the norms are those of the oracle
        for batch in given:
            optimizer.zero_grad()
            training_step(batch, model).backward()
            optimizer.step()

    def training_step(batch: Any, model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    model = copy.deepcopy(model)
    if maker is MagnitudePruner:
        pruner: Any = maker(model, CONFIG, dummy_input=given[0][0][:2], **how)
    else:
        optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=1e-12)
        evaluator = TorchEvaluator(training, optimizer, training_step, dummy_input=given[0][0][:2])
        pruner = maker(model, CONFIG, evaluator, len(given), **how)
    pruner.compress()
    return pruner.scores


def correlations(one: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[float, float]:
    """Spearman's and, of the square roots, Pearson's, over the units of all layers."""
    a, b = (torch.cat([values[name].double() for name in sorted(one)]).numpy() for values in (one, other))
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1]), float(np.corrcoef(np.sqrt(a), np.sqrt(b))[0, 1])


VARIANTS: dict[str, dict[str, Any]] = {
    "gate": {"variant": "gate"},
    "gate, second order": {"variant": "gate", "order": 2, "probes": 8},
    "weight": {"variant": "weight"},
    "weight, second order": {"variant": "weight", "order": 2, "probes": 8},
    "activation": {"variant": "activation"},
    "magnitude": {"maker": MagnitudePruner, "norm": "l2"},
}


def main() -> int:
    """Print the correlations; 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, rows = digits(), {name: list[tuple[float, float]]() for name in VARIANTS}
    for seed in range(options.seeds):
        model, given = trained(data, seed, options.epochs), batches(data, options.batches)
        truth = oracle(model, given)
        for name, how in VARIANTS.items():
            rows[name].append(correlations(truth, scores(model, given, **how)))
    print(f"{'variant':<22}{'Spearman':>10}{'Pearson':>10}   each seed's Spearman")
    for name, values in rows.items():
        mean = np.mean(values, axis=0)
        print(f"{name:<22}{mean[0]:>10.3f}{mean[1]:>10.3f}   {', '.join(f'{value[0]:.3f}' for value in values)}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    least = min(float(np.mean(rows[name], axis=0)[0]) for name in ("weight", "gate, second order"))
    return int(least < GOAL)


if __name__ == "__main__":
    sys.exit(main())
