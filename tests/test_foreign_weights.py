"""from_keras, to_keras, from_haste, to_haste: with the same weights the other library's layer has the same outputs.

Keras's layers run on Keras's torch backend. haste can be installed only where there is a GPU: the equations of its
layers, from the loops for the CPU in its frameworks/pytorch/lstm.py and gru.py, are written down here.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from configurations import CELLS, LAYERS, MODULES, Case, tensors_of
from devices import DEVICES
from tolerances import FORWARD, relative_error
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

import rnnkit
from rnnkit.noise import coins

# Keras asks numpy of torch tensors in a way that numpy wants changed.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

#: For each name in `LAYERS`, Keras's class and its options.
KERAS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("SimpleRNN", {}),
    "rnn_relu": ("SimpleRNN", {"activation": "relu"}),
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
}
#: In float64 only layers whose products Keras's torch backend does not round to float32.
KERAS_CASES = [
    Case(name, batch_first=True, **options)
    for name in LAYERS
    for options in (
        {},
        {"bias": False},
        {"bidirectional": True},
        {"bidirectional": True, "bias": False},
        {"num_layers": 3},
        {"num_layers": 2, "bidirectional": True, "input_size": 17, "hidden_size": 9},
        {"input_size": 1, "hidden_size": 1},
    )
] + [
    Case(name, batch_first=True, dtype=torch.float64, bidirectional=True, num_layers=2, bias=bias)
    for name in ("lstm", "gru")
    for bias in (True, False)
]
KERAS_CELLS = [Case(name, hx=True, bias=bias) for name in CELLS for bias in (True, False)]
HASTE_CASES = [
    Case(name, dtype=dtype, input_size=input_size)
    for name in ("lstm", "gru")
    for dtype in (torch.float64, torch.float32)
    for input_size in (1, 4, 6)
]


@pytest.fixture(scope="module")
def keras(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("KERAS_BACKEND", "torch")
        patched.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))  # it writes a file
        keras = pytest.importorskip("keras", reason="keras is not installed")
    with keras.device("cpu"):
        yield keras


def dtype_name(case: Case) -> str:
    return str(case.dtype).removeprefix("torch.")


def keras_layers(keras: Any, case: Case, **options: Any) -> Any:
    """A keras.Sequential with the layers of the case."""
    cls, own_options = KERAS[case.module]
    given = {"use_bias": case.bias, "dtype": dtype_name(case), "return_sequences": True}
    given |= own_options | options
    model = keras.Sequential([keras.Input((None, case.input_size), dtype=dtype_name(case))])
    for _ in range(case.num_layers):
        layer = getattr(keras.layers, cls)(case.hidden_size, **given)
        if case.bidirectional:
            layer = keras.layers.Bidirectional(layer, dtype=dtype_name(case))
        model.add(layer)
    return model


def drawn(arrays: list[Any]) -> list[Any]:
    """Other arrays of the same shapes and dtypes, without a zero; pre-activations are about 1."""
    generator = np.random.default_rng(1)
    return [
        (generator.uniform(-1, 1, array.shape) * len(array) ** -0.5).astype(array.dtype)
        for array in arrays
    ]


def assert_equal(actual: list[Any], expected: list[Any]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


def assert_close(case: Case, actual: Any, expected: Any) -> None:
    for a, b in zip(tensors_of(actual), tensors_of(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype == case.dtype
        assert relative_error(a, b) <= FORWARD[case.dtype]


@pytest.mark.parametrize("case", KERAS_CASES, ids=str)
def test_outputs_are_those_of_keras(keras: Any, case: Case) -> None:
    model, module = keras_layers(keras, case), case.make(rnnkit)
    model.set_weights(drawn(model.get_weights()))
    assert rnnkit.from_keras(module, model.get_weights()) is module
    input = case.leaves()["input"].detach()
    assert_close(case, module(input)[0], model(input))
    assert_equal(rnnkit.to_keras(module), model.get_weights())


@pytest.mark.parametrize("case", KERAS_CASES, ids=str)
def test_keras_s_outputs_are_ours(keras: Any, case: Case) -> None:
    """With weights of ours, so that both biases have values."""
    model, (module, _) = keras_layers(keras, case), case.twins()
    model.set_weights(rnnkit.to_keras(module))
    input = case.leaves()["input"].detach()
    assert_close(case, model(input), module(input)[0])


@pytest.mark.parametrize("case", KERAS_CELLS, ids=str)
def test_cells_are_keras_s_cells(keras: Any, case: Case) -> None:
    cls, options = KERAS[case.module.removesuffix("_cell")]
    cell = getattr(keras.layers, f"{cls}Cell")(
        case.hidden_size, use_bias=case.bias, dtype=dtype_name(case), **options
    )
    cell.build((None, case.input_size))
    cell.set_weights(drawn(cell.get_weights()))
    module = rnnkit.from_keras(case.make(rnnkit), cell.get_weights())
    leaves = {name: leaf.detach() for name, leaf in case.leaves().items()}
    input, hx = case.arguments(leaves)
    states = cell(input, [hx] if isinstance(hx, Tensor) else [*hx])[1]
    assert_close(case, module(input, hx), tuple(states) if len(states) > 1 else states[0])
    assert_equal(rnnkit.to_keras(module), cell.get_weights())


def test_a_bidirectional_layer_s_directions_differ(keras: Any) -> None:
    """Its list has the forward layer's first."""
    case = Case("gru", bidirectional=True)
    model = keras_layers(keras, case)
    (layer,) = model.layers
    lists = layer.forward_layer.get_weights(), layer.backward_layer.get_weights()
    module = rnnkit.from_keras(case.make(nn), [*lists[0], *lists[1]])
    assert_equal(rnnkit.to_keras(module), model.get_weights())


