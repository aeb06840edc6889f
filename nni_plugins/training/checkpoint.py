"""Everything that training depends on, in one file that is replaced whole: a crash leaves the old or the new one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nni_plugins.files import write_whole
from nni_plugins.training.errors import CompressionError, first_line


def seed_everything(seed: int) -> None:
    """Seed the random numbers of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: Any,
    loader: Any,
    epoch: int,
    metric: float | None,
) -> None:
    """Write the state after an epoch."""
    state = {
        "epoch": epoch,
        "metric": metric,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "random": _random_state(),
        "loader": [generator.get_state() for generator in _generators(loader)],
    }
    write_whole(path, lambda part: torch.save(state, part))


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any, loader: Any
) -> tuple[int, float | None]:
    """Put everything back as it was; return the epochs done and the metric then.

    Raises
    ------
    CompressionError
        A file that cannot be read, or that belongs to another model.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        for generator, saved in zip(_generators(loader), state["loader"], strict=True):
            generator.set_state(saved)
        _set_random_state(state["random"])
    except Exception as error:  # torch raises a dozen kinds for files that are cut or foreign
        raise CompressionError(
            f"{path} cannot be resumed from ({first_line(error)}); delete it to start afresh"
        ) from error
    return state["epoch"], state["metric"]


def _generators(loader: Any) -> list[torch.Generator]:
    places = (loader, getattr(loader, "sampler", None))
    found = [getattr(place, "generator", None) for place in places]
    unique = {id(generator): generator for generator in found if isinstance(generator, torch.Generator)}
    return list(unique.values())


def _random_state() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
