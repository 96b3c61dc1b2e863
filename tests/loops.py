"""Layers as plain loops over steps, one sequence at a time: the truth for what torch.nn's layers do not have.

A loop knows of resets, lengths, dropout of the recurrent operand, zoneout and layer normalization, and shares no code
with rnnkit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from configurations import LAYERS as TORCHS
from torch import Tensor, nn

import rnnkit
from rnnkit.update_gate import with_other_gate

Step = Callable[[Tensor, Tensor, list[Tensor]], list[Tensor]]

T, N, I, H = 7, 5, 3, 4  # noqa: E741
BACKENDS = ("cpp", "reference")
LAYERS = {
    **TORCHS,
    "lstm_projected": ("LSTM", {"proj_size": 3}),
    "gru_writes": ("GRU", {"update_gate": "writes"}),
    "rnn_without_bias": ("RNN", {"bias": False}),
}


def made(name: str, **options: Any) -> Any:
    """Two layers of a kind in `LAYERS`, in float64."""
    torch.manual_seed(0)
    cls, own = LAYERS[name]
    return getattr(rnnkit, cls)(I, H, **{"num_layers": 2, **own, **options}).double()


def places(layer: Any) -> int:
    """L*D."""
    return layer.num_layers * (2 if layer.bidirectional else 1)


def random_states(layer: Any, batch: int = N) -> list[Tensor]:
    """h [L*D, N, P] and, for an LSTM, c."""
    widths = [layer.proj_size or H, H][: 2 if layer.mode == "LSTM" else 1]
    return [torch.randn(places(layer), batch, width, dtype=torch.float64) for width in widths]


def as_hx(layer: Any, states: Sequence[Tensor]) -> Any:
    """The states in the form of `hx`."""
    return tuple(states) if layer.mode == "LSTM" else states[0]


def as_list(states: Any) -> list[Tensor]:
    """The states from the form of `hx`."""
    return list(states) if isinstance(states, tuple) else [states]


@dataclass
class Loop:
    """What a loop is to do beside the steps; all that is not given does nothing.

    Attributes:
        reset, put_back: bool [T, N], and the states [L*D, N, width] that sequences are put back to.
        lengths: of each sequence.
        operand: for each layer and direction, what h is multiplied with before the recurrent product, [N, P].
        zoneout: the probability for each state.
        kept: for each layer, direction and state bool [T, N, H], where the unit keeps its state; else the expectation.
    """

    reset: Tensor | None = None
    put_back: Sequence[Tensor] = ()
    lengths: Sequence[int] = field(default_factory=lambda: [T] * N)
    operand: Sequence[Tensor] = ()
    zoneout: Sequence[float] = ()
    kept: Sequence[Sequence[Tensor | None]] = ()

    def __call__(
        self, layer: Any, x: Tensor, states: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The last layer's states after each step, [T, N, D*width], zeros beyond the lengths; and the final states."""
        directions = 2 if layer.bidirectional else 1
        finals: list[list[Tensor]] = [[] for _ in states]
        every = [x]
        for k in range(layer.num_layers):
            found = [self.direction(layer, k, d, every[0], states) for d in range(directions)]
            every = [
                torch.cat(of_state, -1) for of_state in zip(*(f[0] for f in found), strict=True)
            ]
            for _, ends in found:
                for index, end in enumerate(ends):
                    finals[index].append(end)
        return every, [torch.stack(of_state) for of_state in finals]

    def direction(
        self, layer: Any, k: int, d: int, x: Tensor, states: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Layer k's direction d: every state [T, N, width], and the final states [N, width]."""
        place = k * (2 if layer.bidirectional else 1) + d
        one = self.step_of(layer, k, d)
        rows, ends = [], []
        for n, length in enumerate(self.lengths):
            now = [state[place, n : n + 1] for state in states]
            nothing = [x.new_zeros(state.size(-1)) for state in states]
            after = [nothing] * len(x)
            for t in reversed(range(length)) if d else range(length):
                boundary = t + d
                cut = self.reset is not None and boundary < length and bool(self.reset[boundary, n])
                if cut and (t < length - 1 or not d):
                    now = [state[place, n : n + 1] for state in self.put_back]
                h = now[0] * self.operand[place][n] if self.operand else now[0]
                new = one(x[t, n : n + 1], h, now)
                now = [self.zoned(place, index, t, n, now, new) for index in range(len(new))]
                after[t] = [state[0] for state in now]
            rows.append([torch.stack(of_state) for of_state in zip(*after, strict=True)])
            ends.append(now)
        return (
            [torch.stack(of_state, 1) for of_state in zip(*rows, strict=True)],
            [torch.cat(of_state) for of_state in zip(*ends, strict=True)],
        )

    def step_of(self, layer: Any, k: int, d: int) -> Step:
        """One step of layer k's direction d: x, h as the recurrent product sees it, states -> new states."""
        weights, w_hr = weights_of(layer, k, d)
        norms = norms_of(layer, k, d)
        return lambda x, h, states: step(layer, x, h, states, weights, w_hr, norms)

    def zoned(
        self, place: int, index: int, t: int, n: int, old: list[Tensor], new: list[Tensor]
    ) -> Tensor:
        if not self.zoneout or self.zoneout[index] == 0:
            return new[index]
        if not self.kept:
            p = self.zoneout[index]
            return p * old[index] + (1 - p) * new[index]
        mask = self.kept[place][index]
        assert mask is not None
        return torch.where(mask[t, n : n + 1], old[index], new[index])


def weights_of(layer: Any, k: int, d: int) -> tuple[list[Tensor | None], Tensor | None]:
    """w_ih, w_hh, b_ih, b_hh of layer k's direction d, as torch's cells take them, and w_hr."""
    end = f"_l{k}" + "_reverse" * d
    weights = [getattr(layer, name + end) for name in ("weight_ih", "weight_hh")]
    weights += [
        getattr(layer, name + end) if layer.bias else None for name in ("bias_ih", "bias_hh")
    ]
    if getattr(layer, "update_gate", "keeps") == "writes":
        weights = [None if w is None else with_other_gate(w) for w in weights]
    return weights, getattr(layer, "weight_hr" + end) if layer.proj_size else None


def norms_of(layer: Any, k: int, d: int) -> list[Tensor]:
    """The parameters of layer normalization of layer k's direction d; empty for none."""
    if not layer.layer_norm:
        return []
    end = f"_l{k}" + "_reverse" * d
    names = ("norm_ih", "norm_hh", "norm_c", "norm_c_bias")[: 4 if layer.mode == "LSTM" else 2]
    found = [getattr(layer, name + end) for name in names]
    if getattr(layer, "update_gate", "keeps") == "writes":
        return [with_other_gate(factor) for factor in found]
    return found


def normalized(values: Tensor) -> Tensor:
    """The values minus their mean, over their standard deviation."""
    centred = values - values.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def normalized_step(
    layer: Any, x: Tensor, h: Tensor, states: list[Tensor], weights: list, w_hr: Any, norms: list
) -> list[Tensor]:
    """`step` with layer normalization."""
    w_ih, w_hh, b_ih, b_hh = weights
    if getattr(layer, "update_gate", "keeps") == "writes":  # the sign is in the factors
        w_ih, w_hh = with_other_gate(w_ih), with_other_gate(w_hh)
    of_x = normalized(x @ w_ih.t()) * norms[0] + (0 if b_ih is None else b_ih)
    of_h = normalized(h @ w_hh.t()) * norms[1] + (0 if b_hh is None else b_hh)
    if layer.mode == "LSTM":
        i, f, g, o = (of_x + of_h).chunk(4, -1)
        c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
        new = o.sigmoid() * (normalized(c) * norms[2] + norms[3]).tanh()
        return [new if w_hr is None else new @ w_hr.t(), c]
    if layer.mode == "GRU":
        (x_r, x_z, x_n), (h_r, h_z, h_n) = of_x.chunk(3, -1), of_h.chunk(3, -1)
        n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
        return [n + (x_z + h_z).sigmoid() * (states[0] - n)]
    return [(of_x + of_h).tanh() if layer.mode == "RNN_TANH" else (of_x + of_h).relu()]


def step(
    layer: Any, x: Tensor, h: Tensor, states: list[Tensor], weights: list, w_hr: Any, norms: list
) -> list[Tensor]:
    """One step, where the recurrent product sees `h` in place of states[0].

    It calls torch's functions for cells. They have no projection, and take one h for all parts of a GRU: there it is
    written as equations.
    """
    if norms:
        return normalized_step(layer, x, h, states, weights, w_hr, norms)
    w_ih, w_hh, b_ih, b_hh = weights
    if layer.mode == "LSTM" and w_hr is not None:
        parts = nn.functional.linear(x, w_ih, b_ih) + nn.functional.linear(h, w_hh, b_hh)
        i, f, g, o = parts.chunk(4, -1)
        c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
        return [(o.sigmoid() * c.tanh()) @ w_hr.t(), c]
    one = getattr(torch._VF, f"{layer.mode.lower()}_cell")
    if layer.mode == "LSTM":
        return list(one(x, (h, states[1]), *weights))
    if layer.mode == "GRU" and h is not states[0]:
        of_x = nn.functional.linear(x, w_ih, b_ih).chunk(3, -1)
        of_h = nn.functional.linear(h, w_hh, b_hh).chunk(3, -1)
        r, z = (of_x[0] + of_h[0]).sigmoid(), (of_x[1] + of_h[1]).sigmoid()
        n = (of_x[2] + r * of_h[2]).tanh()
        return [n + z * (states[0] - n)]
    return [one(x, h, *weights)]


def assert_same(
    found: Sequence[Tensor], expected: Sequence[Tensor], wanted: Sequence[Tensor]
) -> None:
    """Both results are the same, and so are the gradients that arbitrary gradients of them give `wanted`."""
    torch.testing.assert_close(list(found), list(expected), rtol=1e-12, atol=1e-12)
    grads = [torch.randn_like(result) for result in expected]
    mine = torch.autograd.grad(list(found), wanted, grads, allow_unused=True)
    right = torch.autograd.grad(list(expected), wanted, grads, allow_unused=True)
    for one, other, tensor in zip(mine, right, wanted, strict=True):
        zeros = torch.zeros_like(tensor)
        torch.testing.assert_close(
            zeros if one is None else one, zeros if other is None else other, rtol=1e-10, atol=1e-11
        )
