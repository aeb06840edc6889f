"""A compact model goes into a file and comes back, bit for bit, without pickle and without NNI; damage is named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.speedup import CompactFileError, ModelSpeedup, load_compact, save_compact
from nni_plugins.speedup.storage import VERSION
from tests.random_networks import RandomCNN

X = torch.randn(2, 3, 8, 8)


def compacted(model, share=0.5):
    graph = ChannelGraph.watch(model, X)
    plan = Plan(graph, {g.name: range(max(1, int(g.size * share))) for g in graph.groups if g.prunable and g.exact})
    return ModelSpeedup(model, X, plan.masks(model)).speedup_model().eval()


@pytest.mark.parametrize("seed", range(12))
def test_round_trip(tmp_path, seed):
    model = compacted(RandomCNN(seed))
    saved = save_compact(model, tmp_path / "m.safetensors")
    again = load_compact(tmp_path / "m.safetensors", lambda: RandomCNN(seed))
    assert saved.bytes == (tmp_path / "m.safetensors").stat().st_size
    assert torch.equal(again(X), model(X))
    assert not again.training
    state, other = model.state_dict(), again.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)
    resaved = save_compact(again, tmp_path / "again.safetensors")
    assert resaved.bytes == saved.bytes


def test_after_training_and_in_half_precision(tmp_path):
    model = compacted(RandomCNN(0))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    model.train()(X).sum().backward()
    optimizer.step()
    model.eval().half()
    save_compact(model, tmp_path / "m.safetensors")
    again = load_compact(tmp_path / "m.safetensors", lambda: RandomCNN(0))
    assert {p.dtype for p in again.parameters()} == {torch.float16}
    assert torch.equal(again(X.half()), model(X.half()))


class Spectral(nn.Module):
    """Weights of complex numbers, as of a Fourier layer."""

    def __init__(self, kind):
        super().__init__()
        real = torch.float64 if kind == torch.complex128 else torch.float32
        self.a, self.w = nn.Conv2d(3, 8, 1, dtype=real), nn.Parameter(torch.randn(8, 6, 3, 2, dtype=kind))
        self.b = nn.Conv2d(6, 2, 1, dtype=real)

    def forward(self, x):
        y = torch.fft.rfft2(self.a(x))[..., :3, :2]
        return self.b(torch.fft.irfft2(torch.einsum("bixy,ioxy->boxy", y, self.w), s=x.shape[-2:]))


@pytest.mark.parametrize("kind", [torch.complex64, torch.complex128])
def test_complex_weights_come_back(tmp_path, kind):
    model, x = Spectral(kind).eval(), X.double() if kind == torch.complex128 else X
    plan = Plan(ChannelGraph.watch(model, x), {"a": range(5), "w": range(4)})
    model = ModelSpeedup(model, x, plan.masks(model)).speedup_model()
    assert model.w.shape == (5, 4, 3, 2)
    save_compact(model, tmp_path / "m.safetensors")
    again = load_compact(tmp_path / "m.safetensors", lambda: Spectral(kind))
    assert again.w.dtype == kind
    assert torch.equal(again(x), model(x))


class Folds(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1, bias=False)
        self.c = nn.Conv2d(4, 2, 1)
        nn.init.constant_(self.n.bias, 0.7)

    def forward(self, x):
        return self.c(self.b(torch.relu(self.n(self.a(x)))))


def test_a_bias_that_folding_added_comes_back(tmp_path):
    model = Folds().eval()
    mask = torch.ones(8, 3, 1, 1)
    mask[5:] = 0
    model = ModelSpeedup(model, X, {"a": {"weight": mask}}).speedup_model()
    assert model.b.bias is not None
    save_compact(model, tmp_path / "m.safetensors")
    again = load_compact(tmp_path / "m.safetensors", Folds)
    assert torch.equal(again(X), model(X))
    assert model(X).shape == (2, 2, 8, 8)


def test_compacted_twice_comes_back(tmp_path):
    model = compacted(compacted(RandomCNN(1), 0.8), 0.6)
    save_compact(model, tmp_path / "m.safetensors")
    assert torch.equal(load_compact(tmp_path / "m.safetensors", lambda: RandomCNN(1))(X), model(X))


def test_a_bias_that_folding_added_and_a_second_step_cut_comes_back(tmp_path):
    model = Folds().eval()
    mask = torch.ones(8, 3, 1, 1)
    mask[5:] = 0
    model = ModelSpeedup(model, X, {"a": {"weight": mask}}).speedup_model()
    graph = ChannelGraph.watch(model, X)
    model = ModelSpeedup(model, X, Plan(graph, {"b": [0, 2]}).masks(model)).speedup_model()
    assert model.b.bias.shape == (2,)
    save_compact(model, tmp_path / "m.safetensors")
    assert torch.equal(load_compact(tmp_path / "m.safetensors", Folds)(X), model(X))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.c.weight = self.b.weight
        self.register_buffer("scale", torch.ones(8) * 2, persistent=False)

    def forward(self, x):
        return self.d(self.c(torch.relu(self.b(torch.relu(self.a(x))))) * self.scale)


def test_tied_weights_and_buffers_that_are_not_saved(tmp_path):
    model, x = Tied(), torch.randn(3, 4)
    graph = ChannelGraph.watch(model, x)
    masks = Plan(graph, {graph.groups[0].name: range(3)} if graph.groups[0].prunable else {}).masks(model)
    masks = masks or Plan(graph, {g.name: range(3) for g in graph.groups if g.prunable}).masks(model)
    ModelSpeedup(model, x, masks).speedup_model()
    assert model.a.out_features == 3
    assert model.scale.shape == (3,)
    save_compact(model, tmp_path / "m.safetensors")
    again = load_compact(tmp_path / "m.safetensors", Tied)
    assert again.c.weight is again.b.weight
    assert torch.equal(again(x), model(x))


def test_sparse_weights_are_stored_sparse(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    x = torch.randn(2, 64)
    mask = (torch.rand(256, 64) > 0.9).float()
    model = ModelSpeedup(model, x, {"0": {"weight": mask}}).speedup_model()
    rows = int((mask.sum(1) > 0).sum())
    saved = save_compact(model, tmp_path / "m.safetensors")
    assert saved.sparse == {"0.weight": pytest.approx(0.1, abs=0.02)}
    assert saved.dense_bytes == sum(p.numel() for p in model.parameters()) * 4
    assert model[0].out_features == rows
    assert saved.bytes < saved.dense_bytes * 0.65
    again = load_compact(
        tmp_path / "m.safetensors", lambda: nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    )
    assert torch.equal(again[0].weight.view(torch.int32), model[0].weight.view(torch.int32))


def build():
    return RandomCNN(0)


def saved(tmp_path):
    save_compact(compacted(build()), tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def refused(path, builder, words):
    with pytest.raises(CompactFileError, match=words) as caught:
        load_compact(path, builder)
    assert "\n" not in str(caught.value)


def test_truncated(tmp_path):
    path = saved(tmp_path)
    data = path.read_bytes()
    for size in (0, 5, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        refused(path, build, "m.safetensors: damaged, or not a compact model")


def test_one_flipped_bit(tmp_path):
    path = saved(tmp_path)
    data = bytearray(path.read_bytes())
    data[-20] ^= 4
    path.write_bytes(data)
    refused(path, build, "does not match its checksum")


def test_foreign_files(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"PK\x03\x04 a zip file, or something like it" * 20)
    refused(path, build, "damaged, or not a compact model")
    save_file({"weight": torch.ones(2)}, path)
    refused(path, build, "not a compact model of nni-plugins")
    save_file({"weight": torch.ones(2)}, path, metadata={"format": "nni-plugins compact model", "version": "99"})
    refused(path, build, f"format version 99; this release reads {VERSION}")
    with pytest.raises(FileNotFoundError):
        load_compact(tmp_path / "none.safetensors", build)


def test_another_builder(tmp_path):
    path = saved(tmp_path)
    refused(path, lambda: nn.Linear(2, 2), "build_model")

    def wider():
        model = build()
        model.head = nn.Linear(12, 7)
        return model

    refused(path, wider, r"build_model\(\) gives head.weight of shape \[7, 12\]; it was made from \[5, 12\]")

    def more():
        model = build()
        model.extra = nn.Linear(2, 2)
        return model

    refused(path, more, "gives extra.weight, which it was not made from")


def test_only_compact_models_are_saved(tmp_path):
    with pytest.raises(CompactFileError, match="not made by"):
        save_compact(build(), tmp_path / "m.safetensors")
    model = compacted(build())
    model.head = nn.Linear(3, 3)
    with pytest.raises(CompactFileError, match=r"head.weight has shape \[3, 3\], its plan says"):
        save_compact(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_nothing_in_the_file_is_code(tmp_path):
    tensors = load_file(saved(tmp_path))
    assert {key.split("/")[0] for key in tensors if "/" in key} <= {"plan", "bits"}


def test_loading_needs_torch_and_safetensors_only(tmp_path):
    """A fresh process in which everything else that we depend on cannot be imported."""
    model = compacted(build())
    save_compact(model, tmp_path / "m.safetensors")
    torch.save(X, tmp_path / "x.pt")
    (tmp_path / "architecture.py").write_text(
        "import torch\nfrom torch import nn\n"
        + "import random\nfrom torch.nn import functional\n"
        + Path(sys.modules["tests.random_networks"].__file__).read_text().split("from torch.nn import functional")[1]
    )
    code = f"""
import importlib.abc, json, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {{"nni", "scipy", "sklearn", "numpy", "matplotlib", "yaml", "click", "rich", "pandas"}}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, {str(tmp_path)!r})
import torch
from architecture import RandomCNN
from nni_plugins.speedup import load_compact
model = load_compact({str(tmp_path / "m.safetensors")!r}, lambda: RandomCNN(0))
print(json.dumps([model(torch.load({str(tmp_path / "x.pt")!r})).tolist(), sorted(m for m in sys.modules if m == "nni")]))
"""
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    values, nni = json.loads(out.stdout.splitlines()[-1])
    assert torch.allclose(torch.tensor(values), model(X), atol=1e-6)
    assert nni == []
