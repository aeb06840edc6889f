"""Digits, and nni evaluators that train on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's digits, float [1797, 1, 8, 8] of mean 0 and deviation 1, and labels [1797]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None]
    return (images - images.mean()) / images.std(), torch.tensor(data.target)


@pytest.fixture
def make_evaluator(digits: tuple[Tensor, Tensor]) -> Callable[..., Any]:
    """An nni TorchEvaluator with a real training loop on digits; its ``steps`` list records how long it trained."""
    import nni
    from nni.compression import TorchEvaluator

    images, labels = digits

    def make(
        model: nn.Module, *, rate: float = 0.01, batch: int = 64, dummy: bool = True, images: Tensor = images
    ) -> Any:
        steps: list[int] = []

        def train(model, optimizer, training_step, scheduler=None, max_steps=None, max_epochs=None):
            model.train()
            total = max_steps if max_steps is not None else (max_epochs or 1) * (len(images) // batch)
            for step in range(total):
                at = step * batch % (len(images) - batch)
                optimizer.zero_grad()
                training_step((images[at : at + batch], labels[at : at + batch]), model).backward()
                optimizer.step()
            steps.append(total)
            model.eval()

        def training_step(batch, model):
            return nn.functional.cross_entropy(model(batch[0]), batch[1])

        optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=rate, momentum=0.9)
        evaluator = TorchEvaluator(train, optimizer, training_step, dummy_input=images[:2] if dummy else None)
        evaluator.steps = steps
        return evaluator

    return make
