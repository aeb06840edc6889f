"""OpenVINO: an ONNX file of ours as its intermediate representation (.xml and .bin), checked in its own runtime."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nni_plugins.export.agreement import Exported, largest_error, on_cpu, one_line
from nni_plugins.export.errors import ExportError
from nni_plugins.export.onnx import METADATA, require


def export_openvino(
    onnx_file: str | Path,
    model: nn.Module,
    dummy_input: Any,
    path: str | Path,
    *,
    dynamic_batch: bool = True,
    metadata: Mapping[str, Any] | None = None,
    tolerance: float = 1e-4,
    quantized: bool = False,
) -> Exported:
    """Convert a file of :func:`~nni_plugins.export.onnx.export_onnx` and check the result.

    Parameters
    ----------
    onnx_file
        What is converted; its QDQ operators become OpenVINO's FakeQuantize.
    model
        What the result is compared with, on the CPU and in float32: OpenVINO would compute in bfloat16 where a
        processor has it.
    dummy_input
        As for :func:`~nni_plugins.export.onnx.export_onnx`.
    path
        The ``.xml`` file; the weights go beside it, in a ``.bin`` of the same name.
    dynamic_batch
        Compare at several sizes of the batch: the ONNX file has a free one.
    metadata
        Kept in the file, as JSON.
    tolerance
        Largest difference that is allowed, in shares of the output's size. Not checked with `quantized`.
    quantized
        Whether the file rounds to 8 bits.

    Raises
    ------
    ExportError
        OpenVINO is missing, it does not take the file, or computes something else.
    """
    import json

    require("openvino")
    import openvino

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    weights, part = path.with_suffix(".bin"), path.with_name(f"{path.stem}.part.xml")
    model = model.cpu().eval()
    try:
        with _own_log_level():
            converted = openvino.convert_model(str(onnx_file))
        converted.set_rt_info(json.dumps(metadata or {}, default=str), METADATA)
        openvino.save_model(converted, str(part), compress_to_fp16=False)
        compiled = compiled_of(part)
        errors = largest_error(
            model, lambda given: run_openvino(compiled, given), on_cpu(dummy_input), dynamic_batch, path.name
        )
        if not errors[1] <= (math.inf if quantized else tolerance) or math.isinf(errors[0]):
            raise ExportError(
                f"{path.name} computes something else: it is off by {errors[1]:.2g} of the output's size in OpenVINO, "
                f"and {tolerance:g} is allowed"
            )
        os.replace(part.with_suffix(".bin"), weights)
        os.replace(part, path)
    except ExportError:
        raise
    except Exception as error:  # OpenVINO has kinds of its own
        raise ExportError(f"{path.name} cannot be made by OpenVINO: {one_line(error)}") from error
    finally:
        part.unlink(missing_ok=True)
        part.with_suffix(".bin").unlink(missing_ok=True)
    return Exported(
        path=str(path),
        inputs=tuple(item.get_any_name() for item in compiled.inputs),
        outputs=tuple(item.get_any_name() for item in compiled.outputs),
        dynamic_batch=dynamic_batch,
        note="",
        max_error=errors[0],
        relative_error=errors[1],
        bytes=path.stat().st_size + weights.stat().st_size,
        metadata=dict(metadata or {}),
    )


@contextlib.contextmanager
def _own_log_level() -> Iterator[None]:
    """OpenVINO sets the level of everybody's root logger, and leaves it so where it cannot convert."""
    root = logging.getLogger()
    before = root.level
    try:
        yield
    finally:
        root.setLevel(before)


def compiled_of(path: str | Path, threads: int = 1) -> Any:
    """Open a file (.xml or .onnx) in OpenVINO's CPU plugin, in float32."""
    require("openvino")
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    try:
        return openvino.Core().compile_model(str(path), "CPU", settings)
    except Exception as error:  # OpenVINO has kinds of its own
        raise ExportError(f"{path} cannot be opened in OpenVINO: {one_line(error)}") from error


def run_openvino(compiled: Any, inputs: Any) -> list[Any]:
    """Run on nested tensors, named or in the order of the file's inputs; returns arrays."""
    names = [item.get_any_name() for item in compiled.inputs]
    if isinstance(inputs, Mapping) and set(inputs) == set(names):
        values = [inputs[name] for name in names]
    else:
        values = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if len(values) != len(names):
        raise ExportError(f"the file takes {len(names)} inputs ({', '.join(names)}), and was given {len(values)}")
    found = compiled([value.detach().cpu().numpy() for value in values])
    return [found[output] for output in compiled.outputs]
