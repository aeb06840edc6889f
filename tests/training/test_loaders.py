"""Batches: order, augmentation, and what counts as inputs."""

import pytest
import torch

from nni_plugins.training import RecipeError, build_data, recipe_from_dict
from nni_plugins.training.loaders import ArrayLoader, apply, augmented, map_tensors, split_batch


def loader(count=10, **settings):
    images = torch.arange(count).float().view(-1, 1, 1, 1).expand(count, 1, 4, 4)
    return ArrayLoader(images, torch.arange(count), torch.arange(count), settings.pop("batch_size", 4), **settings)


def test_order_depends_on_seed_and_epoch_alone():
    first, second = loader(shuffle=True, seed=3), loader(shuffle=True, seed=3)
    epochs = [torch.cat([labels for _, labels in first]).tolist() for _ in range(3)]
    torch.rand(5)
    second.set_epoch(2)
    assert torch.cat([labels for _, labels in second]).tolist() == epochs[2]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == list(range(10))
    assert torch.cat([labels for _, labels in loader(shuffle=True, seed=4)]).tolist() != epochs[0]


def test_images_stay_with_their_labels():
    for images, labels in loader(shuffle=True):
        assert torch.equal(images[:, 0, 0, 0], labels.float())


@pytest.mark.parametrize(("count", "batch", "shuffle", "sizes"), [
    (10, 4, True, [4, 4, 2]),
    (9, 4, True, [4, 4]),
    (9, 4, False, [4, 4, 1]),
    (1, 4, True, [1]),
    (8, 4, True, [4, 4]),
])  # fmt: skip
def test_no_training_batch_of_one(count, batch, shuffle, sizes):
    made = loader(count, batch_size=batch, shuffle=shuffle)
    assert [len(labels) for _, labels in made] == sizes
    assert len(made) == len(sizes)


def test_augmentation_shifts_and_flips():
    images = torch.arange(1, 65).float().view(1, 1, 8, 8).repeat(200, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    padded = torch.nn.functional.pad(images[0, 0], (1, 1, 1, 1))
    shifts = [padded[y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    seen = set()
    for image in augmented(images, generator, flip=True)[:, 0]:
        matches = [(index, turn) for index, shift in enumerate(shifts) for turn in (False, True)
                   if torch.equal(image, shift.flip(1) if turn else shift)]  # fmt: skip
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) == 18


def test_batches_of_all_shapes():
    a, b, y = torch.ones(2, 3), torch.ones(2, 3) * 2, torch.zeros(2)
    model = torch.nn.Bilinear(3, 3, 1)
    assert split_batch((a, y)) == (a, y)
    assert split_batch([a, b, y])[0] == (a, b)
    assert split_batch(((a, b), y))[0] == (a, b)
    assert split_batch({"input1": a, "input2": b, "labels": y})[0].keys() == {"input1", "input2"}
    outputs = [apply(model, inputs) for inputs in ((a, b), {"input1": a, "input2": b})]
    assert torch.equal(*outputs)
    assert map_tensors({"x": (a, [b])}, lambda t: t[:1])["x"][1][0].shape == (1, 3)


OWN = """
import torch
from torch.utils.data import DataLoader, TensorDataset

def loaders(n=8):
    part = lambda: DataLoader(TensorDataset(torch.rand(n, 5), torch.rand(n)), batch_size=4, shuffle=True)
    return part(), part(), part

def without_test():
    return {"train": [(torch.ones(2, 1), torch.ones(2))], "validation": [(torch.ones(2, 1), torch.ones(2))]}

def wrong(): return 3
def keys(): return {"train": [], "valid": []}
def iterator(): return iter([]), []
def empty(): return [1], []
"""


def test_own_loaders(tmp_path):
    (tmp_path / "own_data.py").write_text(OWN)

    def build(name):
        return build_data(recipe_from_dict({"data": {"name": f"own_data:{name}"}}, folder=tmp_path))

    torch.manual_seed(0)
    data = build("loaders")
    assert data.example.shape == (1, 5)
    assert len(list(data.read_test())) == 2
    state = torch.get_rng_state()
    build("without_test")
    assert torch.equal(state, torch.get_rng_state())
    for name, message in {
        "wrong": "it returned int",
        "keys": r"it returned the keys \['train', 'valid'\]",
        "iterator": "train is list_iterator, which cannot be read repeatedly",
        "empty": "its validation split is empty",
    }.items():
        with pytest.raises(RecipeError, match=message):
            build(name)
    with pytest.raises(RecipeError, match="it gives no test split"):
        build("without_test").read_test()
