"""Calls and circumstances out of the ordinary: each ends in torch.nn's result or an error that says what is wrong."""

import copy
import inspect
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from configurations import LAYERS, MODULES
from kernel_cases import Case
from kernel_cases import call as call_of
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

import rnnkit
from rnnkit import backends, ops
from rnnkit.call import BackwardCall, Keep, LayerCall
from rnnkit.specs import CELLS

OPS = torch.ops.rnnkit

on_cpp = pytest.mark.skipif(
    bool(backends.unavailable("cpp")), reason=f"no C++ kernels: {backends.EXTENSION_REASON}"
)
each_module = pytest.mark.parametrize("name", MODULES)
each_layer = pytest.mark.parametrize("name", LAYERS)


def make(package: Any, name: str, *sizes: int, **options: Any) -> nn.Module:
    cls, own = MODULES[name]
    return getattr(package, cls)(*(sizes or (3, 4)), **own, **options)


def twins(name: str, *sizes: int, **options: Any) -> tuple[nn.Module, nn.Module]:
    """torch.nn's module and rnnkit's with the same parameters."""
    theirs = make(nn, name, *sizes, **options)
    ours = copy.deepcopy(theirs)
    rnnkit.convert(ours)
    return theirs, ours


def x_for(name: str, T: int = 5, N: int = 2, inputs: int = 3) -> Tensor:
    return torch.randn(N, inputs) if name not in LAYERS else torch.randn(T, N, inputs)


def tensors_of(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in tensors_of(part)]


# Results are no views


@each_module
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_results_are_detached_and_written_to_in_place(
    backend: str, name: str, mode: Callable, dropout: float
) -> None:
    options = {"batch_first": True, "num_layers": 2, "dropout": dropout} if name in LAYERS else {}
    module = make(rnnkit, name, **options)
    with mode():
        for result in tensors_of(module(x_for(name))):
            assert not result._is_view()
            result.detach_()
            result.zero_()


@each_layer
def test_batch_first_output_written_to_before_the_backward_pass(backend: str, name: str) -> None:
    """Turning T and N around is no write; a user's is one, after which the output is computed again."""
    found = []
    for layer in twins(name, batch_first=True):
        x = torch.linspace(-1, 1, 30).view(2, 5, 3).requires_grad_()
        output = layer(x)[0]
        written = output.mul_(3) if layer.__module__.startswith("rnnkit") else output * 3
        (grad,) = torch.autograd.grad(written.square().sum(), x)
        found.append([written, grad])
    assert_close(*found)


# Weights other than the registered ones


@each_module
def test_weights_of_another_dtype_by_functional_call(backend: str, name: str) -> None:
    module, x = make(rnnkit, name), x_for(name).double()
    weights = {n: w.detach().double().requires_grad_() for n, w in module.named_parameters()}
    expected = copy.deepcopy(module).double()(x)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = functional_call(module, weights, (x,))
            assert_close(tensors_of(found), tensors_of(expected))
    together = {n: torch.stack([w, w]) for n, w in weights.items()}
    found = vmap(lambda w: functional_call(module, w, (x,)))(together)
    assert_close([t[1] for t in tensors_of(found)], tensors_of(expected))
    module(x_for(name))  # of its own dtype still
    if name in LAYERS:
        with pytest.raises(ValueError):
            module(x)


@each_module
def test_an_ensemble_in_double(backend: str, name: str) -> None:
    modules = [make(rnnkit, name).double() for _ in range(3)]
    weights, _ = stack_module_state(modules)
    base, x = make(rnnkit, name), x_for(name).double()
    found = vmap(lambda w: functional_call(base, w, (x,)))(weights)
    for index, module in enumerate(modules):
        assert_close([t[index] for t in tensors_of(found)], tensors_of(module(x)))


