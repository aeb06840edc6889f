"""One training recipe for everyone: SGD with Nesterov momentum, a cosine, crops and flips, resumed by epochs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.cifar.data import Cifar, atomically

MOMENTUM, DECAY = 0.9, 5e-4


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train: the rate warms up over ``warmup`` epochs and falls as a cosine to 0."""

    epochs: int
    rate: float
    warmup: float = 0.0

    def rate_at(self, step: int, per_epoch: int) -> float:
        """Learning rate of an optimizer step (from 0)."""
        first, total = self.warmup * per_epoch, self.epochs * per_epoch
        if step < first:
            return self.rate * (step + 1) / first
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - first) / (total - first)))


def layout_of(model: nn.Module) -> torch.memory_format:
    """Return channels_last, which is faster on a CPU, unless the net has what torch cannot do in it.

    The backward pass of a strided 1x1 convolution of less than 8 channels writes where it must not (torch 2.13 and
    2.14 on x86-64: "double free or corruption").
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    bad = any(c.kernel_size == (1, 1) and c.stride != (1, 1) and c.in_channels < 8 for c in convolutions)
    return torch.contiguous_format if bad else torch.channels_last


def make_optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum and weight decay."""
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY)


def train(
    model: nn.Module,
    data: Cifar,
    plan: Plan,
    seed: int,
    *,
    checkpoint: Path | None = None,
    first: int = 0,
    last: int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    loss_of: Callable[[Any, nn.Module], torch.Tensor] | None = None,
    extra: Any = None,
    log: Callable[[str], None] = print,
) -> float:
    """Train in place for epochs ``first`` to ``last`` of a plan; return the seconds it took, earlier tries included.

    Parameters
    ----------
    checkpoint
        Written after each epoch, continued from where it exists.
    optimizer, loss_of
        Given by NNI's evaluator where a pruner watches the training.
    extra
        A pruner, whose state belongs to the checkpoint; it was loaded by :func:`resume_extra`.
    """
    loader, last = data.training(seed), plan.epochs if last is None else last
    layout = layout_of(model)
    model.to(memory_format=layout)
    optimizer = make_optimizer(model, plan.rate) if optimizer is None else optimizer
    loss_of = loss_of or (lambda batch, model: nn.functional.cross_entropy(model(batch[0]), batch[1]))
    epoch, spent = first, 0.0
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        epoch, spent = state["epoch"], state["seconds"]
    while epoch < last:
        begin, total = time.monotonic(), 0.0
        model.train()
        loader.set_epoch(epoch)
        for index, (images, labels) in enumerate(loader):
            for group in optimizer.param_groups:
                group["lr"] = plan.rate_at(epoch * len(loader) + index, len(loader))
            optimizer.zero_grad()
            loss = loss_of((images.contiguous(memory_format=layout), labels), model)
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        epoch += 1
        spent += time.monotonic() - begin
        if not math.isfinite(total):
            raise FloatingPointError(f"the loss is not finite in epoch {epoch}")
        if checkpoint is not None:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch, "seconds": spent}
            if extra is not None:
                state["extra"] = extra.state_dict()
            atomically(checkpoint, lambda path, state=state: torch.save(state, path))  # type: ignore[misc]
        log(f"epoch {epoch}/{plan.epochs}: loss {total / len(loader):.4f}, {spent:.0f} s in all")
    return spent


def resume_extra(extra: Any, checkpoint: Path) -> None:
    """Give a pruner the state that its checkpoint holds, if there is one."""
    if checkpoint.exists():
        extra.load_state_dict(torch.load(checkpoint, weights_only=True)["extra"])


@torch.no_grad()
def accuracy(model: nn.Module, data: Cifar, split: str) -> float:
    """Return the share of a split that is classified right."""
    model.eval()
    layout = layout_of(model)
    right = count = 0
    for images, labels in data.held_out(split):
        right += int((model(images.contiguous(memory_format=layout)).argmax(1) == labels).sum())
        count += len(labels)
    return right / count
