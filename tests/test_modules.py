"""What a module is before it is called: constructor, initial values and state, for layers and cells alike."""

import copy
import dataclasses
import io
import pickle
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from configurations import LAYERS, MODULES, Case, compare, run, tensors_of
from torch import nn

import rnnkit

#: Of every module's constructor, the arguments that make sense of positions, names and defaults.
LAYER_ARGUMENTS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((3, 4), {}),
    ((3, 4, 2), {"bidirectional": True}),
    ((), {"input_size": 3, "hidden_size": 4, "bias": False, "batch_first": True, "dropout": 0}),
    ((3, 4), {"num_layers": 2, "dropout": 1, "dtype": torch.float64, "device": "cpu"}),
    ((3, 4), {"num_layers": True, "bidirectional": 1}),
]
ARGUMENTS = {
    "RNN": [
        *LAYER_ARGUMENTS,
        ((3, 4, 2, "relu", False, True, 0.5, True), {}),
        ((3, 4, 1, "tanh", True, False, 0.0, False, 0, "cpu", torch.float64), {}),
        ((3, 4), {"nonlinearity": "relu"}),
    ],
    "LSTM": [
        *LAYER_ARGUMENTS,
        ((3, 4, 2, False, True, 0.5, True, 2), {}),
        ((3, 4, 1, True, False, 0.0, False, 0, "cpu", torch.float64), {}),
        ((3, 4), {"proj_size": 3}),
    ],
    "GRU": [
        *LAYER_ARGUMENTS,
        ((3, 4, 2, False, True, 0.5, True), {}),
        ((3, 4, 1, True, False, 0.0, False, 0, "cpu", torch.float64), {}),
    ],
    "RNNCell": [
        ((3, 4, False, "relu", "cpu", torch.float64), {}),
        ((3, 4), {"nonlinearity": "relu"}),
    ],
    "LSTMCell": [((3, 4, False, "cpu", torch.float64), {})],
    "GRUCell": [((3, 4, False, "cpu", torch.float64), {})],
}
for _name in ("RNNCell", "LSTMCell", "GRUCell"):
    ARGUMENTS[_name] += [
        ((3, 4), {}),
        ((), {"input_size": 3, "hidden_size": 4}),
        ((3, 0), {}),
        ((3, 4, 0), {}),
    ]
CONSTRUCTIONS = [(name, *call) for name, calls in ARGUMENTS.items() for call in calls]

#: Attributes of a module that hold its tensors, or references to them.
TENSOR_ATTRIBUTES = {"_parameters", "_flat_weights", "_flat_weight_refs"}


