"""Latency of one input, measured so that two models can be compared."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from nni_plugins.training.loaders import apply


@torch.no_grad()
def latency_ms(
    model: nn.Module, inputs: Any, threads: int = 1, warmup: int = 10, runs: int = 50, seconds: float = 1.0
) -> float:
    """Measure the time of a forward pass that nothing interrupts.

    Trials measure while others train beside them. A pass that has to wait for a processor says nothing of the model,
    and under load most of them do; the quickest tenth does not.

    Parameters
    ----------
    model
        Measured in evaluation mode; its mode is put back.
    inputs
        One batch (of one input, for the latency that is meant by default), on the model's device.
    threads
        CPU threads while measuring; the setting is put back.
    warmup, runs
        Passes that do not count and that do; at least 5 count.
    seconds
        No further pass starts after this time.

    Returns
    -------
    float
        The tenth percentile of the passes, in milliseconds.
    """
    modes = [(module, module.training) for module in model.modules()]
    before = torch.get_num_threads()
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    model.eval()
    torch.set_num_threads(threads)
    times: list[float] = []
    end = time.perf_counter() + seconds
    try:
        for index in range(warmup + runs):
            start = time.perf_counter()
            apply(model, inputs)
            if on_gpu:
                torch.cuda.synchronize()
            now = time.perf_counter()
            if index >= warmup or now > end:
                times.append(1000 * (now - start))
            if now > end and len(times) >= 5:
                break
    finally:
        torch.set_num_threads(before)
        for module, mode in modes:
            module.training = mode
    return sorted(times)[len(times) // 10]


@torch.no_grad()
def in_turns(
    models: Sequence[nn.Module], inputs: Any, threads: int = 1, turns: int = 300, seconds: float = 1.5
) -> list[float]:
    """Measure models one after the other, many times over, so that whatever disturbs one disturbs all.

    Parameters
    ----------
    models
        Measured in evaluation mode, in which they are left.
    inputs
        One batch, on the models' device.
    threads
        CPU threads while measuring. With one, the time that the thread had a processor counts.
    turns
        How many times each is measured, at most.
    seconds
        For each model: no further turn starts after this time; at least 5 are taken.

    Returns
    -------
    list of float
        Milliseconds of each: the median of its faster half.
    """
    from nni_plugins.channels.latency.clock import typical

    before = torch.get_num_threads()
    on_gpu = any(parameter.is_cuda for model in models for parameter in model.parameters())
    now = time.thread_time if threads == 1 and not on_gpu else time.perf_counter
    times: list[list[float]] = [[] for _ in models]
    torch.set_num_threads(threads)
    end = time.perf_counter() + seconds * len(models)
    try:
        for model in models:
            model.eval()
            for _ in range(3):
                apply(model, inputs)
        for turn in range(turns):
            if turn >= 5 and time.perf_counter() > end:
                break
            for model, taken in zip(models, times, strict=True):
                apply(model, inputs)  # with its own weights in the caches again
                if on_gpu:
                    torch.cuda.synchronize()
                start = now()
                apply(model, inputs)
                if on_gpu:
                    torch.cuda.synchronize()
                taken.append(now() - start)
    finally:
        torch.set_num_threads(before)
    return [1000 * typical(taken) for taken in times]
