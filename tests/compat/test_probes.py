"""The probes of the patches that lie between NNI and a framework, or in a trace: with and without the defect."""

import contextlib
import importlib
import inspect
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from nni.common.concrete_trace_utils import concrete_tracer
from nni.compression.utils import evaluator

from nni_plugins.compat.defects import (
    function_apply,
    lightning_steps,
    nas_onnx,
    tracing_imports,
    transformers_callback,
    transformers_loss,
    transformers_optimizer,
)

EVALUATORS = (evaluator.LightningEvaluator, evaluator.TransformersEvaluator)


def ours(method):
    return method.__globals__["__name__"].startswith("nni_plugins.")


@pytest.fixture
def stock(monkeypatch):
    """NNI's own methods, without what the patches made of them."""
    for kind in (*EVALUATORS, concrete_tracer.ConcreteTracer):
        for name, method in list(vars(kind).items()):
            if inspect.isfunction(method) and ours(method) and name != "__init__":
                monkeypatch.setattr(kind, name, inspect.unwrap(method, stop=lambda inner: not ours(inner)))


def fit_loop(setter):
    def get(self):
        return 1

    loop = type("_FitLoop", (), {"max_steps": property(get, (lambda self, value: None) if setter else None)})
    return SimpleNamespace(_FitLoop=loop)


@pytest.mark.parametrize("setter", [True, False])
def test_lightning_max_steps_is_a_matter_of_the_setter(stock, monkeypatch, setter):
    monkeypatch.setitem(sys.modules, lightning_steps.LOOPS, fit_loop(setter))
    assert lightning_steps.PATCH.defect(evaluator) is not setter


@pytest.fixture
def lightning():
    return pytest.importorskip("pytorch_lightning")


def test_lightning_of_today_is_seen(lightning, stock):  # in this order: its import is when the patch is applied
    loop = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).fit_loop
    try:
        loop.max_steps = 3
        fails = False
    except AttributeError:
        fails = True
    assert lightning_steps.PATCH.defect(evaluator) is fails


TRAINER = """
class Trainer:
    def create_optimizer(self):
        return {call}

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        return dict, {{}}

    def compute_loss(self, model, inputs, return_outputs=False{loss}):
        return 0
"""


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """Make a trainer of some version of transformers."""

    def make(call="Trainer.get_optimizer_cls_and_kwargs(self.args)", loss=""):
        (tmp_path / "some_trainer.py").write_text(TRAINER.format(call=call, loss=loss))
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "some_trainer", raising=False)
        monkeypatch.setitem(sys.modules, "transformers.trainer", importlib.import_module("some_trainer"))

    yield make
    sys.modules.pop("some_trainer", None)


@pytest.mark.parametrize(
    ("call", "defect"),
    [
        ("Trainer.get_optimizer_cls_and_kwargs(self.args)", False),  # transformers 4.33
        ("Trainer.get_optimizer_cls_and_kwargs(self.args, self.model)", True),
        ("self.get_optimizer_cls_and_kwargs(self.args)", True),
        ("self.get_optimizer_cls_and_kwargs(self.args, self.model)", True),  # transformers 5
        ("None", False),
    ],
)
def test_transformers_optimizer_is_a_matter_of_the_call(stock, trainer, call, defect):
    trainer(call=call)
    assert transformers_optimizer.PATCH.defect(evaluator) is defect


@pytest.mark.parametrize(("loss", "defect"), [("", False), (", num_items_in_batch=None", True)])
def test_transformers_loss_is_a_matter_of_the_arguments(stock, trainer, loss, defect):
    trainer(loss=loss)
    assert transformers_loss.PATCH.defect(evaluator) is defect


