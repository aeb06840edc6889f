"""``nni-plugins inspect``: figures against the graph, pure JSON, one line for a mistake, pictures small and large."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from nni_plugins.channels import ChannelGraph
from nni_plugins.cli import commands

NETS = """
import torch
from torch import nn

print("importing")


def net(width=16):
    print("building")
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.hidden, self.head = nn.Embedding(9, 8), nn.Linear(8, 24), nn.Linear(24, 3)
        self.unused = nn.Linear(5, 5)

    def forward(self, words, mask=None):
        x = torch.relu(self.hidden(self.table(words)))
        return self.head(x if mask is None else x * mask.unsqueeze(-1))


def fails():
    raise RuntimeError("no weights today")


def normed():
    return nn.Sequential(nn.Linear(6, 32), nn.LayerNorm(32), nn.Linear(32, 2))


ready = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 2))
number = 3


def words():
    return {"words": torch.ones(1, 7, dtype=torch.int64), "mask": torch.ones(1, 7)}


def metric(model):
    torch.manual_seed(0)
    return model(torch.randn(16, 3, 8, 8)).detach().std().item()


def bad_metric(model):
    return "good"


def failing_metric(model):
    raise KeyError("test set")
"""


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("code") / "inspected_nets.py"
    path.write_text(NETS, encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNI_PLUGINS_CACHE", str(tmp_path_factory.getbasetemp() / "latencies"))


@pytest.fixture(autouse=True)
def no_width_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that run beside others are told the width of somebody's terminal."""
    monkeypatch.delenv("COLUMNS", raising=False)


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(commands, ["inspect", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def found(*arguments: str) -> dict[str, Any]:
    code, text, errors = invoke(*arguments, "--json")
    assert code == 0, errors
    return json.loads(text)


def test_figures_are_the_graphs(nets: Path) -> None:
    report = found(f"{nets}:net", "--input", "1x3x8x8", "--argument", "width=24", "--curves")
    sys.path.insert(0, str(nets.parent))
    try:
        import inspected_nets  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(nets.parent))
    graph = ChannelGraph.watch(inspected_nets.net(24), torch.randn(1, 3, 8, 8))
    assert report["class"] == "Sequential"
    assert report["input"] == "1x3x8x8"
    assert (report["macs"], report["params"]) == (graph.cost().macs, graph.cost().params)
    assert report["macs"] == 36 * 27 * 24 + 16 * 24 * 9 * 8 + 8 * 4
    assert [group["name"] for group in report["groups"]] == [group.name for group in graph.groups]
    for said, group in zip(report["groups"], graph.groups, strict=True):
        cost = graph.group_cost(group)
        assert (said["macs"], said["params"], said["size"]) == (cost.macs, cost.params, group.size)
        assert said["macs_share"] == pytest.approx(cost.macs / graph.cost().macs)
        assert said["params_share"] == pytest.approx(cost.params / graph.cost().params)
        assert said["state"] == ("frozen" if not group.prunable else "exact" if group.exact else "inexact")
        assert said["reason"] == group.reason
        assert {m["module"] for m in said["members"]} == {m.module for m in group.members}
    assert sum(module["macs"] for module in report["modules"]) == report["macs"]
    assert sum(module["params"] for module in report["modules"]) == report["params"]
    first, image, second, output = report["groups"]
    assert (first["macs"], second["macs"]) == (report["macs"] - 32, 16 * 24 * 9 * 8 + 32)
    assert image["macs"] == 36 * 27 * 24  # frozen, yet it is known what goes through it
    assert (image["state"], output["state"]) == ("frozen", "frozen")
    assert report["counts"] == {"groups": 4, "exact": 2, "inexact": 0, "frozen": 2}


def test_shares_of_latency_make_up_the_whole(nets: Path) -> None:
    report = found(f"{nets}:net", "--input", "1x3x32x32", "--curves")
    latency = report["latency"]
    times = {module["name"]: module["latency_ms"] for module in report["modules"]}
    assert sum(times.values()) + latency["overhead_ms"] == pytest.approx(latency["measured_ms"])
    first = report["groups"][0]
    assert first["latency_ms"] == pytest.approx(sum(times[name] for name in "0123"), rel=0.2)
    assert first["latency_share"] == pytest.approx(first["latency_ms"] / latency["measured_ms"])
    assert set(first["model_ms_at"]) == {"0.25", "0.5", "0.75"}
    assert 0 < first["model_ms_at"]["0.25"] < 1.1 * latency["measured_ms"]
    again = found(f"{nets}:net", "--input", "1x3x32x32", "--curves")
    assert again["latency"]["taken"] == 0 < latency["taken"]
    assert again["groups"] == report["groups"]
    fresh = found(f"{nets}:net", "--input", "1x3x32x32", "--fresh")
    assert 1 < fresh["latency"]["taken"] < latency["taken"] / 3
    assert "model_ms_at" not in fresh["groups"][0]


def test_the_table_says_what_can_go_and_why_not(nets: Path) -> None:
    code, text, errors = invoke(f"{nets}:net", "--input", "1x3x8x8")
    assert code == 0
    assert "building" in errors  # what the user's code prints is no part of the report
    assert "building" not in text
    row = next(line for line in text.splitlines() if line.startswith("0 "))
    assert row.split()[:3] == ["0", "channels", "16"]
    assert "exact" in row
    assert "0, 1, 3" in row
    assert "the model's output" in text
    assert "the whole model" in text
    assert "ms" in text
    code, text, _ = invoke(f"{nets}:net", "--input", "1x3x8x8", "--no-latency")
    assert "ms" not in text.replace("groups", "")
    code, text, _ = invoke(f"{nets}:normed", "--input", "1x6", "--no-latency")
    assert "inexact" in text
    assert "layer_norm" in text
    code, text, _ = invoke(f"{nets}:Words", "--input", "1x7:int64", "--no-latency")
    assert "not used in the watched run" in text


@pytest.mark.parametrize("columns", ["40", "80", "300"])
def test_no_figure_is_cut_off(nets: Path, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    text = invoke(f"{nets}:net", "--input", "1x3x8x8")[1]
    head = text.split("Shares are")[0]
    assert "channels" in head
    assert "…" not in head
    assert ("modules" in head) == (columns == "300")


def test_inputs_by_name_by_type_and_by_function(nets: Path) -> None:
    report = found(f"{nets}:Words", "--input", "words=2x5:int64", "--input", "mask=2x5:bool", "--no-latency")
    assert report["input"] == "words=2x5:int64, mask=2x5:bool"
    (hidden,) = [group for group in report["groups"] if group["name"] == "hidden"]
    assert (hidden["size"], hidden["state"], hidden["kind"]) == (24, "exact", "hidden")
    assert report["latency"] is None
    assert found(f"{nets}:Words", "--inputs", f"{nets}:words", "--no-latency")["input"] == "words=1x7:int64, mask=1x7"
    positional = found(f"{nets}:Words", "--input", "2x5:int64", "--input", "2x5", "--no-latency")
    assert positional["groups"] == report["groups"]
    assert found(f"{nets}:ready", "--input", "1x6", "--no-latency")["counts"]["exact"] == 1


def test_a_module_on_the_path_and_units(nets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(nets.parent)
    assert found("inspected_nets:net", "--input", "1x3x8x8", "--no-latency")["counts"]["exact"] == 2
    layer = "torch.nn:TransformerEncoderLayer"
    arguments = ["--argument", "d_model=16", "--argument", "nhead=4", "--input", "1x5x16", "--no-latency"]
    kinds = {group["name"]: (group["kind"], group["size"]) for group in found(layer, *arguments)["groups"]}
    assert kinds["self_attn"] == ("heads", 4)
    inside = found(layer, *arguments, "--units", "head_dim")
    assert ("head_dim", 4) in {(group["kind"], group["size"]) for group in inside["groups"]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["net"], "module:function"),
        (["nowhere:net", "--input", "1x3"], "no module nowhere"),
        (["NETS:nothing", "--input", "1x3"], "has no nothing"),
        (["/no/such/file.py:net", "--input", "1x3"], "there is no file"),
        (["NETS:net"], "--input 1x3x224x224"),
        (["NETS:net", "--input", "1x3xfoo"], "--input 1x3xfoo"),
        (["NETS:net", "--input", "1x3x8x8:int65"], "int65 is no type"),
        (["NETS:net", "--input", "0x3"], "a size is 0"),
        (["NETS:net", "--input", "a=1x3", "--input", "1x3"], "all inputs have a name"),
        (["NETS:net", "--input", "a=1x3", "--input", "a=1x3"], "a is given twice"),
        (["NETS:net", "--input", "1x3", "--inputs", "NETS:words"], "both given"),
        (["NETS:net", "--input", "1x5x8x8"], "the model fails on 1x5x8x8"),
        (["NETS:net", "--input", "1x3x8x8", "--argument", "depth=3"], "does not fit the arguments"),
        (["NETS:ready", "--input", "1x6", "--argument", "depth=3"], "is a model, not a function"),
        (["NETS:fails", "--input", "1x6"], "no weights today"),
        (["NETS:number", "--input", "1x6"], "int"),
        (["NETS:words", "--input", "1x6"], "must return a torch module"),
        (["NETS:net", "--input", "1x3x8x8", "--sensitivity"], "--metric module:function"),
        (["NETS:net", "--input", "1x3x8x8", "--metric", "NETS:nothing"], "has no nothing"),
        (["NETS:net", "--input", "1x3x8x8", "--metric", "NETS:number"], "is no function"),
        (["NETS:net", "--input", "1x3x8x8", "--metric", "NETS:bad_metric"], "must be a number"),
        (["NETS:net", "--input", "1x3x8x8", "--metric", "NETS:failing_metric"], "test set"),
        (["NETS:net", "--input", "1x3x8x8", "--sparsities", "0.5,2"], "between 0 and 1"),
        (["NETS:net", "--input", "1x3x8x8", "--plot", "groups.bmp"], ".png"),
        (["NETS:net", "--input", "1x3x8x8", "--plot", "/no/such/folder/groups.png"], "cannot be written"),
        (["NETS:net", "--input", "1x3x8x8", "--checkpoint", "/no/such/weights.pt"], "does not exist"),
        (["NETS:net", "--input", "1x3x8x8", "--device", "nonsense"], "does not work here"),
        (["nowhere.yml"], "cannot be read"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_1(nets: Path, arguments: list[str], words: str) -> None:
    code, text, errors = invoke(*(argument.replace("NETS", str(nets)) for argument in arguments), "--no-latency")
    assert code == 1, errors
    assert not text
    lines = [line for line in errors.splitlines() if line not in ("importing", "building")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("nni-plugins: ")
    assert words in lines[0]


def test_options_that_click_refuses_are_exit_status_2(nets: Path) -> None:
    assert invoke(f"{nets}:net", "--threads", "0")[0] == 2
    assert invoke()[0] == 2
    code, _, errors = invoke(f"{nets}:net", "--input", "1x3x8x8", "--argument", "width")
    assert code == 2
    assert "--argument" in errors


def test_a_recipe_gives_model_data_and_metric(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        "model: {name: small_cnn, arguments: {widths: [4, 8]}}\ndata: {name: digits, limit: 200}\ntrain: {threads: 1}\n",
        encoding="utf-8",
    )
    report = found(str(recipe), "--no-latency")
    assert report["input"] == "1x1x8x8"
    assert {group["size"] for group in report["groups"] if group["state"] == "exact"} == {4, 8}
    code, _, errors = invoke(str(recipe), "--sensitivity", "--no-latency")
    assert code == 1
    assert "model.checkpoint" in errors
    from nni_plugins.training.models.plain import small_cnn

    torch.save(small_cnn((1, 8, 8), 10, (4, 8)).state_dict(), tmp_path / "weights.pt")
    weights = ["--checkpoint", str(tmp_path / "weights.pt")]
    measured = found(str(recipe), "--sensitivity", "--sparsities", "0.5", "--no-latency", *weights)
    assert measured["sensitivity"]["metric"] == "accuracy"
    assert 0 <= measured["sensitivity"]["dense"] <= 1
    assert all(set(g["sensitivity"]) == {"0.5"} for g in measured["groups"] if g["state"] == "exact")
    assert all(g["sensitivity"] is None for g in measured["groups"] if g["state"] == "frozen")


def test_sensitivity_is_in_the_table_and_in_the_json(nets: Path) -> None:
    arguments = [f"{nets}:net", "--input", "1x3x8x8", "--metric", f"{nets}:metric", "--no-latency"]
    report = found(*arguments, "--sparsities", "0.5,0.9")
    assert report["sensitivity"]["sparsities"] == [0.5, 0.9]
    assert report["sensitivity"]["higher_is_better"]
    values = report["groups"][0]["sensitivity"]
    assert set(values) == {"0.5", "0.9"}
    assert values["0.5"] != values["0.9"] != report["sensitivity"]["dense"]
    code, text, _ = invoke(*arguments)
    assert code == 0
    assert "-25%" in text
    assert f"{report['sensitivity']['dense']:.4g}" in text


@pytest.mark.parametrize("layers", [2, 74])
def test_the_picture_shows_few_groups_and_many(tmp_path: Path, nets: Path, layers: int) -> None:
    from nni_plugins.report.inspect import describe
    from nni_plugins.report.inspect_plot import save_groups
    from nni_plugins.report.inspect_target import Target

    blocks = [part for _ in range(layers) for part in (nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU())]
    model = nn.Sequential(*blocks, nn.Linear(8, 2))
    target = Target("deep", model, torch.randn(1, 8))
    report = describe(target, ChannelGraph.watch(model, target.dummy_input), None)
    count = len(report["groups"])
    assert count == 2 * layers + 2
    for group in report["groups"]:
        group["sensitivity"] = {"0.5": 0.8} if group["state"] != "frozen" else None
    report["sensitivity"] = {"metric": "accuracy", "higher_is_better": True, "dense": 0.9, "sparsities": [0.5]}
    save_groups(report, tmp_path / "groups.svg")
    if count < 10:
        from PIL import Image

        save_groups(report, tmp_path / "groups.png")
        width, height = Image.open(tmp_path / "groups.png").size
        assert width > 1000
        assert height > 24 * count  # pixels a line
    drawing = (tmp_path / "groups.svg").read_text(encoding="utf-8")
    assert drawing.count("<path") > 3 * count
    points = float(re.search(r'height="([\d.]+)pt"', drawing)[1])  # type: ignore[index]
    assert points > 12 * count  # a line of text is 8 or less
    assert all(colour in drawing for colour in ("#2b6cb0", "#d9622b", "#b8bec8"))


def test_in_a_process_of_its_own(nets: Path, tmp_path: Path) -> None:
    plot = tmp_path / "groups.svg"
    command = [sys.executable, "-m", "nni_plugins.cli", "inspect", f"{nets.name}:net", "--input", "1x3x8x8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        [*command, "--json", "--plot", str(plot)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=nets.parent,
        env=environment,
    )
    assert answer.returncode == 0, answer.stderr
    report = json.loads(answer.stdout)
    assert report["counts"]["exact"] == 2
    assert report["latency"]["measured_ms"] > 0
    assert plot.read_text(encoding="utf-8").count("<svg") == 1
