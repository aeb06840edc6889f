"""What a pruner must see of a training run at some steps only: dense gradients, and the optimizers.

Under NNI's ``mul`` the gradient of a masked weight is zero; that of the product ``weight * mask``, which the module
computes with, is the dense one. It is local to the process, and scaled where a GradScaler scales the loss.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from nni_plugins.pruners.ranks import averaged_over_ranks

if TYPE_CHECKING:
    from nni.compression.base.target_space import PruningTargetSpace


class DenseGradients:
    """Adds up the gradients of masked products over the backward passes of one optimizer step, while it is on.

    Parameters
    ----------
    places : mapping of str to list of PruningTargetSpace
        By the parameter's name: the target spaces that hold it (several, where it is tied).
    callers : mapping of torch.nn.Module to torch.nn.Module, optional
        For a module whose own forward is never called (``out_proj`` of MultiheadAttention): the one that reads it.
    """

    def __init__(
        self,
        places: Mapping[str, list[PruningTargetSpace]],
        callers: Mapping[nn.Module, nn.Module] | None = None,
    ):
        self.places, self.callers = places, callers or {}
        self._handles: list[RemovableHandle] = []
        self._sums: dict[str, Tensor] = {}

    @property
    def on(self) -> bool:
        """Whether gradients are being collected."""
        return bool(self._handles)

    def start(self) -> None:
        """Begin to collect; costs one extra hook on each weight while it is on, and nothing while it is off."""
        self._sums = {}
        if self.on:
            return
        for name, spaces in self.places.items():
            for space in spaces:
                module = space._wrapper.module
                caller = self.callers.get(module, module)
                self._handles.append(caller.register_forward_hook(self._forward_hook(name, module, space._target_name)))

    def stop(self) -> None:
        """Collect no more, and forget."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._sums = [], {}

    def _forward_hook(self, name: str, module: nn.Module, target: str) -> Callable[..., None]:
        # a copy of the model (an average of its weights) has a copy of the hook, but other modules
        alive = weakref.ref(self)
        own = weakref.ref(self.callers.get(module, module))

        def hook(called: nn.Module, *_: Any) -> None:
            product, this = getattr(module, target, None), alive()
            if this is not None and called is own() and product is not None and product.requires_grad:
                product.register_hook(lambda gradient: this._add(name, gradient))

        return hook

    def _add(self, name: str, gradient: Tensor) -> None:
        if self.on:
            value = gradient.detach().to_dense().float() if gradient.is_sparse else gradient.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()

    def collected(self) -> dict[str, Tensor] | None:
        """Gradients of the step, by name, averaged over processes; None where they are not finite.

        A step that a GradScaler skips leaves infinite ones behind; all processes see that alike. Their scale is the
        loss's. A parameter that no process has a gradient of is absent.
        """
        full = {
            name: self._sums.get(name, torch.zeros_like(spaces[0].target, dtype=torch.float32).detach())
            for name, spaces in self.places.items()
        }
        averaged_over_ranks(full)
        peaks = {name: value.abs().amax() for name, value in full.items() if value.numel()}
        if not torch.isfinite(torch.stack([peak.cpu() for peak in peaks.values()])).all():
            return None
        return {name: full[name] for name, peak in peaks.items() if peak > 0}


class OptimizersOf:
    """Finds the optimizers that step some parameters, whoever made them, at their next steps.

    Evaluators make their optimizers anew for the wrapped model, and some inside a trainer; torch tells of every step.

    Parameters
    ----------
    parameters : callable
        Returns the parameters.
    """

    def __init__(self, parameters: Callable[[], Iterable[Tensor]]):
        self._parameters = parameters
        self._found: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._strangers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._handle: RemovableHandle | None = None

    def watch(self) -> None:
        """Begin to look; ends by itself when every parameter that is trained has been seen."""
        self.stop()
        self._found, self._strangers = weakref.WeakSet(), weakref.WeakSet()
        alive = weakref.ref(self)

        def stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            this = alive()
            if this is None:
                handle.remove()
            else:
                this._seen(optimizer)

        handle = self._handle = register_optimizer_step_post_hook(stepped)

    def stop(self) -> None:
        """Look no more; what was found is kept."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _seen(self, optimizer: torch.optim.Optimizer) -> None:
        if optimizer in self._found or optimizer in self._strangers:
            return
        wanted = {id(p) for p in self._parameters() if p.requires_grad}
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        (self._found if wanted & held else self._strangers).add(optimizer)
        for known in self._found:
            wanted -= {id(p) for group in known.param_groups for p in group["params"]}
        if not wanted:
            self.stop()

    def holding(self, parameter: Tensor) -> list[torch.optim.Optimizer]:
        """The optimizers that have a state for a parameter."""
        return [optimizer for optimizer in self._found if parameter in optimizer.state]
