"""The cells of `rnnkit.library`, against loops over their papers' formulas and against torchrecurrent's cells."""

import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import H, I, Loop, N, Step, T, assert_same
from torch import Tensor
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnkit
from rnnkit import foreign_cells, library
from rnnkit.graph import Graph

pytestmark = pytest.mark.usefixtures("backend")

LENGTHS = [5, 7, 1, 5, 2]
Parts = Sequence[Tensor]


def sigma(value: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-value))


def peephole_lstm(x: Parts, r: Parts, s: Parts, p: Parts) -> Parts:
    i = sigma(x[0] + r[0] + p[0] * s[1])
    f = sigma(x[1] + r[1] + p[1] * s[1])
    c = i * torch.tanh(x[2] + r[2]) + f * s[1]
    return sigma(x[3] + r[3] + p[2] * c) * torch.tanh(c), c


def lstm_of(i: Any, f: Any, g: Tensor, o: Any, c: Tensor) -> Parts:
    c = f * c + i * torch.tanh(g)
    return o * torch.tanh(c), c


def coupled_lstm(x: Parts, r: Parts, s: Parts, p: Parts) -> Parts:
    i = sigma(x[0] + r[0])
    return lstm_of(i, 1 - i, x[1] + r[1], sigma(x[2] + r[2]), s[1])


def lstm_without_forget_gate(x: Parts, r: Parts, s: Parts, p: Parts) -> Parts:
    return lstm_of(sigma(x[0] + r[0]), 1, x[1] + r[1], sigma(x[2] + r[2]), s[1])


def lstm_without_input_gate(x: Parts, r: Parts, s: Parts, p: Parts) -> Parts:
    return lstm_of(1, sigma(x[0] + r[0]), x[1] + r[1], sigma(x[2] + r[2]), s[1])


def lstm_without_output_gate(x: Parts, r: Parts, s: Parts, p: Parts) -> Parts:
    return lstm_of(sigma(x[0] + r[0]), sigma(x[1] + r[1]), x[2] + r[2], 1, s[1])


def janet(x: Parts, r: Parts, s: Parts, p: Parts) -> Parts:
    a, content = x[0] + r[0], torch.tanh(x[1] + r[1])
    return (sigma(a) * s[0] + (1 - sigma(a - 1)) * content,)


def light_gru(x: Parts, r: Parts, s: Parts, p: Parts) -> Parts:
    z = sigma(x[0] + r[0])
    return ((1 - z) * (x[1] + r[1]).clamp(min=0) + z * s[0],)


def ugrnn(x: Parts, r: Parts, s: Parts, p: Parts) -> Parts:
    g = sigma(x[1] + r[1])
    return (g * s[0] + (1 - g) * torch.tanh(x[0] + r[0]),)


def cfn(x: Parts, r: Parts, s: Parts, p: Parts) -> Parts:
    return (sigma(x[0] + r[0]) * torch.tanh(s[0]) + sigma(x[1] + r[1]) * torch.tanh(x[2]),)


def star(x: Parts, r: Parts, s: Parts, p: Parts) -> Parts:
    k = sigma(x[1] + r[0])
    return (torch.tanh(s[0] + k * (torch.tanh(x[0]) - s[0])),)


def ran(x: Parts, r: Parts, s: Parts, p: Parts) -> Parts:
    c = sigma(x[1] + r[0]) * x[0] + sigma(x[2] + r[1]) * s[1]
    return torch.tanh(c), c


def atr(x: Parts, r: Parts, s: Parts, p: Parts) -> Parts:
    return (sigma(x[0] + r[0]) * x[0] + sigma(x[0] - r[0]) * s[0],)


def fast_rnn(x: Parts, r: Parts, s: Parts, p: Parts) -> Parts:
    return (sigma(p[0]) * torch.tanh(x[0] + r[0]) + sigma(p[1]) * s[0],)


