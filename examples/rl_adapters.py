"""Recurrent policies of sb3-contrib, CleanRL and TorchRL on rnnkit's `reset=`: functions to copy.

    python examples/rl_adapters.py                    under ten seconds; needs none of the three

Each of these libraries puts the states of a recurrent layer back where an episode begins, by a loop over single steps
or by splitting and packing. `process_sequence`, `get_states` and `Resets` do it in one call, with the arguments and
results of what they replace. `docs/recipes.md` shows where they go.

The program runs each beside the library's own way. It prints the largest difference of outputs, final states and
gradients, relative to the largest value of each, and the times of a forward and backward pass. It exits with 1 if they
differ by more than rounding. Where sb3-contrib or TorchRL is not installed, its way is the one restated here.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

import rnnkit

LSTMStates = tuple[Tensor, Tensor]
TOLERANCE = 1e-4


def process_sequence(
    features: Tensor, lstm_states: LSTMStates, episode_starts: Tensor, lstm: rnnkit.LSTM
) -> tuple[Tensor, LSTMStates]:
    """sb3-contrib: in the place of `RecurrentActorCriticPolicy._process_sequence`.

    Args:
        features: [N * T, I], the T steps of a sequence one after the other.
        lstm_states: before the first step, [L, N, H] each.
        episode_starts: 0 or 1, [N * T]; where it is 1, the states before the step are zeros.
        lstm: not `batch_first`.

    Returns:
        The output [N * T, H], in the order of `features`, and the final states.
    """
    sequences = lstm_states[0].size(1)
    x = features.view(sequences, -1, lstm.input_size).transpose(0, 1)  # [T, N, I]
    output, lstm_states = lstm(x, lstm_states, reset=episode_starts.view(sequences, -1).t())
    return output.transpose(0, 1).flatten(0, 1), lstm_states


def get_states(
    agent: Any, x: Tensor, lstm_state: LSTMStates, done: Tensor
) -> tuple[Tensor, LSTMStates]:
    """CleanRL: in the place of `Agent.get_states` of ppo_atari_lstm.py.

    Args:
        agent: has `network`, which turns `x` into features, and `lstm`.
        x: observations [T * N, ...], those of one step side by side.
        lstm_state: before the first step, [L, N, H] each.
        done: 0 or 1, [T * N]; CleanRL's done[t] tells whether an episode was over before step t.

    Returns:
        The output [T * N, H] and the final states.
    """
    environments = lstm_state[0].size(1)
    features = agent.network(x / 255.0).view(-1, environments, agent.lstm.input_size)
    output, lstm_state = agent.lstm(features, lstm_state, reset=done.view(-1, environments))
    return output.flatten(0, 1), lstm_state


def run_trajectories(
    layer: nn.Module, x: Tensor, is_init: Tensor, hidden: Sequence[Tensor | None]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """TorchRL: rows that hold several trajectories, through a `batch_first` layer.

    TorchRL begins each trajectory with the states that are stored at its first step:

    - At step 0 these are `hidden[:, 0]`, even where `is_init[:, 0]`: so they are `hx`, and no reset.
    - At later steps they are zeros if InitTracker and the TensorDictPrimer of `make_tensordict_primer` stored them.
      They are taken to be zeros here, and `hidden[:, 1:]` is not read.

    Args:
        layer: rnnkit.LSTM or rnnkit.GRU, batch_first.
        x: [B, T, I].
        is_init: bool [B, T] or [B, T, 1].
        hidden: h, or h and c, [B, T, L, H] each; None for zeros.

    Returns:
        The output [B, T, H] and the final states [L, B, H].
    """
    reset = is_init.reshape(x.shape[:2]).clone()
    reset[:, 0] = False
    hx = [state[:, 0].transpose(0, 1) for state in hidden if state is not None]
    given = None if not hx else tuple(hx) if len(hidden) > 1 else hx[0]
    output, finals = layer(x, given, reset=reset)
    return output, finals if isinstance(finals, tuple) else (finals,)


class Resets:
    """TorchRL: goes before LSTMModule or GRUModule in the bases of a class, whose layer is then rnnkit's.

        class ResetLSTMModule(Resets, LSTMModule): ...

        ResetLSTMModule(lstm=rnnkit.LSTM(8, 64, batch_first=True), in_key="observation", out_key="features")

    In recurrent mode a pass is one call of the layer, see `run_trajectories`. Of the states that it writes for all
    steps, the last step's are the final ones, and the others are zeros. TorchRL also writes the final states of earlier
    trajectories in the row, at their last steps; its documentation says not to use them.
    """

    def forward(self: Any, tensordict: Any) -> Any:
        if not self.recurrent_mode:  # single steps while data are collected
            return super().forward(tensordict)
        layer = self.lstm if hasattr(self, "lstm") else self.gru
        shape, steps = tensordict.shape, tensordict.shape[-1]  # [..., T]
        keys = [key for key in self.in_keys if key != "is_init"]
        x, *hidden = (tensordict.get(key, None) for key in keys)
        rows = [
            None if state is None else state.reshape(-1, steps, *state.shape[-2:])
            for state in hidden
        ]
        output, finals = run_trajectories(
            layer, x.reshape(-1, steps, x.size(-1)), tensordict["is_init"], rows
        )
        values = [output]
        for final in finals:
            last = final.transpose(0, 1).unsqueeze(1)  # [B, 1, L, H]
            values.append(functional.pad(last, (0, 0, 0, 0, steps - 1, 0)))
        for key, value in zip(self.out_keys, values, strict=True):
            tensordict.set(key, value.reshape(*shape, *value.shape[2:]))
        return tensordict


def step_by_step(
    lstm: nn.Module, x: Tensor, states: LSTMStates, begins: Tensor
) -> tuple[Tensor, LSTMStates]:
    """What CleanRL does, and sb3-contrib where any episode begins: x [T, N, I], begins [T, N] of 0 and 1."""
    outputs = []
    for x_t, begins_t in zip(x, begins, strict=True):
        goes_on = (1.0 - begins_t).view(1, -1, 1)
        output, states = lstm(x_t.unsqueeze(0), (goes_on * states[0], goes_on * states[1]))
        outputs.append(output)
    return torch.cat(outputs), states


def split_and_pack(
    layer: nn.Module, x: Tensor, is_init: Tensor, hidden: Sequence[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What TorchRL does: a sequence for each trajectory, packed. Arguments and results of `run_trajectories`."""
    rows, steps = x.shape[:2]
    begins = is_init.reshape(rows, steps).clone()
    begins[:, 0] = True
    starts = begins.flatten().nonzero().squeeze(1)  # [trajectories], in rows of [B * T]
    ends = torch.cat([starts[1:], torch.tensor([rows * steps])])
    lengths = (ends - starts).tolist()
    packed = pack_sequence(x.flatten(0, 1).split(lengths), enforce_sorted=False)
    hx = [state.flatten(0, 1)[starts].transpose(0, 1).contiguous() for state in hidden]
    packed_output, states = layer(packed, tuple(hx) if len(hx) > 1 else hx[0])
    padded, _ = pad_packed_sequence(packed_output, batch_first=True)
    output = torch.cat([row[:length] for row, length in zip(padded, lengths, strict=True)])
    finals = states if isinstance(states, tuple) else (states,)
    return output.view(rows, steps, -1), tuple(state[:, ends % steps == 0] for state in finals)


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


