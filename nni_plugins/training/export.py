"""The export step of a recipe: the compact model, and the quantised one, as files for other runtimes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nni_plugins.training.errors import CompressionError
from nni_plugins.training.recipe import Recipe

if TYPE_CHECKING:
    from nni_plugins.training.quantize import Quantized

FLOAT, INT8, PT2 = "compact.onnx", "int8.onnx", "compact.pt2"
FILES = (FLOAT, INT8, PT2, "compact.xml", "compact.bin", "int8.xml", "int8.bin")
_ONNX = ("onnx", "onnxruntime", "onnxscript")
PACKAGES: dict[str, tuple[str, ...]] = {"onnx": _ONNX, "tensorrt": _ONNX, "openvino": (*_ONNX, "openvino")}
"""What a format needs beside torch."""


class OnnxModel(nn.Module):
    """An ONNX file that is called as a model: onnxruntime computes, on the CPU."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        from nni_plugins.export.errors import ExportError
        from nni_plugins.export.onnx import session_of

        super().__init__()
        try:
            self.session = session_of(path, threads)
        except ExportError as error:
            raise CompressionError(str(error)) from None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the file's output, or a tuple of several."""
        from nni_plugins.export.onnx import feed_of

        found = self.session.run(None, feed_of(self.session, kwargs or args))
        tensors = tuple(torch.from_numpy(item) for item in found)
        return tensors[0] if len(tensors) == 1 else tensors


def check_packages(formats: Iterable[str]) -> None:
    """Raise one line where a package that a format needs is not installed."""
    from nni_plugins.export.errors import ExportError
    from nni_plugins.export.onnx import require

    for name in formats:
        try:
            require(*PACKAGES.get(name, ()))
        except ExportError as error:
            raise CompressionError(f"export.formats: {name}: {error}") from None


def export(
    recipe: Recipe, compact: nn.Module, quantized: Quantized | None, example: Any, output: Path, said: dict[str, Any]
) -> dict[str, Any]:
    """Write the files that the recipe's ``export`` section names.

    Parameters
    ----------
    recipe
        Its ``export`` section.
    compact
        The compact model in float.
    quantized
        The quantised model, or None.
    example
        An input.
    output
        The folder.
    said
        Recipe, plan and metrics: kept inside each file.

    Returns
    -------
    dict
        By name (``onnx``, ``int8``, ``pt2``): path, size, and how near the file is to the model.

    Raises
    ------
    CompressionError
        With one line.
    """
    from nni_plugins.export.errors import ExportError
    from nni_plugins.export.onnx import export_onnx
    from nni_plugins.export.pt2 import export_pt2
    from nni_plugins.export.tensorrt import check_tensorrt

    settings, made = recipe.export, dict[str, Any]()
    common: dict[str, Any] = {"dynamic_batch": settings.dynamic_batch, "metadata": said}
    try:
        if {"onnx", "tensorrt", "openvino"} & set(settings.formats):
            file = output / FLOAT
            made["onnx"] = export_onnx(compact, example, file, opset=settings.opset, **common).to_dict()
            if quantized is not None:
                file = output / INT8
                made["int8"] = export_onnx(
                    quantized.plain(), example, file, opset=settings.opset, grids=quantized.grids,
                    reference=quantized.model, **common,
                ).to_dict()  # fmt: skip
            if "tensorrt" in settings.formats:
                made["tensorrt"] = check_tensorrt(file)
            if "openvino" in settings.formats:
                held = {"onnx": compact, "int8": None if quantized is None else quantized.model}
                made |= _as_openvino(made, held, example, output, said)
        if "pt2" in settings.formats:
            made["pt2"] = export_pt2(compact, example, output / PT2, **common).to_dict()
    except ExportError as error:
        raise CompressionError(f"export: {error}") from error
    for item in made.values():
        item.pop("metadata", None)
        if "path" in item:
            item["path"] = Path(item["path"]).name
    return made


def _as_openvino(
    made: dict[str, Any], models: dict[str, nn.Module | None], example: Any, output: Path, said: dict[str, Any]
) -> dict[str, Any]:
    """Convert the ONNX files that were written; each is held against the model that it came from."""
    from nni_plugins.export.openvino import export_openvino

    found = {}
    for name, model in models.items():
        if name in made and model is not None:
            file = output / (FLOAT if name == "onnx" else INT8)
            done = export_openvino(
                file, model, example, file.with_suffix(".xml"), dynamic_batch=made[name]["dynamic_batch"],
                metadata=said, quantized=name == "int8",
            )  # fmt: skip
            found["openvino" if name == "onnx" else "openvino_int8"] = done.to_dict()
    return found
