"""An experiment for any model: written only if it can work, and then it works as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from nni_plugins.cli import commands
from nni_plugins.experiment.launch import load_config
from nni_plugins.training.recipe import load_recipe

NET = """
import torch
from torch import nn
from helper_of_net import act

class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c)
    def forward(self, x):
        return act(x + self.norm(self.b(act(self.a(x)))))

class Net(nn.Module):
    def __init__(self, width=8, channels=1, classes=10):
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.one, self.two = Block(width), Block(width)
        self.head = nn.Linear(width, classes)
    def forward(self, x):
        return self.head(self.two(self.one(act(self.stem(x)))).mean((2, 3)))

class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.head = nn.Linear(16, 3)
    def forward(self, x):
        return self.head(self.layer(self.words(x)).mean(1))

class Two(nn.Module):
    def __init__(self, out=1):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 16), nn.Linear(6, 16), nn.Linear(16, out)
    def forward(self, a, b):
        return self.head(torch.relu(self.a(a) + self.b(b)))

def pairs():
    torch.manual_seed(0)
    def part(n):
        a, b = torch.randn(n, 4), torch.randn(n, 6)
        return [(a, b, a.sum(1, keepdim=True) + b[:, :1])]
    return part(64), part(32), part(32)

def doubles():
    return [[(a, b, torch.cat([y, -y], 1)) for a, b, y in part] for part in pairs()]
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "net.py").write_text(NET, encoding="utf-8")
    (tmp_path / "code" / "helper_of_net.py").write_text("from torch import relu as act\n", encoding="utf-8")
    return tmp_path


def call(command: str) -> tuple[int, str, str]:
    answer = CliRunner().invoke(commands, command.split(), prog_name="nni-plugins")
    return answer.exit_code, answer.stdout, answer.stderr


def new(command: str) -> dict:
    code, text, errors = call(f"new {command} --json")
    assert code == 0, errors
    return json.loads(text)


def compressed(recipe: str, *changes: str) -> dict:
    options = " ".join(f"--set {change}" for change in ("train.epochs=1", "finetune.epochs=1", *changes))
    code, text, errors = call(f"compress {recipe} --output out --json {options}")
    assert code == 0, errors
    return json.loads(text)


def test_a_network_in_a_file_of_ones_own(place: Path) -> None:
    made = new("mine --model code/net.py:Net --argument width=12 --macs 0.4 --trials 7 --concurrency 3 --tuner Random")
    assert sorted(made["files"]) == ["README.md", "config.yml", "recipe.yml", "space.yml"]
    assert sorted(path.name for path in (place / "mine").iterdir()) == sorted(made["files"])
    assert [name for name in made["fields"] if name.startswith("prune.groups.")] == [
        "prune.groups.stem",
        "prune.groups.one",
        "prune.groups.two",
    ]
    config = load_config(place / "mine" / "config.yml")
    assert (config.max_trial_number, config.trial_concurrency, config.tuner.name) == (7, 3, "Random")
    findings = compressed("mine/recipe.yml", "data.limit=200")
    assert findings["compact"]["macs"] <= 0.401 * findings["dense"]["macs"]
    assert findings["relative_error"] < 1e-5
    assert findings["dense"]["macs"] == made["macs"]


def test_images_in_folders_of_the_size_that_the_model_takes(place: Path) -> None:
    from PIL import Image

    for index in range(24):
        folder = place / "images" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (10 * index, 0, 255 * (index % 2))).save(folder / f"{index}.png")
    new("mine --model code/net.py:Net --argument channels=3 --argument classes=2 --data images --input 1x3x16x16")
    recipe = load_recipe(place / "mine" / "recipe.yml")
    assert recipe.data.arguments == {"size": 16, "channels": 3}
    assert compressed("mine/recipe.yml")["compact"]["macs"] > 0


def test_a_model_of_words_without_data_at_hand(place: Path) -> None:
    new("mine --model code/net.py:Sequence --input 1x7:int64 --data random --per group --macs 0.8 --tuner Optuna")
    assert load_recipe(place / "mine" / "recipe.yml").data.arguments == {"shape": [7], "classes": 3, "dtype": "int64"}
    assert compressed("mine/recipe.yml")["relative_error"] < 1e-5


