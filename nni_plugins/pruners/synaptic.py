"""Synaptic strength: a kernel matters as much as the scale of what it reads times its own norm.

Lin et al., Synaptic Strength for Convolutional Neural Network, NeurIPS 2018. A synapse is one kernel K[o, i] of a
layer; its strength is the scale of input i times ‖K[o, i]‖. The scale is that of the batch norm that the input comes
from, or where it comes from several places (a residual stream) or from no norm, its measured deviation. In training
the weight is s·K/‖K‖ with a strength s of its own for each kernel, and λΣ|s| is added to the loss; the norm's scale is
moved into s first where that changes nothing, and then kept at 1, or it would grow as s shrinks. Below one global
threshold synapses go; channels that nothing feeds or reads any more go with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from nni.compression.base.apply_method import mul_mask, pruning_apply_methods
from nni.compression.utils.evaluator import ForwardHook
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nni_plugins.pruners.config import check_whole
from nni_plugins.pruners.errors import PruningError
from nni_plugins.pruners.finite import all_finite
from nni_plugins.pruners.kernels import KernelPruner
from nni_plugins.pruners.life import Masks
from nni_plugins.pruners.loss_scale import LossProbe
from nni_plugins.pruners.ranks import averaged_over_ranks
from nni_plugins.pruners.schedule import Schedule
from nni_plugins.pruners.synapses import Synapse

_MEASURE_EVERY = 10  # steps between two measurements of what a layer reads


def synaptic_mul(target: Tensor, target_space: Any) -> Tensor:
    """NNI's ``mul``, of a weight in the form that strengths are trained in."""
    synapse: Synapse | None = target_space.__dict__.get("synapse")
    return mul_mask(target if synapse is None else synapse(target), target_space)


pruning_apply_methods["synaptic_mul"] = synaptic_mul


