"""What people do with a model works with a compact one: train, copy, save, export, compile, wrap, cast, other inputs."""

import copy
import functools
import io
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.speedup import CompactFileError, ModelSpeedup, load_compact, save_compact
from tests.random_networks import trained_like
from tests.speedup.nets import CASES

ROOT = Path(__file__).resolve().parents[2]
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
every_case = pytest.mark.parametrize("name", CASES)
exact_cases = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.exact_only])


class Made(NamedTuple):
    """A compact model, the masked one that it must equal, and inputs."""

    compact: nn.Module
    masked: nn.Module
    masks: dict
    inputs: tuple


def built(name):
    torch.manual_seed(0)
    model = CASES[name].build()
    trained_like(model)
    return model.eval()


def half_of(model, case, inputs):
    """The plan that leaves every second unit of all that may go."""
    graph = ChannelGraph.watch(model, inputs)
    kept = {g.name: range(0, g.size, 2) for g in graph.groups if g.prunable and (g.exact or not case.exact_only)}
    return Plan(graph, kept)


@functools.cache
def _made(name):
    case, model = CASES[name], built(name)
    inputs = case.inputs()
    plan = half_of(model, case, inputs)
    masks = plan.masks(model)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for module, targets in masks.items():
            for target, mask in targets.items():
                getattr(masked.get_submodule(module), target).mul_(mask)
    speedup = ModelSpeedup(model, inputs, masks, exact_only=case.exact_only)
    compact = speedup.speedup_model()
    assert speedup.plan.counts == plan.counts  # what is masked goes, and nothing else
    assert not speedup.report.put_back
    return Made(compact, masked, masks, inputs)


def made(name):
    """A compact model of this test's own; what it was made from is made once."""
    compact, masked, masks, inputs = _made(name)
    return Made(copy.deepcopy(compact), masked, masks, inputs)


def floats(out):
    return [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def assert_same(actual, expected, tolerance=1e-5):
    actual, expected = floats(actual), floats(expected)
    assert len(actual) == len(expected) > 0
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert (a.float() - e.float()).abs().max() <= tolerance * e.float().abs().max()


def loss_of(out):
    """A mean over samples, so that it may be averaged over parts of a batch."""
    return sum(t.square().mean() for t in floats(out) if t.dim())


# -- what it is ----------------------------------------------------------------------------------------------------


@every_case
def test_it_shrank_and_equals_the_masked_model(name):
    compact, masked, _, inputs = made(name)
    count, before = (sum(p.numel() for p in m.parameters()) for m in (compact, masked))
    assert count < 0.85 * before
    if CASES[name].exact_only:
        assert_same(compact(*inputs), masked(*inputs))


def sizes_of(module):
    """What a module says of itself, beside what its tensors say: two tuples that must be equal."""
    if isinstance(module, nn.modules.conv._ConvNd):
        first, second = module.out_channels, module.in_channels // module.groups
        if module.transposed:
            first, second = module.in_channels, module.out_channels // module.groups
        assert module.in_channels % module.groups == module.out_channels % module.groups == 0
        return (first, second, *module.kernel_size), tuple(module.weight.shape)
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features), tuple(module.weight.shape)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        tensors = (module.weight, module.bias, module.running_mean, module.running_var)
        return (module.num_features,) * 4, tuple(len(t) for t in tensors)
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape, tuple(module.weight.shape)
    if isinstance(module, nn.GroupNorm):
        assert module.num_channels % module.num_groups == 0
        return (module.num_channels,), tuple(module.weight.shape)
    if isinstance(module, nn.PReLU):
        return (module.num_parameters,), tuple(module.weight.shape)
    if isinstance(module, nn.Embedding):
        return (module.num_embeddings, module.embedding_dim), tuple(module.weight.shape)
    if isinstance(module, (nn.LSTM, nn.GRU)):
        gates = 4 if isinstance(module, nn.LSTM) else 3
        said = (gates * module.hidden_size, module.input_size, gates * module.hidden_size, module.hidden_size)
        return said, (*module.weight_ih_l0.shape, *module.weight_hh_l0.shape)
    if isinstance(module, nn.MultiheadAttention):
        inner = module.num_heads * module.head_dim
        return (3 * inner, module.embed_dim, inner), (*module.in_proj_weight.shape, module.out_proj.in_features)
    assert not list(module.parameters(recurse=False)) or type(module).__name__ in ("ConvNeXtBlock", "ViT")
    return (), ()


@every_case
def test_modules_say_their_sizes(name):
    compact = made(name).compact
    checked = 0
    for path, module in compact.named_modules():
        said, true = sizes_of(module)
        assert said == true, path
        checked += bool(said)
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not isinstance(
            module, nn.modules.linear.NonDynamicallyQuantizableLinear
        ):
            assert f"{module.weight.shape[0]}" in repr(module).split(", ")[1].removeprefix("out_features=")
    assert checked >= 4


