"""Small nets that do what forwards of real models do and tracers trip over, each with its inputs and what it prunes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Net(nn.Module):
    """Parts by name, and a forward that is given the net itself first."""

    def __init__(self, forward: Callable[..., Any], parts: dict[str, Any]) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


@dataclass(frozen=True)
class Odd:
    """A net: how it is built, its inputs, and the sizes of its exact groups by name."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    groups: dict[str, int]


ODD: dict[str, Odd] = {}


def image() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


def vectors() -> torch.Tensor:
    return torch.randn(4, 6)


def words() -> torch.Tensor:
    return torch.randn(2, 5, 16)


def odd(inputs: Callable[[], Any], **groups: int) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Register a builder; ``groups`` are the sizes of its exact groups, dots in names written as ``__``."""

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        sizes = {name.lstrip("_").replace("__", "."): size for name, size in groups.items()}
        ODD[build.__name__] = Odd(build, inputs, sizes)
        return build

    return register


def conv(*args, **options) -> nn.Conv2d:
    return nn.Conv2d(*args, **{"kernel_size": 1, **options})


def three(forward: Callable[..., Any], **more: Any) -> Net:
    return Net(forward, {"a": conv(3, 8), "b": conv(8, 6), "c": conv(6, 2), **more})


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


# -- weights that are not where they are expected -------------------------------------------------------------------


@odd(image, w=8, ws=8, ws_1=8)
def weights_given_to_functions():
    def forward(net, x):
        x = F.relu(F.conv2d(x, net.w, net.bias, padding=1))
        for w in net.ws:
            x = F.relu(F.conv2d(x, w))
        return x.mean((2, 3)) @ net.v

    ws = nn.ParameterList([parameter(8, 8, 1, 1), parameter(8, 8, 1, 1)])
    return Net(forward, {"w": parameter(8, 3, 3, 3), "bias": parameter(8), "ws": ws, "v": parameter(8, 2)})


@odd(vectors, d=10)
def weights_in_a_dictionary():
    d = nn.ParameterDict({"w": parameter(10, 6), "bias": parameter(10), "v": parameter(3, 10)})
    return Net(lambda net, x: F.linear(torch.tanh(F.linear(x, net.d["w"], net.d["bias"])), net.d["v"]), {"d": d})


@odd(image, a=8, b=6)
def a_weight_shared_with_a_transposed_convolution():
    net = three(lambda net, x: net.c(F.relu(net.t(F.relu(net.b(F.relu(net.a(x))))))), c=conv(8, 2))
    net.t = nn.ConvTranspose2d(6, 8, 1)
    net.t.weight = net.b.weight
    return net


@odd(lambda: torch.randint(0, 9, (2, 5)), hidden=12)
def an_embedding_tied_to_the_output():
    parts = {"e": nn.Embedding(9, 8), "hidden": nn.Linear(8, 12), "out": nn.Linear(12, 8)}
    return Net(lambda net, x: net.out(F.relu(net.hidden(net.e(x)))) @ net.e.weight.t(), parts)


@odd(image, _0=8, _2=6, _5=10)
def weights_with_odd_strides():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), conv(8, 6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10), nn.Linear(10, 2)
    )
    net[5].weight = nn.Parameter(torch.randn(216, 10).t())
    net[0].weight = nn.Parameter(torch.randn(3, 8, 3, 3).transpose(0, 1))
    net[6].weight = nn.Parameter(torch.randn(4, 10)[::2])
    return net


@odd(image, a=8, b=6)
def weights_standardised_and_rounded_on_the_way():
    def forward(net, x):
        w = net.b.weight
        w = (torch.round(w * 4) / 4 - w).detach() + w  # a straight-through estimator
        return net.c(F.relu(F.conv2d(F.relu(net.a(x)), w, net.b.bias)))

    return three(forward)


@odd(vectors, a=8, low=3)
def low_rank_updates():
    parts = {"a": nn.Linear(6, 8), "low": parameter(3, 6), "high": parameter(8, 3), "out": nn.Linear(8, 2)}
    return Net(lambda net, x: net.out(F.relu(net.a(x) + F.linear(F.linear(x, net.low), net.high))), parts)


@odd(image, _0=8, _3=6)
def lazy_modules_after_their_first_run():
    net = nn.Sequential(
        nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyConv2d(6, 1), nn.Flatten(), nn.LazyLinear(2)
    )
    net(image())
    return net


# -- tensors of the model's own ------------------------------------------------------------------------------------


@odd(image, a=8, b=6)
def buffers_as_wide_as_the_channels():
    net = three(lambda net, x: net.c(F.relu(net.b(F.relu(net.a(x) * net.mask)) - net.mean[None, :, None, None])))
    net.register_buffer("mask", (torch.rand(1, 8, 1, 1) > 0.3).float())
    net.register_buffer("mean", torch.randn(6), persistent=False)
    return net


class Norm(nn.Module):
    """A batch norm by hand."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("mean", torch.randn(width))
        self.register_buffer("var", torch.rand(width) + 0.5)
        self.register_buffer("count", torch.tensor(0))
        self.scale, self.shift = nn.Parameter(torch.rand(width) + 0.5), parameter(width)

    def forward(self, x):
        if self.training:
            self.mean.mul_(0.9).add_(x.mean((0, 2, 3)).detach(), alpha=0.1)
            self.var.lerp_(x.var((0, 2, 3)).detach(), 0.1)
            self.count += 1
        mean, var, scale, shift = (t.view(1, -1, 1, 1) for t in (self.mean, self.var, self.scale, self.shift))
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift


