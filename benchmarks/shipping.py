"""From dense to 8 bits, step by step: accuracy, MACs, size, and time in onnxruntime.

    python benchmarks/shipping.py                     # digits, ResNet-20, 3 seeds
    python benchmarks/shipping.py --data cifar10 --root cifar10.npz --seeds 1
    python benchmarks/shipping.py --data cifar10 --root cifar10.npz --only-latency   # of the models made before

Dense; pruned to half the MACs in multiples of 8 channels; the same with the dense model as teacher; that in 8 bits
(QAT). All four share the dense nets and the budget of fine-tuning. The test split is read once for each, after the
last epoch; int8's metric is computed by onnxruntime. Times are taken in turns in one run (``nni-plugins bench``).

It can be stopped and started again: models and figures lie in ``--folder``, and a fine-tuning goes on after its last
whole epoch. ``--dense`` takes nets that ``benchmarks/cifar10.py dense`` trained: the same net, split and training.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from nni_plugins.files import write_whole
from nni_plugins.report.bench import bench
from nni_plugins.report.environment import environment
from nni_plugins.training import build_data, compress, evaluate_test, prepare_dense, recipe_from_dict
from nni_plugins.training.artefacts import load_model
from nni_plugins.training.checkpoint import seed_everything
from nni_plugins.training.dense import DenseBaseline, dense_model
from nni_plugins.training.export import export
from nni_plugins.training.loop import Loop
from nni_plugins.training.pipeline import finetune_recipe
from nni_plugins.training.quantize import quantize

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "shipping.json"
PRUNE: dict[str, Any] = {
    "pruner": "magnitude",
    "sparsity": 0.5,
    "target": "macs",
    "scope": "local",
    "round_to": 8,
    "arguments": {"tolerance": 0.1},  # in multiples of 8 a small net does not come nearer to half
}
"""Every group loses the same share, so that parameters fall with the MACs."""
TREES: dict[str, dict[str, Any]] = {
    "digits": {
        "model": {"name": "resnet20"},
        "train": {"epochs": 20},
        "prune": PRUNE,
        "finetune": {"epochs": 10, "learning_rate": 0.05},
    },
    "cifar10": {
        "folder": str(HERE.parent),
        "steps": ["prune", "speedup", "finetune", "quantize", "export"],  # the compact net trains in half the time
        "model": {"name": "benchmarks.cifar.nets:resnet"},  # ResNet-8, the net of benchmarks/cifar10.py
        "data": {"name": "cifar10", "batch_size": 128, "validation": 0.1, "augment": "crop_flip"},
        "train": {"epochs": 20, "channels_last": True},
        "prune": PRUNE,
        "finetune": {"epochs": 10, "learning_rate": 0.05},
    },
}
STEPS: dict[str, dict[str, Any]] = {
    "pruned": {},
    "+ teacher": {"distill.method": "kd"},
    "+ int8": {"distill.method": "kd", "quantize.method": "qat"},
}
ORDER = ("+ teacher", "+ int8", "pruned")
"""In which they are made: int8 starts from what the teacher left."""


def main() -> None:
    """Run it, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", choices=TREES, default="digits")
    parser.add_argument("--root", help="of cifar10")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dense", help="trained dense weights; {seed} in the path is the seed")
    parser.add_argument("--epochs", type=int, help="of fine-tuning")
    parser.add_argument("--only-latency", action="store_true", help="take the times of finished models again")
    parser.add_argument("--no-latency", action="store_true", help="leave the times out, on a busy machine")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each contender and batch size")
    parser.add_argument(
        "--folder", type=Path, default=Path.home() / ".cache" / "nni-plugins" / "shipping", help="for the models"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.data == "cifar10" and not options.root:
        parser.error("no data: give --root, a .npz of JPEG streams or cifar-10-batches-py")
    if options.root and options.data != "cifar10":
        parser.error("--root is of --data cifar10")
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        run = Run(options, seed)
        run.time() if options.only_latency else run.make()
        rows.append(run.figures)
        known = json.loads(options.results.read_text(encoding="utf-8")) if options.results.exists() else {}
        known[options.data] = {"seeds": rows, "environment": environment()}
        options.results.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


class Run:
    """The models and figures of one seed, in a folder of their own."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        changes: dict[str, Any] = {"seed": seed, "train.threads": 1, "export.formats": ["onnx"]}
        if options.dense:
            changes["model.checkpoint"] = str(Path(options.dense.format(seed=seed)).expanduser().resolve())
        if options.epochs is not None:
            changes["finetune.epochs"] = options.epochs
        self.options, self.seed = options, seed
        tree = copy.deepcopy(TREES[options.data])
        if options.root:
            tree["data"]["root"] = str(Path(options.root).resolve())
        self.base = recipe_from_dict(tree).with_values(changes)
        self.home = options.folder / f"{options.data}-{seed}-e{self.base.finetune.epochs}"
        self.file = self.home / "figures.json"
        self.figures: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
        self.data = build_data(self.base)

    def say(self, line: str) -> None:
        """Print a line with the seed."""
        print(f"seed {self.seed}: {line}", flush=True)

    def keep(self, name: str, value: Any) -> None:
        """Write a step's figures, whole."""
        self.figures[name] = value
        text = json.dumps(self.figures, indent=1)
        write_whole(self.file, lambda part: part.write_text(text, encoding="utf-8"))
        if name != "times":
            self.say(f"{name}: {value}")

    def place(self, name: str) -> Path:
        """The folder of a step; int8 lies beside the model that it was made of."""
        return self.home / ("pruned" if name == "pruned" else "teacher")

    def dense(self) -> DenseBaseline:
        """Train the dense net, or read it."""
        return prepare_dense(self.base, self.home / "dense", self.say)

    def make(self) -> None:
        """Make what is not there yet, and measure it."""
        self.home.mkdir(parents=True, exist_ok=True)
        dense = self.dense()
        if "dense" not in self.figures:
            test = evaluate_test(self.base, dense.path)["accuracy"]
            self.keep("dense", {"test": test, "macs": dense.macs, "bytes": dense.bytes})
            self.keep("epochs", {"train": self.base.train.epochs, "finetune": self.base.finetune.epochs})
        for name in ORDER:
            if name not in self.figures:
                self.step(name, dense)
        if not self.options.no_latency:
            self.time()

    def step(self, name: str, dense: DenseBaseline) -> None:
        """Make the model of one step."""
        recipe, home = self.base.with_values(STEPS[name]), self.place(name)
        if "int8" in name:
            loop = Loop(finetune_recipe(recipe), self.data, "quantisation")
            compact = load_model(recipe, self.data, home / "compact.safetensors")
            seed_everything(self.seed + 3)  # as in nni_plugins.training.pipeline
            quantized = quantize(recipe, loop.place(compact), loop)
            plan = json.loads((home / "plan.json").read_text(encoding="utf-8"))["groups"]
            metrics = json.loads((home / "metrics.json").read_text(encoding="utf-8"))
            metrics |= {"float_accuracy": metrics["accuracy"], "accuracy": loop.evaluate(quantized.model)}
            kept = {key: metrics[key] for key in ("accuracy", "float_accuracy", "macs", "params", "bytes")}
            said = {"recipe": recipe.to_dict(), "plan": plan, "metrics": kept}
            export(recipe, compact, quantized, loop.place(self.data.example), home, said)
        else:
            metrics = compress(
                recipe, home, dense, on_epoch=lambda value: self.say(f"{name}: an epoch, validation {value:.4f}")
            )  # fmt: skip
        final = home / ("int8.onnx" if "int8" in name else "compact.safetensors")
        self.keep(
            name,
            {
                "test": evaluate_test(recipe, final)["accuracy"],
                "validation": metrics["accuracy"],
                "macs": metrics["macs"],
                "params": metrics["params"],
                "bytes": final.stat().st_size,
            },
        )

    def time(self) -> None:
        """Time the finished models, in turns."""
        home = self.place("+ int8")
        if "+ int8" not in self.figures:
            sys.exit(f"{home} holds no finished models; run it without --only-latency first")
        dense = self.dense()
        models = {
            "dense": dense_model(self.base, self.data, dense.path),
            "compact": load_model(self.base, self.data, home / "compact.safetensors"),
        }
        files = {("compact", "onnx"): home / "compact.onnx", ("compact", "int8"): home / "int8.onnx"}
        seconds = self.options.seconds
        times = bench(
            models, self.data.example, files=files, runtimes=("onnx", "int8"), batches=(1, 32), seconds=seconds
        )  # fmt: skip
        self.keep(
            "times",
            [
                {key: getattr(one, key) for key in ("model", "runtime", "batch", "median_ms", "p95_ms", "ratio")}
                | {"bytes": one.bytes}
                for one in times
            ],
        )


def table(rows: list[dict[str, Any]]) -> str:
    """Return the means over seeds as Markdown."""
    lines = ["| step | test accuracy | MACs | file | batch 1 | batch 32 |", "|---|---|---|---|---|---|"]
    runtimes = {"dense": ("dense", "onnx"), "+ teacher": ("compact", "onnx"), "+ int8": ("compact", "int8")}
    for name in ("dense", *STEPS):
        if not all(name in row for row in rows):
            continue  # not made yet
        tests = [100 * row[name]["test"] for row in rows]
        spread = f" ± {statistics.stdev(tests):.2f}" if len(tests) > 1 else ""
        share = statistics.mean(row[name]["macs"] / row["dense"]["macs"] for row in rows)
        smaller = statistics.mean(row["dense"]["bytes"] / row[name]["bytes"] for row in rows)
        times = []
        for batch in (1, 32):
            found = [
                one["median_ms"] / base["median_ms"]
                for row in rows
                for one in row.get("times", [])
                for base in row.get("times", [])
                if (one["model"], one["runtime"], one["batch"]) == (*runtimes.get(name, ("", "")), batch)
                and (base["model"], base["runtime"], base["batch"]) == ("dense", "onnx", batch)
            ]
            times.append(f"{100 * statistics.mean(found):.0f}%" if found else "")
        lines.append(
            f"| {name} | {statistics.mean(tests):.2f}%{spread} | {100 * share:.0f}% | {smaller:.1f}x smaller | "
            f"{times[0]} | {times[1]} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
