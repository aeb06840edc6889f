"""The evaluators of NNI other than TorchEvaluator drive the pruners too."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nni_plugins.pruners import TaylorPruner


@pytest.mark.parametrize(("variant", "order"), [("weight", 1), ("gate", 2), ("activation", 1)])
def test_lightning_evaluator_trains_and_gives_the_dummy_input(variant, order, digits, tmp_path):
    pl = pytest.importorskip("pytorch_lightning")
    import nni
    from nni.compression import LightningEvaluator

    class Digits(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv1, self.bn = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            self.conv2, self.fc = nn.Conv2d(8, 16, 3), nn.Linear(16, 10)

        def forward(self, x):
            return self.fc(self.conv2(self.bn(self.conv1(x)).relu()).relu().mean((2, 3)))

        def training_step(self, batch, _index):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return nni.trace(torch.optim.SGD)(self.parameters(), lr=0.01)

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(TensorDataset(*digits), batch_size=64)

    trainer = nni.trace(pl.Trainer)(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, default_root_dir=str(tmp_path),
    )  # fmt: skip
    evaluator = LightningEvaluator(trainer, nni.trace(Data)())
    model = Digits()
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    pruner = TaylorPruner(model, config, evaluator, training_steps=5, variant=variant, order=order)
    pruner.compress()
    assert {name: len(units) for name, units in pruner.plan.kept.items()} == {"conv1": 4, "conv2": 8}
    assert all(score.std() > 0 for score in pruner.scores.values())
