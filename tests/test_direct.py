"""The fast path of a call (csrc/cpu/direct.cpp): the ordinary way's bits, and only where it may be taken."""

import dataclasses
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import pytest
import torch
from configurations import CELLS, DTYPES, LAYERS, MODULES, Case, named_results, run, tensors_of
from test_errors import BAD_CALLS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import rnnkit
from rnnkit import backends

pytestmark = pytest.mark.skipif(
    bool(backends.unavailable("cpp")), reason=f"no C++ kernels: {backends.EXTENSION_REASON}"
)

each_module = pytest.mark.parametrize("module", MODULES)


class Ways:
    """Runs calls by the ordinary way, or notes of each call whether the fast path was taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken: list[bool] = []
        self._ordinary = False
        self._real = backends.fast_path
        monkeypatch.setattr(backends, "fast_path", self._fast_path)

    def _fast_path(self, name: str) -> Callable[..., Any] | None:
        real = self._real(name)
        if self._ordinary or real is None:
            return None

        def noted(*args: Any) -> Any:
            found = real(*args)
            self.taken.append(found is not None)
            return found

        return noted

    def ordinary(self, call: Callable[[], Any]) -> Any:
        self._ordinary = True
        try:
            return call()
        finally:
            self._ordinary = False


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ways]:
    with rnnkit.backend("cpp"):
        yield Ways(monkeypatch)


def structure(results: Any) -> Any:
    """Types, shapes and dtypes of what a module returns, as it returns them."""
    if isinstance(results, tuple):
        return type(results), [structure(result) for result in results]
    return type(results), results.shape, results.dtype, results.requires_grad


def assert_same(actual: Any, expected: Any, where: object) -> None:
    """Types, bits and strides."""
    assert structure(actual) == structure(expected), where
    for one, other in zip(tensors_of(actual), tensors_of(expected), strict=True):
        assert one.stride() == other.stride(), where
        assert torch.equal(one, other), where


def layer_cases(module: str, dtype: torch.dtype) -> Iterator[Case]:
    two = (False, True)
    for layers, bidirectional, batch_first, hx, bias in product((1, 2), two, two, two, two):
        for proj_size in (0, 2) if module == "lstm" else (0,):
            yield Case(
                module,
                num_layers=layers,
                bidirectional=bidirectional,
                batch_first=batch_first,
                bias=bias,
                proj_size=proj_size,
                hx=hx,
                dtype=dtype,
            )


def cell_cases(module: str, dtype: torch.dtype) -> Iterator[Case]:
    for hx, bias, batch in product((False, True), (False, True), (1, 3)):
        yield Case(module, batch=batch, bias=bias, hx=hx, dtype=dtype)


# The same results


@each_module
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_and_types_are_those_of_the_ordinary_way(
    ways: Ways, module: str, dtype: torch.dtype
) -> None:
    """And the types are torch.nn's."""
    cases = (layer_cases if module in LAYERS else cell_cases)(module, dtype)
    for case in cases:
        ours, theirs = case.twins()
        arguments = case.arguments(case.leaves())
        ways.taken.clear()
        with torch.no_grad():
            actual = ours(*arguments)
            expected = ways.ordinary(lambda: ours(*arguments))  # noqa: B023 - called at once
            assert structure(actual) == structure(theirs(*arguments)), case
        assert ways.taken == [True], case
        assert_same(actual, expected, case)


@each_module
def test_sizes_at_the_edges(ways: Ways, module: str) -> None:
    """Nothing in the batch, one row, more rows than a tile."""
    for batch, input_size in ((0, 4), (1, 1), (70, 33)):
        case = Case(module, steps=3, batch=batch, input_size=input_size, hidden_size=17, hx=True)
        ours = case.make(rnnkit)
        arguments = case.arguments(case.leaves())
        ways.taken.clear()
        with torch.no_grad():
            assert_same(ours(*arguments), ways.ordinary(lambda: ours(*arguments)), case)  # noqa: B023
        assert ways.taken == [True], case


