"""``nni.compression.utils.evaluator`` imports Lightning, DeepSpeed and transformers, whichever evaluator is used.

Lightning and DeepSpeed are only looked into by their own evaluators. ``PatchCallback`` is made of a class of
transformers at import time; here it is made when the first ``TransformersEvaluator`` is.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from nni_plugins.compat.hook import Patch
from nni_plugins.compat.lazy import LazyCallable, LazyModule, stand_in, worth_deferring

CALLBACK_NAMES = ("TrainerCallback", "TrainerControl", "TrainerState", "TrainingArguments")


def _transformers(module: ModuleType) -> tuple[list[ModuleType], Callable[[], None]]:
    """Stand-ins for transformers, and what puts the real classes in place when they are wanted."""
    package = ModuleType("transformers")
    # A base class is needed while the module is executed; the class made of it is replaced before its first use.
    package.__dict__.update({name: LazyCallable("transformers", name) for name in CALLBACK_NAMES})
    package.__dict__["TrainerCallback"] = type("TrainerCallback", (), {})
    trainer = ModuleType("transformers.trainer")
    trainer.__dict__["Trainer"] = LazyCallable("transformers.trainer", "Trainer")

    def defer() -> None:
        evaluator: Any = module
        construct = evaluator.TransformersEvaluator.__init__

        @functools.wraps(construct)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            if isinstance(evaluator.HFTrainer, LazyCallable):
                real = importlib.import_module("transformers")
                evaluator.HFTrainer = importlib.import_module("transformers.trainer").Trainer
                for name in CALLBACK_NAMES:
                    setattr(evaluator, name, getattr(real, name))
                members = {k: v for k, v in vars(evaluator.PatchCallback).items() if k == "on_train_begin"}
                evaluator.PatchCallback = type(
                    "PatchCallback", (real.TrainerCallback,), {**members, "__module__": evaluator.__name__}
                )
            construct(self, *args, **kwargs)

        evaluator.TransformersEvaluator.__init__ = __init__

    return [package, trainer], defer


def _prepare(module: ModuleType) -> Callable[[], None] | None:
    stand_ins: list[ModuleType] = [
        LazyModule(name, module) for name in ("pytorch_lightning", "deepspeed") if worth_deferring(name)
    ]
    defer: Callable[[], None] | None = None
    if worth_deferring("transformers"):
        more, defer = _transformers(module)
        stand_ins += more
    if not stand_ins:
        return None
    remove = stand_in(module, *stand_ins)

    def undo() -> None:
        remove()
        if defer is not None and hasattr(module, "TransformersEvaluator"):
            defer()

    return undo


PATCH = Patch(
    name="slow-import-evaluator",
    module="nni.compression.utils.evaluator",
    mends="importing nni.compression imports pytorch_lightning, deepspeed and transformers whether used or not",
    prepare=_prepare,
)