@pytest.mark.parametrize("update_gate", ["keeps", "writes"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_a_gru_with_reset_before(
    keras: Any, bias: bool, bidirectional: bool, update_gate: str
) -> None:
    """In float32, to which Keras rounds this GRU also in float64."""
    case = Case("gru", batch_first=True, bidirectional=bidirectional, bias=bias)
    model = keras_layers(keras, case, reset_after=False)
    module = case.make(rnnkit, reset="before", update_gate=update_gate)
    model.set_weights(drawn(model.get_weights()))
    rnnkit.from_keras(module, model.get_weights())
    input = case.leaves()["input"].detach()
    assert_close(case, module(input)[0], model(input))
    if bias:
        assert module.bias_hh_l0.eq(0).all()
        torch.nn.init.uniform_(module.bias_hh_l0)
    model.set_weights(rnnkit.to_keras(module))
    assert_close(case, module(input)[0], model(input))


def test_a_gru_cell_with_reset_before(keras: Any) -> None:
    case = Case("gru_cell")
    theirs = keras.layers.GRUCell(case.hidden_size, reset_after=False, dtype="float32")
    theirs.build((None, case.input_size))
    theirs.set_weights(drawn(theirs.get_weights()))
    ours = rnnkit.from_keras(case.make(rnnkit, reset="before"), theirs.get_weights())
    leaves = case.leaves()
    input, h = leaves["input"].detach(), torch.rand(case.batch, case.hidden_size)
    assert_close(case, ours(input, h), theirs(input, h)[0])


def test_the_other_reset(keras: Any) -> None:
    case = Case("gru", bidirectional=True)
    for reset, after in (("after", False), ("before", True)):
        weights = keras_layers(keras, case, reset_after=after).get_weights()
        shapes = r"\(2, 18\), got \(18,\)" if reset == "after" else r"\(18,\), got \(2, 18\)"
        other = "before" if reset == "after" else "after"
        words = rf"reset_after={after}, and so fits a rnnkit.GRU with reset='{other}'"
        with pytest.raises(
            ValueError, match=rf"weights\[2\], the bias, of shape {shapes}: .*{words}"
        ):
            rnnkit.from_keras(case.make(rnnkit, reset=reset), weights)
    with pytest.raises(ValueError, match="reset='after', as haste's GRU, got reset='before'"):
        rnnkit.to_haste(rnnkit.GRU(4, 6, reset="before"))


def test_keras_in_bfloat16(keras: Any) -> None:
    """Its arrays are of a dtype that torch cannot read."""
    case = Case("lstm", dtype=torch.bfloat16)
    model = keras_layers(keras, case, recurrent_initializer="glorot_uniform")
    weights = drawn(model.get_weights())
    module = rnnkit.from_keras(case.make(rnnkit), weights)
    assert module.weight_ih_l0.dtype == torch.bfloat16
    exported = rnnkit.to_keras(module)
    assert_equal(exported, [weight.astype("float32") for weight in weights])
    model.set_weights(exported)
    assert_equal(model.get_weights(), weights)


# Without Keras


@pytest.mark.parametrize("package", [rnnkit, nn], ids=["rnnkit", "torch.nn"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", MODULES)
def test_there_and_back(name: str, bias: bool, package: Any) -> None:
    case = Case(name, bias=bias, num_layers=2, bidirectional=True)
    weights = drawn(rnnkit.to_keras(case.make(package)))
    module = rnnkit.from_keras(case.make(package), weights)
    assert_equal(rnnkit.to_keras(module), weights)
    if bias and "gru" not in name:
        assert not any(p.any() for key, p in module.named_parameters() if "bias_hh" in key)


@pytest.mark.parametrize("name", MODULES)
def test_back_and_there(name: str) -> None:
    """The outputs stay, and a GRU's parameters, too."""
    case = Case(name, dtype=torch.float64, num_layers=2, bidirectional=True)
    module, _ = case.twins()
    other = rnnkit.from_keras(case.make(rnnkit), rnnkit.to_keras(module))
    input = case.leaves()["input"]
    assert_close(case, other(input), module(input))
    for (key, p), q in zip(module.named_parameters(), other.parameters(), strict=True):
        if "gru" in name or "bias" not in key:
            assert torch.equal(p, q)


def test_only_values_change() -> None:
    """Parameters are the same objects, of the same dtype and `requires_grad`, and share no memory with the arrays."""
    module = rnnkit.GRU(4, 6, dtype=torch.float64).requires_grad_(False)
    before = [*module.parameters()]
    weights = [weight.astype("float32") for weight in drawn(rnnkit.to_keras(module))]
    rnnkit.from_keras(module, weights)
    assert all(p is q for p, q in zip(module.parameters(), before, strict=True))
    assert all(p.dtype == torch.float64 and not p.requires_grad for p in before)
    exported = rnnkit.to_keras(module)
    copies = [array.copy() for array in exported]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert_equal(exported, copies)


@pytest.mark.parametrize("package", [rnnkit, nn], ids=["rnnkit", "torch.nn"])
def test_sizes_of_one_share_no_memory(package: Any) -> None:
    module = package.RNN(1, 1)
    keras, before = rnnkit.to_keras(module), [*map(np.copy, rnnkit.to_keras(module))]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    assert_equal(keras, before)


def test_frozen_layers_pack_again() -> None:
    layer, fresh = rnnkit.freeze(rnnkit.LSTM(4, 6)), rnnkit.LSTM(4, 6)
    input = torch.randn(5, 3, 4)
    weights = drawn(rnnkit.to_keras(layer))
    with torch.no_grad():
        layer(input)
        loaded = rnnkit.from_keras(layer, weights)(input)[0]
        torch.testing.assert_close(loaded, rnnkit.from_keras(fresh, weights)(input)[0])


@pytest.mark.parametrize("device", DEVICES)
def test_devices(device: str) -> None:
    module = rnnkit.GRU(4, 6, device=device)
    weights = drawn(rnnkit.to_keras(module))
    rnnkit.from_keras(module, weights)
    assert_equal(rnnkit.to_keras(module), weights)
    rnnkit.from_keras(module, [torch.tensor(weight, device=device) for weight in weights])
    assert_equal(rnnkit.to_keras(module), weights)
    assert {p.device.type for p in module.parameters()} == {torch.device(device).type}
    assert rnnkit.to_haste(module)["kernel"].device.type == torch.device(device).type


def test_tensors_lists_and_arrays_that_cannot_be_written_to() -> None:
    module = nn.LSTM(4, 6)
    weights = drawn(rnnkit.to_keras(module))
    weights[0].setflags(write=False)  # as JAX's are
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = [weights[0], nn.Parameter(torch.tensor(weights[1])), weights[2].tolist()]
        rnnkit.from_keras(module, given)
    assert_equal(rnnkit.to_keras(module), weights)


def test_torch_s_modules_under_patch() -> None:
    cell = nn.GRUCell(4, 6)
    with rnnkit.patch():
        rnnkit.from_keras(cell, rnnkit.to_keras(cell))
        rnnkit.from_haste(nn.LSTMCell(4, 6), rnnkit.to_haste(nn.LSTM(4, 6)))


def test_no_hidden_units() -> None:
    cell = rnnkit.LSTMCell(4, 0)
    rnnkit.from_haste(cell, rnnkit.to_haste(cell))
    assert [a.shape for a in rnnkit.to_keras(cell)] == [(4, 0), (0, 0), (0,)]


# haste


Zone = Callable[[int, Tensor, Tensor], Tensor]


def no_zoneout(t: int, new: Tensor, old: Tensor) -> Tensor:
    return new


def haste_lstm(weights: dict[str, Tensor], input: Tensor, zone: Zone = no_zoneout) -> Tensor:
    """i, f, o = σ; g = tanh; c' = f⊙c + i⊙g; h' = o⊙tanh(c'); gate order i, g, f, o. `zone`(t, h', h) is the next h."""
    h = c = input.new_zeros(input.size(1), weights["recurrent_kernel"].size(0))
    outputs = []
    for t, x in enumerate(input):
        gates = x @ weights["kernel"] + h @ weights["recurrent_kernel"] + weights["bias"]
        i, g, f, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = zone(t, o.sigmoid() * c.tanh(), h)
        outputs.append(h)
    return torch.stack(outputs)


def haste_gru(weights: dict[str, Tensor], input: Tensor, zone: Zone = no_zoneout) -> Tensor:
    """z, r = σ; g = tanh(x + r⊙h); h' = z⊙h + (1 - z)⊙g; gate order z, r, g. `zone`: as in an LSTM."""
    h = input.new_zeros(input.size(1), weights["recurrent_kernel"].size(0))
    outputs = []
    for t, x in enumerate(input):
        z_x, r_x, g_x = (x @ weights["kernel"] + weights["bias"]).chunk(3, 1)
        recurrent = h @ weights["recurrent_kernel"] + weights["recurrent_bias"]
        z_h, r_h, g_h = recurrent.chunk(3, 1)
        z, r = (z_x + z_h).sigmoid(), (r_x + r_h).sigmoid()
        h = zone(t, z * h + (1 - z) * (g_x + r * g_h).tanh(), h)
        outputs.append(h)
    return torch.stack(outputs)


HASTE = {"lstm": haste_lstm, "gru": haste_gru}


@pytest.mark.parametrize("case", HASTE_CASES, ids=str)
def test_outputs_are_those_of_haste(case: Case) -> None:
    module, _ = case.twins()
    exported = rnnkit.to_haste(module)
    input = case.leaves()["input"].detach()
    exact = {name: weight.double() for name, weight in exported.items()}
    expected = HASTE[case.module](exact, input.double()).to(case.dtype)
    assert_close(case, module(input)[0], expected)
    assert {weight.dtype for weight in exported.values()} == {case.dtype}
    assert not any(weight.requires_grad for weight in exported.values())

    loaded = rnnkit.from_haste(case.make(rnnkit), exported)
    assert_close(case, loaded(input)[0], expected)
    cell = dataclasses.replace(case, module=f"{case.module}_cell").make(rnnkit)
    again = rnnkit.to_haste(rnnkit.from_haste(cell, exported))
    assert again.keys() == exported.keys()
    assert all(torch.equal(again[name], weight) for name, weight in exported.items())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_zoneout_and_dropconnect_are_those_of_haste(name: str, training: bool) -> None:
    """haste multiplies: h' = (h_new - h) mask + h, with a mask that is 1 with probability 1 - p."""
    p, kinds = 0.3, {"lstm": (rnnkit.LSTM, (0.3, 0.0)), "gru": (rnnkit.GRU, 0.3)}
    cls, zoneout = kinds[name]
    layer = cls(5, 6, zoneout=zoneout, weight_dropout=0.25).double().train(training)
    dropped = cls(5, 6).double()
    dropped.load_state_dict(layer.state_dict())
    input = torch.randn(7, 4, 5, dtype=torch.float64)
    torch.manual_seed(3)
    if training:  # haste: F.dropout(recurrent_kernel), once a call
        with torch.no_grad():
            dropped.weight_hh_l0.copy_(functional.dropout(layer.weight_hh_l0, 0.25))
        mask = 1.0 - coins(p, 7 * 4, 6, input.device).view(7, 4, 6).double()
    weights = rnnkit.to_haste(dropped)

    def zone(t: int, new: Tensor, old: Tensor) -> Tensor:
        return (new - old) * mask[t] + old if training else p * old + (1 - p) * new

    expected = HASTE[name](weights, input, zone)
    torch.manual_seed(3)
    torch.testing.assert_close(layer(input)[0], expected, rtol=1e-12, atol=1e-12)


def haste_layer_norm_lstm(weights: dict[str, Tensor], input: Tensor) -> Tensor:
    """Gates of LN(h U) gamma_1 + LN(x W) gamma_0 + b; h' = o tanh(LN(c') gamma_h + beta_h); c is not normalized."""
    size = weights["recurrent_kernel"].size(0)
    h = c = input.new_zeros(input.size(1), size)
    outputs = []
    of_x = functional.layer_norm(input @ weights["kernel"], (4 * size,), weights["gamma"][0])
    for x in of_x:
        product = h @ weights["recurrent_kernel"]
        of_h = functional.layer_norm(product, (4 * size,), weights["gamma"][1])
        i, g, f, o = (of_h + x + weights["bias"]).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        read = functional.layer_norm(c, (size,), weights["gamma_h"], weights["beta_h"])
        h = o.sigmoid() * read.tanh()
        outputs.append(h)
    return torch.stack(outputs)


def haste_layer_norm_gru(weights: dict[str, Tensor], input: Tensor) -> Tensor:
    """LN(x W) gamma_0 + bias and LN(h U) gamma_1 + recurrent_bias, in haste's GRU."""
    size = weights["recurrent_kernel"].size(0)
    h = input.new_zeros(input.size(1), size)
    outputs = []
    of_x = functional.layer_norm(input @ weights["kernel"], (3 * size,), weights["gamma"][0])
    for x in of_x + weights["bias"]:
        product = h @ weights["recurrent_kernel"]
        of_h = functional.layer_norm(product, (3 * size,), weights["gamma"][1])
        (x_z, x_r, x_g), (h_z, h_r, h_g) = (
            x.chunk(3, 1),
            (of_h + weights["recurrent_bias"]).chunk(3, 1),
        )
        z, r = (x_z + h_z).sigmoid(), (x_r + h_r).sigmoid()
        h = z * h + (1 - z) * (x_g + r * h_g).tanh()
        outputs.append(h)
    return torch.stack(outputs)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "GRU writes"])
def test_layer_normalization_is_that_of_haste(kind: str) -> None:
    cls, _, writes = kind.partition(" ")
    gate = {"update_gate": "writes"} if writes else {}
    layer, other = (getattr(rnnkit, cls)(5, 6, layer_norm=True, **gate).double() for _ in range(2))
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("norm"):
                parameter += torch.randn_like(parameter) / 3
    weights, input = rnnkit.to_haste(layer), torch.randn(7, 4, 5, dtype=torch.float64)
    assert weights["gamma"].shape == ((2, 24) if cls == "LSTM" else (2, 18))
    reference = haste_layer_norm_lstm if cls == "LSTM" else haste_layer_norm_gru
    expected = reference(weights, input)
    torch.testing.assert_close(layer(input)[0], expected, rtol=1e-12, atol=1e-12)
    rnnkit.from_haste(other, weights)
    torch.testing.assert_close(other(input)[0], expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="expected weights of a haste"):
        rnnkit.from_haste(getattr(rnnkit, cls)(5, 6), weights)
    with pytest.raises(ValueError, match="expected module to have no layer_norm"):
        rnnkit.to_keras(layer)


# Errors


def test_no_module_and_no_weights() -> None:
    layer = nn.LSTM(4, 6)
    for load in (rnnkit.from_keras, rnnkit.from_haste):
        with pytest.raises(
            TypeError, match=r"expected module to be a layer or cell of .* got Linear"
        ):
            load(nn.Linear(4, 6), [])
    for write in (rnnkit.to_keras, rnnkit.to_haste):
        with pytest.raises(TypeError, match=r"expected module to be a layer or cell of .* got str"):
            write("lstm")
    with pytest.raises(TypeError, match=r"expected weights to be a list of arrays, .* got ndarray"):
        rnnkit.from_keras(layer, np.zeros(3))
    with pytest.raises(TypeError, match=r"expected weights to be a dict, .* got list"):
        rnnkit.from_haste(layer, [])
    with pytest.raises(
        TypeError, match=r"expected weights\[1\] to be an array or a tensor, got str"
    ):
        rnnkit.from_keras(layer, [np.zeros((4, 24)), "kernel", np.zeros(24)])


@pytest.mark.parametrize("bias", [True, False])
def test_another_number_of_arrays(bias: bool) -> None:
    """Also because one has biases and the other has none."""
    layer = rnnkit.GRU(4, 6, num_layers=2, bias=bias)
    other = rnnkit.to_keras(rnnkit.GRU(4, 6, num_layers=2, bias=not bias))
    arrays = r"6 arrays \(kernel, recurrent_kernel, bias" if bias else r"4 arrays \(kernel, rec"
    with pytest.raises(ValueError, match=rf"{arrays}.*bias={bias}, got {len(other)}"):
        rnnkit.from_keras(layer, other)


@pytest.mark.parametrize("which", range(6))
def test_a_shape_that_does_not_fit(which: int) -> None:
    """Then nothing is loaded."""
    layer = rnnkit.LSTM(4, 6, bidirectional=True)
    before = rnnkit.to_keras(layer)
    weights = drawn(before)
    shape = weights[which].shape
    weights[which] = weights[which][..., :-1]
    with pytest.raises(ValueError) as raised:
        rnnkit.from_keras(layer, weights)
    assert str(raised.value) == (
        f"expected weights[{which}] of shape {shape}, got {weights[which].shape}"
    )
    assert_equal(rnnkit.to_keras(layer), before)


def test_weights_of_another_kind() -> None:
    """Of as many arrays: the shapes tell."""
    with pytest.raises(
        ValueError, match=r"expected weights\[0\] of shape \(4, 24\), got \(4, 18\)"
    ):
        rnnkit.from_keras(nn.LSTM(4, 6), rnnkit.to_keras(nn.GRU(4, 6)))
    with pytest.raises(
        ValueError,
        match=r"expected weights of a haste LSTM to be kernel, recurrent_kernel, bias, got kernel, .*recurrent_bias",
    ):
        rnnkit.from_haste(nn.LSTM(4, 6), rnnkit.to_haste(nn.GRU(4, 6)))
    weights = rnnkit.to_haste(nn.GRU(4, 6))
    weights["bias"] = weights["bias"][1:]
    with pytest.raises(
        ValueError, match=r"expected weights\['bias'\] of shape \(18,\), got \(17,\)"
    ):
        rnnkit.from_haste(nn.GRUCell(4, 6), weights)


def test_modules_that_the_libraries_do_not_have() -> None:
    projected = rnnkit.LSTM(4, 6, proj_size=2)
    for library, write in (("Keras", rnnkit.to_keras), ("haste", rnnkit.to_haste)):
        with pytest.raises(ValueError, match=rf"no projection, as {library}'s .* got proj_size=2"):
            write(projected)
    with pytest.raises(ValueError, match=r"a kind that haste has, LSTM or GRU, got RNN"):
        rnnkit.to_haste(nn.RNNCell(4, 6))
    for options in ({"bias": False}, {"num_layers": 2}, {"bidirectional": True}):
        with pytest.raises(ValueError, match=r"expected module to have biases, one layer and one"):
            rnnkit.to_haste(rnnkit.LSTM(4, 6, **options))
    with pytest.raises(ValueError, match=r"expected module to have values, .* meta device"):
        rnnkit.from_keras(nn.LSTM(4, 6, device="meta"), rnnkit.to_keras(nn.LSTM(4, 6)))
    cell = nn.LSTMCell(4, 6)
    cell.bias_hh = None
    with pytest.raises(ValueError, match=r"expected bias_hh to be a tensor, got None"):
        rnnkit.from_keras(cell, rnnkit.to_keras(nn.LSTMCell(4, 6)))


@pytest.mark.parametrize("package", [rnnkit, nn], ids=["rnnkit", "torch.nn"])
def test_weights_that_are_computed(package: Any) -> None:
    """They can be written for another library, and not loaded."""
    normed, pruned = package.GRU(4, 6), package.GRU(4, 6)
    parametrizations.weight_norm(normed, "weight_hh_l0")
    prune.l1_unstructured(pruned, "weight_hh_l0", amount=0.5)
    for layer in (normed, pruned):
        weights = rnnkit.to_keras(layer)
        loaded = rnnkit.from_keras(package.GRU(4, 6), weights)
        torch.testing.assert_close(loaded.weight_hh_l0, layer.weight_hh_l0)
        with pytest.raises(RuntimeError, match=r"expected weight_hh_l0 to be a parameter, got a w"):
            rnnkit.from_keras(layer, weights)


@pytest.mark.parametrize("name", ["rnn_tanh", "lstm", "gru"])
def test_initial_weights_are_drawn_as_keras_draws_its_own(keras: Any, name: str) -> None:
    case = Case(name, input_size=30, hidden_size=40)
    ours = rnnkit.to_keras(rnnkit.init.keras_(case.make(rnnkit)))
    theirs = keras_layers(keras, case).get_weights()
    for kernel, recurrent, *_ in (ours, theirs):
        bound = (6 / sum(kernel.shape)) ** 0.5
        assert 0.97 * bound < np.abs(kernel).max() <= bound
        np.testing.assert_allclose(kernel.var(), bound**2 / 3, rtol=0.1)
        np.testing.assert_allclose(recurrent @ recurrent.T, np.eye(40), atol=1e-5)
    for own, other in zip(ours[2:], theirs[2:], strict=True):
        np.testing.assert_array_equal(own, other)