@each_module
def test_strided_arguments(ways: Ways, module: str) -> None:
    case = Case(module, hx=True)
    ours, _ = case.twins()
    for layout in (
        lambda t: t.mT.contiguous().mT,
        lambda t: t.repeat_interleave(2, -1)[..., ::2],
        lambda t: t[..., :1].expand_as(t),
    ):
        arguments = case.arguments({name: layout(leaf) for name, leaf in case.leaves().items()})
        with torch.no_grad():
            assert_same(ours(*arguments), ways.ordinary(lambda: ours(*arguments)), "")  # noqa: B023
    assert all(ways.taken)


@each_module
def test_results_have_memory_of_their_own(ways: Ways, module: str) -> None:
    case = Case(module, steps=1, batch=1, hx=True)
    ours, _ = case.twins()
    leaves = case.leaves()
    with torch.no_grad():
        results = tensors_of(ours(*case.arguments(leaves)))
    memory = [t.untyped_storage().data_ptr() for t in [*results, *leaves.values()]]
    assert len(set(memory)) == len(memory)
    assert ways.taken == [True]


@each_module
def test_inference_mode(ways: Ways, module: str) -> None:
    """Under it, and with a module and arguments made under it, even where gradients are enabled."""
    case = Case(module, hx=True)
    ours, _ = case.twins()
    with torch.no_grad():
        expected = named_results(case, ours(*case.arguments(case.leaves())))
    with torch.inference_mode():
        inside = named_results(case, ours(*case.arguments(case.leaves())))
        made = case.make(rnnkit)
        made.load_state_dict(ours.state_dict())
        leaves = {name: leaf.detach().clone() for name, leaf in case.leaves().items()}
    assert all(result.is_inference() for result in inside.values())
    outside = named_results(case, made(*case.arguments(leaves)))
    for name, result in expected.items():
        assert torch.equal(inside[name], result)
        assert torch.equal(outside[name], result)
        assert not outside[name].requires_grad
    assert ways.taken == [True] * 3


@each_module
def test_several_threads_at_once(ways: Ways, module: str) -> None:
    case = Case(module, steps=20, batch=8, hidden_size=40, hx=True)
    ours, _ = case.twins()
    calls = [
        case.arguments({name: leaf.detach() * n for name, leaf in case.leaves().items()})
        for n in range(1, 5)
    ]
    with torch.no_grad():
        expected = [ways.ordinary(lambda: ours(*arguments)) for arguments in calls]  # noqa: B023
    start = threading.Barrier(len(calls))

    def repeated(arguments: list[Any]) -> list[Any]:
        start.wait()
        with torch.no_grad(), rnnkit.backend("cpp"):
            return [ours(*arguments) for _ in range(10)]

    with ThreadPoolExecutor(len(calls)) as pool:
        for alone, results in zip(expected, pool.map(repeated, calls), strict=True):
            for result in results:
                assert_same(result, alone, module)
    assert ways.taken == [True] * 40


# With gradients


@each_module
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_the_ordinary_way(
    ways: Ways, module: str, dtype: torch.dtype
) -> None:
    """Every result and gradient, to the bit."""
    for case in (layer_cases if module in LAYERS else cell_cases)(module, dtype):
        ours, theirs = case.twins()
        ways.taken.clear()
        actual = run(case, ours, case.leaves())
        expected = ways.ordinary(lambda: run(case, ours, case.leaves()))  # noqa: B023
        assert ways.taken == [True], case
        assert actual.keys() == expected.keys() == run(case, theirs, case.leaves()).keys()
        for name, result in actual.items():
            assert torch.equal(result, expected[name]), f"{case}: {name}"


@pytest.mark.parametrize("module", LAYERS)
@pytest.mark.parametrize("missing", ("bias_ih_l0", "bias_hh_l0_reverse"))
def test_a_bias_that_one_direction_does_not_have(ways: Ways, module: str, missing: str) -> None:
    case = Case(module, bidirectional=True)
    ours, _ = case.twins()
    setattr(ours, missing, None)
    actual = run(case, ours, case.leaves())
    expected = ways.ordinary(lambda: run(case, ours, case.leaves()))
    assert ways.taken == [True]
    assert actual.keys() == expected.keys()
    for name, result in actual.items():
        assert torch.equal(result, expected[name]), name


def both(ways: Ways, call: Callable[[], Any]) -> None:
    """`call` returns the same tensors by either way, and the fast path is taken."""
    ways.taken.clear()
    actual, expected = call(), ways.ordinary(call)
    assert ways.taken
    assert all(ways.taken)
    for one, other in zip(tensors_of(actual), tensors_of(expected), strict=True):
        assert torch.equal(one, other)


