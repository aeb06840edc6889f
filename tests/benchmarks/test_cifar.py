"""The CIFAR-10 benchmark on a handful of noisy images: that it runs, resumes, meets the MACs, and makes its table."""

import io
import json

import numpy as np
import pytest
import torch

from benchmarks import cifar10
from benchmarks.cifar import table, training
from benchmarks.cifar.nets import resnet


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    from PIL import Image

    random = np.random.default_rng(0)
    parts = {"classes": np.array([str(i) for i in range(10)])}
    for split, count in (("train", 150), ("test", 20)):
        streams = []
        for _ in range(count):
            file = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "JPEG")
            streams.append(file.getvalue())
        parts[f"{split}_jpeg"] = np.frombuffer(b"".join(streams), dtype=np.uint8)
        parts[f"{split}_offsets"] = np.cumsum([0, *map(len, streams)])
        parts[f"{split}_labels"] = (np.arange(count) % 10).astype(np.uint8)
    path = tmp_path_factory.mktemp("cifar") / "few.npz"
    np.savez(path, **parts)
    return path


def run(archive, folder, step, *more):
    arguments = [step, "--data", archive, "--cache", folder / "cache", "--results", folder / "results"]
    size = ["--widths", "4", "6", "8", "--epochs", "1", "--fine-tune-epochs", "3"]
    assert cifar10.main([str(item) for item in [*arguments, *size, *more]]) == 0
    return {path.stem: json.loads(path.read_text()) for path in (folder / "results").glob("*.json")}


def test_a_run_that_was_stopped_ends_as_one_that_was_not(archive, tmp_path, monkeypatch):
    results = run(archive, tmp_path / "whole", "prune", "--method", "taylor", "--seed", 3)
    assert results["taylor-seed3"]["dense_macs"] == results["dense-seed3"]["macs"]
    share = results["taylor-seed3"]["macs"] / results["dense-seed3"]["macs"]
    assert 0.45 < share <= 0.5
    written, stops = cifar10.cifar_data.atomically, []

    def stopping(path, write):
        written(path, write)
        if path.suffix == ".pt" and path not in stops:
            stops.append(path)
            raise KeyboardInterrupt

    monkeypatch.setattr(cifar10.cifar_data, "atomically", stopping)
    monkeypatch.setattr(training, "atomically", stopping)
    for _ in range(5):
        try:
            again = run(archive, tmp_path / "cut", "prune", "--method", "taylor", "--seed", 3)
            break
        except KeyboardInterrupt:
            continue
    assert [path.name for path in stops] == ["dense.pt", "pruning.pt", "pruned.pt", "tuned.pt"]
    for name in results:
        different = {key for key in results[name] if results[name][key] != again[name][key]}
        assert different <= {"seconds", "finished"}
    folders = [next((tmp_path / which / "cache").rglob("tuned.pt")) for which in ("whole", "cut")]
    models = [torch.load(path, weights_only=True)["model"] for path in folders]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.slow
def test_torch_pruning_lands_on_the_same_macs(archive, tmp_path):
    pytest.importorskip("torch_pruning")
    for method in ("torch-pruning-magnitude", "torch-pruning-taylor"):
        results = run(archive, tmp_path, "prune", "--method", method)
        assert 0.4 < results[f"{method}-seed0"]["macs"] / results["dense-seed0"]["macs"] <= 0.5


def test_the_table_pairs_seeds():
    def result(method, seed, accuracy):
        return {
            "method": method, "seed": seed, "test_accuracy": accuracy, "macs": 50, "params": 10, "net": "n",
            "dense_macs": 100, "threads": 1, "torch": "2",
        }  # fmt: skip

    given = {"taylor": (0.80, 0.82), "torch-pruning-taylor": (0.79, 0.80), "torch-pruning-magnitude": (0.70, 0.70)}
    results = {method: {s: result(method, s, a) for s, a in enumerate(values)} for method, values in given.items()}
    assert table.paired(results, "taylor", "torch-pruning-taylor") == pytest.approx((1.5, 0.5, 2))
    page = table.page(results)
    assert "(Torch-Pruning, group Taylor), the contender is at +1.50 points" in page
    assert "| 79.50 | 79.00, 80.00 | 50.0% | 10 |" in page


def test_the_family_has_its_depths():
    assert sum(p.numel() for p in resnet(8).parameters()) == 78042
    assert len([m for m in resnet(56).modules() if isinstance(m, torch.nn.Conv2d)]) == 55 + 2
    with pytest.raises(ValueError, match="6 n \\+ 2"):
        resnet(10)
    plan = training.Plan(epochs=4, rate=0.1, warmup=1.0)
    assert [round(plan.rate_at(step, 10), 4) for step in (0, 9, 10, 25, 39)] == [0.01, 0.1, 0.1, 0.05, 0.0003]
