"""`learn_initial_state` and `all_states=True`: the states that a layer begins with, and those after each step."""

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

#: The parameters of learned initial states.
NAMES = ("h_0", "c_0")
LENGTHS = [2, 7, 5, 1, 3]


def learned(name: str, **options: Any) -> Any:
    layer = made(name, learn_initial_state=True, **options)
    with torch.no_grad():
        for own in layer._learned_names():
            getattr(layer, own).normal_()
    return layer


def initial(layer: Any) -> list[Tensor]:
    """The layer's own initial states for the whole batch."""
    of_layer = [getattr(layer, name) for name in layer._learned_names()]
    return [state.unsqueeze(1).expand(-1, N, -1) for state in of_layer]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ["dense", "lengths", "packed", "reset"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "two"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_the_loop(name: str, bidirectional: bool, way: str, backend: str) -> None:
    layer = learned(name, bidirectional=bidirectional)
    x = torch.randn(T, N, I, dtype=torch.float64, requires_grad=True)
    ragged = way in ("lengths", "packed")
    reset = torch.rand(T, N) < 0.3 if way == "reset" else None
    loop = Loop(reset, initial(layer), LENGTHS if ragged else [T] * N)
    every, finals = loop(layer, x, initial(layer))
    with rnnkit.backend(backend):
        if way == "packed":
            packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
            rows, last, all_rows = layer(packed, all_states=True)
            output, *states = [pad_packed_sequence(r)[0] for r in (rows, *as_list_of(all_rows))]
        else:
            options = {"lengths": LENGTHS} if ragged else {"reset": reset}
            output, last, of_all = layer(x, all_states=True, **options)
            states = as_list(of_all)
        assert torch.equal(output, states[0])
        assert_same(
            [*states, *as_list(last)], [*every, *finals], [x, *layer.parameters()]
        )  # h_0 and c_0, too


def as_list_of(rows: Any) -> list[Any]:
    """One PackedSequence, which is a tuple itself, or a pair of them."""
    return [rows] if isinstance(rows, nn.utils.rnn.PackedSequence) else list(rows)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_the_ways_to_call(name: str) -> None:
    layer = learned(name, bidirectional=True)
    x = torch.randn(T, N, I).double()
    output, last, states = layer(x, all_states=True)
    other = copy.deepcopy(layer)
    other.batch_first = True
    turned = other(x.transpose(0, 1), all_states=True)
    for mine, right in zip(as_list(turned[2]), as_list(states), strict=True):
        torch.testing.assert_close(mine.transpose(0, 1), right, rtol=0, atol=0)
    alone = layer(x[:, 2], all_states=True)
    for mine, right in zip(as_list(alone[2]), as_list(states), strict=True):
        torch.testing.assert_close(mine, right[:, 2], rtol=1e-12, atol=1e-12)
    for mine, right in zip(as_list(alone[1]), as_list(last), strict=True):
        torch.testing.assert_close(mine, right[:, 2], rtol=1e-12, atol=1e-12)
    plain = layer(x)
    assert len(plain) == 2 and torch.equal(plain[0], output)
    given = as_hx(layer, random_states(layer))
    bare = made(name, bidirectional=True)
    bare.load_state_dict(layer.state_dict(), strict=False)
    torch.testing.assert_close(layer(x, given)[0], bare(x, given)[0], rtol=0, atol=0)
    reset, put_back = torch.rand(T, N) < 0.3, as_hx(layer, random_states(layer))
    found, expected = (one(x, given, reset=reset, reset_to=put_back)[0] for one in (layer, bare))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_parameters() -> None:
    layer = made("lstm", bidirectional=True, proj_size=3, learn_initial_state=True)
    assert layer.h_0.shape == (4, 3) and layer.c_0.shape == (4, H)
    assert not layer.h_0.any() and not layer.c_0.any()
    torchs = nn.LSTM(I, H, 2, bidirectional=True, proj_size=3)
    assert [*layer.state_dict()] == [*torchs.state_dict(), "h_0", "c_0"]
    assert not layer.load_state_dict(torchs.double().state_dict(), strict=False).unexpected_keys
    assert not hasattr(made("gru", learn_initial_state=True), "c_0")
    with torch.no_grad():
        layer.h_0.fill_(2)
    layer.reset_parameters()
    assert not layer.h_0.any() and layer.weight_hh_l0.any()
    assert "learn_initial_state=True" in repr(layer) and "learn" not in repr(made("lstm"))
    assert layer.half().h_0.dtype == torch.float16
    assert "h_0" not in dict(made("lstm").named_parameters())


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


def test_an_empty_batch() -> None:
    for name in ("lstm", "gru"):
        layer, x = learned(name, bidirectional=True), torch.randn(T, 0, I).double()
        reset = torch.zeros(T, 0, dtype=torch.bool)
        for hx in (None, as_hx(layer, random_states(layer, 0))):
            output, last, _ = layer(x, hx, reset=reset, all_states=True)
            assert output.shape == (T, 0, 2 * H) and as_list(last)[0].shape == (4, 0, H)


def test_copies_conversions_and_hooks() -> None:
    layer = learned("gru")
    x = torch.randn(T, N, I).double()
    torch.testing.assert_close(copy.deepcopy(layer)(x)[0], layer(x)[0], rtol=0, atol=0)
    report = rnnkit.revert(nn.Sequential(layer))
    assert report.left["0"].startswith("has learn_initial_state, which torch.nn's have not")
    other = copy.deepcopy(layer)
    nn.utils.parametrizations.weight_norm(other, "h_0", dim=0)
    torch.testing.assert_close(other(x)[0], other(x, initial(other)[0])[0])
    nn.utils.parametrize.register_parametrization(layer, "h_0", Doubled())
    torch.testing.assert_close(layer(x)[0], layer(x, initial(layer)[0])[0])
    layer.reset_parameters()
    assert not layer.h_0.any()
    usual = learned("gru").requires_grad_(False)
    with pytest.raises(RuntimeError, match="has learn_initial_state"):
        torch.jit.trace(lambda x: usual(x)[0], x)
    h = random_states(usual)[0]
    torch.testing.assert_close(torch.jit.trace(lambda x: usual(x, h)[0], x)(x), usual(x, h)[0])
    frozen = rnnkit.freeze(learned("lstm"))
    with torch.no_grad():
        torch.testing.assert_close(frozen(x)[0], learned("lstm")(x)[0])


def test_double_backward_and_vmap() -> None:
    layer = learned("lstm", num_layers=1)
    x = torch.randn(3, 2, I, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x, all_states=True)[2], (x,))
    each = torch.func.vmap(lambda x: layer(x, all_states=True)[2], in_dims=1, out_dims=1)
    torch.testing.assert_close(each(x), layer(x, all_states=True)[2])