def fast_grnn(x: Parts, r: Parts, s: Parts, p: Parts) -> Parts:
    z, n = sigma(x[0] + r[0] + p[0]), torch.tanh(x[0] + r[0] + p[1])
    return ((sigma(p[2]) * (1 - z) + sigma(p[3])) * n + z * s[0],)


def ind_rnn(x: Parts, r: Parts, s: Parts, p: Parts) -> Parts:
    return ((x[0] + p[0] * s[0]).clamp(min=0),)


def sru(x: Parts, r: Parts, s: Parts, p: Parts) -> Parts:
    f, q = sigma(x[1] + p[0] * s[1]), sigma(x[2] + p[1] * s[1])
    c = f * s[1] + (1 - f) * x[0]
    return q * c + (1 - q) * x[3], c


def min_gru(x: Parts, r: Parts, s: Parts, p: Parts) -> Parts:
    z = sigma(x[0])
    return ((1 - z) * s[0] + z * x[1],)


def min_lstm(x: Parts, r: Parts, s: Parts, p: Parts) -> Parts:
    f, i = sigma(x[0]), sigma(x[1])
    return (f / (f + i) * s[0] + i / (f + i) * x[2],)


def slstm(x: Parts, r: Parts, s: Parts, p: Parts) -> Parts:
    """With the states' scale as in the authors' code; `test_slstm_is_the_formula_without_a_scale` has none."""
    _, c, n, m = s
    log_i, log_f = x[0] + r[0], sigma(x[1] + r[1]).log()
    scale = log_i if not n.any() else torch.maximum(log_f + m, log_i)
    i, f = torch.exp(log_i - scale), torch.exp(log_f + m - scale).clamp(max=1)
    c, n = f * c + i * torch.tanh(x[2] + r[2]), f * n + i
    return sigma(x[3] + r[3]) * c / n, c, n, scale


def mgu(x: Parts, r: Any, s: Parts, p: Parts) -> Parts:
    f = sigma(x[0] + r[0])
    return (f * torch.tanh(x[1] + r[1](f * s[0])) + (1 - f) * s[0],)


def minimal_rnn(x: Parts, r: Any, s: Parts, p: Parts) -> Parts:
    z = torch.tanh(x[0])
    u = sigma(r[0] + r[1](z))
    return (z + u * (s[0] - z),)


def multiplicative_lstm(x: Parts, r: Any, s: Parts, p: Parts) -> Parts:
    m = x[0] * r[0]
    i, f, g, o = (x[k] + r[k](m) for k in (1, 2, 3, 4))
    return lstm_of(sigma(i), sigma(f), g, sigma(o), s[1])


def mut1(x: Parts, r: Any, s: Parts, p: Parts) -> Parts:
    z, q = sigma(x[0]), sigma(x[1] + r[0])
    return (torch.tanh(r[1](q * s[0]) + torch.tanh(x[2])) * z + s[0] * (1 - z),)


def br(x: Parts, r: Any, s: Parts, p: Parts) -> Parts:
    return nbr(x, [p[0] * s[0], p[1] * s[0]], s, p)


def nbr(x: Parts, r: Any, s: Parts, p: Parts) -> Parts:
    a, c = 1 + torch.tanh(x[0] + r[0]), sigma(x[1] + r[1])
    return (c * s[0] + (1 - c) * torch.tanh(x[2] + a * s[0]),)


def light_ru(x: Parts, r: Parts, s: Parts, p: Parts) -> Parts:
    f = sigma(x[1] + r[0])
    return ((1 - f) * s[0] + f * torch.tanh(x[0]),)


def sgrn(x: Parts, r: Parts, s: Parts, p: Parts) -> Parts:
    f = sigma(x[0] + r[0])
    return (torch.tanh((1 - f) * x[0] + f * s[0]),)


