import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nni_plugins.pruners.patterns import Pattern
from nni_plugins.speedup import CompactFileError, ModelSpeedup, load_compact, save_compact
from nni_plugins.speedup.checked_file import pack_bits, unpack_bits
from nni_plugins.speedup.sparse import load_sparse, save_sparse, sparse_bytes


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 36, 16),
    ).eval()  # fmt: skip


def same_bits(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_ints(one), _ints(other))


def _ints(tensor):
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])


def masked(model, masks):
    out = copy.deepcopy(model)
    with torch.no_grad():
        for module, targets in masks.items():
            for target, mask in targets.items():
                getattr(out.get_submodule(module), target).mul_(mask)
    return out


def random_mask(shape, density, seed=0):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density).float()


@pytest.mark.parametrize(
    ("density", "form", "index_bytes"),
    [(0.5, "bits", 1 / 8), (0.2, "bits", 1 / 8), (0.05, "gaps", 0.05), (1.0, "dense", 0)],
)
def test_each_tensor_is_stored_in_its_smallest_form(tmp_path, density, form, index_bytes):
    model = net()
    masks = {"3": {"weight": random_mask(model[3].weight.shape, density)}}
    report = save_sparse(model, masks, tmp_path / "w.safetensors")
    stored = report.tensors["3.weight"]
    size = model[3].weight.numel()
    kept = int(masks["3"]["weight"].sum())
    assert stored.form == form
    assert stored.density == kept / size
    assert stored.dense_bytes == size * 4
    assert stored.bytes == pytest.approx(kept * 4 + index_bytes * size, rel=0.02)
    assert report.bytes == sum(t.bytes for t in report.tensors.values())
    assert report.dense_bytes == sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert report.path.stat().st_size == pytest.approx(report.bytes, abs=4000)
    state, found = load_sparse(tmp_path / "w.safetensors")
    expected = masked(model, masks).state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert torch.equal(found["3"]["weight"], masks["3"]["weight"])


def test_whole_kernels_take_a_bit_each(tmp_path):
    model = net()
    kernels = random_mask((32, 32), 0.3)
    masks = {"3": {"weight": kernels[:, :, None, None].expand(32, 32, 3, 3)}}
    report = save_sparse(model, masks, tmp_path / "w.safetensors")
    assert report.tensors["3.weight"].form == "kernels"
    assert report.tensors["3.weight"].bytes == int(kernels.sum()) * 36 + 32 * 32 // 8
    state, found = load_sparse(tmp_path / "w.safetensors")
    assert torch.equal(state["3.weight"], model[3].weight * masks["3"]["weight"])
    assert torch.equal(found["3"]["weight"], masks["3"]["weight"])


def test_a_two_of_four_pattern_costs_what_the_hardwares_does(tmp_path):
    model = net()
    mask = Pattern(2, 4).mask(model[6].weight.detach().abs()).float()
    report = sparse_bytes(model, {"6": {"weight": mask}})
    size = mask.numel()
    assert report.path is None
    assert report.tensors["6.weight"].bytes == size // 2 * 4 + size // 8  # two bits for each value that is kept


def test_the_last_bit_is_kept_whatever_the_values(tmp_path):
    state = {
        "a": torch.tensor([0.0, -0.0, float("nan"), float("inf"), 1e-45, -1.0] + [0.0] * 100),
        "half": torch.tensor([0.0, -0.0, 65504.0] + [0.0] * 61).half(),
        "brain": torch.zeros(70).bfloat16().index_fill(0, torch.tensor([3]), 2.0),
        "count": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "flags": torch.tensor([True, False]),
        "bytes": torch.zeros(100, dtype=torch.int8),
        "double": torch.zeros(64, dtype=torch.float64).index_fill(0, torch.tensor([63]), 1e-300),
    }
    save_sparse(state, None, tmp_path / "w.safetensors")
    loaded = load_sparse(tmp_path / "w.safetensors").state
    assert list(loaded) == list(state)
    for name, tensor in state.items():
        assert same_bits(loaded[name], tensor) if tensor.dtype is not torch.bool else torch.equal(loaded[name], tensor)


def test_a_weight_that_is_zero_but_not_masked_stays_so(tmp_path):
    """A weight that has just grown is 0; loaded, it must still be trainable."""
    mask = torch.zeros(10, 10)
    mask[:3] = 1
    save_sparse({"w": torch.zeros(10, 10)}, {"": {"w": mask}}, tmp_path / "w.safetensors")
    assert torch.equal(load_sparse(tmp_path / "w.safetensors").masks[""]["w"], mask)


