"""Masks in every form that they come in, read the same; wrong ones refused in one line, the model unharmed."""

import copy
import pickle
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from nni.compression.pruning import L1NormPruner
from nni.compression.speedup import ModelSpeedup as StockSpeedup
from safetensors.torch import save_file
from torch import nn

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.speedup import ModelSpeedup
from nni_plugins.speedup.masks import parameter_masks, read_masks

X = torch.randn(2, 3, 6, 6)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.next = nn.Conv2d(8, 8, 1, bias=False)
        self.scale = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.next(self.norm(self.conv(x)).relu()) * self.scale
        return self.head(x.relu().mean((2, 3)))


def make():
    torch.manual_seed(0)
    return Net().eval()


def masks_of(model):
    plan = Plan(ChannelGraph.watch(model, X), {"conv": [0, 1, 4, 6, 7], "next": [1, 2, 5]})
    return plan.masks(model)


def flat(masks):
    return {f"{m}.{t}" if m else t: mask for m, targets in masks.items() for t, mask in targets.items()}


def mapped(function, masks):
    return {m: {t: function(mask) for t, mask in targets.items()} for m, targets in masks.items()}


def narrow(mask):
    """The mask with a size of one along each dimension in which it does not vary."""
    for dim in range(mask.dim()):
        if (mask == mask.select(dim, 0).unsqueeze(dim)).all():
            mask = mask.select(dim, 0).unsqueeze(dim)
    return mask


def saved(folder, value):
    torch.save(value, folder / "masks.pth")
    return folder / "masks.pth"


def numbers(folder, masks):
    np.savez(folder / "masks.npz", **{name: mask.numpy() for name, mask in flat(masks).items()})
    return str(folder / "masks.npz")


def tensors(folder, masks):
    save_file(flat(masks), folder / "masks.safetensors")
    return folder / "masks.safetensors"


def legacy(folder, masks):
    torch.save(masks, folder / "old.pth", _use_new_zipfile_serialization=False)
    return folder / "old.pth"


