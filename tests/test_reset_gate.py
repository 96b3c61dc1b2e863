"""`reset="before"`: a GRU whose reset gate comes before the recurrent product, beside a plain loop in float64."""

import copy
import pickle
from typing import Any

import pytest
import torch
from loops import BACKENDS, H, I, Loop, N, Step, T, assert_same, made, places
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnkit
from rnnkit.update_gate import with_other_gate

LENGTHS = [5, 7, 1, 5, 2]


class TextbookLoop(Loop):
    """A GRU of Cho et al. 2014, whose z keeps; `operand` multiplies h, and r⊙h, before the products."""

    def step_of(self, layer: Any, k: int, d: int) -> Step:
        end, place = f"_l{k}" + "_reverse" * d, k * (1 + layer.bidirectional) + d
        names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if layer.bias else [])]
        weights = [getattr(layer, name + end) for name in names]
        if layer.update_gate == "writes":
            weights = [with_other_gate(weight) for weight in weights]
        w_ih, w_hh, b_ih, b_hh = [*weights, None, None][:4]

        def step(x: Tensor, h: Tensor, states: list[Tensor]) -> list[Tensor]:
            (old,) = states
            x_r, x_z, x_n = linear(x, w_ih, b_ih).chunk(3, -1)
            h_r, h_z, _ = linear(h, w_hh, b_hh).chunk(3, -1)
            value = (x_r + h_r).sigmoid() * old
            if self.operand:  # of the sequence that has this h
                n = int((self.operand[place] * old == h).all(-1).nonzero()[0])
                value = value * self.operand[place][n]
            h_n = linear(value, w_hh, b_hh).chunk(3, -1)[2]
            z, n = (x_z + h_z).sigmoid(), (x_n + h_n).tanh()
            return [z * old + (1 - z) * n]

        return step


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Any:
    with rnnkit.backend(request.param):
        yield request.param


def gru(**options: Any) -> Any:
    return made("gru", reset="before", **options)


CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "two directions": ({"bidirectional": True}, {}),
    "writes": ({"bidirectional": True, "update_gate": "writes"}, {}),
    "no bias": ({"bias": False}, {}),
    "recompute": ({"recompute": True, "bidirectional": True}, {}),
    "lengths": ({"bidirectional": True}, {"lengths": LENGTHS}),
    "reset": ({"bidirectional": True}, {"reset": torch.rand(T, N).lt(0.3)}),
    "zoneout": ({"zoneout": 0.3}, {}),
}


@pytest.mark.parametrize("what", CALLS)
def test_layers_are_the_loop(what: str) -> None:
    options, arguments = CALLS[what]
    layer = gru(**options).eval()
    x = torch.randn(T, N, I, dtype=torch.float64, requires_grad=True)
    h = torch.randn(places(layer), N, H, dtype=torch.float64, requires_grad=True)
    reset = arguments.get("reset")
    lengths = arguments.get("lengths", [T] * N)
    loop = TextbookLoop(reset, [torch.zeros_like(h)], lengths, (), [layer.zoneout])
    (expected,), (last,) = loop(layer, x, [h])
    assert_same(layer(x, h, **arguments), [expected, last], [x, h, *layer.parameters()])


def test_packed() -> None:
    layer = gru(bidirectional=True)
    x = torch.randn(T, N, I, dtype=torch.float64, requires_grad=True)
    h = torch.zeros(places(layer), N, H, dtype=torch.float64)
    (expected,), (last,) = TextbookLoop(lengths=LENGTHS)(layer, x, [h])
    output, h_n = layer(pack_padded_sequence(x, LENGTHS, enforce_sorted=False))
    assert_same([pad_packed_sequence(output)[0], h_n], [expected, last], [x, *layer.parameters()])


def test_recurrent_dropout_is_of_both_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    from rnnkit import noise

    layer = gru(recurrent_dropout=0.4, num_layers=1)
    masks: list[Tensor] = []
    drawn = noise.drawn

    def seen(*arguments: Any) -> Any:
        call = drawn(*arguments)
        masks.append(call.operand_mask)
        return call

    monkeypatch.setattr(noise, "drawn", seen)
    x = torch.randn(T, N, I, dtype=torch.float64, requires_grad=True)
    h = torch.randn(1, N, H, dtype=torch.float64)
    found = layer(x, h)
    (expected,), (last,) = TextbookLoop(operand=[*masks[0]])(layer, x, [h])
    assert_same(found, [expected, last], [x, *layer.parameters()])


