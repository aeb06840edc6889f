"""module:function, from the recipe's folder, the working directory and what is installed."""

import sys

import pytest

from nni_plugins.training import RecipeError
from nni_plugins.training.resolve import call, resolve


def test_folder_wins_and_equal_names_do_not_mix(tmp_path, monkeypatch):
    for name in ("a", "b", "cwd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own_thing.py").write_text(f"where = '{name}'\n")
    monkeypatch.chdir(tmp_path / "cwd")
    assert resolve("own_thing:where", str(tmp_path / "a"), "model.name") == "a"
    assert resolve("own_thing:where", str(tmp_path / "b"), "model.name") == "b"
    assert resolve("own_thing:where", str(tmp_path / "a"), "model.name") == "a"
    assert resolve("own_thing:where", None, "model.name") == "cwd"


def test_packages_siblings_and_installed(tmp_path):
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").write_text("")
    (tmp_path / "own_package" / "nets.py").write_text("from own_sibling import five\nclass Net:\n    width = five()\n")
    (tmp_path / "own_sibling.py").write_text("def five():\n    import own_late\n    return own_late.value\n")
    (tmp_path / "own_late.py").write_text("value = 5\n")
    assert resolve("own_package.nets:Net.width", str(tmp_path), "model.name") == 5
    assert resolve("math:pi", str(tmp_path), "model.name") > 3
    assert sys.path[0] != str(tmp_path)


@pytest.mark.parametrize(
    ("text", "reference", "message"),
    [
        ("", "own_absent:f", "there is no module own_absent in"),
        ("import own_nowhere", "own_bad:f", "its module fails to import: No module named 'own_nowhere'"),
        ("1 / 0", "own_bad:f", "its module fails to import: ZeroDivisionError: division by zero"),
        ("def (", "own_bad:f", "its module fails to import: SyntaxError"),
        ("def build(): pass", "own_bad:biuld", "own_bad has no biuld; did you mean build?"),
    ],
)
def test_mistakes(tmp_path, text, reference, message):
    (tmp_path / "own_bad.py").write_text(text)
    sys.modules.pop("own_bad", None)
    with pytest.raises(RecipeError) as caught:
        resolve(reference, str(tmp_path), "model.name")
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"model.name is {reference}")
    assert "\n" not in str(caught.value)


def test_wrong_arguments(tmp_path):
    (tmp_path / "own_fit.py").write_text("def f(width): return width\nnumber = 3\n")
    assert call("own_fit:f", str(tmp_path), "model.name", width=3) == 3
    with pytest.raises(RecipeError, match="does not fit the arguments: missing a required argument: 'width'"):
        call("own_fit:f", str(tmp_path), "model.name")
    with pytest.raises(RecipeError, match="not a function but int"):
        call("own_fit:number", str(tmp_path), "model.name")
