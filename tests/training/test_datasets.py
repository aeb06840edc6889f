"""The known data sets: content, splits, and files that are not what they should be."""

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from nni_plugins.training import RecipeError, build_data, recipe_from_dict
from nni_plugins.training.datasets import stratified


def data_of(tmp_path=None, recipe_seed=0, **settings):
    return build_data(recipe_from_dict({"seed": recipe_seed, "data": settings}, folder=tmp_path))


def test_digits_are_those_of_sklearn():
    from sklearn.datasets import load_digits

    data, truth = data_of(), load_digits()
    assert torch.equal(data.train.images * 16, torch.from_numpy(truth.images).float()[:, None])
    assert torch.equal(data.train.targets, torch.from_numpy(truth.target))
    assert (data.shape, data.classes, tuple(data.example.shape)) == ((1, 8, 8), 10, (1, 1, 8, 8))


def test_digits_split_is_fixed_and_disjoint():
    one, two = data_of(), data_of(recipe_seed=7, validation=0.3)
    splits = [set(part.index.tolist()) for part in (one.train, one.validation, one.read_test())]
    assert sum(len(part) for part in splits) == len(set().union(*splits)) == 1797
    assert set(two.read_test().index.tolist()) == splits[2]  # the test split depends on nothing but its seed
    assert not set(two.train.index.tolist()) & splits[2]
    counts = torch.bincount(one.validation.targets[one.validation.index])
    assert counts.min() >= 26
    assert set(data_of(split_seed=1).read_test().index.tolist()) != splits[2]


def test_limit_keeps_the_test_split():
    small = data_of(limit=200)
    assert len(small.train.index) + len(small.validation.index) == pytest.approx(200, abs=5)
    assert set(small.read_test().index.tolist()) == set(data_of().read_test().index.tolist())


def test_stratified_keeps_one_of_each_class():
    labels = torch.tensor([0, 0, 1, 1, 2])
    first, second = stratified(labels, torch.arange(5), 0.1, 0)
    assert sorted(labels[first].tolist()) == [0, 1, 2]
    assert sorted(labels[second].tolist()) == [0, 1]


# --- CIFAR-10 -------------------------------------------------------------------------------------------------


@pytest.fixture
def cifar(tmp_path):
    random = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        batch = {
            b"batch_label": name.encode(),
            b"labels": [int(label) for label in np.arange(20) % 10],
            b"data": random.integers(0, 256, (20, 3072), dtype=np.uint8),
            b"filenames": [b"x.png"] * 20,
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return tmp_path


@pytest.mark.parametrize("below", [".", "cifar-10-batches-py"])
def test_cifar_folder(cifar, below):
    data = data_of(name="cifar10", root=str(cifar / below), batch_size=10, validation=0.3)
    assert (len(data.train.index), len(data.validation.index), len(data.read_test().index)) == (70, 30, 20)
    with (cifar / "cifar-10-batches-py" / "data_batch_1").open("rb") as file:
        truth = pickle.load(file, encoding="bytes")[b"data"].reshape(-1, 3, 32, 32)
    assert torch.equal(data.train.images[:20], torch.from_numpy(truth))
    images, labels = next(iter(data.train))
    assert (images.shape, images.dtype, labels.dtype) == ((10, 3, 32, 32), torch.float32, torch.int64)


def test_cifar_python2_pickle_of_strings(cifar):
    # As in the published files: protocol 2, written by Python 2, whose strings arrive as bytes.
    batch = cifar / "cifar-10-batches-py" / "data_batch_2"
    assert b"numpy" in batch.read_bytes()
    batch.write_bytes(batch.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert len(data_of(name="cifar10", root=str(cifar)).train.images) == 100


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch /tmp/should_not_exist_nni_plugins",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Evil()), "it refers to posix.system, which CIFAR-10 does not"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}), "2 images but 1 labels"),
        (pickle.dumps([1]), "is not a batch of CIFAR-10"),
        (b"\x80\x02}", "is not a batch of CIFAR-10"),
        (b"", "is not a batch of CIFAR-10"),
    ],
)
def test_cifar_batches_are_read_with_suspicion(cifar, content, message):
    (cifar / "cifar-10-batches-py" / "data_batch_3").write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        data_of(name="cifar10", root=str(cifar))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def jpeg(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=95)
    return stream.getvalue()


