"""rnnkit's own cells, each step written once.

The names of gates and states are those of the equations in docs; their order is that of the weights' blocks.
"""

from typing import Any

import torch

from rnnkit.graph.trace import trace


def rnn_tanh(x: Any, r: Any, s: Any) -> Any:
    """h' = tanh(x + r)."""
    return (torch.tanh(x.h + r.h),)


def rnn_relu(x: Any, r: Any, s: Any) -> Any:
    """h' = relu(x + r)."""
    return (torch.relu(x.h + r.h),)


def lstm(x: Any, r: Any, s: Any) -> Any:
    """i, f, o = σ(x + r); g = tanh(x + r); c' = f⊙c + i⊙g; h' = o⊙tanh(c')."""
    i = torch.sigmoid(x.i + r.i)
    f = torch.sigmoid(x.f + r.f)
    g = torch.tanh(x.g + r.g)
    o = torch.sigmoid(x.o + r.o)
    c = f * s.c + i * g
    return o * torch.tanh(c), c


def _gates_of_gru(x: Any, r: Any) -> Any:
    """r, z = σ(x + r); n = tanh(x + r⊙r), where the last is the recurrent part of n. Returns z and n."""
    reset = torch.sigmoid(x.r + r.r)
    return torch.sigmoid(x.z + r.z), torch.tanh(x.n + reset * r.n)


def gru(x: Any, r: Any, s: Any) -> Any:
    """h' = n + z⊙(h - n): the update gate z keeps h, as in torch.nn."""
    z, n = _gates_of_gru(x, r)
    return (n + z * (s.h - n),)


def gru_writes(x: Any, r: Any, s: Any) -> Any:
    """h' = h + z⊙(n - h): the update gate z writes."""
    z, n = _gates_of_gru(x, r)
    return (s.h + z * (n - s.h),)


def gru_before(x: Any, r: Any, s: Any) -> Any:
    """As `gru`, with the reset gate before the product: n = tanh(x + the recurrent part of r⊙h). Cho et al. 2014."""
    z, n = _gates_before(x, r, s)
    return (n + z * (s.h - n),)


def gru_before_writes(x: Any, r: Any, s: Any) -> Any:
    """As `gru_writes`, with the reset gate before the product."""
    z, n = _gates_before(x, r, s)
    return (s.h + z * (n - s.h),)


def _gates_before(x: Any, r: Any, s: Any) -> Any:
    reset = torch.sigmoid(x.r + r.r)
    return torch.sigmoid(x.z + r.z), torch.tanh(x.n + r.n(reset * s.h))


#: The cells by their names in `specs.CELLS`.
GRAPHS = {
    "rnn_tanh": trace(rnn_tanh, inputs="h", recurrent="h", states="h"),
    "rnn_relu": trace(rnn_relu, inputs="h", recurrent="h", states="h"),
    "lstm": trace(lstm, inputs="i f g o", recurrent="i f g o", states="h c"),
    "gru": trace(gru, inputs="r z n", recurrent="r z n", states="h"),
    "gru_writes": trace(gru_writes, inputs="r z n", recurrent="r z n", states="h"),
}

#: The names in ops of the cells of a GRU whose reset gate comes before the product, by what its update gate does.
RESET_BEFORE = {
    gate: trace(step, inputs="r z n", recurrent="r z n", states="h").to_json()
    for gate, step in (("keeps", gru_before), ("writes", gru_before_writes))
}
