"""CIFAR-10: what the pruners keep of a residual net's accuracy at half its MACs, beside Torch-Pruning.

    python benchmarks/cifar10.py dense --seed 0 --data cifar10.npz
    python benchmarks/cifar10.py prune --method taylor --seed 0 --data cifar10.npz
    python benchmarks/cifar10.py table

A dense net of the CIFAR family (ResNet-8 by default) is trained for 20 epochs. Each method then takes it to 2.0
times fewer MACs, within one budget: 6 epochs of training in all, those that a method needs to make up its mind
included, under one schedule of the learning rate. Methods are compared on the same dense nets and the same order of
batches (paired by seed). A tenth of the training images is held out for choices; the test images are read once,
after the last epoch.

**The contender**, named before any of these runs: ``taylor``, which is our TaylorPruner with global scope and target
MACs, iterated (ten cubic steps within the first two of the six epochs, the exponential average between them). Its
scores are the default, Σ(w·dL/dw)², divided by the MACs that a unit costs: of the first-order ones, those agree best
with the leave-one-out oracle on digits (``benchmarks/taylor_oracle.py``).

Everything can be stopped and started again: it goes on after the last whole epoch. Results are one JSON each in
``benchmarks/results/cifar10``; nets and checkpoints lie in the cache (``--cache``, by default ~/.cache/nni-plugins).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.cifar import data as cifar_data
from benchmarks.cifar.nets import EXAMPLE, resnet
from benchmarks.cifar.training import Plan, accuracy, train
from nni_plugins.channels import ChannelGraph

RESULTS = ROOT / "benchmarks" / "results" / "cifar10"
DENSE = Plan(epochs=20, rate=0.1, warmup=1.0)
FINE_TUNE = Plan(epochs=6, rate=0.05)


def main(arguments: list[str] | None = None) -> int:
    """Run one step of the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=("dense", "prune", "table"))
    parser.add_argument("--method", help="of prune: see benchmarks/cifar/methods.py")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=os.environ.get("CIFAR10"), help="or the variable CIFAR10")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "nni-plugins")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--epochs", type=int, default=DENSE.epochs)
    parser.add_argument("--fine-tune-epochs", type=int, default=FINE_TUNE.epochs)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, help="train on so many images only")
    options = parser.parse_args(arguments)
    if options.step == "table":
        from benchmarks.cifar.table import write_table

        return write_table(options.results)
    if options.data is None:
        parser.error("no data: give --data, or set CIFAR10, to a .npz of JPEG streams or cifar-10-batches-py")
    torch.set_num_threads(options.threads)
    data = cifar_data.load(options.data, options.cache, options.limit)
    if options.step == "dense":
        dense(options, data)
        return 0
    from benchmarks.cifar.methods import METHODS

    if options.method not in METHODS:
        parser.error(f"--method is {options.method}; it must be one of {', '.join(METHODS)}")
    prune(options, data, METHODS[options.method])
    return 0


def folder(options: argparse.Namespace) -> Path:
    """Where the checkpoints of this net, seed and budget lie."""
    widths = "-".join(map(str, options.widths))
    extra = "" if options.limit is None else f"-limit{options.limit}"
    return (
        options.cache / "cifar10-runs" / f"resnet{options.depth}-{widths}-e{options.epochs}{extra}" / str(options.seed)
    )


def dense(options: argparse.Namespace, data: cifar_data.Cifar) -> torch.nn.Module:
    """Train the dense net, or read it."""
    place = folder(options)
    torch.manual_seed(options.seed)
    model = resnet(options.depth, options.widths)
    plan = Plan(options.epochs, DENSE.rate, DENSE.warmup)
    seconds = train(model, data, plan, options.seed, checkpoint=place / "dense.pt", log=say("dense", options.seed))
    report(options, data, model, "dense", plan, seconds, {})
    return model


def prune(options: argparse.Namespace, data: cifar_data.Cifar, method: Any) -> None:
    """Bring the dense net of this seed to half its MACs by a method, fine-tune, and test."""
    if written(options, options.method):
        return
    model = dense(options, data)
    dense_macs = ChannelGraph.watch(model, EXAMPLE).cost().macs
    plan = Plan(options.fine_tune_epochs, FINE_TUNE.rate, FINE_TUNE.warmup)
    place = folder(options) / f"{options.method}-f{plan.epochs}"
    log = say(options.method, options.seed)
    pruned = place / "pruned.pt"
    if pruned.exists():
        found = torch.load(pruned, weights_only=False)
    else:
        begin = time.monotonic()
        found = method(model, data, plan, options.seed, place, log)
        found.setdefault("seconds", time.monotonic() - begin)
        cifar_data.atomically(pruned, lambda path: torch.save(found, path))
    compact = found["model"]
    plan = found.get("plan", plan)
    share = ChannelGraph.watch(compact, EXAMPLE).cost().macs / dense_macs
    log(f"{share:.4f} of the MACs, from epoch {found['epochs']}")
    seconds = train(
        compact, data, plan, options.seed, checkpoint=place / "tuned.pt", first=found["epochs"], log=log
    )  # fmt: skip
    extra = {"dense_macs": dense_macs, **{key: found[key] for key in found if key not in ("model", "plan", "seconds")}}
    report(options, data, compact, options.method, plan, found["seconds"] + seconds, extra)


def written(options: argparse.Namespace, method: str) -> Path | None:
    """The result's file, if it is there."""
    path = options.results / f"{method}-seed{options.seed}.json"
    return path if path.exists() else None


def report(
    options: argparse.Namespace, data: cifar_data.Cifar, model: torch.nn.Module, method: str, plan: Plan,
    seconds: float, extra: dict[str, Any],
) -> None:  # fmt: skip
    """Test, once, and write the result."""
    if written(options, method):
        return
    cost = ChannelGraph.watch(model, EXAMPLE).cost()
    result = {
        "method": method,
        "seed": options.seed,
        "test_accuracy": accuracy(model, data, "test"),
        "validation_accuracy": accuracy(model, data, "validation"),
        "macs": cost.macs,
        "params": cost.params,
        "seconds": round(seconds, 1),
        "threads": options.threads,
        "torch": torch.__version__,
        "net": f"ResNet-{options.depth}, widths {options.widths}",
        "training": asdict(plan),
        "finished": time.strftime("%Y-%m-%d %H:%M"),
        **extra,
    }
    path = options.results / f"{method}-seed{options.seed}.json"
    text = json.dumps(result, indent=1) + "\n"
    cifar_data.atomically(path, lambda part: part.write_text(text, encoding="utf-8"))
    say(method, options.seed)(f"test {result['test_accuracy']:.4f}, validation {result['validation_accuracy']:.4f}")


def say(method: str, seed: int) -> Any:
    """Return a function that prints a line with the time, the method and the seed."""
    return lambda line: print(f"{time.strftime('%H:%M:%S')} {method} {seed}: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
