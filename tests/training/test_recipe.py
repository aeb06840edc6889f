"""The recipe: what is accepted, and what its author is told when it is not."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from nni_plugins.training import Recipe, RecipeError, load_recipe, recipe_from_dict
from nni_plugins.training.schema import field_paths, reference


def write(tmp_path, text):
    path = tmp_path / "recipe.yml"
    path.write_text(text)
    return path


def test_an_empty_recipe_is_digits(tmp_path):
    recipe = load_recipe(write(tmp_path, ""))
    assert (recipe.data.name, recipe.model.name, recipe.prune.sparsity) == ("digits", "resnet8", 0.5)
    assert recipe.folder == str(tmp_path)


BAD = [
    ("prune: {sparsity: 1.2}", "recipe.yml: prune.sparsity is 1.2; it must be in [0, 1)"),
    ("prune: {sparsity: 1}", "recipe.yml: prune.sparsity is 1.0; it must be in [0, 1)"),
    ("prune: {sparsity: true}", "recipe.yml: prune.sparsity is true; it must be a number, in [0, 1)"),
    ("prune: {sparsity: .nan}", "recipe.yml: prune.sparsity is nan; it must be a finite number, in [0, 1)"),
    ("train: {learning_rate: .inf}", "recipe.yml: train.learning_rate is inf; it must be a finite number, above 0"),
    ("train: {learning_rate: 0}", "recipe.yml: train.learning_rate is 0.0; it must be above 0"),
    (f"train: {{learning_rate: {10**400}}}", "it must be a finite number, above 0"),
    ("train: {epochs: 2.5}", "recipe.yml: train.epochs is 2.5; it must be a whole number, at least 0"),
    ("train: {epochs: false}", "recipe.yml: train.epochs is false; it must be a whole number, at least 0"),
    ("train: {epochs: null}", "recipe.yml: train.epochs is null; it must be a whole number, at least 0"),
    ("train: {epochs: ten}", "recipe.yml: train.epochs is 'ten' (text); it must be a whole number, at least 0"),
    ("train: {amp: 1}", "recipe.yml: train.amp is 1; it must be true or false"),
    ("train: {epoch: 3}", "recipe.yml: train.epoch is not a field of the recipe; did you mean train.epochs?"),
    ("learning_rate: 1", "recipe.yml: learning_rate is not a field of the recipe; did you mean train.learning_rate?"),
    ("prun: {}", "recipe.yml: prun is not a field of the recipe; did you mean prune?"),
    ("model: {name: resnet21}", "did you mean resnet20?"),
    ("model: {name: 'my.module:'}", "or module:function"),
    (
        "model: {arguments: [1]}",
        "recipe.yml: model.arguments is [1] (a list); it must be a section of names and values",
    ),
    ("model: resnet20", "recipe.yml: model is 'resnet20' (text); it must be a section of fields"),
    ("prune: {groups: {layer1: 2}}", "recipe.yml: prune.groups.layer1 is 2.0; it must be in [0, 1)"),
    ("prune: {groups: {1: 0.5}}", "recipe.yml: prune.groups has the key 1; its keys must be text"),
    ("prune: {op_types: Conv2d}", "recipe.yml: prune.op_types is 'Conv2d' (text); it must be a list"),
    ("prune: {op_types: [1]}", "recipe.yml: prune.op_types.0 is 1; it must be text"),
    ("train: {milestones: [0.5, 1.5]}", "recipe.yml: train.milestones.1 is 1.5; it must be in (0, 1)"),
    ("data: {name: cifar10}", "recipe.yml: data.root is missing; data.name: cifar10 needs it"),
    ("- 1", "recipe.yml is [1] (a list); it must be a section of fields"),
    ("text", "recipe.yml is 'text' (text); it must be a section of fields"),
    ("seed: 1\nseed: 2", "recipe.yml: line 2: seed is given twice"),
    ("seed: [1", "recipe.yml: line 1:"),
    ("seed: !!python/object:os.system {}", "recipe.yml: line 1: could not determine a constructor"),
    ("? [a, b]\n: 1", "recipe.yml:"),
    ("model: &m {arguments: *m}", "recipe.yml is nested in itself, by an alias"),
    ("seed: " + "9" * 5000, "recipe.yml: Exceeds the limit"),
    ("seed: -1", "recipe.yml: seed is -1; it must be in [0, 4294967296)"),
    ("speedup: {tolerance: 1e-5x}", "speedup.tolerance is '1e-5x' (text); it must be a number"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_a_mistake_is_one_line_that_names_it(tmp_path, text, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", None])
def test_a_file_that_cannot_be_read(tmp_path, content):
    path = tmp_path / "recipe.yml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match=re.escape(str(path))):
        load_recipe(path)


def test_numbers_as_people_write_them(tmp_path):
    train = "train: {learning_rate: 1e-3, weight_decay: 5E-4, epochs: 8.0, milestones: [0.3, 0.6]}"
    recipe = load_recipe(write(tmp_path, train + "\nspeedup: {tolerance: 1e-6}"))
    assert recipe.train.learning_rate == 1e-3
    assert recipe.train.weight_decay == 5e-4
    assert recipe.train.milestones == (0.3, 0.6)
    assert recipe.train.epochs == 8
    assert isinstance(recipe.train.epochs, int)
    assert recipe.speedup.tolerance == 1e-6


def test_values_by_dotted_path():
    recipe = recipe_from_dict({"prune": {"groups": {"layer1": 0.1}}})
    changed = recipe.with_values(
        {"prune.sparsity": 0.25, "prune.groups.layer3.0": 0.5, "model.arguments.width": 8, "finetune.epochs": 4.0}
    )
    assert changed.prune.sparsity == 0.25
    assert changed.prune.groups == {"layer1": 0.1, "layer3.0": 0.5}
    assert changed.model.arguments == {"width": 8}
    assert changed.finetune.epochs == 4
    assert recipe.prune.groups == {"layer1": 0.1}
    assert recipe.model.arguments == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"prune.sparsty": 0.5},
            "parameters: prune.sparsty is not a field of the recipe; did you mean prune.sparsity?",
        ),
        ({"prune.sparsity": 1.5}, "parameters: prune.sparsity is 1.5; it must be in [0, 1)"),
        ({"prune.sparsity.x": 0.5}, "parameters: prune.sparsity.x: prune.sparsity is one value"),
        ({"prune.groups.layer1": "a"}, "parameters: prune.groups.layer1 is 'a' (text)"),
        ({"prune": 3}, "parameters: prune is 3; it must be a section of fields"),
        ({"": 1}, "is not a field of the recipe"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(RecipeError) as caught:
        recipe_from_dict({}).with_values(values)
    assert message in str(caught.value)


def test_saved_and_read_from_another_folder(tmp_path):
    recipe = recipe_from_dict({"data": {"root": "images", "name": "image_folder"}}, folder=tmp_path)
    (tmp_path / "elsewhere").mkdir()
    recipe.save(tmp_path / "elsewhere" / "recipe.yml")
    again = load_recipe(tmp_path / "elsewhere" / "recipe.yml")
    assert again == recipe
    assert again.path_of(again.data.root) == tmp_path / "images"


def test_dense_key_follows_what_decides_the_dense_model(tmp_path):
    (tmp_path / "own.py").write_text("def model(): pass\n")
    recipe = recipe_from_dict({"model": {"name": "own:model"}}, folder=tmp_path)
    key = recipe.dense_key()
    for same in ({"prune.sparsity": 0.1}, {"finetune.epochs": 9}, {"objective.macs": 0.2}, {"train.threads": 1}):
        assert recipe.with_values(same).dense_key() == key
    for other in ({"seed": 1}, {"train.epochs": 9}, {"model.arguments.width": 2}, {"data.batch_size": 9}):
        assert recipe.with_values(other).dense_key() != key
    (tmp_path / "own.py").write_text("def model(): return 1\n")
    assert recipe.dense_key() != key


def test_every_field_is_documented_and_its_default_is_allowed():
    paths = list(field_paths(Recipe))
    assert len(paths) > 50
    assert all(field.metadata.get("doc") for _, _, field in paths)
    assert recipe_from_dict(recipe_from_dict({}).to_dict()) == recipe_from_dict({})


def test_reading_a_recipe_imports_neither_torch_nor_nni():
    code = "import sys; import nni_plugins.training.recipe; print([m for m in ('torch', 'nni') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_reference_in_docs_is_current():
    text = (Path(__file__).parents[2] / "docs" / "recipe.md").read_text()
    assert text.endswith(reference(Recipe)), (
        "write nni_plugins.training.schema.reference(Recipe) at the end of docs/recipe.md"
    )
