"""Data as the loop sees it: loaders of training and validation, and a test split that only its reader opens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from nni_plugins.training.errors import NoTestSplit, RecipeError
from nni_plugins.training.loaders import ArrayLoader, map_tensors, split_batch
from nni_plugins.training.recipe import Recipe


@dataclass
class Data:
    """The splits of one recipe.

    Attributes
    ----------
    train, validation
        Iterables of batches (see :func:`nni_plugins.training.loaders.split_batch`).
    read_test
        Returns the test loader. Only :func:`nni_plugins.training.artefacts.evaluate_test` calls it.
    example
        Inputs of one image, as the model takes them: the dummy input.
    shape, classes
        Of the inputs and targets where they are known, for shipped models.
    """

    train: Iterable[Any]
    validation: Iterable[Any]
    read_test: Callable[[], Iterable[Any]]
    example: Any
    shape: tuple[int, ...] | None = None
    classes: int | None = None


def build_data(recipe: Recipe) -> Data:
    """Open the data of a recipe.

    Parameters
    ----------
    recipe
        Its ``data`` section decides, its ``seed`` orders training batches.

    Raises
    ------
    RecipeError
        Files that are missing or not what they should be, or a user's function that returns something else.
    """
    settings = recipe.data
    if ":" in settings.name:
        return _from_function(recipe)
    from nni_plugins.training.datasets import DATASETS

    root = None if settings.root is None else recipe.path_of(settings.root)
    if root is not None and not root.exists():
        raise RecipeError(f"data.root is {root}, which does not exist")
    try:
        source = DATASETS[settings.name](
            root, settings.validation, settings.split_seed, settings.limit, **settings.arguments
        )
    except TypeError as error:
        raise RecipeError(f"data.arguments do not fit {settings.name}: {error}") from None

    def loader(part: Any, index: torch.Tensor, training: bool = False) -> ArrayLoader:
        return ArrayLoader(
            part.images,
            part.labels,
            index,
            settings.batch_size if training else max(settings.batch_size, 256),
            mean=source.mean,
            std=source.std,
            shuffle=training,
            augment=settings.augment if training else "none",
            seed=recipe.seed,
        )

    first = loader(source.fit, source.train_index)
    example = first.normalised(source.fit.images[source.train_index[:1]])
    return Data(
        train=loader(source.fit, source.train_index, training=True),
        validation=loader(source.fit, source.validation_index),
        read_test=lambda: loader(*source.test()),
        example=example,
        shape=tuple(example.shape[1:]),
        classes=source.classes,
    )


def _from_function(recipe: Recipe) -> Data:
    from nni_plugins.training.resolve import call

    name = recipe.data.name
    train: Any
    validation: Any
    test: Any
    example: Any
    found = call(name, recipe.folder, "data.name", **recipe.data.arguments)
    if isinstance(found, dict):
        keys = {"train", "validation", "test", "example"}
        wrong = sorted(set(found) - keys)
        if wrong or not {"train", "validation"} <= set(found):
            raise RecipeError(
                f"data.name is {name}: it returned the keys {sorted(found)}; they must be train, validation, "
                "test (may be missing) and example (may be missing)"
            )
        train, validation, test, example = (found.get(key) for key in ("train", "validation", "test", "example"))
    elif isinstance(found, (list, tuple)) and len(found) in (2, 3):
        (train, validation, test), example = (*found, None)[:3], None
    else:
        raise RecipeError(
            f"data.name is {name}: it returned {type(found).__name__}; it must return (train, validation, test) "
            "loaders or a dictionary of them"
        )
    for split, loader in (("train", train), ("validation", validation)):
        if not hasattr(loader, "__iter__") or hasattr(loader, "__next__"):
            raise RecipeError(
                f"data.name is {name}: {split} is {type(loader).__name__}, which cannot be read repeatedly"
            )

    def read_test() -> Iterable[Any]:
        loader = test() if callable(test) and not hasattr(test, "__iter__") else test
        if loader is None:
            raise NoTestSplit(f"data.name is {name}: it gives no test split")
        return loader

    return Data(train, validation, read_test, _example(validation, name) if example is None else example)


def _example(loader: Iterable[Any], name: str) -> Any:
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed when it is read
        batch = next(iter(loader), None)
    if batch is None:
        raise RecipeError(f"data.name is {name}: its validation split is empty")
    return map_tensors(split_batch(batch)[0], lambda tensor: tensor[:1])
