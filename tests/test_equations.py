"""The textbook's page: each cell's equations for one step in plain Python, against rnnkit and torch.nn.

A vector is a list of floats and a matrix a list of rows; beside them only `math` is used. As in PyTorch,
W_ih and W_hh hold the rows of all gates one below the other, and each has its own bias.

    RNN   Elman 1990, "Finding structure in time"
    LSTM  Hochreiter & Schmidhuber 1997, "Long short-term memory", with the forget gate of Gers et al. 2000;
          projection: Sak et al. 2014, "Long short-term memory based recurrent neural network architectures"
    GRU   Cho et al. 2014, "Learning phrase representations using RNN encoder-decoder", as PyTorch has it;
          the other convention: Chung et al. 2014, "Empirical evaluation of gated recurrent neural networks"
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnkit

Vector = list[float]
Matrix = list[Vector]


@dataclass
class Weights:
    """One layer's, in one direction."""

    W_ih: Matrix
    W_hh: Matrix
    b_ih: Vector
    b_hh: Vector
    W_hr: Matrix | None = None


def times(W: Matrix, v: Vector) -> Vector:
    return [sum(w * x for w, x in zip(row, v, strict=True)) for row in W]


def plus(*vectors: Vector) -> Vector:
    return [sum(terms) for terms in zip(*vectors, strict=True)]


def gates(v: Vector, count: int) -> list[Vector]:
    """The equal parts of v, one for each gate."""
    size = len(v) // count
    return [v[gate * size : (gate + 1) * size] for gate in range(count)]


def σ(v: Vector) -> Vector:
    return [1 / (1 + math.exp(-a)) for a in v]


def tanh(v: Vector) -> Vector:
    return [math.tanh(a) for a in v]


def relu(v: Vector) -> Vector:
    return [max(a, 0.0) for a in v]


def rnn(w: Weights, x: Vector, h: Vector, activation: Callable[[Vector], Vector] = tanh) -> Vector:
    """h' = tanh(W_ih x + b_ih + W_hh h + b_hh), or ReLU in place of tanh."""
    return activation(plus(times(w.W_ih, x), w.b_ih, times(w.W_hh, h), w.b_hh))


def lstm(w: Weights, x: Vector, h: Vector, c: Vector) -> tuple[Vector, Vector]:
    """The gates i, f, g, o in this order; c' = f⊙c + i⊙g, h' = o⊙tanh(c'), and W_hr h' with a projection."""
    i, f, g, o = gates(plus(times(w.W_ih, x), w.b_ih, times(w.W_hh, h), w.b_hh), 4)
    i, f, g, o = σ(i), σ(f), tanh(g), σ(o)
    c_next = [f[j] * c[j] + i[j] * g[j] for j in range(len(c))]
    h_next = [o[j] * math.tanh(c_next[j]) for j in range(len(c))]
    return h_next if w.W_hr is None else times(w.W_hr, h_next), c_next


def gru(w: Weights, x: Vector, h: Vector) -> Vector:
    """h' = (1 - z)⊙n + z⊙h: z keeps the old state."""
    z, n = z_and_n(w, x, h)
    return [(1 - z[j]) * n[j] + z[j] * h[j] for j in range(len(h))]


def gru_of_the_textbooks(w: Weights, x: Vector, h: Vector) -> Vector:
    """The other convention, h' = (1 - z)⊙h + z⊙n: z lets the new state in."""
    z, n = z_and_n(w, x, h)
    return [(1 - z[j]) * h[j] + z[j] * n[j] for j in range(len(h))]


def z_and_n(w: Weights, x: Vector, h: Vector) -> tuple[Vector, Vector]:
    """r, z = σ(W x + b + W h + b), n = tanh(W x + b + r⊙(W h + b)), each with its rows; gate order r, z, n."""
    x_r, x_z, x_n = gates(plus(times(w.W_ih, x), w.b_ih), 3)
    h_r, h_z, h_n = gates(plus(times(w.W_hh, h), w.b_hh), 3)
    r, z = σ(plus(x_r, h_r)), σ(plus(x_z, h_z))
    return z, tanh([x_n[j] + r[j] * h_n[j] for j in range(len(h))])