@each_module
def test_only_the_gradients_that_are_needed(ways: Ways, module: str) -> None:
    """Each of input, states and weights alone; and of each result alone."""
    case = Case(module, hx=True)
    ours, _ = case.twins()
    names = [*case.leaves(), *(name for name, _ in ours.named_parameters())]
    for wanted in names:
        ours.requires_grad_(False)
        leaves = {name: leaf.detach() for name, leaf in case.leaves().items()}
        tensors = {**leaves, **dict(ours.named_parameters())}
        tensors[wanted].requires_grad_()

        def gradients() -> list[Tensor]:
            results = tensors_of(ours(*case.arguments(leaves)))  # noqa: B023
            return [
                torch.autograd.grad(result.sum(), tensors[wanted], retain_graph=True)[0]  # noqa: B023
                for result in results
            ]

        both(ways, gradients)


@each_module
@pytest.mark.parametrize("batched", (False, True))
def test_gradients_of_gradients(ways: Ways, module: str, batched: bool) -> None:
    """And several at once, by a transform."""
    case = Case(module, hx=True, dtype=torch.float64)
    ours, _ = case.twins()
    leaves = case.leaves()
    wanted = [*leaves.values(), *ours.parameters()]

    def gradients() -> list[Tensor]:
        result = tensors_of(ours(*case.arguments(leaves)))[0]
        if batched:
            cotangents = torch.stack([torch.ones_like(result), result.detach()])
            return list(torch.autograd.grad(result, wanted, cotangents, is_grads_batched=True))
        first = torch.autograd.grad(result.pow(2).sum(), wanted, create_graph=True)
        return list(torch.autograd.grad(sum(g.pow(2).sum() for g in first), wanted))

    both(ways, gradients)


@each_module
def test_forward_mode_over_a_backward_pass(ways: Ways, module: str) -> None:
    """The tangent of a cotangent reaches the gradients."""
    case = Case(module, hx=True, dtype=torch.float64)
    ours, _ = case.twins()
    leaves = case.leaves()

    def tangents() -> list[Tensor]:
        with forward_ad.dual_level():
            result = tensors_of(ours(*case.arguments(leaves)))[0]
            cotangent = forward_ad.make_dual(torch.ones_like(result), result.detach())
            grads = torch.autograd.grad(result, list(leaves.values()), cotangent)
            found = [forward_ad.unpack_dual(grad).tangent for grad in grads]
        assert all(tangent is not None for tangent in found)
        return [tangent for tangent in found if tangent is not None]

    both(ways, tangents)


@each_module
@pytest.mark.parametrize("what", ("input", "hx", "weight", "result"))
def test_writes_before_the_backward_pass(ways: Ways, module: str, what: str) -> None:
    """To what the call was given: an error. To its result: none, and the right gradients."""
    case = Case(module, hx=True)
    ours, _ = case.twins()

    def gradients() -> list[Tensor]:
        leaves = case.leaves()
        given = {name: leaf * 1 for name, leaf in leaves.items()}
        result = tensors_of(ours(*case.arguments(given)))[0]
        loss = result.sum()
        target = {"weight": next(ours.parameters()), "result": result, **given}[what]
        with torch.no_grad():
            target.mul_(1 if what == "weight" else 2)
        return list(torch.autograd.grad(loss, [*leaves.values(), *ours.parameters()]))

    if what == "result":
        both(ways, gradients)
        return
    for by in (lambda call: call(), ways.ordinary):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            by(gradients)


@pytest.mark.parametrize("module", CELLS)
def test_results_of_a_cell_are_no_views(ways: Ways, module: str) -> None:
    """So that scripts may cut them from the graph, or write to them, as to those of torch.nn."""
    case = Case(module)
    ours, _ = case.twins()
    for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with context:
            for result in tensors_of(ours(*case.arguments(case.leaves()))):
                assert not result._is_view()
                result.detach_()
    for result in tensors_of(ours(*case.arguments(case.leaves()))):
        result.mul_(2).sum().backward(retain_graph=True)
    assert all(ways.taken)