@pytest.fixture
def archive(tmp_path):
    arrays = {"classes": np.array(list("abcdefghij"))}
    for split, count in (("train", 60), ("test", 20)):
        shades = np.linspace(0, 255, count).astype(np.uint8)
        streams = [jpeg(np.full((32, 32, 3), shade, np.uint8)) for shade in shades]
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(streams), np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0] + [len(stream) for stream in streams])
        arrays[f"{split}_labels"] = (np.arange(count) % 10).astype(np.uint8)
    np.savez(tmp_path / "cifar.npz", **arrays)
    return tmp_path / "cifar.npz", arrays


def test_cifar_archive(archive):
    path, arrays = archive
    data = data_of(name="cifar10", root=str(path), validation=0.5)
    pixels = data.train.images[torch.arange(60)]
    assert torch.allclose(pixels[:, :, 4, 4].float().mean(1), torch.linspace(0, 255, 60).floor(), atol=2)
    assert data.train.targets.tolist() == arrays["train_labels"].tolist()
    assert len(data.read_test().index) == 20
    assert int(data.train.images.ready.sum()) == 60


def test_cifar_archive_that_is_broken(archive):
    path, arrays = archive
    np.savez(path, **{**arrays, "train_offsets": arrays["train_offsets"][:-1]})
    with pytest.raises(RecipeError, match="train_offsets do not fit"):
        data_of(name="cifar10", root=str(path))
    np.savez(path, **{**arrays, "train_jpeg": np.zeros_like(arrays["train_jpeg"])})
    with pytest.raises(RecipeError, match=r"image \d+ is not a readable image"):
        next(iter(data_of(name="cifar10", root=str(path)).train))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RecipeError, match=r"cannot be read as \.npz|train"):
        data_of(name="cifar10", root=str(path))


# --- image folders --------------------------------------------------------------------------------------------


def folder_of(root, count, classes=("cat", "dog"), mode="RGB"):
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new(mode, (10, 12), (label + 1) * 40).save(root / name / f"{index}.png")
    return root


def test_one_image_folder_is_split(tmp_path):
    folder_of(tmp_path / "all", 20)
    data = data_of(tmp_path, name="image_folder", root="all", arguments={"size": 16})
    sizes = [len(part.index) for part in (data.train, data.validation, data.read_test())]
    assert (sizes, data.classes, data.shape) == ([26, 6, 8], 2, (3, 16, 16))
    images, labels = next(iter(data.validation))
    red = (images[:, 0, 0, 0] * 0.25 + 0.5) * 255
    assert torch.allclose(red, 40.0 * (labels + 1), atol=0.1)


@pytest.mark.parametrize("with_validation", [True, False])
def test_image_folder_with_its_own_splits(tmp_path, with_validation):
    folder_of(tmp_path / "train", 10)
    folder_of(tmp_path / "test", 3)
    if with_validation:
        folder_of(tmp_path / "val", 4)
    data = data_of(name="image_folder", root=str(tmp_path), arguments={"size": 8, "channels": 1})
    assert data.shape == (1, 8, 8)
    sizes = [len(part.index) for part in (data.train, data.validation, data.read_test())]
    assert sizes == ([20, 8, 6] if with_validation else [16, 4, 6])


def test_image_folders_that_are_wrong(tmp_path):
    with pytest.raises(RecipeError, match="which does not exist"):
        data_of(name="image_folder", root=str(tmp_path / "none"))
    with pytest.raises(RecipeError, match="has 0 folders"):
        data_of(name="image_folder", root=str(tmp_path))
    folder_of(tmp_path / "train", 4)
    with pytest.raises(RecipeError, match="no folder test"):
        data_of(name="image_folder", root=str(tmp_path)).read_test()
    folder_of(tmp_path / "test", 1, ("cat", "dog", "emu"))
    with pytest.raises(RecipeError, match="has the class emu, which train has not"):
        data_of(name="image_folder", root=str(tmp_path)).read_test()
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"not an image")
    with pytest.raises(RecipeError, match=r"0\.png is not a readable image"):
        list(data_of(name="image_folder", root=str(tmp_path)).train) + list(
            data_of(name="image_folder", root=str(tmp_path)).validation
        )
    with pytest.raises(RecipeError, match=r"data\.arguments do not fit image_folder"):
        data_of(name="image_folder", root=str(tmp_path), arguments={"sise": 8})
