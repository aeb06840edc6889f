"""CIFAR-10: decoded once into a file of bytes, split by a fixed seed, and read in batches."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nni_plugins.training.datasets import cifar10, stratified
from nni_plugins.training.loaders import ArrayLoader

VALIDATION = 0.1
SPLIT_SEED = 0
BATCH = 128
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def atomically(path: Path, write: object) -> None:
    """Call ``write(path)`` on a neighbour of ``path`` and move that into place: a reader sees all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        write(part)  # type: ignore[operator]
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@dataclass
class Cifar:
    """The training split, cut into what is trained on and what choices are made on; the test split apart."""

    images: Tensor
    labels: Tensor
    train: Tensor
    validation: Tensor
    test_images: Tensor
    test_labels: Tensor

    def training(self, seed: int, batch: int = BATCH) -> ArrayLoader:
        """Batches in an order that depends on seed and epoch alone; shifted by up to 4 pixels and flipped."""
        return ArrayLoader(
            self.images,
            self.labels,
            self.train,
            batch,
            mean=MEAN,
            std=STD,
            shuffle=True,
            augment="crop_flip",
            seed=seed,
        )

    def held_out(self, split: str) -> ArrayLoader:
        """Batches of ``validation`` or ``test``."""
        if split == "test":
            index = torch.arange(len(self.test_labels))
            return ArrayLoader(self.test_images, self.test_labels, index, 500, mean=MEAN, std=STD)
        return ArrayLoader(self.images, self.labels, self.validation, 500, mean=MEAN, std=STD)


def load(source: Path, cache: Path, limit: int | None = None) -> Cifar:
    """Read CIFAR-10.

    Parameters
    ----------
    source
        A ``.npz`` of JPEG streams, or torchvision's ``cifar-10-batches-py``.
    cache
        Folder for the decoded bytes.
    limit
        Train on so many images only (for tests).
    """
    name = f"cifar10-{source.name}-{source.stat().st_size}.npz"
    if not (cache / name).exists():
        parts = {}
        read = cifar10(source, VALIDATION, SPLIT_SEED, None)
        for split, part in (("train", read.fit), ("test", read.test()[0])):
            parts[f"{split}_images"] = part.images[torch.arange(len(part.labels))].numpy()
            parts[f"{split}_labels"] = part.labels.numpy()
        atomically(cache / name, lambda path: np.savez(path, **parts))
    with np.load(cache / name) as file:
        tensors = {key: torch.from_numpy(file[key]) for key in file.files}
    labels = tensors["train_labels"]
    train, validation = stratified(labels, torch.arange(len(labels)), VALIDATION, SPLIT_SEED + 1)
    if limit is not None and limit < len(train):
        train = stratified(labels, train, limit / len(train), SPLIT_SEED)[1]
    return Cifar(tensors["train_images"], labels, train, validation, tensors["test_images"], tensors["test_labels"])