@pytest.mark.parametrize("deepspeed", [{}, {"deepspeed": None}])
def test_transformers_callback_is_a_matter_of_what_runs(stock, deepspeed):
    before = dict(vars(evaluator.PatchCallback))
    assert transformers_callback.PATCH.defect(evaluator)
    assert dict(vars(evaluator.PatchCallback)) == before
    transformers_callback.PATCH.mend(evaluator)
    assert not transformers_callback.PATCH.defect(evaluator)
    assert sorted(transformers_callback._tasks_run(evaluator, **deepspeed)) == ["first", "second"]


def test_mended_evaluators_have_no_defect(stock, monkeypatch, trainer):
    trainer("self.get_optimizer_cls_and_kwargs(self.args, self.model)", ", num_items_in_batch=None")
    monkeypatch.setitem(sys.modules, lightning_steps.LOOPS, fit_loop(setter=False))
    for part in (lightning_steps, transformers_optimizer, transformers_loss, transformers_callback):
        assert part.PATCH.defect(evaluator), part
        part.PATCH.mend(evaluator)
        assert not part.PATCH.defect(evaluator), part


class Doubled(torch.autograd.Function):
    """A function that torch.func can transform."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def test_tracer_probes_see_stock_and_not_the_mended_one(stock):
    state, modules = torch.get_rng_state(), set(sys.modules)
    for part in (function_apply, tracing_imports):
        assert part.PATCH.defect(concrete_tracer), part
        part.PATCH.mend(concrete_tracer)
        assert not part.PATCH.defect(concrete_tracer), part
    assert "apply" in vars(torch.autograd.Function)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(sys.modules) == modules


def test_custom_functions_can_be_transformed_after_a_trace():
    concrete_tracer.concrete_trace(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    assert torch.func.vmap(Doubled.apply)(torch.arange(3.0)).tolist() == [0, 2, 4]
    assert torch.func.grad(Doubled.apply)(torch.tensor(1.0)).item() == 2


def supervised(error):
    """NNI's module as it is, or as one that survives the given error."""

    class Supervised:
        def validation_step(self, batch, index):
            with contextlib.suppress(error):
                self.to_onnx(self.export_onnx)

    module = ModuleType("lightning")
    module.SupervisedLearningModule = Supervised
    return module


@pytest.mark.parametrize(
    ("error", "found", "defect"),
    [(RuntimeError, False, True), (RuntimeError, True, False), ((RuntimeError, ImportError), False, False)],
)
def test_nas_onnx_is_a_matter_of_the_packages_and_of_what_is_caught(monkeypatch, error, found, defect):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found or None)
    assert nas_onnx.PATCH.defect(supervised(error)) is defect


WITHOUT_ONNX = """
import importlib, sys, warnings
from pathlib import Path

for name in ("onnx", "onnxscript"):
    sys.modules[name] = None  # before anything has seen them
import torch
import pytorch_lightning as pl
from nni_plugins.compat.defects import nas_onnx

nas = importlib.import_module("nni.nas.evaluator.pytorch.lightning")
assert nas_onnx.PATCH.state == "applied", nas_onnx.PATCH.state


def classify():
    torch.manual_seed(0)
    module = nas.ClassificationModule(num_classes=2, export_onnx=Path(sys.argv[1]) / "model.onnx")
    module.set_model(torch.nn.Linear(3, 2))
    rows = torch.utils.data.TensorDataset(torch.randn(6, 3), torch.arange(6) % 2)
    batches = torch.utils.data.DataLoader(rows, batch_size=2)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=2, enable_checkpointing=False, **quiet)
    trainer.fit(module, batches, batches)
    return trainer.global_step


with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    assert classify() == 6
assert any("ONNX conversion failed" in str(one.message) and "onnx" in str(one.message) for one in seen), seen
del nas.SupervisedLearningModule.to_onnx  # the patch
assert nas_onnx.PATCH.defect(nas)
try:
    classify()
except ModuleNotFoundError as error:
    print("without the patch:", error)
"""


def test_training_goes_on_without_onnx(lightning, tmp_path):
    script = tmp_path / "classify.py"
    script.write_text(WITHOUT_ONNX)
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert "without the patch: " in done.stdout
