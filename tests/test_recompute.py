"""`recompute=True`: the same results and gradients from less that is kept; and outputs written to before backward."""

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from configurations import LAYERS, STACKED, Case, compare, named_results, run
from devices import on_each_device
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils.rnn import PackedSequence

import rnnkit
from rnnkit import backends
from rnnkit.specs import CELLS

needs_cpp = pytest.mark.skipif(
    bool(backends.unavailable("cpp")), reason=f"no C++ kernels: {backends.EXTENSION_REASON}"
)
on_stacked = pytest.mark.parametrize("case", on_each_device(STACKED), ids=str)
each_layer = pytest.mark.parametrize("module", LAYERS)


def pair(case: Case, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The layer that recomputes, and the ordinary one with the same weights."""
    ordinary, _ = case.twins(**options)
    recomputing = case.make(rnnkit, recompute=True, **options)
    recomputing.load_state_dict(ordinary.state_dict())
    return recomputing, ordinary


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, result in actual.items():
        assert torch.equal(result, expected[name]), name


# Results and gradients

SMALL = [
    *STACKED,
    *(Case(name, bias=False, batch_first=True) for name in LAYERS),
    *(Case(name, batch=None) for name in LAYERS),
    *(Case(name, num_layers=2, hx=True, lengths=(2, 5, 4)) for name in LAYERS),
    Case("lstm", bidirectional=True, proj_size=2, lengths=(2, 5, 4)),
    *(
        Case(name, hx=True, bidirectional=True, hidden_size=17, lengths=lengths, dtype=dtype)
        for name in LAYERS
        for dtype in (torch.float64, torch.bfloat16)
        for lengths in (None, (2, 5, 4))
    ),
]

#: Of as many rows as the products need to be the forward pass's own.
LONG = {"steps": 200, "hidden_size": 33, "num_layers": 2, "bidirectional": True, "hx": True}


@pytest.mark.parametrize("case", on_each_device(SMALL), ids=str)
def test_results_and_gradients(backend: str, case: Case) -> None:
    """Results are the ordinary layer's to the last bit, gradients right within the tolerances."""
    ours, theirs = case.twins()
    recomputing = case.make(rnnkit, recompute=True)
    recomputing.load_state_dict(ours.state_dict())
    compare(case, recomputing, theirs)
    arguments = case.arguments(case.leaves())
    actual, expected = (named_results(case, m(*arguments)) for m in (recomputing, ours))
    assert_same(actual, expected)


@needs_cpp
@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_long_sequences_have_the_same_bits(module: str, dtype: torch.dtype) -> None:
    """With as many rows, gates are computed again by the very products that computed them first."""
    case = Case(module, dtype=dtype, **LONG)
    assert_same(*(run(case, layer, case.leaves()) for layer in pair(case)))


@needs_cpp
@pytest.mark.parametrize("module", ["lstm", "gru"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_long_sequences_in_low_precision(device: str, module: str, dtype: torch.dtype) -> None:
    """Where other products may round differently: no further from the truth than is allowed at all."""
    case = Case(module, dtype=dtype, device=device, **LONG)
    ours, theirs = case.twins()
    ours.recompute = True
    compare(case, ours, theirs)


@each_layer
def test_dropout_is_the_same(backend: str, device: str, module: str) -> None:
    """The second layer's input, dropout's mask in it, is kept, not drawn again."""
    case = Case(module, num_layers=2, hx=True, steps=20, device=device)
    results = []
    for layer in pair(case, dropout=0.5):
        torch.manual_seed(1)
        results.append(run(case, layer, case.leaves()))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@on_stacked
def test_double_backward(backend: str, case: Case) -> None:
    case = dataclasses.replace(case, dtype=torch.float64)
    found = []
    for layer in pair(case):
        leaves = case.leaves()
        results = named_results(case, layer(*case.arguments(leaves))).values()
        wanted = [*leaves.values(), *layer.parameters()]
        total = sum(result.square().sum() for result in results)
        first = torch.autograd.grad(total, wanted, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), wanted)
        found.append([grad.detach() for grad in (*first, *second)])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@each_layer
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_changes_nothing(
    backend: str, device: str, module: str, mode: Any
) -> None:
    case = Case(module, num_layers=2, hx=True, device=device)
    arguments = case.arguments(case.leaves())
    with mode():
        actual, expected = (named_results(case, layer(*arguments)) for layer in pair(case))
    assert_same(actual, expected)
    assert all(result.grad_fn is None for result in actual.values())


@needs_cpp
@pytest.mark.parametrize("case", [*STACKED, Case("gru", lengths=(2, 5, 4), hx=True)], ids=str)
def test_compiled(case: Case) -> None:
    """The same as without the compiler."""
    torch.compiler.reset()
    recomputing, _ = pair(case)
    expected = run(case, recomputing, case.leaves())
    actual = run(case, torch.compile(recomputing, backend="aot_eager"), case.leaves())
    actual = {name.replace("_orig_mod.", ""): result for name, result in actual.items()}
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


# The module


@each_layer
def test_repr_and_copies(module: str) -> None:
    case = Case(module, num_layers=2, batch_first=True)
    recomputing, ordinary = pair(case)
    assert repr(recomputing) == repr(ordinary).replace(")", ", recompute=True)")
    assert "recompute" not in repr(ordinary)
    for layer in (recomputing, ordinary):
        for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert copied.recompute is layer.recompute
            assert repr(copied) == repr(layer)


@each_layer
def test_a_pickle_from_before_recompute(backend: str, module: str) -> None:
    case = Case(module, hx=True)
    ours, _ = case.twins()
    expected = run(case, ours, case.leaves())
    del ours.__dict__["recompute"]
    ours.zero_grad()
    revived = pickle.loads(pickle.dumps(ours))
    assert "recompute" not in revived.__dict__
    assert "recompute" not in repr(revived)
    assert_same(run(case, revived, case.leaves()), expected)


def test_only_layers_and_only_by_keyword() -> None:
    with pytest.raises(TypeError):
        rnnkit.GRUCell(4, 6, recompute=True)
    assert rnnkit.LSTM(4, 6, 1, True, recompute=True).recompute
    assert not rnnkit.LSTM(4, 6, 1, True, False, 0.0, False, 0).recompute


# Memory


def bytes_kept(case: Case, layer: nn.Module) -> int:
    """Of all that the graph of one call saves for its backward pass."""
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(*case.arguments(case.leaves()))
    return sum(kept)


@needs_cpp
@pytest.mark.parametrize(
    "case",
    on_each_device(
        [
            *STACKED,
            *(Case(name, steps=30, hidden_size=33, hx=True) for name in LAYERS),
            *(Case(name, bidirectional=True, lengths=(2, 5, 4)) for name in LAYERS),
            *(Case(name, num_layers=2, dtype=torch.float64) for name in LAYERS),
            *(Case(name, num_layers=2, dtype=torch.bfloat16) for name in LAYERS),
        ]
    ),
    ids=str,
)
def test_the_gates_are_not_kept(case: Case) -> None:
    """What is kept is smaller by the gates of every layer, direction, row and unit, and by nothing else."""
    spec = CELLS[case.module]
    rows = sum(case.lengths) if case.lengths else case.steps * (case.batch or 1)
    values = spec.saved - (spec.states - 1)
    units = case.num_layers * (2 if case.bidirectional else 1) * rows * case.hidden_size
    recomputing, ordinary = (bytes_kept(case, layer) for layer in pair(case))
    assert ordinary - recomputing == units * values * max(case.dtype.itemsize, 4)


# Outputs written to before the backward pass


def _without_grad(output: Tensor) -> None:
    with torch.no_grad():
        output.mul_(0)


#: Writes that autograd's version counters tell of.
WRITES: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda output: output.mul_(0),
    "item": lambda output: output.__setitem__(0, 1),
    "slice": lambda output: output[1:, ..., ::2].zero_(),
    "view": lambda output: output.view(-1)[3:].fill_(3),
    "no_grad": _without_grad,
    "detached": lambda output: output.detach().zero_(),
}

WRITTEN = [
    *(Case(name, hx=True) for name in LAYERS),
    *(Case(name, num_layers=2, bidirectional=True, hx=True) for name in ("lstm", "gru")),
    *(Case(name, lengths=(2, 5, 4), hx=True) for name in ("lstm", "gru")),
    Case("lstm", proj_size=2, hx=True),
]


def gradients_around(
    case: Case, layer: nn.Module, write: Callable[[Tensor], Any] | None
) -> list[list[Tensor]]:
    """Of one loss on the output, before and twice after `write` to it; RuntimeError if that is refused."""
    leaves = case.leaves()
    output = layer(*case.arguments(leaves))[0]
    output = output.data if isinstance(output, PackedSequence) else output
    cotangent = torch.linspace(0.5, 1.5, output.numel()).view(output.shape).to(output)
    loss = (output * cotangent).sum()
    wanted = [*leaves.values(), *layer.parameters()]

    def gradients() -> list[Tensor]:
        found = torch.autograd.grad(loss, wanted, retain_graph=True, materialize_grads=True)
        return list(found)

    before = gradients()
    if write is not None:
        write(output)
    return [before, gradients(), gradients()]


@pytest.mark.parametrize("recompute", [False, True], ids=["keeps all", "recompute"])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("case", on_each_device(WRITTEN), ids=str)
def test_gradients_are_of_what_the_forward_pass_returned(
    backend: str, case: Case, write: str, recompute: bool
) -> None:
    """Before the write and after it; and torch.nn's, where it allows the write."""
    ours, theirs = case.twins()
    ours.recompute = recompute
    before, *after = gradients_around(case, ours, WRITES[write])
    for gradients in after:
        assert all(torch.equal(a, b) for a, b in zip(gradients, before, strict=True))
    try:
        expected = gradients_around(case, theirs, WRITES[write])[1]
    except RuntimeError as error:
        assert "inplace" in str(error)  # torch.nn.LSTM's oneDNN op keeps its output
    else:
        torch.testing.assert_close(after[0], expected, rtol=1e-4, atol=1e-5)


@needs_cpp
@each_layer
@pytest.mark.parametrize("recompute", [False, True])
def test_a_used_graph_holds_no_output(device: str, module: str, recompute: bool) -> None:
    """What tells of writes must not keep the memory after the backward pass has let go of it."""
    case = Case(module, device=device)
    ours, _ = case.twins()
    ours.recompute = recompute
    with rnnkit.backend("cpp"):
        output = ours(*case.arguments(case.leaves()))[0]
    node, memory = output.grad_fn, StorageWeakRef(output.untyped_storage())
    output.sum().backward()
    assert not memory.expired()
    del output
    assert node is not None
    assert memory.expired()


@needs_cpp
@each_layer
def test_a_graph_nobody_used_is_freed(device: str, module: str) -> None:
    """The output is saved without a cycle from it to its own graph."""
    case = Case(module, device=device)
    ours, _ = case.twins()
    with rnnkit.backend("cpp"):
        output = ours(*case.arguments(case.leaves()))[0]
    memory = StorageWeakRef(output.untyped_storage())
    del output
    assert memory.expired()
