"""NNI's concrete_trace on models that stopped it: traced equals the model, on other inputs too."""

import builtins
import sys

import pytest
import torch
from nni.common.concrete_trace_utils import concrete_trace
from nni.compression.pruning import L1NormPruner
from nni.compression.speedup import ModelSpeedup
from torch import nn
from torch.nn import functional as F

from nni_plugins.compat import patches


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)


class Conditions(Base):
    def forward(self, x):
        if x.shape[2] > 4 and x.dim() == 4:
            x = self.norm(self.conv(x)).relu()
        assert x.size(1) == 8
        if not x.requires_grad or x.sum() < -1e9:
            x = x + 1
        while x.dim() > 2:
            x = x.mean(-1)
        return self.head(x) if x.size(1) == 8 else x


class Checked(Base):
    """As torchvision's Vision Transformer and DenseNet check their inputs."""

    def forward(self, x):
        torch._assert(x.dim() == 4, f"wrong shape {x.shape}")
        torch._assert(x.size(2) == x.size(3), "not square")
        return self.head(self.conv(x).mean((2, 3)))


class Types(Base):
    def forward(self, x):
        pair: tuple[int, int] = (2, 3)
        kinds = tuple[int, int] | None, int | list, dict[str, int]

        class Dimensions(tuple):
            pass

        if isinstance(pair, tuple) and isinstance(3, kinds[1]) and len(Dimensions(pair)) == 2:
            x = self.conv(x)
        return self.head(x.mean(pair))


class Unpacking(Base):
    def forward(self, x):
        n, _, h, w = x.shape
        parts = [self.conv(x), *self.conv(x).split(4, dim=1)]
        joined = torch.cat([*parts[1:]], dim=1) + parts[0]
        named = {"a": joined, "b": joined}
        for _ in range(h // 8):
            joined = joined + named["b"]
        return {"out": self.head(joined.reshape(n, 8, h * w).mean(-1)), "joined": joined}


class Normalised(Base):
    """F.normalize is a leaf that calls torch.norm by way of Tensor.norm, as in Swin v2."""

    def forward(self, x):
        return self.head(F.normalize(self.conv(x).mean((2, 3)), dim=-1))


class Importing(Base):
    def forward(self, x):
        import sndhdr_like_module_for_tracing as helper

        return self.head(self.conv(x).mean((2, 3))) * helper.scale()


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b)


@pytest.mark.parametrize("model_class", [Conditions, Checked, Types, Unpacking, Normalised])
def test_traced_equals_the_model(model_class):
    torch.manual_seed(0)
    model = model_class().eval()
    before = dict(vars(builtins))
    traced = concrete_trace(model, (torch.randn(2, 3, 8, 8),))
    other = torch.randn(2, 3, 8, 8)
    assert equal(traced(other), model(other))
    assert dict(vars(builtins)) == before


def test_methods_of_tensors_are_recorded():
    graph = concrete_trace(Conditions().eval(), (torch.randn(2, 3, 8, 8),)).graph
    methods = {node.target for node in graph.nodes if node.op == "call_method"}
    assert {"relu", "mean"} <= methods


def test_first_import_inside_a_forward(tmp_path, monkeypatch):
    source = """
from collections import namedtuple
Pair = namedtuple("Pair", "a b")
Kind = type("Kind", (tuple,), {})
class Number(int):
    pass
def scale():
    return int.from_bytes(b"\\2", "big")
"""
    (tmp_path / "sndhdr_like_module_for_tracing.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    model, x = Importing().eval(), torch.randn(2, 3, 8, 8)
    traced = concrete_trace(model, (x,))
    module = sys.modules.pop("sndhdr_like_module_for_tracing")
    assert module.Pair(1, 2) == (1, 2)
    assert torch.equal(traced(x), model(x))


def test_each_tracer_patch_ended_well():
    states = {p.name: p.state for p in patches() if p.module.startswith("nni.common.concrete_trace_utils")}
    assert len(states) == 8
    assert set(states.values()) <= {"applied", "not needed"}


def test_mended_modules_have_no_defect_left():
    for patch in patches():
        if patch.prepare is None and patch.state == "applied":
            assert not patch.defect(sys.modules[patch.module]), patch.name


def masked():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    pruner = L1NormPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model.eval()(x)
    pruner.unwrap_model()
    return model, masks, x, expected


@pytest.mark.parametrize("as_file", [False, True])
def test_nni_speedup_halves_the_channels_with_masks_or_their_file(tmp_path, as_file):
    model, masks, x, expected = masked()
    if as_file:
        torch.save(masks, tmp_path / "masks.pth")
        masks = str(tmp_path / "masks.pth")
    ModelSpeedup(model, x, masks).speedup_model()
    assert (model[0].weight.shape, model[2].weight.shape) == ((4, 3, 3, 3), (4, 4, 3, 3))
    torch.testing.assert_close(model.eval()(x), expected, atol=1e-6, rtol=0)


def test_foreign_mask_file_runs_no_code(tmp_path):
    class Foreign:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    if next(patch for patch in patches() if patch.name == "mask-file-speedup").state != "applied":
        pytest.skip("torch before 2.6 loads any file, and NNI has no defect to mend")
    torch.save({"layer": Foreign()}, tmp_path / "masks.pth")
    model, _, x, _ = masked()
    with pytest.raises(Exception, match="eights"):
        ModelSpeedup(model, x, tmp_path / "masks.pth")
    assert not (tmp_path / "written").exists()


def test_old_mask_conflict_reads_a_file(tmp_path):
    from nni.compression.utils.mask_conflict import fix_mask_conflict

    model, masks, x, _ = masked()
    torch.save(masks, tmp_path / "masks.pth")
    fixed = fix_mask_conflict(str(tmp_path / "masks.pth"), model, x)
    assert all(torch.equal(fixed[name]["weight"], masks[name]["weight"]) for name in masks)
