"""Wall time of HybridPruner with live compaction beside dense training, at the same number of steps.

    python benchmarks/hybrid_cost.py [--width 32] [--steps 400] [--batch 64] [--repeats 3] [--threads 1]

A residual net of widths from 32 on random 32 x 32 images (time does not depend on what they show). Dense and hybrid
training run in turns in one process. The arithmetic limit is the mean over all steps of the share of MACs that the
ramp leaves at that step, as it was in the hybrid run: what would be reached if time were MACs and pruning free.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from nni_plugins.channels import ChannelGraph
from nni_plugins.pruners import HybridPruner
from nni_plugins.report.environment import environment


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.short = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride != 1 or inputs != outputs else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (x if self.short is None else self.short(x)))


def network(width: int) -> nn.Module:
    """A ResNet-8 of the CIFAR family."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10),
    )  # fmt: skip


def train(options: argparse.Namespace, hybrid: bool) -> dict[str, Any]:
    """One training; seconds, and the share of MACs at each step."""
    model = network(options.width).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, options.batch, 3, 32, 32, generator=generator).contiguous()
    images = [part.contiguous(memory_format=torch.channels_last) for part in images]
    labels = torch.randint(10, (8, options.batch), generator=generator)
    whole = ChannelGraph.watch(model, images[0][:1]).cost().macs
    pruner = None
    start = time.perf_counter()
    if hybrid:
        config = [{"op_types": ["Conv2d"], "sparse_ratio": 1 - 1 / options.fewer}]
        pruner = HybridPruner(
            model, config, None, options.steps, optimizer=optimizer, dummy_input=images[0][:1], target="macs",
            density=options.density,
        )  # fmt: skip
    left = []
    for step in range(options.steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[step % 8]), labels[step % 8]).backward()
        optimizer.step()
        if pruner is not None:
            pruner.step()
            left.append(pruner.plan.cost().macs / whole)
    seconds = time.perf_counter() - start
    if pruner is None:
        return {"seconds": seconds}
    # what the ramp asks at each step, against what live compaction has taken out by then
    return {"seconds": seconds, "limit": statistics.mean(left), "macs": left[-1], "compactions": pruner.compactions}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fewer", type=float, default=2.0, help="times fewer MACs at the end")
    parser.add_argument("--density", type=float, default=1.0, help="of the weights in the channels that are left")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pairs = []
    for _ in range(options.repeats):
        dense, hybrid = train(options, False), train(options, True)
        pairs.append({**hybrid, "dense_seconds": dense["seconds"], "ratio": hybrid["seconds"] / dense["seconds"]})
        print(
            f"dense {dense['seconds']:.1f} s, hybrid {hybrid['seconds']:.1f} s: {pairs[-1]['ratio']:.3f}; "
            f"limit of the ramp {hybrid['limit']:.3f}; {100 * hybrid['macs']:.1f}% of the MACs in the end, "
            f"{hybrid['compactions']} compactions",
            flush=True,
        )
    print(f"median ratio {statistics.median(pair['ratio'] for pair in pairs):.3f}")
    if options.json:
        options.json.write_text(json.dumps({"pairs": pairs, "machine": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
