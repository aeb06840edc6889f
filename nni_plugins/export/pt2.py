"""``torch.export``: a .pt2 file that torch runs without the model's code."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nni_plugins.export.agreement import (
    Exported,
    free_batch,
    largest_error,
    on_cpu,
    one_line,
    quiet,
    split_arguments,
    with_batch,
    with_free_batch,
)
from nni_plugins.export.errors import ExportError
from nni_plugins.export.onnx import METADATA


def export_pt2(
    model: nn.Module,
    dummy_input: Any,
    path: str | Path,
    *,
    dynamic_batch: bool = True,
    metadata: Mapping[str, Any] | None = None,
    tolerance: float = 1e-4,
) -> Exported:
    """Write a model by ``torch.export``, read it back, and compare.

    Parameters
    ----------
    model, dummy_input, dynamic_batch, metadata, tolerance
        As of :func:`~nni_plugins.export.onnx.export_onnx`.
    path
        The file; ``torch.export.load`` reads it.

    Raises
    ------
    ExportError
        The model cannot be exported, or the file computes something else.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    model, inputs = copy.deepcopy(model).cpu().eval(), on_cpu(dummy_input)

    def make(dynamic: bool, note: str) -> Exported:
        return _export(model, inputs, path, dynamic, metadata, tolerance, note)

    return with_free_batch(make, dynamic_batch)


def _export(
    model: nn.Module,
    dummy_input: Any,
    path: Path,
    dynamic: bool,
    metadata: Mapping[str, Any] | None,
    tolerance: float,
    note: str,
) -> Exported:
    args, kwargs = split_arguments(with_batch(dummy_input, 2) if dynamic else dummy_input)
    part = path.with_name(path.stem + ".part.pt2")
    try:
        with quiet():
            shapes = free_batch(args, kwargs) if dynamic else None
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
            torch.export.save(program, str(part), extra_files={METADATA: json.dumps(metadata or {}, default=str)})
            loaded = torch.export.load(str(part)).module()

            def run(given: Any) -> list[Any]:
                more, named = split_arguments(given)
                return [leaf for leaf in tree_leaves(loaded(*more, **named)) if isinstance(leaf, Tensor)]

            worst, relative = largest_error(model, run, dummy_input, dynamic, path.name)
        if not relative <= tolerance:
            raise ExportError(f"{path.name} computes something else: it is off by {relative:.2g} of the output's size")
        os.replace(part, path)
    except ExportError:
        raise
    except Exception as error:  # torch.export has kinds of its own
        raise ExportError(f"{path.name} cannot be exported: {one_line(error)}") from error
    finally:
        part.unlink(missing_ok=True)
    return Exported(
        path=str(path),
        inputs=tuple(map(str, program.graph_signature.user_inputs)),
        outputs=tuple(map(str, program.graph_signature.user_outputs)),
        dynamic_batch=dynamic,
        note=note,
        max_error=worst,
        relative_error=relative,
        bytes=path.stat().st_size,
        metadata=dict(metadata or {}),
    )
