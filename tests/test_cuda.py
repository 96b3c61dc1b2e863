"""What only a GPU has: kernels of several kinds at every size, streams, graphs, several devices, sizes past 2**31."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from configurations import CELLS as CELL_MODULES
from configurations import LAYERS, MODULES, STACKED, backward, compare, named_results, run
from configurations import Case as ModuleCase
from kernel_cases import (
    RESETS_AND_NOISE,
    Call,
    Case,
    assert_case_matches_reference,
    assert_same_bits,
    call,
)
from test_kernels import LAYOUTS
from tolerances import FORWARD, GRADIENT, assert_close_to_truth, relative_error
from torch import Tensor, nn

import rnnkit
from rnnkit import backends, cuda, instances, plan
from rnnkit.call import Keep
from rnnkit.specs import CELLS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        bool(backends.CUDA_REASON), reason=f"no CUDA kernels: {backends.CUDA_REASON}"
    ),
]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KERNELS = plan.KERNELS

each_cell = pytest.mark.parametrize("cell", CELLS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_layer = pytest.mark.parametrize("module", LAYERS)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs on each kind of kernel."""
    with plan.forced(request.param):
        yield request.param


def errors(results: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """How much of the table's tolerance each result's deviation takes."""
    return {
        name: relative_error(result, truth[name])
        / (GRADIENT if name.startswith("grad") else FORWARD)[result.dtype]
        for name, result in results.items()
    }


# Sizes

HIDDEN = (1, 3, 8, 17, 64, 100, 128, 200, 256, 512, 650, 1024, 1500, 2048)
BATCHES = (1, 5, 8, 16, 33, 64, 100, 256)
INPUTS = (7, 64, 33, 130, 1)


def _sweep() -> Iterator[Case]:
    """Every hidden size with one or two batches, drawn along diagonals; a third each also ragged, reset, noisy."""
    pairs = [(h, BATCHES[(3 * i + 3) % 8]) for i, h in enumerate(HIDDEN)]
    pairs += [(h, BATCHES[(3 * i + 7) % 8]) for i, h in enumerate(HIDDEN) if i % 2]
    for index, (hidden, batch) in enumerate(pairs):
        case = Case("", (6, batch, INPUTS[index % len(INPUTS)], hidden))
        yield case
        if index % 3 == 0:
            yield replace(case, lengths=tuple(6 - 6 * n // batch for n in range(batch)))
        if index % 3 == 1:
            yield replace(case, resets=0.2, reset_states=index % 2 == 0)
        if index % 3 == 2:
            yield replace(case, operand_mask=True, zoneout=(0.2, 0.3), expects=index % 2 == 0)


SWEEP = [
    replace(case, cell=cell, directions=directions, dtype=dtype, device="cuda", off_kink=True)
    for case in _sweep()
    for cell in CELLS
    for dtype in DTYPES
    for directions in (1, 2)
]


@pytest.mark.parametrize("case", SWEEP, ids=str)
def test_every_size_against_reference(case: Case) -> None:
    assert_case_matches_reference(case)


SMALL = [
    Case(cell, sizes, 2, dtype=dtype, device="cuda", off_kink=True, **variant)
    for cell in CELLS
    for dtype in DTYPES
    for sizes, variant in (
        ((9, 5, 33, 100), {}),
        ((9, 5, 33, 100), {"lengths": (9, 9, 4, 2, 1)}),
        ((9, 5, 33, 100), {"grad_clip": 0.05, "grad_cut": 2, "lengths": (9, 9, 4, 2, 1)}),
        ((9, 5, 33, 100), {"resets": 0.3, "reset_states": True, "lengths": (9, 9, 4, 2, 1)}),
        ((7, 40, 64, 256), {"resets": 0.1, "reset_states": True, "grad_clip": 0.05, "grad_cut": 2}),
        ((9, 5, 33, 100), {**RESETS_AND_NOISE, "grad_clip": 0.05, "grad_cut": 2}),
        ((9, 5, 33, 100), {"operand_mask": True, "zoneout": (0.3, 0.2), "expects": True}),
        ((7, 40, 64, 256), {"operand_mask": True, "zoneout": (0.3, 0.2)}),
        ((7, 40, 64, 256), {}),
        ((7, 40, 64, 256), {"grad_clip": 0.05}),
        ((7, 8, 64, 650), {}),
    )
]


@pytest.mark.parametrize("keep", (Keep.STATES, Keep.EVERYTHING))
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_either_kernel_against_reference(case: Case, keep: Keep, kernel: str) -> None:
    assert_case_matches_reference(case, keep)


#: Rows of the batch, and of a slice of it: one slice of two, four and eight tiles, and of more than are multiplied
#: at a time; several slices, the last of them not full.
SLICES = ((13, 16), (30, 32), (60, 64), (125, 128), (90, 32), (20, 8))


def _plans_of(
    scan: plan.Scan, device: plan.Gpu, units: int, batch_tile: int
) -> Iterator[plan.Plan]:
    """The plans with these: a small GPU may have no room for it."""
    for found in plan.persistent_plans(scan, device):
        if (found.units, found.batch_tile) == (units, batch_tile):
            yield found


@pytest.mark.parametrize(("batch", "batch_tile"), SLICES)
@pytest.mark.parametrize("units", (4, 8, 16))
@each_dtype
@each_cell
def test_every_persistent_kernel(
    cell: str, dtype: torch.dtype, units: int, batch: int, batch_tile: int
) -> None:
    """Each that is built, of both passes; where one of the passes has none, it runs step by step."""
    case = Case(cell, (5, batch, 20, 45), 2, dtype=dtype, device="cuda", off_kink=True)
    sizes = {"hidden": 45, "projected": 45, "batch": batch, "directions": 2}
    passes = [
        plan.Scan(cell, dtype.itemsize, back, precise=True, **sizes) for back in (False, True)
    ]
    device = cuda.device_of(torch.cuda.current_device())
    with plan.forced("persistent", units=units, batch_tile=batch_tile):
        kernels = [plan.choose(scan, device).kernel for scan in passes]
        assert kernels == [
            "persistent" if [*_plans_of(scan, device, units, batch_tile)] else "stepwise"
            for scan in passes
        ]
        large = device.shared_bytes >= 160 * 1024
        assert not large or kernels == [
            "persistent"
            if units in instances.units_of("persistent", scan.backward, CELLS[cell].gates)
            else "stepwise"
            for scan in passes
        ]
        assert_case_matches_reference(case)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_kernels_agree(case: Case) -> None:
    """Within the tolerance of each other; either can run the backward pass of the other's forward pass."""
    it, found = call(case), {}
    for forward in KERNELS:
        with plan.forced(forward):
            outputs, finals, reserve = it.forward()
        for backwards in KERNELS:
            with plan.forced(backwards):
                grads = it.backward(outputs, reserve)
            found[forward, backwards] = it.named(outputs, finals, grads)
    expected = found.pop((KERNELS[0], KERNELS[0]))
    for kernels, results in found.items():
        for name, share in errors(results, expected).items():
            assert share <= 1, f"{name} by {kernels}"


@each_layer
def test_explain(module: str) -> None:
    """It names the kernel that serves the call, or the one that is forced."""
    layer = ModuleCase(module, input_size=64, hidden_size=128, device="cuda").make(rnnkit)
    input = torch.randn(20, 8, 64, device="cuda")
    free = rnnkit.explain(layer, input).kernel
    assert free in KERNELS
    clusters = cuda.device_of(torch.cuda.current_device()).cluster_blocks > 1
    for kernel in KERNELS if clusters else [k for k in KERNELS if k != "cluster"]:
        with plan.forced(kernel):
            assert rnnkit.explain(layer, input).kernel == kernel
            with plan.forced(KERNELS[-1]):
                assert rnnkit.explain(layer, input).kernel == KERNELS[-1]
            assert rnnkit.explain(layer, input).kernel == kernel
    assert rnnkit.explain(layer, input).kernel == free


# TF32


@pytest.mark.parametrize(
    "case",
    [
        ModuleCase(
            name,
            20,
            batch,
            input_size,
            hidden,
            hx=True,
            bidirectional=True,
            device="cuda",
            off_kink=True,
        )
        for name in LAYERS
        for batch, input_size, hidden in ((3, 5, 17), (16, 64, 128), (64, 130, 650))
    ],
    ids=str,
)
def test_tf32(case: ModuleCase) -> None:
    """Where torch allows it: at most twice cuDNN's error."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    compare(case, tf32=True)


@pytest.mark.parametrize("allowed", (False, True))
@each_layer
def test_tf32_is_allowed_by_the_switch_of_torch_s_rnns(module: str, allowed: bool) -> None:
    """Whatever the switch of its matrix products says, which is left as it was."""
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = not allowed
    case = ModuleCase(module, 9, 16, 64, 128, hx=True, device="cuda", off_kink=True)
    compare(case, tf32=allowed)
    assert torch.backends.cuda.matmul.allow_tf32 is not allowed


# Determinism

REPEATED = [
    Case(cell, sizes, directions, dtype=dtype, device="cuda")
    for cell in CELLS
    for sizes in (
        (7, 3, 5, 17),
        (33, 16, 64, 128),
        (20, 64, 130, 256),
        (9, 20, 650, 650),
        (12, 33, 96, 1000),
    )
    for dtype in (*DTYPES, *[torch.float64] * (sizes[0] == 7))
    for directions in (1, 2)
]


REPEATED += [replace(case, **RESETS_AND_NOISE) for case in REPEATED if case.directions == 2]


@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_run_to_run(case: Case) -> None:
    it = call(case)
    first = it.run()
    for _ in range(19):
        again = it.run()
        different = [name for name, result in again.items() if not torch.equal(result, first[name])]
        assert not different


# Layouts

LARGER = [
    Case(cell, sizes, 2, lengths, dtype=dtype, device="cuda")
    for cell in CELLS
    for dtype in DTYPES
    for sizes, lengths in (((5, 16, 64, 128), ()), ((0, 0, 33, 200), (5, 5, 3, 1, 1)))
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("case", LARGER, ids=str)
def test_layout_changes_no_bit(case: Case, layout: Callable[[Tensor], Tensor]) -> None:
    """At sizes whose rows are loaded in whole vectors where they lie well."""
    it = call(case)
    assert_same_bits(it.map(layout).run(), it.run())
    outputs, _, reserve = it.forward()
    found = it.backward([layout(output) for output in outputs], layout(reserve))
    assert_same_bits(found, it.backward(outputs, reserve))


@each_dtype
@each_cell
def test_expanded_tensors(cell: str, dtype: torch.dtype) -> None:
    it = call(Case(cell, (5, 16, 64, 128), 2, dtype=dtype, device="cuda"))
    it = it.map(lambda t: t[:1].expand_as(t))
    assert_same_bits(it.run(), it.map(Tensor.contiguous).run())


# Streams


def late(it: Call, cycles: int = 50_000_000) -> Call:
    """The same call, with tensors that are written on the current stream, and that not at once."""
    empty = it.map(lambda t: t if t.device.type == "cpu" else torch.full_like(t, torch.nan))
    torch.cuda.synchronize()
    torch.cuda._sleep(cycles)
    for tensor, source in zip(empty.every_tensor(), it.every_tensor(), strict=True):
        tensor.copy_(source)
    return empty


@pytest.mark.parametrize("lengths", ((), (40, 30, 30, 7, 1)), ids=("dense", "ragged"))
@each_cell
def test_current_stream(cell: str, lengths: tuple[int, ...], kernel: str) -> None:
    """Work is queued behind its input on the current stream, and only that stream is waited for."""
    it = call(Case(cell, (40, 16, 64, 128), 2, lengths, device="cuda"))
    expected = it.run()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = late(it).run()
    stream.synchronize()
    assert_same_bits(found, expected)


@pytest.mark.parametrize("module", MODULES)
def test_module_on_a_stream(module: str) -> None:
    case = ModuleCase(module, 30, 8, 32, 64, hx=True, device="cuda")
    ours, _ = case.twins()
    expected = run(case, ours, case.leaves())
    ours.zero_grad()
    leaves = {name: torch.zeros_like(leaf) for name, leaf in case.leaves().items()}
    sources = case.leaves()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for name, leaf in leaves.items():
            leaf.copy_(sources[name].detach()).requires_grad_()
        found = run(case, ours, leaves)
    stream.synchronize()
    assert_same_bits(found, expected)


@each_dtype
def test_two_streams_at_once(dtype: torch.dtype, kernel: str) -> None:
    """Kernels that fill the GPU and wait for each other's blocks finish beside one another."""
    calls = [
        call(Case(cell, (100, 16, 64, hidden), d, dtype=dtype, device="cuda"), seed)
        for seed, (cell, hidden, d) in enumerate((("lstm", 512, 2), ("gru", 650, 1)))
    ]
    expected = [it.run() for it in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    found: list[list[dict[str, Tensor]]] = [[], []]
    for _ in range(10):
        for it, stream, results in zip(calls, streams, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(it.run())
    torch.cuda.synchronize()
    for results, alone in zip(found, expected, strict=True):
        for result in results:
            assert_same_bits(result, alone)


def test_two_threads_at_once() -> None:
    """Each thread has a stream of its own and queues without waiting for the other."""
    calls = [
        call(Case(cell, (60, 16, 64, 512), 2, device="cuda"), seed)
        for seed, cell in enumerate(CELLS)
    ]
    expected = [it.run() for it in calls]
    torch.cuda.synchronize()

    def repeated(it: Call) -> list[dict[str, Tensor]]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results = [it.run() for _ in range(10)]
        stream.synchronize()
        return results

    with ThreadPoolExecutor(len(calls)) as pool:
        for results, alone in zip(pool.map(repeated, calls), expected, strict=True):
            for result in results:
                assert_same_bits(result, alone)


# Graphs

GRAPHED = [
    *(dataclasses.replace(case, steps=12, batch=8, hidden_size=64).on("cuda") for case in STACKED),
    *(ModuleCase(name, batch=8, hidden_size=64, hx=True, device="cuda") for name in CELL_MODULES),
]
each_graphed = pytest.mark.parametrize("case", GRAPHED, ids=str)


def other_inputs(case: ModuleCase, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(leaf.shape, generator=generator).to(leaf)
        for name, leaf in case.leaves().items()
    }


def captured(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of what `step` queues, after a few calls of it, and what it returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@each_graphed
def test_graph_of_inference(case: ModuleCase) -> None:
    """Each replay computes on what the input's memory then holds."""
    ours, _ = case.twins()
    static = {name: leaf.detach() for name, leaf in case.leaves().items()}
    with torch.no_grad():
        graph, results = captured(lambda: named_results(case, ours(*case.arguments(static))))
        for seed in range(3):
            fresh = other_inputs(case, seed)
            expected = named_results(case, ours(*case.arguments(fresh)))
            for name, leaf in static.items():
                leaf.copy_(fresh[name])
            graph.replay()
            torch.testing.assert_close(results, expected)


@each_graphed
def test_graph_of_a_training_step(case: ModuleCase) -> None:
    """Forward and backward pass and the optimizer's step in one graph; weights as without it."""
    ours, _ = case.twins()
    initial, twin = copy.deepcopy(ours.state_dict()), copy.deepcopy(ours)
    static = {name: leaf.detach() for name, leaf in case.leaves().items()}

    def stepper(module: nn.Module, leaves: dict[str, Tensor]) -> Callable[[], Tensor]:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            results = named_results(case, module(*case.arguments(leaves)))
            loss = torch.stack([result.square().mean() for result in results.values()]).sum()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    graph, loss = captured(stepper(ours, static))
    ours.load_state_dict(initial)
    for seed in range(3):
        fresh = other_inputs(case, seed)
        for name, leaf in static.items():
            leaf.copy_(fresh[name])
        graph.replay()
        torch.testing.assert_close(loss, stepper(twin, fresh)(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)


@each_graphed
def test_make_graphed_callables(case: ModuleCase) -> None:
    case = dataclasses.replace(case, hx=False)
    ours, _ = case.twins()
    twin = copy.deepcopy(ours)
    graphed = torch.cuda.make_graphed_callables(ours, (case.leaves()["input"],))
    for seed in range(3):
        found = []
        for module in (graphed, twin):
            input = other_inputs(case, seed)["input"].requires_grad_()
            module.zero_grad()
            results = named_results(case, module(input))
            backward(results.values())
            gradients = {n: p.grad.clone() for n, p in module.named_parameters()}
            found.append({**results, **gradients, "input": input.grad.clone()})
        torch.testing.assert_close(*found)


# Devices

needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


@needs_two
@pytest.mark.parametrize("lengths", ((), (4, 3, 1)), ids=("dense", "ragged"))
@each_cell
def test_a_device_that_is_not_the_current_one(cell: str, lengths: tuple[int, ...]) -> None:
    it = call(Case(cell, (40, 16, 64, 128), 2, lengths, device="cuda:0"))
    with torch.cuda.device(0):
        expected = it.run()
        found = it.on("cuda:1").run()
        assert torch.cuda.current_device() == 0
    assert all(result.device == torch.device("cuda:1") for result in found.values())
    on_first = {name: result.to("cuda:0") for name, result in found.items()}
    assert all(share <= 1 for share in errors(on_first, expected).values())


@pytest.mark.parametrize("module", MODULES)
def test_there_and_back(module: str) -> None:
    """A module that moves computes where it is, with gradients there, and comes back as it went."""
    case = ModuleCase(module, hx=True)
    ours, _ = case.twins()
    weights = copy.deepcopy(ours.state_dict())
    expected = {name: result.clone() for name, result in run(case, ours, case.leaves()).items()}
    on_gpu = case.on("cuda")
    moved = run(on_gpu, ours.to("cuda"), on_gpu.leaves())
    assert all(result.device.type == "cuda" for result in moved.values())
    again = run(case, ours.to("cpu"), case.leaves())
    there = {name: result.cpu() for name, result in moved.items()}
    torch.testing.assert_close(there, expected, rtol=1e-4, atol=1e-5)
    assert_same_bits(again, expected)
    assert_same_bits(dict(ours.state_dict()), dict(weights))


@pytest.mark.parametrize("module", MODULES)
def test_state_dict_between_devices(module: str) -> None:
    here, there = (ModuleCase(module, device=device).make(rnnkit) for device in ("cpu", "cuda"))
    there.load_state_dict(here.state_dict())
    assert all(weight.is_cuda for weight in there.state_dict().values())
    other = ModuleCase(module).make(rnnkit)
    other.load_state_dict(there.state_dict())
    assert_same_bits(dict(other.state_dict()), dict(here.state_dict()))


@pytest.mark.parametrize("what", ("input", "hx", "cx", "weight", "module"))
@pytest.mark.parametrize("module", MODULES)
def test_tensors_on_different_devices(module: str, what: str) -> None:
    """Refused with torch.nn's type of exception, naming both devices."""
    case = ModuleCase(module, hx=True, device="cuda")
    if what == "cx" and "lstm" not in module:
        pytest.skip("it has one state")
    for index, twin in enumerate(case.twins()):
        leaves = {name: leaf.detach() for name, leaf in case.leaves().items()}
        if what in leaves:
            leaves[what] = leaves[what].cpu()
        elif what == "module":
            twin.cpu()
        else:
            name = next(name for name, _ in twin.named_parameters() if "weight_hh" in name)
            setattr(twin, name, nn.Parameter(getattr(twin, name).cpu()))
        text = "not at the same device.*(cuda.*cpu|cpu.*cuda)" if index == 0 else ""
        with pytest.raises(RuntimeError, match=text):
            twin(*case.arguments(leaves))


# Modes


@pytest.mark.parametrize("low", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("module", MODULES)
def test_autocast(module: str, low: torch.dtype) -> None:
    """Numbers within the low dtype's tolerance, gradients in the parameters' float32."""
    case = ModuleCase(module, 12, 8, 32, 64, hx=True, dtype=low, device="cuda")
    twins = [twin.float() for twin in case.twins()]
    on_cpu = case.on("cpu")
    exact = copy.deepcopy(twins[1]).to("cpu", torch.float64)
    truth = run(on_cpu, exact, on_cpu.leaves(torch.float64))
    with torch.autocast("cuda", dtype=low):
        actual, expected = (run(case, twin, case.leaves(torch.float32)) for twin in twins)
    for name, result in actual.items():
        gradient = name.startswith("grad")
        assert result.dtype == torch.float32 if gradient else result.dtype in (low, torch.float32)
        assert_close_to_truth(
            result.to(low), expected[name].to(low), truth[name], gradient=gradient, name=name
        )


@pytest.mark.slow
def test_compiled() -> None:
    """By the default compiler, which generates code for the GPU around the layer's op."""
    torch.compiler.reset()
    case = ModuleCase("lstm", 12, 8, 32, 64, num_layers=2, bidirectional=True, device="cuda")
    ours, _ = case.twins()
    expected = run(case, ours, case.leaves())
    actual = run(case, torch.compile(ours, fullgraph=True), case.leaves())
    actual = {name.replace("_orig_mod.", ""): result for name, result in actual.items()}
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# Sizes past limits


@pytest.mark.slow
@each_cell
def test_more_steps_than_cudnn_takes(cell: str, kernel: str) -> None:
    it = call(Case(cell, (70_000, 2, 8, 32), device="cuda"))
    truth = it.to(torch.float64).run()  # step by step, which other tests hold against the reference
    for name, result in it.run().items():
        bound = 1e-4 if name.startswith("grad") else 1e-5
        assert relative_error(result, truth[name]) < bound, name


def chunks(it: Call, steps: int) -> list[Call]:
    """The call cut into calls of so many steps; each one's states are what the one before it returned."""
    found = []
    states = it.states
    for start in range(0, it.input.size(0), steps):
        part = slice(start, start + steps)
        chunk = replace(it, input=it.input[part], states=states, grads=[it.grads[0][part]])
        found.append(chunk)
        states = chunk.forward(Keep.NOTHING)[1]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("hidden", (1024, 2048))  # persistent and, for the LSTM, stepwise
@pytest.mark.parametrize("cell", ("lstm", "gru"))
def test_more_elements_than_32_bits_count(cell: str, hidden: int) -> None:
    """Against the same sequence in parts that are small enough, states and gradients carried between them."""
    free, _ = torch.cuda.mem_get_info()
    if free < 45 * 2**30:
        pytest.skip(f"needs 45 GiB of GPU memory, {free / 2**30:.0f} are free")
    steps, batch = 2200 * 4 * 2048 // (CELLS[cell].gates * hidden), 128
    it = call(Case(cell, (1, batch, 64, hidden), dtype=torch.bfloat16, device="cuda"))
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    input = torch.randn(steps, batch, 64, **options)
    it = replace(it, input=input, grads=[torch.randn(steps, batch, hidden, **options)])
    assert steps * batch * CELLS[cell].gates * hidden > 2**31
    it = replace(it, grads=[it.grads[0], *[None] * CELLS[cell].states])
    outputs, _, reserve = it.forward()
    grads = dict(zip(it.gradient_names(), it.backward(outputs, reserve), strict=True))
    del reserve
    part = steps // 4
    parts = chunks(it, part)
    carried: list[Tensor | None] = [None] * CELLS[cell].states
    sums: dict[str, Tensor] = {}
    for index, chunk in reversed(list(enumerate(parts))):
        chunk = replace(chunk, grads=[*chunk.grads[:1], *carried])
        place = slice(index * part, index * part + chunk.input.size(0))
        (expected,), _, reserve = chunk.forward()
        assert relative_error(outputs[0][place], expected) < FORWARD[torch.bfloat16]
        found = dict(zip(it.gradient_names(), chunk.backward([expected], reserve), strict=True))
        error = relative_error(grads["grad input"][place], found.pop("grad input"))
        assert error < GRADIENT[torch.bfloat16]
        carried = [found.pop(name) for name in ("grad h_0", "grad c_0")[: len(carried)]]
        for name, grad in found.items():
            sums[name] = sums.get(name, 0) + grad.float()
        del reserve
    for name, grad in sums.items():
        assert relative_error(grads[name], grad) < GRADIENT[torch.bfloat16], name


# For compute-sanitizer, under which all else takes long: pytest -k sanitize


@pytest.mark.parametrize("options", ({}, RESETS_AND_NOISE), ids=("plain", "noisy"))
@pytest.mark.parametrize("hidden", (20, 33))
@each_dtype
@each_cell
def test_sanitize(cell: str, dtype: torch.dtype, hidden: int, options: dict, kernel: str) -> None:
    """Both passes, ragged, in both directions; what is compared is compared on the CPU."""
    case = Case(cell, (3, 5, 7, hidden), 2, (3, 3, 2, 1, 1), dtype=dtype, off_kink=True)
    it = call(replace(case, **options))
    results = {name: result.cpu() for name, result in it.on("cuda").run().items()}
    truth = it.to(torch.float64).reference()
    for name, share in errors(results, truth).items():
        assert share <= 1, name
