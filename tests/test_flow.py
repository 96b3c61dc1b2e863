"""`gradient_flow` against autograd of plain loops that keep the gradient of every state.

tests/kernel_cases.py compares the gradients of states that kernels return with the reference's.
"""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from configurations import LAYERS
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import rnnkit
from rnnkit import ops

T, N, INPUT, H = 6, 3, 4, 5
LENGTHS = (6, 4, 1)


class Model(nn.Module):
    """Two layers of two directions behind a projection of the input, so that it is no leaf."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        cls, own = LAYERS[name]
        self.inside = nn.Linear(INPUT, INPUT)
        self.encoder = nn.ModuleDict(
            {"layer": getattr(rnnkit, cls)(INPUT, H, 2, bidirectional=True, **own, **options)}
        )

    def forward(self, x: Any) -> Tensor:
        if isinstance(x, PackedSequence):
            x = PackedSequence(self.inside(x.data), x.batch_sizes)
            return self.encoder["layer"](x)[0].data
        return self.encoder["layer"](self.inside(x))[0]


def loss_of(output: Tensor) -> Tensor:
    return (
        output * torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)
    ).sum()


def by_hand(model: Model, name: str, x: Tensor, lengths: tuple[int, ...]) -> list[dict]:
    """For each layer and direction, state -> the norm of its gradient at each time step, from a loop over cells."""
    cls, own = LAYERS[name]
    layer = model.encoder["layer"]
    steps = [row[: sum(n > t for n in lengths)] for t, row in enumerate(model.inside(x))]
    kept: list[dict[int, tuple[Tensor, ...]]] = []
    for index in range(2):
        outputs = []
        for d, way in enumerate(("", "_reverse")):
            suffix = f"_l{index}{way}"
            cell = getattr(nn, f"{cls}Cell")(steps[0].size(-1), H, **own).to(x.dtype)
            cell.load_state_dict(
                {n: layer.get_parameter(n + suffix) for n, _ in cell.named_parameters()}
            )
            states: tuple[Tensor, ...] = (x.new_zeros(N, H),) * (2 if cls == "LSTM" else 1)
            seen: dict[int, tuple[Tensor, ...]] = {}
            for t in reversed(range(T)) if d else range(T):
                rows = steps[t].size(0)
                active = tuple(s[:rows] for s in states)
                new = cell(steps[t], active if cls == "LSTM" else active[0])
                new = new if isinstance(new, tuple) else (new,)
                for state in new:
                    state.retain_grad()
                seen[t] = new
                states = tuple(torch.cat([n, s[rows:]]) for n, s in zip(new, states, strict=True))
            kept.append(seen)
            outputs.append([seen[t][0] for t in range(T)])
        steps = [torch.cat(pair, -1) for pair in zip(*outputs, strict=True)]
    output = torch.cat(steps) if len(set(lengths)) > 1 else torch.stack(steps)
    loss_of(output).backward()
    return [
        {
            k: torch.stack([torch.linalg.vector_norm(seen[t][k].grad) for t in range(T)])
            for k in range(len(seen[0]))
        }
        for seen in kept
    ]


def cases() -> Iterator[Any]:
    for name in LAYERS:
        for lengths in ((T,) * N, LENGTHS):
            yield pytest.param(
                name, lengths, id=f"{name}-{'packed' if lengths == LENGTHS else 'dense'}"
            )


def given(x: Tensor, lengths: tuple[int, ...]) -> Any:
    return pack_padded_sequence(x, list(lengths)) if lengths == LENGTHS else x


@pytest.mark.parametrize("inside", [False, True], ids=["forward before", "forward in the block"])
@pytest.mark.parametrize(("name", "lengths"), cases())
def test_norms_are_the_loops(name: str, lengths: tuple[int, ...], inside: bool) -> None:
    torch.manual_seed(0)
    model, x = Model(name).double(), torch.randn(T, N, INPUT, dtype=torch.float64)
    expected = by_hand(copy.deepcopy(model), name, x, lengths)
    plain = copy.deepcopy(model)
    loss_of(plain(given(x, lengths))).backward()
    flow = rnnkit.gradient_flow(model)
    if inside:
        with flow:
            loss_of(model(given(x, lengths))).backward()
    else:
        loss = loss_of(model(given(x, lengths)))
        with flow:
            loss.backward()
    found = flow["encoder.layer"]
    assert list(flow) == ["encoder.layer"] and found.h.shape == (2, 2, T)
    for index in range(2):
        for d in range(2):
            torch.testing.assert_close(found.h[index, d], expected[2 * index + d][0])
            if found.c is not None:
                torch.testing.assert_close(found.c[index, d], expected[2 * index + d][1])
    assert (found.c is not None) == (name == "lstm")
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), "recording changes no gradient"


def test_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs on the reference, without kernels, and knows no gates."""
    torch.manual_seed(0)
    model, x = Model("lstm").double(), torch.randn(T, N, INPUT, dtype=torch.float64)
    expected = by_hand(copy.deepcopy(model), "lstm", x, (T,) * N)
    monkeypatch.setattr(ops, "layer_forward", None)
    monkeypatch.setattr(ops, "layer_backward", None)
    with rnnkit.backend("reference"), rnnkit.gradient_flow(model) as flow:
        loss_of(model(x)).backward()
    torch.testing.assert_close(flow["encoder.layer"].c[1, 0], expected[2][1])
    assert flow["encoder.layer"].saturated == {}