def nas(x: Parts, r: Parts, s: Parts, p: Parts) -> Parts:
    g = [of_x + of_r for of_x, of_r in zip(x, r, strict=True)]
    tanh = torch.tanh
    first = tanh(tanh(sigma(g[0]) * g[1].clamp(min=0)) + s[1])
    c = first * tanh(sigma(g[2]) + g[3].clamp(min=0))
    last = tanh(tanh(tanh(g[4]) * sigma(g[5])) + sigma(tanh(g[6]) + sigma(g[7])))
    return tanh(c * last), c


def antisymmetric_rnn(x: Parts, r: Parts, s: Parts, p: Parts) -> Parts:
    return (s[0] + 0.2 * torch.tanh(x[0] + r[0]),)


def gated_antisymmetric_rnn(x: Parts, r: Parts, s: Parts, p: Parts) -> Parts:
    return (s[0] + 0.2 * sigma(x[0] + r[0]) * torch.tanh(x[1] + r[0]),)


def cornn(x: Parts, r: Any, s: Parts, p: Parts) -> Parts:
    y, v = s
    v = v + 0.3 * torch.tanh(x[0] + r[0] + r[1](v)) - 0.3 * 1.5 * y - 0.3 * 0.7 * v
    return y + 0.3 * v, v


def lem(x: Parts, r: Any, s: Parts, p: Parts) -> Parts:
    a, b = 0.6 * sigma(x[0] + r[0]), 0.6 * sigma(x[1] + r[1])
    z = s[1] + b * (torch.tanh(x[2] + r[2]) - s[1])
    return s[0] + a * (torch.tanh(x[3] + r[3](z)) - s[0]), z


def scrn(x: Parts, r: Any, s: Parts, p: Parts) -> Parts:
    c = 0.2 * x[0] + 0.8 * s[1]
    return sigma(x[1] + r[0] + r[1](c)), c


def unicornn(x: Parts, r: Parts, s: Parts, p: Parts) -> Parts:
    y, v = s
    v = v - 0.3 * sigma(p[1]) * (torch.tanh(x[0] + p[0] * y) + 0.8 * y)
    return y + 0.3 * sigma(p[1]) * v, v


#: Cells that are made of numbers.
MADE = {
    "antisymmetric_rnn": library.antisymmetric_rnn(epsilon=0.2, gamma=0.3),
    "cornn": library.cornn(dt=0.3, gamma=1.5, epsilon=0.7),
    "gated_antisymmetric_rnn": library.gated_antisymmetric_rnn(epsilon=0.2, gamma=0.3),
    "lem": library.lem(dt=0.6),
    "scrn": library.scrn(alpha=0.8),
    "unicornn": library.unicornn(dt=0.3, alpha=0.8),
}
CELLS = {name: MADE.get(name, getattr(library, name)) for name in library.__all__}

Formula = Callable[[Parts, Any, Parts, Parts], Parts]
FORMULAS: dict[str, Formula] = {name: globals()[name] for name in library.__all__}
each_cell = pytest.mark.parametrize("name", FORMULAS)


