"""`rnnkit.init` and the constructors' `init`: what is drawn for each gate, and that nothing else changes."""

import copy
import functools
import io
import itertools
import math
import os
import pickle
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from configurations import DTYPES, LAYERS, MODULES, Case
from torch import Tensor, multiprocessing, nn
from torch.nn.utils import parametrizations, parametrize, prune

import rnnkit
from rnnkit import init

PACKAGES = pytest.mark.parametrize("package", [rnnkit, nn], ids=["rnnkit", "torch.nn"])

#: Modules of odd sizes: each cell, layers with two directions, projections and no biases.
CASES = [Case(name, input_size=5, hidden_size=7) for name in MODULES]
CASES += [Case(name, input_size=3, hidden_size=1, bias=False) for name in MODULES]
CASES += [
    Case(name, input_size=9, hidden_size=17, num_layers=2, bidirectional=True) for name in LAYERS
]
CASES += [
    Case("lstm", input_size=5, hidden_size=7, num_layers=2, bidirectional=True, proj_size=3),
    Case("lstm", input_size=5, hidden_size=17, proj_size=16, bias=False),
]
LSTMS = [case for case in CASES if "lstm" in case.module and case.bias]
GATED = [case for case in CASES if "rnn" not in case.module and case.bias]
RNNS = [case for case in CASES if "rnn" in case.module]

#: Large enough for statistics.
LARGE = [Case(name, input_size=40, hidden_size=150, bidirectional=True) for name in LAYERS]
LARGE += [Case(f"{name}_cell", input_size=40, hidden_size=150) for name in LAYERS]
LARGE += [Case("lstm", input_size=40, hidden_size=150, num_layers=2, proj_size=60)]

#: Every initializer as a function of the module and a generator, and the modules that it takes.
DRAWING: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "orthogonal": (init.orthogonal_, "rnn lstm gru"),
    "xavier": (init.xavier_, "rnn lstm gru"),
    "keras": (init.keras_, "rnn lstm gru"),
    "identity": (init.identity_, "rnn"),
    "chrono": (functools.partial(init.chrono_, t_max=50), "lstm gru"),
}
ALL: dict[str, tuple[Callable[..., nn.Module], str]] = {
    **DRAWING,
    "forget_bias": (init.forget_bias_, "lstm"),
}


def pairs(functions: dict[str, tuple[Callable[..., nn.Module], str]]) -> list[Any]:
    """Each initializer with each module that it takes."""
    return [
        pytest.param(function, case, id=f"{name} {case}")
        for name, (function, cells) in functions.items()
        for case in CASES
        if case.module.split("_")[0] in cells
        and (case.bias or name not in ("chrono", "forget_bias"))
    ]


