"""Batches from arrays in memory: no worker processes, no copies of what is not used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class Images(Protocol):
    """Images that are indexed by an index tensor; a tensor is one, so is :class:`DecodedOnUse`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> Tensor: ...


class DecodedOnUse:
    """Images decoded when first asked for, then kept as bytes.

    Parameters
    ----------
    decode
        Function from an index (int) to an array ``[channels, height, width]`` of uint8.
    count
        Number of images.
    shape
        ``(channels, height, width)``.
    keep_bytes
        Above this size, in bytes, nothing is kept and each use decodes again.
    """

    def __init__(self, decode: Any, count: int, shape: tuple[int, int, int], keep_bytes: int = 2 << 30) -> None:
        self.decode, self.count, self.shape = decode, count, shape
        keep = count * int(np.prod(shape)) <= keep_bytes
        self.store = torch.empty((count, *shape), dtype=torch.uint8) if keep else None
        self.ready = np.zeros(count, dtype=bool)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Tensor) -> Tensor:
        if self.store is None:
            return torch.from_numpy(np.stack([self.decode(int(item)) for item in index]))
        for item in index.numpy()[~self.ready[index.numpy()]]:
            self.store[int(item)] = torch.from_numpy(self.decode(int(item)))
            self.ready[item] = True
        return self.store[index]


class ArrayLoader:
    """Batches ``(images, targets)`` of one split.

    The order of an epoch depends on the seed and the number of the epoch alone, so that a resumed training sees
    the same batches: :meth:`set_epoch` names the epoch, else each pass is the next one.

    Parameters
    ----------
    images
        ``[n, ...]``, uint8 or float; uint8 is scaled to [0, 1].
    targets
        ``[n]`` or ``[n, ...]``.
    index
        Which of them are in this split.
    batch_size
        Images in a batch. A last training batch of one image is left out: batch norm cannot train on it.
    mean, std
        Normalisation per channel, after scaling.
    shuffle, augment, seed
        Training only: a new order each epoch, random crops (``crop``: padded by an eighth) and flips
        (``crop_flip``).
    """

    def __init__(
        self,
        images: Images,
        targets: Tensor,
        index: Tensor,
        batch_size: int,
        *,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        shuffle: bool = False,
        augment: str = "none",
        seed: int = 0,
    ) -> None:
        self.images, self.targets, self.index = images, targets, index
        self.batch_size, self.shuffle, self.augment, self.seed = batch_size, shuffle, augment, seed
        self.mean = None if mean is None else torch.tensor(mean).view(-1, 1, 1)
        self.std = None if std is None else torch.tensor(std).view(-1, 1, 1)
        self.epoch = 0

    def __len__(self) -> int:
        whole, rest = divmod(len(self.index), self.batch_size)
        return whole + (rest > (1 if self.shuffle and whole else 0))

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next pass is."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        self.epoch += 1
        index = self.index
        if self.shuffle:
            index = index[torch.randperm(len(index), generator=generator)]
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            part = index[start : start + self.batch_size]
            images = self.images[part]
            if self.augment != "none":
                images = augmented(images, generator, flip=self.augment == "crop_flip")
            yield self.normalised(images), self.targets[part]

    def normalised(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            images = images.float().div_(255)
        if self.mean is not None and self.std is not None:
            images = (images - self.mean) / self.std
        return images


def augmented(images: Tensor, generator: torch.Generator, flip: bool) -> Tensor:
    """Shift each image by up to an eighth of its size, zeros coming in, and flip half of them.

    Parameters
    ----------
    images
        ``[batch, channels, height, width]``.
    generator
        Source of the random numbers.
    flip
        Flip left to right, too.
    """
    count, _, height, width = images.shape
    pad = max(1, height // 8)
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    shift = torch.randint(0, 2 * pad + 1, (2, count, 1), generator=generator)
    rows = shift[0] + torch.arange(height)
    columns = shift[1] + torch.arange(width)
    if flip:
        turned = torch.rand((count, 1), generator=generator) < 0.5
        columns = torch.where(turned, columns.flip(1), columns)
    batch = torch.arange(count).view(-1, 1, 1)
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def map_tensors(value: Any, function: Any) -> Any:
    """Apply a function to every tensor in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, function) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, function) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    return value


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Take a batch apart into inputs and target.

    ``(inputs, target)``, where inputs is a tensor, a tuple of positional or a dictionary of keyword arguments;
    ``(a, b, ..., target)``; or a dictionary with the key ``labels``, ``label`` or ``target``.
    """
    if isinstance(batch, dict):
        key = next((name for name in ("labels", "label", "target") if name in batch), None)
        return {name: item for name, item in batch.items() if name != key}, None if key is None else batch[key]
    if isinstance(batch, (list, tuple)) and len(batch) > 2:
        return tuple(batch[:-1]), batch[-1]
    if isinstance(batch, (list, tuple)) and len(batch) == 2:
        return batch[0], batch[1]
    return batch, None


def apply(model: torch.nn.Module, inputs: Any) -> Any:
    """Call a model as the inputs ask: a tensor, positional arguments or keyword arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, (list, tuple)):
        return model(*inputs)
    return model(inputs)
