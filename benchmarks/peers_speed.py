"""Speed and memory of a speedup beside Torch-Pruning's, in one run: half of every prunable unit of six models.

    python benchmarks/peers_speed.py [--repeats 5] [--models resnet18 vit_b_16 ...] [--json FILE]

Needs torchvision, transformers and torch-pruning. Ours is ``ModelSpeedup`` on ready masks: watch, rehearsal, masks,
replay and removal; the proof (two forwards) is timed apart. Torch-Pruning's is its graph (``DependencyGraph``, as its
pruner builds it) and its pruning of half the channels and heads, with random importance, so that no criterion is paid
for. Each tool runs in a process of its own, the two in turns; a process prunes once to warm up, and then once more for
the time. Memory is the largest resident size of the process less what it was before the pruning, model included.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
warnings.simplefilter("ignore")

MODELS = ("resnet18", "resnet50", "densenet121", "vit_b_16", "swin_t", "bert_base")
TOOLS = ("ours", "peer")


def build(name: str):
    """Return a model with random weights, an input, and what Torch-Pruning has to be told about it."""
    import torch

    torch.manual_seed(0)
    if name == "bert_base":
        from transformers import BertConfig, BertForSequenceClassification

        model = BertForSequenceClassification(BertConfig(attn_implementation="eager")).eval()
        return model, {"input_ids": torch.ones(1, 128, dtype=torch.int64)}
    import torchvision

    return getattr(torchvision.models, name)().eval(), torch.randn(1, 3, 224, 224)


def ours(name: str) -> dict[str, float]:
    import torch

    from nni_plugins.channels import ChannelGraph, Plan
    from nni_plugins.speedup import ModelSpeedup

    model, x = build(name)
    graph = ChannelGraph.watch(model, x)
    kept = {g.name: range((g.size + 1) // 2) for g in graph.groups if g.prunable and g.exact}
    masks = Plan(graph, kept).masks(model)
    before = sum(p.numel() for p in model.parameters())
    del graph, kept
    memory = Memory()
    start = time.perf_counter()
    speedup = ModelSpeedup(model, x, masks)
    compact = speedup.speedup_model()
    whole = time.perf_counter() - start
    peak = memory.peak_mib()
    proof = speedup.report.seconds["proof"]
    with torch.no_grad():
        compact(**x) if isinstance(x, dict) else compact(x)
    kept_share = sum(p.numel() for p in compact.parameters()) / before
    steps = {f"{step}_s": value for step, value in speedup.report.seconds.items()}
    error = speedup.report.relative_error
    return {"seconds": whole - proof, "peak_mib": peak, "params_kept": kept_share, "error": error, **steps}


def peer(name: str) -> dict[str, float]:
    import torch
    import torch_pruning as tp

    model, x = build(name)
    before = sum(p.numel() for p in model.parameters())
    heads = {}
    for module in model.modules():
        if name == "bert_base" and module.__class__.__name__ == "BertSelfAttention":
            heads |= {getattr(module, part): module.num_attention_heads for part in ("query", "key", "value")}
    last = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features in (1000, 2)]
    memory = Memory()
    start = time.perf_counter()
    pruner = tp.pruner.MetaPruner(
        model,
        x,
        importance=tp.importance.RandomImportance(),
        pruning_ratio=0.5,
        ignored_layers=last,
        num_heads=heads,
        prune_num_heads=bool(heads),
        head_pruning_ratio=0.5 if heads else 0.0,
        output_transform=(lambda out: out.logits.sum()) if name == "bert_base" else None,
    )
    pruner.step()
    seconds = time.perf_counter() - start
    peak = memory.peak_mib()
    return {"seconds": seconds, "peak_mib": peak, "params_kept": sum(p.numel() for p in model.parameters()) / before}


class Memory:
    """The largest resident size of this process from now on, less what it is now (Linux only)."""

    def __init__(self) -> None:
        gc.collect()
        self._libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        self._before = self._status("VmRSS")

    _libc = ctypes.CDLL(None)

    @staticmethod
    def _status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(key)))

    def peak_mib(self) -> float:
        return (self._status("VmHWM") - self._before) / 1024


def work(tool: str, name: str, threads: int) -> None:
    """Prune twice in this process, and print the second's figures."""
    import torch

    torch.set_num_threads(threads)
    if tool == "ours":
        import nni_plugins.speedup.model_speedup  # noqa: F401
    else:
        import torch_pruning  # noqa: F401
    prune = {"ours": ours, "peer": peer}[tool]
    prune(name)
    print(json.dumps(prune(name)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=int, default=120, help="seconds that one process may take")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--work", nargs=2, metavar=("TOOL", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(*options.work, options.threads)
    import torch

    table = {}
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{platform.machine()}, {options.threads} threads, {versions}")
    print(
        f"{'model':14}{'ours s':>9}{'peer s':>9}{'ratio':>8}{'proof s':>9}{'ours MiB':>10}{'peer MiB':>10}"
        f"{'params kept':>16}"
    )
    for name in options.models:
        runs: dict[str, list[dict]] = {tool: [] for tool in TOOLS}
        for _ in range(options.repeats):
            for tool in TOOLS:
                command = [sys.executable, __file__, "--work", tool, name, "--threads", str(options.threads)]
                if any("failed" in run for run in runs[tool]):
                    continue
                try:
                    done = subprocess.run(command, capture_output=True, text=True, timeout=options.limit)
                except subprocess.TimeoutExpired:
                    runs[tool].append({"failed": f"{tool}: not done after {options.limit} s"})
                    continue
                if done.returncode:
                    runs[tool].append({"failed": (done.stderr.strip().splitlines() or ["?"])[-1]})
                    continue
                runs[tool].append(json.loads(done.stdout.strip().splitlines()[-1]))
        table[name] = row = {tool: _median(runs[tool]) for tool in TOOLS}
        us, them = row["ours"], row["peer"]
        if "failed" in us or "failed" in them:
            figures = [f"{k} {v:.3f}" for run in (us, them) if "failed" not in run for k, v in run.items()]
            print(f"{name:14}{us.get('failed', '')} {them.get('failed', '')} ({', '.join(figures)})", flush=True)
            continue
        print(
            f"{name:14}{us['seconds']:9.3f}{them['seconds']:9.3f}{us['seconds'] / them['seconds']:8.2f}"
            f"{us['proof_s']:9.3f}{us['peak_mib']:10.0f}{them['peak_mib']:10.0f}"
            f"{us['params_kept']:8.2f}{them['params_kept']:8.2f}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n")
    return None


def _median(runs: list[dict]) -> dict:
    failed = [run for run in runs if "failed" in run]
    return failed[0] if failed else {key: statistics.median(run[key] for run in runs) for key in runs[0]}


if __name__ == "__main__":
    main()
