"""Neurons, heads and hidden units by ``op_types``, end to end: budget, exact masks, a smaller equal model."""

import copy

import nni
import pytest
import torch
from nni.compression import TorchEvaluator
from torch import nn

from nni_plugins.pruners import MagnitudePruner, TaylorPruner
from nni_plugins.speedup import ModelSpeedup
from tests.block_nets import Transformer

IMAGE = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(1))


class Heads(nn.Module):
    """torch's own attention, with a residual, and an MLP."""

    def __init__(self, width=24, heads=6, kv=None):
        super().__init__()
        self.embed = nn.Linear(6, width)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = self.embed(x)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(self.up(x).relu())
        return self.head(x.mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.rnn = kind(6, 16, num_layers=2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def mlp():
    return nn.Sequential(
        nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 4)
    )


def bert():
    library = pytest.importorskip("transformers")
    return library.BertForSequenceClassification(
        library.BertConfig(
            vocab_size=50,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=6,
            intermediate_size=32,
            num_labels=4,
            max_position_embeddings=16,
        )
    )


IDS = {"input_ids": torch.arange(28).view(4, 7)}
# make, input, config_list, and for each selected module how many units (neurons, heads, hidden units) it has
CASES = {
    "neurons": (mlp, IMAGE, [{"op_types": ["Linear"], "sparse_ratio": 0.5}], {"0": 32, "2": 24}),
    "heads": (Heads, TOKENS, [{"op_types": ["MultiheadAttention"], "sparse_ratio": 0.5}], {"attention": 6}),
    "mlp of a block": (Heads, TOKENS, [{"op_names": ["up"], "sparse_ratio": 0.5}], {"up": 48}),
    "lstm": (Recurrent, TOKENS, [{"op_types": ["LSTM"], "sparse_ratio": 0.5}], {"rnn": 16}),
    "gru": (lambda: Recurrent(nn.GRU), TOKENS, [{"op_types": ["GRU"], "sparse_ratio": 0.5}], {"rnn": 16}),
    "packed qkv": (Transformer, TOKENS, [{"op_names_re": [r".*attn\.qkv"], "sparse_ratio": 0.5}], None),
    "bert heads": (bert, IDS, [{"op_names_re": [r".*self\.(query|key|value)"], "sparse_ratio": 0.5}], None),
    "bert neurons": (bert, IDS, [{"op_names_re": [r".*intermediate\.dense"], "sparse_ratio": 0.5}], None),
}


def run(model, inputs):
    with torch.no_grad():
        out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return getattr(out, "logits", out)


def evaluator_of(model, inputs):
    def train(model, optimizer, training_step, scheduler=None, max_steps=None, max_epochs=None):
        for _ in range(max_steps):
            optimizer.zero_grad()
            training_step(inputs, model).backward()
            optimizer.step()

    def training_step(batch, model):
        out = model(**batch) if isinstance(batch, dict) else model(batch)
        return nn.functional.cross_entropy(getattr(out, "logits", out), torch.arange(4))

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=1e-3)
    return TorchEvaluator(train, optimizer, training_step, dummy_input=inputs)


@pytest.mark.parametrize("method", ["magnitude", "taylor"])
@pytest.mark.parametrize("name", CASES)
def test_units_go_by_type_and_the_compact_model_equals_the_masked_one(name, method):
    make, inputs, config, units = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    if method == "magnitude":
        pruner = MagnitudePruner(model, config, dummy_input=inputs)
    else:
        pruner = TaylorPruner(model, config, evaluator_of(model, inputs), 3)
    before = {group.name: group.size for group in pruner.groups}
    if units is not None:
        found = dict.fromkeys(units, 0)
        for claim in pruner.resolved.claims:
            found[claim.module] += claim.group.size
        assert found == units
    _, masks = pruner.compress()
    kept = {name: len(pruner.plan.kept[name]) for name in before}
    assert kept == {name: size // 2 for name, size in before.items()}
    model.eval()
    masked = run(model, inputs)
    pruner.unwrap_model()
    speedup = ModelSpeedup(model, inputs, masks)
    compact = speedup.speedup_model()
    torch.testing.assert_close(run(compact, inputs), masked, rtol=0, atol=2e-5)
    assert sum(p.numel() for p in compact.parameters()) == pruner.plan.cost().params < pruner.graph.cost().params


def test_least_important_heads_go():
    """A head whose output projection is small goes first, and whole."""
    torch.manual_seed(0)
    model = Heads().eval()
    with torch.no_grad():
        for head in (1, 4):
            model.attention.out_proj.weight[:, 4 * head : 4 * head + 4] *= 1e-3
            model.attention.in_proj_weight[4 * head : 4 * head + 4] *= 0.5
            for part in (0, 1, 2):
                model.attention.in_proj_weight[24 * part + 4 * head : 24 * part + 4 * head + 4] *= 0.5
    config = [{"op_types": ["MultiheadAttention"], "sparse_ratio": 1 / 3}]
    pruner = MagnitudePruner(copy.deepcopy(model), config, dummy_input=TOKENS)
    _, masks = pruner.compress()
    assert [units.tolist() for units in pruner.plan.kept.values()] == [[0, 2, 3, 5]]
    columns = masks["attention.out_proj"]["weight"].any(0).view(6, 4)
    assert columns.all(1).tolist() == [True, False, True, True, False, True]


def test_attention_that_lost_heads_is_selected_by_its_type_again(tmp_path):
    """A forward of flexible width has taken the place of its own."""
    torch.manual_seed(0)
    model = Heads().eval()
    config = [{"op_types": ["MultiheadAttention"], "sparse_ratio": 0.5}]
    for left in (3, 2):  # of 6, and of 3: the nearer of the two that keeps more
        pruner = MagnitudePruner(model, config, dummy_input=TOKENS)
        _, masks = pruner.compress()
        pruner.unwrap_model()
        ModelSpeedup(model, TOKENS, masks).speedup_model()
        assert model.attention.num_heads == left
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(again(TOKENS), model(TOKENS))
