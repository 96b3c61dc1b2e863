"""Proximal policy optimization (PPO) of a recurrent policy, whose episodes end inside the rollout.

    python examples/recurrent_ppo.py                  under a minute
    python examples/recurrent_ppo.py --cell LSTM --way reset

The task needs a memory: the first observation of an episode shows one of some symbols, and at the last step, which
comes after a random number of blanks, the agent is asked for it. Environments run side by side, [N], for T steps a
rollout, and start a new episode when one is over, so that most rows of a rollout hold parts of several episodes.

PPO's update runs the whole rollout [T, N] through the recurrent layer, several times, with the states put back where an
episode begins. There are three ways to do so:

- reset: one call of rnnkit's layer, `layer(x, hx, reset=begins)`;
- loop: rnnkit's layer, step by step, with the states multiplied by 1 - begins[t], as is usual;
- torch: the same loop with torch.nn's layer.

All begin with the same weights and learn from the same rollouts, which the first one plays (Schulman et al. 2017,
"Proximal policy optimization algorithms": clipped objective, value loss and entropy bonus). The program prints their
losses, how often each recalls the symbol after the training, and the times of their updates. It exits with 1 if losses
of the first ten updates differ by more than rounding. Later, what was rounding may grow, as between any two trainings
in float32; `--dtype float64` compares all updates.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional

import rnnkit

States = Any  #: h [L, N, H] of a GRU, (h, c) of an LSTM
Run = Callable[[nn.Module, Tensor, States, Tensor], tuple[Tensor, States]]

SYMBOLS = 4
SHORTEST, LONGEST = 3, 12  #: steps of an episode
DISCOUNT, TRACE = 0.98, 0.95  #: gamma and lambda
CLIP, VALUE_WEIGHT, ENTROPY_WEIGHT, LARGEST_NORM = 0.2, 0.5, 0.01, 0.5
COMPARED, TOLERANCE = 10, 1e-5  #: updates whose losses are compared in float32


def in_one_call(
    layer: nn.Module, x: Tensor, states: States, begins: Tensor
) -> tuple[Tensor, States]:
    """Output [T, N, H] and final states; before step t, row n is put back to zeros where begins[t, n]."""
    return layer(x, states, reset=begins)


def step_by_step(
    layer: nn.Module, x: Tensor, states: States, begins: Tensor
) -> tuple[Tensor, States]:
    """Output and states by a loop over single steps."""
    goes_on = (~begins).to(x.dtype).unsqueeze(-1)  # [T, N, 1]
    outputs = []
    for x_t, kept in zip(x.split(1), goes_on, strict=True):
        if isinstance(states, tuple):
            states = tuple(kept * state for state in states)
        else:
            states = kept * states
        output, states = layer(x_t, states)
        outputs.append(output)
    return torch.cat(outputs), states


#: Each way's library and function.
WAYS: dict[str, tuple[Any, Run]] = {
    "reset": (rnnkit, in_one_call),
    "loop": (rnnkit, step_by_step),
    "torch": (nn, step_by_step),
}


class Recall:
    """N environments: say at the last step of an episode what was shown at its first.

    An observation [N, SYMBOLS + 1] is the symbol, one-hot, at an episode's first step and zeros later; its last element
    is 1 when the agent is asked. The reward is 1 for the symbol at that step, else 0.
    """

    def __init__(self, number: int, seed: int, dtype: torch.dtype) -> None:
        self.number, self.dtype = number, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.symbol, self.left = self._draw()
        self.begins = torch.ones(number, dtype=torch.bool)

    def _draw(self) -> tuple[Tensor, Tensor]:
        """Symbols, and how many steps are left after the first one, [N] each."""
        size, generator = (self.number,), self.generator
        symbol = torch.randint(SYMBOLS, size, generator=generator)
        return symbol, torch.randint(SHORTEST - 1, LONGEST, size, generator=generator)

    def observation(self) -> Tensor:
        shown = functional.one_hot(self.symbol, SYMBOLS) * self.begins.unsqueeze(-1)
        return torch.cat([shown, (self.left == 0).unsqueeze(-1)], -1).to(self.dtype)

    def step(self, action: Tensor) -> Tensor:
        """The reward [N]. Where an episode is over, the next observation is the first of a new one."""
        asked = self.left == 0
        reward = (asked & (action == self.symbol)).to(self.dtype)
        symbol, left = self._draw()
        self.symbol = torch.where(asked, symbol, self.symbol)
        self.left = torch.where(asked, left, self.left - 1)
        self.begins = asked
        return reward


class Agent(nn.Module):
    """A recurrent layer, and linear ones for the policy's logits and the value."""

    def __init__(self, way: str, cell: str, hidden: int) -> None:
        super().__init__()
        library, self.run = WAYS[way]
        self.layer = getattr(library, cell)(SYMBOLS + 1, hidden)
        self.policy, self.value = nn.Linear(hidden, SYMBOLS), nn.Linear(hidden, 1)
        nn.init.orthogonal_(self.policy.weight, 0.01)

    def forward(
        self, x: Tensor, states: States, begins: Tensor
    ) -> tuple[Categorical, Tensor, States]:
        """x [T, N, SYMBOLS + 1], begins [T, N] -> policy and values [T, N], final states."""
        h, states = self.run(self.layer, x, states, begins)
        return Categorical(logits=self.policy(h)), self.value(h).squeeze(-1), states

    def zeros(self, number: int) -> States:
        state = self.value.weight.new_zeros(1, number, self.layer.hidden_size)
        return (state, state) if self.layer.mode == "LSTM" else state


