"""Several processes in one training: each takes its part of every batch, and all keep the same weights.

Started by ``torchrun`` (``python -m torch.distributed.run --standalone --nproc_per_node 2 -m nni_plugins.trial
recipe.yml``). Every process reads the same batches and computes on its part; gradients are averaged, weighted by the
parts' sizes, so that a step is that of the whole batch but for batch norm, which normalises each part (as
DistributedDataParallel does). The model is not wrapped: pruners and live compaction see it as it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugins.pruners.ranks import distributed
from nni_plugins.training.loaders import map_tensors


def rank() -> int:
    """The number of this process; 0 where it is alone, or the first."""
    return torch.distributed.get_rank() if distributed() else 0


def started_together() -> tuple[int, int]:
    """Rank and number of processes, as ``torchrun`` gives them in the environment; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined() -> Iterator[int]:
    """Be one process of the group that ``torchrun`` started, if it did; yields the rank."""
    own, count = started_together()
    if count == 1:
        yield 0
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        yield own
    finally:
        torch.distributed.destroy_process_group()


def lost_another(error: BaseException) -> bool:
    """Whether an error says no more than that another process of the group is gone."""
    if started_together()[1] == 1:
        return False
    words = f"{type(error).__name__}: {error}".lower()
    return any(word in words for word in ("gloo", "nccl", "closed by peer", "reset by peer", "distnetworkerror"))


def part_of(batch: Any) -> tuple[Any, float]:
    """This process's part of a batch, and its share of the items.

    A batch with fewer than two items for each process (batch norms need two), or one whose tensors do not agree on
    their number, is taken whole by each.
    """
    if not distributed():
        return batch, 1.0
    count, own = torch.distributed.get_world_size(), rank()
    sizes: set[int] = set()

    def note(tensor: Tensor) -> Tensor:
        sizes.add(tensor.shape[0] if tensor.ndim else -1)
        return tensor

    map_tensors(batch, note)
    if len(sizes) != 1 or (items := sizes.pop()) < 2 * count:
        return batch, 1.0 / count
    begin, end = items * own // count, items * (own + 1) // count
    return map_tensors(batch, lambda tensor: tensor[begin:end]), (end - begin) / items


@torch.no_grad()
def sum_gradients(model: nn.Module, share: float) -> None:
    """Replace every gradient by the sum over processes, each weighted by its `share` of the batch."""
    if not distributed():
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for kind in dict.fromkeys((gradient.dtype, gradient.device) for gradient in gradients):
        group = [gradient for gradient in gradients if (gradient.dtype, gradient.device) == kind]
        flat = torch.cat([gradient.reshape(-1) for gradient in group]) * share
        torch.distributed.all_reduce(flat)
        for gradient, whole in zip(group, flat.split([gradient.numel() for gradient in group]), strict=True):
            gradient.copy_(whole.view_as(gradient))


@torch.no_grad()
def agree_on_buffers(model: nn.Module) -> None:
    """Average what each process has seen by itself, such as the statistics of batch norms."""
    if not distributed():
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            mean: Tensor = buffer.contiguous().clone()
            torch.distributed.all_reduce(mean)
            buffer.copy_(mean / torch.distributed.get_world_size())


@torch.no_grad()
def begin_alike(model: nn.Module) -> None:
    """Give every process the parameters and buffers of the first."""
    if not distributed():
        return
    for tensor in [*model.parameters(), *model.buffers()]:
        value = tensor.detach().contiguous()
        torch.distributed.broadcast(value, 0)
        tensor.copy_(value)
