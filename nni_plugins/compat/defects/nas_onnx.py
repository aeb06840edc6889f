"""NNI's Lightning modules export to ONNX before validation, and survive a failure, but not that ONNX is missing.

They catch ``RuntimeError``; without the onnx packages, Lightning and torch raise ``ModuleNotFoundError``: Lightning
asks for onnx, and torch for onnxscript where its exporter is the one of ``dynamo``.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import warnings
from pathlib import Path
from typing import Any

from nni_plugins.compat.hook import Patch


class _Module:
    """What a validation step asks of its module, which cannot be exported."""

    def __init__(self) -> None:
        self.export_onnx = Path("model.onnx")
        self.metrics: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Give no output, loss or log."""

    criterion = log = __call__

    def to_onnx(self, *args: Any, **kwargs: Any) -> None:
        raise ModuleNotFoundError("onnx")


def _lets_import_errors_through(supervised: Any) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            supervised.validation_step(_Module(), (None, None), 0)
    except ImportError:
        return True
    return False


def _missing() -> list[str]:
    """The packages that an export needs here, and that are not installed."""
    import torch

    dynamo = inspect.signature(torch.onnx.export).parameters.get("dynamo")
    needed = ["onnx", "onnxscript"] if dynamo is not None and dynamo.default is True else ["onnx"]
    return [name for name in needed if importlib.util.find_spec(name) is None]


def _defect(module: Any) -> bool:
    supervised = module.SupervisedLearningModule
    if "to_onnx" in vars(supervised) or not _missing():
        return False
    return _lets_import_errors_through(supervised)


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
