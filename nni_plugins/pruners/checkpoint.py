"""What a pruner must remember so that training goes on from a checkpoint as if it had never stopped.

A pruner's state is saved beside those of the model and the optimizer, after an optimizer step::

    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "pruner": pruner.state_dict()}, path)

and read back into a pruner made in the same way. It is made of tensors, numbers, strings and containers
of them, so that ``torch.load(path, weights_only=True)`` reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.pruners.errors import PruningError

_KEYS = ("pruner", "step", "finished", "masks", "attributes", "objects", "generator")
_PLAIN = (type(None), bool, int, float, str)


class Checkpointed:
    """Mix-in of pruners: ``state_dict`` and ``load_state_dict``.

    A class names in ``_kept_state`` the attributes that change while it prunes; those of its bases are kept too.
    An attribute (or property with a setter) holds tensors, numbers, strings, or lists, tuples and dictionaries of
    them; or it is an object with a ``state_dict`` and ``load_state_dict`` of its own, such as an optimizer, which must
    exist from the constructor on. ``_step``, ``finished``, the masks and the random ``_generator`` are always kept.
    """

    _kept_state: tuple[str, ...] = ()

    @classmethod
    def _all_kept_state(cls) -> list[str]:
        names = (name for base in reversed(cls.__mro__) for name in base.__dict__.get("_kept_state", ()))
        return list(dict.fromkeys(names))

    def state_dict(self) -> dict[str, Any]:
        """Return what the pruner must remember: a copy, which further pruning does not change.

        Returns
        -------
        dict
            ``pruner``, the name of the class; ``step`` and ``finished``; ``masks``, NNI's ``{module: {target: mask}}``;
            ``attributes`` and ``objects``, what the method itself keeps; ``generator``, the state of its random
            numbers, or None.
        """
        values = {name: getattr(self, name) for name in self._all_kept_state()}
        objects = {name for name, value in values.items() if hasattr(value, "load_state_dict")}
        generator = getattr(self, "_generator", None)
        return {
            "pruner": type(self).__name__,
            "step": getattr(self, "_step", 0),
            "finished": getattr(self, "finished", False),
            "masks": {module: dict(targets) for module, targets in self.get_masks().items()},  # type: ignore[attr-defined]
            "attributes": {name: _copied(value, name) for name, value in values.items() if name not in objects},
            "objects": {name: _copied(values[name].state_dict(), name) for name in values if name in objects},
            "generator": None if generator is None else generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. ``compress()`` then trains for the steps that are left.

        Load the pruner's state before the model's: a module's mask is part of what the wrapped model saves.

        Parameters
        ----------
        state : mapping
            From ``state_dict`` of a pruner of the same class and configuration on the same model.

        Raises
        ------
        PruningError
            The state is of another class, or does not fit the model. Nothing is changed then.
        """
        self._check_state(state)
        where = _device(self)
        self.update_masks(state["masks"])  # type: ignore[attr-defined]
        for name, value in state["attributes"].items():
            setattr(self, name, _copied(value, name, where, getattr(self, name, None)))
        for name, value in state["objects"].items():
            getattr(self, name).load_state_dict(_copied(value, name))
        if state["generator"] is not None:
            self._generator.set_state(state["generator"].cpu())  # type: ignore[attr-defined]
        self._step, self.finished = int(state["step"]), bool(state["finished"])

    def _check_state(self, state: Mapping[str, Any]) -> None:
        own = type(self).__name__
        if not isinstance(state, Mapping) or any(key not in state for key in _KEYS):
            raise PruningError(f"this is no state of a pruner; give {own} what its state_dict() returned")
        if state["pruner"] != own:
            raise PruningError(f"the state is of {state['pruner']}, this is {own}; make the pruner that was saved")
        names, given = set(self._all_kept_state()), {*state["attributes"], *state["objects"]}
        if names != given:
            raise PruningError(
                f"the state of {own} lacks or adds {', '.join(sorted(names ^ given))}; it is of another version"
            )
        for name in state["objects"]:
            if not hasattr(getattr(self, name), "load_state_dict"):
                raise PruningError(f"{own}.{name} has a state but is not set up yet; make the pruner as the saved one")
        if (state["generator"] is None) != (getattr(self, "_generator", None) is None):
            raise PruningError(f"the state of {own} and this one differ in whether they draw random numbers")
        here, there = _shapes(self.get_masks()), _shapes(state["masks"])  # type: ignore[attr-defined]
        for name in sorted({*here, *there}):
            if name not in here or name not in there:
                place = "the state, not here" if name in there else "this pruner, not in the state"
                raise PruningError(f"{name} is a target of {place}; give the configuration and model that were saved")
            if here[name] is not None and there[name] is not None and here[name] != there[name]:
                raise PruningError(
                    f"{name}: the saved mask has shape {list(there[name])}, this model's {list(here[name])}; "
                    "give the model that was saved"
                )


class Planned:
    """Mix-in of pruners that keep a ``plan`` of channels: it is part of their state."""

    graph: ChannelGraph
    plan: Plan
    _kept_state: tuple[str, ...] = ("_kept_units",)

    @property
    def _kept_units(self) -> dict[str, list[int]]:
        """The plan as plain numbers."""
        return {name: units.tolist() for name, units in self.plan.kept.items()}

    @_kept_units.setter
    def _kept_units(self, kept: dict[str, list[int]]) -> None:
        self.plan = Plan(self.graph, kept)


def _shapes(masks: Mapping[str, Mapping[str, Tensor | None]]) -> dict[str, Any]:
    return {
        f"{module}.{target}" if module else target: None if mask is None else tuple(mask.shape)
        for module, targets in masks.items()
        for target, mask in targets.items()
    }


def _device(pruner: Any) -> torch.device:
    """The device of the pruner's model."""
    tensors: Iterator[Tensor] = pruner.bound_model.parameters()
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _copied(value: Any, name: str, device: torch.device | None = None, like: Any = None) -> Any:
    """A copy of tensors in containers; with a device, there, or where the present value ``like`` is."""
    if isinstance(value, Tensor):
        if device is None:
            return value.detach().clone()
        return value.detach().to(like.device if isinstance(like, Tensor) else device, copy=True)
    if isinstance(value, Mapping):
        known = like if isinstance(like, Mapping) else {}
        return {key: _copied(item, name, device, known.get(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        copies = [_copied(item, name, device) for item in value]
        return copies if isinstance(value, list) else tuple(copies)
    if not isinstance(value, _PLAIN):
        raise PruningError(f"{name} holds a {type(value).__name__}; a pruner's state is made of tensors and numbers")
    return value