def directions(module: nn.Module) -> list[dict[str, Tensor]]:
    """For each direction of a layer, or for a cell: kind, such as "weight_ih", -> tensor."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, parameter in module.named_parameters():
        kind, _, direction = name.partition("_l")
        found.setdefault(direction, {})[kind] = parameter.detach()
    return list(found.values())


def gates(tensor: Tensor, module: Any) -> tuple[Tensor, ...]:
    return tensor.split(module.hidden_size)


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_orthonormal_columns(matrix: Tensor) -> None:
    product = matrix.double().mT @ matrix.double()
    torch.testing.assert_close(product, torch.eye(len(product)).double(), rtol=0, atol=1e-6)


def assert_uniform(matrix: Tensor, bound: float) -> None:
    """The values of a large matrix fill [-bound, bound] evenly."""
    assert bound * 0.99 < matrix.abs().max() <= bound * (1 + 1e-6)
    assert abs(matrix.mean()) < bound * 0.05
    assert 0.95 < matrix.std() * math.sqrt(3) / bound < 1.05


# What is drawn


@PACKAGES
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("gain", [1.0, 0.5])
def test_orthogonal(package: ModuleType, case: Case, gain: float) -> None:
    module = case.make(package)
    before = values(module)
    assert init.orthogonal_(module, gain) is module
    for weights in directions(module):
        of_gates = gates(weights["weight_hh"], module)
        for gate in of_gates:
            assert_orthonormal_columns(gate / gain)
        if case.hidden_size > 1:
            assert not any(torch.equal(*pair) for pair in itertools.combinations(of_gates, 2))
        if case.proj_size:
            assert_orthonormal_columns(weights["weight_hr"].mT)
    for name, tensor in module.state_dict().items():
        changed = name.startswith(("weight_hh", "weight_hr"))
        assert torch.equal(tensor, before[name]) != changed, name


@PACKAGES
@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("gain", [1.0, 2.0])
def test_xavier(package: ModuleType, case: Case, gain: float) -> None:
    module = init.xavier_(case.make(package), gain)
    for weights in directions(module):
        matrices = [
            gate for kind in ("weight_ih", "weight_hh") for gate in gates(weights[kind], module)
        ]
        for matrix in [*matrices, *([weights["weight_hr"]] if case.proj_size else [])]:
            assert_uniform(matrix, gain * math.sqrt(6 / sum(matrix.shape)))
        assert not weights["bias_ih"].any() and not weights["bias_hh"].any()


@PACKAGES
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_keras_draws_all_gates_as_one_matrix(package: ModuleType, case: Case) -> None:
    """Keras's kernel [I, G*H] is glorot_uniform, its recurrent kernel [H, G*H] orthogonal, as a whole."""
    module = init.keras_(case.make(package, dtype=torch.float64))
    for weights in directions(module):
        rows, columns = weights["weight_ih"].shape
        assert_uniform(weights["weight_ih"], math.sqrt(6 / (columns + rows)))
        assert_orthonormal_columns(weights["weight_hh"])
        if case.proj_size:
            assert_uniform(weights["weight_hr"], math.sqrt(6 / (150 + 60)))


@PACKAGES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_keras_on_odd_sizes(package: ModuleType, case: Case) -> None:
    module = init.keras_(case.make(package))
    for weights in directions(module):
        rows, columns = weights["weight_ih"].shape
        assert weights["weight_ih"].abs().max() <= math.sqrt(6 / (columns + rows))
        assert_orthonormal_columns(weights["weight_hh"])
        if case.bias:
            expected = torch.zeros(rows)
            if "lstm" in case.module:
                expected[case.hidden_size : 2 * case.hidden_size] = 1
            assert torch.equal(weights["bias_ih"] + weights["bias_hh"], expected)


@PACKAGES
@pytest.mark.parametrize("case", LSTMS, ids=str)
@pytest.mark.parametrize("value", [1.0, -2, 0])
def test_forget_bias(package: ModuleType, case: Case, value: float) -> None:
    module = case.make(package)
    before = values(module)
    assert init.forget_bias_(module, value) is module
    for weights in directions(module):
        total = weights["bias_ih"] + weights["bias_hh"]
        assert (gates(total, module)[1] == value).all()
        assert not gates(weights["bias_hh"], module)[1].any()
    for name, tensor in module.state_dict().items():
        own = [1] if name.startswith("bias") else []
        rows = zip(gates(tensor, module), gates(before[name], module), strict=True)
        for k, (now, then) in enumerate(rows):
            assert torch.equal(now, then) != (k in own), (name, k)


@PACKAGES
@pytest.mark.parametrize("case", GATED, ids=str)
def test_chrono(package: ModuleType, case: Case) -> None:
    module, t_max = case.make(package), 30
    before = values(module)
    assert init.chrono_(module, t_max) is module
    drawn = []
    for weights in directions(module):
        keeping = gates(weights["bias_ih"], module)[1]
        assert (keeping >= 0).all() and (keeping <= math.log(t_max - 1) + 1e-6).all()
        expected = [torch.zeros_like(keeping) for _ in gates(weights["bias_ih"], module)]
        expected[1] = keeping
        if "lstm" in case.module:
            expected[0] = -keeping
        assert torch.equal(weights["bias_ih"], torch.cat(expected))
        assert not weights["bias_hh"].any()
        drawn.append(keeping)
    assert not any(torch.equal(*pair) for pair in itertools.combinations(drawn, 2))
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("weight"), name