@each_module
def test_a_parametrization_that_casts(backend: str, name: str) -> None:
    class Cast(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.double()

    module, x = make(rnnkit, name), x_for(name).double()
    expected = copy.deepcopy(module).double()(x)
    for weight in [weight for weight, _ in module.named_parameters()]:
        parametrize.register_parametrization(module, weight, Cast(), unsafe=True)
    assert_close(tensors_of(module(x)), tensors_of(expected))


# Attributes that disagree


@each_layer
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("way", ["dense", "unbatched", "packed"])
@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("bidirectional", True),
        ("num_layers", 2),
        ("num_layers", 0),
        ("bias", False),
        ("proj_size", 2),
        ("hidden_size", 5),
        ("input_size", 4),
        ("_all_weights", []),
    ],
)
def test_attributes_that_do_not_fit_the_weights(
    backend: str, name: str, grad: bool, way: str, attribute: str, value: Any
) -> None:
    """As a pickle may carry them: torch.nn's RuntimeError, not a crash and not a result."""
    layer = make(rnnkit, name)
    layer.__dict__[attribute] = value
    layer = pickle.loads(pickle.dumps(layer)) if attribute != "_all_weights" else layer
    x = {"dense": torch.randn(5, 2, 3), "unbatched": torch.randn(5, 3)}.get(
        way, pack_padded_sequence(torch.randn(5, 2, 3), [5, 3]) if way == "packed" else None
    )
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError):
        layer(x)


@each_layer
def test_packed_weights_of_too_few_layers(name: str) -> None:
    layer = rnnkit.freeze(make(rnnkit, name, num_layers=2))
    layer._packed = layer._packed[:1]
    if layer._packed:
        with pytest.raises(RuntimeError, match="packed weights of 2 layers, got 1"):
            layer(x_for(name))


@on_cpp
def test_the_fast_path_takes_only_what_fits() -> None:
    short = backends.EXTENSION
    weights = [torch.randn(18, 4), torch.randn(18, 6), None, None, None]
    x = torch.randn(5, 3, 4)
    for directions in (0, -1, 2, 2**62):
        assert (
            short.direct_layers(
                "gru", x, None, [weights], [], directions, 4, 6, False, 0, None, None
            )
            is None
        )
    assert short.direct_layers("gru", x, None, [weights], [], 1, 5, 6, False, 0, None, None) is None
    assert short.direct_layers("gru", x, None, [weights], [], 1, 4, 5, False, 0, None, None) is None
    packed = [torch.zeros(64, dtype=torch.uint8)]
    assert (
        short.direct_layers("gru", x, None, [weights] * 2, packed, 1, 4, 6, False, 0, None, None)
        is None
    )
    assert short.direct_cell("gru", x[0], None, [weights] * 2, 0) is None
    assert (
        short.direct_layers("gru", x, None, [weights], [], 1, 4, 6, False, 0, None, None)
        is not None
    )


# Tensors of other kinds and places


@each_module
def test_inputs_that_are_not_dense(name: str) -> None:
    module, x = make(rnnkit, name), x_for(name)
    dense = "dense Tensor, got one that is (nested, )?of layout torch"
    with pytest.raises(RuntimeError, match=f"expected input to be a {dense}"):
        module(x.to_sparse())
    with pytest.raises(RuntimeError, match=f"expected input to be a {dense}"):
        module(
            torch.nested.as_nested_tensor([torch.ones(2, 3), torch.ones(3, 3)], layout=torch.jagged)
        )
    h = torch.zeros(1, 2, 4).to_sparse() if name in LAYERS else torch.zeros(2, 4).to_sparse()
    with pytest.raises(RuntimeError, match=rf"expected hx(\[0\])? to be a {dense}"):
        module(x, (h, h) if name.startswith("lstm") else h)
    for wrong in ([1.0], None):
        with pytest.raises(AttributeError, match="expected input to be a Tensor"):
            module(wrong)


def weights_of(cell: str, **options: Any) -> list[Tensor | None]:
    rows = CELLS[cell].gates * 4
    return [torch.randn(rows, 3, **options), torch.randn(rows, 4, **options), None, None, None]


