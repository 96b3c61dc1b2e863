"""`rnnkit.cell`, `Recurrent` and `RecurrentCell`: what rnnkit's own layers have, and the texts of errors.

An LSTM, a GRU and an RNN written as cells are compared with rnnkit's own; tests/test_library.py compares cells of
papers with their formulas.
"""

import copy
import io
import pickle
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkit
from rnnkit import parameters

pytestmark = pytest.mark.usefixtures("backend")

T, N, I, H = 6, 4, 3, 5  # noqa: E741
LENGTHS = [3, 6, 1, 4]


@rnnkit.cell(gates="i f g o", states="h c")
def lstm(x, r, s):
    i, f, o = (torch.sigmoid(getattr(x, k) + getattr(r, k)) for k in "ifo")
    c = f * s.c + i * torch.tanh(x.g + r.g)
    return {"h": o * torch.tanh(c), "c": c}


@rnnkit.cell(gates="r z n", states="h")
def gru(x, r, s):
    z = torch.sigmoid(x.z + r.z)
    return ((1 - z) * torch.tanh(x.n + torch.sigmoid(x.r + r.r) * r.n) + z * s.h,)


@rnnkit.cell(gates="h", states="h")
def rnn(x, r, s):
    return ((x.h + r.h).tanh(),)


@rnnkit.cell(gates="a b", recurrent="b", states="h c n", parameters="u v_leak", init={"v_leak": 2})
def odd(x, r, s, p):
    """Three states, two parameters, and a gate without a recurrent part."""
    c = torch.sigmoid(x.b + r.b) * s.c + p.u * torch.tanh(x.a)
    n = 0.5 * s.n + torch.nn.functional.softplus(p.v_leak) * c
    return {"h": torch.tanh(c + n), "c": c, "n": n}


CELLS = {"LSTM": lstm, "GRU": gru, "RNN": rnn}
each_cell = pytest.mark.parametrize("name", CELLS)


def twins(name: str, **options: Any) -> tuple[Any, Any]:
    """A Recurrent and rnnkit's own layer of the same parameters, in float64."""
    made = [
        function(I, H, **{"num_layers": 2, **options}, dtype=torch.float64)
        for function in (
            lambda *a, **k: rnnkit.Recurrent(CELLS[name], *a, **k),
            getattr(rnnkit, name),
        )
    ]
    with torch.no_grad():
        for parameter in made[1].parameters():
            parameter.normal_(std=0.5)
    made[0].load_state_dict(made[1].state_dict())
    return made[0], made[1]


def random_hx(name: str, places: int, width: int = H) -> Any:
    h, c = torch.randn(places, N, width).double(), torch.randn(places, N, H).double()
    return (h, c) if name == "LSTM" else h


def flat(results: Any) -> list[Tensor]:
    if isinstance(results, nn.utils.rnn.PackedSequence):
        return [results.data]
    return [results] if isinstance(results, Tensor) else [t for part in results for t in flat(part)]


def results_and_gradients(layer: Any, x: Tensor, run: Callable[..., Any]) -> list[Tensor]:
    """All of them, of arbitrary gradients, which are the same at each call, as all that is drawn."""
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    results = flat(run(layer, x))
    grads = [torch.randn_like(result) for result in results]
    wanted = [x, *layer.parameters()]
    found = torch.autograd.grad(results, wanted, grads, allow_unused=True, materialize_grads=True)
    return [*results, *found]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one layer": {"num_layers": 1},
    "both directions": {"bidirectional": True},
    "no bias": {"bias": False},
    "dropout": {"dropout": 0.4},
    "projected": {"proj_size": 2, "bidirectional": True},
    "recompute": {"recompute": True},
    "grad_clip": {"grad_clip": 0.01},
    "grad_cut": {"grad_cut": 2, "bidirectional": True},
    "weight_dropout": {"weight_dropout": 0.3},
    "recurrent_dropout": {"recurrent_dropout": 0.3, "bidirectional": True},
    "zoneout": {"zoneout": 0.3, "bidirectional": True},
    "learned": {"learn_initial_state": True, "bidirectional": True},
}


@pytest.mark.parametrize("what", OPTIONS)
@each_cell
def test_options_are_those_of_own_layers(name: str, what: str) -> None:
    if what == "projected" and name != "LSTM":
        pytest.skip("torch.nn has projections for LSTM alone")
    mine, right = twins(name, **OPTIONS[what])
    x = torch.randn(T, N, I).double()
    for training in (True, False):
        for layer in (mine, right):
            layer.train(training)
        found, expected = (
            results_and_gradients(one, x, lambda m, v: m(v)) for one in (mine, right)
        )
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