@each_module
def test_a_used_graph(ways: Ways, module: str) -> None:
    """May be used again if it was to be kept, else not; and then holds nothing."""
    case = Case(module)
    ours, _ = case.twins()
    result = tensors_of(ours(*case.arguments(case.leaves())))[0]
    node, memory = result.grad_fn, StorageWeakRef(result.untyped_storage())
    loss = result.sum()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in ours.parameters() if p.grad is not None]
    loss.backward()
    for once, twice in zip(first, ours.parameters(), strict=True):
        assert twice.grad is not None
        assert torch.equal(2 * once, twice.grad)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    del result, loss
    assert node is not None
    assert memory.expired()
    assert ways.taken == [True]


@each_module
def test_hooks_of_saved_tensors(ways: Ways, module: str) -> None:
    """They see what is kept, as in checkpoints and where it moves to other memory."""
    case = Case(module, hx=True)
    ours, _ = case.twins()
    leaves = case.leaves()
    wanted = [*leaves.values(), *ours.parameters()]
    seen = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor.detach().clone()

    def gradients() -> list[Tensor]:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = tensors_of(ours(*case.arguments(leaves)))[0]
        return list(torch.autograd.grad(result.sum(), wanted))

    def checkpointed() -> list[Tensor]:
        result = checkpoint(
            lambda *given: tensors_of(ours(*given))[0], *case.arguments(leaves), use_reentrant=False
        )
        return list(torch.autograd.grad(result.sum(), wanted))

    both(ways, gradients)
    assert {id(t) for t in wanted} <= {id(t) for t in seen}
    both(ways, checkpointed)


@each_module
def test_compiled_autograd(ways: Ways, module: str) -> None:
    case = Case(module, hx=True)
    ours, _ = case.twins()
    leaves = case.leaves()

    def gradients() -> list[Tensor]:
        ours.zero_grad()
        loss = sum(t.sum() for t in tensors_of(ours(*case.arguments(leaves))))
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()
        return [p.grad for p in ours.parameters() if p.grad is not None]

    both(ways, gradients)


# Where it may not be taken

Situation = Callable[[Case, nn.Module, dict[str, Tensor]], Any]


def _under_autocast(case: Case, module: nn.Module, leaves: dict[str, Tensor]) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return module(*case.arguments(leaves))


def _vmap(case: Case, module: nn.Module, leaves: dict[str, Tensor]) -> Any:
    def call(input: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors_of(module(*case.arguments({**leaves, "input": input}))))

    inputs = torch.stack([leaves["input"], leaves["input"] * 2])
    results = torch.func.vmap(call)(inputs)
    for alone, together in zip(call(inputs[1]), results, strict=True):
        torch.testing.assert_close(together[1], alone)
    return results


def _jvp(case: Case, module: nn.Module, leaves: dict[str, Tensor]) -> Any:
    def call(input: Tensor) -> Tensor:
        return tensors_of(module(*case.arguments({**leaves, "input": input})))[0]

    results = torch.func.jvp(call, (leaves["input"],), (torch.ones_like(leaves["input"]),))
    assert results[1].any()
    return results


def _dual(of: str) -> Situation:
    def call(case: Case, module: nn.Module, leaves: dict[str, Tensor]) -> Any:
        with forward_ad.dual_level():
            given = dict(leaves)
            if of == "weight":
                name, weight = next(iter(module.named_parameters()))
                delattr(module, name)
                setattr(module, name, forward_ad.make_dual(weight, torch.ones_like(weight)))
            else:
                given[of] = forward_ad.make_dual(leaves[of], torch.ones_like(leaves[of]))
            results = tensors_of(module(*case.arguments(given)))
            tangents = [forward_ad.unpack_dual(t).tangent for t in results]
        assert all(tangent is not None and tangent.any() for tangent in tangents)
        return tuple(tangents)

    return call


class Traced(Tensor):
    """Notes the functions that are called on it."""

    seen: list[str] = []  # noqa: RUF012 - of the class, since each result is a new instance

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        cls.seen.append(getattr(function, "__name__", str(function)))
        return super().__torch_function__(function, types, args, kwargs or {})


def _subclass(of: str) -> Situation:
    def call(case: Case, module: nn.Module, leaves: dict[str, Tensor]) -> Any:
        given = dict(leaves)
        if of == "weight":
            name, weight = next(iter(module.named_parameters()))
            setattr(module, name, nn.Parameter(weight.detach().as_subclass(Traced)))
        else:
            given[of] = leaves[of].detach().as_subclass(Traced)
        Traced.seen.clear()
        results = module(*case.arguments(given))
        assert "layer_forward" in " ".join(Traced.seen)
        return results

    return call


