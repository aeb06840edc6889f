"""Masks on every parameter of a group: NNI's wrappers, made for any module and kept consistent.

NNI registers eleven classes for pruning, by exact name, and wraps leaf modules only. A channel group reaches
further: norms, scales, subclasses, parameters that stand bare in a block. Here the target spaces are made
directly, for whatever module owns the parameter; those of an earlier compressor are adopted.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from nni.compression.base.apply_method import pruning_apply_methods
from nni.compression.base.target_space import PruningTargetSpace, TargetType
from nni.compression.base.wrapper import ModuleWrapper
from torch import nn

from nni_plugins.pruners.errors import PruningError
from nni_plugins.pruners.scope import canonical_names

Targets = dict[str, PruningTargetSpace]


class KnowsTies(Protocol):
    """A channel graph, or whatever else knows which parameters are one tensor under several names."""

    @property
    def aliases(self) -> Mapping[str, list[str]]:
        """The other names of a parameter, by its first."""


class Tie:
    """Places that hold one parameter; NNI's wrapping gives each a copy, so they are tied again after unwrapping."""

    def __init__(self) -> None:
        self.places: list[tuple[nn.Module, str]] = []

    def restore(self) -> None:
        """Make every place hold the parameter of the first, once all of them are unwrapped."""
        held = [module._parameters.get(name) for module, name in self.places]
        if held and all(parameter is not None for parameter in held):
            for module, name in self.places[1:]:
                module._parameters[name] = held[0]


class Whole:
    """The model that a wrapper is part of; it is neither copied nor saved along with the wrapper."""

    def __init__(self, model: nn.Module | None = None):
        self._model = None if model is None else weakref.ref(model)

    def __call__(self) -> nn.Module | None:
        """The model, while it is there."""
        return None if self._model is None else self._model()

    def __deepcopy__(self, memo: dict[int, Any]) -> Whole:
        return self

    def __reduce__(self) -> tuple[type[Whole], tuple[()]]:
        return Whole, ()


_MASKED = "_masked_wrappers"


def refresh_uncalled(model: nn.Module, _: Any) -> None:
    """Before a model's forward: put masked parameters in place for those modules whose own forward may not be called.

    ``F.linear(x, self.fc.weight)`` never calls ``fc``, and nn.TransformerEncoderLayer calls none of its modules when it
    evaluates. In training, those are refreshed that the step before did not call, or whose parameters something read
    ahead of their call; otherwise all, at little cost.
    """
    training = model.training and torch.is_grad_enabled()
    for wrapper in model.__dict__.get(_MASKED, ()):
        if wrapper.read_ahead or not (training and wrapper.trained and wrapper.called):
            wrapper.refresh(training)
        wrapper.__dict__.update(called=False, trained=training)  # nn.Module looks long at what it is set