@pytest.mark.parametrize("name", ["lstm_cell", "gru_cell"])
def test_chrono_s_times_are_uniform(name: str) -> None:
    """Without input, a unit keeps 1 - 1/T of its state in a step: T is uniform from 2 to t_max."""
    cell = init.chrono_(Case(name, input_size=1, hidden_size=3000).make(rnnkit), 100)
    with torch.no_grad():
        cell.weight_ih.zero_()
        cell.weight_hh.zero_()
        ones = torch.ones(1, 3000)
        if name == "lstm_cell":
            kept = cell(torch.zeros(1, 1), (ones, ones))[1]
        else:
            kept = cell(torch.zeros(1, 1), ones)
    times = 1 / (1 - kept.double())
    assert 2 - 1e-3 < times.min() < 2.5 and 99 < times.max() < 100.1
    assert abs(times.mean() - 51) < 2
    assert 0.95 < times.std() * math.sqrt(12) / 98 < 1.05


@pytest.mark.parametrize("initialize", [init.forget_bias_, init.keras_])
def test_the_forget_gate_is_the_one_that_keeps_the_state(
    initialize: Callable[..., nn.Module],
) -> None:
    cell = initialize(rnnkit.LSTMCell(2, 5))
    with torch.no_grad():
        cell.weight_ih.zero_()
        cell.weight_hh.zero_()
        for bias in (cell.bias_ih, cell.bias_hh):
            gates(bias, cell)[2].zero_()
        kept = cell(torch.zeros(1, 2), (torch.zeros(1, 5), torch.ones(1, 5)))[1]
    torch.testing.assert_close(kept, torch.full((1, 5), 1.0).sigmoid())


def test_chrono_s_shortest_range() -> None:
    bias = init.chrono_(nn.GRUCell(2, 5), 2).bias_ih
    assert not bias.any()


@PACKAGES
@pytest.mark.parametrize("case", RNNS, ids=str)
def test_identity(package: ModuleType, case: Case) -> None:
    for options, scale in (({}, 1.0), ({"scale": 0.01, "input_std": 0}, 0.01)):
        module = case.make(package)
        assert init.identity_(module, **options) is module
        for weights in directions(module):
            assert torch.equal(weights["weight_hh"], scale * torch.eye(case.hidden_size))
            assert weights["weight_ih"].any() == (not options)
            for kind in ("bias_ih", "bias_hh") if case.bias else ():
                assert not weights[kind].any()


@pytest.mark.parametrize("case", [case for case in LARGE if "rnn" in case.module], ids=str)
def test_identity_s_input_weights(case: Case) -> None:
    for options, std in (({}, 0.001), ({"input_std": 0.1}, 0.1)):
        for weights in directions(init.identity_(case.make(rnnkit), **options)):
            assert abs(weights["weight_ih"].mean()) < std * 0.05
            assert 0.95 < weights["weight_ih"].std() / std < 1.05
            assert weights["weight_ih"].abs().max() > 3 * std  # no uniform distribution


def test_one_after_the_other() -> None:
    """As haste initializes: Glorot's inputs, orthogonal recurrent matrices of each gate, forget bias."""
    lstm = init.forget_bias_(init.orthogonal_(init.xavier_(nn.LSTM(5, 7))))
    bound = math.sqrt(6 / (5 + 7))
    assert lstm.weight_ih_l0.abs().max() <= bound
    for gate in gates(lstm.weight_hh_l0.detach(), lstm):
        assert_orthonormal_columns(gate)
    total = (lstm.bias_ih_l0 + lstm.bias_hh_l0).detach()
    assert torch.equal(total, torch.tensor([0.0, 1, 0, 0]).repeat_interleave(7))


