"""The recipe: one compression from model and data to compact model, as checked settings.

``load_recipe`` reads it, ``Recipe.with_values`` sets fields by dotted path (what a tuner does), and
:mod:`nni_plugins.training.pipeline` runs it. Importing this module imports neither torch nor NNI.
"""

# ruff: noqa: RUF009 (option and section return dataclass fields)
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_origin

import yaml

from nni_plugins.training.errors import RecipeError
from nni_plugins.training.schema import check, closest, field_paths, hints, option, plain, section, show
from nni_plugins.training.sections import (
    AUTO,
    DataSettings,
    DistillSettings,
    ExportSettings,
    FinetuneSettings,
    ModelSettings,
    ObjectiveSettings,
    PruneSettings,
    QuantizeSettings,
    RankSettings,
    SearchSettings,
    SpeedupSettings,
    SupernetSettings,
    TrainSettings,
)
from nni_plugins.training.steps import USUAL, check_order
from nni_plugins.training.yaml_file import read_yaml


@dataclass(frozen=True)
class Recipe:
    """A whole compression."""

    seed: int = option(0, "seed of weights, data order and pruners", low=0, below=2**32)
    steps: tuple[str, ...] = option(
        USUAL, "what is done, in order; an order that cannot work is refused", choices=USUAL
    )
    folder: str | None = option(None, "where relative paths and module:function start; null: the recipe's own folder")
    model: ModelSettings = section(ModelSettings)
    data: DataSettings = section(DataSettings)
    train: TrainSettings = section(TrainSettings)
    prune: PruneSettings = section(PruneSettings)
    rank: RankSettings = section(RankSettings)
    supernet: SupernetSettings = section(SupernetSettings)
    finetune: FinetuneSettings = section(FinetuneSettings)
    distill: DistillSettings = section(DistillSettings)
    speedup: SpeedupSettings = section(SpeedupSettings)
    quantize: QuantizeSettings = section(QuantizeSettings)
    export: ExportSettings = section(ExportSettings)
    objective: ObjectiveSettings = section(ObjectiveSettings)
    search: SearchSettings = section(SearchSettings)

    def with_values(self, values: Mapping[str, Any], source: str = "parameters") -> Recipe:
        """Return a recipe with some fields set.

        Parameters
        ----------
        values
            Dotted path to value. Below a field that holds names and values, the rest of the path is the name:
            ``prune.groups.layer3.0`` sets ``groups['layer3.0']``. A dictionary with ``_name``, which NNI's tuners give
            for a nested choice, sets the path to that name, and the paths that stand beside it.
        source
            What to call the values in an error.

        Raises
        ------
        RecipeError
            A path that is not a field, or a value that its field refuses.
        """
        tree = self.to_dict()
        for path, value in unnested(values).items():
            _set(tree, path, value, source)
        return _in_order(_agreeing(check(type(self), tree, source), source), source)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that :func:`recipe_from_dict` reads back."""
        return plain(self)

    def save(self, path: str | Path) -> None:
        """Write the recipe as YAML; it can be read back from any folder."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")

    def path_of(self, text: str) -> Path:
        """Return the place that a path in the recipe means; ``~`` and variables such as ``$DATA`` are filled in."""
        return Path(self.folder or os.getcwd()) / Path(os.path.expandvars(text)).expanduser()

    def dense_key(self) -> str:
        """Return a short hash of what decides the dense model: two recipes with one key share one baseline."""
        from nni_plugins.training.resolve import source_digest

        tree = self.to_dict()
        decisive = {name: tree[name] for name in ("seed", "model", "data", "train")}
        decisive["train"].pop("threads")
        for name, value in (("checkpoint", self.model.checkpoint), ("root", self.data.root)):
            if value is not None:
                place = self.path_of(value)
                decisive[name] = str(place.resolve())
                if place.is_file():
                    decisive[name + "_state"] = (place.stat().st_size, place.stat().st_mtime_ns)
        named = (self.model.name, self.data.name, self.train.loss, self.train.metric, self.train.optimizer)
        decisive["code"] = [source_digest(name, self.folder) for name in named if ":" in name]
        text = json.dumps(decisive, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe.

    Parameters
    ----------
    path
        A YAML file.

    Raises
    ------
    RecipeError
        In one line: the file, the field, what is wrong and what is known.
    """
    path = Path(path)
    tree = read_yaml(path)
    try:
        return recipe_from_dict(tree, path.name, path.parent)
    except RecursionError:
        raise RecipeError(f"{path.name} is nested in itself, by an alias") from None


def recipe_from_dict(tree: Any, source: str = "recipe", folder: str | Path | None = None) -> Recipe:
    """Check plain data as a recipe; relative paths in it start at ``folder`` unless it says otherwise."""
    recipe = _in_order(_agreeing(check(Recipe, tree, source), source), source)
    base = Path(folder or os.getcwd()).absolute()
    own = base / recipe.folder if recipe.folder else base
    return recipe.with_values({"folder": str(own)}, source)


def _agreeing(recipe: Recipe, source: str) -> Recipe:
    """Refuse an option of a pruner that may be one of a few texts, and is none of them."""
    from nni_plugins.pruners.choices import CHOICES

    known = CHOICES.get(recipe.prune.pruner, {})
    for name, value in recipe.prune.arguments.items():
        if name in known and value not in known[name]:
            may = ", ".join("null" if item is None else str(item) for item in known[name])
            raise RecipeError(
                f"{source}: prune.arguments.{name} is {show(value)}; of {recipe.prune.pruner} it must be one of {may}"
            )
    if recipe.prune.round_to == AUTO:
        if recipe.prune.target == "latency":
            raise RecipeError(
                f"{source}: prune.round_to: auto looks for what saves time, which prune.target: latency does already; "
                "write a number"
            )
        if recipe.supernet.epochs:
            raise RecipeError(
                f"{source}: prune.round_to: auto times one pruned model, and a supernet has many; write a number"
            )
    return recipe


def _in_order(recipe: Recipe, source: str) -> Recipe:
    """Return a recipe whose steps can follow each other."""
    wanted = [name for name, asked in (("quantize", recipe.quantize.method != "none"),) if asked]
    wanted += ["export"] if recipe.export.formats else []
    wanted += ["finetune"] if recipe.distill.method != "none" else []
    if recipe.distill.method in ("kd", "dkd") and recipe.train.loss in ("mse", "l1", "bce"):
        raise RecipeError(
            f"{source}: distill.method is {recipe.distill.method}, which compares probabilities of classes, and "
            f"train.loss {recipe.train.loss} has none; take feature"
        )
    if recipe.rank.lowest >= recipe.rank.highest:
        raise RecipeError(
            f"{source}: rank.lowest is {recipe.rank.lowest:g}; it must be below rank.highest, {recipe.rank.highest:g}"
        )
    try:
        check_order(recipe.steps, wanted)
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from None
    return recipe


def unnested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with nested choices taken apart: ``{path: {'_name': 'taylor', other: 3}}`` is two values."""
    flat: dict[str, Any] = {}
    for path, value in values.items():
        if isinstance(value, Mapping) and "_name" in value:
            flat[path] = value["_name"]
            flat.update(unnested({name: inner for name, inner in value.items() if name != "_name"}))
        else:
            flat[path] = value
    return flat


def _set(tree: dict[str, Any], path: str, value: Any, source: str) -> None:
    kind: Any = Recipe
    parts = path.split(".")
    for index, part in enumerate(parts):
        known = [field.name for field in fields(kind)]
        if part not in known:
            paths = [name for name, _, _ in field_paths(Recipe)]
            raise RecipeError(f"{source}: {path} is not a field of the recipe; {closest(path, paths)}")
        kind = hints(kind)[part]
        if not is_dataclass(kind):
            rest = ".".join(parts[index + 1 :])
            if rest and get_origin(kind) is not dict:
                raise RecipeError(
                    f"{source}: {path}: {'.'.join(parts[: index + 1])} is one value, without fields of its own"
                )
            if rest:
                tree[part][rest] = value
            else:
                tree[part] = value
            return
        tree = tree[part] if index + 1 < len(parts) else tree
    tree[parts[-1]] = value