def test_windows_in_one_block() -> None:
    """Several backward passes are joined in the order of the forward passes."""
    torch.manual_seed(0)
    layer, x = rnnkit.GRU(INPUT, H).double(), torch.randn(T, N, INPUT, dtype=torch.float64)
    norms, hx = [], None
    with rnnkit.gradient_flow(layer) as flow:
        for window in x.split(2):
            output, hx = layer(window, hx)
            output.retain_grad()
            loss_of(output).backward()
            hx = hx.detach()
            with rnnkit.gradient_flow(layer) as alone:
                again, _ = layer(window, hx)
                loss_of(again).backward()
            assert alone[""].h.shape == (1, 1, 2)
            norms.append(output.grad.norm(dim=(1, 2)))
    assert flow[""].h.shape == (1, 1, T)
    # The last step of a window has the gradient of its output alone.
    torch.testing.assert_close(flow[""].h[0, 0, 1::2], torch.cat(norms)[1::2])


def test_entered_again_it_forgets() -> None:
    layer, x = rnnkit.GRU(INPUT, H), torch.randn(T, N, INPUT)
    flow = rnnkit.gradient_flow(layer)
    for _ in range(2):
        with flow:
            loss_of(layer(x)[0]).backward()
    assert flow[""].h.shape == (1, 1, T)


def test_a_frozen_lower_layer() -> None:
    layer = rnnkit.LSTM(INPUT, H, 2)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name.endswith("l1"))
    with rnnkit.gradient_flow(layer) as flow:
        layer(torch.randn(T, N, INPUT))[0].sum().backward()
    assert flow[""].h[0].isnan().all() and flow[""].h[1].isfinite().all()
    for norms in flow[""].spectral_norms.values():
        assert norms.shape == (2, 1) and norms[0].isnan().all() and norms[1].isfinite().all()
    assert "layer 1" in flow.summary() and "layer 0" not in flow.summary()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("create_graph", [False, True])
def test_one_direction_that_needs_gradients(create_graph: bool, frozen: bool) -> None:
    torch.manual_seed(0)
    layer, x = (
        rnnkit.LSTM(INPUT, H, proj_size=2, bidirectional=True).double(),
        torch.randn(T, N, INPUT, dtype=torch.float64),
    )
    with rnnkit.gradient_flow(layer) as flow:
        loss_of(layer(x)[0]).backward()
    expected = flow[""]
    for wanted in ("weight_hh_l0_reverse", "weight_hr_l0"):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(not frozen or name == wanted)
        with rnnkit.gradient_flow(layer) as flow:
            parameters = [layer.get_parameter(wanted)]
            torch.autograd.grad(loss_of(layer(x)[0]), parameters, create_graph=create_graph)
        torch.testing.assert_close(flow[""].h, expected.h)
        torch.testing.assert_close(flow[""].c, expected.c)


def test_two_models_with_blocks_of_their_own() -> None:
    one, other, x = Model("gru"), Model("lstm"), torch.randn(T, N, INPUT)
    with rnnkit.gradient_flow(one) as of_one, rnnkit.gradient_flow(other) as of_other:
        (loss_of(one(x)) + loss_of(other(x))).backward()
    assert list(of_one) == list(of_other) == ["encoder.layer"]
    assert of_one["encoder.layer"].cell == "gru" and of_other["encoder.layer"].cell == "lstm"


