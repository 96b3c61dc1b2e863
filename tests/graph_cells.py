"""Cells written for `rnnkit.graph`: rnnkit's own and others of papers, and steps that return what others do not."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from rnnkit import specs
from rnnkit.graph import Graph, builtin, trace


@dataclass(frozen=True)
class Cell:
    """A step, its names, and how many values it needs to save."""

    step: Callable[..., Any]
    inputs: str
    recurrent: str
    states: str
    saved: int
    parameters: str = ""
    late: str = ""

    def graph(self) -> Graph:
        return trace(
            self.step,
            inputs=self.inputs,
            recurrent=self.recurrent,
            states=self.states,
            parameters=self.parameters,
        )

    def on_tensors(self, *leaves: list[Tensor]) -> tuple[Tensor, ...]:
        """What the function itself returns for tensors: x, r, states, parameters.

        Of a cell with late gates the second operand is the last, if what is returned is made of their parts.
        """
        names = (self.inputs, self.recurrent, self.states, self.parameters)
        named = [
            Named(dict(zip(n.split(), of, strict=True)))
            for n, of in zip(names, leaves, strict=True)
        ]
        operands: list[Tensor] = []
        for name in self.late.split():
            part = getattr(named[1], name)
            setattr(named[1], name, lambda value, part=part: (operands.append(value), part)[1])
        returned = self.step(*named if self.parameters else named[:3])
        if isinstance(returned, dict):
            order = [*self.states.split(), *(["output"] if "output" in returned else [])]
            returned = tuple(returned[name] for name in order)
        like = leaves[0][0]
        operand = operands[:1] if self.graph().late else ()
        every = (*returned, *operand)
        return tuple(t if isinstance(t, Tensor) else torch.full_like(like, t) for t in every)


class Named:
    def __init__(self, values: dict[str, Tensor]) -> None:
        self.__dict__.update(values)


def peephole_lstm(x, r, s, p):
    i = torch.sigmoid(x.i + r.i + p.i * s.c)
    f = torch.sigmoid(x.f + r.f + p.f * s.c)
    c = f * s.c + i * torch.tanh(x.g + r.g)
    o = torch.sigmoid(x.o + r.o + p.o * c)
    return {"c": c, "h": o * torch.tanh(c)}


def coupled_lstm(x, r, s):
    f = (x.f + r.f).sigmoid()
    c = f * s.c + (1 - f) * (x.g + r.g).tanh()
    return torch.sigmoid(x.o + r.o) * c.tanh(), c


def janet(x, r, s):
    f = x.f + r.f
    return (torch.sigmoid(f) * s.h + (1 - torch.sigmoid(f - 1)) * torch.tanh(x.g + r.g),)


def mgu(x, r, s):
    f = torch.sigmoid(x.f + r.f)
    return ((1 - f) * s.h + f * torch.tanh(x.n + r.n),)


def light_gru(x, r, s):
    z = torch.sigmoid(x.z + r.z)
    return (z * s.h + (1 - z) * torch.relu(x.n + r.n),)


def ind_rnn(x, r, s, p):
    return (torch.relu(x.h + p.u * s.h),)


def slstm(x, r, s):
    i, f = x.i + r.i, logsigmoid(x.f + r.f)
    m = torch.maximum(f + s.m, i)
    i, f = torch.exp(i - m), torch.exp(f + s.m - m)
    c = f * s.c + i * torch.tanh(x.z + r.z)
    n = f * s.n + i
    return torch.sigmoid(x.o + r.o) * c / n, c, n, m


def xlstm(x, r, s):
    """The sLSTM with a bounded divisor, so that any states may come before it."""
    m = torch.maximum(logsigmoid(x.f + r.f) + s.m, x.i + r.i)
    i, f = torch.exp(x.i + r.i - m), torch.exp(logsigmoid(x.f + r.f) + s.m - m)
    c, n = f * s.c + i * torch.tanh(x.z + r.z), f * s.n + i
    return torch.sigmoid(x.o + r.o) * c / torch.maximum(abs(n), torch.exp(-abs(m))), c, n, m


def separate_output(x, r, s, p):
    """The output is no state; the gates with an input part are not those with a recurrent part."""
    c = torch.sigmoid(r.a) * s.c + softplus(x.a) * x.b
    return {"c": c, "output": abs(c) * p.v}


def odd_states(x, r, s):
    """Twice the same node, an unchanged state, another one's, a constant, and a part."""
    h = torch.tanh(x.h + r.h + s.b)
    return {"h": h, "a": h, "b": s.b, "c": s.a, "d": 0.5, "e": r.h}


def common_factors(x, r, s):
    """Gradients with a common factor, that are sums and differences: of x.a, x.b, s.h and r.a."""
    return (x.a * x.b + x.a * s.h + (x.b * r.a - x.b * s.h) - (r.a + r.a * s.h),)


def choice(x, r, s):
    """The comparison is one value, what is compared two: but a truth value is not saved."""
    return (torch.where(x.a > x.b, r.a, 3 * s.h),)


