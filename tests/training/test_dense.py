"""The dense baseline: made once, by one of many, and never half."""

import dataclasses
import json
import subprocess
import sys
import textwrap

import pytest
import torch

from nni_plugins.training import CompressionError, build_data, build_model, prepare_dense
from nni_plugins.training.dense import CHECKPOINT, RECORD, WEIGHTS, dense_model, read_dense
from nni_plugins.training.loop import Loop
from nni_plugins.training.weights import load_weights, save_weights


def test_trained_once_then_read(recipe, tmp_path):
    lines = []
    first = prepare_dense(recipe, tmp_path, lines.append)
    trained = len(lines)
    assert trained == 4
    assert prepare_dense(recipe.with_values({"prune.sparsity": 0.9}), tmp_path, lines.append) == first
    assert len(lines) == trained
    assert first.path.parent == tmp_path / recipe.dense_key()
    assert first.accuracy > 0.9
    assert first.params == sum(p.numel() for p in build_model(recipe, (1, 8, 8), 10).parameters())
    assert first.macs >= 64 * 32 + 32 * 16 + 16 * 10
    assert first.latency_ms > 0
    data = build_data(recipe)
    assert Loop(recipe, data).evaluate(dense_model(recipe, data, first.path)) == first.accuracy
    assert {path.name for path in first.path.parent.iterdir()} == {WEIGHTS, RECORD, "recipe.yml"}
    other = prepare_dense(recipe.with_values({"seed": 1}), tmp_path, lines.append)
    assert other.path != first.path


@pytest.mark.parametrize("damage", ["truncate", "no weights", "empty record", "not json", "foreign record"])
def test_damaged_baselines_are_made_again(recipe, tmp_path, damage):
    first = prepare_dense(recipe, tmp_path, lambda line: None)
    home = first.path.parent
    {
        "truncate": lambda: first.path.write_bytes(first.path.read_bytes()[:-5]),
        "no weights": first.path.unlink,
        "empty record": lambda: (home / RECORD).write_text(""),
        "not json": lambda: (home / RECORD).write_text("{"),
        "foreign record": lambda: (home / RECORD).write_text('{"baseline": {"x": 1}, "bytes": 1}'),
    }[damage]()
    assert read_dense(home) is None
    again = prepare_dense(recipe, tmp_path, lambda line: None)
    assert again.accuracy == first.accuracy


SCRIPT = """
    import sys, time
    from nni_plugins.training import load_recipe, prepare_dense
    lines = []
    dense = prepare_dense(load_recipe(sys.argv[1]), sys.argv[2], lines.append)
    print(sum("training" in line and "waiting" not in line for line in lines), dense.accuracy)
"""


def start(recipe, tmp_path):
    recipe.save(tmp_path / "recipe.yml")
    arguments = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path / "recipe.yml"), str(tmp_path / "dense")]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def test_processes_at_once_train_one(recipe, tmp_path):
    running = [start(recipe, tmp_path) for _ in range(3)]
    results = [process.communicate(timeout=300)[0].split() for process in running]
    assert sorted(int(trained) for trained, _ in results) == [0, 0, 1]
    assert len({accuracy for _, accuracy in results}) == 1


def test_the_next_goes_on_where_a_killed_one_was(recipe, tmp_path):
    whole = prepare_dense(recipe, tmp_path / "whole", lambda line: None)

    class Killed(BaseException):
        pass

    def stop(line):
        if "epoch 2" in line:
            raise Killed

    with pytest.raises(Killed):
        prepare_dense(recipe, tmp_path / "dense", stop)
    home = tmp_path / "dense" / recipe.dense_key()
    assert (home / CHECKPOINT).exists()
    lines = []
    again = prepare_dense(recipe, tmp_path / "dense", lines.append)
    assert [line.split(":")[0] for line in lines[1:]] == ["dense epoch 2/3", "dense epoch 3/3"]
    assert again.path.read_bytes() == whole.path.read_bytes()


@pytest.mark.parametrize("form", ["safetensors", "state dict", "nested", "parallel"])
def test_a_checkpoint_is_used_as_it_is(recipe, tmp_path, form):
    data = build_data(recipe)
    model = build_model(recipe, data.shape, data.classes, 5)
    state = model.state_dict()
    path = tmp_path / ("own.safetensors" if form == "safetensors" else "own.pt")
    {
        "safetensors": lambda: save_weights(model, path),
        "state dict": lambda: torch.save(state, path),
        "nested": lambda: torch.save({"epoch": 3, "model": {"state_dict": state, "note": 1}}, path),
        "parallel": lambda: torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path),
    }[form]()
    recipe = dataclasses.replace(recipe, folder=str(tmp_path)).with_values({"model.checkpoint": path.name})
    lines = []
    dense = prepare_dense(recipe, tmp_path / "dense", lines.append)
    assert lines == [f"dense model: weights of {path.name}"]
    assert dense.accuracy == Loop(recipe, data).evaluate(model)
    loaded = dense_model(recipe, data, dense.path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in state.items())


class Evil:
    def __reduce__(self):
        return print, ("code was run",)


def test_checkpoints_that_do_not_fit(recipe, tmp_path, capsys):
    data = build_data(recipe)
    model = build_model(recipe, data.shape, data.classes, 5)
    state = model.state_dict()

    def refuse(content, message, name="own.pt"):
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif content is not None:
            torch.save(content, tmp_path / name)
        with pytest.raises(CompressionError) as caught:
            load_weights(model, tmp_path / name)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    refuse(None, "does not exist; model.checkpoint must be", "none.pt")
    refuse(b"", "cannot be read as weights")
    refuse(b"x" * 50, "cannot be read as weights", "own.safetensors")
    refuse({"epoch": 1}, "it holds no state dict")
    refuse([state], "it holds list, not a state dict")
    refuse({"model": Evil()}, "cannot be read as weights")
    refuse({**state, "head.weight": torch.zeros(3, 3)}, "1 of another shape, as head.weight")
    refuse({name: v for name, v in state.items() if "layer1" not in name}, "2 missing, as layer1.weight")
    refuse({**state, "extra.weight": torch.zeros(1)}, "1 unknown, as extra.weight")
    assert "code was run" not in capsys.readouterr().out


def test_divergence_leaves_nothing_that_looks_whole(recipe, tmp_path):
    bad = recipe.with_values({"train.learning_rate": 1e9, "model.arguments.batch_norm": False})
    with pytest.raises(CompressionError, match="dense training diverged"):
        prepare_dense(bad, tmp_path, lambda line: None)
    assert read_dense(tmp_path / bad.dense_key()) is None
    assert prepare_dense(recipe, tmp_path, lambda line: None).accuracy > 0.9


def test_record_is_plain_json(recipe, tmp_path):
    dense = prepare_dense(recipe, tmp_path, lambda line: None)
    record = json.loads((dense.path.parent / RECORD).read_text())
    assert record["baseline"]["metric"] == "accuracy"
    assert record["bytes"] == dense.path.stat().st_size