def test_autocast_and_low_precision() -> None:
    layer, x = learned("lstm", bidirectional=True), torch.randn(T, N, I).double()
    expected = layer(x, all_states=True)[2]
    low = copy.deepcopy(layer).bfloat16()(x.bfloat16(), all_states=True)[2]
    with torch.autocast("cpu", torch.bfloat16):
        cast = copy.deepcopy(layer).float()(x.float(), all_states=True)[2]
    assert [state.dtype for state in low] == [torch.bfloat16] * 2
    for states in (low, cast):
        for mine, right in zip(states, expected, strict=True):
            torch.testing.assert_close(mine.double(), right, rtol=6e-2, atol=6e-2)


def test_autocast_gives_every_state_the_dtype_of_its_final_one() -> None:
    layer = learned("lstm_projected").float()
    with torch.autocast("cpu", torch.bfloat16):
        _, last, states = layer(torch.randn(T, N, I), all_states=True)
    assert [state.dtype for state in last] == [torch.bfloat16, torch.float32]
    assert [state.dtype for state in states] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("name", ["lstm", "gru"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_compile_export_and_fx(name: str, packed: bool) -> None:
    layer = learned(name, bidirectional=True).float()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> list[Tensor]:
            options = {"lengths": torch.tensor(LENGTHS)} if packed else {}
            output, last, states = self.layer(x, all_states=True, **options)
            return [output, *as_list(last), *as_list(states)]

    model, x = Model(), torch.randn(T, N, I)
    expected = model(x)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), expected)


def test_compiled_checks_of_ragged_batches() -> None:
    layer, x = made("lstm").float(), torch.randn(T, N, I)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    lengths, reset = torch.tensor(LENGTHS), torch.zeros(T, N, dtype=torch.bool)
    states = torch.zeros(2, N + 1, H)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        with pytest.raises(RuntimeError, match="expected reset_to to have the batch"):
            compiled(x, lengths=lengths, reset=reset, reset_to=(states, states))
        wide = torch.zeros(2, N, H + 1)
        with pytest.raises(Exception, match=r"expected reset_to\[0\] of shape \(2, 'N', 4\)"):
            compiled(x, lengths=lengths, reset=reset, reset_to=(wide, wide))
        with pytest.raises(Exception, match="expected lengths of shape"):
            compiled(x, lengths=lengths[:4])


def test_compile_of_a_batch_that_the_graph_packs() -> None:
    layer = learned("gru").float()

    def run(x: Tensor, lengths: Tensor) -> Tensor:
        return layer(rnnkit.pack_padded_sequence(x, lengths, enforce_sorted=False))[1]

    x, lengths = torch.randn(T, N, I), torch.tensor(LENGTHS)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, lengths), run(x, lengths))


def test_fx() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = learned("gru").float()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, all_states=True)[2]

    model, x = Model(), torch.randn(T, N, I)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


def test_onnx_holds_learned_states() -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    layer, x = learned("lstm").float(), torch.randn(T, N, I)
    program = torch.onnx.export(layer, (x,), dynamo=True, verbose=False)
    assert [node.op_type for node in program.model.graph].count("LSTM") == 2
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), layer(x)[0])


def test_errors() -> None:
    with pytest.raises(TypeError, match="expected learn_initial_state to be a bool, got 1"):
        rnnkit.LSTM(I, H, learn_initial_state=1)
    with pytest.raises(TypeError, match="expected all_states to be a bool, got 1"):
        rnnkit.LSTM(I, H)(torch.randn(T, N, I), all_states=1)
    layer = learned("lstm").float()
    with pytest.raises(AttributeError, match="learn_initial_state"):
        layer.learn_initial_state = False
    with pytest.raises(ValueError, match="Expected input to be 2D or 3D, got 4D"):
        layer(torch.randn(1, 1, 1, I))
    with pytest.raises(AttributeError, match="expected input to be a Tensor, got list"):
        layer([1])