class FormulaLoop(Loop):
    """A layer as a loop over steps by a formula."""

    def step_of(self, layer: Any, k: int, d: int) -> Step:
        end, cell = f"_l{k}" + "_reverse" * d, layer.cell

        def own(kind: str) -> Any:
            return getattr(layer, kind + end, None)

        def step(x: Tensor, h: Tensor, states: list[Tensor]) -> list[Tensor]:
            of_x = gates_of(linear(x, own("weight_ih"), own("bias_ih")), len(cell.gates))
            of_h: Any = ()
            if cell.recurrent:
                early = cell.graph.early
                late = [
                    lambda value, k=k: parts_of(value)[k] for k in range(early, len(cell.recurrent))
                ]
                of_h = [*parts_of(h)[:early], *late]
            new = list(FORMULAS[cell.name](of_x, of_h, states, [own(n) for n in cell.parameters]))
            if layer.proj_size:
                new[0] = of_heads(new[0], own("weight_hr"))
            return new

        def parts_of(value: Tensor) -> Parts:
            """The recurrent parts of all gates, made of a value."""
            product = of_heads(value, own("weight_hh"), prepared)
            if layer.bias:
                product = product + own("bias_hh")
            return gates_of(product, len(cell.recurrent))

        def prepared(weight: Tensor) -> Tensor:
            if "antisymmetric" not in cell.name:
                return weight
            return weight - weight.mT - 0.3 * torch.eye(weight.size(-1)).double()

        def of_heads(
            value: Tensor,
            weight: Tensor,
            prepare: Callable[[Tensor], Tensor] = lambda weight: weight,
        ) -> Tensor:
            """Each head's product, one after the other."""
            weight = prepare(weight)
            each = weight.unbind(0) if layer.heads > 1 else [weight]
            parts = zip(value.chunk(layer.heads, -1), each, strict=True)
            return torch.cat([part @ of_head.t() for part, of_head in parts], -1)

        def gates_of(product: Tensor, count: int) -> Parts:
            """Each gate of all heads; the product has heads, each with its gates."""
            heads = [of_head.chunk(count, -1) for of_head in product.chunk(layer.heads, -1)]
            return [torch.cat(of_gate, -1) for of_gate in zip(*heads, strict=True)]

        return step


def made(name: str, **options: Any) -> Any:
    """Two layers with arbitrary parameters, in float64."""
    cell = CELLS[name]
    layer = rnnkit.Recurrent(cell, I, H, **{"num_layers": 2, **options}).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
        for state in layer._learned_names() if layer.learn_initial_state else ():
            getattr(layer, state).abs_()  # an sLSTM divides by n
    return layer


def states_of(layer: Any) -> list[Tensor]:
    """Initial states [L*D, N, width]."""
    places, widths = layer.num_layers * (1 + layer.bidirectional), [H] * len(layer.cell.states)
    widths[0] = layer.proj_size or H
    return [torch.rand(places, N, w, dtype=torch.float64).requires_grad_() for w in widths]


def as_hx(states: Sequence[Tensor]) -> Any:
    return states[0] if len(states) == 1 else tuple(states)


def as_list(hx: Any) -> list[Any]:
    return list(hx) if type(hx) is tuple else [hx]


WAYS: dict[str, dict[str, Any]] = {
    "one direction": {},
    "two directions": {"bidirectional": True},
    "packed": {"bidirectional": True},
    "lengths": {"bidirectional": True},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "projected": {"proj_size": 3, "bidirectional": True},
    "learned": {"learn_initial_state": True, "bidirectional": True},
    "zoneout": {"zoneout": 0.3},
    "reset": {"bidirectional": True},
    "zeros": {"bidirectional": True},
    "recompute": {"recompute": True},
    "heads": {"heads": 2},
    "heads, lengths": {"heads": 4, "bidirectional": True},
    "heads, reset": {"heads": 2, "bidirectional": True},
    "heads, projected": {"heads": 2, "proj_size": 2, "bidirectional": True, "bias": False},
    "heads, learned": {"heads": 2, "learn_initial_state": True, "batch_first": True},
}