@dataclass(frozen=True)
class Rollout:
    """T steps of N environments.

    Attributes:
        x: observations [T, N, SYMBOLS + 1].
        begins: whether an episode begins at the step, bool [T, N]: what is over after step t - 1 begins anew at t.
        states: those before the first step, with which the update begins, too.
        actions: [T, N].
        log_probabilities: of the actions [T, N].
        advantages, returns: [T, N].
    """

    x: Tensor
    begins: Tensor
    states: States
    actions: Tensor
    log_probabilities: Tensor
    advantages: Tensor
    returns: Tensor


@torch.no_grad()
def play(agent: Agent, world: Recall, states: States, steps: int) -> tuple[Rollout, States, float]:
    """A rollout, the states after it, and the share of its episodes in which the symbol was recalled."""
    start = states
    rows: list[tuple[Tensor, ...]] = []
    for _ in range(steps):
        x, begins = world.observation(), world.begins
        policy, value, states = agent(x.unsqueeze(0), states, begins.unsqueeze(0))
        action = policy.sample()
        reward = world.step(action[0])
        log_probability = policy.log_prob(action)
        rows.append((x, begins, action[0], log_probability[0], value[0], reward, world.begins))
    columns = (torch.stack(column) for column in zip(*rows, strict=True))  # [T, N, ...] each
    x, begins, actions, log_probabilities, values, rewards, ends = columns
    # The states after the rollout stay as they are: the next rollout begins with them.
    _, beyond, _ = agent(world.observation().unsqueeze(0), states, world.begins.unsqueeze(0))
    advantages, follows = torch.zeros_like(values), values.new_zeros(world.number)
    later = torch.cat([values[1:], beyond]) * ~ends  # an episode that is over has no value
    for t in reversed(range(steps)):
        error = rewards[t] + DISCOUNT * later[t] - values[t]
        follows = error + DISCOUNT * TRACE * ~ends[t] * follows
        advantages[t] = follows
    rollout = Rollout(x, begins, start, actions, log_probabilities, advantages, advantages + values)
    return rollout, states, float(rewards.sum() / ends.sum().clamp(min=1))


def loss_of(agent: Agent, rollout: Rollout) -> Tensor:
    """PPO's loss of the whole rollout, the recurrent layer included."""
    policy, values, _ = agent(rollout.x, rollout.states, rollout.begins)
    ratio = (policy.log_prob(rollout.actions) - rollout.log_probabilities).exp()
    gain = (rollout.advantages - rollout.advantages.mean()) / (rollout.advantages.std() + 1e-8)
    surrogate = torch.minimum(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain).mean()
    error = functional.mse_loss(values, rollout.returns)
    return VALUE_WEIGHT * error - surrogate - ENTROPY_WEIGHT * policy.entropy().mean()


