"""The methods: each takes a trained net to half its MACs, within the budget of epochs that all of them share.

A method is a function of the dense model, the data, the plan of the fine-tuning, the seed, a folder for its
checkpoints and a log. It returns the compact ``model``, how many of the plan's ``epochs`` it has used, and
what it wants to be known. A method may change the model that it is given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nni
import torch
from nni.compression import TorchEvaluator
from torch import nn

from benchmarks.cifar.data import Cifar
from benchmarks.cifar.nets import EXAMPLE
from benchmarks.cifar.training import DECAY, MOMENTUM, Plan, resume_extra, train
from nni_plugins.channels import ChannelGraph
from nni_plugins.pruners import (
    HybridPruner,
    L0Pruner,
    MagnitudePruner,
    RandomPruner,
    SynapticStrengthPruner,
    TaylorPruner,
)
from nni_plugins.speedup import ModelSpeedup

SPEEDUP = 2.0
DENSE_EPOCHS = 20
CONFIG = [{"op_types": ["Conv2d"], "sparse_ratio": 1 - 1 / SPEEDUP}]
PRUNE_EPOCHS = 2
"""Of the budget: while they last, methods that train may prune."""
TIMES = 10
BATCHES = 30
"""Minibatches that Torch-Pruning's Taylor scores are made of; they cost it nothing of its budget."""

Log = Callable[[str], None]


def at_once(maker: Any, **arguments: Any) -> Any:
    """One of our pruners, before the fine-tuning."""

    def method(model: nn.Module, data: Cifar, plan: Plan, seed: int, place: Path, log: Log) -> dict[str, Any]:
        if maker is RandomPruner:
            arguments["seed"] = seed
        pruner = maker(model, CONFIG, dummy_input=EXAMPLE, target="macs", scope="global", **arguments)
        return {**_compacted(pruner, model), "epochs": 0}

    return method