@pytest.mark.parametrize("way", WAYS)
@each_cell
def test_layers_are_the_formula(name: str, way: str) -> None:
    """The output, all states and all gradients."""
    options = dict(WAYS[way])
    cell = CELLS[name]
    if "projected" in way and not cell.spec.projects:
        why = "has a product of another value" if cell.graph.late else "reads h itself"
        with pytest.raises(ValueError, match=f"proj_size to be 0 for {name}, whose step {why}"):
            made(name, **options)
        return
    if way == "zoneout" and name == "slstm":
        options["zoneout"] = (0.3, 0, 0, 0)
    layer = made(name, **options).eval()
    x = torch.randn(T, N, I, dtype=torch.float64, requires_grad=True)
    states, hx, given = states_of(layer), None, list[Tensor]()
    if "learned" in way:
        states = [getattr(layer, s).unsqueeze(1).expand(-1, N, -1) for s in layer._learned_names()]
    elif way == "zeros":
        states = [torch.zeros_like(state) for state in states]
    else:
        hx, given = as_hx(states), states
    lengths = LENGTHS if way == "packed" or "lengths" in way else [T] * N
    reset = torch.rand(T, N) < 0.3 if "reset" in way else None
    zoneout = layer.zoneout if isinstance(layer.zoneout, tuple) else [layer.zoneout] * len(states)
    loop = FormulaLoop(reset, [torch.zeros_like(s) for s in states], lengths, (), zoneout)
    every, finals = loop(layer, x, states)
    if way == "packed":
        packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
        output, last, all_states = layer(packed, hx, all_states=True)
        assert torch.equal(output.data, as_list(all_states)[0].data)
        found = [pad_packed_sequence(rows)[0] for rows in as_list(all_states)]
    elif layer.batch_first:
        _, last, all_states = layer(x.transpose(0, 1), hx, all_states=True)
        found = [state.transpose(0, 1) for state in as_list(all_states)]
    else:
        arguments = {"lengths": LENGTHS} if "lengths" in way else {"reset": reset}
        _, last, all_states = layer(x, hx, all_states=True, **arguments)
        found = as_list(all_states)
    wanted = [x, *given, *layer.parameters()]
    assert_same([*found, *as_list(last)], [*every, *finals], wanted)


@pytest.mark.parametrize("heads", [1, 2])
@each_cell
def test_one_step_is_the_layers(name: str, heads: int) -> None:
    layer = made(name, num_layers=1, heads=heads)
    one = rnnkit.RecurrentCell(layer.cell, I, H, heads=heads).double()
    one.load_state_dict({key.removesuffix("_l0"): v for key, v in layer.state_dict().items()})
    x, states = torch.randn(N, I, dtype=torch.float64), states_of(layer)
    found = as_list(one(x, as_hx([state[0] for state in states])))
    expected = as_list(layer(x[None], as_hx(states))[1])
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right[0], rtol=1e-13, atol=1e-13)


@each_cell
def test_gradcheck(name: str) -> None:
    layer = rnnkit.Recurrent(CELLS[name], 2, 2).double()
    names = [key for key, _ in layer.named_parameters()]
    inputs = [torch.randn(3, 2, 2, dtype=torch.float64).requires_grad_()]
    inputs += [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]

    def run(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, parameters, strict=True))
        output, last = torch.func.functional_call(layer, given, (x,))
        return output, *as_list(last)

    assert torch.autograd.gradcheck(run, inputs)


@each_cell
def test_json_and_pickle(name: str) -> None:
    cell = CELLS[name]
    graph = Graph.from_json(cell.op_name)
    assert graph == cell.graph and graph.to_json() == cell.op_name
    again = pickle.loads(pickle.dumps(cell))
    assert repr(again) == repr(cell) and again.graph == cell.graph and again.init == cell.init


@each_cell
def test_docstrings_name_everything(name: str) -> None:
    cell = CELLS[name]
    words = (
        getattr(library, name).__doc__.replace(",", " ").replace(";", " ").replace(".", " ").split()
    )
    assert {*cell.gates, *cell.states, *cell.parameters} <= set(words)
    assert "Source: " in getattr(library, name).__doc__
    assert f"`{name}`" in (Path(__file__).parents[1] / "docs/cells.md").read_text("utf-8")


def test_every_cell_is_listed() -> None:
    cells = [name for name, value in vars(library).items() if isinstance(value, rnnkit.Cell)]
    assert sorted([*cells, *MADE]) == library.__all__
    for name in MADE:
        assert isinstance(getattr(library, name)(), rnnkit.Cell) and CELLS[name].name == name


