"""Our shapes against torch's own meta kernels, and the same refusals."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from nni_plugins.channels.shapes import broadcast, result_without_data

META = {"device": "meta"}


def conv_cases():
    for dims, groups, stride, padding, transposed in itertools.product(
        (1, 2, 3), (1, 2, 4), (1, 2), (0, 1), (False, True)
    ):
        x = torch.empty(2, 4, *[7] * dims, **META)
        weight = torch.empty(*((4, 6 // 2) if transposed else (8, 4 // groups)), *[3] * dims, **META)
        extra = [stride - 1] * dims if transposed else [0] * dims
        yield x, weight, None, [stride] * dims, [padding] * dims, [1] * dims, transposed, extra, groups


@pytest.mark.parametrize("case", conv_cases())
def test_convolution(case):
    assert result_without_data("aten.convolution", case, {}).shape == torch.ops.aten.convolution(*case).shape


A, B, C = (torch.empty(*s, **META) for s in ((2, 3, 4, 5), (3, 1, 5), (1, 3, 1, 1)))
CASES = [
    ("relu", (A,)),
    ("clamp", (A, 0.0)),
    ("gelu", (A,)),
    ("add", (A, B)),
    ("mul", (B, A)),
    ("sub", (A, C)),
    ("div", (A, 2.0)),
    ("add_", (torch.empty(2, 3, **META), torch.empty(3, **META))),
    ("mm", (torch.empty(2, 3, **META), torch.empty(3, 4, **META))),
    ("addmm", (torch.empty(4, **META), torch.empty(2, 3, **META), torch.empty(3, 4, **META))),
    ("bmm", (torch.empty(5, 2, 3, **META), torch.empty(5, 3, 4, **META))),
    ("mean", (A, [2, -1], True)),
    ("mean", (A, [1])),
    ("sum", (A, [0], True)),
    ("amax", (A, [1], False)),
    ("cat", ([A, A, A], 1)),
    ("cat", ([A, torch.empty(2, 3, 4, 1, **META)], -1)),
    ("clone", (A.permute(0, 2, 3, 1),)),
    ("native_layer_norm", (A, [4, 5], None, None, 1e-5)),
    ("native_layer_norm", (A, [5], torch.empty(5, **META), torch.empty(5, **META), 1e-5)),
    ("_softmax", (A, 1, False)),
    ("_log_softmax", (A, -1, False)),
    ("_safe_softmax", (A, -1)),
    ("tril", (A,)),
    ("triu", (A, 1)),
    ("roll", (A, [1, 2], [0, 3])),
    ("flip", (A, [1])),
    ("pow", (A, 2)),
]


@pytest.mark.parametrize("x", [A, A[..., ::2], A.permute(3, 0, 2, 1), A.transpose(1, 3)[:, ::2], A[:, :1].expand_as(A)])
def test_layouts_are_those_of_torch(x):
    """Every second of a row is no longer so far apart in the result, and views that torch allows are allowed."""
    for name, args in [("relu", (x,)), ("mul", (x, 2.0)), ("mul", (x, x))]:
        assert result_without_data(f"aten.{name}", args, {}).stride() == getattr(torch.ops.aten, name)(*args).stride()


@pytest.mark.parametrize(("name", "args"), CASES)
def test_others(name, args):
    ours = result_without_data(f"aten.{name}", args, {})
    if not hasattr(torch.ops.aten, name):
        pytest.skip("this torch has no such operator")
    theirs = getattr(torch.ops.aten, name)(*args)
    several = isinstance(theirs, tuple)
    for our, their in zip(ours if several else [ours], theirs if several else [theirs], strict=True):
        assert our.shape == their.shape
        assert our.dtype == their.dtype


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("convolution", (A, torch.empty(8, 4, 3, 3, **META), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)),
        ("convolution", (A, torch.empty(8, 3, 9, 9, **META), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)),
        ("convolution", (A, torch.empty(8, 3, 1, 1, **META), torch.empty(7, **META), [1], [0], [1], False, [0], 1)),
        ("native_batch_norm", (A, torch.empty(4, **META), None, None, None, False, 0.1, 1e-5)),
        ("add", (A, torch.empty(2, **META))),
        ("add_", (torch.empty(3, **META), torch.empty(2, 3, **META))),
        ("mm", (torch.empty(2, 3, **META), torch.empty(4, 3, **META))),
        ("addmm", (torch.empty(3, **META), torch.empty(2, 3, **META), torch.empty(3, 4, **META))),
        ("bmm", (torch.empty(5, 2, 3, **META), torch.empty(4, 3, 4, **META))),
        ("cat", ([A, B.expand(2, 3, 9, 5)], 1)),
    ],
)
def test_sizes_that_do_not_fit_are_refused(name, args):
    with pytest.raises(RuntimeError):
        result_without_data(f"aten.{name}", args, {})


def test_what_is_not_covered_is_left_to_torch():
    for name, args in [
        ("relu", (torch.ones(2, dtype=torch.int64, **META),)),
        ("add", (A, A.double())),
        ("fft_fft", (A,)),
        ("div", (torch.ones(2, dtype=torch.int64, **META), 2)),
    ]:
        assert result_without_data(f"aten.{name}", args, {}) is NotImplemented


def test_broadcasting():
    assert broadcast((2, 1, 4), (3, 1), ()) == [2, 3, 4]


def test_channels_last_is_kept():
    x = torch.empty(2, 4, 5, 5, **META).to(memory_format=torch.channels_last)
    out = result_without_data(
        "aten.convolution", (x, torch.empty(6, 4, 1, 1, **META), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1), {}
    )
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_watching_imports_neither_the_compiler_nor_sympy():
    import subprocess
    import sys

    code = (
        "import sys, torch\nfrom torch import nn\nfrom nni_plugins.channels import ChannelGraph\n"
        "net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))\n"
        "ChannelGraph.watch(net, torch.randn(2, 3, 8, 8))\n"
        "print([m for m in ('torch._dynamo', 'sympy', 'nni') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_real_kernels_agree():
    x, weight = torch.randn(2, 4, 7, 7), torch.randn(8, 2, 3, 3)
    case = (x.to("meta"), weight.to("meta"), None, [2, 2], [1, 1], [1, 1], False, [0, 0], 2)
    assert result_without_data("aten.convolution", case, {}).shape == F.conv2d(x, weight, None, 2, 1, 1, 2).shape


def layers(kind, **options):
    """A recurrent layer, an input for it, and what runs it as one operator without data."""
    layer = kind(5, 4, **options)
    x = torch.randn(3, 2, 5)
    wide = 4 if not options.get("proj_size") else options["proj_size"]
    places = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    h = torch.zeros(places, 2, wide)
    return layer, x, h, torch.zeros(places, 2, 4) if kind is torch.nn.LSTM else None


RECURRENT = [
    (torch.nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    (torch.nn.LSTM, {"num_layers": 2, "proj_size": 3}),
    (torch.nn.GRU, {"bias": False, "num_layers": 2}),
    (torch.nn.RNN, {"bidirectional": True}),
]


@pytest.mark.parametrize(("kind", "options"), RECURRENT)
def test_recurrent_layers_have_the_shapes_that_they_compute(kind, options):
    layer, x, h, c = layers(kind, **options)
    out, state = layer(x)
    states = state if isinstance(state, tuple) else (state,)
    each = len(layer._flat_weights) // h.shape[0]
    args = (x, layer._flat_weights, each, None, h, c, {"LSTM": 2, "GRU": 3, "RNN": 1}[kind.__name__], 4)
    rest = (layer.proj_size, layer.num_layers, False, 0.0, False, layer.bidirectional, [], None)
    ours = result_without_data("aten._cudnn_rnn", (*args, *rest), {})
    assert [tuple(t.shape) for t in ours if t is not None] == [tuple(t.shape) for t in (out, *states)]
    with pytest.raises(RuntimeError, match="a weight of"):
        result_without_data("aten._cudnn_rnn", (x[..., :4], *args[1:], *rest), {})
