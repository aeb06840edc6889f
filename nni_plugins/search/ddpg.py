"""DDPG: a deterministic policy in [0, 1] and its critic, learnt from replayed steps.

Lillicrap et al., "Continuous control with deep reinforcement learning", ICLR 2016, with the sizes and rates of He et
al., "AMC: AutoML for model compression", ECCV 2018, section 3.3: two layers of 300, a sigmoid at the end, rates 1e-4
(policy) and 1e-3 (critic), soft targets with tau 0.01, discount 1, batches of 64, rewards less an exponential baseline.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nni_plugins.files import write_whole

HIDDEN, TAU, DISCOUNT, BATCH, BASELINE = 300, 0.01, 1.0, 64, 0.5
ACTOR_RATE, CRITIC_RATE = 1e-4, 1e-3


@dataclass(frozen=True)
class Episode:
    """One pass over the steps.

    Attributes
    ----------
    states
        Float32 [steps, features].
    actions
        Float32 [steps], in [0, 1].
    reward
        The same for each step.
    """

    states: np.ndarray
    actions: np.ndarray
    reward: float


def mlp(inputs: int, last: Sequence[nn.Module], generator: torch.Generator) -> nn.Sequential:
    """Two hidden layers; weights uniform in +-1/sqrt(inputs), those of the last layer within 0.003."""
    net = nn.Sequential(
        nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1), *last
    )
    linears = [module for module in net if isinstance(module, nn.Linear)]
    for layer in linears:
        bound = 0.003 if layer is linears[-1] else layer.in_features**-0.5
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return net


class DDPG:
    """Policy, critic and their targets.

    Parameters
    ----------
    features
        Length of a state.
    seed
        Of the first weights.
    """

    def __init__(self, features: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.actor = mlp(features, [nn.Sigmoid()], generator)
        self.critic = mlp(features + 1, [], generator)
        self.actor_target, self.critic_target = copy.deepcopy(self.actor), copy.deepcopy(self.critic)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), ACTOR_RATE, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), CRITIC_RATE, fused=True)
        self.baseline: float | None = None

    @torch.no_grad()
    def act(self, state: np.ndarray) -> float:
        """Return the policy's action."""
        with single_thread():
            return float(self.actor(torch.as_tensor(state, dtype=torch.float32)))

    def learn(self, memory: Sequence[Episode], updates: int, rng: np.random.Generator) -> None:
        """Take gradient steps on batches of replayed steps.

        Rewards are divided by their standard deviation in the memory, so that rates need not know their unit, and those
        far below the others (a broken bound) are cut at three of these below the mean.
        """
        rewards = np.array([episode.reward for episode in memory])
        middle, spread = float(np.median(rewards)), _spread(rewards)
        rewards = np.maximum((rewards - middle) / spread, -3.0)
        steps = len(memory[0].actions)
        with single_thread():
            for _ in range(updates):
                rows, at = rng.integers(len(memory), size=BATCH), rng.integers(steps, size=BATCH)
                reward = torch.as_tensor(rewards[rows], dtype=torch.float32)
                mean = float(reward.mean())
                self.baseline = mean if self.baseline is None else BASELINE * mean + (1 - BASELINE) * self.baseline
                drawn = [(memory[row], step) for row, step in zip(rows.tolist(), at.tolist(), strict=True)]
                states = np.stack([episode.states[step] for episode, step in drawn])
                following = np.stack([episode.states[min(step + 1, steps - 1)] for episode, step in drawn])
                actions = np.array([episode.actions[step] for episode, step in drawn])
                inputs = [torch.as_tensor(item, dtype=torch.float32) for item in (states, actions, following)]
                going_on = torch.as_tensor(at + 1 < steps, dtype=torch.float32)
                self._step(inputs[0], inputs[1], reward - self.baseline, inputs[2], going_on)

    def _step(self, state: Tensor, action: Tensor, reward: Tensor, following: Tensor, going_on: Tensor) -> None:
        with torch.no_grad():
            next_value = self.critic_target(torch.cat([following, self.actor_target(following)], 1))[:, 0]
            wanted = reward + DISCOUNT * going_on * next_value
        loss = nn.functional.mse_loss(self.critic(torch.cat([state, action[:, None]], 1))[:, 0], wanted)
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        self.critic.requires_grad_(False)
        value = -self.critic(torch.cat([state, self.actor(state)], 1)).mean()
        self.actor_optimizer.zero_grad()
        value.backward()
        self.actor_optimizer.step()
        self.critic.requires_grad_(True)
        with torch.no_grad():
            for net, target in ((self.actor, self.actor_target), (self.critic, self.critic_target)):
                torch._foreach_lerp_(list(target.parameters()), list(net.parameters()), TAU)

    # State

    def save(self, path: Path, **notes: Any) -> None:
        """Write networks and optimizers as safetensors, with notes that :meth:`load` returns; whole or not at all."""
        from safetensors.torch import save_file

        baseline = {} if self.baseline is None else {"baseline": repr(self.baseline)}
        notes = {key: str(value) for key, value in notes.items()}
        write_whole(path, lambda part: save_file(self._tensors(), part, metadata={**notes, **baseline}))

    def load(self, path: Path) -> dict[str, str]:
        """Read what :meth:`save` wrote; ValueError where it is of another state, or broken."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                notes = dict(file.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        self._prepare_optimizers()
        own = self._tensors()
        if {name: tensor.shape for name, tensor in own.items()} != {name: t.shape for name, t in found.items()}:
            raise ValueError(f"{path} is of another search space")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(found[name])
        self.baseline = float(notes["baseline"]) if "baseline" in notes else None
        return notes

    def _prepare_optimizers(self) -> None:
        """Let Adam make its state, without a change of the weights."""
        for optimizer in (self.actor_optimizer, self.critic_optimizer):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if not optimizer.state[parameter]:
                        optimizer.state[parameter].update(
                            step=torch.zeros(()),
                            exp_avg=torch.zeros_like(parameter),
                            exp_avg_sq=torch.zeros_like(parameter),
                        )

    def _tensors(self) -> dict[str, Tensor]:
        self._prepare_optimizers()
        tensors: dict[str, Tensor] = {}
        for name in ("actor", "critic", "actor_target", "critic_target"):
            tensors.update({f"{name}.{key}": value.detach() for key, value in getattr(self, name).state_dict().items()})
        for name in ("actor", "critic"):
            optimizer = getattr(self, f"{name}_optimizer")
            for key, parameter in getattr(self, name).named_parameters():
                tensors.update({f"{name}.adam.{key}.{item}": v for item, v in optimizer.state[parameter].items()})
        return tensors


def _spread(rewards: np.ndarray) -> float:
    """The standard deviation, by quartiles where these say something: one broken bound must not hide all else."""
    low, high = np.quantile(rewards, [0.25, 0.75])
    for spread in ((high - low) / 1.349, float(rewards.std())):
        if spread > 1e-12 * (1 + abs(high)):
            return float(spread)
    return 1.0


@contextmanager
def single_thread() -> Any:
    """Run torch on one thread: these networks are too small for more."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