Call = Callable[[nn.Module], tuple[Tensor, Any]]  #: of a layer: its output and final states


class Agent:
    """As much of CleanRL's as `get_states` reads."""

    network = staticmethod(lambda x: x)

    def __init__(self, lstm: nn.Module) -> None:
        self.lstm = lstm


def comparisons(options: argparse.Namespace) -> dict[str, tuple[str, bool, Call, Call]]:
    """For each library: the layer, whether it is batch_first, the library's way and rnnkit's."""
    T, N, I, H = options.steps, options.batch, options.input, options.hidden  # noqa: E741
    x = torch.randn(T, N, I, requires_grad=True)
    begins = (torch.rand(T, N) < options.share).float()
    states = (torch.randn(1, N, H), torch.randn(1, N, H))
    rows = x.detach().transpose(0, 1).contiguous()  # [N, T, I]
    starts = begins.t().contiguous()
    stored = [state.new_zeros(N, T, 1, H) for state in states]  # as TorchRL stores them
    for buffer, state in zip(stored, states, strict=True):
        buffer[:, 0] = state[0].unsqueeze(1)

    def sb3(lstm: nn.Module) -> tuple[Tensor, Any]:
        if not installed("sb3_contrib"):
            output, finals = step_by_step(lstm, rows.transpose(0, 1), states, begins)
            return output.transpose(0, 1).flatten(0, 1), finals
        from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy

        own = RecurrentActorCriticPolicy._process_sequence
        return own(rows.flatten(0, 1), states, starts.flatten(), lstm)

    def cleanrl(lstm: nn.Module) -> tuple[Tensor, Any]:
        output, finals = step_by_step(lstm, x / 255.0, states, begins)
        return output.flatten(0, 1), finals

    def torchrl(layer: nn.Module) -> tuple[Tensor, Any]:
        kinds = 2 if layer.mode == "LSTM" else 1
        if not installed("torchrl"):
            return split_and_pack(layer, rows, starts > 0, stored[:kinds])
        return torchrl_module(layer, rows, starts > 0, stored[:kinds])

    def reset_torchrl(layer: nn.Module) -> tuple[Tensor, Any]:
        kinds = 2 if layer.mode == "LSTM" else 1
        return run_trajectories(layer, rows, starts > 0, stored[:kinds])

    def reset_sb3(lstm: nn.Module) -> tuple[Tensor, Any]:
        return process_sequence(rows.flatten(0, 1), states, starts.flatten(), lstm)

    def reset_cleanrl(lstm: nn.Module) -> tuple[Tensor, Any]:
        return get_states(Agent(lstm), x.flatten(0, 1), states, begins.flatten())

    return {
        "sb3-contrib": ("LSTM", False, sb3, reset_sb3),
        "CleanRL": ("LSTM", False, cleanrl, reset_cleanrl),
        "TorchRL, LSTM": ("LSTM", True, torchrl, reset_torchrl),
        "TorchRL, GRU": ("GRU", True, torchrl, reset_torchrl),
    }