def while_training(maker: Any, **arguments: Any) -> Any:
    """One of our pruners, iterated within the first epochs of the fine-tuning."""

    def method(model: nn.Module, data: Cifar, plan: Plan, seed: int, place: Path, log: Log) -> dict[str, Any]:
        epochs = min(PRUNE_EPOCHS, plan.epochs)
        steps = epochs * len(data.training(seed))
        if maker is L0Pruner:
            how: dict[str, Any] = {"training_steps": steps, "seed": seed}
        else:
            times = min(TIMES, steps)
            how = {"schedule": {"shape": "cubic", "times": times, "interval_steps": steps // times}}
        evaluator, held = _evaluator(model, data, plan, seed, place / "pruning.pt", epochs, log)
        pruner = held["pruner"] = maker(model, CONFIG, evaluator, target="macs", scope="global", **how, **arguments)
        resume_extra(pruner, place / "pruning.pt")
        return {**_compacted(pruner, model, max_epochs=epochs), "epochs": epochs, "seconds": held["seconds"]}

    return method


def in_one_run(**arguments: Any) -> Any:
    """HybridPruner on a net that is drawn anew: one training as long as dense training and fine-tuning together."""

    def method(model: nn.Module, data: Cifar, plan: Plan, seed: int, place: Path, log: Log) -> dict[str, Any]:
        whole = Plan(epochs=DENSE_EPOCHS + plan.epochs, rate=0.1, warmup=1.0)
        _draw_anew(model, seed)
        evaluator, held = _evaluator(model, data, whole, seed, place / "pruning.pt", whole.epochs, log)
        steps = whole.epochs * len(data.training(seed))
        pruner = held["pruner"] = HybridPruner(model, CONFIG, evaluator, steps, target="macs", **arguments)
        resume_extra(pruner, place / "pruning.pt")
        pruner.compress(max_steps=steps)
        kept = {name: module.out_channels for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
        nonzero = sum(int((p != 0).sum()) for p in model.parameters())
        found = {"kept": kept, "nonzero": nonzero, "epochs": whole.epochs, "plan": whole, "seconds": held["seconds"]}
        return {"model": model, **found}

    return method


def by_kernels(model: nn.Module, data: Cifar, plan: Plan, seed: int, place: Path, log: Log) -> dict[str, Any]:
    """SynapticStrengthPruner: half of all kernels, whole channels among them, the rest fine-tuned under the masks.

    A kernel that is gone inside a channel that stays saves nothing on kernels that run dense: ``live_macs`` counts the
    kernels that are left, ``macs`` what the compact model computes.
    """
    evaluator, held = _evaluator(model, data, plan, seed, place / "pruning.pt", plan.epochs, log)
    steps = min(PRUNE_EPOCHS, plan.epochs) * len(data.training(seed))
    pruner = held["pruner"] = SynapticStrengthPruner(model, CONFIG, evaluator, steps)
    resume_extra(pruner, place / "pruning.pt")
    found = _compacted(pruner, model, max_epochs=plan.epochs)
    modules = ChannelGraph.watch(found["model"], EXAMPLE).cost().modules
    live = 0.0
    for name, module in found["model"].named_modules():
        if isinstance(module, nn.Conv2d):
            live += modules[name][0] * float((module.weight != 0).flatten(2).any(dim=2).float().mean())
    return {**found, "live_macs": live, "epochs": plan.epochs, "seconds": held["seconds"]}


def _evaluator(
    model: nn.Module, data: Cifar, plan: Plan, seed: int, checkpoint: Path, epochs: int, log: Log
) -> tuple[TorchEvaluator, dict[str, Any]]:
    """NNI's evaluator over the benchmark's training; the pruner is put into the dictionary beside it."""
    held: dict[str, Any] = {}

    def training(
        model: Any, optimizer: Any, training_step: Any, scheduler: Any = None, max_steps: Any = None,
        max_epochs: Any = None,
    ) -> None:  # fmt: skip
        held["seconds"] = train(
            model, data, plan, seed, checkpoint=checkpoint, last=epochs, optimizer=optimizer,
            loss_of=training_step, extra=held["pruner"], log=log,
        )  # fmt: skip

    def training_step(batch: Any, model: nn.Module) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    settings = {"lr": plan.rate, "momentum": MOMENTUM, "nesterov": True, "weight_decay": DECAY}
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), **settings)
    return TorchEvaluator(training, optimizer, training_step, dummy_input=EXAMPLE), held


def _compacted(pruner: Any, model: nn.Module, **length: Any) -> dict[str, Any]:
    _, masks = pruner.compress(**length)
    pruner.unwrap_model()
    model.eval()
    speedup = ModelSpeedup(model, EXAMPLE, masks)
    compact = speedup.speedup_model()
    assert speedup.plan is not None
    kept = {name: len(units) for name, units in speedup.plan.kept.items()}
    return {"model": compact, "kept": kept, "error": speedup.report.max_error}


def torch_pruning(importance: str) -> Any:
    """Torch-Pruning's pruner with a group importance, global ranking, its ratio bisected to the MACs asked for."""

    def method(model: nn.Module, data: Cifar, plan: Plan, seed: int, place: Path, log: Log) -> dict[str, Any]:
        import torch_pruning

        model.eval()
        gradients = _gradients(model, data, seed) if importance == "taylor" else {}
        dense = ChannelGraph.watch(model, EXAMPLE).cost().macs

        def pruned(ratio: float) -> tuple[nn.Module, float]:
            trial = copy.deepcopy(model)
            for name, parameter in trial.named_parameters():
                parameter.grad = gradients[name].clone() if gradients else None
            score = (
                torch_pruning.importance.GroupTaylorImportance()
                if importance == "taylor"
                else torch_pruning.importance.GroupMagnitudeImportance(p=2)
            )
            pruner = torch_pruning.pruner.BasePruner(
                trial, EXAMPLE, score, global_pruning=True, pruning_ratio=ratio, ignored_layers=[trial.fc]
            )
            pruner.step()
            trial.zero_grad()
            return trial, ChannelGraph.watch(trial, EXAMPLE).cost().macs / dense

        low, high = 0.0, 0.95
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (low, middle) if pruned(middle)[1] <= 1 / SPEEDUP else (middle, high)
        compact, _ = pruned(high)
        kept = {name: module.out_channels for name, module in compact.named_modules() if isinstance(module, nn.Conv2d)}
        return {"model": compact, "kept": kept, "epochs": 0, "ratio": high, "torch_pruning": torch_pruning.__version__}

    return method


def _gradients(model: nn.Module, data: Cifar, seed: int) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for index, (images, labels) in enumerate(data.training(seed)):
        if index == BATCHES:
            break
        nn.functional.cross_entropy(model(images), labels).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def from_scratch(model: nn.Module, data: Cifar, plan: Plan, seed: int, place: Path, log: Log) -> dict[str, Any]:
    """The net that the contender found, drawn anew and trained for as many MACs as dense training and fine-tuning."""
    found = torch.load(place.with_name(place.name.replace("scratch", "taylor")) / "pruned.pt", weights_only=False)
    _draw_anew(found["model"], seed)
    whole = Plan(epochs=round(DENSE_EPOCHS * SPEEDUP) + plan.epochs, rate=0.1, warmup=1.0)
    return {"model": found["model"], "kept": found["kept"], "epochs": 0, "plan": whole}


def _draw_anew(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()


METHODS: dict[str, Any] = {
    "taylor": while_training(TaylorPruner, normalise="cost"),
    "magnitude": at_once(MagnitudePruner),
    "random": at_once(RandomPruner),
    "torch-pruning-magnitude": torch_pruning("magnitude"),
    "torch-pruning-taylor": torch_pruning("taylor"),
    "l0": while_training(L0Pruner),
    "synaptic": by_kernels,
    "hybrid": in_one_run(),
    "hybrid-channels": in_one_run(density=1.0),
    "scratch": from_scratch,
}
"""By name. ``taylor`` is the contender."""
