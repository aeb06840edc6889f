"""PrunedSpace: pruning as part of an architecture search, in NNI's own terms.

A :class:`PrunedSpace` is an ``nni.nas`` ModelSpace around a model, or around another ModelSpace. Its mutables are the
shares of channels that are kept, per channel group or per stage, beside those of the space inside. To freeze it is to
freeze what is inside first, and then to take out of that architecture what the shares say: which groups there are
depends on the architecture that was chosen. What comes out is the compact model of
:class:`~nni_plugins.speedup.ModelSpeedup`, held against the masked one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from nni.common.serializer import SerializableObject
from nni.mutable import LabeledMutable, SampleValidationError
from nni.mutable.shortcut import choice as nni_choice
from nni.nas.nn.pytorch import ModelSpace
from nni.nas.nn.pytorch.base import recursive_freeze
from nni.nas.space import current_model, model_context
from torch import nn

from nni_plugins.channels import ChannelGraph, ChannelGroup, Plan
from nni_plugins.search.surveys import Surveyed, free_groups, label_of, sparsities_of, survey
from nni_plugins.speedup import ModelSpeedup
from nni_plugins.speedup.report import SpeedupReport
from nni_plugins.training.allocate import units_kept

RATIOS = (0.25, 0.5, 0.75, 1.0)
Model = nn.Module | Callable[[], nn.Module] | str
Importance = Literal["magnitude"] | Callable[[nn.Module, ChannelGraph], Mapping[str, torch.Tensor]]

_architecture_only: ContextVar[bool] = ContextVar("architecture_only", default=False)


@dataclass(frozen=True)
class PrunedModel:
    """What :meth:`PrunedSpace.prune` makes of a sample.

    Attributes
    ----------
    model
        The compact model.
    plan
        Which units of which groups of the architecture are kept.
    masks
        The same as NNI's masks.
    report
        What the speedup says: costs, and the error against the masked model.
    """

    model: nn.Module
    plan: Plan
    masks: dict[str, dict[str, torch.Tensor]]
    report: SpeedupReport


class PrunedSpace(ModelSpace):
    """A model, or a model space, in which the width of each channel group can be chosen too.

    Parameters
    ----------
    model
        A torch model; a ModelSpace, with choices of its own; a function or class without arguments that makes either;
        or the name ``module:function`` of one. A model that is given as an object is part of what NNI sends to trials,
        and too large for that: give a function, or make the whole space by :meth:`named`.
    dummy_input
        An input, as :class:`~nni_plugins.channels.ChannelGraph` takes it, or its shape as a tuple of integers.
    ratios
        The shares of units that can be kept, as a sequence, for ``nni.choice``; or a function from a label to a mutable
        of one's own, such as ``lambda label: nni.uniform(label, 0.25, 1)``.
    groups
        ``'group'``: each channel group has a share of its own; ``'stage'``: those groups share one whose names begin
        with the same module (``layer1``, ``layer2``, ...); or a list of beginnings of names, each with one share, while
        groups that none of them begins keep all.
    exact_only
        Leave out groups whose removal cannot equal masking.
    round_to
        Units kept are a multiple of this.
    importance
        Which units of a group go first: those of the smallest L2 norm, or as a function of ``(model, graph)`` says,
        which returns a score for each unit by name of the group.

    Attributes
    ----------
    inner : nn.Module
        The model or model space inside.
    labels : dict
        For each mutable of this space (``keep:layer1``), the groups that it decides, over all architectures.

    Raises
    ------
    ValueError
        Nothing can be pruned, or a beginning fits no group.

    Notes
    -----
    The groups of a space with choices inside are those of its default architecture and of all that differ from it in
    one choice. A group that the chosen architecture lacks is ignored, and one that has no mutable keeps all its units.

    Examples
    --------
    >>> space = PrunedSpace(MyModelSpace, (1, 3, 32, 32), groups="stage")
    >>> experiment = NasExperiment(space, evaluator, nni.nas.strategy.Random())
    """

    def __init__(
        self,
        model: Model,
        dummy_input: Any,
        ratios: Sequence[float] | Callable[[str], LabeledMutable] = RATIOS,
        groups: Literal["group", "stage"] | Sequence[str] = "group",
        *,
        exact_only: bool = True,
        round_to: int = 1,
        importance: Importance = "magnitude",
    ) -> None:
        super().__init__()
        self.settings = _Settings(dummy_input, groups, exact_only, round_to, importance)
        self.inner = _made(model)
        found = survey(self.inner, lambda sample: self._frozen(sample), self.settings.inputs(), groups, exact_only)
        self.labels = {label_of(key): names for key, names in found.names.items()}
        self.survey: Surveyed = found
        make = ratios if callable(ratios) else lambda label: nni_choice(label, _checked(ratios))
        own = set(self.labels) & set(found.inner)
        if own:
            raise ValueError(f"the space inside has a mutable called {min(own)!r} too; give it another label")
        for label in self.labels:
            self.add_mutable(make(label))

    @classmethod
    def create_fixed_module(cls, sample: dict[str, Any], *args: Any, **kwargs: Any) -> nn.Module:
        """Make the model of a sample, in NNI's ``model_context``: nothing but that one architecture is looked at."""
        return _fixed(sample, *args, **kwargs)

    @classmethod
    def named(cls, name: str, folder: str | Path | None = None) -> PrunedSpace:
        """Make the space that a function returns, and know it by that name: all that NNI sends to a trial.

        Parameters
        ----------
        name
            ``module:function``; the function takes no arguments and returns a ModelSpace.
        folder
            Where the module is looked for, before the working directory and what is installed.
        """
        space = space_of(name, folder)
        if not isinstance(space, PrunedSpace):
            raise ValueError(f"{name} returned {type(space).__name__}, not a PrunedSpace")
        known_as(space, name, folder)
        return space

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model inside as it stands, unpruned: to look at the space only."""
        return self.inner(*args, **kwargs)

    def freeze(self, sample: dict[str, Any]) -> nn.Module:
        """Return the compact model of a sample; weights inside are kept as far as NNI keeps them."""
        return self.prune(sample).model

    def prune(self, sample: dict[str, Any], order: Mapping[str, torch.Tensor] | None = None) -> PrunedModel:
        """Make the compact model of a sample, with what proves it.

        Parameters
        ----------
        sample
            A value for each mutable, as NNI's strategies make it.
        order
            Scores of each group's units, in place of ``importance``.

        Raises
        ------
        SampleValidationError
            The sample is not of this space.
        RuntimeError
            The compact model is not the masked one.
        """
        self.validate(sample)
        return _pruned(self._frozen(sample), sample, self.settings, order)

    def architecture(self, sample: dict[str, Any]) -> nn.Module:
        """Return the model of a sample with all its channels: what ``load_compact`` is to be given."""
        self.validate(sample)
        return self._frozen(sample)

    def check_contains(self, sample: dict[str, Any]) -> SampleValidationError | None:
        """Return why a sample is not of this space, or None."""
        error = super().check_contains(sample)
        if error is None:
            for label in self.labels:
                value = sample[label]
                if not isinstance(value, (int, float)) or not 0 < value <= 1:
                    return SampleValidationError(f"{label} is {value!r}; a share that is kept must be in (0, 1]")
        return error

    def _frozen(self, sample: dict[str, Any]) -> nn.Module:
        return frozen_inner(self.inner, sample)


@dataclass(frozen=True)
class _Settings:
    dummy_input: Any
    groups: Any
    exact_only: bool = True
    round_to: int = 1
    importance: Importance = "magnitude"

    def inputs(self) -> Any:
        return as_input(self.dummy_input)


def _fixed(
    sample: dict[str, Any],
    model: Model,
    dummy_input: Any,
    ratios: Any = RATIOS,
    groups: Any = "group",
    **settings: Any,
) -> nn.Module:
    dense = frozen_inner(_made(model), sample)
    if _architecture_only.get():
        return dense
    return _pruned(dense, sample, _Settings(dummy_input, groups, **settings), None).model


def _pruned(
    dense: nn.Module, sample: Mapping[str, Any], settings: _Settings, order: Mapping[str, torch.Tensor] | None
) -> PrunedModel:
    inputs = settings.inputs()
    graph = ChannelGraph.watch(dense, inputs)
    groups = free_groups(graph, settings.exact_only)
    sparsities = sparsities_of(sample, [group.name for group in groups])
    counts = {group.name: units_kept(group.size, sparsities[group.name], settings.round_to) for group in groups}
    wanted = [group for group in groups if counts[group.name] < group.size]
    scores = order if order is not None else _scores(settings.importance, dense, graph, wanted)
    kept = {
        group.name: scores[group.name].argsort(descending=True, stable=True)[: counts[group.name]] for group in wanted
    }
    plan = Plan(graph, kept)
    masks = plan.masks(dense)
    modes = {name: module.training for name, module in dense.named_modules()}
    speedup = ModelSpeedup(dense, inputs, masks, exact_only=settings.exact_only)
    compact = speedup.speedup_model()
    for name, module in compact.named_modules():
        module.training = modes.get(name, compact.training)
    report = speedup.report
    if report.relative_error is not None and not report.relative_error <= 1e-4 and not report.inexact:
        raise RuntimeError(
            f"the compact model is off from the masked one by {report.relative_error:.2g} of the output's size; "
            "please report this model"
        )
    return PrunedModel(compact, speedup.plan or plan, masks, report)


def _scores(
    importance: Importance, model: nn.Module, graph: ChannelGraph, groups: Sequence[ChannelGroup]
) -> Mapping[str, torch.Tensor]:
    if callable(importance):
        return importance(model, graph)
    from nni_plugins.pruners.score import group_sums

    with torch.no_grad():
        squares = {name: value.square() for name, value in model.named_parameters() if not name.endswith("bias")}
        found = {group.name: group_sums(group, squares) for group in groups}
    return {name: torch.zeros(graph.group(name).size) if sums is None else sums for name, sums in found.items()}


def frozen_inner(inner: nn.Module, sample: dict[str, Any]) -> nn.Module:
    """Return a model of its own for what a sample chooses inside: not one weight is shared with the space."""
    if current_model() is not None and "__arch__" in (getattr(inner, "_frozen_context", None) or {}):
        return inner  # made under this very sample
    try:
        found = recursive_freeze(inner, sample)[0]
    except NotImplementedError:  # mutables of its own, and no freeze: NNI says to make it again
        if not isinstance(inner, ModelSpace):
            raise
        with model_context(sample):
            return inner.trace_symbol(*inner.trace_args, **inner.trace_kwargs)
    return copy.deepcopy(found)


def space_of(name: str, folder: str | Path | None = None) -> Any:
    """Call the function ``module:function``; in NNI's ``model_context`` it gives the model of that sample."""
    from nni_plugins.training.resolve import call

    return call(name, None if folder is None else str(folder), "the space")