@pytest.mark.parametrize(("name", "args", "kwargs"), CONSTRUCTIONS, ids=str)
def test_constructor(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Attributes, representation, initial values and the random state left behind, all as torch.nn's."""
    made, states = [], []
    for package in (rnnkit, nn):
        torch.manual_seed(3)
        made.append(getattr(package, name)(*args, **kwargs))
        states.append(torch.get_rng_state())
    ours, theirs = made
    assert torch.equal(*states)
    assert repr(ours) == repr(theirs)
    attributes = [{k: v for k, v in vars(m).items() if k not in TENSOR_ATTRIBUTES} for m in made]
    if not name.endswith("Cell"):
        assert attributes[0].pop("recompute") is False
    assert attributes[0] == attributes[1]
    assert ours._parameters.keys() == theirs._parameters.keys()
    for key, parameter in ours._parameters.items():
        expected = theirs._parameters[key]
        assert type(parameter) is type(expected), key
        if parameter is not None:
            assert parameter.requires_grad
            assert parameter.dtype == expected.dtype
            assert torch.equal(parameter, expected), key


@pytest.mark.parametrize("module", MODULES)
def test_reset_parameters(device: str, module: str) -> None:
    made = []
    for module_ in Case(module, device=device).twins():
        torch.manual_seed(4)
        module_.reset_parameters()
        made.append((list(module_.state_dict().values()), torch.get_rng_state()))
    (ours, our_rng), (theirs, their_rng) = made
    assert torch.equal(our_rng, their_rng)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("module", MODULES)
def test_dtype_and_device_come_from_the_context(module: str) -> None:
    name, options = MODULES[module]
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            made = getattr(rnnkit, name)(3, 4, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    for parameter in made.parameters():
        assert (parameter.dtype, parameter.device.type) == (torch.float64, "meta")


@pytest.mark.parametrize("name", ARGUMENTS)
def test_class(name: str) -> None:
    """Layers are not torch.nn's own, on which torch.compile breaks the graph; cells are."""
    ours, theirs = getattr(rnnkit, name), getattr(nn, name)
    assert (ours.__name__, ours.__constants__) == (theirs.__name__, theirs.__constants__)
    assert issubclass(ours, nn.RNNBase if "Cell" not in name else theirs)
    assert not issubclass(ours, nn.RNN | nn.LSTM | nn.GRU)


def test_import_changes_nothing_global() -> None:
    script = """
import torch
from torch import nn
def settings():
    return (
        [dict(vars(c)) for c in (nn.RNNBase, nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell)],
        vars(nn).keys(), torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state().tolist(),
        torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
    )
before = settings()
import rnnkit
assert settings() == before
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# State


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_state_dict_loads_strictly_both_ways(
    device: str, module: str, assign: bool, bias: bool
) -> None:
    case = Case(module, bias=bias, proj_size=2 if module == "lstm" else 0, device=device)
    for source, target in ((rnnkit, nn), (nn, rnnkit)):
        loaded, given = case.make(target), case.make(source).state_dict()
        assert list(loaded.state_dict()) == list(given)
        loaded.load_state_dict(given, strict=True, assign=assign)
        for name, parameter in loaded.named_parameters():
            assert torch.equal(parameter, given[name])
            assert (parameter.data_ptr() == given[name].data_ptr()) == assign
    with pytest.raises(RuntimeError, match="Unexpected key"):
        loaded.load_state_dict({**given, "weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="Missing key"):
        loaded.load_state_dict({})


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_is_whole_and_its_own(
    backend: str, device: str, module: str, duplicate: Any
) -> None:
    case = Case(module, hx=True, num_layers=2 if module in LAYERS else 1, device=device)
    ours, _ = case.twins()
    expected = run(case, ours, case.leaves())
    copied = duplicate(ours)
    assert type(copied) is type(ours)
    assert repr(copied) == repr(ours)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    for name, result in run(case, copied, case.leaves()).items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("module", MODULES)
def test_a_pickle_holds_the_parameters_and_nothing_made_of_them(backend: str, module: str) -> None:
    case = Case(module, input_size=64, hidden_size=64)
    ours, theirs = case.twins()
    run(case, ours, case.leaves())
    ours.zero_grad()
    assert len(pickle.dumps(ours)) < len(pickle.dumps(theirs)) + 1000


@pytest.mark.parametrize("module", LAYERS)
@pytest.mark.parametrize("age", ["no proj_size", "all_weights", "tensors in all_weights"])
def test_old_pickles_load(backend: str, device: str, module: str, age: str) -> None:
    case = Case(module, bidirectional=True, hx=True, device=device)
    ours, theirs = case.twins()
    expected = run(case, ours, case.leaves())
    revived = []
    for layer in (ours, theirs):
        state = layer.__getstate__()
        del state["proj_size"]
        if age != "no proj_size":
            names = state.pop("_all_weights")
            state["all_weights"] = names if age == "all_weights" else layer.all_weights
        revived.append(type(layer).__new__(type(layer)))
        revived[-1].__setstate__(state)
    for attribute in ("proj_size", "_all_weights", "_flat_weights_names"):
        assert getattr(revived[0], attribute) == getattr(revived[1], attribute)
    for name, result in run(case, revived[0], case.leaves()).items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("module", MODULES)
def test_meta_device(module: str) -> None:
    """Shapes and dtypes come out without any data; then the module is given memory and weights."""
    case = Case(module, hx=True)
    ours, theirs = case.twins()
    on_meta = copy.deepcopy(ours).to("meta")
    leaves = case.leaves()
    results, expected = (
        tensors_of(ours(*case.arguments(leaves))),
        tensors_of(theirs(*case.arguments(leaves))),
    )
    meta_leaves = {name: leaf.detach().to("meta").requires_grad_() for name, leaf in leaves.items()}
    abstract = tensors_of(on_meta(*case.arguments(meta_leaves)))
    for result, shape in zip(abstract, expected, strict=True):
        assert (result.device.type, result.shape, result.dtype) == (
            "meta",
            shape.shape,
            shape.dtype,
        )
    sum(result.sum() for result in abstract).backward()
    for tensor in (*meta_leaves.values(), *on_meta.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape
    emptied = copy.deepcopy(on_meta).to_empty(device="cpu")
    emptied.load_state_dict(ours.state_dict())
    on_meta.load_state_dict(ours.state_dict(), assign=True)
    for revived in (emptied, on_meta):
        for result, same in zip(tensors_of(revived(*case.arguments(leaves))), results, strict=True):
            assert torch.equal(result, same)


@pytest.mark.parametrize("module", MODULES)
def test_conversion_to_another_dtype_and_back(backend: str, device: str, module: str) -> None:
    case = Case(module, hx=True, device=device)
    ours, theirs = case.twins()
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        compare(dataclasses.replace(case, dtype=dtype), ours.to(dtype), theirs.to(dtype))


def test_dropout_with_one_layer_warns_as_in_torch() -> None:
    for name in ("RNN", "LSTM", "GRU"):
        texts = []
        for package in (rnnkit, nn):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                getattr(package, name)(3, 4, dropout=0.5)
            texts.append([(w.category, str(w.message)) for w in caught])
        assert texts[0] == texts[1]
        assert len(texts[0]) == 1


def test_import_brings_no_compiler() -> None:
    """What torch imports only when it compiles takes longer to import than rnnkit."""
    code = "import sys, torch; before = set(sys.modules); import rnnkit; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = {name.partition(".")[0] for name in done.stdout.split()}
    assert not imported & {"sympy", "triton", "onnx", "onnxscript"}
    assert "torch._dynamo.convert_frame" not in done.stdout.split()
