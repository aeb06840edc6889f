"""What pages that show a part of a program take for granted: a model, an evaluator, a loader, by the page's name."""

from __future__ import annotations

from typing import Any

import nni
import torch
from nni.compression import TorchEvaluator
from torch import nn

from tests.docs.pages import ROOT
from tests.pruners.nets import make

#: So long a training is not needed to see that the code runs.
FASTER = {"total_steps=10_000": "total_steps=40", "training_steps=1000": "training_steps=40"}
#: What a page says that belongs to the repository, and is found beside the temporary folder's files.
LINKED = ("experiments", "search_spaces", "benchmarks")


def net(channels: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def batch(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(8, *(shape or (1, 8, 8))), torch.randint(10, (8,))


def training_step(batch: Any, model: nn.Module) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def trainer_on(*shape: int) -> Any:
    """A training function as NNI calls it, on noise of this shape."""

    def train(model, optimizer, training_step, lr_scheduler=None, max_steps=None, max_epochs=None):  # type: ignore[no-untyped-def]
        for _ in range(max_steps or 8):
            optimizer.zero_grad()
            training_step(batch(*shape), model).backward()
            optimizer.step()

    return train


def evaluator_of(model: nn.Module, **details: Any) -> TorchEvaluator:
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01)
    return TorchEvaluator(trainer_on(1, 8, 8), optimizer, training_step, dummy_input=torch.randn(2, 1, 8, 8), **details)


def given(page: str) -> dict[str, Any]:
    """Return the names that the page's code starts with."""
    torch.manual_seed(0)
    names = GIVEN[page]() if page in GIVEN else {}
    return {"__name__": "page", **names}


def _readme() -> dict[str, Any]:
    def build() -> nn.Module:
        return make("residual")

    return {"model": build(), "build_model": build, "train": trainer_on(3, 16, 16), "training_step": training_step}


def _inspect() -> dict[str, Any]:
    from nni_plugins.channels import ChannelGraph, Plan

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer1 = nn.Sequential(nn.ModuleDict({"conv1": nn.Conv2d(3, 32, 3)}))
            self.last = nn.Conv2d(32, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.layer1[0]["conv1"](x).relu())

    model, x = Named().eval(), torch.randn(1, 3, 16, 16)
    graph = ChannelGraph.watch(model, x)
    plan = Plan(graph, {"layer1.0.conv1": list(range(24))})
    counts = torch.tensor([plan.counts.get(group.name, group.size) for group in graph.groups]).numpy()
    return {"model": model, "x": x, "plan": plan, "counts": counts}


def _masks() -> dict[str, Any]:
    model = net().eval()
    mask = torch.ones_like(model[0].weight)
    mask[:4] = 0
    return {"model": model, "x": torch.randn(2, 1, 8, 8), "masks": {"0": {"weight": mask, "bias": mask[:, 0, 0, 0]}}}


class Fresh(dict):
    """A page on which each block begins with a model of its own."""

    def renew(self) -> None:
        model = net()
        self.update(
            model=model,
            evaluator=evaluator_of(model),
            config_list=[{"op_types": ["Conv2d"], "sparse_ratio": 0.5}],
            x=torch.randn(1, 1, 8, 8),
            loader=[batch() for _ in range(40)],
            loss_of=nn.functional.cross_entropy,
        )


def _space() -> dict[str, Any]:
    from nni.nas.nn.pytorch import LayerChoice, ModelSpace, MutableConv2d

    class MyModelSpace(ModelSpace):
        def __init__(self) -> None:
            super().__init__()
            width = nni.choice("width", [16, 32])
            self.stem = MutableConv2d(3, width, 3, padding=1)
            self.layer1 = LayerChoice(
                {"conv": MutableConv2d(width, width, 3, padding=1), "point": MutableConv2d(width, width, 1)},
                label="kind",
            )
            self.layer2 = MutableConv2d(width, 24, 3, padding=1)
            self.head = nn.Linear(24, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layer2(self.layer1(self.stem(x).relu()).relu()).relu()
            return self.head(x.mean((2, 3)))

    return {"MyModelSpace": MyModelSpace}


GIVEN = {
    "README.md": _readme,
    "docs/inspect.md": _inspect,
    "docs/masks.md": _masks,
    "docs/nas.md": _space,
}
FRESH = ("docs/pruners.md",)

__all__ = ["FASTER", "FRESH", "LINKED", "ROOT", "Fresh", "given"]
