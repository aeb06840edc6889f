"""Evaluate every subnet of a grid of widths of one trained net, once, and write the table.

    python -m benchmarks.subnets.build [--epochs 30] [--output benchmarks/results/subnets.npz]

A ResNet-8 is trained on scikit-learn's digits by the recipe's own loop. Each of its six channel groups keeps one of
five shares of its units, those of the greatest magnitude: 5^6 = 15,625 subnets. Batch norm is recalibrated on the
training split, taken as one batch; then validation and test are read. Nothing is fine-tuned. Subnets that agree in
their first groups share the layers up to there, so that the whole grid takes minutes. Some of them are held against
the masked net itself.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nni_plugins  # noqa: F401  (NNI on today's torch)
from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.pruners.score import group_sums
from nni_plugins.training.data import build_data
from nni_plugins.training.dense import dense_model, prepare_dense
from nni_plugins.training.recipe import recipe_from_dict

KEPT = (1.0, 0.8125, 0.625, 0.4375, 0.25)
RECIPE = {
    "model": {"name": "resnet8"},
    "data": {"name": "digits", "validation": 0.4},
    "train": {"epochs": 30, "learning_rate": 0.1, "threads": 1},
}
GROUPS = ("conv1", "layer1.0.conv1", "layer2.0.conv1", "layer2.0.conv2", "layer3.0.conv1", "layer3.0.conv2")


class Splits:
    """All images of the three splits, training first."""

    def __init__(self, data: Any) -> None:
        parts = [data.train, data.validation, data.read_test()]
        self.sizes = [len(part.index) for part in parts]
        self.images = torch.cat([part.normalised(part.images[part.index]) for part in parts])
        self.labels = torch.cat([part.targets[part.index] for part in parts])

    def correct(self, logits: Tensor) -> list[int]:
        """Right answers in validation and test."""
        right = (logits.argmax(1) == self.labels).split(self.sizes)
        return [int(right[1].sum()), int(right[2].sum())]


class Grid:
    """The net, layer by layer, with the layers that subnets share computed once."""

    def __init__(self, model: Any, splits: Splits, order: dict[str, Tensor]) -> None:
        self.model, self.splits, self.order = model, splits, order

    def units(self, group: str, kept: float) -> Tensor:
        size = len(self.order[group])
        return self.order[group][: round(size * kept)].sort().values

    def conv(self, conv: nn.Module, norm: nn.Module, x: Tensor, rows: Tensor, columns: Tensor | None) -> Tensor:
        weight = conv.weight[rows] if columns is None else conv.weight[rows][:, columns]
        y = F.conv2d(x, weight, None, conv.stride, conv.padding)
        variance, mean = torch.var_mean(y[: self.splits.sizes[0]], dim=(0, 2, 3), correction=1)
        scale = norm.weight[rows] / torch.sqrt(variance + norm.eps)
        return y * scale[None, :, None, None] + (norm.bias[rows] - mean * scale)[None, :, None, None]

    def run(self, report: Any) -> np.ndarray:
        """Right answers [5, 5, 5, 5, 5, 5, 2] in validation and test, by level of each group."""
        net, levels = self.model, range(len(KEPT))
        table = np.zeros((len(KEPT),) * len(GROUPS) + (2,), dtype=np.uint16)
        for a in levels:
            rows_a = self.units("conv1", KEPT[a])
            stem = F.relu(self.conv(net.conv1, net.bn1, self.splits.images, rows_a, None))
            for b in levels:
                x1 = self.block(net.layer1[0], stem, rows_a, self.units("layer1.0.conv1", KEPT[b]), rows_a)
                for c in levels:
                    inner = self.units("layer2.0.conv1", KEPT[c])
                    h2 = self.first(net.layer2[0], x1, rows_a, inner)
                    for d in levels:
                        rows_d = self.units("layer2.0.conv2", KEPT[d])
                        x2 = self.second(net.layer2[0], x1, h2, rows_a, inner, rows_d)
                        for e in levels:
                            deep = self.units("layer3.0.conv1", KEPT[e])
                            h3 = self.first(net.layer3[0], x2, rows_d, deep)
                            for f in levels:
                                rows_f = self.units("layer3.0.conv2", KEPT[f])
                                x3 = self.second(net.layer3[0], x2, h3, rows_d, deep, rows_f)
                                logits = F.linear(x3.mean((2, 3)), net.fc.weight[:, rows_f], net.fc.bias)
                                table[a, b, c, d, e, f] = self.splits.correct(logits)
                report(a * len(KEPT) + b + 1, len(KEPT) ** 2)
        return table

    def first(self, block: Any, x: Tensor, rows_in: Tensor, inner: Tensor) -> Tensor:
        return F.relu(self.conv(block.conv1, block.bn1, x, inner, rows_in))

    def second(self, block: Any, x: Tensor, hidden: Tensor, rows_in: Tensor, inner: Tensor, out: Tensor) -> Tensor:
        shortcut = x
        if isinstance(block.downsample, nn.Sequential):
            shortcut = self.conv(block.downsample[0], block.downsample[1], x, out, rows_in)
        return F.relu(self.conv(block.conv2, block.bn2, hidden, out, inner) + shortcut)

    def block(self, block: Any, x: Tensor, rows_in: Tensor, inner: Tensor, out: Tensor) -> Tensor:
        return self.second(block, x, self.first(block, x, rows_in, inner), rows_in, inner, out)

    def masked(self, graph: ChannelGraph, levels: tuple[int, ...]) -> list[int]:
        """The same numbers, from the whole net under the plan's masks."""
        kept = {group: self.units(group, KEPT[i]).numpy() for group, i in zip(GROUPS, levels, strict=True)}
        net = copy.deepcopy(self.model)
        for module, targets in Plan(graph, kept).masks(self.model).items():
            for name, mask in targets.items():
                getattr(net.get_submodule(module), name).data.mul_(mask)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None
        net.train()(self.splits.images[: self.splits.sizes[0]])
        return self.splits.correct(net.eval()(self.splits.images))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "subnets.npz")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = recipe_from_dict({**RECIPE, "train": {**RECIPE["train"], "epochs": options.epochs}})
    data = build_data(recipe)
    with tempfile.TemporaryDirectory() as folder, torch.enable_grad():
        dense = prepare_dense(recipe, folder, lambda line: None)
        model = dense_model(recipe, data, dense.path).eval()
    graph = ChannelGraph.watch(model, data.example)
    assert tuple(group.name for group in graph.groups if group.prunable) == GROUPS
    absolute = {name: p.detach().abs() for name, p in model.named_parameters() if not name.endswith("bias")}
    scores = {name: group_sums(graph.group(name), absolute) for name in GROUPS}
    grid = Grid(model, Splits(data), {name: s.argsort(descending=True) for name, s in scores.items() if s is not None})
    start = time.monotonic()

    def report(done: int, of: int) -> None:
        print(f"{done}/{of} after {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    table = grid.run(report)
    levels = list(itertools.product(range(len(KEPT)), repeat=len(GROUPS)))
    cost = graph.cost()
    costs = np.array([
        (c.macs, c.params)
        for chosen in levels
        for c in [graph.cost({g: round(graph.group(g).size * KEPT[i]) for g, i in zip(GROUPS, chosen, strict=True)})]
    ])  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        options.output,
        groups=np.array(GROUPS),
        kept=np.array(KEPT),
        correct=table,
        images=np.array(grid.splits.sizes[1:]),
        macs=costs[:, 0].reshape(table.shape[:-1]).astype(np.uint32),
        params=costs[:, 1].reshape(table.shape[:-1]).astype(np.uint32),
        dense=np.array([cost.macs, cost.params]),
        **{f"scores.{name}": s.numpy().astype(np.float32) for name, s in scores.items() if s is not None},
    )
    for chosen in random.Random(0).sample(levels, 25):
        masked, found = grid.masked(graph, chosen), table[chosen].tolist()
        assert max(abs(one - two) for one, two in zip(masked, found, strict=True)) <= 1, (chosen, masked, found)
    print(f"{len(levels)} subnets, dense validation {table[(0,) * len(GROUPS)][0] / grid.splits.sizes[1]:.4f}, "
          f"{options.output.stat().st_size / 1024:.0f} KiB, {time.monotonic() - start:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main()