def test_saved_tensors_hooks() -> None:
    model, x = Model("gru"), torch.randn(T, N, INPUT)
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(model(x))
    with rnnkit.gradient_flow(model) as flow:
        loss.backward()
        loss_of(checkpoint(model, x, use_reentrant=False)).backward()
    assert flow["encoder.layer"].h.shape == (2, 2, 2 * T)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_empty_batches(name: str, create_graph: bool) -> None:
    model = Model(name)
    with rnnkit.gradient_flow(model) as flow:
        loss = model(torch.randn(T, 0, INPUT)).sum()
        torch.autograd.grad(loss, list(model.parameters()), create_graph=create_graph)
    assert not flow["encoder.layer"].h.any() and flow["encoder.layer"].saturated == {}


def test_batched_gradients_are_left_out() -> None:
    layer, x = rnnkit.GRU(INPUT, H), torch.randn(T, N, INPUT)
    output = layer(x)[0]
    grads = torch.stack([torch.ones_like(output), output.detach()])
    with rnnkit.gradient_flow(layer) as flow:
        torch.autograd.grad(output, list(layer.parameters()), grads, is_grads_batched=True)
    assert list(flow) == []


def test_compiled_graphs_are_left_out() -> None:
    model, x = Model("gru"), torch.randn(T, N, INPUT)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(loss_of(model(x)), parameters)
    with rnnkit.gradient_flow(model) as flow:
        output = torch.compile(model, backend="aot_eager")(x)
        torch.testing.assert_close(torch.autograd.grad(loss_of(output), parameters), expected)
    assert list(flow) == []


def test_create_graph_is_seen() -> None:
    torch.manual_seed(0)
    model, x = Model("lstm").double(), torch.randn(T, N, INPUT, dtype=torch.float64)
    expected = by_hand(copy.deepcopy(model), "lstm", x, (T,) * N)
    with rnnkit.gradient_flow(model) as flow:
        torch.autograd.grad(loss_of(model(x)), list(model.parameters()), create_graph=True)
    torch.testing.assert_close(flow["encoder.layer"].h[0, 1], expected[1][0])


def test_weights_that_are_computed() -> None:
    """Autocast and parametrizations put other tensors in the place of the parameters."""
    torch.manual_seed(0)
    model, x = Model("gru"), torch.randn(T, N, INPUT)
    parametrizations.weight_norm(model.encoder["layer"], "weight_hh_l1")
    with rnnkit.gradient_flow(model) as flow:
        loss_of(model(x)).backward()
    plain = flow["encoder.layer"].h
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    with rnnkit.gradient_flow(model) as flow:
        loss_of(output.float()).backward()
    torch.testing.assert_close(flow["encoder.layer"].h, plain, rtol=0.05, atol=0.05)


def test_cells_in_a_loop_are_a_sequence() -> None:
    torch.manual_seed(0)
    cell, x = rnnkit.LSTMCell(INPUT, H).double(), torch.randn(T, N, INPUT, dtype=torch.float64)
    layer = rnnkit.LSTM(INPUT, H).double()
    layer.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    outputs, states = [], None
    for row in x:
        states = cell(row, states)
        outputs.append(states[0])
    loss = loss_of(torch.stack(outputs))
    with rnnkit.gradient_flow(cell) as of_cell:
        loss.backward()
    with rnnkit.gradient_flow(layer) as of_layer:
        loss_of(layer(x)[0]).backward()
    torch.testing.assert_close(of_cell[""].h, of_layer[""].h)
    torch.testing.assert_close(of_cell[""].c, of_layer[""].c)


def test_other_models_are_left_out() -> None:
    model, other, x = Model("gru"), Model("gru"), torch.randn(T, N, INPUT)
    with rnnkit.gradient_flow(other) as flow:
        loss_of(model(x)).backward()
    assert list(flow) == [] and flow.summary().startswith("no backward pass was seen")
    with pytest.raises(KeyError, match=r"no backward pass of 'encoder\.layer' was seen"):
        flow["encoder.layer"]
    with pytest.raises(KeyError, match=r"the name of a layer or cell, 'encoder\.layer', got 'x'"):
        flow["x"]
    before = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss_of(model(x)).backward()  # after the block nothing is recorded
    assert list(flow) == []
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True))