@dataclass(frozen=True)
class Cell:
    """A cell's name in torch.nn and rnnkit, its options there, and its step: (w, x, h, c or nothing) -> states."""

    name: str
    step: Callable[..., tuple[Vector, ...]]
    states: int = 1
    options: tuple[tuple[str, str], ...] = ()


CELLS = {
    "rnn_tanh": Cell("RNN", lambda w, x, h: (rnn(w, x, h),)),
    "rnn_relu": Cell(
        "RNN", lambda w, x, h: (rnn(w, x, h, relu),), options=(("nonlinearity", "relu"),)
    ),
    "lstm": Cell("LSTM", lstm, states=2),
    "gru": Cell("GRU", lambda w, x, h: (gru(w, x, h),)),
}

T, N, I, H, P = 4, 2, 3, 5, 2  # noqa: E741

each_cell = pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
each_package = pytest.mark.parametrize("package", (rnnkit, nn), ids=("rnnkit", "torch.nn"))


def scan(
    cell: Cell, w: Weights, xs: Sequence[Vector], states: Sequence[Vector]
) -> tuple[list[Vector], Sequence[Vector]]:
    """The step taken once for each x: every h, and the last states."""
    outputs = []
    for x in xs:
        states = cell.step(w, x, *states)
        outputs.append(states[0])
    return outputs, states


def layer(package: ModuleType, cell: Cell, **options: object) -> nn.RNNBase:
    return getattr(package, cell.name)(I, H, dtype=torch.float64, **dict(cell.options), **options)


def weights_of(module: nn.Module, suffix: str = "_l0") -> Weights:
    """A layer's parameters as lists; a torch cell's have the suffix ""."""
    names = [f"weight_ih{suffix}", f"weight_hh{suffix}", f"bias_ih{suffix}", f"bias_hh{suffix}"]
    names += [f"weight_hr{suffix}"] * hasattr(module, f"weight_hr{suffix}")
    return Weights(*(getattr(module, name).tolist() for name in names))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def hx(states: Sequence[torch.Tensor]) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """The states as a module takes them."""
    return tuple(states) if len(states) > 1 else states[0]