def test_a_wrapped_model_is_stored_as_the_plain_one(tmp_path):
    from nni_plugins.pruners import MagnitudeWeightPruner

    model = net()
    pruner = MagnitudeWeightPruner(model, [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.9}])
    wrapped, masks = pruner.compress()
    x = torch.rand(2, 3, 8, 8)
    expected = wrapped(x)
    save_sparse(wrapped, None, tmp_path / "a.safetensors")
    save_sparse(wrapped.state_dict(), masks, tmp_path / "b.safetensors")
    for name in "ab":
        fresh = net(1)
        state, found = load_sparse(tmp_path / f"{name}.safetensors", fresh)
        assert set(state) == set(fresh.state_dict())
        assert torch.equal(fresh(x), expected)
        assert all(torch.equal(found[m]["weight"], masks[m]["weight"]) for m in masks)
    again = MagnitudeWeightPruner(fresh, [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.9}])
    again.update_masks(found)
    assert torch.equal(fresh(x), expected)


def test_a_compact_model_with_masks_left_is_saved_both_ways(tmp_path):
    model = net()
    rows = torch.ones(32)
    rows[:8] = 0
    holes = random_mask(model[3].weight.shape, 0.3) * rows[:, None, None, None]
    masks = {"3": {"weight": holes, "bias": rows}}
    x = torch.rand(2, 3, 8, 8)
    compact = ModelSpeedup(model, x, masks).speedup_model()
    left = {"3": {"weight": holes[8:]}}
    one = save_compact(compact, tmp_path / "compact.safetensors")
    two = save_sparse(compact, left, tmp_path / "sparse.safetensors")
    assert two.tensors["3.weight"].bytes < 0.5 * two.tensors["3.weight"].dense_bytes
    assert abs(two.bytes - one.bytes) < 20000
    fresh = load_compact(tmp_path / "compact.safetensors", net)
    load_sparse(tmp_path / "sparse.safetensors", fresh)
    assert torch.equal(fresh(x), compact(x))


def test_tied_weights_are_stored_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    mask = random_mask((50, 16), 0.2)
    masks = {"embed": {"weight": mask}, "head": {"weight": mask}}
    report = save_sparse(model, masks, tmp_path / "w.safetensors")
    assert list(report.tensors) == ["embed.weight"]
    state, found = load_sparse(tmp_path / "w.safetensors", Tied())
    assert torch.equal(state["head.weight"], model.embed.weight * mask)
    assert torch.equal(found["head"]["weight"], mask)


def test_what_is_wrong_is_said_in_one_line(tmp_path):
    model = net()
    with pytest.raises(ValueError, match=r"3\.gamma is no tensor"):
        save_sparse(model, {"3": {"gamma": torch.ones(2)}}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="its mask"):
        save_sparse(model, {"3": {"weight": torch.ones(2)}}, tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())
    path = tmp_path / "w.safetensors"
    save_sparse(model, None, path)
    with pytest.raises(CompactFileError, match="does not fit the model") as caught:
        load_sparse(path, nn.Linear(2, 2))
    assert "\n" not in str(caught.value)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CompactFileError, match="checksum"):
        load_sparse(path)
    path.write_bytes(data[:100])
    with pytest.raises(CompactFileError, match="damaged"):
        load_sparse(path)
    with pytest.raises(FileNotFoundError):
        load_sparse(tmp_path / "none")
    save_compact_like = tmp_path / "other.safetensors"
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, save_compact_like)
    with pytest.raises(CompactFileError, match="not sparse weights"):
        load_sparse(save_compact_like)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    density=st.floats(0, 1),
    seed=st.integers(0, 1000),
    kind=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)
def test_any_mask_comes_back(tmp_path_factory, shape, density, seed, kind):
    path = tmp_path_factory.mktemp("sparse") / "w"
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(kind)
    mask = random_mask(shape, density, seed)
    report = save_sparse({"w": tensor}, {"": {"w": mask}}, path)
    state, masks = load_sparse(path)
    assert same_bits(state["w"], torch.where(mask != 0, tensor, torch.zeros_like(tensor)))
    assert torch.equal(masks[""]["w"] != 0, mask != 0)
    assert report.bytes <= report.dense_bytes + tensor.numel() // 8 + 1
    assert torch.equal(unpack_bits(pack_bits(mask.flatten() != 0), mask.numel()), mask.flatten() != 0)
