"""`update_gate="writes"`: the same function as torch.nn's GRU with the rows of z negated, by every way of a call."""

import copy
import pickle
import warnings
from itertools import product
from typing import Any

import pytest
import torch
from configurations import DTYPES, SIZES
from tolerances import assert_close_to_truth
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnkit


def negated(module: nn.Module) -> None:
    """Negates the rows of z."""
    with torch.no_grad():
        for weight in module.parameters():
            size = weight.size(0) // 3
            weight[size : 2 * size].neg_()


def pair(kind: str, *sizes: int, dtype: torch.dtype = torch.float64, **options: Any) -> tuple:
    """torch.nn's GRU or GRUCell, and rnnkit's whose update gate writes, which computes the same."""
    torch.manual_seed(0)
    theirs = getattr(nn, kind)(*sizes, dtype=dtype, **options)
    ours = getattr(rnnkit, kind)(*sizes, dtype=dtype, update_gate="writes", **options)
    ours.load_state_dict(theirs.state_dict())
    negated(ours)
    return theirs, ours


def results(module: nn.Module, *given: Any) -> dict[str, Tensor]:
    """Outputs, final states and all gradients; those of z's rows negated where the gate writes."""
    found = module(*given)
    tensors = [found] if isinstance(found, Tensor) else [*found]
    tensors = [t.data if isinstance(t, PackedSequence) else t for t in tensors]
    named = {f"result {k}": t for k, t in enumerate(tensors)}
    # Factors that every dtype holds exactly.
    factors = [(torch.arange(t.numel()).view_as(t) % 7 - 3).to(t.dtype) for t in tensors]
    loss = sum((t * factor).sum() for t, factor in zip(tensors, factors, strict=True))
    parameters = dict(module.named_parameters())
    grads = torch.autograd.grad(loss, [*parameters.values()])
    for name, grad in zip(parameters, grads, strict=True):
        if getattr(module, "update_gate", "keeps") == "writes":
            r, z, n = grad.chunk(3)
            grad = torch.cat([r, -z, n])
        named[f"grad {name}"] = grad
    return named