# What is left as it is


@pytest.mark.parametrize(("function", "case"), pairs(ALL))
def test_parameters_stay_the_same_objects(function: Callable[..., nn.Module], case: Case) -> None:
    for dtype, package in itertools.product(DTYPES, (rnnkit, nn)):
        module = case.make(package, dtype=dtype)
        frozen = next(iter(module._parameters))
        module._parameters[frozen].requires_grad_(False)
        before = dict(module.named_parameters())
        assert function(module) is module
        after = dict(module.named_parameters())
        assert list(after) == list(before)
        for name, parameter in after.items():
            assert parameter is before[name]
            assert parameter.dtype == dtype
            assert parameter.requires_grad == (name != frozen)
            assert parameter.is_leaf and parameter.grad is None
            assert parameter.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("function", [init.orthogonal_, init.xavier_, init.keras_])
def test_low_precision_is_rounded_once(
    function: Callable[..., nn.Module], dtype: torch.dtype
) -> None:
    drawn = []
    for of_dtype in (torch.float32, dtype):
        module = nn.GRU(3, 5, dtype=of_dtype)
        function(module, generator=torch.Generator().manual_seed(5))
        drawn.append(module.weight_hh_l0.detach())
    assert torch.equal(drawn[0].to(dtype), drawn[1])


def test_double_precision_is_drawn_in_it() -> None:
    weight = init.orthogonal_(nn.RNN(3, 17, dtype=torch.float64)).weight_hh_l0.detach()
    identity = torch.eye(17, dtype=torch.float64)
    torch.testing.assert_close(weight @ weight.mT, identity, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("function", "case"), pairs(DRAWING))
