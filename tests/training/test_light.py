"""Optimizers without the compiler: the same numbers, and torch._dynamo stays out."""

import copy
import subprocess
import sys

import pytest
import torch

from nni_plugins.training.light import light


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
        (torch.optim.Adam, {"lr": 0.01}),
        (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    ],
)
def test_same_steps_and_state(cls, settings):
    torch.manual_seed(0)
    one = torch.nn.Linear(4, 3)
    two = copy.deepcopy(one)
    pair = [(one, cls(one.parameters(), **settings)), (two, light(cls)(two.parameters(), **settings))]
    for _ in range(4):
        inputs = torch.randn(5, 4)
        for model, optimizer in pair:
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert isinstance(pair[1][1], cls)
    assert not torch.is_grad_enabled() or two.weight.requires_grad
    again = light(cls)(two.parameters(), **settings)
    again.load_state_dict(pair[0][1].state_dict())
    torch.testing.assert_close(again.state_dict(), pair[1][1].state_dict(), rtol=0, atol=0)
    assert again.step(lambda: torch.tensor(3.0)) == 3


CODE = """
import sys
from nni_plugins.training import Loop, build_data, build_model, recipe_from_dict
recipe = recipe_from_dict({"train": {"optimizer": sys.argv[1], "epochs": 1}, "model": {"name": "mlp"}})
data = build_data(recipe)
loop, model = Loop(recipe, data), build_model(recipe, data.shape, data.classes, 0)
optimizer = loop.optimizer(model)
loop.train(model, optimizer, max_steps=3)
optimizer.state_dict()
heavy = ("torch._dynamo", "sympy", "scipy", "sklearn", "nni", "matplotlib", "PIL")
print([name for name in heavy if name in sys.modules])
"""


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_training_imports_little(name):
    done = subprocess.run([sys.executable, "-c", CODE, name], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
