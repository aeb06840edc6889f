"""A trial of several processes: ``torchrun`` inside NNI, masks in step, one report."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.end_to_end.test_faults import until


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over POSIX sockets")
def test_two_processes_train_one_trial_and_report_once(
    nni_home: Any, port: int, write_experiment: Callable[..., Path], tmp_path: Path
) -> None:
    space = {"prune.pruner": {"_type": "choice", "_value": ["dynamic_sparse", "hybrid"]}}
    folder = write_experiment(
        space=space,
        recipe={"train": {"epochs": 4}, "prune": {"sparsity": 0.5, "arguments": {"total_steps": 12}}},
        trialCommand=f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2 "
        "-m nni_plugins.trial recipe.yml",
        maxTrialNumber=2,
        trialConcurrency=1,
        tuner={"name": "GridSearch"},
    )
    output = tmp_path / "report"
    answer = nni_home.run("nni-plugins", "run", str(folder), "--port", str(port), "--output", str(output), "--json")
    findings = json.loads(answer.stdout)
    assert [one["status"] for one in findings["candidates"]] == ["SUCCEEDED"] * 2, answer.stderr
    assert findings["dense"]["validation"] > 0.5  # two parts of a batch make one step, not two
    here = Path(findings["experiment"]["folder"])
    for trial in findings["candidates"]:
        (found,) = here.glob(f"environments/*/trials/{trial['id']}")
        log = (found / "trial.log").read_text(encoding="utf-8")
        assert log.count("parameters: {'prune.pruner'") == 2  # both processes had the tuner's values
        recipe = yaml.safe_load((found / "recipe.yml").read_text(encoding="utf-8"))
        assert recipe["prune"]["pruner"] == trial["parameters"]["prune.pruner"]
        assert json.loads((found / "metrics.json").read_text(encoding="utf-8"))["relative_error"] < 1e-5


FAULTY = """
import os, torch
from torch import nn

class Net(nn.Module):
    steps = 0

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 2)

    def forward(self, x):
        Net.steps += self.training
        if os.environ["RANK"] == os.environ["BAD"] and Net.steps == 5:
            raise ValueError("a fault of one process")
        return self.last(torch.relu(self.norm(self.first(x))))

class Loader:
    def __init__(self, *sizes):
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def __iter__(self):
        random = torch.Generator().manual_seed(1)
        for size in self.sizes:
            x = torch.randn(size, 8, generator=random)
            yield {"x": x, "labels": (x.sum(1) > 0).long()}

def build():
    return Net()

def loaders():
    return Loader(32, 32, 32, 3), Loader(32, 1), Loader(32)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over POSIX sockets")
