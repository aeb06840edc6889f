"""What Taylor scores are made of: products of values and gradients, gathered while an evaluator trains.

Both collectors follow one life: ``attach`` registers hooks, ``end_of_minibatch`` closes a minibatch (several
backward passes of gradient accumulation count as one), ``reset`` begins anew. One that is not ``active`` sees
nothing, at no cost.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from nni.compression.utils.evaluator import ForwardHook, TensorHook
from torch import Tensor, nn

from nni_plugins.pruners.errors import PruningError
from nni_plugins.pruners.finite import all_finite

if TYPE_CHECKING:
    from nni.compression.utils.evaluator import Evaluator

Reduce = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class Moments:
    """Running moments over minibatches of first-order terms ``a = w·dL/dw`` and second-order ones ``k = w²·H``."""

    def __init__(self) -> None:
        self.count = 0
        self._square: dict[str, Tensor] = {}
        self._first: dict[str, Tensor] = {}
        self._second: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the count and the sums, which a checkpoint of the pruner holds."""
        return {"count": self.count, "square": self._square, "first": self._first, "second": self._second}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from a count and sums."""
        self.count = state["count"]
        self._square, self._first, self._second = (
            _placed(state[name], device) for name in ("square", "first", "second")
        )

    def add(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
        """Count one minibatch; one whose gradients are not finite (a skipped AMP step) is left out."""
        if not first:
            return
        names, values = list(first), _wide(first.values())
        squares = list(torch._foreach_mul(values, values))
        if not all_finite(squares):
            return
        self.count += 1
        _add(self._square, names, squares)
        if second:
            _add(self._first, names, values)
            _add(self._second, names, _wide(second[name] for name in names))

    def importance(self) -> dict[str, Tensor]:
        """Mean over minibatches of a², or of (−a + ½k)² with the mean curvature k."""
        n = max(self.count, 1)
        if not self._second:
            return {name: square / n for name, square in self._square.items()}
        return {
            name: square / n - self._first[name] / n * self._second[name] / n + (self._second[name] / n) ** 2 / 4
            for name, square in self._square.items()
        }


class WeightGradients:
    """Collects ``w·dL/dw`` of parameters, and for second order ``w²·H`` by Hutchinson's estimate of the diagonal.

    Parameters
    ----------
    parameters : mapping of str to torch.Tensor
        Leaves that training differentiates, by name.
    reduce : callable
        Turns elementwise products by parameter name into the quantities whose square is averaged: themselves,
        or signed sums for each unit.
    directions : callable, optional
        For second order: draws Rademacher signs for each element, by parameter name. Signs that are equal within
        a unit give the curvature of the unit's gate, independent ones that of each weight.
    probes : int
        Draws for each backward pass.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        reduce: Reduce,
        directions: Callable[[], dict[str, Tensor]] | None = None,
        probes: int = 1,
    ):
        self.active = True
        self.parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self.reduce, self.directions, self.probes = reduce, directions, probes
        self.reset()

    def reset(self) -> None:
        """Forget all minibatches."""
        self.moments = Moments()
        self._first: dict[str, Tensor] = {}
        self._second: dict[str, Tensor] = {}
        self._waiting: dict[str, Tensor] = {}
        self._in_step = False

    def state_dict(self) -> dict[str, Any]:
        """Return what was gathered since the last reset."""
        self._multiply()
        return {"moments": self.moments.state_dict(), "first": self._first, "second": self._second}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was gathered."""
        device = next((p.device for p in self.parameters.values()), torch.device("cpu"))
        self.moments.load_state_dict(state["moments"], device)
        self._first, self._second = _placed(state["first"], device), _placed(state["second"], device)

    def attach(self, evaluator: Evaluator) -> None:
        """Register on the evaluator: tensor hooks for first order, a loss patch for second order."""
        if self.directions is not None:
            evaluator.patch_loss(self._differentiate_twice)
        else:
            evaluator.register_hooks([TensorHook(p, name, self._hook(name)) for name, p in self.parameters.items()])
            evaluator.patch_optimizer_step(before_step_tasks=[self._before_step], after_step_tasks=[])

    def _hook(self, name: str) -> Callable[[list], Callable[[Tensor], None]]:
        def collect(gradient: Tensor) -> None:
            if self.active:
                _accumulate(self._waiting, name, gradient.detach())
                if self._in_step:
                    self._multiply()

        return lambda _: collect

    def _before_step(self) -> None:
        self._multiply()
        self._in_step = True  # what a closure differentiates within the step may see weights that change in it

    @torch.no_grad()
    def _multiply(self) -> None:
        """Multiply the gradients that have come since the weights last changed by the weights, all in one call."""
        if self._waiting:
            names, self._waiting, waiting = list(self._waiting), {}, self._waiting
            gradients = [g.to_dense() if g.is_sparse else g for g in waiting.values()]
            _add(self._first, names, list(torch._foreach_mul([self.parameters[name] for name in names], gradients)))

    def _differentiate_twice(self, loss: Tensor, _: Any) -> Tensor:
        assert self.directions is not None
        if not loss.requires_grad or not self.active:
            return loss
        names, leaves = list(self.parameters), list(self.parameters.values())
        gradients = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        for name, leaf, gradient in zip(names, leaves, gradients, strict=True):
            _accumulate(self._first, name, leaf.detach() * (0 if gradient is None else gradient.detach()))
        for _probe in range(self.probes):
            signs = self.directions()
            along = [
                g.mul(p.detach() * signs[n]).sum()
                for n, p, g in zip(names, leaves, gradients, strict=True)
                if g is not None
            ]
            try:
                curved = torch.autograd.grad(torch.stack(along).sum(), leaves, retain_graph=True, allow_unused=True)
            except RuntimeError as error:
                if "not implemented" not in str(error):
                    raise
                raise PruningError(_no_second_derivative(str(error))) from None
            for name, leaf, product in zip(names, leaves, curved, strict=True):
                value = leaf.detach() * signs[name] * (0 if product is None else product.detach())
                _accumulate(self._second, name, value / self.probes)
        return loss

    def end_of_minibatch(self) -> None:
        """Close a minibatch."""
        self._multiply()
        self._in_step = False
        self.moments.add(self.reduce(self._first), self.reduce(self._second) if self._second else {})
        self._first, self._second = {}, {}


class OutputGradients:
    """Collects |mean over positions of gradient × activation|, averaged over examples, at the output of modules.

    Parameters
    ----------
    modules : mapping of str to torch.nn.Module
        By name. Those whose output is no tensor with channels (an LSTM's is a tuple) are not seen.
    channels : mapping of str to collection of int
        How many channels the output of each may have.
    """

    def __init__(self, modules: Mapping[str, nn.Module], channels: Mapping[str, Collection[int]]):
        self.active = True
        self.modules, self.channels = modules, channels
        self.reset()

    def reset(self) -> None:
        """Forget all minibatches."""
        self.moments = Moments()
        self._now: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return what was gathered since the last reset."""
        return {"moments": self.moments.state_dict(), "now": self._now}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was gathered."""
        device = next((p.device for m in self.modules.values() for p in m.parameters()), torch.device("cpu"))
        self.moments.load_state_dict(state["moments"], device)
        self._now = _placed(state["now"], device)

    def attach(self, evaluator: Evaluator) -> None:
        """Register forward hooks, each of which hooks the gradient of the output it sees."""
        evaluator.register_hooks([ForwardHook(module, name, self._hook(name)) for name, module in self.modules.items()])

    def _hook(self, name: str) -> Callable[[list], Callable[[nn.Module, Any, Any], None]]:
        def watch(module: nn.Module, _: Any, output: Any) -> None:
            if not self.active or not isinstance(output, Tensor) or not output.requires_grad:
                return
            dim = _channel_dim(module, output, self.channels[name])
            if dim is None:
                return
            value = output.detach().clone()  # an activation in place may overwrite it

            def collect(gradient: Tensor) -> None:
                product = (value * gradient).movedim(dim, 1) if value.dim() > 1 else (value * gradient)[None]
                each = product.flatten(2).mean(2) if product.dim() > 2 else product
                _accumulate(self._now, name, each.abs().mean(0))

            output.register_hook(collect)

        return lambda _: watch

    def end_of_minibatch(self) -> None:
        """Close a minibatch."""
        # Moments averages squares, so that both collectors share one rule for leaving minibatches out
        self.moments.add({name: value.sqrt() for name, value in self._now.items()}, {})
        self._now = {}


def _no_second_derivative(why: str) -> str:
    fused = "scaled_dot_product" in why  # torch's fused attention has a first derivative only
    more = ", or train under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)" if fused else ""
    return f"order=2 needs second derivatives, and an operator has none ({why.rstrip('.')}); use order=1{more}"


def _channel_dim(module: nn.Module, output: Tensor, channels: Collection[int]) -> int | None:
    """The dimension of a module's output that has its channels; None where none has so many."""
    if isinstance(module, nn.modules.conv._ConvNd):
        likely = [-1 - len(module.kernel_size)]
    elif isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm):
        likely = [1]
    else:
        likely = [-1, 1]
    return next((d for d in likely if output.dim() >= abs(d) + (d > 0) and output.shape[d] in channels), None)


def _accumulate(into: dict[str, Tensor], name: str, value: Tensor) -> None:
    into[name] = into[name] + value if name in into else value


def _add(into: dict[str, Tensor], names: list[str], values: list[Tensor]) -> None:
    """Accumulate many at once; what is there is not changed in place where something new comes in."""
    if all(name in into for name in names):
        torch._foreach_add_([into[name] for name in names], values)
    else:
        for name, value in zip(names, values, strict=True):
            _accumulate(into, name, value)


def _wide(values: Iterable[Tensor]) -> list[Tensor]:
    """Half-precision values as float32: their squares would not fit."""
    return [value.float() if value.dtype in (torch.float16, torch.bfloat16) else value for value in values]


def _placed(values: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in values.items()}