def infinite_constants(x, r, s):
    inside = torch.where(x.a > float("-inf"), x.a * s.h, -1.0)
    return (torch.where(x.a < float("inf"), inside, 1.0) + r.a,)


def unchanged(x, r, s):
    return (s.h,)


def constant(x, r, s):
    return (0,)


def every_operation(x, r, s, p):
    a = torch.minimum(-x.a, p.v) + torch.log1p(abs(r.a)) / (2 + s.h * s.h)
    b = torch.where(a >= s.h, a, 0.1) - torch.where(a != 0, 0.25, x.b)
    c = torch.where(x.a < x.b, softplus(a), logsigmoid(b))
    d = torch.where(x.a == x.b, c, torch.where(x.b <= 0.5, torch.exp(-abs(c)), c.relu()))
    return (torch.where(d > 0, torch.maximum(d, b), d * a),)


def reset_before(x, r, s):
    """The GRU of Cho et al. 2014."""
    reset, z = torch.sigmoid(x.r + r.r), torch.sigmoid(x.z + r.z)
    n = torch.tanh(x.n + r.n(reset * s.h))
    return (n + z * (s.h - n),)


def minimal_rnn(x, r, s):
    """A gate with two recurrent parts, one of them of what the input made."""
    z = torch.tanh(x.z)
    u = torch.sigmoid(r.u + r.z(z))
    return (u * s.h + (1 - u) * z,)


def multiplicative_lstm(x, r, s, p):
    """Most gates are late, and parameters before and after the second product."""
    m = p.m * x.m * r.m
    i, f, o = (torch.sigmoid(x_ + r_(m)) for x_, r_ in ((x.i, r.i), (x.f, r.f), (x.o, r.o)))
    c = f * s.c + i * torch.tanh(x.g + r.g(m)) * p.g
    return o * torch.tanh(c), c


def new_state_is_multiplied(x, r, s):
    """The second operand is a state after the step, on which the other one depends."""
    z = 0.5 * s.z + torch.sigmoid(r.a) * torch.tanh(x.a)
    return {"z": z, "y": 0.5 * s.y + torch.tanh(x.b + r.b(z))}


def all_late(x, r, s):
    """No recurrent part of h itself; the second operand is no state, and in it h is squared."""
    return (torch.tanh(x.a + r.a(torch.tanh(s.h) * s.h)) + 0.5 * s.h,)


def four_states_late(x, r, s, p):
    """Four states, fewer input than recurrent gates, and the gradients of all parts differ."""
    k = torch.sigmoid(x.a * r.a + s.d)
    value = k * s.c - p.v * s.h
    b, e = r.b(value), r.e(value)
    c = torch.tanh(b * x.a + s.h)
    return {
        "h": c * torch.sigmoid(e + k),
        "c": c,
        "d": 0.5 * s.d + e * p.v,
        "f": s.f * (1 - 0.1 * k) + value,
    }


LATE = {
    "reset_before": Cell(reset_before, "r z n", "r z n", "h", 3, late="n"),
    "minimal_rnn": Cell(minimal_rnn, "z", "u z", "h", 2, late="z"),
    "multiplicative_lstm": Cell(
        multiplicative_lstm, "m i f g o", "m i f o g", "h c", 7, "m g", late="i f o g"
    ),
    "new_state_is_multiplied": Cell(new_state_is_multiplied, "a b", "a b", "y z", 4, late="b"),
    "all_late": Cell(all_late, "a", "a", "h", 1, late="a"),
    "four_states_late": Cell(four_states_late, "a", "a b e", "h c d f", 8, "v", late="b e"),
}

BUILTIN = {
    name: Cell(
        getattr(builtin, name),
        *(" ".join(names) for names in (graph.inputs, graph.recurrent, graph.states)),
        specs.CELLS[name].saved,
    )
    for name, graph in builtin.GRAPHS.items()
}

CELLS = BUILTIN | {
    "peephole_lstm": Cell(peephole_lstm, "i f g o", "i f g o", "h c", 5, "i f o"),
    "coupled_lstm": Cell(coupled_lstm, "f g o", "f g o", "h c", 4),
    "janet": Cell(janet, "f g", "f g", "h", 2),
    "mgu": Cell(mgu, "f n", "f n", "h", 2),
    "light_gru": Cell(light_gru, "z n", "z n", "h", 2),
    "ind_rnn": Cell(ind_rnn, "h", "", "h", 0, "u"),
    "slstm": Cell(slstm, "i f z o", "i f z o", "h c n m", 7),
    "separate_output": Cell(separate_output, "a b", "a", "c", 4, "v"),
    "odd_states": Cell(odd_states, "h", "h", "h a b c d e", 1),
    "common_factors": Cell(common_factors, "a b", "a", "h", 3),
    "choice": Cell(choice, "a b", "a", "h", 2),
    "infinite_constants": Cell(infinite_constants, "a", "a", "h", 1),
    "unchanged": Cell(unchanged, "h", "h", "h", 0),
    "constant": Cell(constant, "h", "h", "h", 0),
    "every_operation": Cell(every_operation, "a b", "a", "h", 3, "v"),
}
