"""Lightning 2 has no setter for ``fit_loop.max_steps``, which ``LightningEvaluator.train(max_steps=…)`` sets.

NNI's evaluator is often imported and Lightning never, so the question is put to Lightning's own loop once it is there,
and again to the trainer at hand.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

from nni_plugins.compat.hook import Patch

FRAMEWORK = "pytorch_lightning"
LOOPS = f"{FRAMEWORK}.loops.fit_loop"


def _settable(fit_loop: type) -> bool:
    attribute = getattr(fit_loop, "max_steps", None)
    return not isinstance(attribute, property) or attribute.fset is not None


def _defect(module: Any) -> bool:
    if hasattr(module.LightningEvaluator.train, "__nni_plugins__"):
        return False
    loops = [kind for name, kind in vars(sys.modules[LOOPS]).items() if name in ("FitLoop", "_FitLoop")]
    sets_it = "trainer.fit_loop.max_steps =" in inspect.getsource(module.LightningEvaluator.train)
    return sets_it and not all(_settable(loop) for loop in loops)


def _mend(module: Any) -> None:
    evaluator_class = module.LightningEvaluator
    theirs = evaluator_class.train

    @functools.wraps(theirs)
    def train(self: Any, max_steps: int | None = None, max_epochs: int | None = None) -> None:
        if not max_steps:
            return theirs(self, max_steps, max_epochs)
        assert isinstance(self.model, module.pl.LightningModule)
        trainer = self.trainer.trace_copy().get()
        if _settable(type(trainer.fit_loop)):
            return theirs(self, max_steps, max_epochs)
        # What NNI does, but for the place of max_steps.
        trainer.num_sanity_val_steps = 0
        trainer.fit_loop.epoch_loop.max_steps = max_steps
        if max_epochs:
            trainer.fit_loop.max_epochs = max_epochs
        trainer.fit(self.model, self.data_module)
        # The trainer would otherwise be dumped with the model.
        self.model.trainer = None
        return None

    train.__nni_plugins__ = True  # type: ignore[attr-defined]
    evaluator_class.train = train


PATCH = Patch(
    name="lightning-max-steps",
    module="nni.compression.utils.evaluator",
    mends="LightningEvaluator.train(max_steps=…), and so every pruner and quantiser that trains for a number of "
    "steps, fails with pytorch-lightning 2 ('property max_steps of _FitLoop object has no setter')",
    defect=_defect,
    mend=_mend,
    framework=FRAMEWORK,
)
