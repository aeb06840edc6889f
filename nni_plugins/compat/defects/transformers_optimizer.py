"""transformers asks for its default optimizer with other arguments than NNI's replacement of the function takes.

``Trainer.get_optimizer_cls_and_kwargs`` is static and was called on the class with one argument; it is now called
on the instance, with the model as a second one. NNI puts a plain function of one argument in its place, and leaves
a plain function behind. Here the traced optimizer is made first, and NNI takes the way of a given one.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from typing import Any

from nni_plugins.compat.hook import Patch

FRAMEWORK = "transformers.trainer"
NAME = "get_optimizer_cls_and_kwargs"
TAKEN = 1


def _arguments_passed(create_optimizer: Any) -> list[int]:
    """How many arguments each call of the function in `create_optimizer` passes, the instance included."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(create_optimizer)))
    return [
        len(node.args) + len(node.keywords) + (isinstance(node.func.value, ast.Name) and node.func.value.id == "self")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == NAME
    ]


def _defect(module: Any) -> bool:
    theirs = module.TransformersEvaluator._init_optimizer_helpers
    if hasattr(theirs, "__nni_plugins__") or f"patched_{NAME}(args)" not in inspect.getsource(theirs):
        return False
    trainer_class: Any = sys.modules[FRAMEWORK].Trainer
    return any(passed != TAKEN for passed in _arguments_passed(trainer_class.create_optimizer))


def _mend(module: Any) -> None:
    evaluator_class = module.TransformersEvaluator
    theirs = evaluator_class._init_optimizer_helpers

    @functools.wraps(theirs)
    def _init_optimizer_helpers(self: Any, pure_model: Any) -> None:
        trainer, trainer_class = self.traced_trainer, module.HFTrainer
        if trainer.optimizer is not None and module.is_traceable(trainer.optimizer):
            return theirs(self, pure_model)
        module._logger.warning(
            "trainer.optimizer is not wrapped by nni.trace, or is None: the default optimizer of transformers is used."
        )
        trainer.optimizer = None
        original = inspect.getattr_static(trainer_class, NAME)
        choose = getattr(trainer_class, NAME)

        def traced(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
            optimizer_class, arguments = choose(*args, **kwargs)
            return module.nni.trace(optimizer_class), arguments

        # Static, so that it may be called on the class or on the instance.
        setattr(trainer_class, NAME, staticmethod(traced))
        try:
            trainer.optimizer = trainer.create_optimizer()
        finally:
            setattr(trainer_class, NAME, original)
        theirs(self, pure_model)
        trainer.optimizer = None
        return None

    _init_optimizer_helpers.__nni_plugins__ = True  # type: ignore[attr-defined]
    evaluator_class._init_optimizer_helpers = _init_optimizer_helpers


PATCH = Patch(
    name="transformers-optimizer",
    module="nni.compression.utils.evaluator",
    mends="TransformersEvaluator without an optimizer of its own fails "
    "('patched_get_optimizer_cls_and_kwargs() takes 1 positional argument but 3 were given')",
    defect=_defect,
    mend=_mend,
    framework=FRAMEWORK,
)
