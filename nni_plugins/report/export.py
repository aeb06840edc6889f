"""``nni-plugins export``: a finished compact model, or any model, as a file for another runtime."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from nni_plugins.export.errors import ExportError
from nni_plugins.report.bench import ONNX, find_models, finished_folder
from nni_plugins.report.table import size
from nni_plugins.training.errors import CompressionError

PT2 = "compact.pt2"


def run(
    target: str,
    formats: tuple[str, ...],
    inputs: tuple[str, ...],
    inputs_function: str | None,
    output: Path | None,
    fixed_batch: bool,
    as_json: bool,
) -> None:
    """Run the command: the options of ``nni-plugins export``, as they were given.

    Raises
    ------
    RecipeError, CompressionError
        With one line.
    """
    import click

    from nni_plugins.export.onnx import export_onnx
    from nni_plugins.export.openvino import export_openvino
    from nni_plugins.export.pt2 import export_pt2
    from nni_plugins.export.tensorrt import check_tensorrt

    with contextlib.redirect_stdout(sys.stderr):
        models, example, _ = find_models(target, inputs, inputs_function)
        model = models.get("compact", models["dense"])
        home = finished_folder(target)
        folder = output or (home if home.is_dir() else Path("outputs") / "export")
        metrics = home / "metrics.json"
        said = {"target": target}
        if metrics.is_file():
            said["metrics"] = json.loads(metrics.read_text(encoding="utf-8"))
        made: dict[str, Any] = {}
        try:
            if {"onnx", "tensorrt", "openvino"} & set(formats):
                done = export_onnx(model, example, folder / ONNX, dynamic_batch=not fixed_batch, metadata=said)
                made["onnx"] = done.to_dict()
            if "tensorrt" in formats:
                made["tensorrt"] = check_tensorrt(folder / ONNX)
            if "openvino" in formats:
                free = made["onnx"]["dynamic_batch"]
                target_file = (folder / ONNX).with_suffix(".xml")
                done = export_openvino(
                    folder / ONNX, model, example, target_file, dynamic_batch=free, metadata=said
                )  # fmt: skip
                made["openvino"] = done.to_dict()
            if "pt2" in formats:
                done = export_pt2(model, example, folder / PT2, dynamic_batch=not fixed_batch, metadata=said)
                made["pt2"] = done.to_dict()
        except ExportError as error:
            raise CompressionError(str(error)) from error
    if as_json:
        click.echo(json.dumps(made, indent=1, default=str))
        return
    for name, item in made.items():
        if name == "tensorrt":
            click.echo(f"TensorRT takes it by its documented rules (not run: there is no GPU here): {item['command']}")
            continue
        batch = "any batch size" if item["dynamic_batch"] else item["note"] or "a fixed batch size"
        off = f"{item['relative_error']:.1e} of the output's size"
        click.echo(f"{item['path']}: {size(item['bytes'])}, {batch}, off from the model by {off}")