@dataclass
class Learner:
    """An agent, and what its updates gave.

    Attributes:
        losses: of each pass over a rollout.
        seconds: of each update.
    """

    agent: Agent
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def update(self, rollout: Rollout, passes: int) -> None:
        start = time.perf_counter()
        for _ in range(passes):
            loss = loss_of(self.agent, rollout)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.agent.parameters(), LARGEST_NORM)
            self.optimizer.step()
            self.losses.append(float(loss.detach()))
        self.seconds.append(time.perf_counter() - start)


def train(options: argparse.Namespace) -> tuple[dict[str, Learner], dict[str, float]]:
    """The learners by their ways, and how often each recalls the symbol after the training."""
    learners: dict[str, Learner] = {}
    dtype = getattr(torch, options.dtype)
    for way in WAYS if options.way == "all" else [options.way]:
        torch.manual_seed(options.seed)
        agent = Agent(way, options.cell, options.hidden).to(dtype)
        learners[way] = Learner(agent, torch.optim.Adam(agent.parameters(), options.rate))
    player = next(iter(learners.values())).agent
    world = Recall(options.environments, options.seed, dtype)
    states = player.zeros(options.environments)
    shown = sys.stderr.isatty()
    for number in range(options.updates):
        rollout, states, success = play(player, world, states, options.steps)
        for learner in learners.values():
            learner.update(rollout, options.passes)
        if shown:
            print(f"\rupdate {number + 1}: success {success:4.0%}", end="", file=sys.stderr)
    if shown:
        print(file=sys.stderr)
    successes = {}
    for way, learner in learners.items():
        torch.manual_seed(options.seed)
        world = Recall(options.environments, options.seed + 1, dtype)
        zeros = learner.agent.zeros(options.environments)
        successes[way] = play(learner.agent, world, zeros, 20 * LONGEST)[2]
    return learners, successes


def report(learners: dict[str, Learner], successes: dict[str, float]) -> int:
    """Prints the losses, the success and the times; 1 if the losses differ."""
    print("update " + "".join(f"{way:>10}" for way in learners) + "   (loss of its last pass)")
    first = next(iter(learners.values()))
    updates = len(first.seconds)
    passes = len(first.losses) // updates
    for update in sorted({*range(0, updates, max(1, updates // 10)), updates - 1}):
        losses = (learner.losses[(update + 1) * passes - 1] for learner in learners.values())
        print(f"{update + 1:6} " + "".join(f"{loss:10.5f}" for loss in losses))
    compared = updates if first.agent.value.weight.dtype == torch.float64 else COMPARED
    losses_of_each = [learner.losses[: compared * passes] for learner in learners.values()]
    curves = torch.tensor(losses_of_each, dtype=torch.float64)  # [ways, passes]
    difference = float((curves - curves[0]).abs().max())
    if len(learners) > 1:
        print(f"largest difference of a loss in {min(compared, updates)} updates: {difference:.1e}")
    base = median(first.seconds)
    for way, learner in learners.items():
        spent = median(learner.seconds)
        print(
            f"{way:<6} success {successes[way]:4.0%}; an update takes {1e3 * spent:.1f} ms, "
            f"{spent / base:.2f} times as long as {next(iter(learners))}"
        )
    return int(not difference <= TOLERANCE)


def main(arguments: list[str] | None = None) -> int:
    """Trains, prints what came out; 1 if the losses differ by more than TOLERANCE."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--way", choices=("all", *WAYS), default="all")
    parser.add_argument("--cell", choices=("GRU", "LSTM"), default="GRU")
    sizes = {
        "steps": (64, "T of a rollout"),
        "environments": (32, "N"),
        "hidden": (64, "H"),
        "passes": (4, "over each rollout"),
        "updates": (60, "of the policy"),
        "seed": (1, "of weights, environments and actions"),
    }
    for name, (number, meaning) in sizes.items():
        parser.add_argument(
            f"--{name}", type=int, default=number, help=f"{meaning} (default: %(default)s)"
        )
    parser.add_argument("--rate", type=float, default=3e-3, help="of Adam (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--threads", type=int, help="of torch (default: torch's own choice)")
    options = parser.parse_args(arguments)
    for name in sizes:
        if name != "seed" and getattr(options, name) < 1:
            parser.error(f"argument --{name}: expected at least 1, got {getattr(options, name)}")
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"argument --threads: expected at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    return report(*train(options))


if __name__ == "__main__":
    sys.exit(main())
