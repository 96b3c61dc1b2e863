"""`layer_norm=True`, against a loop of one sequence at a time and against the equations of its source.

tests/kernel_cases.py has cases with layer normalization, in which every kernel is held to the reference.
"""

import copy
from typing import Any

import pytest
import torch
from loops import (
    BACKENDS,
    LAYERS,
    H,
    I,
    Loop,
    N,
    T,
    as_hx,
    as_list,
    assert_same,
    made,
    random_states,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnkit
from rnnkit.specs import NORMS

LENGTHS = [5, 7, 1, 5, 2]


def normalizing(name: str, **options: Any) -> Any:
    """A layer with factors that are not 1."""
    layer = made(name, layer_norm=True, **options)
    with torch.no_grad():
        for parameter, weight in layer.named_parameters():
            if parameter.startswith("norm"):
                weight += torch.randn_like(weight) / 3
    return layer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ["dense", "packed", "lengths", "batch_first", "reset", "zoneout"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_the_loop(name: str, bidirectional: bool, way: str, backend: str) -> None:
    zoneout = {"zoneout": (0.0, 0.3) if name == "lstm_projected" else 0.3}
    own = zoneout if way == "zoneout" else {}
    layer = normalizing(name, bidirectional=bidirectional, **own).eval()
    x = torch.randn(T, N, I, dtype=torch.float64, requires_grad=True)
    hx, put_back = ([s.requires_grad_() for s in random_states(layer)] for _ in range(2))
    ragged = way in ("packed", "lengths")
    loop = Loop(lengths=LENGTHS if ragged else [T] * N)
    if way == "reset":
        loop.reset, loop.put_back = torch.rand(T, N) < 0.3, put_back
        loop.reset[0] = False
    if way == "zoneout":
        given = layer.zoneout
        loop.zoneout = given if isinstance(given, tuple) else [given] * len(hx)
    every, finals = loop(layer, x, hx)
    with rnnkit.backend(backend):
        if way == "packed":
            packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
            output, last = layer(packed, as_hx(layer, hx))
            found = pad_packed_sequence(output)[0]
        elif way == "batch_first":
            layer.batch_first = True
            found, last = layer(x.transpose(0, 1), as_hx(layer, hx))
            found = found.transpose(0, 1)
        else:
            options: dict[str, Any] = {}
            if way == "lengths":
                options = {"lengths": LENGTHS}
            elif way == "reset":
                options = {"reset": loop.reset, "reset_to": as_hx(layer, put_back)}
            found, last = layer(x, as_hx(layer, hx), **options)
        wanted = [x, *hx, *layer.parameters()] + (put_back if way == "reset" else [])
        assert_same([found, *as_list(last)], [every[0], *finals], wanted)


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_tanh"])
def test_values_of_any_mean_and_size(name: str) -> None:
    """The variance is that of what is left of a mean that is a million times as large, and 0 of equal values."""
    layer = normalizing(name, num_layers=1).float()
    with torch.no_grad():
        layer.weight_ih_l0[:, 0] = 1.0
    x = torch.randn(T, N, I)
    for first in (1e3, 1e-3):
        x[..., 0] = first
        with rnnkit.backend("reference"):
            expected = copy.deepcopy(layer).double()(x.double())[0]
        torch.testing.assert_close(layer(x)[0].double(), expected, rtol=2e-3, atol=2e-3)
    with torch.no_grad():
        layer.weight_ih_l0.fill_(0.5)
    of_equal = layer(x)[0]
    with torch.no_grad():
        layer.norm_ih_l0.zero_()
    torch.testing.assert_close(layer(x)[0], of_equal, rtol=1e-3, atol=1e-3)
    x[2, 1, 0] = torch.nan
    found = layer(x)[0]
    others = [n for n in range(N) if n != 1]
    assert found[2:, 1].isnan().all() and not found[:, others].isnan().any()


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_threads_change_no_bit(name: str) -> None:
    layer = getattr(rnnkit, name.upper())(40, 136, 2, bidirectional=True, layer_norm=True)
    before, found = torch.get_num_threads(), []
    for batch in (1, 3, 24):
        x, each = torch.randn(20, batch, 40), []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                layer.zero_grad()
                output = layer(x)[0]
                output.sum().backward()
                each.append([output, *(p.grad.clone() for p in layer.parameters())])
        finally:
            torch.set_num_threads(before)
        found.append(each)
    for each in found:
        for other in each[1:]:
            torch.testing.assert_close(other, each[0], rtol=0, atol=0)


def test_recompute_changes_no_bit() -> None:
    for name in ("lstm", "gru", "rnn_relu", "lstm_projected"):
        layer = normalizing(name, bidirectional=True).float()
        again = copy.deepcopy(layer)
        again.recompute = True
        x = torch.randn(40, 9, I)
        for one in (layer, again):
            one(x)[0].sum().backward()
        grads = [[p.grad for p in one.parameters()] for one in (layer, again)]
        torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_parameters() -> None:
    layer = made("lstm", bidirectional=True, proj_size=3, layer_norm=True)
    torchs = nn.LSTM(I, H, 2, bidirectional=True, proj_size=3)
    ends = ["_l0", "_l0_reverse", "_l1", "_l1_reverse"]
    own = [name + end for end in ends for name in NORMS]
    assert [*layer.state_dict()] == [*torchs.state_dict(), *own]
    assert layer.norm_hh_l1.shape == (4 * H,) and layer.norm_c_bias_l0_reverse.shape == (H,)
    assert not layer.load_state_dict(torchs.double().state_dict(), strict=False).unexpected_keys
    gru = made("gru", layer_norm=True)
    assert [name for name in gru.state_dict() if "norm" in name] == [
        "norm_ih_l0",
        "norm_hh_l0",
        "norm_ih_l1",
        "norm_hh_l1",
    ]
    for one in (layer, gru):
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.fill_(7)
        one.reset_parameters()
        for name, parameter in one.named_parameters():
            value = 0 if "norm_c_bias" in name else 1
            assert ("norm" in name) == bool((parameter == value).all()), name
    assert "layer_norm=True" in repr(layer) and "layer_norm" not in repr(made("lstm"))
    assert layer.half().norm_c_l0.dtype == torch.float16 and layer.layer_norm
    with pytest.raises(AttributeError, match="layer_norm"):
        layer.layer_norm = False
    with pytest.raises(TypeError, match="expected layer_norm to be a bool, got 1"):
        rnnkit.GRU(I, H, layer_norm=1)
    with pytest.raises(RuntimeError, match="norm_ih_l0"):
        layer.load_state_dict(made("lstm", bidirectional=True, proj_size=3).state_dict())


def test_a_factor_of_another_shape_is_refused() -> None:
    layer, x = made("lstm", layer_norm=True), torch.randn(T, N, I).double()
    for name, expected in (("norm_hh_l0", 4 * H), ("norm_c_l0", H)):
        other = {name: torch.ones(3).double()}
        message = rf"expected {name[:-3]} of direction 0 of shape \[{expected}\], got \[3\]"
        with pytest.raises(RuntimeError, match=message):
            torch.func.functional_call(layer, other, (x,))


@pytest.mark.parametrize("to", ["keeps", "writes"])
def test_convert_update_gate(to: str) -> None:
    layer = normalizing("gru", update_gate="writes" if to == "keeps" else "keeps")
    x = torch.randn(T, N, I).double()
    expected = layer(x)[0]
    assert layer.convert_update_gate(to).update_gate == to
    torch.testing.assert_close(layer(x)[0], expected)
    without = normalizing("gru", bias=False)
    expected = without(x)[0]
    torch.testing.assert_close(without.convert_update_gate("writes")(x)[0], expected)


def test_copies_conversions_and_freezing() -> None:
    layer, x = normalizing("lstm", bidirectional=True), torch.randn(T, N, I).double()
    expected = layer(x)[0]
    torch.testing.assert_close(copy.deepcopy(layer)(x)[0], expected, rtol=0, atol=0)
    report = rnnkit.revert(nn.Sequential(layer))
    assert report.left["0"] == "has layer_norm, which torch.nn's have not"
    with pytest.raises(RuntimeError, match="has layer_norm"):
        torch.jit.trace(lambda x: layer.requires_grad_(False)(x)[0], x)
    nn.utils.parametrizations.weight_norm(layer, "norm_hh_l0", dim=0)
    torch.testing.assert_close(layer(x)[0], expected)
    layer.reset_parameters()
    torch.testing.assert_close(layer.norm_hh_l0, torch.ones_like(layer.norm_hh_l0))
    usual = normalizing("lstm", bidirectional=True)
    frozen = rnnkit.freeze(copy.deepcopy(usual))
    with torch.no_grad():
        torch.testing.assert_close(frozen(x)[0], usual(x)[0])
        packed, before = frozen._packed, frozen(x)[0]
        frozen.norm_hh_l0 += 1  # a factor is not among what is packed
        assert packed and frozen._packed is packed and not frozen(x)[0].equal(before)


def test_derivatives_and_transforms() -> None:
    for name in ("lstm", "gru"):
        layer = normalizing(name, num_layers=1)
        x = torch.randn(3, 2, I, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, layer=layer: layer(x)[0], (x,))
        assert torch.autograd.gradgradcheck(lambda x, layer=layer: layer(x)[0], (x,))
        factors = {n: p.detach() for n, p in layer.named_parameters() if "norm" in n}

        def of(factors: Any, x: Tensor, layer: Any = layer) -> Tensor:
            return torch.func.functional_call(layer, factors, (x.unsqueeze(1),))[0].sum()

        each = torch.func.vmap(torch.func.grad(of), in_dims=(None, 1))(factors, x)
        alone = torch.func.grad(of)(factors, x[:, 1])
        for key, grads in each.items():
            torch.testing.assert_close(grads[1], alone[key])
        _, tangent = torch.func.jvp(lambda x, layer=layer: layer(x)[0], (x,), (x,))
        step = (layer(x * (1 + 1e-6))[0] - layer(x * (1 - 1e-6))[0]) / 2e-6
        torch.testing.assert_close(tangent, step, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["lstm", "gru"])
@pytest.mark.parametrize("way", ["dense", "lengths"])
def test_compile_export_and_fx(name: str, way: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = normalizing(name, bidirectional=True).float()

        def forward(self, x: Tensor) -> Tensor:
            options = {"lengths": torch.tensor(LENGTHS)} if way == "lengths" else {}
            return self.layer(x, **options)[0]

    model, x = Model(), torch.randn(T, N, I)
    expected = model(x)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        compiled(x).sum().backward()
    mine = [p.grad for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(mine, [p.grad for p in model.parameters()])
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), expected)
    if way == "dense":
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)


def test_onnx_and_decompositions() -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    layer, x = normalizing("gru", update_gate="writes").float(), torch.randn(T, N, I)
    program = torch.onnx.export(layer, (x,), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), layer(x)[0])
    exported = torch.export.export(layer, (x,))
    with pytest.raises(RuntimeError, match="expected a layer without layer_norm"):
        exported.run_decompositions(
            {**torch.export.default_decompositions(), **rnnkit.decompositions()}
        )


