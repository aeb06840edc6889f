"""What pruners ask of NNI's evaluators beyond their public hooks: how long they train."""

from __future__ import annotations

from math import ceil
from typing import Any


def usual_duration(evaluator: Any) -> tuple[int | None, int | None]:
    """How long an evaluator trains by itself: steps or epochs, of a Lightning or transformers trainer, else Nones."""
    trainer = getattr(evaluator, "traced_trainer", None)
    if trainer is not None:
        steps, epochs = trainer.args.max_steps, trainer.args.num_train_epochs
        return (int(steps), None) if steps and steps > 0 else (None, int(epochs))
    trainer = getattr(evaluator, "trainer", None)
    if trainer is not None and hasattr(trainer, "max_epochs"):
        steps, epochs = getattr(trainer, "max_steps", -1), trainer.max_epochs
        return (int(steps), None) if steps and steps > 0 else (None, int(epochs) if epochs and epochs > 0 else None)
    return None, None


def steps_under_way(evaluator: Any) -> int | None:
    """Optimizer steps of the training that is running, where a Lightning or transformers trainer knows them."""
    if hasattr(evaluator, "traced_trainer"):
        state = getattr(getattr(evaluator, "trainer", None), "state", None)
        return int(state.max_steps) if state is not None and state.max_steps > 0 else None
    if hasattr(evaluator, "data_module"):
        trainer = getattr(evaluator.model, "_trainer", None) or evaluator.model.trainer
        steps = trainer.estimated_stepping_batches
        return int(steps) if steps != float("inf") else None
    return None


def schedulers_of(evaluator: Any) -> list[Any]:
    """The learning-rate schedulers that an evaluator knows of, now; a training function may have others of its own."""
    if hasattr(evaluator, "traced_trainer"):
        found = getattr(getattr(evaluator, "trainer", None), "lr_scheduler", None)
        scheduler = getattr(found, "scheduler", found)  # accelerate wraps it
        return [] if scheduler is None else [scheduler]
    if hasattr(evaluator, "data_module"):
        trainer = getattr(evaluator.model, "_trainer", None)
        return [] if trainer is None else [config.scheduler for config in trainer.lr_scheduler_configs]
    return list(getattr(evaluator, "_lr_schedulers", None) or [])


def optimizers_of(evaluator: Any) -> list[Any]:
    """The optimizers that a bound evaluator holds before it trains; Lightning's come when it does."""
    if hasattr(evaluator, "traced_trainer"):
        return [evaluator.trainer.optimizer]
    return list(getattr(evaluator, "_optimizers", None) or [])


def knows_epochs(evaluator: Any) -> bool:
    """Whether an evaluator knows, at the latest while it trains, how many optimizer steps an epoch has."""
    return any(hasattr(evaluator, name) for name in ("steps_per_epoch", "traced_trainer", "data_module"))


def steps_per_epoch(evaluator: Any) -> int | None:
    """Optimizer steps of an epoch, where they are known by now."""
    if hasattr(evaluator, "traced_trainer"):
        trainer = getattr(evaluator, "trainer", None) or evaluator.traced_trainer
        if trainer.train_dataset is None or not hasattr(trainer.train_dataset, "__len__"):
            return None
        return max(1, ceil(len(trainer.get_train_dataloader()) / trainer.args.gradient_accumulation_steps))
    if hasattr(evaluator, "data_module"):
        trainer = getattr(evaluator.model, "_trainer", None)
        batches = 0 if trainer is None else trainer.num_training_batches
        if trainer is None or not batches or batches == float("inf"):
            return None
        return max(1, ceil(batches / trainer.accumulate_grad_batches))
    return getattr(evaluator, "steps_per_epoch", None)
