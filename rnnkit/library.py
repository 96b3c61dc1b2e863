"""Recurrent cells of papers, for `rnnkit.Recurrent` and `rnnkit.RecurrentCell`; each is a few lines of `rnnkit.cell`.

    layer = rnnkit.Recurrent(rnnkit.library.peephole_lstm, 64, 128)

In the equations x.g is the input part W_ih x_t + b_ih of the gate g, r.g its recurrent part W_hh h_{t-1} + b_hh; other
letters without an index are the states before the step, and those with a prime the states after it. Products are
elementwise. Initial values are those of the cells' own parameters; weights and biases begin as torch.nn's do. Where a
paper has one number for all units, a cell here has one for each.
"""

import torch
from torch import nn
from torch.nn.functional import logsigmoid

from rnnkit.definition import cell

__all__ = [
    "atr",
    "cfn",
    "coupled_lstm",
    "fast_grnn",
    "fast_rnn",
    "ind_rnn",
    "janet",
    "light_gru",
    "lstm_without_forget_gate",
    "lstm_without_input_gate",
    "lstm_without_output_gate",
    "min_gru",
    "min_lstm",
    "peephole_lstm",
    "ran",
    "slstm",
    "sru",
    "star",
    "ugrnn",
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
