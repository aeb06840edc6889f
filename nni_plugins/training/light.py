"""torch's optimizers without torch's compiler.

Each method of a torch optimizer tells the compiler to leave it alone, and for that imports it: one to two seconds
before the first step, which a trial of a few seconds does not have. The same methods, unwrapped, do the same.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

METHODS = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


@functools.cache
def light(cls: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """Return a subclass of an optimizer class that computes the same and starts sooner."""
    plain_step = inspect.unwrap(cls.step)

    def step(self: torch.optim.Optimizer, closure: Any = None) -> Any:
        with torch.set_grad_enabled(self.defaults.get("differentiable", False)):
            return plain_step(self, closure)

    names: dict[str, Any] = {name: inspect.unwrap(getattr(cls, name)) for name in METHODS}
    return type(cls.__name__, (cls,), {**names, "step": step, "__doc__": cls.__doc__, "__module__": __name__})