def tensors(result: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The states as a module returns them."""
    return [result] if isinstance(result, torch.Tensor) else list(result)


def assert_equal(actual: torch.Tensor, expected: Sequence) -> None:
    torch.testing.assert_close(
        actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=1e-14
    )


@each_package
@each_cell
def test_one_step_of_a_cell(cell: Cell, package: ModuleType, backend: str) -> None:
    module = getattr(package, f"{cell.name}Cell")(I, H, dtype=torch.float64, **dict(cell.options))
    x, states = random(I), [random(H) for _ in range(cell.states)]
    found = tensors(module(x, hx(states)))
    expected = cell.step(weights_of(module, ""), x.tolist(), *(state.tolist() for state in states))
    for actual, state in zip(found, expected, strict=True):
        assert_equal(actual, state)


@each_package
@pytest.mark.parametrize("steps", (1, T))
@each_cell
def test_a_layer_is_the_step_repeated(
    cell: Cell, steps: int, package: ModuleType, backend: str
) -> None:
    module = layer(package, cell)
    x, states = random(steps, N, I), [random(1, N, H) for _ in range(cell.states)]
    output, found = module(x, hx(states))
    w = weights_of(module)
    for n in range(N):
        hs, last = scan(cell, w, x[:, n].tolist(), [state[0, n].tolist() for state in states])
        for t, h in enumerate(hs):
            assert_equal(output[t, n], h)
        for actual, state in zip(tensors(found), last, strict=True):
            assert_equal(actual[0, n], state)


@each_package
@each_cell
def test_without_states_the_scan_starts_from_zeros(
    cell: Cell, package: ModuleType, backend: str
) -> None:
    module = layer(package, cell)
    x = random(T, 1, I)
    hs, _ = scan(cell, weights_of(module), x[:, 0].tolist(), [[0.0] * H] * cell.states)
    assert_equal(module(x)[0][-1, 0], hs[-1])


@each_package
def test_projection(package: ModuleType, backend: str) -> None:
    """h is W_hr times what the LSTM would return, and it is this h that the next step reads; c is as long as before."""
    module = layer(package, CELLS["lstm"], proj_size=P)
    x, h, c = random(T, 1, I), random(1, 1, P), random(1, 1, H)
    output, (h_n, c_n) = module(x, (h, c))
    states = h.flatten().tolist(), c.flatten().tolist()
    hs, last = scan(CELLS["lstm"], weights_of(module), x[:, 0].tolist(), states)
    for t in range(T):
        assert_equal(output[t, 0], hs[t])
    assert_equal(h_n[0, 0], last[0])
    assert_equal(c_n[0, 0], last[1])


@each_package
@each_cell
def test_two_layers_in_two_directions(cell: Cell, package: ModuleType, backend: str) -> None:
    """The reverse direction reads the sequence from its end; both outputs, side by side, are the next layer's x."""
    module = layer(package, cell, num_layers=2, bidirectional=True)
    x = random(T, 1, I)
    zeros = [[0.0] * H] * cell.states
    xs = x[:, 0].tolist()
    last = []
    for index in range(2):
        forth, last_forth = scan(cell, weights_of(module, f"_l{index}"), xs, zeros)
        back, last_back = scan(cell, weights_of(module, f"_l{index}_reverse"), xs[::-1], zeros)
        xs = [f + b for f, b in zip(forth, back[::-1], strict=True)]
        last += [last_forth, last_back]
    output, found = module(x)
    for t in range(T):
        assert_equal(output[t, 0], xs[t])
    for actual, states in zip(tensors(found), zip(*last, strict=True), strict=True):
        assert_equal(actual[:, 0], list(states))


@each_package
@each_cell
def test_packed_sequences_are_scanned_each_to_its_own_end(
    cell: Cell, package: ModuleType, backend: str
) -> None:
    module = layer(package, cell, bidirectional=True)
    x, lengths = random(T, N, I), [T, T - 2]
    output, found = module(pack_padded_sequence(x, torch.tensor(lengths)))
    output, _ = pad_packed_sequence(output)
    zeros = [[0.0] * H] * cell.states
    for n, length in enumerate(lengths):
        xs = x[:length, n].tolist()
        forth, last_forth = scan(cell, weights_of(module), xs, zeros)
        back, last_back = scan(cell, weights_of(module, "_l0_reverse"), xs[::-1], zeros)
        for t in range(length):
            assert_equal(output[t, n], forth[t] + back[length - 1 - t])
        for actual, states in zip(
            tensors(found), zip(last_forth, last_back, strict=True), strict=True
        ):
            assert_equal(actual[:, n], list(states))


def test_both_conventions_of_the_gru_are_one_function(backend: str) -> None:
    """1 - σ(a) = σ(-a): with the z rows of weights and biases negated, one convention computes the other."""
    module = layer(rnnkit, CELLS["gru"])
    x, h = random(I), random(H)
    w = weights_of(module)
    expected = gru_of_the_textbooks(w, x.tolist(), h.tolist())
    negated = gru(with_z_negated(w), x.tolist(), h.tolist())
    assert negated == pytest.approx(expected, rel=1e-13)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter[H : 2 * H].neg_()
    assert_equal(module(x[None], h[None])[0][0], expected)


def with_z_negated(w: Weights) -> Weights:
    """Rows H to 2H of everything, the z gate's, times -1."""
    signs = [1.0] * H + [-1.0] * H + [1.0] * H

    def signed(W: Matrix) -> Matrix:
        return [[sign * a for a in row] for sign, row in zip(signs, W, strict=True)]

    b_ih, b_hh = ([sign * a for sign, a in zip(signs, b, strict=True)] for b in (w.b_ih, w.b_hh))
    return Weights(signed(w.W_ih), signed(w.W_hh), b_ih, b_hh)


def test_output_of_the_textbook_rnn(backend: str) -> None:
    """y = softmax(W_hy h + b_hy): the layer gives h, and torch.nn.Linear and softmax the rest."""
    module, readout = layer(rnnkit, CELLS["rnn_tanh"]), nn.Linear(H, 7, dtype=torch.float64)
    x = random(T, I)
    hs, _ = scan(CELLS["rnn_tanh"], weights_of(module), x.tolist(), [[0.0] * H])
    y = readout(module(x)[0]).softmax(-1)
    for t in range(T):
        scores = plus(times(readout.weight.tolist(), hs[t]), readout.bias.tolist())
        total = sum(math.exp(score) for score in scores)
        assert_equal(y[t], [math.exp(score) / total for score in scores])
