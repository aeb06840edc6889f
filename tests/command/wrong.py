"""Wrong input of every kind: what a user may get wrong, and words that the answer must have."""

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

# fmt: off
ARGUMENTS = [
    usage("comprss", "comprss is no command", "did you mean compress?"),
    usage("frobnicate", "no command", "compress"),
    usage("compress", "missing argument 'RECIPE'"),
    usage("compress r.yml extra", "unexpected extra argument", "extra"),
    usage("compress r.yml --frob", "no such option", "--frob"),
    usage("compress r.yml --set sparsity", "FIELD=VALUE"),
    usage("compress r.yml --set =3", "FIELD=VALUE"),
    usage("compress r.yml --set prune.sparsity=[1", "not a value"),
    usage("compress r.yml --output", "--output", "requires an argument"),
    usage("run e --port 0", "--port", "65535"),
    usage("run e --port 70000", "--port", "65535"),
    usage("run e --port web", "--port", "not a valid integer"),
    usage("run e --trials 0", "--trials", "0"),
    usage("run e --concurrency -1", "--concurrency", "-1"),
    usage("run e --concurrency many", "--concurrency", "many"),
    usage("doctor --port -5", "--port"),
    usage("inspect net.py:net --input 1x1x8x8 --threads 0", "--threads"),
    usage("inspect net.py:net --input 1x1x8x8 --units necks", "--units", "heads"),
    usage("inspect net.py:net --input 1x1x8x8 --argument width", "FIELD=VALUE"),
    usage("space net.py:net --input 1x1x8x8 --per channel", "--per", "stage"),
    usage("space net.py:net --input 1x1x8x8 --lowest low", "--lowest"),
    usage("bench net.py:net --input 1x1x8x8 --threads 0", "--threads"),
    usage("bench net.py:net --input 1x1x8x8 --seconds soon", "--seconds"),
    usage("bench net.py:net --input 1x1x8x8 --seconds -1", "--seconds"),
    usage("bench net.py:net --input 1x1x8x8 --seconds nan", "--seconds"),
    usage("new mine", "--model"),
    usage("new mine --model net.py:net --macs 1.5", "--macs", "1.5"),
    usage("new mine --model net.py:net --macs nan", "--macs", "nan"),
    usage("new mine --model net.py:net --tuner Oracle", "--tuner", "TPE"),
    usage("completion csh", "csh", "bash"),
    usage("compare a", "missing argument 'B'"),
    usage("run e --listen everywhere", "--listen", "127.0.0.1"),
    usage("export net.py:net --input 1x1x8x8 --format tflite", "--format", "onnx"),
]

