"""A model that keeps learning and pruning, on a stream that drifts: digits that rotate slowly.

    python benchmarks/hybrid_drift.py [--seeds 5] [--steps 3000] [--density 0.1] [--angle 180] [--plot FILE]

Two nets see the same stream, a batch a step, and learn from it in the same way; every 100 steps each is tested on
images that it never sees, turned by the angle of that moment. Both are trained on upright digits first and then reach
half the MACs and the same density of weights in the same 300 steps, by HybridPruner. From there on one keeps its masks
(pruned once), while the other goes on exchanging weights (``lasting=0.1``). MACs and active weights are the same
throughout; what is compared is the mean accuracy over the stream.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.nn import functional

from nni_plugins.channels import ChannelGraph
from nni_plugins.pruners import HybridPruner
from nni_plugins.report.environment import environment
from nni_plugins.training.datasets import digits

WARM, RAMP, EVERY = 300, 300, 100


def turned(images: Tensor, degrees: float) -> Tensor:
    """Images [n, 1, h, w] turned about their centre."""
    angle = torch.tensor(degrees).deg2rad()
    table = torch.tensor([[angle.cos(), -angle.sin(), 0.0], [angle.sin(), angle.cos(), 0.0]])
    grid = functional.affine_grid(table.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def network() -> nn.Module:
    """A CNN that sees where strokes are: no pooling over the whole image."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


def stream(lasting: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One net's way along the stream: its accuracies, MACs and active weights."""
    source = digits(None, 0.2, 0, None)
    images, labels = torch.as_tensor(source.fit.images), source.fit.labels
    seen, (_, held) = source.train_index, source.test()
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=options.rate, momentum=0.9, weight_decay=1e-4)

    def learn(degrees: float) -> None:
        chosen = seen[torch.randint(len(seen), (32,), generator=draw)]
        optimizer.zero_grad()
        functional.cross_entropy(model(turned(images[chosen], degrees)), labels[chosen]).backward()
        optimizer.step()

    model.train()
    for _ in range(WARM):
        learn(0.0)
    config = [{"op_types": ["Conv2d", "Linear"], "exclude_op_names": ["9"], "sparse_ratio": 0.5}]
    pruner = HybridPruner(
        model, config, None, RAMP, optimizer=optimizer, dummy_input=images[:1], target="macs",
        density=options.density, lasting=lasting, update_every=20,
    )  # fmt: skip
    for _ in range(RAMP):
        learn(0.0)
        pruner.step()
    accuracy = []
    for step in range(options.steps):
        degrees = options.angle * step / options.steps
        learn(degrees)
        pruner.step()
        if (step + 1) % EVERY == 0:
            model.eval()
            with torch.no_grad():
                found = model(turned(images[held], degrees)).argmax(1)
            accuracy.append(float((found == labels[held]).float().mean()))
            model.train()
    masks = [m for targets in pruner.get_masks().values() for m in targets.values() if m is not None]
    return {
        "accuracy": accuracy,
        "macs": ChannelGraph.watch(model, images[:1]).cost().macs,
        "active": sum(int(m.sum()) for m in masks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--angle", type=float, default=180.0)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds = {"pruned once": 0.0, "goes on exchanging": 0.1}
    rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for seed in range(options.seeds):
        for kind, lasting in kinds.items():
            rows[kind].append(stream(lasting, seed, options))
        means = {kind: 100 * statistics.mean(found[-1]["accuracy"]) for kind, found in rows.items()}
        same = {(found[-1]["macs"], found[-1]["active"]) for found in rows.values()}
        print(
            f"seed {seed}: " + ", ".join(f"{k} {v:.2f}%" for k, v in means.items()) + f"; MACs, weights {same}",
            flush=True,
        )
    pairs = zip(*(rows[kind] for kind in kinds), strict=True)
    gains = [100 * (statistics.mean(b["accuracy"]) - statistics.mean(a["accuracy"])) for a, b in pairs]
    spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
    print(f"paired gain over the stream: {statistics.mean(gains):+.2f} ± {spread:.2f} points")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "gains": gains, "machine": environment()}) + "\n")
    if options.plot:
        draw(rows, options, options.plot)


def draw(rows: dict[str, list[dict[str, Any]]], options: argparse.Namespace, path: Path) -> None:
    """Mean accuracy over the seeds against the angle."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    for kind, found in rows.items():
        means = [100 * statistics.mean(values) for values in zip(*(row["accuracy"] for row in found), strict=True)]
        panel.plot([options.angle * (i + 1) / len(means) for i in range(len(means))], means, label=kind)
    panel.set(xlabel="angle of the stream, degrees", ylabel="accuracy on unseen digits, %")
    panel.legend()
    panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
