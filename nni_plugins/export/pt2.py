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
from torch.utils._pytree import tree_leaves, tree_map

from nni_plugins.export.errors import ExportError
from nni_plugins.export.onnx import METADATA, Exported, free_batch, one_line, positional, quiet, with_batch


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
    model = copy.deepcopy(model).cpu().eval()
    dummy_input = tree_map(lambda leaf: leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf, dummy_input)
    note = ""
    if dynamic_batch:
        try:
            return _export(model, dummy_input, path, True, metadata, tolerance, note)
        except ExportError as error:
            note = f"the batch size is fixed: {error}"
    return _export(model, dummy_input, path, False, metadata, tolerance, note)


def _export(
    model: nn.Module,
    dummy_input: Any,
    path: Path,
    dynamic: bool,
    metadata: Mapping[str, Any] | None,
    tolerance: float,
    note: str,
) -> Exported:
    sample = with_batch(dummy_input, 2) if dynamic else dummy_input
    args, kwargs = ((), sample) if isinstance(sample, dict) else (positional(sample), {})
    shapes = free_batch(args, kwargs) if dynamic else None
    part = path.with_name(path.stem + ".part.pt2")
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
            torch.export.save(program, str(part), extra_files={METADATA: json.dumps(metadata or {}, default=str)})
            loaded = torch.export.load(str(part)).module()
            worst, relative = 0.0, 0.0
            for size in (1, 2, 5) if dynamic else (None,):
                inputs = dummy_input if size is None else with_batch(dummy_input, size)
                more, named = ((), inputs) if isinstance(inputs, dict) else (positional(inputs), {})
                pairs = zip(tree_leaves(model(*more, **named)), tree_leaves(loaded(*more, **named)), strict=True)
                for ours, theirs in pairs:
                    if isinstance(ours, Tensor) and ours.numel():
                        off = float((ours.double() - theirs.double()).abs().max())
                        worst = max(worst, off)
                        relative = max(relative, off / max(float(ours.double().abs().max()), 1e-12))
        if not relative <= tolerance:
            raise ExportError(f"{path.name} computes something else: it is off by {relative:.2g} of the output's size")
        os.replace(part, path)
    except ExportError:
        raise
    except Exception as error:  # torch.export has kinds of its own
        raise ExportError(f"{path.name} cannot be exported: {one_line(error)}") from error
    finally:
        part.unlink(missing_ok=True)
    names = tuple(program.graph_signature.user_inputs)
    outputs = tuple(str(name) for name in program.graph_signature.user_outputs)
    size = path.stat().st_size
    return Exported(
        str(path), tuple(map(str, names)), outputs, dynamic, note, worst, relative, size, dict(metadata or {})
    )
