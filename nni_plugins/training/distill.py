"""A teacher for fine-tuning: the dense model, unless another is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from nni_plugins.training.errors import CompressionError, RecipeError
from nni_plugins.training.loaders import apply, split_batch
from nni_plugins.training.loop import Loop, batches_of
from nni_plugins.training.recipe import Recipe

if TYPE_CHECKING:
    from nni_plugins.channels import Plan


def kd(student: Tensor, teacher: Tensor, target: Tensor, settings: Any) -> Tensor:
    """Soft labels: KL(teacher ‖ student) at a temperature T, times T² (Hinton et al., 2015)."""
    heat = settings.temperature
    ours, theirs = F.log_softmax(student / heat, dim=1), F.log_softmax(teacher / heat, dim=1)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * heat**2


def dkd(student: Tensor, teacher: Tensor, target: Tensor, settings: Any) -> Tensor:
    """α·TCKD + β·NCKD, each times T² (Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022)."""
    heat = settings.temperature
    if target.dim() != 1 or target.is_floating_point():
        raise RecipeError("distill.method: dkd needs one class for each input; take kd or feature")
    own = F.one_hot(target, student.shape[1]).bool()
    ours, theirs = F.softmax(student / heat, dim=1), F.softmax(teacher / heat, dim=1)

    def pair(share: Tensor) -> Tensor:
        hit = share[own].clamp(1e-8, 1 - 1e-8)
        return torch.stack([hit, 1 - hit], dim=1)

    class_part = F.kl_div(pair(ours).log(), pair(theirs), reduction="batchmean")
    others = torch.finfo(student.dtype).min
    rest = F.log_softmax((student / heat).masked_fill(own, others), dim=1)
    rest_theirs = F.softmax((teacher / heat).masked_fill(own, others), dim=1)
    rest_part = F.kl_div(rest.masked_fill(own, 0.0), rest_theirs, reduction="batchmean")
    return (settings.alpha * class_part + settings.beta * rest_part) * heat**2


LOGITS: dict[str, Callable[[Tensor, Tensor, Tensor, Any], Tensor]] = {"kd": kd, "dkd": dkd}
"""Losses of outputs ``[batch, classes]``, by name: of student, teacher, classes, and the recipe's settings."""


CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.MultiheadAttention)
"""Modules whose channels are the last dimension of what they return; those of convolutions and norms are the second."""