FORMS = {
    "as they are": lambda masks, folder: masks,
    "bool": lambda masks, folder: mapped(lambda m: m.bool(), masks),
    "int": lambda masks, folder: mapped(lambda m: m.int(), masks),
    "uint8": lambda masks, folder: mapped(lambda m: m.byte(), masks),
    "half": lambda masks, folder: mapped(lambda m: m.half(), masks),
    "double": lambda masks, folder: mapped(lambda m: m.double(), masks),
    "NumPy": lambda masks, folder: mapped(lambda m: m.numpy(), masks),
    "NumPy bool": lambda masks, folder: mapped(lambda m: m.numpy().astype(bool), masks),
    "parameters": lambda masks, folder: mapped(lambda m: nn.Parameter(m), masks),
    "sparse": lambda masks, folder: mapped(lambda m: m.to_sparse(), masks),
    "not contiguous": lambda masks, folder: mapped(lambda m: m.mT.contiguous().mT if m.dim() > 1 else m, masks),
    "ordered": lambda masks, folder: OrderedDict(masks),
    "bias None": lambda masks, folder: {**masks, "next": {**masks["next"], "bias": None}},
    "a bias that is not there": lambda masks, folder: {**masks, "next": {**masks["next"], "bias": torch.ones(8)}},
    "broadcast": lambda masks, folder: mapped(narrow, masks),
    "a number": lambda masks, folder: {**masks, "head": {**masks["head"], "bias": 1}},
    "flat": lambda masks, folder: flat(masks),
    "flat, bias None": lambda masks, folder: {**flat(masks), "next.bias": None},
    "flat, by name of mask": lambda masks, folder: {f"{n}_mask": m for n, m in flat(masks).items()},
    "module.": lambda masks, folder: {f"module.{m}" if m else "module": t for m, t in masks.items()},
    "_orig_mod.": lambda masks, folder: {f"_orig_mod.{m}": t for m, t in masks.items() if m} | {"": masks[""]},
    "of outputs, all ones": lambda masks, folder: {**masks, "norm": {**masks["norm"], "_output_0": torch.ones(8, 8, 9, 9)}},
    "file": lambda masks, folder: saved(folder, masks),
    "file, defaultdict": lambda masks, folder: saved(folder, defaultdict(dict, masks)),
    "file, bool": lambda masks, folder: str(saved(folder, mapped(lambda m: m.bool(), masks))),
    "file, NumPy": lambda masks, folder: saved(folder, mapped(lambda m: m.numpy(), masks)),
    "file, flat": lambda masks, folder: saved(folder, flat(masks)),
    "file, module.": lambda masks, folder: saved(folder, {f"module.{m}" if m else m: t for m, t in masks.items()}),
    "file of old": lambda masks, folder: legacy(folder, masks),
    "file, .npz": lambda masks, folder: numbers(folder, masks),
    "file, .safetensors": lambda masks, folder: tensors(folder, masks),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_the_same(form, tmp_path):
    model = make()
    masks = masks_of(model)
    expected = parameter_masks(model, masks)
    found = parameter_masks(model, read_masks(FORMS[form](masks, tmp_path)))
    for name, mask in expected.items():
        assert found[name].shape == mask.shape
        assert torch.equal(found[name].double(), mask.double()), name
    assert all((mask == 1).all() for name, mask in found.items() if name not in expected)
    speedup = ModelSpeedup(model, X, FORMS[form](masks, tmp_path))
    assert speedup.speedup_model().conv.out_channels == 5
    assert speedup.report.relative_error < 1e-5


def test_wrapped_for_several_devices():
    for given in (lambda masks: masks, lambda masks: {f"module.{m}" if m else "module": t for m, t in masks.items()}):
        model = nn.DataParallel(make())
        masks = given(masks_of(model.module))
        compact = ModelSpeedup(model, X, masks).speedup_model()
        assert compact.module.conv.out_channels == 5


def test_the_state_of_a_model_that_is_masked(tmp_path):
    """NNI keeps masks as buffers of its wrappers, torch's prune beside the weights: a checkpoint holds them."""
    model = make()
    pruner = L1NormPruner(model, [{"op_names": ["conv", "next"], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()
    torch.save(model.state_dict(), tmp_path / "masked.pth")
    pruner.unwrap_model()
    found = read_masks(tmp_path / "masked.pth")
    assert sorted(found) == ["conv", "next"]
    assert all(torch.equal(found[m]["weight"], masks[m]["weight"]) for m in found)
    torch.nn.utils.prune.ln_structured(model.conv, "weight", 0.5, n=1, dim=0)
    found = read_masks(model.state_dict())
    assert torch.equal(found["conv"]["weight"], model.conv.weight_mask)
    assert sorted(found) == ["conv"]


def test_broadcast_masks_go_where_stock_speedup_fails():
    """What NNI's wrappers take, ``[C, 1, 1, 1]``, its speedup does not."""
    model = make()
    masks = {"conv": {"weight": torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1]).reshape(8, 1, 1, 1)}}
    with pytest.raises((IndexError, RuntimeError)):
        StockSpeedup(copy.deepcopy(model), X, copy.deepcopy(masks)).speedup_model()
    speedup = ModelSpeedup(model, X, masks)
    assert speedup.speedup_model().conv.out_channels == 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_masks_on_another_device(tmp_path):
    model = make()
    masks = mapped(lambda m: m.cuda(), masks_of(model))
    assert ModelSpeedup(model, X, masks).speedup_model().conv.out_channels == 5
    model = make().cuda()
    assert ModelSpeedup(model, X.cuda(), masks_of(make())).speedup_model().conv.out_channels == 5


def test_masks_saved_on_a_gpu_are_read_without_one(tmp_path, monkeypatch):
    model = make()
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        path = saved(tmp_path, masks_of(model))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises((RuntimeError, pickle.UnpicklingError), match="CUDA"):
        torch.load(path, weights_only=True)
    assert ModelSpeedup(model, X, path).speedup_model().conv.out_channels == 5


def test_parameters_that_are_shared_share_their_masks():
    model = make()
    model.other = model.next
    first, second = torch.ones(8, 8, 1, 1), torch.ones(8, 8, 1, 1)
    first[0], second[:, 2] = 0, 0
    found = parameter_masks(model, {"next": {"weight": first}, "other": {"weight": second}})
    assert torch.equal(found["next.weight"], first * second)


class Foreign:
    """Not an array, nor a mask."""


WRONG = {
    "a module that is not there": ({"con": {"weight": 1}}, "no module 'con'; did you mean 'conv'?"),
    "a parameter that is not there": ({"conv": {"wait": torch.ones(8)}}, "conv.wait is not a parameter of the model"),
    "a buffer": ({"norm": {"running_mean": torch.ones(8)}}, "norm.running_mean is not a parameter"),
    "a shape": ({"conv": {"weight": torch.ones(3, 8, 3, 3)}}, r"conv.weight has shape \(8, 3, 3, 3\), its mask \(3, 8"),
    "too many dimensions": ({"conv": {"bias": torch.ones(1, 8)}}, r"conv.bias has shape \(8,\), its mask \(1, 8\)"),
    "a mask that is none": ({"conv": {"weight": Foreign()}}, "conv.weight has a Foreign for a mask"),
    "words": ({"conv": {"weight": "mask.pth"}}, "conv.weight has a str for a mask"),
    "words in an array": ({"conv": {"bias": np.array(["0"] * 8)}}, "conv.bias has a ndarray for a mask"),
    "nan": ({"conv": {"bias": torch.full((8,), float("nan"))}}, "conv.bias has a mask that is not finite"),
    "a mask for a module": ({"conv": torch.ones(8)}, "'conv' needs {target: mask}"),
    "flat and not": ({"conv": {"weight": 1}, "head": torch.ones(4)}, "'head' needs {target: mask}, not a Tensor"),
    "weights": (make().state_dict(), "'scale' holds no mask of 0 and 1"),
    "what compress gives": ((make(), {"conv": {}}), "pass the masks, its second part"),
    "a model": (make(), "or the path of a file is needed, not a Net"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_masks_are_refused_in_one_line(case, tmp_path):
    masks, words = WRONG[case]
    model = make().train()
    handle = model.conv.register_forward_hook(lambda *given: None)
    before, hooks = copy.deepcopy(model.state_dict()), dict(model.conv._forward_hooks)
    for given in (masks, saved(tmp_path, masks)) if case == "a shape" else (masks,):
        with pytest.raises(ValueError, match=words) as caught:
            ModelSpeedup(model, X, given).speedup_model()
        assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert dict(model.conv._forward_hooks) == hooks
    handle.remove()


def test_files_that_hold_no_masks(tmp_path):
    torch.save(make(), tmp_path / "model.pth")
    torch.save({"conv": 3}, tmp_path / "number.pth")
    np.savez(tmp_path / "objects.npz", masks=np.array([{}], dtype=object))
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("model.pth", "number.pth", "objects.npz", "empty.pth"):
        with pytest.raises(ValueError, match=f"{name}: not a mask file") as caught:
            ModelSpeedup(make(), X, tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_computed_weight_is_named():
    model = make()
    nn.utils.parametrizations.weight_norm(model.conv)
    with pytest.raises(ValueError, match=r"conv.weight is not a parameter .* parametrizations.weight.original"):
        ModelSpeedup(model, X, {"conv": {"weight": torch.ones(8, 3, 3, 3)}})
