"""The known data sets: where their files are, how they are read, how they are split."""

from __future__ import annotations

import gzip
import importlib.util
import io
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nni_plugins.training.errors import NoTestSplit, RecipeError, first_line
from nni_plugins.training.loaders import DecodedOnUse, Images

TEST_SHARE = 0.2
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


@dataclass
class Part:
    """Images and labels that belong together, read from one place."""

    images: Images
    labels: Tensor


@dataclass
class Source:
    """A data set before batching: ``fit`` holds training and validation; ``test`` reads the test split when called."""

    fit: Part
    test: Callable[[], tuple[Part, Tensor]]
    train_index: Tensor
    validation_index: Tensor
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def digits(root: Path | None, validation: float, seed: int, limit: int | None) -> Source:
    """scikit-learn's digits, 1,797 images of 8 x 8: a fifth is the test split, whatever the other settings are."""
    table = _digits_table()
    images = torch.from_numpy(table[:, :-1].reshape(-1, 1, 8, 8).astype(np.float32) / 16)
    part = Part(images, torch.from_numpy(table[:, -1].astype(np.int64)))
    rest, test = stratified(part.labels, torch.arange(len(images)), TEST_SHARE, seed)
    train, held = _fit_split(part.labels, rest, validation, seed, limit)
    return Source(part, lambda: (part, test), train, held, 10, (0.3053,), (0.3761,))


def cifar10(root: Path | None, validation: float, seed: int, limit: int | None) -> Source:
    """CIFAR-10, from torchvision's folder (or the one above it) or from a .npz of JPEG streams."""
    assert root is not None
    if root.suffix == ".npz":
        archive = _open_archive(root)
        fit, test = _archive_part(archive, "train", root), lambda: _archive_part(archive, "test", root)
    else:
        folder = next(
            (place for place in (root, root / "cifar-10-batches-py") if (place / "data_batch_1").exists()), None
        )
        if folder is None:
            raise RecipeError(
                f"data.root is {root}: no cifar-10-batches-py with data_batch_1 is there, and it is no .npz"
            )
        fit = _batches([folder / f"data_batch_{number}" for number in range(1, 6)])
        test = lambda: _batches([folder / "test_batch"])  # noqa: E731
    train, held = _fit_split(fit.labels, torch.arange(len(fit.labels)), validation, seed, limit)

    def read_test() -> tuple[Part, Tensor]:
        part = test()
        return part, torch.arange(len(part.labels))

    return Source(fit, read_test, train, held, 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def image_folder(
    root: Path | None, validation: float, seed: int, limit: int | None, size: int = 32, channels: int = 3
) -> Source:
    """A folder of images, one subfolder a class; or of ``train``, ``test`` and perhaps ``val`` of such folders.

    Parameters
    ----------
    size
        Images are resized to ``size`` x ``size``.
    channels
        3 for colour, 1 for grey.
    """
    assert root is not None
    if not root.is_dir():
        raise RecipeError(f"data.root is {root}, which is not a folder")
    if not (root / "train").is_dir():
        classes = _classes(root)
        part = _image_part(_image_files(root, classes), size, channels)
        rest, test = stratified(part.labels, torch.arange(len(part.labels)), TEST_SHARE, seed)
        train, held = _fit_split(part.labels, rest, validation, seed, limit)
        return Source(part, lambda: (part, test), train, held, len(classes), *_half(channels))
    classes = _classes(root / "train")
    files = _image_files(root / "train", classes)
    own_validation = next((root / name for name in ("val", "validation", "valid") if (root / name).is_dir()), None)
    count = len(files)
    if own_validation is not None:
        files = files + _image_files(own_validation, classes)
    part = _image_part(files, size, channels)
    if own_validation is None:
        train, held = _fit_split(part.labels, torch.arange(count), validation, seed, limit)
    else:
        train, held = torch.arange(count), torch.arange(count, len(files))
        if limit is not None and limit < count:
            train, _ = stratified(part.labels, train, 1 - limit / count, seed)

    def read_test() -> tuple[Part, Tensor]:
        if not (root / "test").is_dir():
            raise NoTestSplit(f"data.root is {root}: it has a folder train but no folder test")
        held_out = _image_part(_image_files(root / "test", classes), size, channels)
        return held_out, torch.arange(len(held_out.labels))

    return Source(part, read_test, train, held, len(classes), *_half(channels))


DATASETS: dict[str, Callable[..., Source]] = {"digits": digits, "cifar10": cifar10, "image_folder": image_folder}


def stratified(labels: Tensor, index: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split indices in two so that each class gives the same share.

    Parameters
    ----------
    labels
        ``[n]``, class of every image.
    index
        Which images to split.
    share
        Part of each class that goes to the second split; at least one image stays in each where there are two.
    seed
        The same seed gives the same split.

    Returns
    -------
    tuple
        Two sorted index tensors.
    """
    generator = torch.Generator().manual_seed(seed)
    first, second = [], []
    for label in labels[index].unique():
        own = index[labels[index] == label]
        own = own[torch.randperm(len(own), generator=generator)]
        cut = min(max(round(len(own) * share), 1), len(own) - 1) if len(own) > 1 else 0
        second.append(own[:cut])
        first.append(own[cut:])
    return torch.cat(first).sort().values, torch.cat(second).sort().values


def _fit_split(labels: Tensor, index: Tensor, validation: float, seed: int, limit: int | None) -> tuple[Tensor, Tensor]:
    if limit is not None and limit < len(index):
        _, index = stratified(labels, index, limit / len(index), seed + 2)
    train, held = stratified(labels, index, validation, seed + 1)
    if not len(train) or not len(held):
        raise RecipeError(f"data: {len(index)} images are too few to split into training and validation")
    return train, held


def _half(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return (0.5,) * channels, (0.25,) * channels


def _digits_table() -> np.ndarray:
    # Reading the file directly: importing sklearn.datasets takes two seconds, most of them scipy.
    spec = importlib.util.find_spec("sklearn")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            with gzip.open(path) as file:
                return np.array(file.read().replace(b"\n", b",").rstrip(b",").split(b","), dtype=np.float32).reshape(
                    -1, 65
                )
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise RecipeError("data.name is digits, which comes with scikit-learn: pip install scikit-learn") from None
    found = load_digits()
    return np.concatenate([found.data, found.target[:, None]], axis=1).astype(np.float32)


class _OnlyArrays(pickle.Unpickler):
    """Reads what CIFAR's batches are made of, and nothing that could run code."""

    ALLOWED = frozenset({("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")})
    RECONSTRUCT = frozenset({"numpy.core.multiarray", "numpy._core.multiarray"})

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        if module in self.RECONSTRUCT and name == "_reconstruct":
            return np.zeros(0).__reduce__()[0]
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which CIFAR-10 does not")


def _batches(paths: list[Path]) -> Part:
    images, labels = [], []
    for path in paths:
        try:
            with path.open("rb") as file:
                batch = _OnlyArrays(file, encoding="bytes").load()
            images.append(np.asarray(batch[b"data"], dtype=np.uint8).reshape(-1, 3, 32, 32))
            labels.append(np.asarray(batch[b"labels"], dtype=np.int64))
            if len(images[-1]) != len(labels[-1]):
                raise ValueError(f"{len(images[-1])} images but {len(labels[-1])} labels")
        except Exception as error:
            raise RecipeError(f"{path} is not a batch of CIFAR-10: {first_line(error)}") from None
    return Part(torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels)))


