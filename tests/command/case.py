"""What a case of wrong input is made of: files, a command, and words that the answer must have."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

NET = """
import torch
from torch import nn

def net(width=8):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10),
    )

def other():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))

def nothing(): return None
def text(): return "a model"
def raises(): raise KeyError("no weights here\\nnor there")
def stops(): raise SystemExit(3)
def bare(): return nn.ReLU()
def two(a): return net(a)
class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
    def forward(self, a, b): return self.layer(a) + b
class Bad(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
    def forward(self, x): raise RuntimeError("first line\\nsecond line")
class Nowhere(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
    def forward(self, x): return "text"
def frozen(): return nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))

def lazy(): return nn.Sequential(nn.Flatten(), nn.LazyLinear(4), nn.Linear(4, 2))
def double(): return net().double()
def in_words(): return {"x": "text"}
def recursive(): return recursive()
def late():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)
        def forward(self, x): return self.b(self.a(x))
    return Late()
class Quits(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
    def forward(self, x): raise SystemExit(5)

def batch(n=4): return torch.randn(n, 1, 8, 8), torch.zeros(n, dtype=torch.long)
def loaders(): return [batch()], [batch()], [batch()]
def no_loaders(): return None
def one_loader(): return [batch()]
def empty_loaders(): return [], [], []
def empty_validation(): return [batch()], [], []
def failing_loaders(): raise FileNotFoundError("/data/train.csv")
def odd_batches(): return [torch.zeros(2)], [torch.zeros(2)], [torch.zeros(2)]
def texts(): return ["abc"], ["abc"], ["abc"]
def wrong_classes(): return [(torch.randn(4, 1, 8, 8), torch.full((4,), 99))], [batch()], [batch()]
def breaking():
    def rows():
        yield batch()
        raise OSError("the disk went away")
    class Rows:
        def __iter__(self): return rows()
        def __len__(self): return 2
    return Rows(), [batch()], [batch()]
def nans():
    x, y = batch()
    return [(x * float("nan"), y)], [(x, y)], [(x, y)]
def metric(outputs, targets): return "good"
def failing_metric(model): raise ValueError("no data")
def wrong_metric(model): return "good"
LIMIT = 3
"""

TINY: dict[str, Any] = {
    "model": {"name": "mlp"},
    "data": {"name": "digits", "limit": 100},
    "train": {"epochs": 1, "threads": 1},
    "finetune": {"epochs": 1},
}
CONFIG: dict[str, Any] = {
    "experimentName": "wrong",
    "trialCommand": "python -m nni_plugins.trial recipe.yml",
    "trialCodeDirectory": ".",
    "trialConcurrency": 1,
    "maxTrialNumber": 2,
    "searchSpace": {"prune.sparsity": {"_type": "uniform", "_value": [0.4, 0.6]}},
    "tuner": {"name": "TPE", "classArgs": {"optimize_mode": "maximize"}},
    "trainingService": {"platform": "local"},
}


class Reverse:
    """A pickle that runs code when it is read."""

    def __reduce__(self) -> Any:
        return (Path("ran-code").mkdir, ())


@dataclass
class Case:
    """A wrong input.

    Attributes
    ----------
    name
        Of the test.
    command
        Arguments.
    words
        What the line must have.
    files
        To write beforehand: text, bytes, what YAML can hold; None is a folder.
    code
        The exit code.
    """

    name: str
    command: str
    words: tuple[str, ...]
    files: dict[str, Any] = field(default_factory=dict)
    code: int = 1

    def write(self, folder: Path) -> None:
        for name, content in {"net.py": NET, **self.files}.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                path.mkdir(exist_ok=True)
            elif isinstance(content, bytes):
                path.write_bytes(content)
            elif isinstance(content, str):
                path.write_text(content, encoding="utf-8")
            else:
                path.write_text(yaml.safe_dump(content), encoding="utf-8")


def usage(command: str, *words: str) -> Case:
    """Wrong arguments: refused before anything is looked at."""
    return Case(f"usage: {command}", command, words, code=2)


def recipe(name: str, content: Any, *words: str, command: str = "compress r.yml", **files: Any) -> Case:
    """A recipe that cannot be."""
    return Case(f"recipe: {name}", command, words, {"r.yml": content, **files})


def run_of(name: str, content: Any, *words: str, also: str = "", **files: Any) -> Case:
    """A recipe that is well formed, and cannot work: the tiny one with changes."""
    merged = {**content, **{key: {**value, **content.get(key, {})} for key, value in TINY.items()}}
    return Case(f"work: {name}", f"compress r.yml {also}".strip(), words, {"r.yml": merged, **files})


def config(name: str, content: Any, *words: str, raw: bool = False, also: str = "", **files: Any) -> Case:
    """A configuration of an experiment that must not start."""
    whole = content if raw else {key: value for key, value in {**CONFIG, **content}.items() if value is not ...}
    named = {key.replace("__", "."): value for key, value in files.items()}
    return Case(
        f"config: {name}",
        f"run e {also}".strip(),
        words,
        {"e/config.yml": whole, "e/recipe.yml": TINY, **_in("e", named)},
    )


def nas(name: str, content: Any, *words: str, **more: Any) -> Case:
    """A configuration of an architecture search that must not start."""
    whole = {
        "trialConcurrency": 1,
        "maxTrialNumber": 2,
        "trainingService": {"platform": "local"},
        "nas": content,
        **more,
    }
    return Case(f"nas: {name}", "run e", words, {"e/config.yml": whole, "e/recipe.yml": TINY})


def _in(folder: str, files: dict[str, Any]) -> dict[str, Any]:
    return {f"{folder}/{name}": content for name, content in files.items()}


def model(command: str, *words: str, **files: Any) -> Case:
    """A model, or an input of one, that cannot be."""
    return Case(f"model: {command}", command, words, {key.replace("__", "."): value for key, value in files.items()})


PICKLE = pickle.dumps(Reverse())
SPACE = {"_type": "uniform", "_value": [0.4, 0.6]}
