"""What pruners ask of NNI's evaluators beyond their public hooks: how long they train."""

from __future__ import annotations

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