CALLS: dict[str, Callable[..., Any]] = {
    "hx": lambda layer, x, hx, to: layer(x, hx),
    "one sequence": lambda layer, x, hx, to: layer(x[:, 1]),
    "packed": lambda layer, x, hx, to: layer(
        pack_padded_sequence(x, LENGTHS, enforce_sorted=False), hx
    ),
    "lengths": lambda layer, x, hx, to: layer(x, hx, lengths=LENGTHS),
    "reset": lambda layer, x, hx, to: layer(x, hx, reset=torch.rand(T, N) < 0.3),
    "reset_to": lambda layer, x, hx, to: layer(
        x, hx, reset=torch.rand(T, N) < 0.3, reset_to=to, lengths=LENGTHS
    ),
    "all_states": lambda layer, x, hx, to: layer(x, hx, all_states=True),
}


@pytest.mark.parametrize("what", CALLS)
@each_cell
def test_calls_are_those_of_own_layers(name: str, what: str) -> None:
    mine, right = twins(name, bidirectional=True)
    x, hx, to = torch.randn(T, N, I).double(), random_hx(name, 4), random_hx(name, 4)
    found, expected = (
        results_and_gradients(one, x, lambda m, v: CALLS[what](m, v, hx, to))
        for one in (mine, right)
    )
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    mine.batch_first = right.batch_first = True
    y, expected_y = (layer(x.transpose(0, 1))[0] for layer in (mine, right))
    torch.testing.assert_close(y, expected_y, rtol=1e-11, atol=1e-12)


@each_cell
@pytest.mark.parametrize("bias", [True, False])
def test_one_step_is_that_of_own_cells(name: str, bias: bool) -> None:
    mine = rnnkit.RecurrentCell(CELLS[name], I, H, bias=bias, dtype=torch.float64)
    right = getattr(rnnkit, f"{name}Cell")(I, H, bias=bias, dtype=torch.float64)
    mine.load_state_dict(right.state_dict())
    x, hx = torch.randn(N, I).double(), random_hx(name, 1)
    hx = (hx[0][0], hx[1][0]) if name == "LSTM" else hx[0]
    for given in (None, hx):
        found, expected = (
            results_and_gradients(one, x, lambda m, v: m(v, given))  # noqa: B023
            for one in (mine, right)
        )
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(flat(mine(x[1])), flat(right(x[1])), rtol=1e-12, atol=1e-12)


@each_cell
def test_parameters_are_those_of_own_layers(name: str) -> None:
    """Names, order, initial values and the random state left behind."""
    made = []
    for build in (lambda *a, **k: rnnkit.Recurrent(CELLS[name], *a, **k), getattr(rnnkit, name)):
        torch.manual_seed(3)
        layer = build(I, H, 2, bidirectional=True)
        made.append([*layer.state_dict().items(), ("rng", torch.get_rng_state())])
    for (key, value), (other_key, other) in zip(*made, strict=True):
        assert key == other_key and torch.equal(value, other)


def test_several_states_and_own_parameters() -> None:
    layer = rnnkit.Recurrent(odd, I, H, 2, bidirectional=True, learn_initial_state=True)
    kinds = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "u", "v_leak"]
    ends = ["l0", "l0_reverse", "l1", "l1_reverse"]
    expected = [f"{kind}_{end}" for end in ends for kind in kinds] + ["h_0", "c_0", "n_0"]
    assert [*layer.state_dict()] == expected
    assert layer.weight_ih_l1.shape == (2 * H, 2 * H) and layer.weight_hh_l0.shape == (H, H)
    assert layer.bias_hh_l0.shape == layer.u_l0.shape == (H,)
    assert all(getattr(layer, f"v_leak_{end}").eq(2).all() for end in ends)
    assert abs(layer.u_l0).max() <= H**-0.5  # like weights
    nn.init.ones_(layer.c_0)
    y, (h, c, n), (every_h, every_c, every_n) = layer(torch.randn(T, N, I), all_states=True)
    assert h.shape == c.shape == n.shape == (4, N, H) and every_h is y
    assert every_c.shape == every_n.shape == y.shape == (T, N, 2 * H)
    y.sum().backward()
    assert all(parameter.grad.any() for parameter in layer.parameters())
    one = rnnkit.RecurrentCell(odd, I, H)
    assert [*one.state_dict()] == kinds and one.v_leak.eq(2).all()
    assert [state.shape for state in one(torch.randn(I))] == [(H,)] * 3