class MaskedWrapper(ModuleWrapper):
    """NNI's wrapper for a module of any kind, with a short way through where only parameters are masked."""

    def __init__(self, module: nn.Module, module_name: str):
        super().__init__(module, module_name)
        self._order = list(module._parameters)
        self.ties: list[Tie] = []
        self._uncalled: list[MaskedWrapper] = []
        self._known: list[tuple[str, str, PruningTargetSpace]] = []
        self._only_parameters = True
        self.whole = Whole()
        self.called = self.trained = self.read_ahead = False

    def refresh(self, training: bool) -> None:
        """Put the masked parameters in place, unless a quantiser does more to them."""
        if self.quantization_target_spaces or self.fused_modules or not hasattr(self.module, "_nni_wrapper"):
            return
        self.set_masked()
        if training and not self.read_ahead:
            for name in self.pruning_target_spaces:
                product = self.module._buffers.get(name)
                if product is not None and product.requires_grad:
                    product.register_hook(self._was_read)  # the module's own forward makes another

    def _was_read(self, _: torch.Tensor) -> None:
        self.__dict__["read_ahead"] = True

    def wrap(self) -> None:
        """Wrap as NNI does, and have the whole model see to modules that it does not call."""
        super().wrap()
        model = self.whole()
        if model is not None and model is not self.module:
            wrappers = model.__dict__.setdefault(_MASKED, [])
            if not wrappers:
                model.register_forward_pre_hook(refresh_uncalled)
            if self not in wrappers:
                wrappers.append(self)

    def _leave(self) -> None:
        model = self.whole()
        wrappers = [] if model is None else model.__dict__.get(_MASKED, [])
        if model is not None and self in wrappers:
            wrappers.remove(self)
            if not wrappers:
                del model.__dict__[_MASKED]
                for key, hook in list(model._forward_pre_hooks.items()):
                    if hook is refresh_uncalled:
                        del model._forward_pre_hooks[key]

    def serve(self, child: MaskedWrapper) -> None:
        """Refresh a child's parameters at each forward: its own is never called (MultiheadAttention's ``out_proj``)."""
        if child not in self._uncalled:
            self._uncalled.append(child)

    def _places(self) -> list[tuple[str, str, PruningTargetSpace]]:
        """The parameters with masks: name, name of the mask among the wrapper's buffers, target space."""
        if len(self._known) != len(self.pruning_target_spaces):
            self._known = [(name, space._mask_name, space) for name, space in self.pruning_target_spaces.items()]
            self._only_parameters = all(space.type is TargetType.PARAMETER for _, _, space in self._known)
        return self._known

    def set_masked(self) -> None:
        """Put the masked parameters where the module's forward reads them."""
        held = self.module._buffers  # wrapping puts them there; a module's own __setattr__ would look everywhere first
        own, masks = self._parameters, self._buffers  # NNI's target spaces take ten calls to find these
        for name, mask_name, space in self._places():
            value, mask = own.get(name), masks[mask_name]
            if value is None:
                value = space.target
            if mask is not None and value is not None:
                method = space._setting.get("apply_method")
                plain = method is None or method == "mul"
                value = value * mask if plain else pruning_apply_methods[method](value, space)
            if name in held:
                held[name] = value
            else:
                setattr(self.module, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module under its masks; inputs and outputs pass untouched unless another compressor targets them."""
        self.__dict__["called"] = True
        for child in self._uncalled:
            child.set_masked()
        self._places()
        if (
            self.quantization_target_spaces
            or self.distillation_target_spaces
            or self.fused_modules
            or not self._only_parameters
        ):
            return super().forward(*args, **kwargs)
        self.set_masked()
        return self.module_forward(*args, **kwargs)

    def unwrap(self) -> None:
        """Unwrap as NNI does, but with the very parameters, in their order, tied as they were."""
        if not hasattr(self.module, "_nni_wrapper"):
            return
        self._leave()
        super().unwrap()
        # NNI leaves the class's forward, bound to this module: a replica of DataParallel's would run this one
        if getattr(self.module.__dict__.get("forward"), "__func__", None) is type(self.module).forward:
            del self.module.__dict__["forward"]
        for name, space in self.pruning_target_spaces.items():
            if space.type is TargetType.PARAMETER and isinstance(space.target, nn.Parameter):
                self.module._parameters[name] = space.target
        # NNI puts the masked ones at the end, and an optimizer's saved state goes by the order
        held = self.module._parameters
        for name in [name for name in self._order if name in held] + [name for name in held if name not in self._order]:
            held[name] = held.pop(name)
        for tie in self.ties:
            tie.restore()


def attach_targets(
    model: nn.Module,
    graph: KnowsTies,
    names: Iterable[str],
    wrappers: Mapping[str, ModuleWrapper],
) -> tuple[dict[str, ModuleWrapper], Targets]:
    """Give each parameter a target space in the wrapper of its module.

    Parameters
    ----------
    model : torch.nn.Module
        Not wrapped at this moment.
    graph : ChannelGraph or SharedNames
        Knows which parameters are one tensor under several names.
    names : iterable of str
        Parameters' full names.
    wrappers : mapping of str to ModuleWrapper
        Those of earlier compressors, by module name; they and their target spaces are adopted.

    Returns
    -------
    wrappers : dict of str to ModuleWrapper
        The given ones and the new ones.
    targets : dict of str to PruningTargetSpace
        By the parameter's full name; tied ones under every name.
    """
    modules = dict(model.named_modules())
    canonical = canonical_names(model)
    result = dict(wrappers)
    targets: Targets = {}
    for name in names:
        tie, shared = Tie(), None
        for alias in (name, *graph.aliases.get(name, ())):
            module_name, _, parameter = alias.rpartition(".")
            module_name = canonical[module_name]
            place = (modules[module_name], parameter)
            alias = f"{module_name}.{parameter}" if module_name else parameter
            if alias in targets:
                continue
            if isinstance(place[0], torch.jit.ScriptModule):
                raise PruningError(
                    f"{module_name or 'the model'} is a TorchScript module, whose weights a pruner cannot mask: prune "
                    "the model before torch.jit.script or torch.jit.trace, or exclude what is joined to it"
                )
            wrapper = result.get(module_name) or MaskedWrapper(place[0], module_name)
            result[module_name] = wrapper
            if isinstance(wrapper, MaskedWrapper):
                wrapper.whole = Whole(model)
            wrapper.unfreeze()
            space = wrapper.pruning_target_spaces.get(parameter)
            if space is None:
                # NNI would clone it, and an optimizer that holds it would go on training what nobody uses
                own = shared if shared is not None else place[0]._parameters.get(parameter)
                if own is not None and parameter not in wrapper._parameters:
                    wrapper.register_parameter(parameter, own)
                space = PruningTargetSpace(wrapper, parameter, TargetType.PARAMETER, {"apply_method": "mul"})
                wrapper.pruning_target_spaces[parameter] = space
            shared = space.target if shared is None else shared
            targets[alias] = space
            tie.places.append(place)
            if isinstance(wrapper, MaskedWrapper):
                wrapper.ties.append(tie)
    for name in [name for name in result if name.endswith("out_proj")]:
        parent, child = name.rpartition(".")[0], result[name]
        if isinstance(modules[parent], nn.MultiheadAttention) and isinstance(child, MaskedWrapper):
            holder = result.setdefault(parent, MaskedWrapper(modules[parent], parent))
            if isinstance(holder, MaskedWrapper):
                holder.whole = Whole(model)
                holder.serve(child)
    return result, targets