def _fake(case: Case, module: nn.Module, leaves: dict[str, Tensor]) -> Any:
    mode = FakeTensorMode()
    given = {name: mode.from_tensor(leaf) for name, leaf in leaves.items()}
    with mode:
        results = case.make(rnnkit)(*case.arguments(given))
    assert all(isinstance(t, FakeTensor) for t in tensors_of(results))
    return None


def _meta(case: Case, module: nn.Module, leaves: dict[str, Tensor]) -> Any:
    given = {name: leaf.to("meta") for name, leaf in leaves.items()}
    results = module.to("meta")(*case.arguments(given))
    assert all(t.is_meta for t in tensors_of(results))
    return None


class Ops(TorchDispatchMode):
    """Notes the ops that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.seen.append(op.name())
        return op(*args, **(kwargs or {}))


def _dispatch_mode(case: Case, module: nn.Module, leaves: dict[str, Tensor]) -> Any:
    with Ops() as ops:
        results = module(*case.arguments(leaves))
    assert ops.seen.count("rnnkit::layer_forward") == 1
    return results


class Functions(TorchFunctionMode):
    """Notes torch's functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        self.seen.append(getattr(function, "__name__", str(function)))
        return function(*args, **(kwargs or {}))


def _function_mode(case: Case, module: nn.Module, leaves: dict[str, Tensor]) -> Any:
    """It sees torch.nn's call of `lstm` and so on."""
    with Functions() as functions:
        results = module(*case.arguments(leaves))
    assert "layer_forward" in " ".join(functions.seen)
    return results


def _unbatched(case: Case, module: nn.Module, leaves: dict[str, Tensor]) -> Any:
    case = dataclasses.replace(case, batch=None)
    return module(*case.arguments(case.leaves()))


SITUATIONS: dict[str, Situation] = {
    "autocast": _under_autocast,
    "vmap": _vmap,
    "jvp": _jvp,
    "dual input": _dual("input"),
    "dual state": _dual("hx"),
    "dual weight": _dual("weight"),
    "subclass input": _subclass("input"),
    "subclass state": _subclass("hx"),
    "subclass weight": _subclass("weight"),
    "FakeTensor": _fake,
    "meta": _meta,
    "TorchDispatchMode": _dispatch_mode,
    "TorchFunctionMode": _function_mode,
    "unbatched": _unbatched,
}


@each_module
@pytest.mark.parametrize("situation", SITUATIONS)
def test_not_taken(ways: Ways, module: str, situation: str) -> None:
    """What the situation asks for happens, and the results are those of the ordinary way alone."""
    case = Case(module, hx=True)

    def call() -> Any:
        torch.manual_seed(0)  # for the same weights at each call
        ours, _ = case.twins()
        with torch.no_grad():
            return SITUATIONS[situation](case, ours, case.leaves())

    expected = ways.ordinary(call)
    actual = call()
    if situation != "vmap":  # which is compared with a plain call
        assert not any(ways.taken)
    if expected is not None:
        assert_same(actual, expected, situation)


@pytest.mark.parametrize("module", LAYERS)
def test_dropout_is_drawn_in_training_without_gradients(ways: Ways, module: str) -> None:
    case = Case(module, num_layers=2)
    ours = case.make(rnnkit, dropout=0.5)
    arguments = case.arguments(case.leaves())
    with torch.no_grad():
        assert not torch.equal(ours(*arguments)[0], ours(*arguments)[0])
        assert ways.taken == []
        ours.eval()
        assert_same(ours(*arguments), ways.ordinary(lambda: ours(*arguments)), module)
    assert ways.taken == [True]


@pytest.mark.parametrize("module", LAYERS)
def test_packed_sequences(ways: Ways, module: str) -> None:
    case = Case(module, lengths=(2, 5, 4), hx=True)
    ours, _ = case.twins()
    arguments = case.arguments(case.leaves())
    with torch.no_grad():
        actual, expected = ours(*arguments), ways.ordinary(lambda: ours(*arguments))
    for one, other in zip(tensors_of(actual), tensors_of(expected), strict=True):
        assert torch.equal(one, other)
    assert type(actual[0]) is type(expected[0])
    assert not any(ways.taken)