def test_zoneout_of_several_states() -> None:
    """In training a unit keeps its old state or has the new one; c alone is drawn here."""
    layer = rnnkit.Recurrent(odd, I, 200, zoneout=(0, 0.4, 0))
    hx = tuple(torch.randn(1, N, 200) for _ in range(3))
    x = torch.randn(1, N, I)
    _, (h, c, n) = layer(x, hx)
    without = copy.deepcopy(layer)
    without.zoneout = 0.0
    _, (new_h, new_c, new_n) = without(x, hx)
    kept = c == hx[1]
    assert 0.3 < kept.float().mean() < 0.5
    torch.testing.assert_close(torch.where(kept, hx[1], new_c), c)
    torch.testing.assert_close((h, n), (new_h, new_n))
    _, (_, expectation, _) = layer.eval()(x, hx)
    torch.testing.assert_close(expectation, 0.4 * hx[1] + 0.6 * new_c)


@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy", "save"])
@pytest.mark.parametrize("cls", [rnnkit.Recurrent, rnnkit.RecurrentCell])
def test_copies(cls: Any, way: str) -> None:
    module, x = cls(odd, I, H), torch.randn(N, I)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    if way == "state_dict":
        other = cls(odd, I, H)
        other.load_state_dict(module.state_dict())
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(module))
    elif way == "deepcopy":
        other = copy.deepcopy(module)
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert repr(other) == repr(module)
    for mine, right in zip(flat(other(x)), flat(module(x)), strict=True):
        assert torch.equal(mine, right)
    other.reset_parameters()
    assert getattr(other, "v_leak_l0" if cls is rnnkit.Recurrent else "v_leak").eq(2).all()


def test_representation() -> None:
    layer = rnnkit.Recurrent(odd, 3, 5, num_layers=2, bidirectional=True, zoneout=0.1)
    assert repr(layer) == "Recurrent(odd, 3, 5, num_layers=2, bidirectional=True, zoneout=0.1)"
    assert (
        repr(rnnkit.RecurrentCell(gru, 3, 5, bias=False)) == "RecurrentCell(gru, 3, 5, bias=False)"
    )
    assert repr(odd) == (
        "odd(gates=('a', 'b'), states=('h', 'c', 'n'), recurrent=('b',), parameters=('u', 'v_leak'))"
    )
    assert odd.__doc__ == "Three states, two parameters, and a gate without a recurrent part."


def test_a_cell_is_called_on_tensors() -> None:
    x, r, s = (torch.randn(count, N, H).unbind(0) for count in (2, 1, 3))
    p = torch.randn(2, H).unbind(0)
    h, c, _ = odd(x, r, s, p)
    expected = torch.sigmoid(x[1] + r[0]) * s[1] + p[0] * torch.tanh(x[0])
    torch.testing.assert_close(c, expected)
    assert h.shape == (N, H)


def test_names_may_be_sequences_and_the_function_an_argument() -> None:
    made = rnnkit.cell(
        lambda x, r, s: (x.a * r.b,), gates=["a"], recurrent=("b",), states=["h"], parameters=()
    )
    assert isinstance(made, rnnkit.Cell) and made.name == "<lambda>"
    assert rnnkit.Recurrent(made, I, H)(torch.randn(T, N, I))[0].shape == (T, N, H)


@pytest.mark.parametrize("cell", [odd, gru], ids=["odd", "gru"])
def test_compiled_and_exported(cell: rnnkit.Cell) -> None:
    layer, x = rnnkit.Recurrent(cell, I, H, bidirectional=True), torch.randn(T, N, I)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    program = torch.export.export(layer, (x,)).module()
    for found in (compiled(x), program(x)):
        torch.testing.assert_close(flat(found), flat(layer(x)))
    compiled(x)[0].sum().backward()
    found = [parameter.grad for parameter in layer.parameters()]
    layer.zero_grad()
    layer(x)[0].sum().backward()
    torch.testing.assert_close(found, [parameter.grad for parameter in layer.parameters()])
    one = rnnkit.RecurrentCell(cell, I, H)
    compiled = torch.compile(one, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(flat(compiled(x[0])), flat(one(x[0])))


def test_transforms() -> None:
    layer, x = rnnkit.Recurrent(odd, I, H).double(), torch.randn(T, N, I).double()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,))[0].square().sum()

    whole = torch.func.grad(loss)(parameters, x)
    of_rows = torch.func.vmap(torch.func.grad(loss), (None, 1))(parameters, x)
    for name, grad in whole.items():
        torch.testing.assert_close(of_rows[name].sum(0), grad)
    other = {name: 2 * p for name, p in parameters.items()}
    changed = copy.deepcopy(layer)
    changed.load_state_dict(other)
    assert torch.equal(loss(other, x), changed(x)[0].square().sum())