def assert_same(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], truth: dict[str, Tensor]
) -> None:
    for name, value in ours.items():
        gradient = name.startswith("grad")
        assert_close_to_truth(value, theirs[name], truth[name], gradient=gradient, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_layers_compute_torchs(dtype: torch.dtype, packed: bool, bidirectional: bool) -> None:
    for inputs, hidden in product(SIZES[1:4], SIZES[1:4]):
        options = {"num_layers": 2, "bidirectional": bidirectional}
        theirs, ours = pair("GRU", inputs, hidden, dtype=dtype, **options)
        x: Any = torch.randn(7, 3, inputs, dtype=dtype)
        if packed:
            x = pack_padded_sequence(x, [7, 5, 1])
        hx = torch.randn(4 if bidirectional else 2, 3, hidden, dtype=dtype)
        truth = results(theirs.double(), x.to(torch.float64), hx.double())
        assert_same(results(ours, x, hx), results(theirs.to(dtype), x, hx), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cells_compute_torchs(dtype: torch.dtype) -> None:
    for inputs, hidden in product(SIZES[1:4], SIZES[1:4]):
        theirs, ours = pair("GRUCell", inputs, hidden, dtype=dtype)
        x, hx = torch.randn(3, inputs, dtype=dtype), torch.randn(3, hidden, dtype=dtype)
        truth = results(theirs.double(), x.double(), hx.double())
        assert_same(results(ours, x, hx), results(theirs.to(dtype), x, hx), truth)


def test_every_backend_takes_batches_first_and_none(backend: str) -> None:
    theirs, ours = pair("GRU", 3, 17, num_layers=2, bidirectional=True, batch_first=True)
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    for given in (x, x[0]):
        torch.testing.assert_close(results(ours, given), results(theirs, given))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["GRU", "GRUCell"])
def test_autocast(kind: str, low: torch.dtype) -> None:
    """The dtypes are torch.nn's, gradients of float32 weights are in float32."""
    theirs, ours = (module.float() for module in pair(kind, 17, 17, dtype=low))
    x = torch.randn(4, 3, 17)[0 if kind == "GRUCell" else slice(None)].to(low).float()
    with torch.autocast("cpu", low):
        found, expected = results(ours, x), results(theirs, x)
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
    in_low = ({name: value.to(low) for name, value in each.items()} for each in (found, expected))
    assert_same(*in_low, results(theirs.double(), x.double()))


@pytest.mark.parametrize("kind", ["GRU", "GRUCell"])
def test_conversion_computes_the_same(kind: str) -> None:
    theirs, ours = pair(kind, 3, 5)
    x = torch.randn(4, 2, 3, dtype=torch.float64)[0 if kind == "GRUCell" else slice(None)]
    before = [id(p) for p in ours.parameters()]
    assert ours.update_gate == "writes" and "update_gate=writes" in repr(ours)
    assert ours.convert_update_gate("keeps") is ours
    assert ours.update_gate == "keeps" and "update_gate" not in repr(ours)
    assert [id(p) for p in ours.parameters()] == before
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    keeps = results(ours, x)
    ours.convert_update_gate("keeps")
    ours.convert_update_gate("writes")
    for name, value in results(ours, x).items():
        torch.testing.assert_close(value, keeps[name])


def test_conversion_of_tied_weights() -> None:
    """One tensor in several places is negated once."""
    layer = rnnkit.GRU(5, 5, 2, bidirectional=True, update_gate="writes")
    layer.weight_hh_l1_reverse = layer.weight_hh_l0
    layer.bias_hh_l0 = layer.bias_ih_l0
    x = torch.randn(4, 2, 5)
    expected = layer(x)[0]
    torch.testing.assert_close(layer.convert_update_gate("keeps")(x)[0], expected)


def test_frozen_layer_is_packed_again() -> None:
    _, ours = pair("GRU", 3, 16, dtype=torch.float32)
    x = torch.randn(4, 2, 3)
    rnnkit.freeze(ours)
    expected = ours(x)[0]
    torch.testing.assert_close(ours.convert_update_gate("keeps")(x)[0], expected)


@pytest.mark.parametrize("kind", ["GRU", "GRUCell"])
def test_copies_and_pickles_keep_it(kind: str) -> None:
    _, ours = pair(kind, 3, 5)
    x = torch.randn(2, 3, dtype=torch.float64)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert other.update_gate == "writes"
        torch.testing.assert_close(other(x), ours(x))


@pytest.mark.parametrize("kind", ["GRU", "GRUCell"])
def test_wrong_values(kind: str) -> None:
    make = getattr(rnnkit, kind)
    for wrong in ("write", None, True):
        with pytest.raises(ValueError, match="expected update_gate to be 'keeps' or 'writes', got"):
            make(3, 5, update_gate=wrong)
        with pytest.raises(ValueError, match="expected update_gate to be 'keeps' or 'writes', got"):
            make(3, 5).convert_update_gate(wrong)
    module = weight_norm(make(3, 5), next(name for name, _ in make(3, 5).named_parameters()))
    old = make(3, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(old, next(name for name, _ in old.named_parameters()))
    for each in (module, old):
        before = [p.detach().clone() for p in each.parameters()]
        with pytest.raises(RuntimeError, match="to be a parameter, got a weight that a parametriz"):
            each.convert_update_gate("writes")
        assert each.update_gate == "keeps"
        assert all(torch.equal(a, b) for a, b in zip(before, each.parameters(), strict=True))


def test_what_is_torchs_alone_is_refused() -> None:
    """torch.nn's class with these parameters would compute something else."""
    model = nn.Sequential(rnnkit.GRU(3, 5, update_gate="writes"))
    assert "convert_update_gate('keeps')" in rnnkit.revert(model).left["0"]
    x = torch.randn(4, 2, 3)
    with pytest.raises(RuntimeError, match=r"convert_update_gate\('keeps'\)"):
        torch.jit.trace(model[0], (x,))
    with pytest.raises(RuntimeError, match=r"convert_update_gate\('keeps'\)"):
        torch.jit.script(model[0])
    model[0].convert_update_gate("keeps")
    expected = model[0](x)[0]
    assert not rnnkit.revert(model).left
    torch.testing.assert_close(model[0](x)[0], expected)


def test_compiled_and_transformed() -> None:
    theirs, ours = pair("GRU", 3, 5)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    expected = theirs(x)[0]
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], expected)
    parameters = dict(ours.named_parameters())
    found = torch.func.vmap(lambda x: torch.func.functional_call(ours, parameters, (x,))[0])
    torch.testing.assert_close(found(torch.stack([x, x])), torch.stack([expected, expected]))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_decomposed(bidirectional: bool) -> None:
    theirs, ours = pair("GRU", 3, 5, bidirectional=bidirectional)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    program = torch.export.export(ours.eval(), (x,))
    table = torch.export.default_decompositions()
    program = program.run_decompositions({**table, **rnnkit.decompositions()})
    assert not any("rnnkit" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x)[0], theirs(x)[0])


def test_onnx() -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    theirs, ours = pair("GRU", 3, 5, dtype=torch.float32, bidirectional=True)
    x = torch.randn(4, 2, 3)
    program = torch.onnx.export(ours.eval(), (x,), dynamo=True, verbose=False)
    assert [node.op_type for node in program.model.graph].count("GRU") == 1
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (name,) = (given.name for given in session.get_inputs())
    found = session.run(None, {name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), theirs(x)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("library", ["keras", "haste"])
@pytest.mark.parametrize("kind", ["GRU", "GRUCell"])
def test_weights_of_other_libraries(kind: str, library: str) -> None:
    """Their gates keep; a module whose gate writes computes the same after loading, and writes the same for them."""
    write, load = getattr(rnnkit, f"to_{library}"), getattr(rnnkit, f"from_{library}")
    theirs, _ = pair(kind, 3, 5)
    weights = write(theirs)
    ours = load(getattr(rnnkit, kind)(3, 5, update_gate="writes").double(), weights)
    x = torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))
    written = write(ours)
    if isinstance(weights, dict):
        weights, written = [*weights.values()], [*written.values()]
    for found, expected in zip(written, weights, strict=True):
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected))


@pytest.mark.parametrize("kind", ["GRU", "GRUCell"])
def test_chrono_initialization_remembers(kind: str) -> None:
    torch.manual_seed(0)
    module = rnnkit.init.chrono_(getattr(rnnkit, kind)(3, 64, update_gate="writes"), 100)
    biases = [p.chunk(3)[1] for name, p in module.named_parameters() if "bias" in name]
    assert (sum(biases) <= 0).all() and sum(biases).mean() < -2
    other = getattr(rnnkit, kind)(
        3, 64, update_gate="writes", init=lambda m: rnnkit.init.chrono_(m, 100)
    )
    assert (next(p for n, p in other.named_parameters() if "bias_ih" in n).chunk(3)[1] <= 0).all()