def test_several_inputs_and_a_loss_of_ones_own_choice(place: Path) -> None:
    changes = "--set train.loss=mse --set train.metric=mse --set prune.arguments.norm=l2"
    new(f"mine --model code/net.py:Two --data code/net.py:pairs {changes}")
    recipe = load_recipe(place / "mine" / "recipe.yml")
    assert (recipe.train.loss, recipe.prune.arguments) == ("mse", {"norm": "l2"})
    assert compressed("mine/recipe.yml")["metric"] == "mse"


def test_remote_machines_get_the_code_in_the_folder(place: Path) -> None:
    (place / "plain.py").write_text(NET.replace("from helper_of_net import act", "act = torch.relu"), encoding="utf-8")
    made = new("mine --model plain:Net --remote me@one --remote you@two:2222 --remote me@[::1]:22")
    assert {"plain.py", "config.remote.yml"} <= set(made["files"])
    service = yaml.safe_load((place / "mine" / "config.remote.yml").read_text("utf-8"))["trainingService"]
    assert [(one["user"], one["host"], one["port"]) for one in service["machineList"]] == [
        ("me", "one", 22),
        ("you", "two", 2222),
        ("me", "::1", 22),
    ]
    assert load_recipe(place / "mine" / "recipe.yml").folder == str(place / "mine")
    (place / "own").mkdir()
    (place / "own" / "__init__.py").touch()
    (place / "own" / "plain.py").write_text((place / "plain.py").read_text("utf-8"), encoding="utf-8")
    assert "own" in new("packed --model own.plain:Net --remote me@one")["files"]
    assert (place / "packed" / "own" / "plain.py").is_file()


def test_an_existing_folder_is_left_alone(place: Path) -> None:
    (place / "mine").mkdir()
    new("mine --model code/net.py:Net")  # an empty one is taken
    before = (place / "mine" / "recipe.yml").read_bytes()
    code, _, errors = call("new mine --model code/net.py:Two")
    assert (code, errors.count("\n")) == (1, 1)
    assert "mine exists already" in errors
    assert (place / "mine" / "recipe.yml").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--model code/net.py:Net --input 1x3x32x32", "the data (digits) give 1x1x8x8"),
        ("--model code/net.py:Two", "the model fails on the data's 1x1x8x8; --data says what it is trained on"),
        ("--model code/net.py:Net --macs 0.0001", "--macs 0.0001"),
        ("--model code/net.py:Nett", "did you mean Net?"),
        ("--model code/nett.py:Net", "there is no file"),
        ("--model nowhere:Net", "there is no module nowhere"),
        ("--model code/net.py", "module:function"),
        ("--model code/net.py:Net --data images", "there is no such folder"),
        ("--model code/net.py:Net --data random", "say of which size"),
        ("--model code/net.py:Net --checkpoint w.pt", "there is no such file"),
        ("--model code/net.py:Net --remote gpu1", "user@host"),
        ("--model code/net.py:Net --argument classes=3", "train.loss cross_entropy cannot be computed"),
        (
            "--model code/net.py:Two --data code/net.py:pairs",
            "output is [64, 1]; set train.loss=mse and train.metric=mse",
        ),
        (
            "--model code/net.py:Two --data code/net.py:doubles --argument out=2",
            "its labels are numbers, and train.loss",
        ),
        ("--model code/net.py:Net --set prune.sparsty=1", "did you mean prune.sparsity?"),
        ("--model torch.nn:Flatten", "must be one number that depends on the output"),
    ],
)
def test_what_cannot_work_is_not_written(place: Path, options: str, words: str) -> None:
    before = sorted(place.rglob("*.yml"))
    code, _, errors = call(f"new mine {options}")
    assert (code, errors.count("\n")) == (1, 1), errors
    assert words in errors
    assert sorted(place.rglob("*.yml")) == before
    assert not (place / "mine").exists()
    assert not [path for path in place.iterdir() if path.name.startswith(".mine")]