@pytest.mark.parametrize("heads", [2, 4])  # of two units, and of one
@pytest.mark.parametrize("batch", [1, 3])
def test_results_of_heads_are_no_views(heads: int, batch: int) -> None:
    """What users may do with torch.nn's: detach states in place, from one window to the next."""
    layer = rnnkit.Recurrent(lstm, 3, 4, heads=heads)
    one = rnnkit.RecurrentCell(lstm, 3, 4, heads=heads)
    output, states = layer(torch.randn(5, batch, 3))
    of_one = one(torch.randn(batch, 3))
    for result in (output, *states, *of_one):
        assert not result._is_view()
    sum(result.square().sum() for result in (output, *states, *of_one)).backward()
    assert all(p.grad is not None for module in (layer, one) for p in module.parameters())
    for result in (*states, *of_one):
        result.detach_()
    alone = one(torch.randn(3))
    assert [state.shape for state in alone] == [(4,), (4,)]


def test_gradient_flow_of_heads() -> None:
    """Of all heads together, also where W_hh needs no gradient."""
    layer = rnnkit.Recurrent(gru, 3, 4, bidirectional=True, heads=2).double()
    layer.weight_hh_l0.requires_grad_(False)
    x = torch.randn(5, 2, 3).double()
    with rnnkit.gradient_flow(layer) as flow:
        output = layer(x)[0]
        output.square().sum().backward()
    assert flow[""].h.shape == (1, 2, 5)
    apart = layer.weight_hh_l0.unflatten(1, (3, 2))
    expected = torch.linalg.matrix_norm(apart, 2).amax(0)
    found = torch.stack([norm[0, 0] for norm in flow[""].spectral_norms.values()])
    torch.testing.assert_close(found, expected.detach())
    # At the last time of the forward direction the gradient is that of the output alone.
    last = (2 * output[-1, :, :4]).norm()
    torch.testing.assert_close(flow[""].h[0, 0, -1], last.detach())


def test_wrong_heads() -> None:
    for cls in (rnnkit.Recurrent, rnnkit.RecurrentCell):
        with pytest.raises(ValueError, match="hidden_size to be a multiple of heads=3, got 4"):
            cls(lstm, 3, 4, heads=3)
        with pytest.raises(ValueError, match="heads to be at least 1, got 0"):
            cls(lstm, 3, 4, heads=0)
        with pytest.raises(TypeError, match=r"heads to be an int, got 2\.0"):
            cls(lstm, 3, 4, heads=2.0)
    with pytest.raises(ValueError, match="proj_size to be a multiple of heads=2, got 3"):
        rnnkit.Recurrent(lstm, 3, 4, proj_size=3, heads=2)
    assert repr(rnnkit.Recurrent(lstm, 3, 4, heads=2)) == "Recurrent(lstm, 3, 4, heads=2)"


def test_frozen_heads() -> None:
    layer = rnnkit.Recurrent(lstm, 3, 4, 2, bidirectional=True, heads=2)
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        expected = flat(layer(x))
        rnnkit.freeze(layer)
        torch.testing.assert_close(flat(layer(x)), expected)


def test_gradients_of_gradients() -> None:
    layer = rnnkit.Recurrent(odd, 2, 2).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], x)


def test_dtypes() -> None:
    x = torch.randn(T, N, I)
    layer = rnnkit.Recurrent(odd, I, H)
    expected = layer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)[0]
        assert found.dtype == rnnkit.GRU(I, H)(x)[0].dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        made = rnnkit.Recurrent(odd, I, H, dtype=dtype)
        assert {p.dtype for p in made.parameters()} == {dtype}
        assert made(x.to(dtype))[0].dtype == layer.to(dtype)(x.to(dtype))[0].dtype == dtype
        assert rnnkit.RecurrentCell(odd, I, H, dtype=dtype)(x[0].to(dtype))[0].dtype == dtype