class Distillation:
    """The training step of a recipe with a teacher beside it.

    Parameters
    ----------
    recipe
        Its ``distill`` section.
    loop
        Gives the task's loss.
    teacher
        In evaluation mode; no gradient reaches it.
    plan
        Which channels the student has of the teacher's: for feature distillation.
    """

    def __init__(self, recipe: Recipe, loop: Loop, teacher: nn.Module, plan: Plan | None = None) -> None:
        self.settings, self.loop, self.teacher = recipe.distill, loop, teacher.eval().requires_grad_(False)
        self.steps, self.warmup = 0, recipe.distill.warmup_epochs
        self.channels = kept_channels(plan) if plan is not None else {}
        self.layers: tuple[str, ...] = ()
        if self.settings.method == "feature":
            if recipe.distill.teacher != "dense":
                raise RecipeError(
                    "distill.method: feature compares channels with the dense model's; take teacher: dense"
                )
            if plan is None:
                raise RecipeError(
                    "distill.method: feature needs to know which channels are kept; take one of our pruners"
                )
            self.layers = self._chosen(plan)

    def __call__(self, batch: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Return the task's loss plus the teacher's share of it."""
        inputs, target = split_batch(self.loop.place(batch))
        with torch.no_grad(), self.loop.autocast(), _Features(self.teacher, self.layers) as theirs:
            told = apply(self.teacher, inputs)
        with self.loop.autocast(), _Features(model, self.layers) as ours:
            output = apply(model, inputs)
            loss = self.loop.loss(output, target)
            if self.settings.method == "feature":
                share = self._feature_loss(ours, theirs)
            else:
                student, teacher = _logits(output, "model"), _logits(told, "teacher")
                if student.shape != teacher.shape:
                    raise CompressionError(
                        f"distill: the teacher returns {list(teacher.shape)}, the model {list(student.shape)}"
                    )
                share = LOGITS[self.settings.method](student.float(), teacher.float(), target, self.settings)
        factor = self.settings.weight
        if self.warmup > 0:
            length = self.warmup * batches_of(self.loop.data.train)
            factor *= min(1.0, (self.steps + 1) / length)
        self.steps += 1
        return loss + factor * share

    def _chosen(self, plan: Plan) -> tuple[str, ...]:
        modules = dict(self.teacher.named_modules())
        for name in self.settings.layers:
            if name not in modules:
                from nni_plugins.training.schema import closest

                raise RecipeError(f"distill.layers: the model has no module {name}; {closest(name, list(modules))}")
        if self.settings.layers:
            return self.settings.layers
        found = {}
        for group in plan.graph.groups:  # the last module that makes or scales a group's channels
            for member in group.members:
                if member.role in ("out", "scale") and member.module:
                    found[group.name] = member.module
        return tuple(dict.fromkeys(found.values()))

    def _feature_loss(self, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Tensor:
        """Mean over layers of the squared difference on the channels that are kept, in shares of the teacher's size."""
        parts, modules = [], dict(self.teacher.named_modules())
        for name in self.layers:
            if name not in ours or name not in theirs:
                continue
            student, teacher = ours[name], theirs[name]
            dim = teacher.dim() - 1 if isinstance(modules.get(name), CHANNELS_LAST) else 1
            kept = self.channels.get(name)
            if kept is not None:
                kept = kept.to(teacher.device)
                teacher = teacher.index_select(dim, kept)
                if student.shape[dim] != len(kept):  # still masked, not yet compact
                    student = student.index_select(dim, kept)
            if student.shape != teacher.shape:
                raise CompressionError(
                    f"distill.layers: {name} returns {list(student.shape)} and the teacher's {list(teacher.shape)}; "
                    "leave it out"
                )
            parts.append(F.mse_loss(student, teacher) / teacher.square().mean().clamp(min=1e-8))
        if not parts:
            raise CompressionError("distill: none of distill.layers returned a tensor")
        return torch.stack(parts).mean()


def kept_channels(plan: Plan) -> dict[str, Tensor]:
    """Return, by module, the kept indices of its output's channels, where it loses some: the teacher's adapter."""
    made = {  # dimension 1 of a transposed convolution
        member.name: member.dim
        for group in plan.graph.groups
        for member in group.members
        if member.parameter == "weight" and member.role in ("out", "scale")
    }
    found = {}
    for name, dims in plan.slices().items():
        if made.get(name) in dims:
            found[name.rpartition(".")[0]] = torch.as_tensor(dims[made[name]])
    return found


def build_teacher(recipe: Recipe, loop: Loop, dense: Callable[[], nn.Module]) -> nn.Module:
    """Return the teacher: the dense model, or a user's function with a checkpoint."""
    settings = recipe.distill
    if settings.teacher == "dense":
        return loop.place(dense())
    from nni_plugins.training.resolve import call
    from nni_plugins.training.weights import load_weights

    made = call(settings.teacher, recipe.folder, "distill.teacher", **settings.teacher_arguments)
    if not isinstance(made, nn.Module):
        raise RecipeError(f"distill.teacher is {settings.teacher}: it returned {type(made).__name__}, not a module")
    if settings.teacher_checkpoint is not None:
        load_weights(made, recipe.path_of(settings.teacher_checkpoint))
    return loop.place(made)


class _Features(dict[str, Tensor]):
    """What named modules return during a run."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self._model, self._names, self._handles = model, names, list[Any]()

    def __enter__(self) -> _Features:
        modules = dict(self._model.named_modules()) if self._names else {}
        for name in self._names:
            if name in modules:
                self._handles.append(modules[name].register_forward_hook(self._hook(name)))
        return self

    def _hook(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self[name] = output

        return note

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()


def _logits(output: Any, whose: str) -> Tensor:
    """The first tensor that a model returns, which must be ``[batch, classes]``."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if found is None:
        found = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
    if found is None or found.dim() != 2:
        shape = "no tensor" if found is None else list(found.shape)
        raise CompressionError(f"distill: the {whose} returns {shape}; kd and dkd take [batch, classes], feature any")
    if found.shape[1] == 1:
        raise CompressionError(f"distill: the {whose} returns one number, whose softmax is always 1; take feature")
    return found
