"""OpenVINO's files compute what the model computes, also in a fresh process."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("onnxscript")
pytest.importorskip("openvino")

from nni_plugins.export.errors import ExportError
from nni_plugins.export.onnx import export_onnx
from nni_plugins.export.openvino import export_openvino

RUN = """
import json, sys
from nni_plugins.export.openvino import compiled_of, run_openvino
import torch
compiled = compiled_of(sys.argv[1])
print(json.dumps(run_openvino(compiled, torch.ones(3, 1, 8, 8))[0].tolist()))
"""


def test_a_file_computes_what_its_model_computes_at_any_batch(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    x = torch.rand(1, 1, 8, 8)
    export_onnx(model, x, tmp_path / "model.onnx")
    made = export_openvino(tmp_path / "model.onnx", model, x, tmp_path / "model.xml", metadata={"accuracy": 0.5})
    assert made.relative_error < 1e-5
    assert made.bytes == sum((tmp_path / name).stat().st_size for name in ("model.xml", "model.bin"))
    assert "accuracy" in (tmp_path / "model.xml").read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.xml", "model.bin"}
    answer = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "model.xml")], capture_output=True, text=True, check=True
    )
    torch.testing.assert_close(
        torch.tensor(json.loads(answer.stdout)), model(torch.ones(3, 1, 8, 8)), rtol=1e-4, atol=1e-5
    )


def test_a_file_of_another_model_is_refused_and_leaves_nothing(tmp_path):
    torch.manual_seed(0)
    model, other = (nn.Sequential(nn.Flatten(), nn.Linear(64, 3)) for _ in range(2))
    x = torch.rand(1, 1, 8, 8)
    export_onnx(model, x, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="computes something else"):
        export_openvino(tmp_path / "model.onnx", other, x, tmp_path / "model.xml")
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    level = logging.getLogger().level
    with pytest.raises(ExportError, match=r"bad\.xml cannot be made by OpenVINO: "):
        export_openvino(tmp_path / "bad.onnx", model, x, tmp_path / "bad.xml")
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "bad.onnx"}
    assert logging.getLogger().level == level  # OpenVINO leaves ERROR behind when it cannot convert