def test_it_is_imported_when_it_is_used() -> None:
    script = """
import sys, rnnkit
assert "rnnkit.library" not in sys.modules
assert rnnkit.library.janet.states == ("h",)
assert rnnkit.library is sys.modules["rnnkit.library"]
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError, match="module 'rnnkit' has no attribute 'libary'"):
        _ = rnnkit.libary


def test_initial_values() -> None:
    layer = rnnkit.Recurrent(library.fast_rnn, I, H, 2, bidirectional=True)
    layer.alpha_l1_reverse.data.zero_()
    layer.reset_parameters()
    for end in ("l0", "l0_reverse", "l1", "l1_reverse"):
        assert getattr(layer, f"alpha_{end}").eq(-3).all()
        assert getattr(layer, f"beta_{end}").eq(3).all()
    one = rnnkit.RecurrentCell(library.fast_grnn, I, H)
    for name, start in (("b_z", 1), ("b_n", 1), ("zeta", 1), ("nu", -4)):
        assert getattr(one, name).eq(start).all()
    u = rnnkit.Recurrent(library.ind_rnn, 1, 1000).u_l0
    assert u.min() >= 0 and u.max() <= 1 and abs(u.mean() - 0.5) < 0.1


def test_slstm_is_the_formula_without_a_scale() -> None:
    """c and n of the paper are those of the cell times exp(m)."""
    layer = made("slstm", num_layers=1)
    x = torch.randn(T, N, I, dtype=torch.float64, requires_grad=True)
    h, c, n = (torch.zeros(N, H, dtype=torch.float64) for _ in range(3))
    every = []
    for of_step in x:
        parts = linear(of_step, layer.weight_ih_l0, layer.bias_ih_l0)
        parts = parts + linear(h, layer.weight_hh_l0, layer.bias_hh_l0)
        i, f, z, o = parts.chunk(4, -1)
        c, n = sigma(f) * c + i.exp() * z.tanh(), sigma(f) * n + i.exp()
        h = sigma(o) * c / n
        every.append(h)
    output, (_, last_c, last_n, m) = layer(x)
    found = [output, last_c[0] * m[0].exp(), last_n[0] * m[0].exp()]
    assert_same(found, [torch.stack(every), c, n], [x, *layer.parameters()])


@pytest.mark.parametrize("name", ["slstm", "min_lstm"])
@pytest.mark.parametrize("scale", [-300.0, 300.0])
def test_large_values_stay_finite(name: str, scale: float) -> None:
    layer = rnnkit.Recurrent(getattr(library, name), 1, 4)
    with torch.no_grad():
        layer.weight_ih_l0.fill_(scale)
    x = torch.ones(5, 2, 1)
    x[2] = -1
    output, _ = layer(x)
    output.sum().backward()
    assert output.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


#: torchrecurrent's layers that the library has, and their arguments.
THEIRS: dict[str, dict[str, Any]] = {
    "ATR": {},
    "AntisymmetricRNN": {"epsilon": 0.2, "gamma": 0.3},
    "BR": {},
    "CFN": {},
    "FastGRNN": {"nonlinearity": "sigmoid"},
    "FastRNN": {},
    "GatedAntisymmetricRNN": {"epsilon": 0.2, "gamma": 0.3},
    "IndRNN": {"nonlinearity": "relu"},
    "JANET": {},
    "LightRU": {},
    "LiGRU": {},
    "MGU": {},
    "MUT1": {},
    "MinimalRNN": {},
    "MultiplicativeLSTM": {},
    "NAS": {},
    "NBR": {},
    "OriginalLSTM": {},
    "PeepholeLSTM": {},
    "RAN": {},
    "SGRN": {},
    "STAR": {},
    "TRNN": {},
    "UGRNN": {},
    "UnICORNN": {"dt": 0.3, "alpha": 0.8},
    "coRNN": {"dt": 0.3, "gamma": 1.5, "epsilon": 0.7},
}


@pytest.fixture
def torchrecurrent() -> Any:
    return pytest.importorskip("torchrecurrent", reason="torchrecurrent is not installed")


def test_every_form_is_tested() -> None:
    assert sorted(THEIRS) == sorted(foreign_cells._FORMS)


@pytest.mark.parametrize("name", THEIRS)
def test_cells_of_torchrecurrent(torchrecurrent: Any, name: str) -> None:
    theirs = getattr(torchrecurrent, f"{name}Cell")(I, H, **THEIRS[name]).double()
    randomize(theirs)
    ours: Any = rnnkit.from_torchrecurrent(theirs)
    x = torch.randn(N, I, dtype=torch.float64, requires_grad=True)
    states = [torch.rand(N, H, dtype=torch.float64, requires_grad=True) for _ in ours.cell.states]
    as_theirs = (states[0],) * 2 if name == "JANET" else as_hx(states)
    found, expected = as_list(ours(x, as_hx(states))), as_list(theirs(x, as_theirs))
    assert_same(found, expected[: len(found)], [x, *states])


@pytest.mark.parametrize("name", THEIRS)
def test_layers_of_torchrecurrent(torchrecurrent: Any, name: str) -> None:
    options = {"num_layers": 2, "batch_first": True, **THEIRS[name]}
    theirs = getattr(torchrecurrent, name)(I, H, **options).double()
    randomize(theirs)
    ours: Any = rnnkit.from_torchrecurrent(theirs)
    assert ours.num_layers == 2 and ours.batch_first
    x = torch.randn(N, T, I, dtype=torch.float64, requires_grad=True)
    (found, last), (expected, of_theirs) = ours(x), theirs(x)
    assert_same([found, *as_list(last)], [expected, *as_list(of_theirs)[: len(as_list(last))]], [x])


def randomize(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if not key.endswith("beta") or type(module).__name__.startswith("Fast"):
                parameter.normal_(std=0.5)


def test_what_cannot_be_converted(torchrecurrent: Any) -> None:
    convert = rnnkit.from_torchrecurrent
    with pytest.raises(
        TypeError, match="expected module to be a layer or cell of torchrecurrent, got GRU"
    ):
        convert(torch.nn.GRU(2, 3))
    with pytest.raises(ValueError, match=r"one that rnnkit.library has, ATR.*coRNN, got TGRU"):
        convert(torchrecurrent.TGRU(2, 3))
    with pytest.raises(ValueError, match=r"expected act of MGUCell to be torch.nn.Tanh, got ReLU"):
        convert(torchrecurrent.MGUCell(2, 3, nonlinearity="relu"))
    with pytest.raises(ValueError, match=r"expected act of IndRNN to be torch.nn.ReLU, got Tanh"):
        convert(torchrecurrent.IndRNN(2, 3))
    with pytest.raises(ValueError, match="expected beta of a JANET to be 1, got 2"):
        convert(torchrecurrent.JANETCell(2, 3, beta=2.0))


def test_modes_and_what_is_not_trained(torchrecurrent: Any) -> None:
    theirs = torchrecurrent.MGU(I, H, num_layers=2, dropout=0.5).eval()
    theirs.cells[1].weight_hh.requires_grad_(False)
    ours = rnnkit.from_torchrecurrent(theirs)
    assert not ours.training
    frozen = [name for name, parameter in ours.named_parameters() if not parameter.requires_grad]
    assert frozen == ["weight_hh_l1"]
    x = torch.randn(T, N, I)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    cell = torchrecurrent.MGUCell(I, H, bias=False)
    ours = rnnkit.from_torchrecurrent(cell)
    assert ours.training and not ours.bias_ih.requires_grad and ours.bias_hh.requires_grad


def test_biases_that_theirs_do_not_have(torchrecurrent: Any) -> None:
    theirs = torchrecurrent.MGU(I, H, bias=False, recurrent_bias=False)
    ours = rnnkit.from_torchrecurrent(theirs)
    assert ours.bias_ih_l0.eq(0).all() and ours.bias_hh_l0.eq(0).all()
    x = torch.randn(T, N, I)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
