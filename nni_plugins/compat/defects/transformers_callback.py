"""NNI hooks the optimizer's step through one callback class, and takes a trainer's ``deepspeed = None`` for an engine.

Every trainer of transformers now has the attribute ``deepspeed``, None where it is not used. And when two tasks are
hooked (a movement pruner's scores and its trigger), the second overwrote the first's method on the shared class, and
then ran twice. Each hook gets a callback class of its own.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

from nni_plugins.compat.hook import Patch


def _tasks_run(module: Any, **attributes: Any) -> list[str]:
    """Hook two tasks to the step of a trainer's stand-in, begin to train, take a step, and list what ran."""
    ran: list[str] = []
    callbacks: list[Any] = []
    optimizer = SimpleNamespace(step=lambda: None)
    evaluator = module.TransformersEvaluator.__new__(module.TransformersEvaluator)
    handler = SimpleNamespace(optimizer=optimizer)
    evaluator.trainer = SimpleNamespace(add_callback=callbacks.append, callback_handler=handler, **attributes)
    shared = module.PatchCallback
    begin = vars(shared).get("on_train_begin")
    try:
        evaluator.patch_optimizer_step([lambda: ran.append("first")], [])
        evaluator.patch_optimizer_step([], [lambda: ran.append("second")])
        for callback in callbacks:
            callback().on_train_begin(None, None, None)
    finally:
        if begin is not None:
            shared.on_train_begin = begin
        elif "on_train_begin" in vars(shared):
            del shared.on_train_begin
    optimizer.step()
    return ran


def _defect(module: Any) -> bool:
    try:
        return any(sorted(_tasks_run(module, **has)) != ["first", "second"] for has in ({}, {"deepspeed": None}))
    except AssertionError:
        return True


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

    evaluator_class.patch_optimizer_step = patch_optimizer_step


PATCH = Patch(
    name="transformers-callback",
    module="nni.compression.utils.evaluator",
    mends="TransformersEvaluator fails when training starts (an AssertionError on `optimizer`), and loses one of two "
    "tasks that are hooked to a step",
    defect=_defect,
    mend=_mend,
    framework="transformers.trainer",
)