@each_module
def test_hx_given_as_a_list_of_tensors(ways: Ways, module: str) -> None:
    """Taken by an LSTM as by torch.nn's, refused by the others."""
    case = Case(module, hx=True)
    input, hx = case.arguments(case.leaves())
    states = list(hx) if isinstance(hx, tuple) else [hx]
    ours, theirs = case.twins()
    with torch.no_grad():
        if "lstm" in module:
            assert structure(ours(input, states)) == structure(theirs(input, states))
            assert_same(ours(input, states), ours(input, hx), module)
        else:
            with pytest.raises(AttributeError, match="hx to be a Tensor, got list"):
                ours(input, states)


@each_module
def test_on_the_reference(ways: Ways, module: str) -> None:
    """It is the C++ backend's; a forced reference is not passed by."""
    case = Case(module)
    ours, _ = case.twins()
    with torch.no_grad(), rnnkit.backend("reference"), Ops() as ops:
        ours(*case.arguments(case.leaves()))
    assert "rnnkit::layer_forward" not in ops.seen
    assert ways.taken == []


# Errors


@each_module
def test_errors_are_those_with_gradients(ways: Ways, module: str) -> None:
    """What test_errors.py holds to torch.nn's, raised without gradients."""

    def hx(*shape: int, **options: Any) -> Any:
        state = torch.randn(*shape, **options)
        return (state, state) if "lstm" in module else state

    ours, _ = Case(module).twins()
    differ = {}
    for bad in (bad for bad in BAD_CALLS if module in bad.modules):
        arguments = bad.arguments(hx)
        with torch.no_grad(), pytest.raises(bad.error) as caught:
            ours(*arguments)
        with torch.no_grad(), pytest.raises(bad.error, match=bad.text) as expected:
            ways.ordinary(lambda: ours(*arguments))  # noqa: B023 - called at once
        if str(caught.value) != str(expected.value):
            differ[bad.what] = str(caught.value), str(expected.value)
    assert differ == {}


@each_module
def test_a_weight_of_another_size_dtype_or_device(ways: Ways, module: str) -> None:
    case = Case(module)
    for change in (
        lambda w: w.double(),
        lambda w: w.to("meta"),
        lambda w: w[:-1],
        lambda w: w[..., :-1],
        lambda w: w[None],
    ):
        for name in [name for name, _ in case.make(rnnkit).named_parameters()]:
            ours, _ = case.twins()
            setattr(ours, name, nn.Parameter(change(getattr(ours, name).detach())))
            errors = []
            for by in (lambda call: call(), ways.ordinary):
                with torch.no_grad(), pytest.raises((RuntimeError, ValueError)) as caught:
                    by(lambda: ours(*case.arguments(case.leaves())))  # noqa: B023 - called at once
                errors.append((caught.type, str(caught.value)))
            assert errors[0] == errors[1], name


WITHOUT_A_WEIGHT = """
    import torch, rnnkit
    for name, size in (("LSTM", (5, 3, 4)), ("GRUCell", (3, 4))):
        for missing in ("weight_ih", "weight_hh"):
            module = getattr(rnnkit, name)(4, 6)
            setattr(module, missing if "Cell" in name else missing + "_l0", None)
            try:
                with torch.no_grad():
                    module(torch.randn(size))
            except (RuntimeError, TypeError, AttributeError, ValueError) as error:
                continue
            raise SystemExit(f"{name} without {missing} raised nothing")
"""


def test_a_weight_that_is_none_is_an_error_and_no_crash() -> None:
    """In a process of its own, which a crash would end."""
    command = [sys.executable, "-c", textwrap.dedent(WITHOUT_A_WEIGHT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr}"


# Seen by tools


@pytest.mark.parametrize("module", [*LAYERS, *CELLS])
def test_the_profiler_shows_the_op(ways: Ways, module: str) -> None:
    case = Case(module)
    ours, _ = case.twins()
    arguments = case.arguments(case.leaves())
    with torch.no_grad(), torch.autograd.profiler.profile() as profile:
        ours(*arguments)
    assert [event.name for event in profile.function_events].count("rnnkit::layer_forward") == 1
    assert ways.taken == [True]