def test_generators(function: Callable[..., nn.Module], case: Case) -> None:
    """The default one, and one that is given, after which the default one is as before."""

    def by_default(module: nn.Module, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return function(module)

    def by_given(module: nn.Module, seed: int) -> nn.Module:
        state = torch.get_rng_state()
        function(module, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(torch.get_rng_state(), state)
        return module

    for draw in (by_default, by_given):
        module = case.make(rnnkit)
        first, again, others = (values(draw(copy.deepcopy(module), seed)) for seed in (12, 12, 13))
        assert all(torch.equal(first[name], again[name]) for name in first)
        if case.hidden_size > 1:  # an orthogonal matrix of one element is 1 or -1
            assert any(not torch.equal(first[name], others[name]) for name in first)


# Where they write


class Encoder(nn.LSTM):
    """A user's subclass, with another recurrent module inside."""

    def __init__(self) -> None:
        super().__init__(5, 7)
        self.inner = nn.Sequential(rnnkit.LSTMCell(3, 4), nn.Linear(3, 4))


@pytest.mark.parametrize("patched", [False, True])
def test_every_recurrent_module_of_a_model(patched: bool) -> None:
    model = nn.ModuleDict({"encoder": Encoder(), "cells": nn.ModuleList([nn.LSTMCell(3, 4)])})
    before = values(model)
    if patched:
        with rnnkit.patch():
            assert init.forget_bias_(model, 5) is model
    else:
        init.forget_bias_(model, 5)
    linear = model["encoder"].inner[1]
    for part in (model["encoder"], model["encoder"].inner[0], model["cells"][0]):
        own = {name: p for name, p in part.named_parameters(recurse=False) if "bias" in name}
        assert (gates(sum(own.values()).detach(), part)[1] == 5).all()
    assert torch.equal(linear.weight, before["encoder.inner.1.weight"])
    assert torch.equal(linear.bias, before["encoder.inner.1.bias"])


def test_a_weight_of_a_parametrization() -> None:
    """What the module computes with is what the initializer says, if torch can invert the parametrization."""
    lstm = parametrizations.weight_norm(rnnkit.LSTM(5, 7), "weight_hh_l0")
    originals = dict(lstm.named_parameters())
    init.orthogonal_(lstm)
    for gate in gates(lstm.weight_hh_l0.detach(), lstm):
        assert_orthonormal_columns(gate)
    assert dict(lstm.named_parameters()).keys() == originals.keys()
    for name, parameter in lstm.named_parameters():
        assert parameter is originals[name] and parameter.requires_grad
    init.forget_bias_(lstm)
    lstm(torch.randn(2, 1, 5))[0].sum().backward()


class Doubled(nn.Module):
    def forward(self, original: Tensor) -> Tensor:
        return 2 * original


def test_weights_that_cannot_be_written() -> None:
    lstm = nn.LSTM(5, 7, num_layers=2)
    parametrize.register_parametrization(lstm, "weight_hh_l1", Doubled(), unsafe=True)
    before = values(lstm)
    message = "expected the parametrization of weight_hh_l1 to have a right_inverse, got Doubled"
    with pytest.raises(RuntimeError, match=message):
        init.orthogonal_(lstm)
    pruned = prune.l1_unstructured(nn.GRUCell(5, 7), "weight_hh", 0.5)
    with pytest.raises(RuntimeError, match="expected weight_hh to be a parameter, got a weight"):
        init.keras_(pruned)
    unbiased = nn.RNNCell(5, 7)
    unbiased.bias_hh = None
    with pytest.raises(RuntimeError, match="expected bias_hh to be a parameter, got None"):
        init.xavier_(unbiased)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lstm.state_dict().items())
    init.forget_bias_(lstm)
    init.chrono_(pruned, 9)


@pytest.mark.parametrize(("function", "case"), pairs(ALL))
def test_meta_device(function: Callable[..., nn.Module], case: Case) -> None:
    module = case.make(rnnkit, device="meta")
    assert function(module) is module
    assert all(parameter.is_meta for parameter in module.parameters())


@pytest.mark.parametrize(("name", "cls"), [("RNN", nn.RNNCell), ("LSTM", nn.LSTMCell)])
def test_cells_without_units(name: str, cls: type[nn.Module]) -> None:
    for function, cells in ALL.values():
        if name.lower() in cells:
            function(cls(3, 0))


def test_a_frozen_layer_packs_the_new_weights() -> None:
    layer, x = rnnkit.freeze(rnnkit.LSTM(5, 7)), torch.randn(3, 2, 5)
    with torch.no_grad():
        before = layer(x)[0]
        init.keras_(layer)
        after = layer(x)[0]
        expected = nn.LSTM(5, 7)
        expected.load_state_dict(layer.state_dict())
        torch.testing.assert_close(after, expected(x)[0])
    assert not torch.allclose(before, after)


def initialize_sharded(rank: int, place: str) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    try:
        torch.manual_seed(rank)
        with torch.device("meta"):
            lstm = rnnkit.LSTM(5, 7, bidirectional=True, proj_size=3, init="keras")
        fully_shard(lstm)
        lstm.to_empty(device="cpu").reset_parameters()
        init.forget_bias_(lstm, 3)
        for parameter in lstm.parameters():
            assert isinstance(parameter, DTensor) and parameter.requires_grad
        whole = {name: parameter.full_tensor() for name, parameter in lstm.named_parameters()}
        for name in ("weight_hh_l0", "weight_hh_l0_reverse"):
            assert_orthonormal_columns(whole[name].detach())
        assert torch.equal(whole["bias_ih_l0"], torch.tensor([0.0, 3, 0, 0]).repeat_interleave(7))
    finally:
        dist.destroy_process_group()
    os._exit(0)  # see test_distributed.py


@pytest.mark.slow
@pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"
)
def test_parameters_of_fsdp2(tmp_path: Any) -> None:
    """Made on the meta device, sharded, given memory: the shards are those of one whole matrix."""
    multiprocessing.spawn(initialize_sharded, (str(tmp_path / "store"),), 2)


