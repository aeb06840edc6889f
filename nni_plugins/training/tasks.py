"""Losses, metrics and optimizers by name; each table takes one more line for one more of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nni_plugins.training.errors import CompressionError, RecipeError
from nni_plugins.training.light import light
from nni_plugins.training.recipe import Recipe
from nni_plugins.training.sections import TrainSettings

Loss = Callable[[Any, Any], Tensor]
Parameters = list[dict[str, Any]]


def _shaped(target: Tensor, output: Tensor) -> Tensor:
    """Give a target ``[batch]`` the shape of an output ``[batch, 1]``: broadcasting would compare all with all."""
    return target.reshape(output.shape).to(output.dtype) if target.numel() == output.numel() else target


def _cross_entropy(settings: TrainSettings) -> Loss:
    """Refuse what torch computes and nobody means: scores of one class, and numbers in the place of probabilities."""
    loss = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)

    def compute(output: Any, target: Any) -> Tensor:
        if isinstance(output, Tensor) and (output.ndim < 2 or output.shape[1] < 2):
            raise CompressionError(
                f"train.loss cross_entropy is for scores of several classes, and the model's output is "
                f"{list(output.shape)}; {FOR_NUMBERS}"
            )
        return loss(output, target)

    return compute


FOR_NUMBERS = "set train.loss=mse and train.metric=mse for numbers, or train.loss=bce for yes and no"
LOSSES: dict[str, Callable[[TrainSettings], Loss]] = {
    "cross_entropy": _cross_entropy,
    "mse": lambda settings: lambda output, target: nn.functional.mse_loss(output, _shaped(target, output)),
    "l1": lambda settings: lambda output, target: nn.functional.l1_loss(output, _shaped(target, output)),
    "bce": lambda settings: (
        lambda output, target: nn.functional.binary_cross_entropy_with_logits(output, _shaped(target, output))
    ),
}


@dataclass(frozen=True)
class Metric:
    """A measure of quality over a whole split.

    Attributes
    ----------
    function
        Takes all outputs and all targets of the split, returns a number.
    higher_is_better
        Which way is up.
    """

    name: str
    function: Callable[[Any, Any], float]
    higher_is_better: bool

    def better(self, value: float) -> float:
        """Return the value turned so that more is better."""
        return value if self.higher_is_better else -value


def _accuracy(output: Tensor, target: Tensor) -> float:
    chosen = output.argmax(1) if output.ndim > 1 and output.shape[1] > 1 else (output.reshape(target.shape) > 0)
    return (chosen == target).double().mean().item()


def _r2(output: Tensor, target: Tensor) -> float:
    target = _shaped(target, output).double()
    rest = (output.double() - target).square().sum()
    return (1 - rest / (target - target.mean(0)).square().sum()).item()


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", _accuracy, True),
        Metric("mse", lambda out, target: (out.double() - _shaped(target, out)).square().mean().item(), False),
        Metric("mae", lambda out, target: (out.double() - _shaped(target, out)).abs().mean().item(), False),
        Metric("r2", _r2, True),
    )
}

OPTIMIZERS: dict[str, Callable[[Parameters, TrainSettings], torch.optim.Optimizer]] = {
    "sgd": lambda parameters, settings: light(torch.optim.SGD)(
        parameters,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        **{"nesterov": settings.momentum > 0, **settings.optimizer_arguments},
    ),
    "adam": lambda parameters, settings: light(torch.optim.Adam)(
        parameters, lr=settings.learning_rate, **settings.optimizer_arguments
    ),
    "adamw": lambda parameters, settings: light(torch.optim.AdamW)(
        parameters, lr=settings.learning_rate, **settings.optimizer_arguments
    ),
}


def build_loss(recipe: Recipe) -> Loss:
    """Return the loss of a recipe: a function ``(output, target) -> scalar tensor``."""
    name = recipe.train.loss
    if ":" not in name:
        return LOSSES[name](recipe.train)
    from nni_plugins.training.resolve import resolve

    loss = resolve(name, recipe.folder, "train.loss")
    return loss() if isinstance(loss, type) else loss


def build_metric(recipe: Recipe) -> Metric:
    """Return the metric of a recipe; ``train.higher_is_better`` overrules what the metric says of itself."""
    name, higher = recipe.train.metric, recipe.train.higher_is_better
    if ":" in name:
        from nni_plugins.training.resolve import resolve

        function = resolve(name, recipe.folder, "train.metric")
        metric = Metric(name.rpartition(":")[2], function, getattr(function, "higher_is_better", True))
    else:
        metric = METRICS[name]
    return metric if higher is None else Metric(metric.name, metric.function, higher)


def build_optimizer(recipe: Recipe, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """Build the optimizer of a recipe.

    Parameters
    ----------
    recipe
        Its ``train`` section decides. A user's function or class is called with the parameter groups, ``lr`` and
        ``train.optimizer_arguments``.
    named
        Names and parameters. Those with one dimension or none (biases, norms) get no weight decay.
    """
    settings = recipe.train
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for _, parameter in named:
        if parameter.requires_grad:
            (decayed if parameter.ndim > 1 else free).append(parameter)
    groups: Parameters = [
        {"params": members, "weight_decay": decay}
        for members, decay in ((decayed, settings.weight_decay), (free, 0.0))
        if members
    ]
    if not groups:
        raise RecipeError("model: it has no parameter to train")
    if ":" in settings.optimizer:
        from nni_plugins.training.resolve import call

        name, arguments = settings.optimizer, settings.optimizer_arguments
        made = call(name, recipe.folder, "train.optimizer", groups, lr=settings.learning_rate, **arguments)
        if not isinstance(made, torch.optim.Optimizer):
            raise RecipeError(f"train.optimizer is {name}: it returned {type(made).__name__}, not a torch optimizer")
        return made
    try:
        return OPTIMIZERS[settings.optimizer](groups, settings)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"train.optimizer_arguments do not fit {settings.optimizer}: {error}") from None
