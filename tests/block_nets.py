"""Nets made of blocks, in double precision and with statistics as after training."""

import torch
from torch import nn
from torch.nn import functional as F


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a net weights and statistics that are not those of its making, so that nothing is zero or one by chance."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.copy_(draw(module.running_mean))
                module.running_var.copy_(draw(module.running_var).abs() + 0.5)
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() > 1 else 0.5
            parameter.copy_(draw(parameter) * scale + (0.7 if parameter.dim() == 1 else 0.0))
    return model.double().eval()


class BasicBlock(nn.Module):
    """A residual block with a relu behind the addition; in place, as torchvision's."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, width=8, depth=2):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.layer1 = nn.Sequential(*[BasicBlock(width, width) for _ in range(depth)])
        self.layer2 = nn.Sequential(
            BasicBlock(width, 2 * width, 2), *[BasicBlock(2 * width, 2 * width) for _ in range(depth - 1)]
        )
        self.fc = nn.Linear(2 * width, 5)

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class PreNorm(nn.Module):
    """A transformer block with norms in front, and a learned scale behind each branch."""

    def __init__(self, width=16, heads=4, scale=False):
        super().__init__()
        self.kind = "full"
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 2 * width)
        self.gamma = nn.Parameter(torch.ones(width)) if scale else 1
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        x = x + self.drop(self.attn(self.norm1(x)) * self.gamma)
        return x + self.drop(self.mlp(self.norm2(x)) * self.gamma)


class Transformer(nn.Module):
    def __init__(self, block=PreNorm, depth=3, width=16, **details):
        super().__init__()
        self.embed = nn.Linear(6, width)
        self.blocks = nn.ModuleList(block(width, **details) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class TupleAttention(Attention):
    def forward(self, hidden_states, attention_mask=None):
        return super().forward(hidden_states), None


class KeywordLayer(nn.Module):
    """A layer that takes keywords and returns a tuple, and one of whose attributes the model reads."""

    def __init__(self, width, kind):
        super().__init__()
        self.attention_type = kind
        self.norm = nn.LayerNorm(width)
        self.self_attn = TupleAttention(width, 2)
        wide = 2 * width
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, wide), nn.SiLU(), nn.Linear(wide, width))

    def forward(self, hidden_states, attention_mask=None, *, use_cache=False):
        attended, _ = self.self_attn(hidden_states=self.norm(hidden_states), attention_mask=attention_mask)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(hidden_states), None


class KeywordModel(nn.Module):
    def __init__(self, width=16, depth=3):
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.layers = nn.ModuleList(KeywordLayer(width, "full" if i % 2 else "sliding") for i in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 20)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            mask = attention_mask if layer.attention_type == "full" else None
            hidden = layer(hidden, attention_mask=mask, use_cache=False)[0]
        return {"logits": self.head(self.norm(hidden))}


class ConvNext(nn.Module):
    """Blocks that permute, with a scale of their own and the addition outside."""

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
            self.norm = nn.LayerNorm(width)
            self.pw1 = nn.Linear(width, 4 * width)
            self.pw2 = nn.Linear(4 * width, width)
            self.gamma = nn.Parameter(torch.ones(width))

        def forward(self, x):
            y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
            y = self.gamma * self.pw2(F.gelu(self.pw1(y)))
            return x + y.permute(0, 3, 1, 2)

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.stages = nn.Sequential(*[self.Block(width) for _ in range(3)])
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class MoE(nn.Module):
    """Experts in a list; each token goes to the two that a router likes best."""

    def __init__(self, width, experts=4, into="add"):
        super().__init__()
        self.into = into
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(Mlp(width, 2 * width) for _ in range(experts))

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = torch.topk(self.router(flat).softmax(-1), 2)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            if token.numel() == 0:
                continue
            result = expert(flat[token]) * weights[token, place, None]
            if self.into == "add":
                out.index_add_(0, token, result)
            else:
                out[token] += result
        return out.view_as(x)


class MoEBlock(nn.Module):
    def __init__(self, width=16, **details):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, 4)
        self.norm2 = nn.LayerNorm(width)
        self.moe = MoE(width, **details)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.moe(self.norm2(x))


class RandomResidual(nn.Module):
    """Residual blocks of random kinds, one after the other."""

    def __init__(self, seed, width=6, depth=4):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draw = lambda n: int(torch.randint(n, (), generator=generator))  # noqa: E731
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(RandomBlock(width, draw) for _ in range(depth))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class RandomBlock(nn.Module):
    def __init__(self, width, draw):
        super().__init__()
        self.kinds = {
            key: draw(n)
            for key, n in {"norm": 3, "act": 4, "order": 2, "scale": 3, "views": 3, "join": 3, "inplace": 2}.items()
        }
        hidden = width * (1 + draw(2))
        norms = [nn.BatchNorm2d, lambda c: nn.GroupNorm(1, c), lambda c: nn.Identity()]
        acts = [nn.ReLU(bool(self.kinds["inplace"])), nn.SiLU(), nn.LeakyReLU(0.1), nn.ReLU6()]
        self.norm = norms[self.kinds["norm"]](width)
        self.conv1 = nn.Conv2d(width, hidden, 3, padding=1, groups=1 + draw(2))
        self.act = acts[self.kinds["act"]]
        self.conv2 = nn.Conv2d(hidden, width, 1, bias=bool(draw(2)))
        self.scale = nn.Parameter(torch.ones(width, 1, 1)) if self.kinds["scale"] == 0 else None
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        shape = x.shape
        if self.kinds["views"] == 1:
            x = x.flatten(2).reshape(shape)
        y = self.conv2(self.act(self.conv1(self.norm(x) if self.kinds["order"] else x)))
        y = self.drop(y if self.scale is None else y * self.scale)
        if self.kinds["views"] == 2:
            x, y = x.permute(0, 2, 3, 1), y.permute(0, 2, 3, 1)
        if self.kinds["join"] == 0:
            out = x + y
        elif self.kinds["join"] == 1:
            out = y
            out += x
        else:
            out = torch.add(x, y, alpha=0.5)
        if self.kinds["views"] == 2:
            out = out.permute(0, 3, 1, 2)
        return self.act(out) if self.kinds["scale"] == 2 else out
