"""How much of a saving in MACs is one of time: ResNet-18 at 224, half of each group, in multiples of 8.

    python benchmarks/realised.py        # needs torchvision, onnx, onnxruntime, onnxscript

Dense and compact in turns in one run, one thread, torch and onnxruntime, batch 1 and 8. The quotient is
(1 − time ratio) / (1 − MACs ratio): 1 where all of the saving is real.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torchvision.models import resnet18

from nni_plugins.channels import ChannelGraph
from nni_plugins.pruners import MagnitudePruner
from nni_plugins.report.bench import bench
from nni_plugins.report.environment import environment
from nni_plugins.speedup import ModelSpeedup

RESULTS = Path(__file__).resolve().parent / "results" / "realised.json"


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(1, 3, 224, 224)
    dense = resnet18(weights=None).eval()
    model = copy.deepcopy(dense)
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    pruner = MagnitudePruner(model, config, dummy_input=x, round_to=8)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    compact = ModelSpeedup(model, x, masks).speedup_model().eval()
    share = ChannelGraph.watch(compact, x).cost().macs / ChannelGraph.watch(dense, x).cost().macs
    timings = bench({"dense": dense, "compact": compact}, x, runtimes=("eager", "onnx"), batches=(1, 8), seconds=20.0)
    rows = []
    for one in timings:
        if one.model == "compact" and one.ratio is not None:
            quotient = (1 - one.ratio) / (1 - share)
            rows.append({"runtime": one.runtime, "batch": one.batch, "time": one.ratio, "realised": quotient})
            print(
                f"{one.runtime} batch {one.batch}: {share:.3f} of the MACs, {one.ratio:.3f} of the time: {quotient:.2f}"
            )
    made = {"macs": share, "rows": rows, "environment": environment()}
    RESULTS.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