def _open_archive(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise RecipeError(f"data.root is {path}: it cannot be read as .npz: {first_line(error)}") from None


def _archive_part(archive: Any, split: str, path: Path) -> Part:
    try:
        stream, offsets, labels = (archive[f"{split}_{name}"] for name in ("jpeg", "offsets", "labels"))
    except Exception as error:  # zipfile, zlib and numpy each have their own
        raise RecipeError(f"data.root is {path}: {split}: {first_line(error)}") from None
    if len(offsets) != len(labels) + 1 or (len(offsets) and offsets[-1] > len(stream)):
        raise RecipeError(f"data.root is {path}: its {split}_offsets do not fit its labels or its streams")
    buffer = memoryview(stream.tobytes())

    def decode(index: int) -> np.ndarray:
        return _pixels(io.BytesIO(buffer[offsets[index] : offsets[index + 1]]), 3, None, f"{path}: image {index}")

    images = DecodedOnUse(decode, len(labels), (3, 32, 32))
    return Part(images, torch.from_numpy(labels.astype(np.int64)))


def _classes(root: Path) -> list[str]:
    names = sorted(place.name for place in root.iterdir() if place.is_dir() and not place.name.startswith("."))
    if len(names) < 2:
        raise RecipeError(f"data.root: {root} has {len(names)} folders; it must have one for each class, at least two")
    return names


def _image_files(root: Path, classes: list[str]) -> list[tuple[Path, int]]:
    unknown = sorted({place.name for place in root.iterdir() if place.is_dir() and place.name[0] != "."} - set(classes))
    if unknown:
        raise RecipeError(f"data.root: {root} has the class {unknown[0]}, which train has not")
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((root / name).rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not files:
        raise RecipeError(f"data.root: {root} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return files


def _image_part(files: list[tuple[Path, int]], size: int, channels: int) -> Part:
    def decode(index: int) -> np.ndarray:
        path = files[index][0]
        return _pixels(path, channels, size, str(path))

    labels = torch.tensor([label for _, label in files])
    return Part(DecodedOnUse(decode, len(files), (channels, size, size)), labels)


def _pixels(file: Any, channels: int, size: int | None, name: str) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(file) as image:
            image = image.convert("RGB" if channels == 3 else "L")
            if size is not None and image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.BILINEAR)
            pixels = np.array(image, dtype=np.uint8)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{name} is not a readable image: {first_line(error)}") from None
    return pixels.reshape(pixels.shape[0], pixels.shape[1], channels).transpose(2, 0, 1).copy()