@pytest.mark.parametrize("cls", [rnnkit.Recurrent, rnnkit.RecurrentCell])
def test_without_memory(cls: Any) -> None:
    """On the meta device, given as an argument or around the constructor."""
    module = cls(odd, I, H, device="meta")
    with torch.device("meta"):
        other = cls(odd, I, H, init=lambda module: None)
    for one in (module, other):
        assert {p.device.type for p in one.parameters()} == {"meta"}
        assert one(torch.empty(N, I, device="meta"))[0].is_meta
        one.to_empty(device="cpu")
        one.reset_parameters()
        values = [p for name, p in one.named_parameters() if "v_leak" not in name]
        assert all(value.abs().max() <= H**-0.5 for value in values)
        assert getattr(one, "v_leak_l0" if cls is rnnkit.Recurrent else "v_leak").eq(2).all()


@pytest.mark.parametrize("cls", [rnnkit.Recurrent, rnnkit.RecurrentCell])
def test_init(cls: Any) -> None:
    def ones(module: nn.Module) -> None:
        for parameter in module.parameters():
            nn.init.ones_(parameter)

    module = cls(odd, I, H, init=ones)
    assert all(p.eq(1).all() for p in module.parameters())
    nn.init.zeros_(module.get_parameter("u_l0" if cls is rnnkit.Recurrent else "u"))
    module.reset_parameters()
    assert all(p.eq(1).all() for p in module.parameters())
    assert "init=ones" in repr(module)


class Antisymmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight - weight.t()


def test_parametrizations() -> None:
    layer, x = rnnkit.Recurrent(rnn, I, H), torch.randn(T, N, I)
    parametrize.register_parametrization(layer, "weight_hh_l0", Antisymmetric())
    right = nn.RNN(I, H)
    right.load_state_dict({key: getattr(layer, key) for key in right.state_dict()})
    torch.testing.assert_close(layer(x)[0], right(x)[0])
    own = rnnkit.Recurrent(odd, I, H)
    parametrizations.weight_norm(own, "weight_ih_l0")
    parametrize.register_parametrization(own, "v_leak_l0", Twice())
    own(x)[0].sum().backward()
    assert own.parametrizations.v_leak_l0.original.grad.any()
    own.reset_parameters()
    assert own.v_leak_l0.eq(2).all() and own.parametrizations.v_leak_l0.original.eq(1).all()


