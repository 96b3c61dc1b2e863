"""Recurrent cells of papers, for `rnnkit.Recurrent` and `rnnkit.RecurrentCell`; each is a few lines of `rnnkit.cell`.

    layer = rnnkit.Recurrent(rnnkit.library.peephole_lstm, 64, 128)

In the equations x.g is the input part W_ih x_t + b_ih of the gate g, r.g its recurrent part W_hh h_{t-1} + b_hh; other
letters without an index are the states before the step, and those with a prime the states after it. Products are
elementwise. Initial values are those of the cells' own parameters; weights and biases begin as torch.nn's do. Where a
paper learns one number for all units, a cell here has one for each. Cells with numbers that are not learned are
functions of these:

    layer = rnnkit.Recurrent(rnnkit.library.cornn(dt=0.05), 64, 128)
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from rnnkit.definition import Cell, cell

__all__ = [
    "antisymmetric_rnn",
    "atr",
    "br",
    "cfn",
    "cornn",
    "coupled_lstm",
    "fast_grnn",
    "fast_rnn",
    "gated_antisymmetric_rnn",
    "ind_rnn",
    "janet",
    "lem",
    "light_gru",
    "light_ru",
    "lstm_without_forget_gate",
    "lstm_without_input_gate",
    "lstm_without_output_gate",
    "mgu",
    "min_gru",
    "min_lstm",
    "minimal_rnn",
    "multiplicative_lstm",
    "mut1",
    "nas",
    "nbr",
    "peephole_lstm",
    "ran",
    "scrn",
    "sgrn",
    "slstm",
    "sru",
    "star",
    "ugrnn",
    "unicornn",
]


@cell(gates="i f g o", states="h c", parameters="p_i p_f p_o")
def peephole_lstm(x, r, s, p):
    """LSTM whose gates see c: i, f = σ(x + r + p c); c' = f c + i tanh(x.g + r.g); o = σ(x.o + r.o + p_o c').

    h' = o tanh(c'). Gates i, f, g, o; states h, c; parameters p_i, p_f, p_o.

    Source: Gers & Schmidhuber 2000, "Recurrent nets that time and count".
    """
    i = torch.sigmoid(x.i + r.i + p.p_i * s.c)
    f = torch.sigmoid(x.f + r.f + p.p_f * s.c)
    c = f * s.c + i * torch.tanh(x.g + r.g)
    o = torch.sigmoid(x.o + r.o + p.p_o * c)
    return {"h": o * torch.tanh(c), "c": c}


@cell(gates="i g o", states="h c")
def coupled_lstm(x, r, s):
    """LSTM that forgets what it replaces: i, o = σ(x + r); c' = (1 - i) c + i tanh(x.g + r.g); h' = o tanh(c').

    Gates i, g, o; states h, c. Without the paper's peepholes.

    Source: Greff et al. 2015, "LSTM: a search space odyssey", CIFG.
    """
    i = torch.sigmoid(x.i + r.i)
    c = (1 - i) * s.c + i * torch.tanh(x.g + r.g)
    return {"h": torch.sigmoid(x.o + r.o) * torch.tanh(c), "c": c}


@cell(gates="i g o", states="h c")
def lstm_without_forget_gate(x, r, s):
    """The first LSTM: i, o = σ(x + r); c' = c + i tanh(x.g + r.g); h' = o tanh(c').

    Gates i, g, o; states h, c. Without the paper's peepholes.

    Source: Greff et al. 2015, "LSTM: a search space odyssey", NFG; Hochreiter & Schmidhuber 1997.
    """
    c = s.c + torch.sigmoid(x.i + r.i) * torch.tanh(x.g + r.g)
    return {"h": torch.sigmoid(x.o + r.o) * torch.tanh(c), "c": c}


@cell(gates="f g o", states="h c")
def lstm_without_input_gate(x, r, s):
    """LSTM with i = 1: f, o = σ(x + r); c' = f c + tanh(x.g + r.g); h' = o tanh(c').

    Gates f, g, o; states h, c. Without the paper's peepholes.

    Source: Greff et al. 2015, "LSTM: a search space odyssey", NIG.
    """
    c = torch.sigmoid(x.f + r.f) * s.c + torch.tanh(x.g + r.g)
    return {"h": torch.sigmoid(x.o + r.o) * torch.tanh(c), "c": c}


@cell(gates="i f g", states="h c")
def lstm_without_output_gate(x, r, s):
    """LSTM with o = 1: i, f = σ(x + r); c' = f c + i tanh(x.g + r.g); h' = tanh(c').

    Gates i, f, g; states h, c. Without the paper's peepholes.

    Source: Greff et al. 2015, "LSTM: a search space odyssey", NOG.
    """
    c = torch.sigmoid(x.f + r.f) * s.c + torch.sigmoid(x.i + r.i) * torch.tanh(x.g + r.g)
    return {"h": torch.tanh(c), "c": c}


@cell(gates="f g", states="h")
def janet(x, r, s):
    """LSTM of a forget gate alone: a = x.f + r.f; h' = σ(a) h + (1 - σ(a - 1)) tanh(x.g + r.g).

    Gates f, g; state h. β of the paper is 1.

    Source: van der Westhuizen & Lasenby 2018, "The unreasonable effectiveness of the forget gate".
    """
    f = x.f + r.f
    return {"h": torch.sigmoid(f) * s.h + (1 - torch.sigmoid(f - 1)) * torch.tanh(x.g + r.g)}


@cell(gates="z n", states="h")
def light_gru(x, r, s):
    """GRU without reset gate: z = σ(x.z + r.z); h' = z h + (1 - z) relu(x.n + r.n).

    Gates z, n; state h. Without the paper's batch normalization of the input parts.

    Source: Ravanelli et al. 2018, "Light gated recurrent units for speech recognition".
    """
    z = torch.sigmoid(x.z + r.z)
    return {"h": z * s.h + (1 - z) * torch.relu(x.n + r.n)}


@cell(gates="c g", states="h")
def ugrnn(x, r, s):
    """RNN with an update gate: g = σ(x.g + r.g); h' = g h + (1 - g) tanh(x.c + r.c).

    Gates c, g; state h.

    Source: Collins, Sohl-Dickstein & Sussillo 2016, "Capacity and trainability in recurrent neural networks".
    """
    g = torch.sigmoid(x.g + r.g)
    return {"h": g * s.h + (1 - g) * torch.tanh(x.c + r.c)}


@cell(gates="theta eta g", recurrent="theta eta", states="h")
def cfn(x, r, s):
    """Network without chaos: θ, η = σ(x + r); h' = θ tanh(h) + η tanh(x.g).

    Gates theta, eta, g, the last without a recurrent part; state h. The paper has no bias in x.g.

    Source: Laurent & von Brecht 2016, "A recurrent neural network without chaos".
    """
    theta, eta = torch.sigmoid(x.theta + r.theta), torch.sigmoid(x.eta + r.eta)
    return {"h": theta * torch.tanh(s.h) + eta * torch.tanh(x.g)}


@cell(gates="z k", recurrent="k", states="h")
def star(x, r, s):
    """Cell for stacks of many layers: k = σ(x.k + r.k); h' = tanh((1 - k) h + k tanh(x.z)).

    Gates z, k, the first without a recurrent part; state h.

    Source: Turkoglu et al. 2019, "Gating revisited: deep multi-layer RNNs that can be trained".
    """
    k = torch.sigmoid(x.k + r.k)
    return {"h": torch.tanh((1 - k) * s.h + k * torch.tanh(x.z))}


@cell(gates="g i f", recurrent="i f", states="h c")
def ran(x, r, s):
    """LSTM whose content is linear: i, f = σ(x + r); c' = i x.g + f c; h' = tanh(c').

    Gates g, i, f, the first without a recurrent part; states h, c. The paper has no bias in x.g.

    Source: Lee, Levy & Zettlemoyer 2017, "Recurrent additive networks".
    """
    c = torch.sigmoid(x.i + r.i) * x.g + torch.sigmoid(x.f + r.f) * s.c
    return {"h": torch.tanh(c), "c": c}


@cell(gates="p", states="h")
def atr(x, r, s):
    """Two gates of one product each way: i = σ(x.p + r.p), f = σ(x.p - r.p); h' = i x.p + f h.

    Gate p; state h.

    Source: Zhang et al. 2018, "Simplifying neural machine translation with addition-subtraction twin-gated recurrent
    networks".
    """
    return {"h": torch.sigmoid(x.p + r.p) * x.p + torch.sigmoid(x.p - r.p) * s.h}


@cell(gates="n", states="h", parameters="alpha beta", init={"alpha": -3.0, "beta": 3.0})
def fast_rnn(x, r, s, p):
    """RNN with a weighted residual: h' = σ(α) tanh(x.n + r.n) + σ(β) h.

    Gate n; state h; parameters alpha, -3 at the start, and beta, 3, as in the authors' code.

    Source: Kusupati et al. 2018, "FastGRNN: a fast, accurate, stable and tiny kilobyte sized gated recurrent neural
    network".
    """
    return {"h": torch.sigmoid(p.alpha) * torch.tanh(x.n + r.n) + torch.sigmoid(p.beta) * s.h}


@cell(
    gates="a",
    states="h",
    parameters="b_z b_n zeta nu",
    init={"b_z": 1.0, "b_n": 1.0, "zeta": 1.0, "nu": -4.0},
)
def fast_grnn(x, r, s, p):
    """GRU whose gate and content share W: a = x.a + r.a; z = σ(a + b_z); n = tanh(a + b_n).

    h' = (σ(ζ) (1 - z) + σ(ν)) n + z h. Gate a; state h; parameters b_z and b_n, 1 at the start, zeta, 1, and nu, -4, as
    in the authors' code. The biases of a are not in the paper: `bias=False` leaves them out. Without low rank.

    Source: Kusupati et al. 2018, "FastGRNN: a fast, accurate, stable and tiny kilobyte sized gated recurrent neural
    network".
    """
    a = x.a + r.a
    z, n = torch.sigmoid(a + p.b_z), torch.tanh(a + p.b_n)
    return {"h": (torch.sigmoid(p.zeta) * (1 - z) + torch.sigmoid(p.nu)) * n + z * s.h}


@cell(gates="n", recurrent=(), states="h", parameters="u", init={"u": nn.init.uniform_})
def ind_rnn(x, r, s, p):
    """RNN of independent units: h' = relu(x.n + u h).

    Gate n; state h; parameter u, drawn from U(0, 1). There is no W_hh. The paper limits u to the T-th root of a number,
    for sequences of T steps, and draws from 0 to this limit.

    Source: Li et al. 2018, "Independently recurrent neural network (IndRNN): building a longer and deeper RNN".
    """
    return {"h": torch.relu(x.n + p.u * s.h)}


@cell(gates="g f r k", recurrent=(), states="h c", parameters="v_f v_r")
def sru(x, r, s, p):
    """Simple recurrent unit: f = σ(x.f + v_f c); c' = f c + (1 - f) x.g; h' = q c' + (1 - q) x.k, q = σ(x.r + v_r c).

    Gates g, f, r, k; states h, c; parameters v_f, v_r. There is no W_hh. The highway x.k is that of the paper's layers
    whose input has another size than h; in layers of one size the paper has x_t itself. It has no bias in x.g and x.k.

    Source: Lei et al. 2018, "Simple recurrent units for highly parallelizable recurrence".
    """
    f, q = torch.sigmoid(x.f + p.v_f * s.c), torch.sigmoid(x.r + p.v_r * s.c)
    c = f * s.c + (1 - f) * x.g
    return {"h": q * c + (1 - q) * x.k, "c": c}


@cell(gates="z n", recurrent=(), states="h")
def min_gru(x, r, s):
    """GRU without a recurrent product: z = σ(x.z); h' = (1 - z) h + z x.n.

    Gates z, n; state h. There is no W_hh.

    Source: Feng et al. 2024, "Were RNNs all we needed?".
    """
    z = torch.sigmoid(x.z)
    return {"h": (1 - z) * s.h + z * x.n}


@cell(gates="f i n", recurrent=(), states="h")
def min_lstm(x, r, s):
    """LSTM without a recurrent product: f, i = σ(x); h' = (f h + i x.n) / (f + i).

    Gates f, i, n; state h. There is no W_hh. f / (f + i) is computed as σ(log f - log i), which is never 0 / 0.

    Source: Feng et al. 2024, "Were RNNs all we needed?".
    """
    f = torch.sigmoid(logsigmoid(x.f) - logsigmoid(x.i))
    return {"h": f * s.h + (1 - f) * x.n}


@cell(gates="i f z o", states="h c n m")
def slstm(x, r, s):
    """LSTM with exponential gates: i = exp(x.i + r.i), f = σ(x.f + r.f); c' = f c + i tanh(x.z + r.z); n' = f n + i.

    h' = σ(x.o + r.o) c' / n'. c and n are kept divided by exp(m), where m' is the larger of log f + m and log i; at the
    start, where n is 0, log i. Gates i, f, z, o; states h, c, n, m. Zoneout is for h alone: zoneout=(p, 0, 0, 0).
    `Recurrent(..., heads=4)` has the paper's heads.

    Source: Beck et al. 2024, "xLSTM: extended long short-term memory".
    """
    i = x.i + r.i
    kept = torch.where(s.n == 0, i, logsigmoid(x.f + r.f) + s.m)
    m = torch.maximum(kept, i)
    i, f = torch.exp(i - m), torch.exp(kept - m)
    c = f * s.c + i * torch.tanh(x.z + r.z)
    n = f * s.n + i
    return {"h": torch.sigmoid(x.o + r.o) * c / n, "c": c, "n": n, "m": m}


@cell(gates="f n", states="h")
def mgu(x, r, s):
    """Minimal gated unit: f = σ(x.f + r.f); h' = (1 - f) h + f tanh(x.n + r.n), where r.n is made of f h.

    Gates f, n, the latter with a recurrent part of f h in place of h; state h.

    Source: Zhou et al. 2016, "Minimal gated unit for recurrent neural networks".
    """
    f = torch.sigmoid(x.f + r.f)
    return {"h": (1 - f) * s.h + f * torch.tanh(x.n + r.n(f * s.h))}


@cell(gates="z", recurrent="u z", states="h")
def minimal_rnn(x, r, s):
    """RNN whose states are of the inputs' kind: z = tanh(x.z); u = σ(r.u + r.z); h' = u h + (1 - u) z.

    Gate z, and u without an input part; r.z is made of z in place of h; state h. The paper has one bias in u.

    Source: Chen 2017, "MinimalRNN: toward more interpretable and trainable recurrent neural networks".
    """
    z = torch.tanh(x.z)
    u = torch.sigmoid(r.u + r.z(z))
    return {"h": u * s.h + (1 - u) * z}


@cell(gates="m i f g o", states="h c")
def multiplicative_lstm(x, r, s):
    """LSTM whose gates see m = x.m r.m in place of h: i, f, o = σ(x + r); c' = f c + i tanh(x.g + r.g).

    h' = o tanh(c'). Gates m, i, f, g, o, all but the first with recurrent parts of m; states h, c. The paper has no
    biases in m.

    Source: Krause et al. 2016, "Multiplicative LSTM for sequence modelling".
    """
    m = x.m * r.m
    i, f, o = (torch.sigmoid(of_x + of_r(m)) for of_x, of_r in ((x.i, r.i), (x.f, r.f), (x.o, r.o)))
    c = f * s.c + i * torch.tanh(x.g + r.g(m))
    return {"h": o * torch.tanh(c), "c": c}


@cell(gates="z q n", recurrent="q n", states="h")
def mut1(x, r, s):
    """Found by search: z = σ(x.z); q = σ(x.q + r.q); h' = z tanh(tanh(x.n) + r.n) + (1 - z) h; r.n is made of q h.

    Gates z, q, n, the first without a recurrent part, the last with one of q h; state h. The paper has tanh of the
    input itself in place of tanh(x.n).

    Source: Jozefowicz, Zaremba & Sutskever 2015, "An empirical exploration of recurrent network architectures".
    """
    z, q = torch.sigmoid(x.z), torch.sigmoid(x.q + r.q)
    return {"h": z * torch.tanh(torch.tanh(x.n) + r.n(q * s.h)) + (1 - z) * s.h}


@cell(gates="a c n", recurrent=(), states="h", parameters="w_a w_c")
def br(x, r, s, p):
    """Bistable cell: a = 1 + tanh(x.a + w_a h); c = σ(x.c + w_c h); h' = c h + (1 - c) tanh(x.n + a h).

    Gates a, c, n; state h; parameters w_a, w_c. There is no W_hh.

    Source: Vecoven, Ernst & Drion 2021, "A bio-inspired bistable recurrent cell allows for long-lasting memory".
    """
    a, c = 1 + torch.tanh(x.a + p.w_a * s.h), torch.sigmoid(x.c + p.w_c * s.h)
    return {"h": c * s.h + (1 - c) * torch.tanh(x.n + a * s.h)}


@cell(gates="a c n", recurrent="a c", states="h")
def nbr(x, r, s):
    """Neuromodulated bistable cell: a = 1 + tanh(x.a + r.a); c = σ(x.c + r.c); h' = c h + (1 - c) tanh(x.n + a h).

    Gates a, c, n, the last without a recurrent part; state h.

    Source: Vecoven, Ernst & Drion 2021, "A bio-inspired bistable recurrent cell allows for long-lasting memory".
    """
    a, c = 1 + torch.tanh(x.a + r.a), torch.sigmoid(x.c + r.c)
    return {"h": c * s.h + (1 - c) * torch.tanh(x.n + a * s.h)}


@cell(gates="n f", recurrent="f", states="h")
def light_ru(x, r, s):
    """One gate, and content of the input alone: f = σ(x.f + r.f); h' = (1 - f) h + f tanh(x.n).

    Gates n, f, the first without a recurrent part; state h.

    Source: Ye et al. 2024, "Light recurrent unit: towards an interpretable recurrent neural network for modeling
    long-range dependency".
    """
    f = torch.sigmoid(x.f + r.f)
    return {"h": (1 - f) * s.h + f * torch.tanh(x.n)}


@cell(gates="n", states="h")
def sgrn(x, r, s):
    """One product each way: f = σ(x.n + r.n); h' = tanh((1 - f) x.n + f h).

    Gate n; state h.

    Source: https://doi.org/10.1049/gtd2.12056, "simple gated recurrent network".
    """
    f = torch.sigmoid(x.n + r.n)
    return {"h": torch.tanh((1 - f) * x.n + f * s.h)}


@cell(gates="a b c d e f g k", states="h c")
def nas(x, r, s):
    """Found by search: c' = tanh(tanh(σ(a) relu(b)) + c) tanh(σ(c) + relu(d)), where each letter is x + r of that gate.

    h' = tanh(c' tanh(tanh(tanh(e) σ(f)) + σ(tanh(g) + σ(k)))). Gates a, b, c, d, e, f, g, k; states h, c.

    Source: Zoph & Le 2017, "Neural architecture search with reinforcement learning", as torchrecurrent has it.
    """
    a, b, c, d, e, f, g, k = (of_x + of_r for of_x, of_r in zip(x, r, strict=True))
    content = torch.tanh(torch.tanh(torch.sigmoid(a) * torch.relu(b)) + s.c)
    new = content * torch.tanh(torch.sigmoid(c) + torch.relu(d))
    inner = torch.tanh(torch.tanh(e) * torch.sigmoid(f))
    outer = torch.tanh(inner + torch.sigmoid(torch.tanh(g) + torch.sigmoid(k)))
    return {"h": torch.tanh(new * outer), "c": new}


def antisymmetric_rnn(epsilon: float = 0.01, gamma: float = 0.01) -> Cell:
    """RNN as a stable differential equation: h' = h + ε tanh(x.n + r.n), where W_hh is W - W^T - γ 1.

    Gate n; state h. W is the parameter `weight_hh`.

    Args:
        epsilon: ε, the length of a step.
        gamma: γ, the diffusion.

    Source: Chang et al. 2019, "AntisymmetricRNN: a dynamical system view on recurrent neural networks".
    """

    @cell(gates="n", states="h", prepare=partial(_antisymmetric, gamma=float(gamma)))
    def antisymmetric_rnn(x, r, s):
        return {"h": s.h + epsilon * torch.tanh(x.n + r.n)}

    return antisymmetric_rnn


def gated_antisymmetric_rnn(epsilon: float = 0.01, gamma: float = 0.01) -> Cell:
    """`antisymmetric_rnn` with a gate of the same recurrent part: h' = h + ε σ(x.z + r.n) tanh(x.n + r.n).

    Gates z, n, the first without a recurrent part of its own; state h.

    Args:
        epsilon: ε, the length of a step.
        gamma: γ, the diffusion.

    Source: Chang et al. 2019, "AntisymmetricRNN: a dynamical system view on recurrent neural networks".
    """
    prepare = partial(_antisymmetric, gamma=float(gamma))

    @cell(gates="z n", recurrent="n", states="h", prepare=prepare)
    def gated_antisymmetric_rnn(x, r, s):
        return {"h": s.h + epsilon * torch.sigmoid(x.z + r.n) * torch.tanh(x.n + r.n)}

    return gated_antisymmetric_rnn


def _antisymmetric(weight: Tensor, gamma: float) -> Tensor:
    return (
        weight
        - weight.t()
        - gamma * torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    )


def cornn(dt: float = 0.05, gamma: float = 1.0, epsilon: float = 1.0) -> Cell:
    """Coupled oscillators: v' = v + dt (tanh(x.y + r.y + r.v) - γ y - ε v); y' = y + dt v'; r.v is made of v.

    Gate y, and v without an input part; states y, v.

    Args:
        dt: the length of a step.
        gamma: γ, the oscillators' frequency.
        epsilon: ε, their damping.

    Source: Rusch & Mishra 2021, "Coupled oscillatory recurrent neural network (coRNN)".
    """

    @cell(gates="y", recurrent="y v", states="y v")
    def cornn(x, r, s):
        v = s.v + dt * (torch.tanh(x.y + r.y + r.v(s.v)) - gamma * s.y - epsilon * s.v)
        return {"y": s.y + dt * v, "v": v}

    return cornn


def lem(dt: float = 1.0) -> Cell:
    """Long expressive memory: a, b = dt σ(x + r); z' = (1 - b) z + b tanh(x.z + r.z).

    y' = (1 - a) y + a tanh(x.y + r.y), where r.y is made of z'. Gates a, b, z, y; states y, z.

    Args:
        dt: the length of a step.

    Source: Rusch et al. 2022, "Long expressive memory for sequence modeling".
    """

    @cell(gates="a b z y", states="y z")
    def lem(x, r, s):
        a, b = dt * torch.sigmoid(x.a + r.a), dt * torch.sigmoid(x.b + r.b)
        z = (1 - b) * s.z + b * torch.tanh(x.z + r.z)
        return {"y": (1 - a) * s.y + a * torch.tanh(x.y + r.y(z)), "z": z}

    return lem


def scrn(alpha: float = 0.95) -> Cell:
    """RNN with a slow context c: c' = (1 - α) x.c + α c; h' = σ(x.h + r.h + r.c), where r.c is made of c'.

    Gates c, h; states h, c. The paper's context has a size of its own and its output is made of both.

    Args:
        alpha: α, what the context keeps in a step.

    Source: Mikolov et al. 2015, "Learning longer memory in recurrent neural networks".
    """

    @cell(gates="c h", recurrent="h c", states="h c")
    def scrn(x, r, s):
        c = (1 - alpha) * x.c + alpha * s.c
        return {"h": torch.sigmoid(x.h + r.h + r.c(c)), "c": c}

    return scrn


def unicornn(dt: float = 0.05, alpha: float = 1.0) -> Cell:
    """Oscillators apart: v' = v - dt σ(c) (tanh(x.y + w y) + α y); y' = y + dt σ(c) v'.

    Gate y; states y, v; parameters w, c. There is no W_hh.

    Args:
        dt: the length of a step.
        alpha: α, how the oscillators are drawn to 0.

    Source: Rusch & Mishra 2021, "UnICORNN: a recurrent model for learning very long time dependencies".
    """

    @cell(gates="y", recurrent=(), states="y v", parameters="w c")
    def unicornn(x, r, s, p):
        step = dt * torch.sigmoid(p.c)
        v = s.v - step * (torch.tanh(x.y + p.w * s.y) + alpha * s.y)
        return {"y": s.y + step * v, "v": v}

    return unicornn
