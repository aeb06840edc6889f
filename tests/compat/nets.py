"""A small net, its data and its training, as NNI's documentation has them."""

import nni
import torch
from nni.compression import TorchEvaluator
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm1, self.act1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.norm2, self.act2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.hidden, self.act3, self.head = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10)

    def forward(self, x):
        x = self.act1(self.norm1(self.conv1(x)))
        x = self.act2(self.norm2(self.conv2(x)) + x)
        return self.head(self.act3(self.hidden(x.mean((2, 3)))))


def make_net(seed=0):
    torch.manual_seed(seed)
    return Net()


def make_data():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(80, 1, 8, 8, generator=generator)
    return list(zip(images.split(8), torch.randint(0, 10, (80,), generator=generator).split(8), strict=True))


def training_step(batch, model):
    return F.cross_entropy(model(batch[0]), batch[1])


def train(model, optimizer, training_step, lr_schedulers=None, max_steps=None, max_epochs=None):
    model.train()
    steps = 0
    for _ in range(max_epochs or (10**6 if max_steps else 1)):
        for batch in make_data():
            optimizer.zero_grad()
            training_step(batch, model).backward()
            optimizer.step()
            steps += 1
            if max_steps and steps >= max_steps:
                return


def torch_evaluator(model):
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01, momentum=0.9)
    return TorchEvaluator(train, optimizer, training_step)


PRUNE = [{"op_types": ["Conv2d", "Linear"], "exclude_op_names_re": [".*head"], "sparse_ratio": 0.5}]
SLIM = [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}]
MOVE = [{"op_names_re": [".*hidden"], "sparse_threshold": 0.1}]
QUANTISE = [
    {
        "op_types": ["Conv2d", "Linear"],
        "quant_dtype": "int8",
        "target_names": ["_input_", "weight", "_output_"],
        "quant_scheme": "affine",
        "granularity": "default",
    }
]
WEIGHTS = [{"op_types": ["Conv2d"], "quant_dtype": "int8", "target_names": ["weight"], "quant_scheme": "affine"}]
