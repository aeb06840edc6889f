"""Every pruner on digits: test accuracy after one budget of training, beside magnitude, random and from scratch.

    python benchmarks/digits_pruners.py [--seeds 5] [--nets cnn mlp] [--methods magnitude taylor ...] [--results FILE]
    python benchmarks/digits_pruners.py --table [--plot FILE]

A dense net is trained for 400 steps. Each method then has 400 steps more, pruning included; what it does not
use while pruning is fine-tuning of the compact model, or under the masks; the learning rate falls along one cosine over
both (a lottery ticket's over each round, as its rewinding asks). Structured methods reach 50% and 75% fewer
MACs, by removed channels; those of single weights and kernels reach 80%, 90% and 95% sparsity of the weights. From
scratch trains the net that magnitude leaves (for weights: under a random mask) from new weights for all 800 steps. The
test split is read once, after the last step; nothing was chosen by it. Every run is a line of the results file, and
is not made again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import nni
import torch
from nni.compression import TorchEvaluator
from torch import Tensor, nn

from nni_plugins import pruners
from nni_plugins.channels import ChannelGraph
from nni_plugins.report.environment import environment
from nni_plugins.speedup import ModelSpeedup
from nni_plugins.training.datasets import digits

DENSE, BUDGET, BATCH = 400, 400, 64
RATE, FINE_RATE = 0.05, 0.02
RESULTS = ROOT / "benchmarks" / "results" / "digits_pruners.jsonl"
MACS, WEIGHTS = (0.5, 0.75), (0.8, 0.9, 0.95)


def cnn() -> nn.Module:
    """Three convolutions."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def mlp() -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


NETS: dict[str, Callable[[], nn.Module]] = {"cnn": cnn, "mlp": mlp}
LAYERS = {"cnn": ["Conv2d"], "mlp": ["Linear"]}


class Task:
    """Batches of digits in an order that a seed gives, and the test split."""

    def __init__(self, seed: int) -> None:
        source = digits(None, 0.2, 0, None)
        images = (torch.as_tensor(source.fit.images) - source.mean[0]) / source.std[0]
        self.images, self.labels = images[source.train_index], source.fit.labels[source.train_index]
        _, index = source.test()
        self._test = images[index], source.fit.labels[index]
        self._generator = torch.Generator().manual_seed(seed)

    def batch(self) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(self.images), (BATCH,), generator=self._generator)
        return self.images[chosen], self.labels[chosen]

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        model.eval()
        return float((model(self._test[0]).argmax(1) == self._test[1]).float().mean())