# Errors


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: init.keras_(3), TypeError, "module to be a torch.nn.Module, got int"),
        (lambda m: init.keras_(m.linear), ValueError, "LSTMCell, GRU, .* torch.nn, got Linear"),
        (lambda m: init.forget_bias_(m), ValueError, r"one of LSTM, LSTMCell, got GRU \(gru\)"),
        (lambda m: init.identity_(m), ValueError, r"one of RNN, RNNCell, got LSTM \(lstm\)"),
        (lambda m: init.identity_(Encoder()), ValueError, "RNNCell, got Encoder, a kind of LSTM$"),
        (lambda m: init.chrono_(nn.RNN(2, 3), 9), ValueError, "GRU, GRUCell, got RNN$"),
        (lambda m: init.forget_bias_(nn.RNNCell(2, 3)), ValueError, "LSTMCell, got RNNCell$"),
        (lambda m: init.chrono_(m.unbiased, 9), ValueError, "biases, got GRU with bias=False"),
        (lambda m: init.forget_bias_(nn.LSTM(2, 3, bias=False)), ValueError, "biases, got LSTM"),
        (lambda m: init.chrono_(m, 1), ValueError, "t_max to be a .* of at least 2, got 1"),
        (lambda m: init.chrono_(m, math.inf), ValueError, "t_max to be a finite .*, got inf"),
        (lambda m: init.chrono_(m, "9"), TypeError, "t_max to be a number, got '9'"),
        (lambda m: init.xavier_(m, math.nan), ValueError, "gain to be a finite number, got nan"),
        (lambda m: init.orthogonal_(m, True), TypeError, "gain to be a number, got True"),
        (lambda m: init.forget_bias_(m.lstm, None), TypeError, "value to be a number, got None"),
        (lambda m: init.identity_(m.rnn, input_std=-1), ValueError, "input_std .* least 0, got -1"),
        (lambda m: init.identity_(m.rnn, "x"), TypeError, "scale to be a number, got 'x'"),
        (lambda m: init.keras_(m, generator=3), TypeError, "torch.Generator or None, got int"),
    ],
)
def test_errors_and_nothing_is_written(
    call: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    model = nn.Module()
    model.lstm, model.gru, model.rnn = nn.LSTM(2, 3), nn.GRU(2, 3), nn.RNN(2, 3)
    model.unbiased, model.linear = nn.GRU(2, 3, bias=False), nn.Linear(2, 3)
    before = values(model)
    with pytest.raises(error, match=message):
        call(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.gpu
def test_generator_of_another_device() -> None:
    lstm = nn.LSTM(2, 3, device="cuda")
    with pytest.raises(RuntimeError, match="expected generator to be on the parameters' device"):
        init.keras_(lstm, generator=torch.Generator())
    for function in (init.orthogonal_, init.xavier_, init.keras_):
        function(lstm, generator=torch.Generator("cuda").manual_seed(1))
    assert_orthonormal_columns(lstm.weight_hh_l0.detach().cpu())


# The constructors' `init`


def chrono_for_100(module: nn.Module) -> None:
    init.chrono_(module, 100)


NAMED = [
    (name, module)
    for name, (_, cells) in ALL.items()
    for module in MODULES
    if module.split("_")[0] in cells and name != "chrono"
]


@pytest.mark.parametrize(("name", "module"), NAMED)
def test_init_by_name(name: str, module: str) -> None:
    case = Case(module, input_size=5, hidden_size=7)
    torch.manual_seed(2)
    made = case.make(rnnkit, init=name)
    torch.manual_seed(2)
    expected = ALL[name][0](case.make(nn))
    assert list(made.state_dict()) == list(expected.state_dict())
    for key, tensor in made.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[key]), key
    plain = repr(case.make(rnnkit))
    assert repr(made) == plain[:-1] + f", init={name!r})"
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        with torch.no_grad():
            for parameter in again.parameters():
                parameter.fill_(math.nan)
        torch.manual_seed(2)
        again.reset_parameters()
        for key, tensor in again.state_dict().items():
            assert torch.equal(tensor, expected.state_dict()[key]), key


@pytest.mark.parametrize("module", ["lstm", "gru", "lstm_cell", "gru_cell"])
def test_init_by_a_callable(module: str) -> None:
    for given, shown in (
        (chrono_for_100, "chrono_for_100"),
        (functools.partial(init.chrono_, t_max=100), "functools.partial"),
    ):
        made = Case(module).make(rnnkit, init=given)
        for layer in (made, pickle.loads(pickle.dumps(made))):
            assert f", init={shown}" in repr(layer)
            layer.reset_parameters()
            (weights,) = directions(layer)
            assert not weights["bias_hh"].any()
            assert (gates(weights["bias_ih"], layer)[1] > 0).any()


@pytest.mark.parametrize("module", MODULES)
def test_no_init_leaves_no_trace(module: str) -> None:
    made, given = Case(module).make(rnnkit), Case(module).make(rnnkit, init=None)
    assert vars(made).keys() == vars(given).keys()
    assert not any("init" in name for name in vars(made))
    assert "init" not in repr(made)


def test_init_is_not_an_attribute_that_subclasses_may_have() -> None:
    class Own(rnnkit.GRU):
        def init(self) -> None:
            raise AssertionError

    Own(3, 4).reset_parameters()
    Own(3, 4, init="orthogonal").reset_parameters()


@pytest.mark.parametrize("module", MODULES)
def test_init_of_a_module_made_on_the_meta_device(module: str) -> None:
    with torch.device("meta"):
        made = Case(module).make(rnnkit, device=None, init="keras")
    assert all(parameter.is_meta for parameter in made.parameters())
    made.to_empty(device="cpu").reset_parameters()
    (weights,) = directions(made)
    assert_orthonormal_columns(weights["weight_hh"])
    assert weights["bias_ih"].any() == ("lstm" in module)
    skipped = torch.nn.utils.skip_init(type(made), 4, 6, init="keras")
    assert not any(parameter.is_meta for parameter in skipped.parameters())


@pytest.mark.parametrize("module", MODULES)
def test_wrong_init(module: str) -> None:
    case = Case(module)
    names = "'orthogonal', 'xavier', 'keras', 'identity', 'forget_bias'"
    with pytest.raises(
        ValueError, match=f"init to be one of {names}, a callable or None, got 'Keras'"
    ):
        case.make(rnnkit, init="Keras")
    with pytest.raises(TypeError, match="expected init to be a str, a callable or None, got 3"):
        case.make(rnnkit, init=3)
    if "rnn" in module:
        with pytest.raises(ValueError, match="to be one of LSTM, LSTMCell, got RNN"):
            case.make(rnnkit, init="forget_bias")
    else:
        with pytest.raises(ValueError, match="to be one of RNN, RNNCell, got "):
            case.make(rnnkit, init="identity")


@pytest.mark.parametrize("module", ["lstm", "gru_cell"])
def test_init_is_kept_out_of_graphs_and_files(module: str) -> None:
    """Compiled, exported and traced, a module has nothing of its `init`; saved, it has it still."""
    made = Case(module).make(rnnkit, init=functools.partial(init.chrono_, t_max=100)).eval()
    x = Case(module).leaves()["input"].detach()
    expected = made(x)
    for call in (
        torch.compile(made, fullgraph=True, backend="aot_eager"),
        torch.export.export(made, (x,)).module(),
        torch.jit.trace(made, (x,)),
    ):
        torch.testing.assert_close(call(x), expected)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    torch.testing.assert_close(loaded(x), expected)
    assert "init=" in repr(loaded)


def test_init_of_layers_converted() -> None:
    layer = rnnkit.LSTM(3, 4, init="keras")
    rnnkit.revert(layer)
    assert vars(layer).keys() == vars(nn.LSTM(3, 4)).keys()
    rnnkit.convert(layer)
    assert "init" not in repr(layer)
