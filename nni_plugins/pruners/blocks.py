"""Depth: whole blocks go, those that do least.

By block influence (Men et al., ShortGPT, 2024), by the first-order Taylor expansion in a gate on the block, or by what
the evaluator's metric loses without the block. A masked block is one whose parameters are all zero, so that it adds
nothing; a speedup takes it out, and with it the norm in front of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nni_plugins.channels import ChannelGraph, Plan
from nni_plugins.pruners.block_scores import BlockWatcher
from nni_plugins.pruners.config import check_choice, check_whole, checked_config, dummy_input_of
from nni_plugins.pruners.errors import BudgetError, PruningError
from nni_plugins.pruners.life import Masks, PrunerBase
from nni_plugins.pruners.ranks import as_on_rank_zero, averaged_over_ranks
from nni_plugins.pruners.schedule import Schedule, as_schedule
from nni_plugins.pruners.scope import _selected as selected_modules
from nni_plugins.pruners.scope import canonical_names, entry_setting
from nni_plugins.pruners.targets import latency_table
from nni_plugins.pruners.wrapping import attach_targets

if TYPE_CHECKING:
    from nni_plugins.channels.blocks import Block
    from nni_plugins.channels.latency import LatencyTable

_MOST_INFLUENCE = 2.0  # one minus a cosine
SCORES = ("influence", "taylor", "loss")
TARGETS = ("blocks", "macs", "params", "latency")


class BlockPruner(PrunerBase):
    """Remove whole blocks: residual blocks, branches of transformer blocks, experts.

    Parameters
    ----------
    model : torch.nn.Module
        Model to prune.
    config_list : list of dict
        NNI's. An entry selects, by name or type, the modules that are blocks (``{'op_types': ['BasicBlock'],
        'sparse_ratio': 0.25}``). ``sparse_ratio`` is the fraction to remove of what ``target`` counts, over the blocks
        of the entry or, with a single entry, over the whole model; of ``blocks``, 1 removes all of the entry's.
        ``sparse_threshold`` removes those that score lower. A block that holds one of ``exclude_op_names`` stays.
    evaluator : nni Evaluator, optional
        Trains while influence or Taylor scores are gathered, or evaluates for ``loss``. Without one, the influence is
        that on the dummy input.
    training_steps : int
        Minibatches (optimizer steps) that a score is averaged over.
    existed_wrappers : dict, optional
        Given by ``from_compressor``.
    score : {'influence', 'taylor', 'loss'}
        1 − cosine of the stream before and after (2 where a block reads another shape than it adds to); squared
        first-order change of the loss; or how much the evaluator's metric (the higher the better, as NNI has it) falls
        without the block.
    target : {'blocks', 'macs', 'params', 'latency'}
        What the sparsity is a fraction of. Blocks are coarse: at least as much goes as is asked, and of ``blocks`` the
        nearest number.
    dummy_input : tensor, tuple or dict, optional
        What the model is watched on; the evaluator's by default.
    schedule : Schedule, str or dict, optional
        When to prune; one shot, after ``training_steps``, by default.
    latency : LatencyTable, optional
        For the target latency: a table of this model, if one is at hand.

    Attributes
    ----------
    blocks : list of Block
        The blocks that may go, in the order in which they are called.
    scores : dict of str to torch.Tensor
        Importance by block, float64, at the last pruning.
    plan : Plan
        ``plan.blocks`` are gone.

    Raises
    ------
    PruningError
        The configuration selects no block that can go.
    BudgetError
        From ``compress``: the budget cannot be met.
    """

    _kept_state = ("scores", "_gone", "_watcher")

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict],
        evaluator: Any = None,
        training_steps: int = 30,
        existed_wrappers: Any = None,
        *,
        score: str = "influence",
        target: str = "blocks",
        dummy_input: Any = None,
        schedule: Schedule | str | dict | None = None,
        latency: LatencyTable | None = None,
    ):
        check_choice("score", score, SCORES)
        check_choice("target", target, TARGETS)
        check_whole("training_steps", training_steps)
        if evaluator is None and score != "influence":
            raise PruningError(f"score={score!r} needs an evaluator; without one, use score='influence'")
        self.score, self.target, self.scores = score, target, dict[str, Tensor]()
        self.training_steps = training_steps
        self.needs_training = score != "loss" and evaluator is not None
        one_shot = Schedule(interval_steps=training_steps) if self.needs_training else Schedule()
        self._begin(one_shot if schedule is None else as_schedule(schedule))
        self.config_asked = checked_config(config_list)
        self._dummy_input = dummy_input = dummy_input_of(dummy_input, evaluator)
        self.graph = ChannelGraph.watch(model, dummy_input).rehearsed_blocks(model, dummy_input)
        asked = enumerate(self.config_asked)
        self.settings = [entry_setting(entry, f"config_list[{index}]", blocks=True) for index, entry in asked]
        self.owner = self._resolve(model)
        self.latency = latency_table(self.graph, model, dummy_input, latency) if target == "latency" else None
        names = sorted(
            {n for name in self.owner for n in self.graph.block(name).gone if not self.graph.is_buffer[n]}
        )  # fmt: skip
        wrappers, self._targets = attach_targets(model, self.graph, names, existed_wrappers or {})
        super().__init__(model, [], evaluator, wrappers)
        self.config_list = self.config_asked
        self._watcher = BlockWatcher(model, self.graph, self.blocks, "taylor" if score == "taylor" else "influence")
        self._gone = [block.name for block in self.blocks if self._is_masked(block)]

    @property
    def blocks(self) -> list[Block]:
        """The blocks that may go."""
        return [block for block in self.graph.blocks if block.name in self.owner]

    @property
    def _gone(self) -> list[str]:
        return list(self.plan.blocks)

    @_gone.setter
    def _gone(self, names: Sequence[str]) -> None:
        self.plan = Plan(self.graph, {}, names)

    def _resolve(self, model: nn.Module) -> dict[str, int]:
        """The entry that asks for each block."""
        canonical, owner = canonical_names(model), dict[str, int]()
        known = {block.name: block for block in self.graph.blocks}
        for index, entry in enumerate(self.config_asked):
            chosen = [canonical[name] for name in selected_modules(model, entry, f"config_list[{index}]")]
            reasons = {name: known[name].reason if name in known else "it is no block" for name in chosen}
            # what an entry names as excluded stays, and so does what it is a part of
            guards = {n: g for g in entry.get("exclude_op_names", ()) for n in chosen if f"{g}.".startswith(f"{n}.")}
            reasons.update({name: f"{guard} is excluded, and goes with it" for name, guard in guards.items()})
            found = [n for n in chosen if n in known and known[n].exact and n not in owner and n not in guards]
            owner.update(dict.fromkeys(found, index))
            if not found and self.settings[index].get("sparse_ratio") != 0:
                shown = "; ".join(f"{name}: {why}" for name, why in list(reasons.items())[:3]) or "no module fits"
                some = ", ".join([block.name for block in known.values() if block.exact][:3]) or "none"
                raise PruningError(f"config_list[{index}] selects no block that can go: {shown}. Blocks are: {some}")
        return owner

    def _is_masked(self, block: Block) -> bool:
        spaces = [self._targets[name] for name in block.parameters if name in self._targets]
        return bool(spaces) and all(space.mask is not None and not space.mask.any() for space in spaces)

    # -- scores --------------------------------------------------------------------------------------------------

    def _watch_training(self, evaluator: Any) -> None:
        if self.score != "loss":
            self._watcher.active = self._due_within(self.training_steps)
            evaluator.register_hooks(self._watcher.hooks())

    def _after_step(self) -> None:
        if self.score != "loss" and self._watcher.active:
            self._watcher.end_of_minibatch()
        super()._after_step()
        self._watcher.active = self._due_within(self.training_steps)

    def _scores(self) -> dict[str, Tensor]:
        if self.score == "loss":
            return self._lost_without()
        if self.evaluator is None:
            self._run_dummy_input()
        found = self._watcher.scores()
        self._watcher.reset()
        for name in self._watcher.reshaping - set(found):
            # what reads another shape than it adds to (the main path of a strided block) goes last
            device = next(self.bound_model.parameters()).device
            found[name] = torch.tensor(_MOST_INFLUENCE, dtype=torch.float64, device=device)
        missing = [block.name for block in self.blocks if block.name not in found and block.name not in self._gone]
        for name in missing if found else ():
            if self._is_expert(name, found):  # the router sent nothing to it
                found[name] = torch.zeros((), dtype=torch.float64, device=next(iter(found.values())).device)
        missing = [name for name in missing if name not in found]
        if missing:
            raise PruningError(f"{missing[0]}: no {self.score} was seen of it; does training call it, and step()?")
        return found

    def _is_expert(self, name: str, seen: Mapping[str, Tensor]) -> bool:
        """Whether a block is one of several of a kind beside each other, of which others were called."""
        kind, place = type(self.bound_model.get_submodule(name)), name.rpartition(".")[0]
        return self.graph.block(name).kind == "branch" and any(
            other.rpartition(".")[0] == place and type(self.bound_model.get_submodule(other)) is kind for other in seen
        )

    @torch.no_grad()
    def _run_dummy_input(self) -> None:
        from nni_plugins.channels.watch import as_arguments

        hooks, mode = self._watcher.hooks(), self.bound_model.training
        for hook in hooks:
            hook.register()
        try:
            args, kwargs = as_arguments(self._dummy_input)
            self._watcher.active = True
            self.bound_model.eval()(*args, **kwargs)
        finally:
            self.bound_model.train(mode)
            for hook in hooks:
                hook.remove()
        self._watcher.end_of_minibatch()

    def _lost_without(self) -> dict[str, Tensor]:
        """What the evaluator's metric loses where one more block is masked."""
        with_all = self._evaluate()
        scores = {}
        for block in self.blocks:
            if block.name in self._gone or any(block.name.startswith(f"{name}.") for name in self._gone):
                continue
            before = self._mask([block.name])
            scores[block.name] = torch.tensor(with_all - self._evaluate(), dtype=torch.float64)
            self.update_masks(before)
        return scores

    def _evaluate(self) -> float:
        evaluator, modes = self.evaluator, [(module, module.training) for module in self.bound_model.modules()]
        bound = evaluator.model is not None
        if not bound:
            evaluator.bind_model(self.bound_model, self._get_param_names_map())
        try:
            metric = evaluator.evaluate()
        finally:
            if not bound:
                evaluator.unbind_model()
            for module, mode in modes:
                module.training = mode
        metric = metric[0] if isinstance(metric, tuple) else metric
        if not isinstance(metric, (int, float)):
            raise PruningError(f"score='loss': the evaluator's metric is {metric!r}; give it an evaluating_func")
        return float(metric)

    # -- selection and masks -------------------------------------------------------------------------------------

    def prune(self, fraction: float = 1.0) -> Masks:
        """Score, select and set masks so that ``fraction`` of the asked sparsity is removed; return the masks."""
        self.scores = averaged_over_ranks(self._scores())
        order = sorted(self.scores, key=lambda name: (float(self.scores[name]), name))
        for pool in self._pools():
            chosen = self._choose(pool, [name for name in order if self.owner[name] in pool], fraction)
            self._gone = as_on_rank_zero(chosen) if self.target == "latency" else chosen
        masks: Masks = {}
        for name in sorted(self.plan.removal.parameters):
            for alias in (name, *self.graph.aliases.get(name, ())):
                space = self._targets.get(alias)
                if space is not None and space.target is not None:
                    zeros = torch.zeros_like(space.target, requires_grad=False)
                    masks.setdefault(space._wrapper.name, {})[space._target_name] = zeros
        self.update_masks(masks)
        return masks

    def _mask(self, blocks: Sequence[str]) -> Masks:
        """Mask blocks for a while; return the masks as they were."""
        before: Masks = {}
        after: Masks = {}
        for name in {n for block in blocks for n in self.graph.block(block).parameters} & set(self._targets):
            space = self._targets[name]
            if space.mask is not None:
                before.setdefault(space._wrapper.name, {})[space._target_name] = space.mask.clone()
                after.setdefault(space._wrapper.name, {})[space._target_name] = torch.zeros_like(space.mask)
        self.update_masks(after)
        return before

    def _pools(self) -> list[list[int]]:
        """Entries that share a budget."""
        pools: dict[Any, list[int]] = {}
        for index, setting in enumerate(self.settings):
            shared = setting.get("global_group_id")
            pools.setdefault(("entry", index) if shared is None else ("id", shared), []).append(index)
        return list(pools.values())

    def _choose(self, pool: list[int], order: Sequence[str], fraction: float) -> list[str]:
        """The blocks that are gone then: those that are, and of this pool as many as it takes, the least first."""
        setting = self.settings[pool[0]]
        gone, chosen, threshold = self._gone, list[str](), setting.get("sparse_threshold")
        asked = (setting.get("sparse_ratio") or 0.0) * fraction
        budget = _Budget(self, pool, asked)
        for name in order:
            if float(self.scores[name]) >= threshold if threshold is not None else budget.met([*gone, *chosen]):
                break
            if self._can_go([*gone, *chosen, name]):
                chosen.append(name)
        if threshold is not None:
            return [*gone, *chosen]
        if not budget.met([*gone, *chosen]):
            reached = budget.removed([*gone, *chosen])
            raise BudgetError(
                f"config_list[{pool[0]}]: sparsity {asked:g} of {self.target} is out of reach: without all of the "
                f"{len(chosen)} blocks that can go, {reached:.4g} is removed",
                asked,
                reached,
            )
        for name in reversed(chosen[:-1]):  # those that were not needed after all, the most important first
            fewer = [other for other in chosen if other != name]
            if budget.met([*gone, *fewer]):
                chosen = fewer
        return [*gone, *chosen]

    def _can_go(self, names: Sequence[str]) -> bool:
        try:
            Plan(self.graph, {}, names)
        except ValueError:
            return False
        return True


