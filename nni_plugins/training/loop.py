"""The training loop: for the dense model, for fine-tuning, and (through NNI's evaluator) for pruners."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugins.pruners.ranks import as_on_rank_zero
from nni_plugins.training.channels_last import guarded
from nni_plugins.training.checkpoint import load_checkpoint, save_checkpoint
from nni_plugins.training.data import Data
from nni_plugins.training.errors import CompressionError, RecipeError, first_line, where
from nni_plugins.training.loaders import apply, map_tensors, split_batch
from nni_plugins.training.processes import agree_on_buffers, begin_alike, part_of, rank, sum_gradients
from nni_plugins.training.recipe import Recipe
from nni_plugins.training.schedule import factor
from nni_plugins.training.tasks import build_loss, build_metric, build_optimizer


class Loop:
    """Trains and evaluates models under the ``train`` section of a recipe.

    Parameters
    ----------
    recipe
        Seed, loss, metric, optimizer and schedule.
    data
        Its training split is trained on, its validation split evaluated; the test split is never touched.
    stage
        What is being trained, for messages (``dense training``, ``fine-tuning``).
    """

    def __init__(self, recipe: Recipe, data: Data, stage: str = "training") -> None:
        self.recipe, self.settings, self.data, self.stage = recipe, recipe.train, data, stage
        self.loss, self.metric = build_loss(recipe), build_metric(recipe)
        self.device = pick_device(recipe.train.device)
        on_gpu = self.device.type == "cuda" and self.settings.amp
        self.half = (torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16) if on_gpu else None
        self.scaler = torch.amp.GradScaler("cuda", enabled=self.half is torch.float16)
        self.passes = 0  # over the training split, so that no two calls of train see the same order
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Build the recipe's optimizer for a model."""
        return build_optimizer(self.recipe, model.named_parameters())

    def place(self, value: Any) -> Any:
        """Bring a model or nested tensors to the loop's device and memory format."""
        if isinstance(value, nn.Module):
            value = value.to(self.device)
            return value.to(memory_format=torch.channels_last) if self.settings.channels_last else value

        def moved(tensor: Tensor) -> Tensor:
            tensor = tensor.to(self.device)
            last = self.settings.channels_last and tensor.ndim == 4
            return tensor.contiguous(memory_format=torch.channels_last) if last else tensor

        return map_tensors(value, moved)

    def autocast(self) -> Any:
        """Return the context of a forward pass: half precision on a GPU, nothing elsewhere."""
        return nullcontext() if self.half is None else torch.autocast(self.device.type, dtype=self.half)

    def training_step(self, batch: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of one batch; NNI's evaluators may wrap this function."""
        inputs, target = split_batch(self.place(batch))
        with self.autocast():
            output = self._apply(model, inputs)
            name = f"train.loss {self.settings.loss}"
            try:
                loss = self.loss(output, target)
            except CompressionError:
                raise
            except Exception as error:
                shapes = f"output {_shapes(output)} and target {_shapes(target)}"
                raise CompressionError(f"{name} cannot be computed of {shapes}: {where(error)}") from error
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not (loss.requires_grad or not model.training):
            raise CompressionError(f"{name} gives {_shapes(loss)}; it must be one number that depends on the output")
        return loss

    def _batches(self, loader: Iterable[Any], what: str) -> Iterator[Any]:
        """Yield what a loader yields, with its own failure as one line."""
        batches = iter(loader)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RecipeError:
                raise
            except Exception as error:  # of the user's data
                raise CompressionError(f"{self.stage}: the loader of {what} data fails: {where(error)}") from error
            yield batch

    def _apply(self, model: nn.Module, inputs: Any) -> Any:
        try:
            return apply(model, inputs)
        except Exception as error:  # of the user's model, or of one that does not fit the data
            raise CompressionError(
                f"{self.stage}: the model fails on inputs {_shapes(inputs)}: {where(error)}"
            ) from error

    def train(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        training_step: Callable[..., Any] | None = None,
        *,
        max_epochs: int | None = None,
        max_steps: int | None = None,
        on_epoch: Callable[[int, float], None] | None = None,
        after_step: Callable[[], None] | None = None,
        checkpoint: Path | None = None,
    ) -> float | None:
        """Train a model in place.

        Each call is one training with a schedule of its own, from warm-up to the last step.

        Parameters
        ----------
        model
            Already on the loop's device.
        optimizer
            Its learning rates are multiplied by the schedule, and put back at the end.
        training_step
            ``(batch, model) -> loss``, or a tuple or dictionary that holds it; the loop's own by default.
        max_epochs, max_steps
            Length; ``train.epochs`` where both are None, the first that is reached where both are given.
        on_epoch
            Called with the number of the epoch (from 1) and the validation metric; evaluation is skipped without it.
        after_step
            Called after each optimizer step (masks are applied again here).
        checkpoint
            File written after each epoch and continued from where it exists. The result is bit by bit that of a
            training that was never stopped.

        Returns
        -------
        float or None
            Validation metric of the last epoch, if ``on_epoch`` asked for it.

        Raises
        ------
        CompressionError
            The loss is not finite any more.
        """
        step_function = training_step or self.training_step
        per_epoch = batches_of(self.data.train)
        epochs = max_epochs if max_epochs is not None else self.settings.epochs if max_steps is None else None
        limits = [limit for limit in (max_steps, None if epochs is None else epochs * per_epoch) if limit is not None]
        total = min(limits)
        peaks = [group["lr"] for group in optimizer.param_groups]
        epoch, step, last, before = 0, 0, None, self.passes
        checkpoint = as_on_rank_zero(checkpoint)
        if checkpoint is not None and as_on_rank_zero(checkpoint.exists()):
            epoch, last = load_checkpoint(checkpoint, model, optimizer, self.scaler, self.data.train)
            step = epoch * per_epoch
        begin_alike(model)
        with guarded(model) if self.settings.channels_last else nullcontext():
            while step < total:
                model.train()
                if hasattr(self.data.train, "set_epoch"):
                    self.data.train.set_epoch(before + epoch)
                self.passes = before + epoch + 1
                for batch in self._batches(self.data.train, "training"):
                    scale = factor(self.settings, step, total, per_epoch)
                    for group, peak in zip(optimizer.param_groups, peaks, strict=False):
                        group["lr"] = peak * scale
                    loss = self._update(model, optimizer, step_function, batch)
                    if after_step is not None:
                        after_step()
                    step += 1
                    if self.device.type == "cpu" or step % 20 == 0 or step == total:
                        self._check(loss, epoch, step)
                    if step >= total:
                        break
                epoch += 1
                agree_on_buffers(model)
                if on_epoch is not None:
                    last = self.evaluate(model)
                    if not math.isfinite(last):
                        raise CompressionError(f"{self.stage}: {self.metric.name} is {last} after epoch {epoch}")
                    on_epoch(epoch, last)
                if checkpoint is not None and rank() == 0:
                    for group, peak in zip(optimizer.param_groups, peaks, strict=False):
                        group["lr"] = peak
                    save_checkpoint(checkpoint, model, optimizer, self.scaler, self.data.train, epoch, last)
        for group, peak in zip(optimizer.param_groups, peaks, strict=False):
            group["lr"] = peak
        return last

    def _update(self, model: nn.Module, optimizer: torch.optim.Optimizer, step_function: Any, batch: Any) -> Tensor:
        optimizer.zero_grad()
        batch, share = part_of(batch)
        out = step_function(batch, model)
        loss = out if isinstance(out, Tensor) else out["loss"] if isinstance(out, dict) else out[0]
        self.scaler.scale(loss).backward()
        sum_gradients(model, share)
        if self.settings.clip_norm is not None:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), self.settings.clip_norm)
        if self.scaler.is_enabled():
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            optimizer.step()
        return loss.detach()

    def _check(self, loss: Tensor, epoch: int, step: int) -> None:
        value = loss.item()
        if not math.isfinite(value):
            raise CompressionError(
                f"{self.stage} diverged: the loss is {value} in epoch {epoch + 1}, step {step} "
                f"(learning rate {self.settings.learning_rate:g}); lower learning_rate or lengthen warmup_epochs"
            )

    @torch.no_grad()
    def evaluate(self, model: nn.Module, loader: Any = None) -> float:
        """Return the metric of a model over a split, validation by default; the model's mode is put back."""
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        outputs, targets = [], []
        try:
            for batch in self._batches(self.data.validation if loader is None else loader, "evaluation"):
                inputs, target = split_batch(self.place(batch))
                with self.autocast():
                    output = self._apply(model, inputs)
                outputs.append(
                    map_tensors(output, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
                )
                targets.append(target)
        finally:
            for module, mode in modes:
                module.training = mode
        if not outputs:
            raise CompressionError(f"{self.stage}: there is nothing to evaluate on, the split is empty")
        try:
            return float(self.metric.function(_joined(outputs), _joined(targets)))
        except Exception as error:  # the user's own function
            raise CompressionError(
                f"train.metric {self.metric.name} cannot be computed: {first_line(error)}"
            ) from error


def pick_device(name: str) -> torch.device:
    """Return the device that a recipe asks for; ``auto`` is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("its tensors have no data")
        torch.ones(1, device=device).item()  # some devices give tensors and take nothing back
    except Exception as error:  # of each backend its own kind
        raise CompressionError(
            f"train.device is {name}, which does not work here: {first_line(error)}; give auto, cpu, cuda ..."
        ) from None
    return device


def batches_of(loader: Any) -> int:
    """Return how many batches an epoch has."""
    try:
        count = len(loader)
    except TypeError:
        count = sum(1 for _ in loader)
    if count == 0:
        raise CompressionError("the training split gives no batch; lower data.batch_size or add images")
    return count


def _shapes(value: Any) -> str:
    """Name the kind and shape of what stands in nested tuples, lists and dictionaries, for messages."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_shapes(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_shapes(item) for item in value) + ")"
    return type(value).__name__


def _joined(parts: list[Any]) -> Any:
    """Join batches: tensors along the first dimension, also inside tuples and dictionaries."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts) if first.ndim else torch.stack(parts)
    if isinstance(first, dict):
        return {key: _joined([part[key] for part in parts]) for key in first}
    if isinstance(first, (list, tuple)):
        return tuple(_joined([part[index] for part in parts]) for index in range(len(first)))
    return parts
