"""Cells of one's own whose output is no state, and cells that prepare their recurrent matrix, beside layers without."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnkit
from rnnkit.call import LayerCall

T, N, I, H = 7, 5, 3, 4  # noqa: E741
LENGTHS = [5, 7, 1, 5, 2]
NAMES = {"gates": "a b", "recurrent": "a", "states": "h c", "parameters": "v"}


def states_after(x: Any, r: Any, s: Any, p: Any) -> tuple[Any, Any]:
    c = torch.sigmoid(x.b) * s.c + torch.tanh(x.a + r.a)
    return torch.tanh(c * p.v + s.h), c


def output_of(h: Any, c: Any) -> Any:
    return h * torch.sigmoid(c) - 0.3 * c


@rnnkit.cell(**NAMES)
def plain(x, r, s, p):
    return states_after(x, r, s, p)


@rnnkit.cell(**NAMES)
def with_output(x, r, s, p):
    h, c = states_after(x, r, s, p)
    return {"h": h, "c": c, "output": output_of(h, c)}


@pytest.fixture(params=["cpp", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Any:
    with rnnkit.backend(request.param):
        yield request.param


class ByHand(nn.Module):
    """Layers of `plain`, one by one, with the output made of all states."""

    def __init__(self, layer: Any, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for k, names in enumerate(
            layer._all_weights[i : i + layer._directions]
            for i in range(0, len(layer._all_weights), layer._directions)
        ):
            inputs = I if k == 0 else H * layer._directions
            one = rnnkit.Recurrent(plain, inputs, H, dtype=layer.weight_ih_l0.dtype, **options)
            state = {n.replace(f"_l{k}", "_l0"): getattr(layer, n) for of in names for n in of}
            one.load_state_dict(state, strict=False)
            self.layers.append(one)

    def forward(self, x: Any, hx: Any, **arguments: Any) -> Any:
        finals = []
        for k, layer in enumerate(self.layers):
            width = layer._directions
            given = tuple(s[k * width : (k + 1) * width] for s in hx)
            found = layer(x, given, all_states=True, **arguments)
            h, c = found[2]
            finals.append(found[1])
            if isinstance(h, PackedSequence):
                x = h._replace(data=output_of(h.data, c.data))
            else:
                x = output_of(h, c)
        return x, tuple(torch.cat(of) for of in zip(*finals, strict=True)), found[2]


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one direction": ({}, {}),
    "two directions": ({"bidirectional": True}, {}),
    "batch first": ({"bidirectional": True, "batch_first": True}, {}),
    "lengths": ({"bidirectional": True}, {"lengths": LENGTHS}),
    "reset": ({"bidirectional": True}, {"reset": torch.rand(T, N) < 0.3}),
    "heads": ({"bidirectional": True, "heads": 2}, {}),
    "recompute": ({"recompute": True}, {}),
    "clipped": ({"grad_clip": 0.1, "grad_cut": 3}, {}),
}


def made(**options: Any) -> Any:
    torch.manual_seed(0)
    layer = rnnkit.Recurrent(with_output, I, H, 2, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-1, 1)
    return layer


def initial(layer: Any) -> tuple[Tensor, Tensor]:
    h, c = (torch.rand(2 * layer._directions, N, H, dtype=torch.float64) for _ in range(2))
    return h.requires_grad_(), c.requires_grad_()


def flat(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, PackedSequence):
        return [found.data]
    return [tensor for one in found for tensor in flat(one)]


def assert_same(found: Any, expected: Any, layer: Any, by_hand: ByHand, *leaves: Tensor) -> None:
    """Results, and the gradients of leaves and of the weights of each layer."""
    ours, theirs = flat(found), flat(expected)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    grads = [torch.randn_like(result) for result in ours]
    mine = torch.autograd.grad(ours, [*leaves, *layer.parameters()], grads)
    weights = [weight for one in by_hand.layers for weight in one.parameters()]
    right = torch.autograd.grad(theirs, [*leaves, *weights], grads)
    torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("what", OPTIONS)
def test_an_output_that_is_no_state(what: str) -> None:
    options, arguments = OPTIONS[what]
    layer = made(**options)
    by_hand = ByHand(layer, **options)
    x = torch.randn(N, T, I) if layer.batch_first else torch.randn(T, N, I)
    x, hx = x.double().requires_grad_(), initial(layer)
    expected = by_hand(x, hx, **arguments)
    found = layer(x, hx, all_states=True, **arguments)
    assert_same(found, expected, layer, by_hand, x, *hx)
    without = layer(x, hx, **arguments)
    torch.testing.assert_close(flat(without), flat(found[:2]), rtol=0, atol=0)


def test_packed() -> None:
    layer = made(bidirectional=True)
    by_hand = ByHand(layer, bidirectional=True)
    x, hx = torch.randn(T, N, I, dtype=torch.float64), initial(layer)
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    found, expected = layer(packed, hx, all_states=True), by_hand(packed, hx)
    assert_same(found, expected, layer, by_hand, *hx)


def test_zeros_and_one_sequence() -> None:
    layer = made(bidirectional=True)
    x = torch.randn(T, N, I, dtype=torch.float64)
    zeros = tuple(torch.zeros_like(state) for state in initial(layer))
    torch.testing.assert_close(flat(layer(x)), flat(layer(x, zeros)), rtol=0, atol=0)
    y, (h, c) = layer(x[:, 0])
    assert y.shape == (T, 2 * H) and h.shape == c.shape == (4, H)
    torch.testing.assert_close(y, layer(x)[0][:, 0])


def test_learned_states_zoneout_and_dropout() -> None:
    layer = made(learn_initial_state=True, zoneout=(0.2, 0.1), dropout=0.5)
    assert [name for name, _ in layer.named_parameters() if name.endswith("_0")] == ["h_0", "c_0"]
    x = torch.randn(T, N, I, dtype=torch.float64)
    y, states = layer(x, reset=torch.rand(T, N) < 0.3)
    y.sum().backward()
    assert layer.h_0.grad is not None and len(states) == 2
    layer.eval()
    single = rnnkit.Recurrent(with_output, I, H, dtype=torch.float64, zoneout=0.3).eval()
    cell = rnnkit.RecurrentCell(with_output, I, H, dtype=torch.float64)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in single.state_dict().items()})
    output, new = cell(x[0])  # of what the step gives, and not of what zoneout leaves of it
    y, last = single(x[:1])
    torch.testing.assert_close(y[0], output)
    torch.testing.assert_close(last[1][0], 0.7 * new[1])


def test_steps() -> None:
    layer = rnnkit.Recurrent(with_output, I, H, dtype=torch.float64)
    cell = rnnkit.RecurrentCell(with_output, I, H, dtype=torch.float64)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x, states, outputs = torch.randn(T, N, I, dtype=torch.float64), None, []
    for of_step in x:
        output, states = cell(of_step, states)
        outputs.append(output)
    y, last = layer(x)
    torch.testing.assert_close(torch.stack(outputs), y)
    torch.testing.assert_close([state[0] for state in last], list(states))
    one, (h, _) = cell(x[0, 0])
    torch.testing.assert_close(one, outputs[0][0])
    assert h.shape == (H,)


def test_one_state_and_an_output() -> None:
    @rnnkit.cell(gates="n", states="h")
    def cell(x, r, s):
        h = torch.tanh(x.n + r.n)
        return {"h": h, "output": 2 * h}

    assert cell.states == ("h",) and cell.has_output
    layer = rnnkit.Recurrent(cell, I, H)
    rnn = rnnkit.RNN(I, H)
    rnn.load_state_dict(layer.state_dict())
    x = torch.randn(T, N, I)
    (y, h), (expected, last) = layer(x), rnn(x)
    torch.testing.assert_close(y, 2 * expected)
    torch.testing.assert_close(h, last)
    y, h, states = layer(x, h, all_states=True)
    assert isinstance(states, Tensor) and h.shape == (1, N, H)


def test_gradient_flow_has_no_output() -> None:
    @rnnkit.cell(gates="n", states="h")
    def vanishing(x, r, s):
        h = torch.tanh(x.n + 1e-3 * r.n)
        return {"h": h, "output": 2 * h}

    layer = rnnkit.Recurrent(vanishing, I, H)
    with rnnkit.gradient_flow(layer) as flow:
        layer(torch.randn(T, N, I))[0][-1].sum().backward()
    assert flow[""].c is None and "it vanishes" in str(flow.summary())
    both = made().float()
    with rnnkit.gradient_flow(both) as flow:
        both(torch.randn(T, N, I))[0].sum().backward()
    assert flow[""].c is not None


def test_a_graph_with_an_output_as_a_name() -> None:
    """As it is traced, where the output is no state yet: the ops take it for one."""
    from rnnkit.graph import trace

    def step(x: Any, r: Any, s: Any) -> Any:
        h = torch.tanh(x.n + r.n(torch.sigmoid(x.z + r.z) * s.h))
        return {"h": h, "output": 3 * h}

    graph = trace(step, inputs="z n", recurrent="z n", states="h")
    assert graph.has_output
    weights = [torch.randn(2 * H, I), torch.randn(2 * H, H), None, None, None]
    call = LayerCall(graph.to_json(), torch.randn(T, N, I), [], weights, None, True)
    outputs, finals, _ = torch.ops.rnnkit.layer_forward(*call.arguments, None, 2)
    assert len(outputs) == len(finals) == 2
    torch.testing.assert_close(outputs[1], 3 * outputs[0])


def test_copies_and_graphs() -> None:
    layer = made().float()
    x = torch.randn(T, N, I)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), rnnkit.freeze(layer)):
        assert other.cell.has_output and other.cell.states == ("h", "c")
        with torch.no_grad():
            torch.testing.assert_close(flat(other(x)), flat(expected))
    layer.frozen = False
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(flat(compiled(x)), flat(expected))
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(flat(program.module()(x)), flat(expected))


def test_autocast() -> None:
    layer = made().float()
    x = torch.randn(T, N, I)
    with torch.autocast("cpu", torch.bfloat16):
        y, (h, c) = layer(x)
        y1, (h1, c1) = rnnkit.Recurrent(plain, I, H)(x)
    assert (y.dtype, h.dtype, c.dtype) == (y1.dtype, h1.dtype, c1.dtype)


def test_no_projection() -> None:
    @rnnkit.cell(gates="i f", states="h c")
    def cell(x, r, s):
        c = torch.sigmoid(x.f + r.f) * s.c + torch.tanh(x.i + r.i)
        return {"h": torch.tanh(c), "c": c, "output": c}

    with pytest.raises(
        ValueError, match="proj_size to be 0 for cell, whose output is not h, got 2"
    ):
        rnnkit.Recurrent(cell, I, H, proj_size=2)


def test_a_number_of_states_that_does_not_fit() -> None:
    layer = made()
    h, c = initial(layer)
    with pytest.raises(RuntimeError, match=r"expects two hidden states.*got 3 of them"):
        layer(torch.randn(T, N, I).double(), (h, c, c))
    with pytest.raises(
        ValueError, match=r"zoneout to be a number or a pair, got \(0.1, 0.1, 0.1\)"
    ):
        made(zoneout=(0.1, 0.1, 0.1))


# A prepared recurrent matrix


def antisymmetric(weight: Tensor) -> Tensor:
    return (
        weight - weight.t() - 0.1 * torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    )


@torch.no_grad()
def doubled(weight: Tensor) -> Tensor:
    return weight.mul_(2)


class Antisymmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return (
            torch.stack([*map(antisymmetric, weight)])
            if weight.dim() > 2
            else antisymmetric(weight)
        )


def step(x: Any, r: Any, s: Any) -> Any:
    return (s.h + 0.3 * torch.tanh(x.n + r.n),)


def pair(**options: Any) -> tuple[Any, Any]:
    """A layer whose cell prepares W_hh, and one whose parametrization does."""
    prepared = rnnkit.cell(step, gates="n", states="h", prepare=antisymmetric)
    bare = rnnkit.cell(step, gates="n", states="h")
    layer, other = (
        rnnkit.Recurrent(cell, I, H, 2, dtype=torch.float64, **options) for cell in (prepared, bare)
    )
    other.load_state_dict(layer.state_dict())
    for name, _ in layer.named_parameters():
        if name.startswith("weight_hh"):
            register_parametrization(other, name, Antisymmetric())
    return layer, other


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"heads": 2}], ids=str)
def test_prepared_matrices_are_parametrized_ones(options: dict[str, Any]) -> None:
    layer, other = pair(**options)
    x = torch.randn(T, N, I, dtype=torch.float64)
    found, expected = layer(x), other(x)
    torch.testing.assert_close(found, expected)
    grads = torch.autograd.grad(found[0].square().sum(), list(layer.parameters()))
    weights = dict(other.named_parameters())
    named = [
        weights.get(name, weights.get(f"parametrizations.{name}.original"))
        for name, _ in layer.named_parameters()
    ]
    right = torch.autograd.grad(expected[0].square().sum(), named)
    torch.testing.assert_close(grads, right)


def test_prepared_cells_graphs_and_copies() -> None:
    layer = pair()[0].float()
    x = torch.randn(T, N, I)
    expected = layer(x)[0]
    cell = rnnkit.RecurrentCell(layer.cell, I, H)
    cell.load_state_dict(
        {k.removesuffix("_l0"): v for k, v in layer.state_dict().items() if k.endswith("_l0")}
    )
    first = rnnkit.Recurrent(layer.cell, I, H)
    first.load_state_dict({f"{k}_l0": v for k, v in cell.state_dict().items()})
    torch.testing.assert_close(cell(x[0]), first(x[:1])[0][0])
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.cell.prepare is antisymmetric
        torch.testing.assert_close(other(x)[0], expected)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], expected)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x)[0], expected)
    with torch.no_grad():
        torch.testing.assert_close(rnnkit.freeze(layer)(x)[0], expected)


@pytest.mark.parametrize("heads", [1, 2])
def test_products_that_prepare_are_not_autocast(heads: int) -> None:
    cell = rnnkit.cell(step, gates="n", states="h", prepare=lambda w: w @ w.t())
    layer, x = rnnkit.Recurrent(cell, I, H, heads=heads), torch.randn(T, N, I)
    expected = layer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x)[0].float(), expected, rtol=0.1, atol=0.1)


def test_prepared_without_memory() -> None:
    layer = rnnkit.Recurrent(pair()[0].cell, I, H, device="meta")
    assert layer(torch.randn(T, N, I, device="meta"))[0].shape == (T, N, H)


def test_late_gates_are_prepared_too() -> None:
    @rnnkit.cell(gates="f n", states="h", prepare=torch.neg)
    def negated(x, r, s):
        f = torch.sigmoid(x.f + r.f)
        return {"h": (1 - f) * s.h + f * torch.tanh(x.n + r.n(f * s.h))}

    layer, other = rnnkit.Recurrent(negated, I, H), rnnkit.Recurrent(rnnkit.library.mgu, I, H)
    state = layer.state_dict()
    other.load_state_dict({**state, "weight_hh_l0": -state["weight_hh_l0"]})
    x = torch.randn(T, N, I)
    torch.testing.assert_close(layer(x)[0], other(x)[0])


@pytest.mark.parametrize(
    ("prepare", "error", "words"),
    [
        (2, TypeError, "expected prepare to be a function of weight_hh, got 2"),
        (
            lambda w: w[1:],
            ValueError,
            r"like weight_hh, .* \(4, 4\) on cpu, got .* \(3, 4\) on cpu",
        ),
        (
            lambda w: w.double(),
            ValueError,
            r"like weight_hh, torch.float32 of .* got torch.float64",
        ),
        (lambda w: w.to("meta"), ValueError, r"prepare of step .* on cpu, got .* on meta"),
        (doubled, ValueError, "expected prepare of step to leave weight_hh as it is"),
        (lambda w: None, ValueError, r"prepare of step to return .* \(4, 4\) on cpu, got None"),
    ],
)
def test_wrong_functions(prepare: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        cell = rnnkit.cell(step, gates="n", states="h", prepare=prepare)
        rnnkit.Recurrent(cell, I, H)(torch.randn(T, N, I))


def test_nothing_to_prepare() -> None:
    made_of: Callable[..., Any] = lambda x, r, s: (torch.tanh(x.n + s.h),)  # noqa: E731
    with pytest.raises(ValueError, match="prepare to be None for a cell without W_hh"):
        rnnkit.cell(made_of, gates="n", recurrent=(), states="h", prepare=antisymmetric)