def test_wrong_models() -> None:
    with pytest.raises(TypeError, match=r"expected model to be a torch\.nn\.Module, got int"):
        rnnkit.gradient_flow(3)
    with pytest.raises(ValueError, match="expected model to contain a layer or cell of rnnkit"):
        rnnkit.gradient_flow(nn.LSTM(2, 3))


def test_gates_and_matrices() -> None:
    """Saturated gates and spectral norms that are known."""
    layer = rnnkit.LSTM(INPUT, H).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.bias_ih_l0[:H] = 10  # i: saturated
        layer.bias_ih_l0[2 * H : 3 * H] = -5  # g: saturated
        layer.weight_hh_l0[H : 2 * H] = 3 * torch.eye(H)  # of f, times an h near 0.25 at most
    with rnnkit.gradient_flow(layer) as flow:
        layer(torch.randn(2, N, INPUT, dtype=torch.float64))[0].sum().backward()
    found = flow[""]
    assert {gate: float(share) for gate, share in found.saturated.items()} == {
        "i": 1.0,
        "f": 0.0,
        "g": 1.0,
        "o": 0.0,
    }
    assert {gate: round(float(norm), 9) for gate, norm in found.spectral_norms.items()} == {
        "i": 0.0,
        "f": 3.0,
        "g": 0.0,
        "o": 0.0,
    }
    assert "100% of gate i is saturated" in flow.summary()
    layer.recompute = True
    with rnnkit.gradient_flow(layer) as flow:
        layer(torch.randn(2, N, INPUT, dtype=torch.float64))[0].sum().backward()
    assert flow[""].saturated == {}


@pytest.mark.parametrize("name", [*LAYERS, "gru writes"])
def test_shares_and_norms_are_the_formulas(name: str) -> None:
    """Over two calls, each step of which has other gates."""
    cls, own = LAYERS[name.split()[0]]
    own = own | ({"update_gate": "writes"} if name == "gru writes" else {})
    torch.manual_seed(0)
    layer = getattr(rnnkit, cls)(INPUT, H, bidirectional=True, **own).double()
    inputs = [scale * torch.randn(T, N, INPUT, dtype=torch.float64) for scale in (3, 9)]
    with rnnkit.gradient_flow(layer) as flow:
        outputs = [layer(x)[0] for x in inputs]
        for output in outputs:
            loss_of(output).backward()
    gates = {"LSTM": "ifgo", "GRU": "rzn"}.get(cls, "h")
    shares: dict[str, list[list[Tensor]]] = {gate: [[], []] for gate in gates}
    for d, suffix in enumerate(("_l0", "_l0_reverse")):
        w = {n.removesuffix(suffix): p for n, p in layer.named_parameters() if n.endswith(suffix)}
        for gate, matrix in zip(gates, w["weight_hh"].chunk(len(gates)), strict=True):
            norm = torch.linalg.matrix_norm(matrix, 2)
            torch.testing.assert_close(flow[""].spectral_norms[gate][0, d], norm)
        for x, output in zip(inputs, outputs, strict=True):
            h = output.unflatten(-1, (2, H))[:, :, d]
            start = torch.zeros_like(h[:1])
            before = torch.cat([h[1:], start] if d else [start, h[:-1]])
            x_parts = nn.functional.linear(x, w["weight_ih"], w["bias_ih"]).chunk(len(gates), -1)
            h_parts = nn.functional.linear(before, w["weight_hh"], w["bias_hh"])
            r = torch.ones(())
            for gate, of_x, of_h in zip(gates, x_parts, h_parts.chunk(len(gates), -1), strict=True):
                if name == "rnn_relu":
                    saturated = of_x + of_h <= 0
                elif gate in "ghn":
                    saturated = (of_x + r * of_h).tanh().abs() > 0.9
                else:
                    value = (of_x + of_h).sigmoid()
                    r = value if gate == "r" else r
                    saturated = (value < 0.1) | (value > 0.9)
                shares[gate][d].append(saturated.double().mean())
    assert flow[""].saturated.keys() == shares.keys()
    for gate, of_gate in shares.items():
        expected = torch.tensor([[torch.stack(of_direction).mean() for of_direction in of_gate]])
        torch.testing.assert_close(flow[""].saturated[gate].double(), expected, rtol=1e-6, atol=0)
        assert expected.min() > 0.02 and expected.max() < 0.98


