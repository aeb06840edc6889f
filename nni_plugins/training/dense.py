"""The dense baseline: trained once for all trials that share it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nni_plugins.files import write_whole
from nni_plugins.pruners.ranks import as_on_rank_zero, distributed
from nni_plugins.training.checkpoint import seed_everything
from nni_plugins.training.data import Data, build_data
from nni_plugins.training.errors import CompressionError
from nni_plugins.training.loop import Loop
from nni_plugins.training.measure import latency_ms
from nni_plugins.training.models import build_model
from nni_plugins.training.processes import rank
from nni_plugins.training.recipe import Recipe
from nni_plugins.training.weights import load_weights, save_weights

WEIGHTS, RECORD, CHECKPOINT = "weights.safetensors", "baseline.json", "checkpoint.pt"


@dataclass(frozen=True)
class DenseBaseline:
    """The dense model that compact ones are compared with.

    Attributes
    ----------
    path
        Its weights (safetensors).
    accuracy
        ``train.metric`` on validation, after the last epoch.
    macs, params
        Of one input.
    latency_ms
        Of one input on one CPU thread (or on the GPU that trains).
    """

    path: Path
    accuracy: float
    macs: int
    params: int
    latency_ms: float
    metric: str = "accuracy"
    seconds: float = 0.0

    @property
    def bytes(self) -> int:
        """Size of the file of its weights."""
        return self.path.stat().st_size


def prepare_dense(recipe: Recipe, folder: str | Path, log: Callable[[str], Any] = print) -> DenseBaseline:
    """Train the dense model of a recipe, or read it where it has been trained already.

    Recipes that agree in seed, model, data and train share one baseline. The first process to come trains it; the
    others wait for it and read. If the first dies, the lock falls, and the next continues from its last epoch.

    Parameters
    ----------
    recipe
        With ``model.checkpoint``, those weights are the dense model and nothing is trained.
    folder
        Where baselines are kept, one subfolder each.
    log
        Called with one line at a time.

    Raises
    ------
    RecipeError, CompressionError
        With a reason of one line.
    """
    from filelock import FileLock, Timeout

    from nni_plugins.training.prune import NONE, check_prune

    if recipe.prune.pruner != NONE:
        check_prune(recipe)  # what it says wrongly need not wait for the training
    home = as_on_rank_zero(Path(folder)) / recipe.dense_key()
    home.mkdir(parents=True, exist_ok=True)
    if distributed():
        return _make_together(recipe, home, log)
    found = read_dense(home)
    if found is not None:
        return found
    lock = FileLock(str(home.with_suffix(".lock")))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log("waiting for the dense baseline, which another trial is training")
        lock.acquire()
    try:
        home.mkdir(exist_ok=True)
        return read_dense(home) or _make(recipe, home, log)
    except BaseException:
        with contextlib.suppress(OSError):  # what failed before it trained leaves nothing
            home.rmdir()
            Path(lock.lock_file).unlink()
        raise
    finally:
        lock.release()


def _make_together(recipe: Recipe, home: Path, log: Callable[[str], Any]) -> DenseBaseline:
    """Train it in all processes of a group; the first one alone writes it."""
    import tempfile

    from filelock import FileLock

    lock = FileLock(str(home.with_suffix(".lock")))
    if rank() == 0:
        lock.acquire()
    try:
        if as_on_rank_zero(read_dense(home) is not None):
            found = read_dense(home)
            assert found is not None
            return found
        with tempfile.TemporaryDirectory() as scratch:
            made = _make(recipe, home if rank() == 0 else Path(scratch), log)
            made = as_on_rank_zero(made)  # its latency is what the first one measured
            torch.distributed.barrier()
            return made
    finally:
        if rank() == 0:
            lock.release()


def read_dense(home: Path) -> DenseBaseline | None:
    """Return the baseline in a folder, or None where there is none that is whole."""
    try:
        record = json.loads((home / RECORD).read_text(encoding="utf-8"))
        baseline = DenseBaseline(path=home / WEIGHTS, **record["baseline"])
        return baseline if baseline.path.stat().st_size == record["bytes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def dense_model(recipe: Recipe, data: Data, path: Path) -> nn.Module:
    """Build the dense model with the weights of a file."""
    model = build_model(recipe, data.shape, data.classes, recipe.seed)
    load_weights(model, path)
    return model


def _make(recipe: Recipe, home: Path, log: Callable[[str], Any]) -> DenseBaseline:
    start = time.monotonic()
    data = build_data(recipe)
    loop = Loop(recipe, data, "dense training")
    if recipe.model.checkpoint is not None:
        model = dense_model(recipe, data, recipe.path_of(recipe.model.checkpoint))
        log(f"dense model: weights of {recipe.model.checkpoint}")
        model = loop.place(model)
    else:
        model = loop.place(build_model(recipe, data.shape, data.classes, recipe.seed))
        seed_everything(recipe.seed)
        epochs = recipe.train.epochs
        log(f"dense model: training {recipe.model.name} for {epochs} epochs")
        loop.train(
            model,
            loop.optimizer(model),
            checkpoint=home / CHECKPOINT,
            on_epoch=lambda epoch, value: log(f"dense epoch {epoch}/{epochs}: {loop.metric.name} {value:.4f}"),
        )
    accuracy = loop.evaluate(model)
    if not math.isfinite(accuracy):
        raise CompressionError(f"dense model: {loop.metric.name} is {accuracy} on the validation split")
    from nni_plugins.channels import ChannelGraph

    example = loop.place(data.example)
    cost = ChannelGraph.watch(model, example).cost()
    baseline = DenseBaseline(
        path=home / WEIGHTS,
        accuracy=accuracy,
        macs=int(cost.macs),
        params=int(cost.params),
        latency_ms=latency_ms(model, example),
        metric=loop.metric.name,
        seconds=round(time.monotonic() - start, 3),
    )
    save_weights(model, baseline.path)
    record = dataclasses.asdict(baseline)
    del record["path"]
    text = json.dumps({"baseline": record, "bytes": baseline.path.stat().st_size}, indent=1)
    recipe.save(home / "recipe.yml")
    write_whole(home / RECORD, lambda part: part.write_text(text, encoding="utf-8"))
    (home / CHECKPOINT).unlink(missing_ok=True)
    return baseline
