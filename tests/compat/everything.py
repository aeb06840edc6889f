"""Run each of NNI's pruners, quantisers and distillers on the small net, and sum up what each made."""

import hashlib
import json
import logging
import sys

import torch
from nni.compression import distillation, pruning, quantization
from nni.compression.speedup import ModelSpeedup
from torch import nn

from tests.compat.nets import MOVE, PRUNE, QUANTISE, SLIM, WEIGHTS, make_net, torch_evaluator


def fingerprint(value):
    """A hash of all tensors in nested dictionaries, and of the model's weights."""
    digest = hashlib.sha256()

    def walk(item):
        if isinstance(item, dict):
            for key in sorted(item, key=str):
                digest.update(str(key).encode())
                walk(item[key])
        elif isinstance(item, torch.Tensor):
            digest.update(item.detach().double().numpy().round(6).tobytes())
        elif item is not None:
            digest.update(str(item).encode())

    walk(value)
    return digest.hexdigest()[:16]


def compressors(make=make_net, evaluate=torch_evaluator):
    """Yield a name and a function for each compressor; `evaluate` makes the evaluator of a model."""

    def built(kind, config, *arguments, trains=True, call=(), **options):
        def run():
            model = make()
            made = kind(model, config, *([evaluate(model)] if trains else []), *arguments, **options)
            result = made.compress(*call)
            return result[1], dict(model.state_dict())

        return run

    def scheduled():
        model = make()
        inner = pruning.TaylorPruner(model, PRUNE, evaluate(model), training_steps=3)
        return pruning.LinearPruner(inner, interval_steps=4, total_times=3).compress(max_steps=15, max_epochs=None)[1]

    def gradual():
        model = make()
        outer = pruning.AGPPruner(pruning.L1NormPruner(model, PRUNE), 2, 3, evaluator=evaluate(model))
        return outer.compress(max_steps=10, max_epochs=None)[1]

    def distilled(kind, name, method):
        def run():
            model, teacher = make(), make_net(1)
            layer = next(n for n, _ in model.named_modules() if n.endswith(name))
            config = [{"op_names": [layer], "lambda": 1.0, "link": name, "apply_method": method}]
            made = kind(model, config, evaluate(model), teacher, lambda batch, net: net(batch[0]))
            made.track_forward(torch.randn(2, 1, 8, 8))
            made.compress(max_steps=8, max_epochs=None)
            return dict(model.state_dict())

        return run

    one_shot = (pruning.LevelPruner, pruning.L1NormPruner, pruning.L2NormPruner, pruning.FPGMPruner)
    yield from ((kind.__name__, built(kind, PRUNE, trains=False)) for kind in one_shot)
    yield "SlimPruner", built(pruning.SlimPruner, SLIM, 5)
    yield "TaylorPruner", built(pruning.TaylorPruner, PRUNE, 5)
    yield "MovementPruner", built(pruning.MovementPruner, MOVE, 5, 15, call=(20, None))
    yield "LinearPruner", scheduled
    yield "AGPPruner", gradual
    for kind in (quantization.QATQuantizer, quantization.LsqQuantizer, quantization.LsqPlusQuantizer):
        yield kind.__name__, built(kind, QUANTISE, call=(8, None))
    yield "PtqQuantizer", built(quantization.PtqQuantizer, QUANTISE, call=(8, None))
    yield "DoReFaQuantizer", built(quantization.DoReFaQuantizer, WEIGHTS, call=(8, None))
    yield "BNNQuantizer", built(quantization.BNNQuantizer, WEIGHTS, call=(8, None))
    layerwise = (distillation.DynamicLayerwiseDistiller, distillation.Adaptive1dLayerwiseDistiller)
    yield layerwise[0].__name__, distilled(layerwise[0], "act2", "mse")
    yield layerwise[1].__name__, distilled(layerwise[1], "head", "kl")


def results(**arguments):
    """Fingerprint of each compressor's result, or the error that it ended in."""
    found = {}
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        for name, run in compressors(**arguments):
            torch.manual_seed(0)
            try:
                found[name] = fingerprint(run())
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
    finally:
        logging.disable(before)
    return found


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last, self.head = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 4, 3), nn.Linear(64, 2)

    def forward(self, x):
        return self.head(torch.relu(self.last(torch.relu(self.first(x)))).flatten(1))


class Joined(Chain):
    """Two branches, concatenated."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last, self.head = nn.Conv2d(16, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], dim=1)
        return self.head(self.last(x).mean((2, 3)))


def speedup(net):
    """What NNI's ModelSpeedup makes of a net without batch norms, whose masked output it keeps."""
    torch.manual_seed(0)
    model, x = net().eval(), torch.randn(2, 1, 8, 8)
    pruner = pruning.L1NormPruner(model, [{"op_types": ["Conv2d"], "exclude_op_names": ["last"], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()
    masked = model(x).tolist()
    pruner.unwrap_model()
    try:
        compact = ModelSpeedup(model, x, masks).speedup_model()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "shapes": {name: list(p.shape) for name, p in compact.named_parameters()},
        "masked": masked,
        "output": compact(x).tolist(),
    }


def as_json():
    torch.set_num_threads(1)
    found = {"compressors": results(), "speedup": {net.__name__: speedup(net) for net in (Chain, Joined)}}
    if "nni_plugins" in sys.modules:
        found["states"] = {patch.name: patch.state for patch in sys.modules["nni_plugins.compat"].patches()}
    return json.dumps(found)