def test_shares_of_many_rows_are_an_estimate() -> None:
    layer = rnnkit.RNN(INPUT, H)
    x = torch.zeros(40, 20, INPUT)
    x[20:] = 1e3
    nn.init.ones_(layer.weight_ih_l0)
    nn.init.zeros_(layer.weight_hh_l0)
    with rnnkit.gradient_flow(layer) as flow:
        layer(x)[0].sum().backward()
    assert abs(float(flow[""].saturated["h"]) - 0.5) < 0.01


class _Sum(nn.Module):
    """A parametrization: the sum with another parameter."""

    def __init__(self, other: nn.Parameter) -> None:
        super().__init__()
        self.other = other

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.other


def test_a_weight_of_two_layers_is_left_out() -> None:
    model = nn.ModuleDict({"one": rnnkit.GRU(INPUT, H), "other": rnnkit.GRU(INPUT, H)})
    nn.utils.parametrize.register_parametrization(
        model["one"], "weight_hh_l0", _Sum(model["other"].weight_hh_l0)
    )
    x = torch.randn(T, N, INPUT)
    with rnnkit.gradient_flow(model) as flow:
        loss_of(model["one"](x)[0]).backward()
    assert list(flow) == []


@pytest.mark.parametrize(
    ("scale", "verdict"), [(0.3, "vanishes"), (1.0, "neither"), (3.0, "explodes")]
)
def test_summary(scale: float, verdict: str) -> None:
    layer = rnnkit.init.identity_(rnnkit.RNN(INPUT, H, nonlinearity="relu"), scale)
    with torch.no_grad():
        layer.bias_ih_l0.fill_(1e-3)
    with rnnkit.gradient_flow(layer) as flow:
        layer(torch.zeros(20, N, INPUT))[0][-1].sum().backward()
    summary = flow.summary()
    assert verdict in summary and "19 steps before" in summary and "at the last step" in summary
    assert ("grad_clip" in summary) == (verdict == "explodes")


@pytest.mark.parametrize(
    ("grad_cut", "verdict"), [(None, "neither vanishes"), (5, "grad_cut=5 cuts it")]
)
def test_summary_from_the_step_of_the_loss(grad_cut: int | None, verdict: str) -> None:
    layer = rnnkit.init.identity_(rnnkit.RNN(INPUT, H, nonlinearity="relu", grad_cut=grad_cut))
    with torch.no_grad():
        layer.bias_ih_l0.fill_(1e-3)
    with rnnkit.gradient_flow(layer) as flow:
        layer(torch.zeros(20, N, INPUT))[0][8].sum().backward()
    assert verdict in flow.summary() and "11 steps before it" in flow.summary()


def test_plot() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    model = Model("lstm")
    with rnnkit.gradient_flow(model) as flow:
        loss_of(model(torch.randn(T, N, INPUT))).backward()
    (axes,) = flow.plot().axes
    assert axes.get_yscale() == "log" and len(axes.lines) == 8
    assert "distance" in axes.get_xlabel() and "dL/dh" in axes.get_ylabel()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        f"encoder.layer layer {layer}, {way}{state}"
        for layer in (0, 1)
        for way in ("forward", "reverse")
        for state in ("", ", c")
    ]
    found = flow["encoder.layer"]
    assert found.c is not None
    for line, state in ((axes.lines[2], found.h), (axes.lines[3], found.c)):
        assert list(line.get_data()[1]) == state[0, 1].tolist()  # reverse: its scan ends at time 0


def test_blocks_within_blocks() -> None:
    model, x = Model("gru"), torch.randn(T, N, INPUT)
    with rnnkit.gradient_flow(model) as outer:
        with rnnkit.gradient_flow(model) as inner:
            loss_of(model(x)).backward()
        assert list(inner) and not list(outer)
        loss_of(model(x)).backward()
    assert list(outer)


@pytest.mark.parametrize("lengths", [(40, 40), (40, 39)], ids=["dense", "packed"])
def test_small_norms_are_not_zero(lengths: tuple[int, ...]) -> None:
    """Norms below 1e-19, whose squares float32 does not have."""
    layer = rnnkit.init.identity_(rnnkit.RNN(INPUT, H, nonlinearity="relu"), 0.1)
    with torch.no_grad():
        layer.bias_ih_l0.fill_(1.0)
    x = pack_padded_sequence(torch.zeros(40, 2, INPUT), list(lengths))
    with rnnkit.gradient_flow(layer) as flow:
        if lengths == (40, 40):
            layer(torch.zeros(40, 2, INPUT))[0][-1].sum().backward()
        else:
            layer(x)[0].data[-1].sum().backward()
    norms = flow[""].h[0, 0, 5:]  # float32 has no smaller gradients
    assert (norms > 0).all() and norms[5] < 1e-25
    torch.testing.assert_close(
        norms[11] / norms[10], torch.tensor(10.0, dtype=torch.float64), rtol=1e-5, atol=0
    )


