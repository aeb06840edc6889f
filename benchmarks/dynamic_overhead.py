"""What dynamic sparse training costs beside training under a fixed mask, at ΔT = 100.

``python benchmarks/dynamic_overhead.py``. The two runs are interleaved step by step, so that both see the same machine.
Time is the process's own (CPU seconds, one thread), since the machine may be shared. Each 100 steps of both give one
ratio; the result is the median of them. Beside it stands the time spent in the pruner's own code, which is less noisy
but leaves out what its hooks cost the backward pass.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nni
import torch
from nni.compression import TorchEvaluator
from sklearn.datasets import load_digits
from torch import nn

from nni_plugins.pruners import DynamicSparsePruner, MagnitudeWeightPruner
from nni_plugins.report.environment import environment


def network(width: int = 16) -> nn.Module:
    """A CNN for digits."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.Conv2d(2 * width, 4 * width, 3, padding=1, bias=False), nn.BatchNorm2d(4 * width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10),
    )  # fmt: skip


class Run:
    """A training that is advanced by hand, so that two can take turns."""

    def __init__(self, width: int, batch: int, dynamic: dict[str, Any] | None, total: int):
        data = load_digits()
        images = torch.tensor(data.images, dtype=torch.float32)[:, None]
        self.images, self.labels, self.batch = (images - images.mean()) / images.std(), torch.tensor(data.target), batch
        self.model, self.step = network(width), 0
        optimizer = nni.trace(torch.optim.SGD)(self.model.parameters(), lr=0.01, momentum=0.9)
        evaluator = TorchEvaluator(lambda *_: None, optimizer, lambda *_: None)
        config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.8}]
        if dynamic is None:
            pruner: Any = MagnitudeWeightPruner(self.model, config, evaluator, density="erk")
            pruner.compress()
        else:
            pruner = DynamicSparsePruner(self.model, config, evaluator, total, end_fraction=1.0, **dynamic)
        self.pruner = pruner
        evaluator.bind_model(self.model, pruner._get_param_names_map())
        pruner._fuse_preprocess(evaluator)
        self.optimizer = evaluator._optimizers[0]

    def advance(self, steps: int = 1) -> float:
        """Make some steps; return the CPU seconds that they took."""
        began = time.process_time()
        for _ in range(steps):
            at = self.step * self.batch % (len(self.images) - self.batch)
            self.optimizer.zero_grad()
            output = self.model(self.images[at : at + self.batch])
            nn.functional.cross_entropy(output, self.labels[at : at + self.batch]).backward()
            self.optimizer.step()
            self.step += 1
        return time.process_time() - began


def dynamic_overhead(
    pairs: int = 12, every: int = 100, width: int = 16, batch: int = 64, **dynamic: Any
) -> dict[str, Any]:
    """Overhead of a dynamic mask, as a fraction of the time under a fixed one.

    Parameters
    ----------
    pairs : int
        How often both runs make ``every`` steps; the dynamic one updates once in each.
    every : int
        ΔT.
    width, batch : int
        Of the network and its minibatches.
    **dynamic
        Arguments of DynamicSparsePruner.

    Returns
    -------
    dict
        ``overhead``, the median over pairs; ``pairs``, each one's; ``ms_per_step`` under the fixed mask; ``updates``.
    """
    torch.set_num_threads(1)
    total = (pairs + 2) * every
    fixed, moving = Run(width, batch, None, total), Run(width, batch, {"update_every": every, **dynamic}, total)
    own = _timed(moving.pruner)
    for run in (fixed, moving):
        run.advance(every // 2)  # warm up; the update lies in the middle of each pair
    own.clear()
    ratios, plain = [], []
    for _ in range(pairs):
        seconds = {fixed: 0.0, moving: 0.0}
        for turn in range(every):
            for run in (fixed, moving) if turn % 2 == 0 else (moving, fixed):
                seconds[run] += run.advance()
        ratios.append(seconds[moving] / seconds[fixed] - 1)
        plain.append(seconds[fixed] / every)
    return {
        "overhead": statistics.median(ratios),
        "pairs": [round(ratio, 4) for ratio in ratios],
        "ms_per_step": 1000 * statistics.median(plain),
        "own_code": sum(own) / (pairs * every * statistics.median(plain)),
        "updates": moving.pruner.updates,
    }


def _timed(pruner: Any) -> list[float]:
    """Seconds that the pruner's task after each step takes, as they come."""
    task, seconds = pruner._update, []
    prepare = pruner._prepare_next

    def timed(function: Any) -> Any:
        def run() -> None:
            began = time.process_time()
            function()
            seconds.append(time.process_time() - began)

        return run

    pruner._update, pruner._prepare_next = timed(task), timed(prepare)
    return seconds


if __name__ == "__main__":
    found = {
        name: dynamic_overhead(**options)
        for name, options in {
            "rigl, erk": {}, "set, erk": {"method": "set"}, "rigl, global": {"density": "global"},
            "rigl, 2:4": {"pattern": "2:4"},
        }.items()
    }  # fmt: skip
    for name, result in found.items():
        print(
            f"{name:14} {100 * result['overhead']:+6.2f} % (own code {100 * result['own_code']:.2f} %) of "
            f"{result['ms_per_step']:.2f} ms a step, ΔT = 100"
        )
    print(json.dumps({**found, "environment": environment()}))