def known_as(space: ModelSpace, name: str, folder: str | Path | None = None) -> None:
    """Let a space be sent to trials by the name of the function that made it, whatever it was made of."""
    arguments = {"name": name, "folder": None if folder is None else str(folder)}
    space.trace_copy = lambda: SerializableObject(space_of, [], arguments)


def architecture(space: str, sample: dict[str, Any], home: str | None = None, digest: str = "") -> nn.Module:
    """Return the model, with all its channels, that a sample chooses in a named space: a recipe's ``model.name``.

    Parameters
    ----------
    space
        ``module:function``, which returns a ModelSpace.
    sample
        A value for each mutable inside; shares that are kept do not matter.
    home
        Folder where the module is looked for first.
    digest
        Of the module's source, so that a changed space is another model to a recipe.
    """
    with architectures_only(), model_context(sample):
        made = space_of(space, home)
    if not isinstance(made, nn.Module):
        raise ValueError(f"{space} returned {type(made).__name__}, not a model space")
    return made


@contextmanager
def architectures_only() -> Iterator[None]:
    """Let :class:`PrunedSpace` give the architecture of a sample, unpruned, in NNI's ``model_context``."""
    token = _architecture_only.set(True)
    try:
        yield
    finally:
        _architecture_only.reset(token)


def as_input(value: Any) -> Any:
    """Return the input that a shape means, and anything else as it is."""
    is_shape = isinstance(value, (tuple, list)) and value and all(type(size) is int for size in value)
    return torch.zeros(*value) if is_shape else value


def _made(model: Model) -> nn.Module:
    made: Any = space_of(model) if isinstance(model, str) else model
    if not isinstance(made, nn.Module) and callable(made):
        made = made()
    if not isinstance(made, nn.Module):
        raise ValueError(
            f"PrunedSpace: the model is a {type(made).__name__}, not a torch module or a function that returns one"
        )
    return made


def _checked(ratios: Sequence[float]) -> list[float]:
    values = [float(ratio) for ratio in ratios]
    if not values or len(set(values)) < len(values) or not all(0 < ratio <= 1 for ratio in values):
        raise ValueError(f"PrunedSpace: ratios are {list(ratios)}; they must be different numbers in (0, 1]")
    return values