@pytest.mark.parametrize("cell", CELLS)
def test_ops_that_meet_a_tensor_without_memory(cell: str) -> None:
    """They dispatch to the fakes, whose results are memory that nobody wrote."""
    x, weights, on_meta = torch.randn(5, 2, 3), weights_of(cell), {"device": "meta"}
    states = [torch.zeros(1, 2, 4) for _ in range(CELLS[cell].states)]
    states_on_meta = [torch.zeros(1, 2, 4, **on_meta) for _ in states]
    no_sizes = torch.tensor([5, 5], **on_meta)
    rows = torch.randn(10, 3)
    packed = OPS.pack_weights(cell, weights)
    call = LayerCall(cell, x, states, weights)
    (y,), _, reserve = ops.layer_forward(call, None, Keep.EVERYTHING)
    needs = [True] * len(call.tensors)
    grads = [torch.ones_like(y), *[None] * len(states)]
    grads_on_meta = [torch.ones_like(y, **on_meta), *grads[1:]]
    wrong = [
        replace(call, states=states_on_meta),
        replace(call, weights=weights_of(cell, **on_meta)),
        replace(call, input=x.to("meta")),
        replace(call, input=rows, batch_sizes=no_sizes),
    ]
    forwards = [(bad, given) for bad in wrong for given in (None, packed)]
    for bad, given in [*forwards, (call, packed.to("meta"))]:
        with pytest.raises(RuntimeError, match=r"expected .* on .*, got"):
            ops.layer_forward(bad, given, Keep.NOTHING)
    for bad, *given in (
        (call, grads_on_meta, y, reserve),
        *((bad, grads, y, reserve) for bad in wrong),
        (call, grads, y.to("meta"), reserve),
        (call, grads, y, reserve.to("meta")),
    ):
        with pytest.raises(RuntimeError, match=r"expected .* on .*, got"):
            ops.layer_backward(BackwardCall(bad, *given, Keep.EVERYTHING, needs))
    on_meta_alone = LayerCall(cell, x.to("meta"), [], weights_of(cell, **on_meta))
    assert ops.layer_forward(on_meta_alone, None, Keep.NOTHING)[0][0].is_meta


@pytest.mark.parametrize("device", ("cpu", "meta"))
def test_pack_weights_of_no_layer(device: str) -> None:
    """Refused as a call with these weights is, also on a device without kernels."""
    w_ih, w_hh, *others = weights_of("gru", device=device)
    assert w_ih is not None and w_hh is not None
    for cell, weights, text in (
        ("nix", [], "cell to be the name of a cell, got 'nix'"),
        (
            "gru",
            [],
            "weights to hold 5 tensors, or 9 with layer normalization, for each of 1 or 2 directions, got 0",
        ),
        (
            "gru",
            [w_ih],
            "weights to hold 5 tensors, or 9 with layer normalization, for each of 1 or 2 directions, got 1",
        ),
        ("gru", [None, w_hh, *others], "w_ih of direction 0 to be a tensor, got None"),
        ("gru", [w_ih[0], w_hh, *others], "w_ih of direction 0 to have 2 dimensions, got 1"),
        ("gru", [w_ih[1:], w_hh, *others], "w_ih of direction 0 of shape [12, 3], got [11, 3]"),
    ):
        with pytest.raises(RuntimeError, match=f"^expected {re.escape(text)}$"):
            OPS.pack_weights(cell, weights)


@on_cpp
@pytest.mark.parametrize("place", ["input", "hx", "weight_ih", "weight_hh", "bias_ih", "bias_hh"])
@each_module
def test_storage_that_was_freed(name: str, place: str) -> None:
    """Its tensors have no memory behind them: an error, in either pass, and no crash."""
    for late in (False, True):
        module, x = make(rnnkit, name), x_for(name).requires_grad_()
        h = torch.zeros(1, 2, 4) if name in LAYERS else torch.zeros(2, 4)
        hx = (h, h.clone()) if name.startswith("lstm") else h
        freed = {
            "input": x,
            "hx": h,
            **{n.removesuffix("_l0"): w for n, w in module.named_parameters()},
        }
        if late:
            loss = tensors_of(module(x, hx))[0].sum()
        freed[place].untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=r"bytes of memory, got 0|out of bounds for storage"):
            loss.backward() if late else module(x, hx)


