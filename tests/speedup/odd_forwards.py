"""More odd nets: of shapes and views, attention, gates and loops, and widths that count."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from tests.speedup.odd_nets import Net, conv, image, odd, parameter, three, vectors, words

# -- shapes and views ----------------------------------------------------------------------------------------------


@odd(image, a=8, b=6)
def strides_by_hand():
    def forward(net, x):
        x = F.relu(net.a(x)).contiguous()
        n, c, h, w = x.shape
        return net.c(F.relu(net.b(x.as_strided((n, c, h, w), (c * h * w, h * w, w, 1)))))

    return three(forward)


@odd(image, a=8, b=6)
def writes_in_place():
    def forward(net, x):
        x = net.a(x).mul_(2)
        x += 0.5
        return net.c(net.b(x.relu_()).add_(1).relu_())

    return three(forward)


@odd(image, c=6)
def halves_written_into_one_tensor():
    def forward(net, x):
        a, b = net.a(x), net.b(x)
        y = x.new_zeros(x.shape[0], a.shape[1] + b.shape[1], *x.shape[2:])
        y[:, : a.shape[1]], y[:, a.shape[1] :] = a, b
        return net.d(F.relu(net.c(y)))

    return Net(forward, {"a": conv(3, 8), "b": conv(3, 4), "c": conv(12, 6), "d": conv(6, 2)})


@odd(image, a=8, b=6)
def a_pyramid_of_slices():
    def focus(x):
        return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], dim=1)

    parts = {"a": conv(12, 8), "b": conv(32, 6), "c": conv(6, 2)}
    return Net(lambda net, x: net.c(F.silu(net.b(focus(F.silu(net.a(focus(x))))))), parts)


@odd(image, a=4, m__0__0=6, m__0__2=4, m__1__0=6, m__1__2=4, b=6)
def chunks_that_are_collected():
    def forward(net, x):
        y = list(net.a(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in net.m)
        return net.c(F.silu(net.b(F.silu(torch.cat(y, 1)))))

    m = nn.ModuleList(nn.Sequential(conv(4, 6), nn.SiLU(), conv(6, 4)) for _ in range(2))
    return three(forward, m=m, b=conv(16, 6))


@odd(image, a=8, b=12)
def a_detector_head_with_a_grid():
    def forward(net, x):
        features, found = [F.relu(net.a(x))], []
        features.append(F.relu(net.b(features[0])))
        for head, y in zip(net.heads, features, strict=True):
            y = head(y)
            n, _, h, w = y.shape
            y = y.view(n, net.anchors, net.outputs, h, w).permute(0, 1, 3, 4, 2).contiguous().sigmoid()
            rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            grid = torch.stack((columns, rows), 2).view(1, 1, h, w, 2)
            found.append(
                torch.cat([y[..., :2] * 2 + grid, (y[..., 2:4] * 2) ** 2, y[..., 4:]], -1).view(n, -1, net.outputs)
            )
        return torch.cat(found, 1)

    parts = {"a": conv(3, 8), "b": conv(8, 12, kernel_size=3, stride=2), "anchors": 3, "outputs": 7}
    return Net(forward, {**parts, "heads": nn.ModuleList([conv(8, 21), conv(12, 21)])})


@odd(image, a=8, b=6)
def sizes_read_from_other_modules():
    def forward(net, x):
        y = F.relu(net.a(x)).reshape(-1, net.b.in_channels, 64)
        return net.c(F.relu(net.b(y.view(x.shape[0], net.a.out_channels, 8, 8))))

    return three(forward)


@odd(image, b=6)
def sizes_in_lists():
    """A list of sizes cannot be told to follow: the group stays."""
    return three(lambda net, x: net.c(F.relu(net.b(F.relu(net.a(x)).view(-1, net.widths[0], 8, 8)))), widths=[8, 6])


@odd(image, a=8, b=6)
def the_same_tensor_twice():
    def forward(net, x):
        y = F.relu(net.a(x))
        z = F.relu(net.b(torch.cat([y, y * 2], 1)))
        return net.c(torch.cat([z, -z], 1).repeat(1, 2, 1, 1))

    return three(forward, b=conv(16, 6), c=conv(24, 2))


@odd(image, _0=8, _2=6)
def paddings():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU(),
                         nn.Conv2d(8, 6, 3, padding=1, padding_mode="replicate", stride=2), nn.ReLU(), conv(6, 2))  # fmt: skip


@odd(image, _0=6, _4=2, _6=4)
def mixed_groups():
    return nn.Sequential(conv(3, 12), nn.ReLU(), conv(12, 8, kernel_size=3, groups=2), nn.ReLU(), conv(8, 24, groups=4),
                         nn.ReLU(), conv(24, 12, groups=3), nn.ReLU(), conv(12, 2))  # fmt: skip


@odd(image, _0=4, _2=3, _5=8)
def transposed_convolutions():
    return nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2), nn.ReLU(),
                         nn.BatchNorm2d(6), nn.ConvTranspose2d(6, 8, 3, stride=2, output_padding=1, dilation=2), nn.ReLU(),
                         nn.ConvTranspose2d(8, 8, 2, groups=8), nn.ReLU(), conv(8, 2))  # fmt: skip


# -- attention, gates and loops ------------------------------------------------------------------------------------


@odd(words, q=2, o=16)
def grouped_queries():
    def forward(net, x):
        n, length, _ = x.shape
        q, k, v = (layer(x).view(n, length, -1, 4).transpose(1, 2) for layer in (net.q, net.k, net.v))
        repeats = q.shape[1] // k.shape[1]
        k, v = k[:, :, None].expand(-1, -1, repeats, -1, -1).reshape(n, -1, length, 4), v.repeat_interleave(repeats, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return net.out(net.o(y.transpose(1, 2).reshape(n, length, -1)))

    parts = {"q": nn.Linear(16, 16), "k": nn.Linear(16, 8), "v": nn.Linear(16, 8), "o": nn.Linear(16, 16)}
    return Net(forward, {**parts, "out": nn.Linear(16, 2)})


@odd(image, a=8, t=4, g=4)
def attention_over_positions():
    def forward(net, x):
        x = F.relu(net.a(x))
        t, p, g = (layer(x).flatten(2) for layer in (net.t, net.p, net.g))
        y = (g @ (t.transpose(1, 2) @ p).softmax(-1).transpose(1, 2)).view(x.shape[0], -1, *x.shape[2:])
        return net.c(x + net.w(y))

    return Net(
        forward, {"a": conv(3, 8), "t": conv(8, 4), "p": conv(8, 4), "g": conv(8, 4), "w": conv(4, 8), "c": conv(8, 2)}
    )


@odd(image, c=8, f=4)
def split_attention():
    def forward(net, x):
        x = F.relu(net.c(F.relu(net.i(x))))
        parts = torch.split(x, x.shape[1] // 2, 1)
        gate = net.g(F.relu(net.f(sum(parts).mean((2, 3), keepdim=True))))
        gate = gate.view(x.shape[0], 1, 2, -1).transpose(1, 2).softmax(1).reshape(x.shape[0], -1, 1, 1)
        return net.out(sum(u * v for u, v in zip(torch.split(gate, gate.shape[1] // 2, 1), parts, strict=True)))

    parts = {"i": conv(3, 4), "c": conv(4, 16, groups=2), "f": conv(8, 4), "g": conv(4, 16), "out": conv(8, 2)}
    return Net(forward, parts)


@odd(lambda: torch.randn(2, 7, 6), hidden=10)
def cells_in_a_loop():
    """States are made as wide as the cells are written: these stay."""

    def forward(net, x):
        h = c = x.new_zeros(x.shape[0], 8)
        for step in range(x.shape[1]):
            h, c = net.cell(x[:, step], (h, c))
        return net.out(F.relu(net.hidden(h)))

    return Net(forward, {"cell": nn.LSTMCell(6, 8), "hidden": nn.Linear(8, 10), "out": nn.Linear(10, 2)})


@odd(words, i=24, o=16)
def a_state_space():
    def forward(net, x):
        length = x.shape[1]
        u, gate = net.i(x).chunk(2, -1)
        u = F.silu(net.c(u.transpose(1, 2))[..., :length].transpose(1, 2))
        d, b, c = net.x(u).split([2, 4, 4], -1)
        d, h, ys = F.softplus(net.dt(d)), x.new_zeros(x.shape[0], net.rates.shape[0], 4), []
        for t in range(length):
            h = h * torch.exp(-d[:, t, :, None] * net.rates) + d[:, t, :, None] * b[:, t, None, :] * u[:, t, :, None]
            ys.append((h * c[:, t, None, :]).sum(-1) + net.skip * u[:, t])
        return net.out(net.o(torch.stack(ys, 1) * F.silu(gate)))

    parts = {"i": nn.Linear(16, 48), "c": nn.Conv1d(24, 24, 3, padding=2, groups=24), "x": nn.Linear(24, 10)}
    more = {"dt": nn.Linear(2, 24), "rates": nn.Parameter(torch.rand(24, 4)), "skip": nn.Parameter(torch.rand(24))}
    return Net(forward, {**parts, **more, "o": nn.Linear(24, 16), "out": nn.Linear(16, 2)})


@odd(vectors, experts__0__0=8, experts__1__0=8, experts__2__0=8)
def experts_picked_by_a_gate():
    def forward(net, x):
        weights, chosen = net.gate(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(net.experts):
            row, place = torch.where(chosen == number)
            if row.numel():
                out = out.index_add(0, row, expert(x[row]) * weights[row, place, None])
        return net.out(out)

    experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(3))
    return Net(forward, {"gate": nn.Linear(6, 3), "experts": experts, "out": nn.Linear(6, 2)})


@odd(vectors, b=8)
def the_largest_written_back():
    """Zeros, into which values are written along the channels: what comes out is not zero."""

    def forward(net, x):
        y = F.relu(net.a(x))
        values, places = y.topk(3, -1)
        z = F.relu(net.b(torch.zeros_like(y).scatter(-1, places, values)))
        return net.out(F.relu(net.c(torch.zeros_like(y).index_add(-1, torch.arange(3), values))) + z)

    return Net(
        forward, {name: nn.Linear(8 if name > "a" else 6, 8) for name in ("a", "b", "c")} | {"out": nn.Linear(8, 2)}
    )


@odd(image, st=2, b__0__0=4, b__1__0=4)
def shuffled_halves():
    def forward(net, x):
        x = F.relu(net.st(x))
        for block in net.b:
            left, right = x.chunk(2, 1)
            x = torch.cat([left, block(right)], 1)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
        return net.out(x)

    b = nn.ModuleList(
        nn.Sequential(conv(4, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4, groups=4), conv(4, 4), nn.ReLU())
        for _ in range(2)
    )
    return Net(forward, {"st": conv(3, 8), "b": b, "out": conv(8, 2)})


# -- widths that count ---------------------------------------------------------------------------------------------


class Equalised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight * math.sqrt(2 / self.in_channels), self.bias)


@odd(image, _0=None, _2=6)
def weights_scaled_by_their_width():
    """Shapes are right and numbers are not: the rehearsal sees that."""
    return nn.Sequential(Equalised(3, 8, 1), nn.ReLU(), Equalised(8, 6, 1), nn.ReLU(), conv(6, 2))


@odd(image, a=None, b=6)
def scaled_by_the_width():
    def forward(net, x):
        y = F.relu(net.a(x))
        return net.c(F.relu(net.b(y / math.sqrt(y.shape[1]))))

    return three(forward)


@odd(vectors, up=12)
def mapped_over_the_batch():
    """Modules called on one sample, by ``torch.vmap``."""

    def forward(net, x):
        return net.down(torch.vmap(lambda row: torch.relu(net.up(row)))(x))

    return Net(forward, {"up": nn.Linear(6, 12), "down": nn.Linear(12, 3)})


@odd(vectors, up=12, w=4, w_1=7)
def a_sum_over_stacked_matrices():
    """A whole matrix of a stack can go."""
    return Net(
        lambda net, x: net.down(F.relu((F.relu(net.up(x)) @ net.w).sum(0))),
        {"up": nn.Linear(6, 12), "w": parameter(4, 12, 7), "down": nn.Linear(7, 3)},
    )


@odd(image, a=4, b=6)
def kernels_made_from_the_input_for_fixed_groups():
    """The number of groups is written down, and their width follows: the same channel of every group goes."""

    def forward(net, x):
        x = F.relu(net.a(x))
        n, c, h, w = x.shape
        kernels = net.k(F.relu(net.b(x))).view(n, 4, 9, h, w).unsqueeze(2)
        taken = F.unfold(x, 3, padding=1).view(n, 4, c // 4, 9, h, w)
        return net.c((kernels * taken).sum(3).view(n, c, h, w))

    return Net(forward, {"a": conv(3, 16), "b": conv(16, 6), "k": conv(6, 36), "c": conv(16, 2)})