@odd(image, _0=8, _3=6)
def statistics_kept_by_hand():
    return nn.Sequential(conv(3, 8), Norm(8), nn.ReLU(), conv(8, 6), Norm(6), nn.ReLU(), conv(6, 2))


@odd(image, b=6)
def a_mask_kept_by_shape():
    """What it keeps is as wide as the channels when it is first run, and stays so: those channels stay."""

    def forward(net, x):
        y = F.relu(net.a(x))
        if tuple(y.shape[1:]) not in net.kept:
            net.kept[tuple(y.shape[1:])] = torch.ones(y.shape[1:], dtype=y.dtype).cumsum(0)
        return net.c(F.relu(net.b(y * net.kept[tuple(y.shape[1:])])))

    net = three(forward, kept={}).double()
    net(image().double())
    return net


# -- calls ---------------------------------------------------------------------------------------------------------


@odd(lambda: (image(), torch.randn(3, 3, 4, 6), {"more": [torch.randn(2, 3, 2, 2), None]}), b__0=8, b__3=6)
def called_three_times_with_other_inputs():
    def forward(net, x, y, rest):
        out = [net.out(net.b(t).mean((2, 3))) for t in (x, y, rest["more"][0])]
        return out[0] - out[2], out[1], rest["more"][1]

    b = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1))
    return Net(forward, {"b": b, "out": nn.Linear(6, 2)})


@dataclass
class Found:
    boxes: torch.Tensor
    more: tuple
    nothing: None = None


@odd(lambda: {"x": image(), "scale": torch.tensor(2.0), "options": {"mask": torch.ones(2, 1, 8, 8)}}, a=8, b=6)
def keywords_in_and_a_dataclass_out():
    def forward(net, x, *, scale, **rest):
        a = F.relu(net.a(x)) * scale * rest["options"]["mask"]
        b = F.relu(net.b(a))
        return Found(net.c(b), (None, [b.sum(), {"again": net.c(b * 2)}], "name", 3))

    return three(forward)


@odd(image, ls__0=8, ls__1=6)
def a_generator_inside():
    def features(net, x):
        for layer in net.ls:
            x = F.relu(layer(x))
            yield x

    return Net(lambda net, x: [*features(net, x)][-1], {"ls": nn.ModuleList([conv(3, 8), conv(8, 6), conv(6, 2)])})


@odd(image, b=6)
def hooks_that_change_outputs():
    def double(module, args, out):
        return out * 2 + out.flip(1)

    net = three(lambda net, x: net.c(F.relu(net.b(F.relu(net.a(x))))))
    net.a.register_forward_hook(double)
    net.b.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    net.c.register_forward_hook(lambda module, args, out: out + args[0].sum() / 100)
    return net


@odd(image, a=8, b__0=6, b__2=8)
def a_checkpointed_block():
    b = nn.Sequential(conv(8, 6), nn.ReLU(), conv(6, 8))
    return three(
        lambda net, x: net.c(F.relu(checkpoint(net.b, F.relu(net.a(x)), use_reentrant=False))), b=b, c=conv(8, 2)
    )


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return gradient * (s * (1 + x * (1 - s)))


@odd(image, a=8, b=6)
def a_function_with_its_own_gradient():
    return three(lambda net, x: net.c(Swish.apply(net.b(Swish.apply(net.a(x))))))


@odd(image, module__a=8, module__b=6)
def a_traced_graph_in_a_wrapper():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.p = conv(3, 8), conv(8, 6), conv(6, 2), parameter(1, 8, 1, 1)

        def forward(self, x):
            return self.c(F.relu(self.b(F.relu(self.a(x) + self.p))))

    return nn.DataParallel(torch.fx.symbolic_trace(Plain()))


@odd(image, a__0=8, a__2=6)
def a_stateless_call():
    def forward(net, x):
        return net.c(F.relu(torch.func.functional_call(net.a, dict(net.a.named_parameters()), (x,))))

    return Net(forward, {"a": nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6)), "c": conv(6, 2)})


@odd(image, a=8, b=6)
def a_choice_by_values():
    def forward(net, x):
        return net.c(F.relu((net.b if float(x.abs().mean()) > 0 else net.other)(F.relu(net.a(x)))))

    return three(forward, other=conv(8, 6))