@on_cpp
@on_cpp
@pytest.mark.parametrize("size", [0, 64])
@pytest.mark.parametrize("cell", CELLS)
def test_kept_and_packed_memory_that_was_cut(cell: str, size: int) -> None:
    rows = CELLS[cell].gates * 64
    weights = [torch.randn(rows, 64), torch.randn(rows, 64), None, None, None]
    x, packed = torch.randn(5, 2, 64), OPS.pack_weights(cell, weights)
    call = LayerCall(cell, x, [], weights)
    packed.untyped_storage().resize_(size)
    with pytest.raises(RuntimeError, match=f"expected packed .* bytes of memory, got {size}"):
        ops.layer_forward(call, packed, Keep.NOTHING)
    (y,), finals, reserve = ops.layer_forward(call, None, Keep.EVERYTHING)
    reserve.untyped_storage().resize_(size)
    if reserve.numel() > 0:
        with pytest.raises(RuntimeError, match=f"expected reserve .* bytes of memory, got {size}"):
            needs = [True, *[False] * len(weights)]
            grads = [y, *[None] * len(finals)]
            ops.layer_backward(BackwardCall(call, grads, y, reserve, Keep.EVERYTHING, needs))


@on_cpp
@pytest.mark.parametrize("place", ["reset", "operand_mask", "kept"])
def test_masks_that_were_freed(place: str) -> None:
    case = Case("lstm", resets=0.3, operand_mask=True, zoneout=(0.2, 0.3))
    it = call_of(case)
    outputs, _, reserve = it.forward()
    mask = getattr(it, place)
    mask.untyped_storage().resize_(0)
    for run in (it.forward, lambda: it.backward(outputs, reserve)):
        with pytest.raises(RuntimeError, match=f"expected {place}.* bytes of memory, got 0"):
            run()


@each_layer
def test_output_that_was_freed(name: str) -> None:
    output = make(rnnkit, name)(x_for(name))[0]
    loss = output.sum()
    output.data.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"expected output .* bytes of memory, got 0"):
        loss.backward()


@each_layer
@pytest.mark.parametrize("grad", [False, True])
def test_a_batch_of_none_for_very_many_steps(backend: str, name: str, grad: bool) -> None:
    """A list of the steps would fill the memory."""
    x = torch.empty(2**33, 0, 3, requires_grad=grad)
    for options in ({}, {"num_layers": 2, "bidirectional": True}):
        layer = make(rnnkit, name, **options)
        output, _ = layer(x)
        assert output.shape == (2**33, 0, 8 if options else 4)
        if grad:
            output.sum().backward()
            assert not any(weight.grad.any() for weight in layer.parameters())


# Data that changes between the passes


@each_module
@pytest.mark.parametrize("way", ["dense", "packed", "hooks"])
def test_weights_given_other_data_before_the_backward_pass(
    backend: str, name: str, way: str
) -> None:
    """The gradients are those of the weights that the output was computed with, as of torch.nn's GRU and RNN.

    torch.nn's LSTM, in oneDNN, mixes both, so that here a twin that nobody changes is the measure.
    """
    if way == "packed" and name not in LAYERS:
        return
    ours, same = make(rnnkit, name), make(rnnkit, name)
    same.load_state_dict(ours.state_dict())
    x, found = x_for(name), []
    for module in (ours, same):
        leaf = x.clone().requires_grad_()
        given = pack_padded_sequence(leaf, [5, 3]) if way == "packed" else leaf
        hooks = torch.autograd.graph.save_on_cpu() if way == "hooks" else nullcontext()
        with hooks:
            result = module(given)
        loss = sum(
            t.square().sum() for t in tensors_of([result[0].data] if way == "packed" else result)
        )
        if module is ours and way != "hooks":
            for weight in module.parameters():
                weight.data = torch.ones_like(weight)
        loss.backward()
        found.append([leaf.grad, *[weight.grad for weight in module.parameters()]])
    assert_close(*found)


@each_module
@on_cpp
def test_other_data_where_the_gradients_are_differentiated(name: str) -> None:
    module, x = make(rnnkit, name), x_for(name).requires_grad_()
    loss = tensors_of(module(x))[0].sum()
    weight = next(module.parameters())
    weight.data = torch.ones_like(weight)
    with pytest.raises(RuntimeError, match=r"\.data was assigned"):
        torch.autograd.grad(loss, x, create_graph=True)


# Interruption