@pytest.mark.parametrize("bad", ["", "1"])
def test_the_process_that_fails_first_says_why(tmp_path: Path, bad: str) -> None:
    recipe = {
        "model": {"name": "faulty_net:build"},
        "data": {"name": "faulty_net:loaders"},
        "train": {"epochs": 2, "threads": 1},
        "finetune": {"epochs": 1},
    }
    (tmp_path / "faulty_net.py").write_text(FAULTY, encoding="utf-8")
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("NNI_")}
    answer = subprocess.run(
        [*command, "-m", "nni_plugins.trial", "recipe.yml"],
        cwd=tmp_path,
        env={**inherited, "BAD": bad, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    failure = tmp_path / "outputs" / "trial" / "failure.json"
    if not bad:  # with a last batch of three, of which one process alone would get one: too few for a batch norm
        assert answer.returncode == 0, answer.stderr
        assert not failure.exists()
        return
    assert answer.returncode == 1
    reason = json.loads(failure.read_text(encoding="utf-8"))["reason"]
    assert "ValueError: a fault of one process (faulty_net.py, line " in reason


CLOCKS = """
import json
import os
from pathlib import Path

from nni_plugins.channels import ChannelGraph
from nni_plugins.training import build_data, build_model, latency_budget, recipe_from_dict
from nni_plugins.training.loop import Loop
from nni_plugins.training.processes import joined

# The first process is off the budget twice, the second one never: by its own clock it would stop at once.
times = iter([[1.0, 0.6], [1.0, 0.55], [1.0, 0.5]])
latency_budget.in_turns = lambda *_: [1.0, 0.5] if os.environ["RANK"] == "1" else next(times)
with joined() as rank:
    recipe = recipe_from_dict(json.loads(Path("recipe.json").read_text()))
    data = build_data(recipe)
    model = build_model(recipe, data.shape, data.classes, 0).eval()
    graph = ChannelGraph.watch(model, data.example)
    made = latency_budget.meet(recipe, model, Loop(recipe, data, "test"), graph)
    Path(f"{rank}.json").write_text(json.dumps([[one.sparsity, one.time] for one in made]))
"""


def test_a_latency_budget_is_corrected_by_one_clock(tmp_path: Path) -> None:
    recipe = {
        "model": {"name": "resnet8"},
        "data": {"name": "digits", "limit": 200},
        "train": {"threads": 1},
        "prune": {"pruner": "taylor", "target": "macs", "sparsity": 0.5, "arguments": {"training_steps": 2}},
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    (tmp_path / "clocks.py").write_text(CLOCKS, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "clocks.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    made = [json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    assert made[0] == made[1]
    assert [time for _, time in made[0]] == [0.6, 0.55, 0.5]


EPOCHS = 24


def untimed(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name not in ("latency_ms", "seconds")}


def processes_of(experiment: str) -> dict[str, psutil.Process]:
    """The trial's processes that run our module, by rank."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words, variables = process.cmdline(), process.environ()
            own = variables.get("NNI_EXP_ID") == experiment and "nni_plugins.trial" in words
            if own and "torch.distributed.run" not in words and process.status() != psutil.STATUS_ZOMBIE:
                found[variables.get("RANK", "")] = process
    return found


@pytest.mark.skipif(sys.platform == "win32", reason="gloo over POSIX sockets")
def test_two_processes_that_are_killed_go_on_as_if_undisturbed(
    nni_home: Any, port: int, write_experiment: Callable[..., Path]
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    trial = ["-m", "nni_plugins.trial", "recipe.yml"]
    folder = write_experiment(
        space={"prune.sparsity": {"_type": "choice", "_value": [0.5]}},
        recipe={"finetune": {"epochs": EPOCHS}},
        trialCommand=shlex.join([*torchrun, *trial]),
        maxTrialNumber=1,
        trialConcurrency=1,
        tuner={"name": "Random"},
    )
    command = nni_home.start("nni-plugins", "run", str(folder), "--port", str(port))
    until(lambda: len(nni_home.get(port, "metric-data")) >= 5)  # in the midst of its fine-tuning
    (entry,) = nni_home.managers()
    before = processes_of(entry["id"])
    assert before.keys() == {"0", "1"}
    os.kill(entry["pid"], signal.SIGKILL)
    undisturbed = subprocess.Popen([*torchrun, *trial], cwd=folder, env=nni_home.environment, text=True)
    nni_home.started.append(undisturbed)
    assert command.wait(timeout=300) == 1
    again = nni_home.start("nni-plugins", "run", "--resume", entry["id"], "--port", str(port))
    after = until(lambda: (found := processes_of(entry["id"])).keys() == {"0", "1"} and found)
    assert not {one.pid for one in before.values()} & {one.pid for one in after.values()}
    assert not any(one.is_running() for one in before.values())  # before they write
    assert any("trial 1/1" in line for line in again.stderr), again.stdout.read()
    again.send_signal(signal.SIGINT)  # no report
    again.communicate(timeout=300)

    with closing(sqlite3.connect(nni_home.experiments / entry["id"] / "db" / "nni.sqlite")) as database:
        ((epochs,),) = database.execute("select count(*) from MetricData where type = 'PERIODICAL'")
    assert EPOCHS - 1 <= epochs <= EPOCHS + 1  # it went on where it was
    assert undisturbed.wait(timeout=300) == 0
    (own,) = (nni_home.experiments / entry["id"]).glob("environments/*/trials/*")
    folders = own, folder / "outputs" / "trial"
    files = [load_file(one / "compact.safetensors") for one in folders]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    metrics = [json.loads((one / "metrics.json").read_text(encoding="utf-8"), object_hook=untimed) for one in folders]
    assert metrics[0] == metrics[1]