def train(
    model: nn.Module, task: Task, steps: int, rate: float, masks: dict[str, Tensor] | None = None, begun: int = 0
) -> None:
    """SGD with momentum along a cosine, of which some steps are over; masked weights are held at 0."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    held = [(model.get_parameter(name), mask) for name, mask in (masks or {}).items()]
    model.train()
    for step in range(begun, steps):
        _set_rate(optimizer, rate, step / steps)
        optimizer.zero_grad()
        images, labels = task.batch()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        with torch.no_grad():
            for weight, mask in held:
                weight.mul_(mask)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float, time: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * (1 + math.cos(math.pi * time)) / 2


class Counted:
    """An evaluator that counts the steps it trains for; its rate falls over the budget, or over each training."""

    def __init__(self, model: nn.Module, task: Task, restarts: bool = False) -> None:
        self.steps = 0

        def training(model, optimizer, training_step, scheduler=None, max_steps=None, max_epochs=None):
            model.train()
            for step in range(max_steps):
                _set_rate(optimizer, FINE_RATE, step / max_steps if restarts else self.steps / BUDGET)
                optimizer.zero_grad()
                training_step(task.batch(), model).backward()
                optimizer.step()
                self.steps += 1

        optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=FINE_RATE, momentum=0.9, weight_decay=5e-4)
        step = lambda batch, model: nn.functional.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
        self.evaluator = TorchEvaluator(training, optimizer, step, dummy_input=task.images[:2])


def _named(masks: Any) -> dict[str, Tensor]:
    return {f"{m}.{n}": mask for m, targets in masks.items() for n, mask in targets.items() if mask is not None}


def structured(maker: str, seeded: bool = False, **arguments: Any) -> Callable[..., dict[str, Any]]:
    """A method that removes channels."""

    def method(net: str, model: nn.Module, task: Task, sparsity: float, seed: int) -> dict[str, Any]:
        dense = ChannelGraph.watch(model, task.images[:2]).cost().macs
        config, counted = [{"op_types": LAYERS[net], "sparse_ratio": sparsity}], Counted(model, task)
        given = {**arguments, **({"seed": seed} if seeded else {}), "target": "macs", "scope": "global"}
        pruner = pruners.PRUNERS[maker](model, config, counted.evaluator, **given)
        _, masks = pruner.compress()
        pruner.unwrap_model()
        ModelSpeedup(model, task.images[:2], masks).speedup_model()
        train(model, task, BUDGET, FINE_RATE, begun=counted.steps)
        left = ChannelGraph.watch(model, task.images[:2]).cost().macs
        return {"accuracy": task.accuracy(model), "left": left / dense, "steps": max(counted.steps, BUDGET)}

    return method


def unstructured(maker: str, restarts: bool = False, **arguments: Any) -> Callable[..., dict[str, Any]]:
    """A method that removes weights or kernels."""

    def method(net: str, model: nn.Module, task: Task, sparsity: float, seed: int) -> dict[str, Any]:
        config, counted = [{"op_types": LAYERS[net], "sparse_ratio": sparsity}], Counted(model, task, restarts)
        pruner = pruners.PRUNERS[maker](model, config, counted.evaluator, **arguments)
        _, masks = pruner.compress()
        pruner.unwrap_model()
        held = _named(masks)
        with torch.no_grad():
            for name, mask in held.items():
                model.get_parameter(name).mul_(mask)
        train(model, task, BUDGET, FINE_RATE, held, begun=counted.steps)
        return {"accuracy": task.accuracy(model), "left": _left(net, model), "steps": max(counted.steps, BUDGET)}

    return method


def _left(net: str, model: nn.Module) -> float:
    weights = [m.weight for m in model.modules() if type(m).__name__ in LAYERS[net]]
    return sum(int((w != 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def scratch_channels(net: str, model: nn.Module, task: Task, sparsity: float, seed: int) -> dict[str, Any]:
    """The net that magnitude leaves, from new weights, for all the steps."""
    dense = ChannelGraph.watch(model, task.images[:2]).cost().macs
    config = [{"op_types": LAYERS[net], "sparse_ratio": sparsity}]
    pruner = pruners.MagnitudePruner(model, config, dummy_input=task.images[:2], target="macs", scope="global")
    _, masks = pruner.compress()
    pruner.unwrap_model()
    ModelSpeedup(model, task.images[:2], masks).speedup_model()
    torch.manual_seed(1000 + seed)
    _renew(model)
    train(model, task, DENSE + BUDGET, RATE)
    left = ChannelGraph.watch(model, task.images[:2]).cost().macs
    return {"accuracy": task.accuracy(model), "left": left / dense, "steps": DENSE + BUDGET}


def scratch_weights(net: str, model: nn.Module, task: Task, sparsity: float, seed: int) -> dict[str, Any]:
    """New weights under a random mask of equal layers, for all the steps."""
    torch.manual_seed(1000 + seed)
    _renew(model)
    chosen = [f"{name}.weight" for name, module in model.named_modules() if type(module).__name__ in LAYERS[net]]
    masks = {}
    for name in chosen:
        weight = model.get_parameter(name)
        order = torch.randperm(weight.numel())
        masks[name] = torch.zeros(weight.numel()).index_fill_(
            0, order[: max(1, round((1 - sparsity) * weight.numel()))], 1
        )
        masks[name] = masks[name].view_as(weight)
    train(model, task, DENSE + BUDGET, RATE, masks)
    return {"accuracy": task.accuracy(model), "left": _left(net, model), "steps": DENSE + BUDGET}


def _renew(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def lottery(rewind: str) -> Callable[..., dict[str, Any]]:
    """Four rounds within the budget; the fraction of a round follows from the sparsity."""

    def method(net: str, model: nn.Module, task: Task, sparsity: float, seed: int) -> dict[str, Any]:
        rounds = 4
        fraction = 1 - (1 - sparsity) ** (1 / rounds)
        made = unstructured("lottery_ticket", True, total_steps=BUDGET // (rounds + 1), rewind=rewind,
                            fraction=fraction, rounds=rounds, rewind_step=0)  # fmt: skip
        return made(net, model, task, sparsity, seed)

    return method


STRUCTURED: dict[str, Callable[..., dict[str, Any]]] = {
    "magnitude": structured("magnitude"),
    "random": structured("random", seeded=True),
    "from scratch": scratch_channels,
    "taylor": structured("taylor", seeded=True, training_steps=20, schedule={"shape": "linear", "times": 10}),
    "l0": structured("l0", seeded=True, training_steps=300),
    "hybrid": structured("hybrid", total_steps=BUDGET, density=1.0),
    "hybrid, half the weights": structured("hybrid", total_steps=BUDGET),
}
UNSTRUCTURED: dict[str, Callable[..., dict[str, Any]]] = {
    "weight magnitude": unstructured("weight_magnitude", scope="global"),
    "random from scratch": scratch_weights,
    "weight gradient": unstructured("weight_gradient", training_steps=30, scope="global"),
    "SET": unstructured("dynamic_sparse", total_steps=BUDGET, method="set", update_every=20),
    "RigL": unstructured("dynamic_sparse", total_steps=BUDGET, method="rigl", update_every=20),
    "ITOP": unstructured("dynamic_sparse", total_steps=BUDGET, method="itop"),
    "synaptic strength": unstructured("synaptic", training_steps=300),
    "lottery, weights rewound": lottery("weights"),
    "lottery, rates rewound": lottery("learning_rate"),
}


def dense(net: str, seed: int) -> tuple[nn.Module, Task, float]:
    """A trained dense net; the same for every method."""
    torch.manual_seed(seed)
    model, task = NETS[net](), Task(seed)
    train(model, task, DENSE, RATE)
    return model, task, task.accuracy(model)


def run_all(options: argparse.Namespace) -> None:
    known = {_key(row) for row in read(options.results)}
    options.results.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seeds):
        for net in options.nets:
            wanted = [
                (name, sparsity)
                for methods, sparsities in ((STRUCTURED, MACS), (UNSTRUCTURED, WEIGHTS))
                for name in methods
                for sparsity in sparsities
                if (not options.methods or name in options.methods) and (net, name, sparsity, seed) not in known
            ]
            if not wanted:
                continue
            model, task, before = dense(net, seed)
            for name, sparsity in wanted:
                start = time.process_time()
                torch.manual_seed(seed)
                task._generator.manual_seed(10_000 + seed)
                method = {**STRUCTURED, **UNSTRUCTURED}[name]
                try:
                    found = method(net, copy.deepcopy(model), task, sparsity, seed)
                except (pruners.PruningError, pruners.BudgetError) as error:
                    found = {"failed": str(error)}
                row = {"net": net, "method": name, "sparsity": sparsity, "seed": seed, "dense": before, **found,
                       "seconds": round(time.process_time() - start, 2), "machine": environment()}  # fmt: skip
                with options.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                shown = found.get("failed") or f"{found['accuracy']:.4f}, {100 * found['left']:.1f}% left"
                print(f"{net} seed {seed} {name} {sparsity}: {shown} ({row['seconds']} s)", flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _key(row: dict[str, Any]) -> tuple:
    return row["net"], row["method"], row["sparsity"], row["seed"]


def _cell(rows: list[dict[str, Any]]) -> str:
    done = [100 * row["accuracy"] for row in rows if "accuracy" in row]
    if not done:
        return "not reached" if rows else ""
    spread = f" ± {statistics.stdev(done):.1f}" if len(done) > 1 else ""
    return f"{statistics.mean(done):.1f}{spread}"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a table for each net and kind; mean and standard deviation over seeds, in percent."""
    parts = []
    for net in dict.fromkeys(row["net"] for row in rows):
        own = [row for row in rows if row["net"] == net]
        before = {row["seed"]: 100 * row["dense"] for row in own}
        parts.append(f"### {net}: dense {statistics.mean(before.values()):.1f}, {len(before)} seeds\n")
        for title, methods, sparsities in (("fewer MACs", STRUCTURED, MACS), ("fewer weights", UNSTRUCTURED, WEIGHTS)):
            parts.append("| method | " + " | ".join(f"{100 * s:.0f}% {title}" for s in sparsities) + " |")
            parts.append("|---|" + "---|" * len(sparsities))
            for name in methods:
                cells = [_cell([r for r in own if (r["method"], r["sparsity"]) == (name, s)]) for s in sparsities]
                parts.append(f"| {name} | " + " | ".join(cells) + " |")
            parts.append("")
    return "\n".join(parts)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against sparsity, a panel for each net and kind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    nets = list(dict.fromkeys(row["net"] for row in rows))
    figure = Figure(figsize=(11, 4.2 * len(nets)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(nets), 2, squeeze=False)
    for line, net in zip(panels, nets, strict=True):
        kinds = ((STRUCTURED, "MACs removed"), (UNSTRUCTURED, "weights removed"))
        for panel, (methods, label) in zip(line, kinds, strict=True):
            for name in methods:
                own = [r for r in rows if (r["net"], r["method"]) == (net, name) and "accuracy" in r]
                points = {s: [r["accuracy"] for r in own if r["sparsity"] == s] for s in {r["sparsity"] for r in own}}
                if points:
                    x = sorted(points)
                    control = name in ("magnitude", "random", "from scratch", "weight magnitude", "random from scratch")
                    panel.plot(x, [100 * statistics.mean(points[s]) for s in x], "--" if control else "-", marker="o",
                               label=name)  # fmt: skip
            panel.set(title=net, xlabel=label, ylabel="test accuracy, %")
            panel.legend(fontsize=7)
            panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--methods", nargs="+", choices=[*STRUCTURED, *UNSTRUCTURED], default=[])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the tables of the results file")
    parser.add_argument("--plot", type=Path, help="draw them there")
    options = parser.parse_args()
    if options.table or options.plot:
        rows = read(options.results)
        if options.table:
            print(table(rows))
        if options.plot:
            plot(rows, options.plot)
        return
    torch.set_num_threads(1)
    run_all(options)
    failed = [row for row in read(options.results) if not math.isfinite(row.get("accuracy", math.nan))]
    for row in failed:
        print(f"failed: {row['net']} {row['method']} {row['sparsity']}: {row.get('failed')}")


if __name__ == "__main__":
    main()
