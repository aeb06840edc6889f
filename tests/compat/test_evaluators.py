"""NNI's Lightning and transformers evaluators with today's libraries: every compressor trains through them."""

import nni
import pytest
import torch
from nni.compression import LightningEvaluator, TransformersEvaluator
from torch.nn import functional as F

from tests.compat.everything import results
from tests.compat.nets import make_data, make_net


@pytest.fixture
def lightning():
    return pytest.importorskip("pytorch_lightning")


def make_module(pl, optimizers):
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, index):
            return F.cross_entropy(self(batch[0]), batch[1])

        def test_step(self, batch, index):
            self.log("default", F.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self):
            optimizer = nni.trace(torch.optim.SGD)(self.parameters(), lr=0.01)
            if optimizers == "one":
                return optimizer
            scheduler = nni.trace(torch.optim.lr_scheduler.StepLR)(optimizer, 1)
            if optimizers == "lists":
                return [optimizer], [scheduler]
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler}}

    return Module()


def make_evaluator(pl, **options):
    batches = make_data()

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(batches, batch_size=None)

        test_dataloader = train_dataloader

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = nni.trace(pl.Trainer)(accelerator="cpu", enable_checkpointing=False, **quiet, **options)
    return LightningEvaluator(trainer, nni.trace(Data)())


def steps_taken(module, evaluator, **limits):
    evaluator._init_optimizer_helpers(module)
    evaluator.bind_model(module)
    steps = []
    evaluator.patch_optimizer_step([], [lambda: steps.append(1)])
    evaluator.train(**limits)
    evaluator.unbind_model()
    return len(steps)


@pytest.mark.parametrize("optimizers", ["one", "lists", "dictionary"])
def test_lightning_trains_for_a_number_of_steps(lightning, optimizers):
    module, evaluator = make_module(lightning, optimizers), make_evaluator(lightning, max_epochs=50)
    assert steps_taken(module, evaluator, max_steps=13) == 13


def test_lightning_trains_for_a_number_of_epochs(lightning):
    module, evaluator = make_module(lightning, "one"), make_evaluator(lightning, max_epochs=50)
    assert steps_taken(module, evaluator, max_epochs=3) == 30


def test_lightning_evaluates(lightning):
    module, evaluator = make_module(lightning, "one"), make_evaluator(lightning, max_epochs=1)
    evaluator._init_optimizer_helpers(module)
    evaluator.bind_model(module)
    metric, _ = evaluator.evaluate()
    with torch.no_grad():
        expected = torch.stack([F.cross_entropy(module.eval()(x), y) for x, y in make_data()]).mean()
    assert metric == pytest.approx(expected.item(), rel=1e-5)


def test_every_compressor_trains_with_lightning(lightning):
    found = results(
        make=lambda: make_module(lightning, "one"), evaluate=lambda m: make_evaluator(lightning, max_epochs=1)
    )
    assert len(found) == 17
    assert {name: result for name, result in found.items() if ": " in result} == {}


@pytest.fixture
def bert(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=32, num_labels=2, max_position_embeddings=16)
    model = transformers.BertForSequenceClassification(config)
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=12, report_to=[], use_cpu=True, save_strategy="no"
    )
    data = [{"input_ids": torch.randint(0, 50, (8,)), "labels": torch.tensor(i % 2)} for i in range(32)]
    trainer = nni.trace(transformers.trainer.Trainer)(model=model, args=arguments, train_dataset=data)
    return model, TransformersEvaluator(trainer)


def test_transformers_trains_with_the_loss_and_two_tasks_hooked(bert):
    model, evaluator = bert
    evaluator._init_optimizer_helpers(model)
    evaluator.bind_model(model)
    losses, first, second = [], [], []
    evaluator.patch_loss(lambda loss, batch: losses.append(float(loss)) or loss)
    evaluator.patch_optimizer_step([lambda: first.append(1)], [])
    evaluator.patch_optimizer_step([], [lambda: second.append(1)])
    evaluator.train(max_steps=5)
    assert (len(losses), len(first), len(second)) == (5, 5, 5)
    evaluator.unbind_model()


def test_transformers_with_a_pruner(bert):
    from nni.compression.pruning import TaylorPruner

    model, evaluator = bert
    config = [{"op_names_re": [r".*(query|intermediate\.dense)"], "sparse_ratio": 0.5}]
    _, masks = TaylorPruner(model, config, evaluator, training_steps=3).compress()
    assert all(0.4 <= mask["weight"].mean() <= 0.6 for mask in masks.values())