def torchrl_module(
    layer: nn.Module, x: Tensor, is_init: Tensor, hidden: Sequence[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """TorchRL's module around torch.nn's layer. Arguments and results of `run_trajectories`."""
    from tensordict import TensorDict
    from torchrl.modules import GRUModule, LSTMModule

    names = ["h", "c"][: len(hidden)]
    keys = {"in_keys": ["x", *names], "out_keys": ["y", *(("next", name) for name in names)]}
    if len(hidden) > 1:
        module = LSTMModule(lstm=layer, **keys, default_recurrent_mode=True)
    else:
        module = GRUModule(gru=layer, **keys, default_recurrent_mode=True)
    given = {"x": x, "is_init": is_init.unsqueeze(-1), **dict(zip(names, hidden, strict=True))}
    found = module(TensorDict(given, x.shape[:2]))
    finals = tuple(found["next", name][:, -1].transpose(0, 1) for name in names)
    return found["y"], finals


def passes(call: Call, layer: nn.Module, weight: Tensor) -> tuple[list[Tensor], float]:
    """Output, final states and the parameters' gradients of a forward and backward pass, and its seconds."""
    start = time.perf_counter()
    output, finals = call(layer)
    gradients = torch.autograd.grad((output * weight).mean(), list(layer.parameters()))
    seconds = time.perf_counter() - start
    return [output.detach(), *(state.detach() for state in finals), *gradients], seconds


def main(arguments: list[str] | None = None) -> int:
    """Compares each adapter with its library's way; 1 if they differ by more than TOLERANCE."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {"steps": (128, "T"), "batch": (16, "N"), "input": (64, "I"), "hidden": (128, "H")}
    sizes |= {"repeats": (5, "passes of each, of which the median counts")}
    for name, (number, meaning) in sizes.items():
        parser.add_argument(
            f"--{name}", type=int, default=number, help=f"{meaning} (default: %(default)s)"
        )
    parser.add_argument(
        "--share",
        type=float,
        default=0.03,
        help="of steps at which an episode begins (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    for name in sizes:
        if getattr(options, name) < 1:
            parser.error(f"argument --{name}: expected at least 1, got {getattr(options, name)}")
    torch.manual_seed(1)
    status = 0
    print(f"{'':<15}{'difference':>11}{'own way':>12}{'reset=':>12}{'ratio':>8}")
    for name, (cell, batch_first, own, adapted) in comparisons(options).items():
        layer = getattr(nn, cell)(options.input, options.hidden, batch_first=batch_first)
        ours = getattr(rnnkit, cell)(options.input, options.hidden, batch_first=batch_first)
        ours.load_state_dict(layer.state_dict())
        weight = torch.randn_like(own(layer)[0])
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(options.repeats):
            expected, seconds = passes(own, layer, weight)
            times[0].append(seconds)
            found, seconds = passes(adapted, ours, weight)
            times[1].append(seconds)
        pairs = zip(found, expected, strict=True)
        shares = [(a - b).abs().max() / b.abs().max() for a, b in pairs]
        difference = float(torch.stack(shares).max())
        theirs, mine = (1e3 * median(each) for each in times)
        print(f"{name:<15}{difference:11.1e}{theirs:9.1f} ms{mine:9.1f} ms{theirs / mine:7.1f}x")
        status |= int(not difference <= TOLERANCE)
    return status


if __name__ == "__main__":
    sys.exit(main())
