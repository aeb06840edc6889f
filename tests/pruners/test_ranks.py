"""Two processes that see different data: pruners of groups and of blocks choose alike."""

import torch

from .two_ranks import needs_gloo, on_two_ranks

RANK = """
from nni_plugins.pruners import BlockPruner, TaylorPruner

os.environ["NNI_PLUGINS_CACHE"] = f"{folder}/cache{rank}"  # each measures its latency by itself

class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return x + self.down(self.up(x).relu())

data = torch.randn(40, 8, 16, generator=torch.Generator().manual_seed(10 + rank))

def train(model, optimizer, training_step, scheduler=None, max_steps=None, max_epochs=None):
    for step in range(max_steps):
        optimizer.zero_grad()
        training_step(data[step], model).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
        optimizer.step()

def training_step(batch, model):
    return (model(batch) - batch[:, :4] * batch[:, 4:8]).square().mean()

results = {}
schedule = {"shape": "linear", "times": 2, "interval_steps": 4}
for method in ("taylor", "latency", "influence"):
    torch.manual_seed(0)
    model = nn.Sequential(*(Residual() for _ in range(5)), nn.Linear(16, 4))
    evaluator = TorchEvaluator(train, nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01), training_step,
                               dummy_input=data[0])
    if method == "taylor":
        config = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
        pruner = TaylorPruner(model, config, evaluator, 4, schedule=schedule, scope="global")
    elif method == "latency":
        config = [{"op_types": ["Linear"], "sparse_ratio": 0.2}]
        pruner = TaylorPruner(model, config, evaluator, 4, scope="global", target="latency", tolerance=1.0)
    else:
        config = [{"op_types": ["Residual"], "sparse_ratio": 0.4}]
        pruner = BlockPruner(model, config, evaluator, 4, schedule=schedule, score=method)
    _, masks = pruner.compress()
    results[method] = ({f"{n}.{k}": m for n, t in masks.items() for k, m in t.items()}, pruner.scores)
result = results
"""


@needs_gloo
def test_two_processes_choose_alike(tmp_path):
    ours, theirs = on_two_ranks(RANK, tmp_path)
    assert list(ours) == ["taylor", "latency", "influence"]
    for method, (masks, scores) in ours.items():
        other, others = theirs[method]
        assert any((mask == 0).any() for mask in masks.values())
        assert all(torch.equal(masks[name], other[name]) for name in masks)
        assert all(torch.equal(scores[name], others[name]) for name in scores)
