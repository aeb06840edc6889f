"""transformers passes ``num_items_in_batch`` to ``Trainer.compute_loss``; NNI's replacement of it takes no such thing.

What the trainer passes is handed on to its own ``compute_loss`` as it came.
"""

from __future__ import annotations

import functools
import inspect
import sys
from types import MethodType
from typing import Any

from nni_plugins.compat.hook import Patch

FRAMEWORK = "transformers.trainer"


def _defect(module: Any) -> bool:
    """Whether what patch_loss puts in place of compute_loss refuses an argument that the trainer's own takes."""
    wanted = inspect.signature(sys.modules[FRAMEWORK].Trainer.compute_loss).parameters
    trainer: Any = type("Trainer", (), {"compute_loss": lambda self, model, inputs, *args, **kwargs: 0.0})()
    evaluator = module.TransformersEvaluator.__new__(module.TransformersEvaluator)
    evaluator.trainer = trainer
    evaluator.patch_loss(lambda loss, inputs: loss)
    taken = inspect.signature(trainer.compute_loss).parameters
    catches_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
    return not catches_all and bool(set(wanted) - set(taken) - {"self"})


def _mend(module: Any) -> None:
    evaluator_class = module.TransformersEvaluator
    theirs = evaluator_class.patch_loss

    @functools.wraps(theirs)
    def patch_loss(self: Any, patch: Any) -> None:
        old_compute_loss = self.trainer.compute_loss

        def patched_compute_loss(
            _: Any, model: Any, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any
        ) -> Any:
            result = old_compute_loss(model, inputs, return_outputs, *args, **kwargs)
            if return_outputs:
                return patch(result[0], inputs), result[1]
            return patch(result, inputs)

        self.trainer.compute_loss = MethodType(patched_compute_loss, self.trainer)

    evaluator_class.patch_loss = patch_loss


PATCH = Patch(
    name="transformers-loss",
    module="nni.compression.utils.evaluator",
    mends="TransformersEvaluator fails while training ('patched_compute_loss() got an unexpected keyword argument "
    "num_items_in_batch')",
    defect=_defect,
    mend=_mend,
    framework=FRAMEWORK,
)