class _Budget:
    """How much is removed of what entries share a budget of, without some blocks."""

    def __init__(self, pruner: BlockPruner, pool: Sequence[int], asked: float):
        self.pruner, self.asked = pruner, asked
        self.own = [block.name for block in pruner.blocks if pruner.owner[block.name] in pool]
        self.whole = len(pruner._pools()) == 1
        self.dense = self._cost(())

    def removed(self, names: Sequence[str]) -> float:
        """The fraction that is removed without these blocks."""
        return 1 - self._cost(names) / self.dense if self.dense else 1.0

    def met(self, names: Sequence[str]) -> bool:
        """Whether that is enough."""
        if self.pruner.target == "blocks":  # their number is whole: the nearest one
            return round(self.removed(names) * len(self.own)) >= int(self.asked * len(self.own) + 0.5)
        return self.removed(names) >= self.asked - 1e-9

    def _cost(self, names: Sequence[str]) -> float:
        """What is left, of the whole model or of these entries' blocks."""
        pruner, plan = self.pruner, Plan(self.pruner.graph, {}, names)
        if pruner.target == "blocks":
            return float(sum(not plan.removal.holds(name) for name in self.own))
        rest = 0.0
        if pruner.latency is not None:
            costs = {name: ms for name, ms in pruner.latency.modules().items() if not plan.removal.holds(name)}
            rest = pruner.latency.overhead_ms
        else:
            position = 0 if pruner.target == "macs" else 1
            costs = {name: float(cost[position]) for name, cost in plan.cost().modules.items()}
        if self.whole:
            return sum(costs.values()) + rest
        return sum(
            cost for name, cost in costs.items() if any(f"{name}.".startswith(f"{block}.") for block in self.own)
        )