class Twice(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return 2 * value

    def right_inverse(self, value: Tensor) -> Tensor:
        return value / 2


def test_gradient_flow() -> None:
    mine, right = twins("LSTM")
    x, flows = torch.randn(T, N, I).double(), []
    for layer in (mine, right):
        with rnnkit.gradient_flow(layer) as flow:
            layer(x)[0][-1].sum().backward()
        flows.append(flow[""])
        assert "steps" in flow.summary()
    torch.testing.assert_close(flows[0].h, flows[1].h)
    torch.testing.assert_close(flows[0].c, flows[1].c)
    torch.testing.assert_close(
        [*flows[0].spectral_norms.values()], [*flows[1].spectral_norms.values()]
    )


def test_frozen() -> None:
    layer, x = rnnkit.Recurrent(odd, I, H), torch.randn(T, N, I)
    expected = layer(x)[0]
    with torch.no_grad():
        torch.testing.assert_close(rnnkit.freeze(layer)(x)[0], expected)


def test_traced_by_fx() -> None:
    model, x = nn.Sequential(rnnkit.Recurrent(odd, I, H)), torch.randn(T, N, I)
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    assert torch.equal(traced(x)[0], model(x)[0])


def test_exported_to_onnx(tmp_path: Path) -> None:
    """Step by step, for one T."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    layer, x, path = rnnkit.Recurrent(odd, I, H), torch.randn(T, N, I), tmp_path / "odd.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(layer, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found[0]), layer(x)[0].detach())


@pytest.mark.parametrize("cls", [rnnkit.Recurrent, rnnkit.RecurrentCell])
def test_what_torchs_classes_cannot_be(cls: Any) -> None:
    module, x = cls(odd, I, H), torch.randn(N, I)
    assert rnnkit.revert(module).left == {"": "has a cell of its own"}
    assert str(rnnkit.convert(module)) == "nothing to exchange"
    assert type(module) is cls
    with (
        warnings.catch_warnings(),
        pytest.raises(RuntimeError, match="one that has a cell of its own"),
    ):
        warnings.simplefilter("ignore")
        torch.jit.script(module)
    with (
        warnings.catch_warnings(),
        pytest.raises(RuntimeError, match="one that has a cell of its own"),
    ):
        warnings.simplefilter("ignore")
        torch.jit.trace(module, (x,))


NAMES: dict[str, tuple[dict[str, Any], str]] = {
    "no gate": ({"gates": ""}, "expected at least one name in gates"),
    "a number": ({"gates": 2}, "expected gates to be names, got 2"),
    "no state": ({"states": ()}, "expected at least one name in states"),
    "twice": ({"gates": "a a"}, "expected different names in gates, got a, a"),
    "no name": (
        {"recurrent": "a-b"},
        "expected names that Python can have in recurrent, .*got 'a-b'",
    ),
    "underscore": ({"parameters": "_u"}, "expected names that Python can have in parameters"),
    "weight": (
        {"parameters": "weight_hh"},
        "expected names in parameters that a module does not have itself, got 'weight_hh'",
    ),
    "bias": ({"parameters": "bias"}, "that a module does not have itself, got 'bias'"),
    "method": ({"parameters": "forward"}, "that a module does not have itself, got 'forward'"),
    "init": (
        {"parameters": "u v", "init": {"w": 1}},
        "expected init to name parameters of the cell, u, v, got 'w'",
    ),
    "init of nothing": ({"init": {"w": 1}}, "parameters of the cell, there are none, got 'w'"),
}


@pytest.mark.parametrize("what", NAMES)
def test_wrong_names(what: str) -> None:
    names, words = NAMES[what]
    with pytest.raises(ValueError, match=words):
        rnnkit.cell(lambda x, r, s, p=None: (x[0],), **{"gates": "a", "states": "h", **names})


def test_wrong_functions() -> None:
    names = {"gates": "a", "states": "h c"}
    with pytest.raises(
        TypeError, match=r"test_recurrent.py:\d+: `.*`: a cell cannot use torch's sin"
    ):
        rnnkit.cell(lambda x, r, s: (torch.sin(x.a), s.c), **names)
    with pytest.raises(ValueError, match="returned 1 values: return h, c"):
        rnnkit.cell(lambda x, r, s: (x.a,), **names)
    with pytest.raises(TypeError, match=r"a cell with parameters is a function step\(x, r, s, p\)"):
        rnnkit.cell(lambda x, r, s: (x.a, x.a), **names, parameters="u")


def test_wrong_constructors() -> None:
    for cls in (rnnkit.Recurrent, rnnkit.RecurrentCell):
        for wrong in (lambda x, r, s: (x.a,), "lstm", rnnkit.LSTM, None):
            with pytest.raises(TypeError, match=r"expected cell to be made by rnnkit\.cell, got "):
                cls(wrong, I, H)
        with pytest.raises(ValueError, match=r"expected init to be one of .*got 'no'"):
            cls(odd, I, H, init="no")
        with pytest.raises(ValueError, match=r"expected module to be or contain .* got Recurrent"):
            cls(odd, I, H, init="orthogonal")
    with pytest.raises(
        ValueError, match="proj_size to be 0 for gru, whose step reads h itself, got 2"
    ):
        rnnkit.Recurrent(gru, I, H, proj_size=2)
    with pytest.raises(ValueError, match="for minimal_rnn, whose step has a product of another va"):
        rnnkit.Recurrent(rnnkit.library.minimal_rnn, I, H, proj_size=2)
    with pytest.raises(ValueError, match="proj_size has to be smaller than hidden_size"):
        rnnkit.Recurrent(lstm, I, H, proj_size=H)
    words = r"expected zoneout to be a number or 3 of them, got \(0.1, 0.2\)"
    with pytest.raises(ValueError, match=words):
        rnnkit.Recurrent(odd, I, H, zoneout=(0.1, 0.2))
    with pytest.raises(ValueError, match=r"zoneout to be \(0, p, p\) with proj_size, got 0.1"):
        rnnkit.Recurrent(odd, I, H, zoneout=0.1, proj_size=2)
    with pytest.raises(ValueError, match="expected zoneout to be a number from 0 to 1, got 2"):
        rnnkit.Recurrent(odd, I, H, zoneout=2)
    with pytest.raises(TypeError, match="expected learn_initial_state to be a bool, got 1"):
        rnnkit.Recurrent(odd, I, H, learn_initial_state=1)


def test_wrong_states() -> None:
    x, state = torch.randn(T, N, I), torch.zeros(1, N, H)
    layer, one = rnnkit.Recurrent(odd, I, H), rnnkit.RecurrentCell(odd, I, H)
    expected = r"expected hx to be three Tensors \(h, c, n\), got"
    with pytest.raises(TypeError, match=rf"{expected} a Tensor of shape \(1, 4, 5\)"):
        layer(x, state)
    with pytest.raises(IndexError, match=rf"odd expects three hidden states: {expected} 2 of them"):
        layer(x, (state, state))
    with pytest.raises(RuntimeError, match=rf"{expected} 4 of them"):
        layer(x, (state,) * 4)
    with pytest.raises(
        RuntimeError, match=r"Expected hidden\[2\] size \(1, 4, 5\), got \[1, 4, 4\]"
    ):
        layer(x, (state, state, state[..., 1:]))
    with pytest.raises(RuntimeError, match=r"hx and cx and nx should also be 3-D but got \(2-D, 2"):
        layer(x, (state[0],) * 3)
    with pytest.raises(TypeError, match=expected):
        one(x[0], state[0])
    with pytest.raises(
        RuntimeError, match=r"hidden1 has inconsistent hidden_size: got 4, expected 5"
    ):
        one(x[0], (state[0], state[0][:, 1:], state[0]))
    with pytest.raises(AttributeError, match="expected hx to be a Tensor, got tuple"):
        rnnkit.Recurrent(gru, I, H)(x, (state,))
    with pytest.raises(RuntimeError, match=r"Expected hidden size \(1, 4, 5\), got \[1, 3, 5\]"):
        rnnkit.Recurrent(gru, I, H)(x, state[:, 1:])
    with pytest.raises(ValueError, match="odd: Expected input to be 1D or 2D, got 3D"):
        one(x)
    with pytest.raises(ValueError, match="odd: Expected input to be 2D or 3D, got 4D instead"):
        layer(x[None])
    with pytest.raises(RuntimeError, match=r"input.size.* must be equal to input_size"):
        layer(x[..., 1:])
    with pytest.raises(TypeError, match="expected reset_to to be three"):
        layer(x, reset=torch.zeros(T, N), reset_to=state)


def test_names_that_torchs_layers_have() -> None:
    """A function may be called as torch.nn's layers are, and parameters may have a layer's suffix in their names."""

    def step(x: Any, r: Any, s: Any, p: Any) -> Any:
        return {"h": torch.tanh(x.n + r.n) * p.v_left + p.v_low * s.h}

    for name in ("RNN_TANH", "LSTM", "GRU_light"):
        step.__name__ = name
        cell = rnnkit.cell(
            step,
            gates="n",
            states="h",
            parameters="v_left v_low",
            init={"v_left": 2.0, "v_low": 3.0},
        )
        layer = rnnkit.Recurrent(cell, I, H)
        assert 0 < layer.weight_hh_l0.abs().max() <= 1 / H**0.5
        assert layer.v_left_l0.eq(2).all() and layer.v_low_l0.eq(3).all()
        with pytest.raises(ValueError, match="got Recurrent"):
            rnnkit.init.xavier_(layer)
        assert set(parameters.names(layer)[0]) >= {"v_left", "v_low", "weight_hh"}
        with pytest.raises(ValueError, match=f"{name}: Expected input"):
            layer(torch.randn(1, 1, 1, I))


def test_weight_dropout_without_recurrent_weights() -> None:
    torch.manual_seed(0)
    layer = rnnkit.Recurrent(rnnkit.library.min_gru, I, H, weight_dropout=0.5)
    without, x = copy.deepcopy(layer), torch.randn(T, N, I)
    without.weight_dropout = 0.0
    torch.testing.assert_close(layer(x)[0], without(x)[0])


def test_any_callable_makes_a_cell() -> None:
    class Step:
        def __call__(self, x: Any, r: Any, s: Any) -> Any:
            return (torch.tanh(x.n + r.n),)

    assert rnnkit.cell(Step(), gates="n", states="h").name == "Step"


INITS: list[tuple[Any, type[Exception], str]] = [
    ({"u": "ones"}, TypeError, "init of u to be a number or a function of its tensor, got 'ones'"),
    ({"u": None}, TypeError, "init of u to be a number or a function of its tensor, got None"),
    ({"u": True}, TypeError, "init of u to be a number or a function of its tensor, got True"),
    ({"u": torch.ones(2)}, TypeError, "init of u to be a number or a function of its tensor, got"),
    (1.0, TypeError, "init to be a dict of parameters' names and values, got 1.0"),
    ({"u": torch.ones_like}, ValueError, "init of u to write to the tensor, .* returns another"),
]


@pytest.mark.parametrize(("init", "error", "words"), INITS)
def test_wrong_initial_values(init: Any, error: type[Exception], words: str) -> None:
    def step(x: Any, r: Any, s: Any, p: Any) -> Any:
        return (x.n * p.u + r.n,)

    with pytest.raises(error, match=words):
        cell = rnnkit.cell(step, gates="n", states="h", parameters="u", init=init)
        rnnkit.Recurrent(cell, I, H)


def test_names_that_are_not_used() -> None:
    def step(x: Any, r: Any, s: Any, p: Any) -> Any:
        return (x.n + r.z + p.u,)

    words = "step does not use x.z, r.n, p.v$"
    with pytest.warns(UserWarning, match=words) as warned:
        rnnkit.cell(step, gates="z n", states="h", parameters="u v")
    assert warned[0].filename == __file__
    with pytest.warns(UserWarning, match=words) as warned:

        @rnnkit.cell(gates="z n", states="h", parameters="u v")
        def step(x, r, s, p):
            return (x.n + r.z + p.u,)

    assert warned[0].filename == __file__


def test_functions_that_are_not_found_at_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a script, in another one."""
    import types

    module = types.ModuleType("script")
    monkeypatch.setitem(sys.modules, "script", module)

    def seven(tensor: Tensor) -> Tensor:
        return tensor.fill_(7)

    seven.__module__, seven.__qualname__ = "script", "seven"
    module.seven = seven
    cell = rnnkit.cell(
        lambda x, r, s, p: (x.n + p.a + p.b + r.n,),
        gates="n",
        states="h",
        parameters="a b",
        init={"a": seven, "b": 2.0},
    )
    layer = rnnkit.Recurrent(cell, I, H)
    pickled = pickle.dumps(layer)
    found = pickle.loads(pickled)
    assert found.cell.init["a"] is seven and not found.cell.lost
    for gone in (lambda: delattr(module, "seven"), lambda: sys.modules.pop("script")):
        gone()
        loaded = pickle.loads(pickled)
        assert loaded.a_l0.eq(7).all() and loaded.cell.init == {"b": 2.0}
        again = pickle.loads(pickle.dumps(loaded))
        assert again.cell.lost == ("a",)
        with pytest.warns(UserWarning, match="cannot initialize a of .* as before"):
            again.reset_parameters()
        assert again.b_l0.eq(2).all()


class Starts:
    """An object that writes initial values, and that pickle takes or not."""

    def __init__(self, what: Any) -> None:
        self.what = what

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.fill_(3)


@pytest.mark.parametrize(
    ("start", "found"),
    [
        (partial(nn.init.uniform_, a=2.0, b=3.0), True),
        (partial(nn.init.uniform_, generator=lambda: 0), False),
        (torch.Tensor.zero_, True),
        (Starts(1), True),
        (Starts(lambda: 0), False),
    ],
    ids=["partial", "partial with a lambda", "method", "object", "object with a lambda"],
)
def test_other_callables_that_initialize(start: Any, found: bool) -> None:
    cell = rnnkit.cell(
        lambda x, r, s, p: (x.n + p.a + r.n,),
        gates="n",
        states="h",
        parameters="a",
        init={"a": start},
    )
    loaded = pickle.loads(pickle.dumps(cell))
    assert loaded.lost == (() if found else ("a",)) and set(loaded.init) == {"a"} - set(loaded.lost)


def test_library_cells_that_are_functions() -> None:
    with pytest.raises(TypeError, match=r"got <function cornn.*: call it, cornn\(\)"):
        rnnkit.Recurrent(rnnkit.library.cornn, I, H)


def test_flow_of_cells_that_no_initializer_knows() -> None:
    layer = rnnkit.Recurrent(rnnkit.library.light_gru, I, H)
    with torch.no_grad():
        layer.weight_hh_l0.mul_(1e-3)
        layer.bias_ih_l0.zero_()[:H] = -5
    with rnnkit.gradient_flow(layer) as flow:
        layer(torch.randn(30, N, I))[0][-1].sum().backward()
    summary = str(flow.summary())
    assert "it vanishes" in summary and "rnnkit.init" not in summary


def test_functions_that_initialize_are_pickled_if_they_can_be() -> None:
    made = {"a": lambda tensor: tensor.fill_(2), "b": nn.init.ones_, "c": 3.0}
    cell = rnnkit.cell(
        lambda x, r, s, p: (x.n + p.a + p.b + p.c,),
        gates="n",
        states="h",
        parameters="a b c",
        init=made,
    )
    layer = rnnkit.Recurrent(cell, I, H)
    loaded = pickle.loads(pickle.dumps(layer))
    assert loaded.a_l0.eq(2).all() and set(loaded.cell.init) == {"b", "c"}
    assert copy.deepcopy(layer).cell is cell
