"""A recipe that is edited while its experiment runs, or before it goes on, is said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nni_plugins.experiment.recipe_watch import RecipeWatch, recipes, said_of_recipes


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "log").mkdir()
    path = tmp_path / "recipe.yml"
    path.write_text("train: {epochs: 2}\nprune: {sparsity: 0.5}\n", encoding="utf-8")
    return path


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))  # clocks of file systems are coarse


def test_a_change_of_the_recipe_is_said_once_and_kept(recipe: Path, tmp_path: Path) -> None:
    said: list[str] = []
    watch = RecipeWatch(recipe, tmp_path, said.append)
    for _ in range(3):
        watch()
    assert said == []
    write(recipe, "# a word\ntrain: {epochs: 2}\nprune: {sparsity: 0.5}\n")
    watch()
    write(recipe, "train: {epochs: [")  # half of it
    watch()
    assert said == []
    write(recipe, "train: {epochs: 4}\nprune: {sparsity: 0.5}\nfinetune: {epochs: 1}\n")
    watch()
    watch()
    (line,) = said
    assert line.startswith("warning: recipe.yml is not what it was (train.epochs, finetune): trials from now on")
    assert "(train.epochs, finetune): trials before and after do not compare" in said_of_recipes(tmp_path)
    assert [one["recipe"]["train"]["epochs"] for one in recipes(tmp_path)] == [2, 4]

    write(recipe, "train: {epochs: 5}\n")  # while it is stopped
    again: list[str] = []
    RecipeWatch(recipe, tmp_path, again.append)()
    assert len(again) == 1
    assert "(train.epochs, prune, finetune)" in again[0]


def test_what_is_not_there_is_no_change(recipe: Path, tmp_path: Path) -> None:
    said: list[str] = []
    RecipeWatch(None, tmp_path, said.append)()
    watch = RecipeWatch(recipe, tmp_path, said.append)
    watch()
    recipe.unlink()
    watch()
    assert said == []
    assert said_of_recipes(tmp_path) == said_of_recipes(tmp_path / "none") == ""
