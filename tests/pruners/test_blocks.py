"""Whole blocks: what they are scored by, that budgets are met, and that a speedup takes them out."""

import copy

import nni
import pytest
import torch
from nni.compression import TorchEvaluator
from torch import nn

from nni_plugins.pruners import BlockPruner, BudgetError, PruningError
from nni_plugins.speedup import ModelSpeedup
from tests.block_nets import ConvNext, KeywordModel, ResNet, Transformer, trained

from .resuming import assert_resumes

IMAGE = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
TOKENS = torch.randn(2, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
IDS = {"input_ids": torch.arange(10).view(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}


def run(model, inputs):
    with torch.no_grad():
        out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return out["logits"] if isinstance(out, dict) else out


def asked(types, ratio=0.5, **more):
    return [{"op_types": types, "sparse_ratio": ratio, **more}]


CASES = {
    "resnet": (lambda: ResNet(depth=3), IMAGE, asked(["BasicBlock"])),
    "transformer": (Transformer, TOKENS, asked(["PreNorm"], 0.34)),
    "attention": (Transformer, TOKENS, asked(["Attention"], 0.34)),
    "branches": (Transformer, TOKENS, asked(["Attention", "Mlp"])),
    "convnext": (ConvNext, IMAGE, [{"op_names_re": [r"stages\.\d+$"], "sparse_ratio": 0.5}]),
    "keywords": (KeywordModel, IDS, [{"op_names_re": [r"layers\.\d+$"], "sparse_ratio": 0.5}]),
}


@pytest.mark.parametrize("name", CASES)
def test_masked_blocks_are_taken_out_by_a_speedup(name):
    make, inputs, config = CASES[name]
    model = trained(make())
    pruner = BlockPruner(model, config, dummy_input=inputs)
    _, masks = pruner.compress()
    wanted = int(config[0]["sparse_ratio"] * len(pruner.blocks) + 0.5)
    assert len(pruner.plan.blocks) == wanted
    assert set(pruner.plan.blocks) == set(sorted(pruner.scores, key=lambda n: float(pruner.scores[n]))[:wanted])
    masked = run(model, inputs)
    pruner.unwrap_model()
    speedup = ModelSpeedup(model, inputs, masks)
    compact = speedup.speedup_model()
    torch.testing.assert_close(run(compact, inputs), masked, rtol=0, atol=1e-9)
    if name != "branches":  # a block that has lost both of its branches is named itself
        assert set(speedup.report.removed_blocks) == set(pruner.plan.blocks)
    assert sum(p.numel() for p in compact.parameters()) == pruner.plan.cost().params


def test_influence_is_one_minus_the_cosine_of_the_stream():
    """Of a block, of its input and output; of a branch, of the stream without and with what it adds."""
    model = trained(Transformer())
    seen = {}

    def keep(name, kind):
        def hook(_module, inputs, output):
            seen[name, kind] = (inputs[0].clone(), output.clone())

        return hook

    for name in ("blocks.1", "blocks.1.norm2", "blocks.1.mlp"):
        model.get_submodule(name).register_forward_hook(keep(name, "call"))
    run(model, TOKENS)
    whole = seen["blocks.1", "call"]
    stream, added = seen["blocks.1.norm2", "call"][0], seen["blocks.1.mlp", "call"][1]
    cosine = torch.nn.functional.cosine_similarity
    pruner = BlockPruner(model, asked(["PreNorm", "Mlp"], 0.2), dummy_input=TOKENS)
    pruner.compress()
    assert float(pruner.scores["blocks.1"]) == pytest.approx(float(1 - cosine(*whole, dim=-1).mean()))
    expected = float(1 - cosine(stream, stream + added, dim=-1).mean())
    assert float(pruner.scores["blocks.1.mlp"]) == pytest.approx(expected)


def test_a_strided_block_s_main_path_goes_last_by_influence():
    """It reads a larger picture than it adds to, so that nothing can be compared: it used to end the run."""
    from nni_plugins.training.models import resnet8

    model = resnet8((1, 8, 8), 10, width=8)
    pruner = BlockPruner(
        model, [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.1}], dummy_input=torch.rand(4, 1, 8, 8)
    )
    pruner.compress()
    assert float(pruner.scores["layer2.0.bn2"]) == 2.0
    assert "layer2.0.bn2" not in pruner.plan.blocks


@pytest.mark.parametrize("target", ["macs", "params", "latency"])
def test_costs_are_met_with_the_fewest_important_blocks(target, tmp_path, monkeypatch):
    monkeypatch.setenv("NNI_PLUGINS_CACHE", str(tmp_path))
    model = trained(ResNet(depth=3))
    pruner = BlockPruner(model, asked(["BasicBlock"], 0.3), dummy_input=IMAGE, target=target)
    pruner.compress()
    if target != "latency":
        left = getattr(pruner.plan.cost(), target) / getattr(pruner.graph.cost(), target)
        assert left <= 0.7
        for name in pruner.plan.blocks:
            fewer = [other for other in pruner.plan.blocks if other != name]
            assert getattr(pruner.graph.cost(blocks=fewer), target) > 0.7 * getattr(pruner.graph.cost(), target)
    assert 1 <= len(pruner.plan.blocks) <= 4
    pruner.unwrap_model()
    far = BlockPruner(model, asked(["BasicBlock"], 0.999), dummy_input=IMAGE, target=target, latency=pruner.latency)
    with pytest.raises(BudgetError, match=rf"sparsity 0\.999 of {target} is out of reach: without all of the") as error:
        far.compress()
    assert "\n" not in str(error.value)


class Digits(nn.Module):
    """Residual blocks on digits."""

    def __init__(self, depth=3, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(Residual(width) for _ in range(depth))
        self.fc = nn.Linear(width, 10)

    def forward(self, x):
        x = self.stem(x).relu()
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.conv(self.norm(x).relu())


HALF = asked(["Residual"], 0.34)


def test_taylor_is_the_first_order_change_of_the_loss(digits, make_evaluator):
    net = Digits()
    reference, images, labels = copy.deepcopy(net).train(), *digits
    gates = torch.ones(3, requires_grad=True)
    for index, block in enumerate(reference.blocks):
        block.conv.register_forward_hook(lambda _m, _i, out, index=index: out * gates[index])
    expected = torch.zeros(3)
    for at in range(0, 192, 64):
        loss = nn.functional.cross_entropy(reference(images[at : at + 64]), labels[at : at + 64])
        (gradient,) = torch.autograd.grad(loss, gates)
        expected += gradient**2 / 3
    pruner = BlockPruner(net, HALF, make_evaluator(net, rate=1e-12), 3, score="taylor")
    pruner.compress()
    found = torch.stack([pruner.scores[f"blocks.{index}"] for index in range(3)])
    torch.testing.assert_close(found, expected.double(), rtol=1e-3, atol=1e-12)
    assert pruner.plan.blocks == (f"blocks.{int(expected.argmin())}",)


def test_loss_is_what_the_metric_loses(digits):
    net = Digits()
    optimizer = nni.trace(torch.optim.SGD)(net.parameters(), lr=0.1)

    @torch.no_grad()
    def evaluating(model):
        model.eval()
        return -float(nn.functional.cross_entropy(model(digits[0][:200]), digits[1][:200]))

    evaluator = TorchEvaluator(None, optimizer, None, dummy_input=digits[0][:2], evaluating_func=evaluating)
    reference = copy.deepcopy(net)
    pruner = BlockPruner(net, HALF, evaluator, score="loss")
    net.train()
    pruner.compress()
    assert net.training
    whole = evaluating(reference)
    for index in range(3):
        without = copy.deepcopy(reference)
        without.blocks[index] = nn.Identity()
        assert float(pruner.scores[f"blocks.{index}"]) == pytest.approx(whole - evaluating(without), abs=1e-5)


def test_training_goes_on_from_a_checkpoint(digits, tmp_path):
    schedule = {"shape": "linear", "times": 2, "interval_steps": 3}

    def pruner(model, evaluator):
        return BlockPruner(model, asked(["Residual"], 0.67), evaluator, score="taylor", schedule=schedule)

    assert_resumes(Digits, pruner, digits, tmp_path / "state.pt", 5)


@pytest.mark.parametrize("first", ["pruner", "distiller"])
def test_it_fuses_with_a_distiller(first, digits, make_evaluator):
    from nni.compression.distillation import DynamicLayerwiseDistiller

    net, teacher = Digits(), Digits()
    evaluator = make_evaluator(net)
    config = [{"op_names": ["fc"], "link": "fc", "lambda": 0.1, "apply_method": "mse"}]
    if first == "pruner":
        pruner = BlockPruner(net, HALF, evaluator, 4, score="taylor")
        last = DynamicLayerwiseDistiller.from_compressor(pruner, config, teacher, lambda batch, model: model(batch[0]))
        last.compress(6, None)
    else:
        distiller = DynamicLayerwiseDistiller(net, config, evaluator, teacher, lambda batch, model: model(batch[0]))
        pruner = last = BlockPruner.from_compressor(distiller, HALF, 4, score="taylor")
        last.compress(max_steps=6)
    assert pruner.finished
    assert len(pruner.plan.blocks) == 1
    assert evaluator.steps == [6]
    last.unwrap_model()


def test_gradient_accumulation_and_minibatches_that_are_not_finite():
    """Two backward passes of one step are one minibatch; one that AMP skips is left out."""
    from nni_plugins.channels import ChannelGraph
    from nni_plugins.pruners.block_scores import BlockWatcher

    net = Digits()
    graph = ChannelGraph.watch(net, torch.zeros(2, 1, 8, 8))
    watcher = BlockWatcher(net, graph, [graph.block("blocks.0")], "taylor")
    for name, values in (("blocks.0", (1.0, 3.0)), ("blocks.0", (float("inf"),))):
        for value in values:
            watcher._add(name, torch.tensor(value))
        watcher.end_of_minibatch()
    assert {name: float(score) for name, score in watcher.scores().items()} == {"blocks.0": 16.0}


def test_blocks_of_an_earlier_pruner_stay_gone():
    model = trained(ResNet(depth=3))
    first = BlockPruner(model, [{"op_names": ["layer1.1"], "sparse_ratio": 0.9}], dummy_input=IMAGE)
    first.compress()
    second = BlockPruner.from_compressor(first, asked(["BasicBlock"], 0.4), dummy_input=IMAGE)
    second.compress()
    assert len(second.plan.blocks) == 2
    assert "layer1.1" in second.plan.blocks


def test_what_it_cannot_do_is_said_in_one_line(make_evaluator):
    model = trained(ResNet())
    for config, kwargs, message in (
        (asked(["Linear"]), {}, r"selects no block that can go: fc: it is no block. Blocks are: layer1"),
        ([{"op_names": ["layer2.0"], "sparse_ratio": 0.5}], {}, "selects no block that can go: layer2.0: "),
        (asked(["BasicBlock"]), {"score": "size"}, "score is 'size'"),
        (asked(["BasicBlock"]), {"target": "channels"}, "target is 'channels'"),
        (asked(["BasicBlock"]), {"score": "taylor"}, "needs an evaluator"),
        (asked(["BasicBlock"]), {"training_steps": 0}, "training_steps is 0"),
        (asked(["BasicBlock"], max_sparse_ratio=0.3), {}, "a block goes whole or not at all, so it has no bounds"),
    ):
        with pytest.raises(PruningError, match=message) as error:
            BlockPruner(model, config, dummy_input=IMAGE, **kwargs)
        assert "\n" not in str(error.value)
    net = Digits()
    pruner = BlockPruner(net, HALF, make_evaluator(net), score="loss")
    with pytest.raises(PruningError, match="the evaluator's metric is None"):
        pruner.compress()


def test_all_that_are_selected_may_go_and_an_excluded_part_keeps_its_block():
    """A sparsity of 1 was refused "since no layer is emptied"; what is excluded inside a block went with it."""
    for config, gone in (
        (asked(["BasicBlock"], 1.0), {"layer1.1", "layer1.2", "layer2.1", "layer2.2"}),
        ([{"op_names": ["layer1.1"], "sparse_ratio": 1.0}], {"layer1.1"}),
        (asked(["BasicBlock"], 1.0, exclude_op_names=["layer1.1.conv1"]), {"layer1.2", "layer2.1", "layer2.2"}),
        (
            [*asked(["BasicBlock"], 1.0), {"op_names": ["layer1.1"], "exclude": True}],
            {"layer1.2", "layer2.1", "layer2.2"},
        ),
    ):
        model = trained(ResNet(depth=3))
        pruner = BlockPruner(model, config, dummy_input=IMAGE)
        _, masks = pruner.compress()
        assert gone <= set(pruner.plan.blocks) <= gone | {"layer1.0"}
        masked = run(model, IMAGE)
        pruner.unwrap_model()
        compact = ModelSpeedup(model, IMAGE, masks).speedup_model()
        torch.testing.assert_close(run(compact, IMAGE), masked, rtol=0, atol=1e-9)


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x):
        return self.down(self.up(x).relu())


class Routed(nn.Module):
    """Each token goes to one of six experts; to the last of them, none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.router, self.experts = nn.Linear(6, 6), nn.ModuleList(Expert() for _ in range(6))
        self.head = nn.Linear(6, 3)
        with torch.no_grad():
            self.router.bias[5] = -100.0

    def forward(self, x):
        share = self.router(x).softmax(-1)
        chosen, out = share.argmax(-1), torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]) * share[rows, index, None])
        return self.head(x + out)


def test_an_expert_that_no_token_is_sent_to_goes_first():
    """It has no influence that could be seen, which ended the run."""
    model, tokens = Routed().double(), TOKENS.flatten(0, 1)
    pruner = BlockPruner(model, asked(["Expert"]), dummy_input=tokens)
    _, masks = pruner.compress()
    assert float(pruner.scores["experts.5"]) == 0
    assert "experts.5" in pruner.plan.blocks
    assert len(pruner.plan.blocks) == 3
    masked = run(model, tokens)
    pruner.unwrap_model()
    compact = ModelSpeedup(model, tokens, masks).speedup_model()
    torch.testing.assert_close(run(compact, tokens), masked, rtol=0, atol=1e-9)