RECIPES = [
    Case("recipe: absent", "compress nowhere.yml", ("nowhere.yml", "cannot be read", "No such file")),
    Case("recipe: a folder", "compress folder", ("folder", "directory"), {"folder": None}),
    recipe("binary", b"\x00\xff\xfe\x80\x81", "r.yml", "not UTF-8"),
    recipe("control characters", "seed: \x07\n", "r.yml"),
    recipe("a list", "- a\n- b\n", "r.yml", "section"),
    recipe("a word", "hello\n", "r.yml", "section"),
    recipe("tabs", "prune:\n\tsparsity: 0.5\n", "r.yml", "line 2", "tab"),
    recipe("open bracket", "steps: [prune\n", "r.yml", "line"),
    recipe("key twice", "seed: 1\nseed: 2\n", "seed is given twice"),
    recipe("key yes", "yes: 1\n", "r.yml", "not a field"),
    recipe("key on below", "prune: {on: 1}\n", "prune.", "not a field"),
    recipe("complex key", "? [a, b]\n: 1\n", "r.yml"),
    recipe("unhashable key", "prune: {{a: 1}: 2}\n", "r.yml"),
    recipe("object tag", "!!python/object/apply:os.mkdir [ran-code]\n", "r.yml"),
    recipe("alias to itself", "prune: &a {arguments: *a}\n", "r.yml"),
    recipe("alias of nothing", "seed: *a\n", "undefined alias"),
    recipe("aliases that grow", "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)), "not a field"),
    recipe("two documents", "seed: 1\n---\nseed: 2\n", "r.yml"),
    recipe("deep", "[" * 1200, "r.yml"),
    recipe("huge number", "seed: " + "9" * 5000 + "\n", "r.yml"),
    recipe("number beyond floats", "train: {learning_rate: 1e400}\n", "train.learning_rate", "finite"),
    recipe("number with a comma", "train: {learning_rate: 0,1}\n", "r.yml"),
    recipe("date for a number", "seed: 2024-01-01\n", "seed is", "whole number"),
    recipe("date that is none", "seed: 2024-13-41\n", "r.yml"),
    recipe("merge of nothing", "prune: {<<: 3}\n", "r.yml"),
    recipe("negative seed", {"seed": -1}, "seed is -1"),
    recipe("name of a number", {"model": {"name": 18}}, "model.name is 18", "text"),
    recipe("reference without a function", {"model": {"name": "net.py"}}, "model.name", "module:function"),
    recipe("groups of text", {"prune": {"groups": {"layer1": "half"}}}, "prune.groups.layer1", "number"),
    recipe("bounds of nothing", {"objective": {"macs": 0}}, "objective.macs is 0", "above 0"),
    recipe("unknown section", {"prunes": {}}, "prunes", "did you mean prune?"),
    recipe("unknown field", {"prune": {"sparsty": 0.5}}, "prune.sparsty", "did you mean prune.sparsity?"),
    recipe("section is a number", {"prune": 3}, "prune is 3"),
    recipe("section is a list", {"train": [1]}, "train is"),
    recipe("sparsity above 1", {"prune": {"sparsity": 1.2}}, "prune.sparsity is 1.2", "[0, 1)"),
    recipe("sparsity in percent", {"prune": {"sparsity": "50%"}}, "prune.sparsity is '50%'", "number"),
    recipe("sparsity NaN", "prune: {sparsity: .nan}\n", "prune.sparsity", "finite"),
    recipe("learning rate infinite", "train: {learning_rate: .inf}\n", "train.learning_rate", "finite"),
    recipe("learning rate 0", {"train": {"learning_rate": 0}}, "train.learning_rate is 0", "above 0"),
    recipe("negative epochs", {"train": {"epochs": -1}}, "train.epochs is -1", "at least 0"),
    recipe("half an epoch", {"finetune": {"epochs": 1.5}}, "finetune.epochs is 1.5", "whole number"),
    recipe("true for a number", {"train": {"epochs": True}}, "train.epochs is true", "whole number"),
    recipe("text for a switch", {"speedup": {"keep_masked": "sometimes"}}, "speedup.keep_masked", "true or false"),
    recipe("steps as text", {"steps": "prune"}, "steps is 'prune'", "list"),
    recipe("steps in a wrong order", {"steps": ["speedup", "prune"]}, "steps: speedup comes before prune"),
    recipe("steps without speedup", {"steps": ["prune"]}, "steps: speedup is missing"),
    recipe("a step twice", {"steps": ["prune", "prune", "speedup"]}, "stands there twice"),
    recipe("an unknown step", {"steps": ["prune", "shrink", "speedup"]}, "shrink"),
    recipe("quantize without its step", {"steps": ["prune", "speedup"], "quantize": {"method": "qat"}}, "quantize is missing"),
    recipe("unknown model", {"model": {"name": "resnet21"}}, "model.name", "did you mean resnet20?"),
    recipe("unknown pruner", {"prune": {"pruner": "magnitud"}}, "prune.pruner", "magnitude"),
    recipe("unknown schedule", {"train": {"schedule": "cosin"}}, "did you mean cosine?"),
    recipe("unknown format", {"export": {"formats": ["onxx"]}}, "export.formats", "onnx"),
    recipe("image folder without root", {"data": {"name": "image_folder"}}, "data.root is missing"),
    recipe("kd for a regression", {"train": {"loss": "mse"}, "distill": {"method": "kd"}}, "distill.method is kd"),
    recipe("--set of an unknown field", {}, "prune.sparsty", "did you mean", command="compress r.yml --set prune.sparsty=1"),
    recipe("--set below a value", {}, "seed.deep", command="compress r.yml --set seed.deep=1"),
    recipe("--set of a section", {}, "prune", command="compress r.yml --set prune=3"),
    recipe("--set out of range", {}, "prune.sparsity is 2", command="compress r.yml --set prune.sparsity=2"),
]

WORK = [
    run_of("module is absent", {"model": {"name": "nowhere:net"}}, "model.name is nowhere:net", "no module nowhere"),
    run_of("module does not import", {"model": {"name": "broken:net"}}, "fails to import", "SyntaxError", **{"broken.py": "def net(:\n"}),
    run_of("module exits", {"model": {"name": "quits:net"}}, "quits:net", **{"quits.py": "import sys\nsys.exit(3)\n"}),
    run_of("function is absent", {"model": {"name": "net:nett"}}, "net has no nett", "did you mean net?"),
    run_of("not a function", {"model": {"name": "net:LIMIT"}}, "not a function but int"),
    run_of("function raises", {"model": {"name": "net:raises"}}, "net:raises", "KeyError", "net.py, line"),
    run_of("function exits", {"model": {"name": "net:stops"}}, "net:stops"),
    run_of("function returns nothing", {"model": {"name": "net:nothing"}}, "returned NoneType, not a torch module"),
    run_of("wrong arguments", {"model": {"name": "net:net", "arguments": {"depth": 3}}}, "does not fit the arguments", "depth"),
    run_of("argument is missing", {"model": {"name": "net:two"}}, "does not fit the arguments", "'a'"),
    run_of("wrong argument of a shipped model", {"model": {"arguments": {"wdith": 3}}}, "model.arguments.wdith"),
    run_of("model for other inputs", {"model": {"name": "net:other"}}, "the model fails on inputs", "[64, 1, 8, 8]"),
    run_of("model with two inputs", {"model": {"name": "net:Pair"}}, "the model fails on inputs", "'b'"),
    run_of("model that raises", {"model": {"name": "net:Bad"}}, "the model fails on inputs", "first line"),
    run_of("model that returns text", {"model": {"name": "net:Nowhere"}}, "train.loss cross_entropy"),
    run_of("model without parameters", {"model": {"name": "net:bare"}}, "parameter"),
    run_of("nothing to prune", {"model": {"name": "net:frozen"}, "data": {"name": "flat:loaders"}}, "nothing", **{"flat.py": "import torch\ndef loaders():\n    part = [(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))]\n    return part, part, part\n"}),
    run_of("checkpoint is absent", {"model": {"checkpoint": "w.pt"}}, "w.pt does not exist"),
    run_of("checkpoint is a folder", {"model": {"checkpoint": "w.pt"}}, "w.pt", **{"w.pt": None}),
    run_of("checkpoint is empty", {"model": {"checkpoint": "w.pt"}}, "w.pt", "cannot be read as weights", **{"w.pt": b""}),
    run_of("checkpoint is text", {"model": {"checkpoint": "w.safetensors"}}, "w.safetensors", "cannot be read as weights", **{"w.safetensors": b"hello"}),
    run_of("checkpoint is cut", {"model": {"checkpoint": "w.safetensors"}}, "cannot be read as weights", **{"w.safetensors": b"\x40\x00\x00\x00\x00\x00\x00\x00{}"}),
    run_of("checkpoint with code", {"model": {"checkpoint": "w.pt"}}, "w.pt", "cannot be read as weights", **{"w.pt": PICKLE}),
    run_of("data root is absent", {"data": {"name": "image_folder", "root": "images"}}, "data.root", "does not exist"),
    run_of("data root is a file", {"data": {"name": "image_folder", "root": "images"}}, "data.root", images="x"),
    run_of("image folder is empty", {"data": {"name": "image_folder", "root": "images"}}, "data.root", "images", images=None),
    run_of("no image in the folders", {"data": {"name": "image_folder", "root": "i"}}, "no image", **{"i/train/a": None, "i/train/b": None}),
    run_of("broken image", {"data": {"name": "image_folder", "root": "i"}}, "image", **{f"i/train/{c}/{n}.png": b"no image" for c in "ab" for n in range(4)}),
    run_of("cifar10 that is not there", {"data": {"name": "cifar10", "root": "c"}}, "data.root", "cifar", c=None),
    run_of("wrong data arguments", {"data": {"arguments": {"frob": 1}}}, "data.arguments", "frob"),
    run_of("loaders are None", {"model": {"name": "net:net"}, "data": {"name": "net:no_loaders"}}, "net:no_loaders", "NoneType"),
    run_of("one loader", {"model": {"name": "net:net"}, "data": {"name": "net:one_loader"}}, "net:one_loader"),
    run_of("loaders without batches", {"model": {"name": "net:net"}, "data": {"name": "net:empty_loaders"}}, "net:empty_loaders", "empty"),
    run_of("validation without batches", {"model": {"name": "net:net"}, "data": {"name": "net:empty_validation"}}, "validation"),
    run_of("loaders that raise", {"model": {"name": "net:net"}, "data": {"name": "net:failing_loaders"}}, "FileNotFoundError", "/data/train.csv"),
    run_of("batches without targets", {"model": {"name": "net:net"}, "data": {"name": "net:odd_batches"}}, "the model fails on inputs float32 [2]"),
    run_of("batches of text", {"model": {"name": "net:net"}, "data": {"name": "net:texts"}}, "the model fails on inputs str"),
    run_of("targets beyond the classes", {"model": {"name": "net:net"}, "data": {"name": "net:wrong_classes"}}, "train.loss cross_entropy cannot be computed"),
    run_of("a loader that breaks", {"model": {"name": "net:net"}, "data": {"name": "net:breaking"}}, "training data", "the disk went away"),
    run_of("inputs that are not numbers", {"model": {"name": "net:net"}, "data": {"name": "net:nans"}}, "diverged", "nan"),
    run_of("metric that is no number", {"train": {"metric": "net:metric"}}, "train.metric", "cannot be computed"),
    run_of("metric is absent", {"train": {"metric": "net:metrik"}}, "net has no metrik"),
    run_of("optimizer is none", {"train": {"optimizer": "net:text"}}, "train.optimizer"),
    run_of("optimizer's arguments", {"train": {"optimizer_arguments": {"frob": 1}}}, "optimizer", "frob"),
    run_of("device is absent", {"train": {"device": "cuda:7"}}, "train.device is cuda:7"),
    run_of("device is no device", {"train": {"device": "fridge"}}, "train.device is fridge"),
    run_of("pruner's arguments", {"prune": {"arguments": {"frob": 1}}}, "prune.arguments", "frob"),
    run_of("unknown module to prune", {"prune": {"op_names": ["layer9"]}}, "layer9"),
    run_of("unknown group", {"prune": {"target": "channels", "groups": {"layer9": 0.5}}}, "layer9"),
    run_of("output is a file", {}, "out", "cannot be made", also="--output out", out="x"),
    run_of("output below a file", {}, "out", "cannot be made", also="--output out/deeper", out="x"),
    run_of("output cannot be written", {}, "/proc/nni", "cannot be written", also="--output /proc/nni"),
    run_of("model that calls itself", {"model": {"name": "net:recursive"}}, "net:recursive", "RecursionError"),
    run_of("model that quits", {"model": {"name": "net:Quits"}}, "SystemExit: 5 (net.py, line"),
    run_of("model of doubles", {"model": {"name": "net:double"}}, "the model fails on inputs", "double"),
    run_of("unknown pruner's choice", {"prune": {"pruner": "taylor", "arguments": {"variant": "gates"}}}, "prune.arguments.variant", "gate"),
    run_of("stock pruner that is not there", {"prune": {"pruner": "nni:NoPruner"}}, "prune.pruner is nni:NoPruner"),
    run_of("pruner of ones own that is none", {"prune": {"pruner": "net:text"}}, "prune.arguments do not fit net:text"),
    run_of("export without its package", {"export": {"formats": ["onnx"], "opset": 4}}, "export.opset is 4"),
    run_of("folder is absent", {"folder": "nowhere", "model": {"name": "only_there:net"}}, "no module only_there"),
    run_of("output is a device", {}, "/dev/null", also="--output /dev/null"),
]

CONFIGS = [
    Case("config: absent", "run nowhere", ("nowhere", "no experiment here", "config.yml")),
    Case("config: empty folder", "run e", ("e: no experiment here",), {"e": None}),
    Case("config: empty file", "run e", ("config.yml", "mapping"), {"e/config.yml": ""}),
    Case("config: a folder", "run e", ("e: no experiment here",), {"e/config.yml": None}),
    config("binary", b"\x00\xff\xfe\x80", "config.yml", "cannot be read", raw=True),
    config("a list", "- 1\n", "config.yml", "mapping", raw=True),
    config("tabs", "a:\n\tb: 1\n", "config.yml", "cannot be read", raw=True),
    config("key twice", "trialConcurrency: 1\ntrialConcurrency: 2\n", "trialConcurrency", "twice", raw=True),
    config("deep", "[" * 1200, "config.yml", raw=True),
    config("unknown key", {"maxTrials": 3}, "config.yml", "maxTrials"),
    config("no training service", {"trainingService": ...}, "config.yml", "trainingService"),
    config("unknown training service", {"trainingService": {"platform": "lokal"}}, "config.yml", "lokal"),
    config("no platform", {"trainingService": {}}, "config.yml", "platform"),
    config("no command", {"trialCommand": ...}, "config.yml", "trialCommand"),
    config("command is a list", {"trialCommand": ["python", "x.py"]}, "config.yml", "trialCommand"),
    config("command with an open quote", {"trialCommand": "python -m nni_plugins.trial 'recipe.yml"}, "config.yml", "quot"),
    config("command without a recipe", {"trialCommand": "python -m nni_plugins.trial"}, "config.yml", "trialCommand", "recipe"),
    config("recipe is absent", {"trialCommand": "python -m nni_plugins.trial other.yml"}, "other.yml", "cannot be read"),
    config("recipe is wrong", {}, "prune.sparsty", also="", recipe__yml={"prune": {"sparsty": 1}}),
    config("code directory is absent", {"trialCodeDirectory": "nowhere"}, "config.yml", "nowhere"),
    config("concurrency 0", {"trialConcurrency": 0}, "config.yml", "trialConcurrency"),
    config("concurrency is text", {"trialConcurrency": "two"}, "config.yml", "trialConcurrency"),
    config("no concurrency", {"trialConcurrency": ...}, "config.yml", "trialConcurrency"),
    config("duration is a word", {"maxTrialDuration": "soon"}, "config.yml", "soon"),
    config("no search space", {"searchSpace": ...}, "config.yml", "search"),
    config("search space file is absent", {"searchSpace": ..., "searchSpaceFile": "space.yml"}, "config.yml", "space.yml"),
    config("search space file is broken", {"searchSpace": ..., "searchSpaceFile": "space.yml"}, "config.yml", "space", space__yml="a: [1\n"),
    config("search space is a list", {"searchSpace": [1]}, "config.yml", "searchSpace"),
    config("search space is empty", {"searchSpace": {}}, "config.yml", "searchSpace"),
    config("space names no field", {"searchSpace": {"prune.sparsty": SPACE}}, "prune.sparsty", "did you mean prune.sparsity?"),
    config("space out of range", {"searchSpace": {"prune.sparsity": {"_type": "uniform", "_value": [0.5, 1.5]}}}, "prune.sparsity is 1.5"),
    config("space of an unknown type", {"searchSpace": {"prune.sparsity": {"_type": "unifrom", "_value": [0, 1]}}}, "unifrom"),
    config("space without a value", {"searchSpace": {"prune.sparsity": {"_type": "uniform"}}}, "prune.sparsity"),
    config("space upside down", {"searchSpace": {"prune.sparsity": {"_type": "uniform", "_value": [0.6, 0.4]}}}, "must have high > low"),
    config("empty choice", {"searchSpace": {"prune.pruner": {"_type": "choice", "_value": []}}}, "prune.pruner"),
    config("no tuner", {"tuner": ...}, "config.yml", "tuner"),
    config("unknown tuner", {"tuner": {"name": "TPEE"}}, "config.yml", "TPEE"),
    config("tuner is text", {"tuner": "TPE"}, "config.yml", "tuner"),
    config("tuner's arguments", {"tuner": {"name": "TPE", "classArgs": {"optimise": 1}}}, "config.yml", "optimise"),
    config("tuner that minimises", {"tuner": {"name": "TPE", "classArgs": {"optimize_mode": "minimize"}}}, "optimize_mode: maximize"),
    config("wrong mode", {"tuner": {"name": "TPE", "classArgs": {"optimize_mode": "best"}}}, "config.yml", "optimize_mode"),
    config("our tuner is not registered", {"tuner": {"name": "AMC", "classArgs": {"recipe": "recipe.yml"}}}, "config.yml", "AMC"),
    config("tuner's class is absent", {"tuner": {"className": "nowhere.Tuner"}}, "config.yml", "nowhere"),
    config("our tuner's arguments", {"tuner": {"className": "nni_plugins.search.OptunaTuner", "codeDirectory": ".", "classArgs": {"sampl": 1}}}, "config.yml", "sampl"),
    config("resume of nothing", {}, "abc: no such experiment", also="--resume abc"),
    config("experiments folder is a file", {}, "here", "folder", also="--experiments-folder here", **{"../here": "x"}),
    config("alias to itself", "a: &a [*a]\n", "config.yml", raw=True),
    config("two documents", "a: 1\n---\nb: 2\n", "config.yml", raw=True),
    config("space with a bomb", {"searchSpace": {"prune.sparsity": {"_type": "choice", "_value": [{"_name": 1, "x": {"_name": 2}}]}}}, "prune.sparsity"),
    config("space of text", {"searchSpace": {"prune.sparsity": {"_type": "uniform", "_value": ["0.1", "0.2"]}}}, "prune.sparsity"),
    config("negative trials", {"maxTrialNumber": -1}, "maxTrialNumber is -1"),
    config("gpus in words", {"trialGpuNumber": "all"}, "trialGpuNumber is 'all'"),
    config("assessor is unknown", {"assessor": {"name": "Median"}}, "assessor.name", "Medianstop"),
    config("tuner with name and class", {"tuner": {"name": "TPE", "className": "a.B"}}, "tuner", "either name"),
    config("tuner's code is absent", {"tuner": {"className": "a.B", "codeDirectory": "nowhere"}}, "tuner.codeDirectory", "nowhere"),
    config("remote without machines", {"trainingService": {"platform": "remote"}}, "config.yml"),
    config("remote machine without a user", {"trainingService": {"platform": "remote", "machineList": [{"host": "127.0.0.1"}]}}, "config.yml"),
    config("remote key is absent", {"trainingService": {"platform": "remote", "machineList": [{"host": "127.0.0.1", "user": "x", "port": 1, "sshKeyFile": "nowhere"}]}}, "config.yml", "nowhere"),
    config("output cannot be written", {}, "/proc/nni", "cannot be written", also="--output /proc/nni"),
    config("experiments folder cannot be written", {}, "/proc/nni", "cannot be written", also="--experiments-folder /proc/nni"),
    config("output is a file", {}, "out", also="--output out", **{"../out": "x"}),
    nas("not a section", 3, "nas must be a section"),
    nas("no space", {}, "nas.space", "module:function"),
    nas("unknown field", {"spase": "a:b"}, "nas.spase"),
    nas("space is absent", {"space": "nowhere:space"}, "nowhere"),
    nas("unknown strategy", {"space": "net:net", "strategy": "Lucky"}, "nas.strategy", "Random"),
    nas("top 0", {"space": "net:net", "top": 0}, "nas.top"),
    nas("a tuner beside it", {"space": "net:net"}, "tuner", tuner={"name": "TPE"}),
    Case("status: unknown id", "status abc", ("abc: no such experiment", "status --all")),
    Case("status: none", "status", ("NNI knows no experiment",)),
    Case("status: ambiguous id", "status ab", ("ab is the beginning of 2 ids", "abcd", "abef"), {"home/nni-experiments/.experiment": '{"abcd": {"id": "abcd"}, "abef": {"id": "abef"}}'}),
    Case("status: broken list", "status", ("experiment",), {"home/nni-experiments/.experiment": '{"ab'}),
    Case("status: database is cut", "status e", ("e",), {"e/db/nni.sqlite": b"SQLite format 3\x00 and no more"}),
    Case("status: database is empty", "status e", ("e",), {"e/db/nni.sqlite": b""}),
    Case("run: nothing", "run", ("no experiment", "--resume")),
    Case("run: resume of an unknown id", "run --resume abc", ("abc: no such experiment",)),
    Case("report: an archive that is none", "report e.zip", ("e.zip",), {"e.zip": b"no archive"}),
    Case("report: an archive of something else", "report e.tar.gz", ("e.tar.gz",), {"e.tar.gz": b""}),
    Case("compare: unknown ids", "compare abc abd", ("abc",)),
    Case("compare: a folder without a report", "compare a b", ("a",), {"a": None, "b": None}),
    Case("compare: a broken report", "compare a b", ("report.json",), {"a/report.json": "{", "b/report.json": "[]"}),
    Case("report: unknown id", "report abc", ("abc: no such experiment",)),
    Case("report: not an experiment", "report folder", ("folder: no such experiment",), {"folder": None}),
    Case("report: a file", "report r.yml", ("r.yml: no such experiment",), {"r.yml": TINY}),
    Case("report: database is empty", "report e", ("e",), {"e/db/nni.sqlite": b""}),
    Case("report: database is no database", "report e", ("e",), {"e/db/nni.sqlite": b"hello" * 500}),
]

LOOK = "--no-latency"
MODELS = [
    model("inspect net.py", "net.py", "module:function"),
    model("inspect net", "net: write module:function"),
    model("inspect nowhere.py:net --input 1x1x8x8", "there is no file nowhere.py"),
    model("inspect net.py:nett --input 1x1x8x8", "has no nett", "did you mean net?"),
    model("inspect :net --input 1x1x8x8", ":net", "module:function"),
    model("inspect net.py: --input 1x1x8x8", "net.py:", "module:function"),
    model("inspect net.py:net", "say what the model takes", "--input"),
    model("inspect net.py:net --input axb", "--input axb", "1x3x224x224"),
    model("inspect net.py:net --input 1x1x0x8", "a size is 0"),
    model("inspect net.py:net --input 99999x99999x99999", "2**31"),
    model("inspect net.py:net --input 1x1x8x8:float13", "float13 is no type"),
    model("inspect net.py:net --input 1x1x8x8 --input m=1x1", "all inputs have a name"),
    model("inspect net.py:net --input a=1x1 --input a=1x1", "a is given twice"),
    model("inspect net.py:net --input 1x1x8x8 --inputs net:batch", "--input and --inputs are both given"),
    model("inspect net.py:net --inputs net:nowhere", "net has no nowhere"),
    model("inspect net.py:net --inputs net.py:raises", "net:raises", "KeyError"),
    model(f"inspect net.py:net --inputs net.py:nothing {LOOK}", "--inputs net.py:nothing returned None"),
    model(f"inspect net.py:net --input 1x3x8x8 {LOOK}", "the model fails on 1x3x8x8"),
    model(f"inspect net.py:net --input 1x1x8x8:int64 {LOOK}", "the model fails on 1x1x8x8:int64"),
    model(f"inspect net.py:net --input 1x1x8x8 --input 1x1x8x8 {LOOK}", "the model fails on"),
    model(f"inspect net.py:Pair --input 1x4 {LOOK}", "the model fails on 1x4", "'b'"),
    model(f"inspect net.py:Bad --input 1x4 {LOOK}", "the model fails on 1x4", "first line"),
    model("inspect net.py:nothing --input 1x4", "returned NoneType", "torch module"),
    model("inspect net.py:raises --input 1x4", "KeyError"),
    model("inspect net.py:LIMIT --input 1x4", "not a function but int"),
    model("inspect net.py:net --input 1x1x8x8 --argument depth=3", "does not fit the arguments", "depth"),
    model("inspect net.py:net --input 1x1x8x8 --argument width=-1", "net:net", "negative dimension"),
    model("inspect net.py:net --input 1x1x8x8 --checkpoint w.pt", "w.pt does not exist"),
    model("inspect net.py:net --input 1x1x8x8 --checkpoint w.pt", "cannot be read as weights", w__pt=PICKLE),
    model("inspect net.py:net --input 1x1x8x8 --device fridge", "--device fridge"),
    model("inspect net.py:net --input 1x1x8x8 --sparsities 0.5,2", "--sparsities 0.5,2"),
    model("inspect net.py:net --input 1x1x8x8 --plot groups.bmp", "--plot groups.bmp", ".png"),
    model(f"inspect net.py:net --input 1x1x8x8 {LOOK} --plot nowhere/groups.png", "nowhere/groups.png cannot be written"),
    model(f"inspect net.py:net --input 1x1x8x8 {LOOK} --sensitivity", "--sensitivity needs --metric"),
    model(f"inspect net.py:net --input 1x1x8x8 {LOOK} --metric net:nothere", "net has no nothere"),
    model(f"inspect net.py:net --input 1x1x8x8 {LOOK} --sensitivity --metric net.py:failing_metric", "fails", "no data"),
    model(f"inspect net.py:net --input 1x1x8x8 {LOOK} --sensitivity --metric net.py:wrong_metric", "must be a number"),
    model("inspect nowhere.yml", "nowhere.yml cannot be read"),
    model("space net.py:frozen --input 1x4", "net.py:frozen", "nothing"),
    model("space net.py:net --input 1x1x8x8 --lowest 0.9 --highest 0.1", "lowest 0.9"),
    model("space net.py:net --input 1x1x8x8 --highest 1.5", "highest 1.5"),
    model("space net.py:net --input 1x1x8x8 --levels 1", "levels is 1"),
    model("space net.py:net --input 1x1x8x8 --levels -3", "levels is -3"),
    model("space net.py:net --input 1x1x8x8 --lowest nan", "lowest nan"),
    model("space net.py:net --input 1x1x8x8 --output nowhere/space.yml", "nowhere/space.yml cannot be written"),
    model("space r.yml", "prune.op_names", r__yml={**TINY, "prune": {"op_names": ["layer9"]}}),
    model("bench net.py:net", "say what the model takes"),
    model(f"inspect net.py:lazy --input 1x4 {LOOK}", "net.py:lazy"),
    model(f"inspect net.py:double --input 1x1x8x8 {LOOK}", "the model fails on 1x1x8x8", "double"),
    model(f"inspect net.py:late --input 1x8 {LOOK}", "the model fails on 1x8", "AttributeError"),
    model(f"inspect net.py:Quits --input 1x8 {LOOK}", "SystemExit: 5 (net.py, line"),
    model(f"inspect net.py:net --inputs net.py:in_words {LOOK}", "net.py:net", "the model fails"),
    model("inspect net.py:recursive --input 1x8", "RecursionError"),
    model(f"inspect os:getcwd --input 1x8 {LOOK}", "returned str"),
    model(f"inspect os.path:nothing --input 1x8 {LOOK}", "has no nothing"),
    model("inspect net.py:net --input 1x1x8x8 --checkpoint net.py", "net.py cannot be read as weights"),
    model("compare a b", "report.json", **{"a/report.json": {"title": 3}, "b/report.json": [1]}),
    model("status e", "e", **{"e/db/nni.sqlite": b"SQLite format 3\x00" + bytes(4080)}),
    model("bench folder", "folder: no compression is here", folder=None),
    model("bench nowhere", "nowhere", "module:function"),
    model("bench net.py:net --input 1x1x8x8 --batches 0", "--batches 0"),
    model("bench net.py:net --input 1x1x8x8 --batches many", "--batches many"),
    model("bench net.py:net --input 1x1x8x8 --runtimes fast", "--runtimes", "fast is none of"),
    model("bench net.py:net --input 1x1x8x8 --runtimes ,", "--runtimes"),
    model("bench net.py:net --input 1x3x8x8 --runtimes eager --batches 1 --seconds 0.1", "the model fails on 1x3x8x8"),
    model("export net.py:net", "say what the model takes"),
    model("export folder", "folder: no compression is here", folder=None),
    model("export net.py:net --input 1x3x8x8", "net.py:net", "the model fails on 1x3x8x8"),
    model("export net.py:net --input 1x1x8x8 --output file", "file", file="x"),
    model("new mine --model net.py:net --data images", "--data images", "no such folder"),
    model("new mine --model net.py:net", "mine exists already", mine="x"),
    model("new mine --model net.py:raises", "net:raises", "KeyError"),
    model("new mine --model net.py:Pair", "net.py:Pair", "the model fails on the data's 1x1x8x8"),
    model("new m/../.hidden --model net.py:net", ".hidden", "letters"),
    model("bench done", "done", "compact.safetensors", **{"done/recipe.yml": TINY, "done/compact.safetensors": b"cut"}),
    model("bench done", "recipe.yml", "prune.sparsty", **{"done/recipe.yml": {"prune": {"sparsty": 1}}, "done/compact.safetensors": b""}),
    model("export done", "done", "compact.safetensors", **{"done/recipe.yml": TINY, "done/compact.safetensors": b""}),
]
# fmt: on

CASES = [*ARGUMENTS, *RECIPES, *WORK, *CONFIGS, *MODELS]