def test_autocast_and_low_precision() -> None:
    layer, x = normalizing("lstm", bidirectional=True), torch.randn(T, N, I).double()
    expected = layer(x)[0]
    low = copy.deepcopy(layer).bfloat16()(x.bfloat16())[0]
    with torch.autocast("cpu", torch.bfloat16):
        cast = copy.deepcopy(layer).float()(x.float())[0]
    assert low.dtype == torch.bfloat16
    for found in (low, cast):
        torch.testing.assert_close(found.double(), expected, rtol=6e-2, atol=6e-2)


@pytest.mark.parametrize("name", LAYERS)
def test_dtypes_under_autocast_are_those_without(name: str) -> None:
    x, found = torch.randn(T, N, I), []
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    for norm in (True, False):
        layer = made(name, layer_norm=norm).float()
        with torch.autocast("cpu", torch.bfloat16):
            results = [*layer(x), *layer(packed)]
        dtypes = [results[0].dtype, results[2].data.dtype]
        found.append(dtypes + [state.dtype for k in (1, 3) for state in as_list(results[k])])
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_gradient_flow(name: str) -> None:
    """Saturated gates are those of the values that the gates have, on the reference unknown."""
    layer, x = normalizing(name, num_layers=1), torch.randn(T, N, I).double()
    flows = []
    for backend in BACKENDS:
        with rnnkit.backend(backend), rnnkit.gradient_flow(layer) as flow:
            layer(x)[0][-1].sum().backward()
        flows.append(flow[""])
    torch.testing.assert_close(flows[0].h, flows[1].h)
    assert 0 < flows[0].saturated["r" if name == "gru" else "f"].max() < 0.6


def test_checkpoint_and_unbatched() -> None:
    from torch.utils.checkpoint import checkpoint

    layer = normalizing("gru", recurrent_dropout=0.3, dropout=0.2, bidirectional=True)
    x = torch.randn(T, N, I, dtype=torch.float64, requires_grad=True)
    found = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(3)
        found.append(torch.autograd.grad(run(x)[0].sum(), x)[0])
    torch.testing.assert_close(*found, rtol=0, atol=0)
    layer.eval()
    torch.testing.assert_close(layer(x[:, 1])[0], layer(x)[0][:, 1])
    assert layer(torch.randn(T, 0, I).double())[0].shape == (T, 0, 2 * H)