class Strengths(dict[str, Synapse]):
    """The synapses by weight, as something that has a state."""

    def state_dict(self) -> dict[str, Tensor]:
        """The strengths."""
        return {name: synapse.strength.detach() for name, synapse in self.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        for name, synapse in self.items():
            synapse.strength.copy_(state[name])


class SynapticStrengthPruner(KernelPruner):
    """Remove the kernels of least synaptic strength, and the channels that nothing feeds or reads then.

    Parameters
    ----------
    model : torch.nn.Module
        Model to prune.
    config_list : list of dict
        NNI's. It selects layers; ``sparse_ratio`` is the fraction of their kernels that goes (of a linear layer, of its
        weights), those of removed channels included.
    evaluator : nni Evaluator, optional
        Trains the strengths; without one they are taken as they are.
    training_steps : int
        Optimizer steps until the synapses are chosen; 0 to take the strengths as they are.
    existed_wrappers : dict, optional
        Given by ``from_compressor``.
    penalty : float
        λ: the weight of the strengths' L1 norm in the loss.
    rate : float
        Learning rate of the strengths (SGD with momentum 0.9, no weight decay).
    schedule : Schedule, str or dict, optional
        When to prune: once, after ``training_steps``, by default.
    **kwargs
        Those of :class:`~nni_plugins.pruners.kernels.KernelPruner`.

    Attributes
    ----------
    scores : dict of str to torch.Tensor
        The strengths at the last pruning, [rows, inputs] by the weight's full name.
    """

    _kept_state = ("strengths", "optimizer", "deviations", "_folded", "_pulls")

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict],
        evaluator: Any = None,
        training_steps: int = 1000,
        existed_wrappers: Any = None,
        *,
        penalty: float = 1e-4,
        rate: float = 0.01,
        schedule: Schedule | str | dict | None = None,
        **kwargs: Any,
    ):
        check_whole("training_steps", training_steps, 0)
        if not penalty >= 0 or not rate > 0:
            raise PruningError(f"penalty is {penalty} and rate {rate}; they must be at least 0, and above 0")
        self.needs_training = evaluator is not None and training_steps > 0
        self.training_steps, self.penalty, self.rate = training_steps, penalty, rate
        self.deviations: dict[str, Tensor] = {}
        self._fresh: dict[str, Tensor] = {}
        self._folded: dict[str, Tensor] = {}
        self._pulls: dict[str, Tensor] = {}  # of the penalty, for each unit of a strength: it changes slowly
        schedule = Schedule(interval_steps=training_steps) if schedule is None and training_steps else schedule
        super().__init__(model, config_list, evaluator, existed_wrappers, schedule=schedule, **kwargs)
        self.strengths = Strengths(
            {name: Synapse(layout, layout.norms(self._target(name))) for name, layout in self._layouts.items()}
        )
        self.optimizer = torch.optim.SGD([s.strength for s in self.strengths.values()], lr=rate, momentum=0.9)
        self._probe = LossProbe()

    # -- strengths -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _scale(self, name: str) -> Tensor:
        """The scale of what each synapse of a layer reads: of the layer's table, or one number."""
        weight, layout = self._target(name), self._layouts[name]
        norms = self._producers.readings[name].norms
        if norms:
            places = torch.as_tensor(norms[0][1], device=weight.device)
            values = torch.zeros(len(places), device=weight.device)
            for module, own in norms:
                places = torch.as_tensor(own, device=weight.device)
                gamma = self._live(f"{module}.weight").float().abs()
                values = torch.where(places >= 0, gamma[places.clamp_min(0)], values)
            return layout.of_inputs(values)
        measured = self.deviations.get(name)
        if measured is None or not measured.isfinite().all() or not measured.any():
            return torch.ones((), device=weight.device)
        return layout.of_inputs(measured.to(weight.device))

    @torch.no_grad()
    def _scores(self) -> dict[str, Tensor]:
        """The strength of each synapse, float32 [rows, inputs] by the weight's name."""
        scores = {}
        for name, layout in self._layouts.items():
            space = self._targets[name]
            trained: Synapse | None = getattr(space, "synapse", None)
            own = layout.norms(self._target(name)) if trained is None else trained.strength.detach().abs()
            scores[name] = own.float() * self._scale(name)
        return scores

    def _deviation_hook(self, name: str, steps: bool) -> Any:
        back = len(self._layouts[name].shape) - 1  # the channels' dimension, from the end

        def watch(module: nn.Module, inputs: Any, _: Any) -> None:
            if steps and (self.finished or not module.training or self._step % _MEASURE_EVERY):
                return
            if inputs and isinstance(inputs[0], Tensor):
                x = inputs[0].detach().float().movedim(-back, 0)
                self._fresh[name] = x.flatten(1).std(1, unbiased=False) if x.dim() > 1 else x.abs()

        return watch

    def _unscaled(self) -> list[str]:
        """The layers whose input has no one norm."""
        return [name for name in self._layouts if not self._producers.readings[name].norms]

    def _take_deviations(self) -> None:
        if self._fresh:
            fresh, self._fresh = averaged_over_ranks(self._fresh), {}
            for name, value in fresh.items():
                old = self.deviations.get(name)
                self.deviations[name] = value if old is None else (old.to(value) + value) / 2

    @torch.no_grad()
    def _measure_on_dummy(self) -> None:
        """Without training, what layers read is measured on the dummy input."""
        model, modules = self.bound_model, dict(self.bound_model.named_modules())
        handles = [
            modules[name.rpartition(".")[0]].register_forward_hook(self._deviation_hook(name, steps=False))
            for name in self._unscaled()
        ]
        training = [(module, module.training) for module in model.modules()]
        device = next(model.parameters()).device
        given = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, self._dummy_input)
        try:
            model.eval()
            if isinstance(given, dict):
                model(**given)
            else:
                model(*given) if isinstance(given, (tuple, list)) else model(given)
        finally:
            for handle in handles:
                handle.remove()
            for module, mode in training:
                module.training = mode
        self._take_deviations()

    # -- training ------------------------------------------------------------------------------------------------

    def _watch_training(self, evaluator: Any) -> None:
        if not self.needs_training:
            return  # a schedule over weights as they are trained
        if self._step == 0:
            self._fold_norms()
        for name, synapse in self.strengths.items():
            if self._step == 0:
                with torch.no_grad():
                    synapse.strength.copy_(synapse.layout.norms(self._target(name)))
            for alias in (name, *self.graph.aliases.get(name, ())):
                self._targets[alias].synapse = synapse
                self._targets[alias].apply_method = "synaptic_mul"
        modules = dict(self.bound_model.named_modules())
        hooks = [
            ForwardHook(modules[name.rpartition(".")[0]], name, lambda _, n=name: self._deviation_hook(n, steps=True))
            for name in self._unscaled()
        ]
        evaluator.register_hooks(hooks)
        self._probe.attach(evaluator)

    @torch.no_grad()
    def _fold_norms(self) -> None:
        """Move the scales of norms into the layers that read them, where that changes nothing: γ > 0, β goes to β/γ."""
        for norm in self._producers.foldable():
            gamma, beta = self._live(f"{norm}.weight"), self._live(f"{norm}.bias")
            fit = gamma > 1e-3 * gamma.abs().max()
            factor = torch.where(fit, gamma, 1.0)
            for name, reading in self._producers.readings.items():
                for module, own in reading.norms:
                    if module == norm:
                        places = torch.as_tensor(own, device=gamma.device)
                        values = torch.where(places >= 0, factor[places.clamp_min(0)], 1.0)
                        layout, weight = self._layouts[name], self._target(name)
                        weight.mul_(layout.wide(layout.of_inputs(values).to(weight)))
            beta.div_(factor)
            gamma[fit] = 1.0
            self._folded[norm] = fit

    def _after_step(self) -> None:
        if not self.finished and self.needs_training:
            self._train_strengths()
        super()._after_step()

    @torch.no_grad()
    def _train_strengths(self) -> None:
        """One step of the strengths; a step whose gradients are not finite is left out."""
        self._take_deviations()
        named = {n: s.strength for n, s in self.strengths.items() if s.strength.grad is not None}
        scale = self._probe.take()
        found = {name: strength.grad for name, strength in named.items() if strength.grad is not None}
        averaged_over_ranks({**found, "": scale})
        gradients = list(found.values())
        if gradients and all_finite(torch._foreach_abs(gradients)):
            if self._step % _MEASURE_EVERY == 0 or not self._pulls:
                self._pulls = {name: self.penalty * self._scale(name) for name in self._layouts}
            if scale != 1:
                torch._foreach_div_(gradients, float(scale))
            pulls = [self._pulls[name].to(gradient) for name, gradient in found.items()]
            signs = torch._foreach_sign([strength.detach() for strength in named.values()])
            torch._foreach_add_(gradients, torch._foreach_mul(pulls, signs))
            self.optimizer.step()
        self.optimizer.zero_grad()
        for norm, fit in self._folded.items():
            gamma = self._live(f"{norm}.weight")
            gamma.masked_fill_(fit.to(gamma.device), 1.0)

    # -- choosing ------------------------------------------------------------------------------------------------

    def prune(self, fraction: float = 1.0) -> Masks:
        """Set masks so that ``fraction`` of the asked sparsity is removed; the last time, make the weights plain."""
        if not self.needs_training:
            self._measure_on_dummy()
        masks = super().prune(fraction)
        if fraction >= 1:
            self._make_plain()
        return masks

    @torch.no_grad()
    def _make_plain(self) -> None:
        """Write the strengths into the weights."""
        done = set()
        for space in self._targets.values():
            synapse, target = space.__dict__.pop("synapse", None), space.target
            if synapse is not None and target is not None:
                space.apply_method = "mul"
                if id(target) not in done:
                    target.copy_(synapse(target))
                    done.add(id(target))
