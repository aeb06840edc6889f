"""Time of a speedup against depth: residual nets of 50 to 1,000 layers, half of every prunable group.

    python benchmarks/depth.py [--depths 50 100 200 500 1000] [--repeats 3] [--json FILE]

Each net is a ResNet of bottleneck blocks (He et al. 2016) of widths 16 to 64 on 32 x 32 images, so that what is timed
is the graph and not the arithmetic. The speedup is ``ModelSpeedup`` on ready masks, proof apart. The exponent is the
slope of log(time) against log(operators), by least squares over all depths: 1 is linear.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from pathlib import Path
from time import process_time

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import nn

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.speedup import ModelSpeedup


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.short = None
        if stride != 1 or inputs != outputs:
            self.short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output."""
        y = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        return torch.relu(self.bn3(self.conv3(y)) + (x if self.short is None else self.short(x)))


def resnet(depth: int) -> nn.Module:
    """A net of about ``depth`` layers: a stem, three stages of bottlenecks of 3 layers each, a classifier."""
    blocks = max(3, round((depth - 2) / 3))
    stages = [blocks // 3 + (1 if stage < blocks % 3 else 0) for stage in range(3)]
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    inputs = 16
    for stage, count in enumerate(stages):
        width = 16 * 2**stage
        for block in range(count):
            layers.append(Bottleneck(inputs, width, 2 if stage and not block else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10)).eval()


def measure(depth: int) -> dict[str, float]:
    """CPU seconds of a watch and of a speedup without its proof."""
    torch.manual_seed(0)
    model, x = resnet(depth), torch.randn(1, 3, 32, 32)
    start = process_time()
    graph = ChannelGraph.watch(model, x)
    watch = process_time() - start
    kept = {g.name: range((g.size + 1) // 2) for g in graph.groups if g.prunable and g.exact}
    masks, operators = Plan(graph, kept).masks(model), len(graph.trace.operators)
    del graph
    start = process_time()
    speedup = ModelSpeedup(model, x, masks, verify=False)
    speedup.speedup_model()
    return {"operators": operators, "groups": len(kept), "watch_s": watch, "speedup_s": process_time() - start}


def exponent(rows: list[dict[str, float]], key: str) -> float:
    """Slope of log time against log operators."""
    x, y = (np.log([row[name] for row in rows]) for name in ("operators", key))
    return float(np.polyfit(x, y, 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[50, 100, 200, 500, 1000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, 1 thread, CPU seconds, torch {torch.__version__}, Python {platform.python_version()}")
    measure(20)  # what is imported and compiled once
    rows = []
    print(f"{'depth':>6}{'operators':>11}{'groups':>8}{'watch s':>9}{'speedup s':>11}{'ms/operator':>13}")
    for depth in options.depths:
        runs = [measure(depth) for _ in range(options.repeats)]
        row = {"depth": depth, **{key: statistics.median(run[key] for run in runs) for key in runs[0]}}
        rows.append(row)
        per = 1e3 * row["speedup_s"] / row["operators"]
        print(
            f"{depth:6}{row['operators']:11.0f}{row['groups']:8.0f}{row['watch_s']:9.2f}{row['speedup_s']:11.2f}{per:13.2f}",
            flush=True,
        )
    exponents = {key: exponent(rows, key) for key in ("watch_s", "speedup_s")}
    print("exponent: " + ", ".join(f"{key.removesuffix('_s')} {value:.2f}" for key, value in exponents.items()))
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "exponents": exponents}, indent=1) + "\n")


if __name__ == "__main__":
    main()
