"""Widths: a model at any number of units of its channel groups, and a training step over several of them.

The sandwich rule and in-place distillation are those of Yu and Huang, Universally Slimmable Networks (ICCV 2019),
sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nni_plugins.training.allocate import whole
from nni_plugins.training.loop import Loop
from nni_plugins.training.recipe import Recipe

if TYPE_CHECKING:
    from nni_plugins.channels import ChannelGraph


class Widths:
    """A model at any width: which elements of its parameters belong to which number of units.

    Parameters
    ----------
    model
        Its parameters are masked in place, for as long as :meth:`narrowed` lasts.
    graph
        Its channels.
    order
        Units of each group that can be narrowed, the most important first.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, order: Mapping[str, Sequence[int]]) -> None:
        self.names = list(order)
        self.sizes = [graph.group(name).size for name in self.names]
        classes = graph.solution.classes
        owner = torch.full((len(graph.solution),), len(self.names))
        rank = torch.zeros(len(graph.solution), dtype=torch.long)
        for index, name in enumerate(self.names):
            units = torch.as_tensor(graph.group(name).classes)[torch.as_tensor(list(order[name]))]
            owner[units], rank[units] = index, torch.arange(len(units))
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        places = {id(parameter): place for place, parameter in enumerate(self.parameters)}
        self._dims: list[tuple[int, tuple[int, ...], Tensor, Tensor]] = []
        for name, parameter in model.named_parameters():
            for dim, labels in enumerate(graph.trace.parameters.get(name, [])):
                if labels is None or (name, dim) in graph.trace.unmasked or id(parameter) not in places:
                    continue
                own = torch.as_tensor(classes[labels])
                if (owner[own] < len(self.names)).any():
                    shape = [1] * parameter.dim()
                    shape[dim] = -1
                    device = parameter.device
                    self._dims.append(
                        (places[id(parameter)], tuple(shape), owner[own].to(device), rank[own].to(device))
                    )

    def masks(self, counts: Sequence[int]) -> dict[int, Tensor]:
        """Return the masks of the parameters that are narrower, by their place: 1 where kept, to be broadcast."""
        found: dict[int, Tensor] = {}
        kept = torch.tensor([*counts, 2**62])
        for place, shape, owner, rank in self._dims:
            parameter = self.parameters[place]
            mask = (rank < kept.to(owner.device)[owner]).to(parameter.dtype).view(shape)
            found[place] = mask if place not in found else found[place] * mask
        return found

    @contextmanager
    def narrowed(self, counts: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Let the model be as narrow as this, and put its weights back; yields the masks.

        Parameters
        ----------
        counts
            Units kept, in the order of :attr:`names`.
        """
        masks = self.masks(counts) if list(counts) != self.sizes else {}
        before = {place: self.parameters[place].data for place in masks}
        try:
            for place, mask in masks.items():
                self.parameters[place].data = before[place] * mask
            yield masks
        finally:
            for place, values in before.items():
                self.parameters[place].data = values


class _Gradients(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(context: Any, loss: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        context.gradients = gradients
        return loss.detach().clone()

    @staticmethod
    def backward(context: Any, *outer: Tensor) -> Any:
        return None, None, *(gradient * outer[0].to(gradient.dtype) for gradient in context.gradients)


class Sandwich:
    """The training step of a supernet, for :meth:`Loop.train`.

    Parameters
    ----------
    loop
        Gives the loss.
    widths
        Of the model that is trained.
    recipe
        Its ``supernet`` section.
    """

    def __init__(self, loop: Loop, widths: Widths, recipe: Recipe) -> None:
        self.loop, self.widths, self.recipe = loop, widths, recipe

    def __call__(self, batch: Any, model: nn.Module) -> Tensor:
        """Return the sum of the losses of all widths of this step; its gradients are worked out here, one by one."""
        settings, parameters = self.recipe.supernet, self.widths.parameters
        totals = [torch.zeros_like(parameter) for parameter in parameters]
        loss, teacher = torch.zeros((), device=parameters[0].device), None
        scale = float(self.loop.scaler.get_scale()) if self.loop.scaler.is_enabled() else 1.0
        outputs: list[Any] = []
        hook = model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        try:
            for number, counts in enumerate(self.drawn()):
                with self.widths.narrowed(counts) as masks:
                    outputs.clear()
                    own = self.loop.training_step(batch, model)
                    if number and settings.distill:
                        own = imitation(self.recipe.train.loss, self.loop.loss, outputs[-1], teacher, own)
                    found = torch.autograd.grad(own * scale, parameters, allow_unused=True)
                if teacher is None:
                    teacher = _detached(outputs[-1])
                loss = loss + own.detach()
                for place, gradient in enumerate(found):
                    if gradient is not None:
                        mask = masks.get(place)
                        totals[place] += (gradient if mask is None else gradient * mask) / scale
        finally:
            hook.remove()
        return _Gradients.apply(loss, totals, *parameters)

    def drawn(self) -> list[list[int]]:
        """Return the widths of one step: the largest, the smallest, and random ones, by turns even and uneven."""
        settings, sizes = self.recipe.supernet, self.widths.sizes
        found = [list(sizes), smallest(self.recipe, sizes)]
        low = settings.smallest
        for number in range(settings.samples):
            shares = torch.rand(len(sizes)) if number % 2 == 0 else torch.rand(1).expand(len(sizes))
            shares = low + (1 - low) * shares
            found.append(
                [whole(size, 1 - float(share), self.recipe.prune) for size, share in zip(sizes, shares, strict=True)]
            )
        return found


def smallest(recipe: Recipe, sizes: Sequence[int]) -> list[int]:
    """Return how many units each group keeps in the smallest network."""
    return [whole(size, 1 - recipe.supernet.smallest, recipe.prune) for size in sizes]


def imitation(name: str, loss: Callable[..., Any], output: Any, teacher: Any, own: Tensor) -> Tensor:
    """Return the loss of a narrow network against the outputs of the largest.

    Parameters
    ----------
    name, loss
        The recipe's loss: cross entropy becomes that against the larger one's probabilities, the others take its
        outputs for targets. For a loss of the user's own, and outputs that are not one tensor, it stays as it is.
    output, teacher
        Of the narrow and of the largest network.
    own
        The loss against the labels.
    """
    if not isinstance(output, Tensor) or not isinstance(teacher, Tensor) or not output.is_floating_point():
        return own
    if name == "cross_entropy":
        wanted = functional.softmax(teacher.float(), dim=1)
        return -(wanted * functional.log_softmax(output.float(), dim=1)).sum(dim=1).mean()
    if name in ("mse", "l1"):
        return loss(output, teacher)
    return loss(output, teacher.sigmoid()) if name == "bce" else own


def _detached(output: Any) -> Any:
    return output.detach() if isinstance(output, Tensor) else output