@on_cpp
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("name", "sizes", "options"),
    [
        ("rnn_tanh", (1_500_000, 1, 64), {}),
        ("lstm", (240, 128, 2048), {}),  # visits of 20 ms
        ("gru", (40_000, 8, 256), {}),
        ("lstm", (40_000, 4, 192), {"bidirectional": True}),
        ("lstm", (40_000, 4, 192), {"proj_size": 64}),
    ],
)
@pytest.mark.parametrize("backward", [False, True])
def test_ctrl_c(
    name: str, sizes: tuple[int, int, int], options: dict[str, Any], threads: int, backward: bool
) -> None:
    """The call is left with KeyboardInterrupt in its midst, and the process goes on."""
    T, N, H = sizes
    code = f"""
        import os, signal, threading, time, torch, rnnkit
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job of the background may ignore it
        torch.set_num_threads({threads})
        layer = rnnkit.{MODULES[name][0]}({H}, {H}, **{options!r})
        x = torch.randn({T // 8 if backward else T}, {N}, {H}, requires_grad={backward})
        loss = layer(x)[0].sum() if {backward} else None

        def seconds(call):  # of this process' threads, so that other processes do not count
            start = time.process_time()
            call()
            return time.process_time() - start

        def interrupt():
            time.sleep(0.05)
            at.append(time.process_time())
            os.kill(os.getpid(), signal.SIGINT)

        def backward():
            for _ in range(20):
                x.grad = None
                loss.backward(retain_graph=True)

        @torch.no_grad()
        def forward():
            layer(x)

        with torch.no_grad():
            sixteenth = seconds(lambda: layer(x[: {T // 16}]))
        at = []
        threading.Thread(target=interrupt).start()
        try:
            backward() if {backward} else forward()
            raise SystemExit("finished")
        except KeyboardInterrupt:
            took = time.process_time() - at[0]
        if {backward}:
            assert x.grad is None, "the pass was ended first"
        else:
            assert took < 4 * sixteenth, (took, sixteenth)
        y = layer(x[:3])[0]
        y.sum().backward()
        assert y.isfinite().all()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@on_cpp
def test_a_signal_s_handler_may_go_on() -> None:
    """Only what a handler raises ends a call."""
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: seen.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        with torch.no_grad():
            output, _ = rnnkit.RNN(64, 64)(torch.randn(300_000, 1, 64))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(seen) > 1
    assert output.isfinite().all()


@on_cpp
def test_a_signal_s_handler_may_call_layers() -> None:
    """On the same thread, while a call of its own is in the midst of its scan; denormals are as they are elsewhere."""
    layer, other, x = rnnkit.GRU(64, 64), rnnkit.GRU(64, 64), torch.randn(60_000, 1, 64)
    seen: list[bool] = []

    def handle(*_: object) -> None:
        with torch.no_grad():
            other(torch.randn(50, 1, 64))
        seen.append(bool(torch.full([3], 1e-39).mul(0.5).all()))

    before = signal.signal(signal.SIGALRM, handle)
    with torch.no_grad():
        expected = layer(x)[0]
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
            for _ in range(5):
                assert torch.equal(layer(x)[0], expected)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    assert seen and all(seen)


@on_cpp
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ctrl_c_in_the_child_of_a_fork() -> None:
    code = """
        import os, signal, sys, threading, time, torch, rnnkit
        signal.signal(signal.SIGINT, signal.default_int_handler)
        layer, x = rnnkit.RNN(64, 64), torch.randn(1_500_000, 1, 64)
        with torch.no_grad():
            layer(x[:300_000])
            child = os.fork()
            if child == 0:
                start = time.monotonic()
                threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
                try:
                    layer(x)
                except KeyboardInterrupt:
                    os._exit(7)
                os._exit(8)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)


# What a class says of itself


@pytest.mark.parametrize(
    ("name", "arguments"), [("RNN", "nonlinearity"), ("LSTM", "proj_size"), ("GRU", "recompute")]
)
def test_signatures(name: str, arguments: str) -> None:
    cls = getattr(rnnkit, name)
    parameters = inspect.signature(cls).parameters
    assert list(parameters)[:2] == ["input_size", "hidden_size"]
    assert arguments in parameters
    assert not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values())

    class Own(cls):
        def __init__(self, size: int) -> None:
            super().__init__(size, size)

    assert list(inspect.signature(Own).parameters) == ["size"]


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_recompute_is_a_bool(name: str) -> None:
    with pytest.raises(TypeError, match="expected recompute to be a bool, got 'yes'"):
        getattr(rnnkit, name)(3, 4, recompute="yes")
