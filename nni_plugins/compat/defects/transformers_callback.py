"""NNI hooks the optimizer's step through one callback class, and takes a trainer's ``deepspeed = None`` for an engine.

Every trainer of transformers now has the attribute ``deepspeed``, None where it is not used. And when two tasks are
hooked (a movement pruner's scores and its trigger), the second overwrote the first's method on the shared class, and
then ran twice. Each hook gets a callback class of its own.
"""

from __future__ import annotations

import functools
from typing import Any

from nni_plugins.compat.hook import Patch


def _defect(module: Any) -> bool:
    return not hasattr(module.TransformersEvaluator.patch_optimizer_step, "__nni_plugins__")


def _mend(module: Any) -> None:
    evaluator_class = module.TransformersEvaluator
    theirs = evaluator_class.patch_optimizer_step

    @functools.wraps(theirs)
    def patch_optimizer_step(self: Any, before_step_tasks: Any, after_step_tasks: Any) -> None:
        shared = module.PatchCallback
        own = type(shared.__name__, (shared,), {"__module__": module.__name__})
        module.PatchCallback = own
        try:
            theirs(self, before_step_tasks, after_step_tasks)
        finally:
            module.PatchCallback = shared
        begin: Any = own.on_train_begin  # type: ignore[attr-defined]

        def on_train_begin(*args: Any, **kwargs: Any) -> Any:
            attributes = vars(self.trainer)
            unused = "deepspeed" in attributes and attributes["deepspeed"] is None
            if unused:
                del attributes["deepspeed"]
            try:
                return begin(*args, **kwargs)
            finally:
                if unused:
                    attributes["deepspeed"] = None

        own.on_train_begin = staticmethod(on_train_begin)  # type: ignore[attr-defined]

    patch_optimizer_step.__nni_plugins__ = True  # type: ignore[attr-defined]
    evaluator_class.patch_optimizer_step = patch_optimizer_step


PATCH = Patch(
    name="transformers-callback",
    module="nni.compression.utils.evaluator",
    mends="TransformersEvaluator fails when training starts (an AssertionError on `optimizer`), and loses one of two "
    "tasks that are hooked to a step",
    defect=_defect,
    mend=_mend,
)
