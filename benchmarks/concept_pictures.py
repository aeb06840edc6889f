"""The pictures of the pages on concepts, drawn from what the library finds in a small net.

python benchmarks/concept_pictures.py            # writes docs/images/groups.svg, removed.svg and exactness.svg
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import Patch, Rectangle
from torch import Tensor, nn

from nni_plugins.channels import ChannelGraph, Plan

IMAGES = ROOT / "docs" / "images"
COLOURS = ["#3b6fb6", "#d9822b", "#3f9b57"]
FIXED, GONE, EDGE = "#c9ccd3", "#f4f4f6", "#ffffff"


class Block(nn.Module):
    """A stem, one residual block and a head: the smallest net with a group that goes through an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.a, self.norm_a = nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)
        self.b, self.norm_b = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)
        self.head = nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.norm_b(self.b(torch.relu(self.norm_a(self.a(x))))))
        return self.head(x)


def owners(graph: ChannelGraph) -> dict[tuple[str, int, int], tuple[int, int]]:
    """Return ``{(parameter, dimension, index): (group, unit)}`` for the groups that can lose units."""
    found = {}
    for number, group in enumerate(g for g in graph.groups if g.prunable):
        for member in group.members:
            for unit, indices in enumerate(member.indices):
                for index in indices:
                    found[member.name, member.dim, int(index)] = (number, unit)
    return found


def draw_parameters(graph: ChannelGraph, model: nn.Module, plan: Plan | None, path: Path) -> None:
    """Every weight as a grid, rows out and columns in, with the group of each index at its margin."""
    owner, slices = owners(graph), plan.slices() if plan else {}
    layers = [
        ("stem.weight", "stem: conv 3 → 6"),
        ("a.weight", "a: conv 6 → 4"),
        ("norm_a.weight", "norm_a"),
        ("b.weight", "b: conv 4 → 6"),
        ("norm_b.weight", "norm_b"),
        ("head.weight", "head: conv 6 → 5"),
    ]
    figure, axes = plt.subplots(1, len(layers), figsize=(11, 2.5), width_ratios=[4, 7, 2, 5, 2, 7])
    tensors = dict(model.named_parameters())
    for axis, (name, title) in zip(axes, layers, strict=True):
        shape = tensors[name].shape
        rows, columns = shape[0], shape[1] if len(shape) > 1 else 1
        kept = slices.get(name, {})

        def stays(dim: int, index: int, kept: dict[int, Any] = kept) -> bool:
            return dim not in kept or index in kept[dim]

        def colour(dim: int, index: int, name: str = name) -> str:
            found = owner.get((name, dim, index))
            return COLOURS[found[0]] if found else FIXED

        for row in range(rows):
            for column in range(columns):
                alive = stays(0, row) and (len(shape) == 1 or stays(1, column))
                face = "#8a93a6" if alive else GONE
                axis.add_patch(Rectangle((column, -row - 1), 0.92, 0.92, facecolor=face, edgecolor=EDGE))
            axis.add_patch(
                Rectangle((-0.75, -row - 1), 0.5, 0.92, facecolor=colour(0, row), alpha=1 if stays(0, row) else 0.25)
            )
        if len(shape) > 1:
            for column in range(columns):
                alpha = 1 if stays(1, column) else 0.25
                axis.add_patch(Rectangle((column, 0.25), 0.92, 0.5, facecolor=colour(1, column), alpha=alpha))
        axis.set_xlim(-1, columns + 0.1)
        axis.set_ylim(-6.2, 1)
        axis.set_aspect("equal")
        axis.set_anchor("N")
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    names = [f"{g.name}: {g.size} units" for g in graph.groups if g.prunable]
    patches = [Patch(color=COLOURS[i], label=f"group {name}") for i, name in enumerate(names)]
    patches.append(Patch(color=FIXED, label="cannot go: input and output of the net"))
    figure.legend(handles=patches, loc="lower center", ncols=len(patches), frameon=False, fontsize=9)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.88, bottom=0.12, wspace=0.05)
    save(figure, path)


def draw_exactness(path: Path) -> None:
    """What the next layer reads, channel by channel, of a model with two masked channels and of the compact one."""
    torch.manual_seed(3)
    x, kept, gone = torch.randn(6), [0, 1, 3, 4], [2, 5]
    masked = x.clone()
    masked[gone] = 0
    shift = torch.tensor([0.1, -0.2, 0.7, 0.3, 0.0, 0.5])
    normed = nn.functional.layer_norm(masked, (6,)), nn.functional.layer_norm(x[kept], (4,))
    panels = [
        ("Exact: what is masked is zero, and adds nothing", masked, x[kept]),
        ("Inexact: a LayerNorm also counts the zeros", *normed),
        ("A constant stays behind an unmasked norm:\nfolded into the next bias", masked + shift, (x + shift)[kept]),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(11, 2.9), sharey=True)
    for axis, (title, left, right) in zip(axes, panels, strict=True):
        places = torch.arange(6).float()
        axis.bar(places - 0.2, left, 0.38, color=COLOURS[0], label="masked model")
        axis.bar(places[kept] + 0.2, right, 0.38, color=COLOURS[1], label="compact model")
        for channel in gone:
            axis.axvspan(channel - 0.5, channel + 0.5, color="#eeeef2", zorder=0)
        axis.set_title(title, fontsize=9.5)
        axis.set_xticks(range(6), [f"{i}\ngone" if i in gone else str(i) for i in range(6)])
        axis.axhline(0, color="black", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("value of the channel")
    axes[1].set_xlabel("channel")
    axes[0].legend(frameon=False, fontsize=8, loc="upper right")
    figure.tight_layout()
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, facecolor="white", metadata={"Date": None})
    plt.close(figure)
    print(path.relative_to(ROOT))


def main() -> None:
    plt.rcParams.update({"svg.hashsalt": "nni-plugins", "svg.fonttype": "path", "font.size": 9})
    model = Block().eval()
    graph = ChannelGraph.watch(model, torch.randn(1, 3, 4, 4))
    names = [group.name for group in graph.groups if group.prunable]
    print(names)
    plan = Plan(graph, {names[0]: [0, 1, 3, 5], names[1]: [0, 2, 3]})
    draw_parameters(graph, model, None, IMAGES / "groups.svg")
    draw_parameters(graph, model, plan, IMAGES / "removed.svg")
    draw_exactness(IMAGES / "exactness.svg")


if __name__ == "__main__":
    main()
