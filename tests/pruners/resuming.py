"""A training run that is cut in the middle and goes on from a file, beside one that is not cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nni
import torch
from nni.compression import TorchEvaluator
from torch import Tensor, nn


class Cut(Exception):
    """Raised by the training at the step where it is cut."""


def run(
    make_model: Callable[[], nn.Module],
    make_pruner: Callable[[nn.Module, Any], Any],
    digits: tuple[Tensor, Tensor],
    path: Path,
    *,
    save_at: int | None = None,
    resume: bool = False,
    rate: float = 0.02,
    batch: int = 32,
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], Any]:
    """Train and prune: from the start, or on from the file; return the weights, the masks and the pruner."""
    images, labels = digits
    model = make_model()
    state = torch.load(path, weights_only=True) if resume else None
    held: dict[str, Any] = {}

    def train(model, optimizer, training_step, scheduler=None, max_steps=None, max_epochs=None):
        model.train()
        begin = 0
        if state is not None:
            begin = state["step"]
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        for step in range(begin, begin + max_steps):
            at = step * batch % (len(images) - batch)
            optimizer.zero_grad()
            training_step((images[at : at + batch], labels[at : at + batch]), model).backward()
            optimizer.step()
            if step + 1 == save_at:
                saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({**saved, "pruner": held["pruner"].state_dict(), "step": step + 1}, path)
                raise Cut

    def training_step(batch, model):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-3)
    evaluator = TorchEvaluator(train, optimizer, training_step, dummy_input=images[:2])
    pruner = held["pruner"] = make_pruner(model, evaluator)
    if state is not None:
        pruner.load_state_dict(state["pruner"])
    try:
        _, masks = pruner.compress()
    except Cut:
        return {}, {}, pruner
    pruner.unwrap_model()
    return {name: value.clone() for name, value in model.state_dict().items()}, masks, pruner


def assert_resumes(
    make_model: Callable[[], nn.Module],
    make_pruner: Callable[[nn.Module, Any], Any],
    digits: tuple[Tensor, Tensor],
    path: Path,
    at: int,
) -> None:
    """Training cut after step ``at`` and resumed ends in the weights and masks of one that is not cut, to the last bit."""
    weights, masks, whole = run(make_model, make_pruner, digits, path)
    run(make_model, make_pruner, digits, path, save_at=at)
    resumed, resumed_masks, pruner = run(make_model, make_pruner, digits, path, resume=True)
    assert list(resumed) == list(weights)
    different = [name for name, value in weights.items() if not torch.equal(value, resumed[name])]
    assert not different
    assert any((mask == 0).any() for targets in masks.values() for mask in targets.values() if mask is not None)
    for module, targets in masks.items():
        for target, mask in targets.items():
            other = resumed_masks[module][target]
            assert (mask is None and other is None) or torch.equal(mask, other), (module, target)
    assert pruner.finished
    assert whole.finished