def test_cells_are_a_step_of_layers() -> None:
    for gate in ("keeps", "writes"):
        layer = gru(num_layers=1, update_gate=gate)
        cell = rnnkit.GRUCell(I, H, reset="before", update_gate=gate).double()
        cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
        x, h = torch.randn(N, I).double(), torch.randn(N, H).double()
        torch.testing.assert_close(cell(x, h), layer(x[None], h[None])[1][0])
        torch.testing.assert_close(cell(x[0], h[0]), cell(x, h)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    layer = gru(bidirectional=True).to(dtype)
    x = torch.randn(T, N, I, dtype=dtype)
    exact = copy.deepcopy(layer).double()(x.double())[0]
    tolerance = 16 * torch.finfo(dtype).eps
    found = layer(x)[0]
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)


def test_gradients_of_gradients() -> None:
    layer = gru(num_layers=1)
    x = torch.randn(3, 2, I, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], x)


def test_the_update_gate_is_converted() -> None:
    layer = gru(bidirectional=True)
    x = torch.randn(T, N, I, dtype=torch.float64)
    expected = layer(x)[0]
    for gate in ("writes", "keeps", "keeps"):
        assert layer.convert_update_gate(gate).update_gate == gate
        assert layer.reset == "before"
        torch.testing.assert_close(layer(x)[0], expected)


def test_copies_and_frozen_layers() -> None:
    layer = gru(bidirectional=True)
    x = torch.randn(T, N, I, dtype=torch.float64)
    expected = layer(x)[0]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), rnnkit.freeze(layer)):
        assert other.reset == "before" and "reset=before" in repr(other)
        with torch.no_grad():
            torch.testing.assert_close(other(x)[0], expected, rtol=0, atol=1e-15)
    assert "reset" not in repr(rnnkit.GRU(I, H))


def test_graphs() -> None:
    layer = gru(num_layers=1).float()
    x = torch.randn(T, N, I)
    expected = layer(x)[0]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], expected)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x)[0], expected)


def test_gradient_flow() -> None:
    """Norms of the gradients of h after each step, as a loop has them; and saturated gates by their names."""
    layer = gru(num_layers=1)
    x = torch.randn(T, N, I, dtype=torch.float64)
    with rnnkit.gradient_flow(layer) as flow:
        layer(x)[1].sum().backward()
    states = [torch.zeros(1, N, H, dtype=torch.float64, requires_grad=True)]
    for of_step in x:
        states.append(layer(of_step[None], states[-1])[1])
    grads = torch.autograd.grad(states[-1].sum(), states[1:])
    norms = torch.stack([grad.norm() for grad in grads])
    torch.testing.assert_close(flow[""].h[0, 0].double(), norms, rtol=1e-5, atol=0)
    assert flow[""].cell == "gru" and flow[""].c is None
    assert str(flow.summary()).startswith("gru: |dL/dh| is ")
    if rnnkit.explain(layer, x).backend == "cpp":
        assert [*flow[""].saturated] == ["r", "z", "n"]


def test_it_is_not_torchs() -> None:
    model = nn.Sequential(gru())
    report = rnnkit.revert(model)
    assert type(model[0]) is rnnkit.GRU
    assert "has reset='before', which torch.nn's have not" in str(report)


@pytest.mark.parametrize("kind", ["GRU", "GRUCell"])
def test_wrong_options(kind: str) -> None:
    for reset in ("first", True, None):
        with pytest.raises(ValueError, match=rf"reset to be 'after' or 'before', got {reset!r}"):
            getattr(rnnkit, kind)(I, H, reset=reset)
    with pytest.raises(ValueError, match="layer_norm to be False with reset='before', got True"):
        rnnkit.GRU(I, H, reset="before", layer_norm=True)
