"""Evaluators whose trainers make the optimizers themselves: Lightning's and transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nni
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def lightning(digits: tuple[Tensor, Tensor], folder: Path, schedule: bool = False, **options: Any) -> tuple[Any, Any]:
    """A small Lightning module on digits (56 steps an epoch), and its evaluator."""
    pl = pytest.importorskip("pytorch_lightning")
    from nni.compression import LightningEvaluator

    class Digits(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv1, self.bn = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            self.conv2, self.fc = nn.Conv2d(8, 16, 3), nn.Linear(16, 10)
            self.rates: list[float] = []

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv2(self.bn(self.conv1(x)).relu()).relu().mean((2, 3)))

        def training_step(self, batch: Any, _index: int) -> Tensor:
            self.rates.append(self.optimizers().param_groups[0]["lr"])
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = nni.trace(torch.optim.SGD)(self.parameters(), lr=0.05, momentum=0.9)
            if not schedule:
                return optimizer
            scheduler = nni.trace(torch.optim.lr_scheduler.ExponentialLR)(optimizer, 0.9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(TensorDataset(*digits), batch_size=32)

    trainer = nni.trace(pl.Trainer)(
        **{"max_epochs": 1, **options}, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        accelerator="cpu", enable_model_summary=False, default_root_dir=str(folder),
    )  # fmt: skip
    return Digits(), LightningEvaluator(trainer, nni.trace(Data)())


def transformers(folder: Path, max_steps: int = 24) -> tuple[Any, Any]:
    """A tiny BERT, and its evaluator over a Trainer that makes its own optimizer and schedule."""
    library = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from nni.compression import TransformersEvaluator

    torch.manual_seed(0)
    config = library.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=2,
        max_position_embeddings=16,
    )  # fmt: skip
    model = library.BertForSequenceClassification(config)
    arguments = library.TrainingArguments(
        str(folder), max_steps=max_steps, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
        learning_rate=1e-2,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    data = [
        {"input_ids": torch.randint(0, 50, (8,), generator=generator), "labels": torch.tensor(i % 2)} for i in range(32)
    ]
    trainer = nni.trace(library.trainer.Trainer)(model=model, args=arguments, train_dataset=data)
    return model, TransformersEvaluator(trainer)