def flow_of(model: nn.Module, x: Any) -> rnnkit.gradient_flow:
    with rnnkit.gradient_flow(model) as flow:
        loss_of(model(x)).backward()
    return flow


@pytest.mark.parametrize("lengths", [(T,) * N, LENGTHS], ids=["dense", "packed"])
def test_after_the_rule_for_gradients(lengths: tuple[int, ...]) -> None:
    """What `grad_clip` and `grad_cut` leave, on the kernels as on the reference."""
    torch.manual_seed(0)
    model = Model("lstm", grad_clip=0.05, grad_cut=2).double()
    x = given(torch.randn(T, N, INPUT, dtype=torch.float64), lengths)
    found = flow_of(model, x)["encoder.layer"]
    with rnnkit.backend("reference"):
        expected = flow_of(model, x)["encoder.layer"]
    torch.testing.assert_close(found.h, expected.h)
    torch.testing.assert_close(found.c, expected.c)
    model.encoder["layer"].grad_clip = model.encoder["layer"].grad_cut = None
    assert not torch.allclose(flow_of(model, x)["encoder.layer"].h, found.h)


def test_of_either_update_gate() -> None:
    """The same function has the same flow."""
    torch.manual_seed(0)
    model, x = Model("gru", update_gate="writes"), torch.randn(T, N, INPUT)
    found = flow_of(model, x)["encoder.layer"]
    model.encoder["layer"].convert_update_gate("keeps")
    expected = flow_of(model, x)["encoder.layer"]
    torch.testing.assert_close(found.h, expected.h)
    torch.testing.assert_close(found.saturated, expected.saturated)
    torch.testing.assert_close(found.spectral_norms, expected.spectral_norms)


class BatchFirst(Model):
    """The same with its layer called on [N, T, ·]."""

    def forward(self, x: Tensor) -> Tensor:
        self.encoder["layer"].batch_first = True
        return self.encoder["layer"](self.inside(x).transpose(0, 1))[0].transpose(0, 1)


@pytest.mark.parametrize("name", LAYERS)
def test_batch_first(name: str) -> None:
    model, other, x = Model(name), BatchFirst(name), torch.randn(T, N, INPUT)
    other.load_state_dict(model.state_dict())
    found, expected = flow_of(other, x)["encoder.layer"], flow_of(model, x)["encoder.layer"]
    torch.testing.assert_close(found.h, expected.h)
    torch.testing.assert_close(found.c, expected.c)
    torch.testing.assert_close(found.saturated, expected.saturated)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_backward_passes_are_not_seen(backend: str) -> None:
    """The block says so, and gradients are as they are; uncompiled parts of a model are seen."""
    torch.compiler.reset()
    model, x = Model("gru"), torch.randn(T, N, INPUT)
    loss_of(model(x)).backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, backend=backend)
    with rnnkit.gradient_flow(model) as flow:
        loss_of(compiled(x)).backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)
    with pytest.raises(KeyError, match=r"no backward pass of 'encoder\.layer' .* compiled graph"):
        flow["encoder.layer"]
    plain = flow_of(model, x)["encoder.layer"].h
    with torch.compiler.set_stance("force_eager"), rnnkit.gradient_flow(model) as flow:
        loss_of(compiled(x)).backward()
    torch.testing.assert_close(flow["encoder.layer"].h, plain)
    model.inside = torch.compile(model.inside, backend=backend)
    torch.testing.assert_close(flow_of(model, x)["encoder.layer"].h, plain)


