"""NNI's Lightning modules export to ONNX before validation, and survive a failure, but not that ONNX is missing.

They catch ``RuntimeError``; without the onnx packages, torch and Lightning raise ``ModuleNotFoundError``.
"""

from __future__ import annotations

import functools
from typing import Any

from nni_plugins.compat.hook import Patch


def _defect(module: Any) -> bool:
    return "to_onnx" not in vars(module.SupervisedLearningModule)


def _mend(module: Any) -> None:
    supervised = module.SupervisedLearningModule
    theirs = supervised.to_onnx

    @functools.wraps(theirs)
    def to_onnx(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return theirs(self, *args, **kwargs)
        except ImportError as error:
            raise RuntimeError(str(error)) from error

    supervised.to_onnx = to_onnx


PATCH = Patch(
    name="nas-onnx",
    module="nni.nas.evaluator.pytorch.lightning",
    mends="Classification(export_onnx=True) ends the training where the onnx package is missing; NNI meant to warn",
    defect=_defect,
    mend=_mend,
)