def test_attention_heads_go():
    compact = made("vit").compact
    heads = [module.num_heads for module in compact.modules() if isinstance(module, nn.MultiheadAttention)]
    assert heads == [2, 2, 2]


# -- training ------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("optimizer_first", [False, True])
def test_it_trains(name, optimizer_first):
    """An optimizer made before the speedup holds the right parameters, for they keep their identity."""
    case, inputs = CASES[name], _made(name).inputs
    model = built(name)

    def optimizer_of(model):
        return torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)

    optimizer = optimizer_of(model) if optimizer_first else None
    ModelSpeedup(model, inputs, _made(name).masks, exact_only=case.exact_only).speedup_model()
    optimizer = optimizer or optimizer_of(model)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    losses = []
    for _ in range(6):
        loss = loss_of(model.train()(*inputs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.shape == parameter.shape, key
        assert parameter.dim() < 2 or not torch.equal(parameter, before[key]), key  # a bias before a norm has no effect
        assert optimizer.state[parameter]["momentum_buffer"].shape == parameter.shape


# -- copies and files ----------------------------------------------------------------------------------------------


@every_case
def test_state_dict_goes_into_a_model_compacted_alike(name):
    compact, _, masks, inputs = made(name)
    file = io.BytesIO()
    torch.save(compact.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = built(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    ModelSpeedup(other, inputs, masks, exact_only=CASES[name].exact_only).speedup_model()
    assert not torch.equal(floats(other.eval()(*inputs))[0], floats(compact(*inputs))[0])
    assert str(other.load_state_dict(state, strict=True)) == "<All keys matched successfully>"
    assert_same(other(*inputs), compact(*inputs), 0)


def saved_whole(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_case
@pytest.mark.parametrize("copied", [copy.deepcopy, saved_whole, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_whole_and_apart(name, copied, tmp_path):
    """They compute the same, share nothing, and can be saved with their plan."""
    compact, _, _, inputs = made(name)
    other = copied(compact)
    assert_same(other(*inputs), compact(*inputs), 0)
    save_compact(other, tmp_path / "m.safetensors")
    with torch.no_grad():
        for parameter in compact.parameters():
            parameter.zero_()
    again = load_compact(tmp_path / "m.safetensors", CASES[name].build)
    assert_same(again(*inputs), other(*inputs), 0)
    assert floats(other(*inputs))[0].any()


FRESH = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"nni", "scipy", "sklearn", "matplotlib", "yaml", "click", "rich", "pandas"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import torch
from pathlib import Path
from nni_plugins.speedup import load_compact
from tests.speedup.nets import CASES
folder = Path(sys.argv[1])
with torch.no_grad():
    for name, inputs in torch.load(folder / "inputs.pt").items():
        model = load_compact(folder / f"{name}.safetensors", CASES[name].build)
        whole = torch.load(folder / f"{name}.whole", weights_only=False)
        torch.save([model(*inputs), whole(*inputs)], folder / f"{name}.out")
assert "nni" not in sys.modules
"""


def run(code, *arguments):
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, seconds=120):
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, err[-3000:]
    return out


def test_a_fresh_process_without_nni_loads_them(tmp_path):
    models = {name: made(name) for name in CASES}
    for name, one in models.items():
        save_compact(one.compact, tmp_path / f"{name}.safetensors")
        torch.save(one.compact, tmp_path / f"{name}.whole")
    torch.save({name: one.inputs for name, one in models.items()}, tmp_path / "inputs.pt")
    finish(run(FRESH, tmp_path))
    for name, one in models.items():
        for out in torch.load(tmp_path / f"{name}.out"):
            assert_same(out, one.compact(*one.inputs), 1e-6)


@every_case
def test_a_second_speedup_and_a_file_of_both(name, tmp_path):
    compact, _, _, inputs = made(name)
    case = CASES[name]
    first = sum(p.numel() for p in compact.parameters())
    expected = copy.deepcopy(compact)
    masks = half_of(compact, case, inputs).masks(compact)
    with torch.no_grad():
        for module, targets in masks.items():
            for target, mask in targets.items():
                getattr(expected.get_submodule(module), target).mul_(mask)
    ModelSpeedup(compact, inputs, masks, exact_only=case.exact_only).speedup_model()
    assert sum(p.numel() for p in compact.parameters()) < first
    if case.exact_only:
        assert_same(compact(*inputs), expected(*inputs))
    save_compact(compact, tmp_path / "m.safetensors")
    assert_same(load_compact(tmp_path / "m.safetensors", case.build)(*inputs), compact(*inputs), 0)


def test_only_the_model_itself_is_saved_not_a_wrapper_or_a_part(tmp_path):
    compact = made("residual").compact
    for other in (nn.DataParallel(compact), compact.inverted):
        with pytest.raises(CompactFileError, match=r"was not made by .*ModelSpeedup"):
            save_compact(other, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


# -- export and compilation ----------------------------------------------------------------------------------------


@every_case
def test_torch_export(name):
    compact, _, _, inputs = made(name)
    exported = torch.export.export(compact, inputs).module()
    assert_same(exported(*inputs), compact(*inputs))


@pytest.mark.skipif(TORCH < (2, 6), reason="takes minutes with an older torch")
@every_case
def test_torch_export_with_any_batch(name):
    compact, _, _, inputs = made(name)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(compact, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs)).module()
    for size in (1, 5):
        other = CASES[name].inputs(size)
        assert_same(exported(*other), compact(*other))


@pytest.mark.parametrize("name", [name for name in CASES if name != "lstm"])  # torch compiles around RNNs
def test_torch_compile_traces_it_whole(name):
    torch._dynamo.reset()
    compact, _, _, inputs = made(name)
    compiled = torch.compile(compact, backend="aot_eager", fullgraph=True)
    assert_same(compiled(*inputs), compact(*inputs))
    loss_of(compiled(*inputs)).backward()
    assert all(parameter.grad is not None for parameter in compact.parameters())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@every_case
def test_torch_compile_with_inductor(name):
    torch._dynamo.reset()
    compact, _, _, inputs = made(name)
    with torch.no_grad():
        assert_same(torch.compile(compact)(*inputs), compact(*inputs))


def run_onnx(path, inputs):
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.as_tensor(out) for out in session.run(None, given)]


@pytest.mark.parametrize(
    "name", [n if n in ("vit", "pair") else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
@pytest.mark.skipif(TORCH < (2, 6), reason="torch's exporter by dynamo is of 2.6")
def test_onnx(name, tmp_path):
    pytest.importorskip("onnxscript")
    compact, _, _, inputs = made(name)
    torch.onnx.export(compact, inputs, tmp_path / "m.onnx", dynamo=True, verbose=False)
    assert_same(run_onnx(tmp_path / "m.onnx", inputs), compact(*inputs))


@pytest.mark.parametrize("name", ["residual", "convnext", "convnext_inexact", "lstm", "unet"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_onnx_by_the_older_exporter(name, tmp_path):
    pytest.importorskip("onnx")
    compact, _, _, inputs = made(name)
    older = {"dynamo": False} if TORCH >= (2, 5) else {}
    torch.onnx.export(compact, inputs, str(tmp_path / "m.onnx"), **older)
    assert_same(run_onnx(tmp_path / "m.onnx", inputs), compact(*inputs))


@pytest.mark.parametrize("name", [name for name in CASES if name != "pair"])  # no dictionary of mixed kinds in a trace
@pytest.mark.filterwarnings("ignore")
def test_jit_trace(name, tmp_path):
    compact, _, _, inputs = made(name)
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(compact, inputs), tmp_path / "m.pt")
    assert_same(torch.jit.load(tmp_path / "m.pt")(*inputs), compact(*inputs))


@pytest.mark.parametrize("name", [name for name in CASES if name != "vit"])  # fewer heads need a forward in Python
@pytest.mark.filterwarnings("ignore")
def test_jit_script(name):
    compact, _, _, inputs = made(name)
    assert_same(torch.jit.script(compact)(*inputs), compact(*inputs))


FX = "torch.fx takes nn.MultiheadAttention whole, and goes into the class that stands for it with fewer heads"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.xfail(strict=True, reason=FX)) if n == "vit" else n for n in CASES]
)
def test_fx_trace(name):
    compact = made(name).compact
    traced = torch.fx.symbolic_trace(compact)
    other = CASES[name].inputs(3)
    assert_same(traced(*other), compact(*other))


# -- wrappers ------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("wrapper", [nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_wrappers(name, wrapper):
    compact, _, _, inputs = made(name)
    assert_same(wrapper(compact)(*inputs), compact(*inputs), 0)


@every_case
def test_functional_calls_and_gradients(name):
    compact, _, _, inputs = made(name)
    parameters = {key: value.detach() for key, value in compact.named_parameters()}
    gradients = torch.func.grad(lambda p: loss_of(torch.func.functional_call(compact, p, inputs)))(parameters)
    loss_of(compact(*inputs)).backward()
    for key, parameter in compact.named_parameters():
        assert torch.allclose(gradients[key], parameter.grad, atol=1e-6), key


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation():
    compact, _, _, inputs = made("lstm")
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(compact), {nn.Linear, nn.LSTM, nn.GRU})
    assert_same(quantised(*inputs), compact(*inputs), 0.05)


WORKER = """
import os, sys, torch
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
torch.set_num_threads(1)
from pathlib import Path
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from nni_plugins.speedup import load_compact
from tests.speedup.nets import CASES
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
for name, inputs in torch.load(folder / "inputs.pt").items():
    model = load_compact(folder / f"{name}.safetensors", CASES[name].build).eval()
    if rank == 1:
        with torch.no_grad():
            model.state_dict()[next(iter(model.state_dict()))].zero_()  # the wrapper sends rank 0's
    wrapped = DistributedDataParallel(model)
    half = len(inputs[0]) // 2
    out = wrapped(*(t[rank * half:(rank + 1) * half] for t in inputs))
    sum(t.square().mean() for t in tree_leaves(out) if t.dim()).backward()
    if rank == 0:
        torch.save({key: p.grad for key, p in model.named_parameters()}, folder / f"{name}.grad")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available() or sys.platform != "linux", reason="needs gloo on loopback")
def test_two_processes_train_as_one(tmp_path):
    """DistributedDataParallel: gradients of two half batches are those of the whole."""
    models = {name: made(name) for name in CASES}
    inputs = {name: CASES[name].inputs(4) for name in CASES}
    for name, one in models.items():
        save_compact(one.compact, tmp_path / f"{name}.safetensors")
    torch.save(inputs, tmp_path / "inputs.pt")
    for process in [run(WORKER, tmp_path, rank) for rank in (0, 1)]:
        finish(process)
    for name, one in models.items():
        loss_of(one.compact(*inputs[name])).backward()
        gradients = torch.load(tmp_path / f"{name}.grad")
        for key, parameter in one.compact.named_parameters():
            assert torch.allclose(gradients[key], parameter.grad, atol=1e-6), (name, key)


# -- precision, layout, other inputs -------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 5e-2), (torch.float64, 1e-5)])
def test_other_precision(name, kind, tolerance):
    compact, masked, _, inputs = made(name)
    cast = [t.to(kind) if t.is_floating_point() else t for t in inputs]
    try:
        copy.deepcopy(masked).to(kind)(*cast)
    except RuntimeError:
        pytest.skip("this torch does not run the dense model so")
    expected = compact(*inputs)
    out = compact.to(kind)(*cast)
    assert {t.dtype for t in floats(out)} == {kind}
    assert_same(out, expected, tolerance)


@pytest.mark.parametrize("name", [name for name in CASES if name != "lstm"])  # torch has no LSTM for it everywhere
def test_autocast(name):
    compact, _, _, inputs = made(name)
    with torch.autocast("cpu", torch.bfloat16):
        out = compact(*inputs)
        loss_of(out).backward()
    assert_same(out, compact(*inputs), 5e-2)
    assert all(parameter.grad.dtype == torch.float32 for parameter in compact.parameters())


@every_case
def test_channels_last(name):
    compact, _, _, inputs = made(name)
    expected = compact(*inputs)
    compact.to(memory_format=torch.channels_last)
    out = compact(*(t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in inputs))
    assert_same(out, expected)


@exact_cases
def test_other_batch_and_other_image_size(name):
    """Held against the masked model, not only run."""
    case = CASES[name]
    compact, masked, _, _ = made(name)
    for batch, larger in [(1, False), (7, False), *([(3, True)] if case.larger else [])]:
        inputs = case.inputs(batch, larger)
        assert_same(compact(*inputs), masked(*inputs))


@exact_cases
def test_made_on_another_batch_and_size_it_is_the_same(name):
    """What was watched on one sample fits any number."""
    case = CASES[name]
    made_on_two, _, masks, inputs = made(name)
    other = ModelSpeedup(built(name), case.inputs(1, case.larger), masks).speedup_model()
    assert_same(other(*inputs), made_on_two(*inputs))


# -- the record ----------------------------------------------------------------------------------------------------


def test_the_record_is_small_plain_and_out_of_the_way():
    """It rides on the model for save_compact, and must not be seen by what walks over a model's tensors."""
    from nni_plugins.speedup.record import record_of

    compact, masked, _, _ = made("residual")
    assert compact.state_dict().keys() == masked.state_dict().keys()
    assert {n for n, _ in compact.named_buffers()} == {n for n, _ in masked.named_buffers()}
    assert [n for n, _ in compact.named_modules()] == [n for n, _ in masked.named_modules()]
    record = record_of(compact)
    indices = [t for dims in record["slices"].values() for t in dims.values()]
    assert all(not t.requires_grad and t.dtype == torch.int64 for t in indices)
    assert json.dumps([record["shapes"], record["sizes"], record["added"]])
    assert all(t.device.type == "cpu" for t in indices)
    assert copy.deepcopy(compact).to("meta")(torch.zeros(2, 3, 8, 8, device="meta")).shape == (2, 5)


def test_no_hook_or_wrapper_of_ours_is_left_on_it():
    for name in CASES:
        for module in made(name).compact.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert "forward" not in module.__dict__