@pytest.mark.parametrize(
    ("steps", "lengths"), [(200, [200] * 7), (300, [300]), (10, [10] * 128), (40, range(40, 0, -1))]
)
def test_the_sample_is_of_all_sequences(steps: int, lengths: Any) -> None:
    """Half of the sequences have a saturated input gate, at all of their steps."""
    layer = rnnkit.LSTM(1, 3)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.zero_()
        layer.weight_ih_l0[:3] = 1
    n = len(lengths)
    x = torch.zeros(steps, n, 1)
    x[:, ::2] = 10
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor(list(lengths)))
    with rnnkit.gradient_flow(layer) as flow:
        layer(packed)[0].data.sum().backward()
    rows = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor(list(lengths))).data
    expected = float((rows == 10).double().mean())
    assert abs(float(flow[""].saturated["i"]) - expected) < 0.1
    assert float(flow[""].saturated["o"]) == 0


def test_an_lstm_is_judged_by_the_larger_gradient() -> None:
    torch.manual_seed(0)
    layer = rnnkit.LSTM(2, 16)
    rnnkit.init.chrono_(layer, t_max=1000)
    with rnnkit.gradient_flow(layer) as flow:
        layer(torch.randn(300, 4, 2))[0][-1].sum().backward()
    found = flow[""]
    assert found.c is not None and float(found.c[0, 0, 0]) > 100 * float(found.h[0, 0, 0])
    assert "the larger of |dL/dh| and |dL/dc|" in flow.summary() and "neither" in flow.summary()


def test_a_peak_on_the_way_explodes() -> None:
    layer = rnnkit.RNN(1, 1, bias=False, nonlinearity="relu")
    with torch.no_grad():
        layer.weight_hh_l0.fill_(3.0)
        layer.weight_ih_l0.fill_(1.0)
    x = torch.ones(30, 1, 1)
    x[:10] = -1  # no unit is active: nothing passes
    with rnnkit.gradient_flow(layer) as flow:
        layer(x)[0][-1].sum().backward()
    assert "between them): it explodes" in flow.summary()


def test_one_step_alone_says_nothing() -> None:
    layer = rnnkit.GRU(2, 3, bidirectional=True)
    with rnnkit.gradient_flow(layer) as flow:
        layer(torch.randn(9, 2, 2))[0][-1].sum().backward()
    assert "reverse: |dL/dh| is" in flow.summary()
    assert "there is no way back to follow" in flow.summary().splitlines()[1]


def test_cures_that_the_layer_can_take() -> None:
    layer = rnnkit.LSTM(2, 3, bias=False)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.mul_(0.1)
    with rnnkit.gradient_flow(layer) as flow:
        layer(torch.randn(60, 2, 2))[0][-1].sum().backward()
    assert "a layer with biases and rnnkit.init.chrono_" in flow.summary()
    exploding = rnnkit.RNN(2, 3, grad_clip=1e30, nonlinearity="relu")
    rnnkit.init.identity_(exploding, scale=3.0)
    with rnnkit.gradient_flow(exploding) as flow:
        exploding(torch.randn(60, 2, 2))[0][-1].sum().backward()
    assert "explodes" in flow.summary() and "grad_clip" not in flow.summary()


def test_a_layer_below_does_not_explode_by_what_it_is_given() -> None:
    """The loss of the last step reaches the layer below at the far end by way of the layer above."""
    torch.manual_seed(0)
    layer = rnnkit.GRU(8, 16, 2, bidirectional=True)
    with rnnkit.gradient_flow(layer) as flow:
        layer(torch.randn(50, 3, 8))[0][-1].sum().backward()
    assert float(flow[""].h[0, 1, 0]) * 1e3 < float(flow[""].h[0, 1, -1])  # time 0 is its last step
    assert "it explodes" not in flow.summary()


def test_weights_and_outputs_in_any_layout() -> None:
    """A weight that a parametrization transposes, and hooks that keep tensors transposed."""

    class Transposed(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.t()

    layer = rnnkit.RNN(INPUT, H)
    nn.utils.parametrize.register_parametrization(layer, "weight_hh_l0", Transposed())

    def turned(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, -1).contiguous() if tensor.dim() > 1 else tensor

    def back(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, -1) if tensor.dim() > 1 else tensor

    with (
        rnnkit.gradient_flow(layer) as flow,
        torch.autograd.graph.saved_tensors_hooks(turned, back),
    ):
        layer(torch.randn(T, N, INPUT))[0].sum().backward()
    expected = torch.linalg.matrix_norm(layer.weight_hh_l0.detach().double(), 2)
    torch.testing.assert_close(flow[""].spectral_norms["h"].squeeze(), expected)
    assert 0 <= float(flow[""].saturated["h"]) <= 1
