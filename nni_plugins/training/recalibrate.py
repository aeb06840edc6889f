"""Batch-norm recalibration: statistics afresh, from training batches, as a plain mean over them."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nni_plugins.training.loaders import apply, split_batch
from nni_plugins.training.loop import Loop


@torch.no_grad()
def recalibrate(model: nn.Module, loop: Loop, batches: int) -> int:
    """Reset the statistics of every batch norm and set them to their mean over training batches.

    Parameters
    ----------
    model
        Changed in place: ``running_mean``, ``running_var`` and ``num_batches_tracked`` of batch norms, nothing else.
        Other layers (dropout) stay in evaluation mode meanwhile.
    loop
        Gives the batches, always those of its first epoch, and the device.
    batches
        How many; fewer where the training split has fewer.

    Returns
    -------
    int
        Batches used; 0 where there is no batch norm with statistics.

    Notes
    -----
    Cumulative averages (``momentum=None``), as in Li et al., "EagleEye" (2020).
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms or batches <= 0:
        return 0
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    train: Any = loop.data.train
    model.eval()
    used = 0
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.training = True
        if hasattr(train, "set_epoch"):
            train.set_epoch(0)
        for batch in islice(train, batches):
            inputs, _ = split_batch(loop.place(batch))
            apply(model, inputs)
            used += 1
    finally:
        for module, mode in modes:
            module.training = mode
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return used
