"""Under autocast, without gradients, from several threads and processes; and with weights that just changed."""

import copy
import dataclasses
import itertools
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from configurations import CELLS, LAYERS, MODULES, Case, backward, named_results, run
from tolerances import assert_close_to_truth
from torch import Tensor, multiprocessing, nn
from torch.utils.data import DataLoader, Dataset

import rnnkit

# Autocast

LOW = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *LOW)
LSTM_CASES = [
    *(Case("lstm", steps=2, lengths=lengths) for lengths in (None, (2, 1, 1))),
    *(Case("lstm", steps=2, proj_size=2, lengths=lengths) for lengths in (None, (2, 1, 1))),
    Case("lstm", steps=2, num_layers=2, bidirectional=True),
    Case("lstm", steps=2, batch=0),
]
AUTOCAST_CASES = [
    *LSTM_CASES,
    *(
        case
        for name in LAYERS
        if name != "lstm"
        for case in (
            Case(name, steps=2),
            Case(name, steps=2, lengths=(2, 1, 1)),
            Case(name, steps=2, num_layers=2, bidirectional=True),
        )
    ),
    *(Case(name) for name in CELLS),
]


def _autocast(
    case: Case, module: nn.Module, low: torch.dtype, dtypes: dict[str, torch.dtype]
) -> Any:
    """Results, or the error, of a call with input and states in `dtypes`."""
    leaves = {name: leaf.to(dtypes[name]) for name, leaf in case.leaves().items()}
    arguments = case.arguments(leaves)
    try:
        with torch.autocast("cpu", dtype=low):
            return named_results(case, module(*arguments))
    except (RuntimeError, ValueError) as error:
        return error


def _onednn_lacks(error: Any) -> bool:
    """Whether torch.nn failed for oneDNN has no LSTM in the low dtype, on this machine or with gradients."""
    return "could not create a primitive" in str(error)


def _assert_torch_s_dtypes(case: Case, low: torch.dtype) -> None:
    """For each dtype of weights, input and states; what fails inside torch.nn works here.

    But float64 input, which autocast leaves alone, needs everything else in float64.
    """
    states = ("hx", "cx") if "lstm" in case.module else ("hx",)
    for weights in DTYPES:
        ours, theirs = (module.to(weights) for module in case.twins())
        for input, *hx in [(d,) for d in DTYPES] + list(
            itertools.product(DTYPES, repeat=1 + len(states))
        ):
            given = dataclasses.replace(case, hx=bool(hx))
            dtypes = {"input": input, **dict(zip(states, hx, strict=False))}
            actual, expected = (_autocast(given, m, low, dtypes) for m in (ours, theirs))
            where = f"weights {weights}, {dtypes}"
            if input == torch.float64 and {weights, *hx} - {torch.float64}:
                assert isinstance(actual, RuntimeError), where
                assert "not the same dtype" in str(actual), where
                continue
            assert isinstance(actual, dict), f"{where}: {actual}"
            found = {name: result.dtype for name, result in actual.items()}
            if isinstance(expected, dict):
                assert found == {name: result.dtype for name, result in expected.items()}, where
            elif _onednn_lacks(expected):  # where oneDNN has it, its results are in the low dtype
                assert set(found.values()) == {low}, where
            assert all(result.isfinite().all() for result in actual.values()), where


@pytest.mark.parametrize("gradients", (False, True))
@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("case", AUTOCAST_CASES, ids=str)
def test_autocast_returns_torch_s_dtypes(
    backend: str, case: Case, low: torch.dtype, gradients: bool
) -> None:
    with torch.set_grad_enabled(gradients):
        _assert_torch_s_dtypes(case, low)


@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("case", LSTM_CASES, ids=str)
def test_autocast_returns_torch_s_dtypes_without_onednn(
    monkeypatch: pytest.MonkeyPatch, case: Case, low: torch.dtype
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    _assert_torch_s_dtypes(case, low)


@pytest.mark.parametrize("case", AUTOCAST_CASES, ids=str)
def test_autocast_results_and_gradients(
    monkeypatch: pytest.MonkeyPatch, backend: str, case: Case
) -> None:
    """Numbers within bfloat16's tolerance; gradients in the parameters' float32."""
    case = dataclasses.replace(case, hx=True, dtype=torch.bfloat16)
    twins = [module.float() for module in case.twins()]
    truth = run(case, copy.deepcopy(twins[1]).double(), case.leaves(torch.float64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(case, twins[0], case.leaves(torch.float32))
        try:
            expected = run(case, twins[1], case.leaves(torch.float32))
        except RuntimeError as error:
            assert _onednn_lacks(error)
            monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
            expected = run(case, twins[1], case.leaves(torch.float32))
            results = [name for name in expected if "grad" not in name]
            expected |= {name: expected[name].to(torch.bfloat16) for name in results}
    for name, result in actual.items():
        assert result.dtype == expected[name].dtype, name
        low, their_low = (r.to(torch.bfloat16) for r in (result, expected[name]))
        assert_close_to_truth(low, their_low, truth[name], gradient="grad" in name, name=name)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ("AVX2", "AVX512_CORE"))
def test_autocast_on_other_cpus(isa: str) -> None:
    """The tests of LSTMs above where oneDNN has none in bfloat16 and float16, or none in float16."""
    tests = "(autocast_returns or autocast_results) and lstm and not cell"
    options = ["-q", "-p", "no:cacheprovider", "-m", "not gpu"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, __file__, "-k", tests],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "passed" in done.stdout.splitlines()[-1]


# Gradient modes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("module", MODULES)
def test_results_are_the_same_in_every_mode(
    backend: str, device: str, module: str, mode: Any
) -> None:
    case = Case(module, hx=True, device=device)
    ours, _ = case.twins()
    expected = named_results(case, ours(*case.arguments(case.leaves())))
    with mode():
        results = named_results(case, ours(*case.arguments(case.leaves())))
    for name, result in results.items():
        assert torch.equal(result, expected[name])
        assert result.requires_grad == (mode is torch.enable_grad)
        assert result.is_inference() == (mode is torch.inference_mode)


def _are_inference(case: Case, module: nn.Module, leaves: dict[str, Tensor]) -> list[bool] | None:
    """Of each result, whether it is an inference tensor; None if the call is refused."""
    try:
        results = named_results(case, module(*case.arguments(leaves)))
    except RuntimeError as error:
        assert "Inference tensors" in str(error)
        return None
    return [result.is_inference() for result in results.values()]


@pytest.mark.parametrize("module", MODULES)
def test_inference_tensors_may_go_where_they_may_in_torch(backend: str, module: str) -> None:
    """A module built, or an input made, under inference mode, and called in any mode."""
    case = Case(module, hx=True)
    flags: list[list[Any]] = []
    for twin in case.twins():
        with torch.inference_mode():
            built = copy.deepcopy(twin).eval()
            made = {name: leaf.detach().clone() for name, leaf in case.leaves().items()}
        usual = {name: leaf.detach() for name, leaf in case.leaves().items()}
        flags.append([])
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
            with mode():
                for called, leaves in itertools.product((built, twin), (made, usual)):
                    flags[-1].append(_are_inference(case, called, leaves))
    for ours, theirs in zip(*flags, strict=True):
        # The reference is made of torch's own ops, of which some refuse what oneDNN's one op takes.
        refused = ours is None and backend == "reference"
        assert theirs is None or refused or ours == theirs


@pytest.mark.parametrize("module", MODULES)
def test_backward_in_eval_mode(backend: str, device: str, module: str) -> None:
    case = Case(module, hx=True, num_layers=2 if module in LAYERS else 1, device=device)
    ours, _ = case.twins()
    expected = run(case, ours, case.leaves())
    for name, result in run(case, ours.eval(), case.leaves()).items():
        assert torch.equal(result, expected[name]), name


# Threads and processes


@pytest.mark.parametrize("shared", [True, False], ids=["one module", "a module each"])
@pytest.mark.parametrize("module", MODULES)
def test_threads(backend: str, device: str, module: str, shared: bool) -> None:
    """Calls at the same time give the bits that they give alone."""
    case = Case(module, steps=20, batch=8, hidden_size=40, hx=True, device=device)
    modules = [case.twins()[0]] * 4 if shared else [case.twins()[0] for _ in range(4)]

    def results_and_gradients(index: int) -> list[Tensor]:
        with rnnkit.backend(backend):
            leaves = {
                n: (leaf * (index + 1)).detach().requires_grad_()
                for n, leaf in case.leaves().items()
            }
            results = list(named_results(case, modules[index](*case.arguments(leaves))).values())
            wanted = [*leaves.values(), *modules[index].parameters()]
            total = sum(result.sum() for result in results)
            return [*results, *torch.autograd.grad(total, wanted)]

    alone = [results_and_gradients(index) for index in range(4)]
    start = threading.Barrier(4)

    def repeated(index: int) -> list[list[Tensor]]:
        start.wait()
        return [results_and_gradients(index) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        for expected, runs in zip(alone, pool.map(repeated, range(4)), strict=True):
            for tensors in runs:
                assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


@pytest.mark.parametrize("module", MODULES)
def test_backward_on_another_thread(backend: str, device: str, module: str) -> None:
    case = Case(module, hx=True, device=device)
    ours, _ = case.twins()
    expected = run(case, ours, case.leaves())
    ours.zero_grad()
    results = named_results(case, ours(*case.arguments(case.leaves())))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(backward, results.values()).result(60)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter.grad, expected[f"grad {name}"]), name


class InWorkers(Dataset):
    """Item i: results and gradients of the i-th case, computed where the item is asked for."""

    cases = tuple(Case(name, steps=20, batch=16, hidden_size=128, hx=True) for name in MODULES)

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.modules = [case.twins()[0] for case in self.cases]

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        with rnnkit.backend(self.backend):
            case = self.cases[index]
            return run(case, self.modules[index], case.leaves())


def compare_with_workers(backend: str, start: str) -> None:
    torch.set_num_threads(2)
    items = InWorkers(backend)
    here = [items[index] for index in range(len(items))]
    loader = DataLoader(
        items, batch_size=None, num_workers=1, multiprocessing_context=start, timeout=120
    )
    for there, expected in zip(loader, here, strict=True):
        for name, result in there.items():
            torch.testing.assert_close(result, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_worker_processes(backend: str, start: str) -> None:
    """As a DataLoader's, begun after this process has used its threads.

    In a fresh process: what other tests have begun in this one may be what autograd does not take through a fork.
    """
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_modes
        test_modes.compare_with_workers({backend!r}, {start!r})
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=300)


# A changed weight is used by the next call


def _halve_data(module: nn.Module) -> None:
    for weight in module.parameters():
        weight.data.mul_(0.5)


def _new_data(module: nn.Module) -> None:
    for weight in module.parameters():
        weight.data = weight.data * 0.5


def _through_numpy(module: nn.Module) -> None:
    for weight in module.parameters():
        weight.detach().numpy()[...] *= 0.5


def _through_a_view(module: nn.Module) -> None:
    for weight in module.parameters():
        torch.as_strided(weight.detach(), (weight.numel(),), (1,)).data.mul_(0.5)


def _optimizer_step(module: nn.Module, **options: Any) -> None:
    for weight in module.parameters():
        weight.grad = weight.detach().clone()
    torch.optim.SGD(module.parameters(), lr=0.5, **options).step()


def _in_inference_mode(module: nn.Module) -> None:
    with torch.inference_mode():
        for weight in module.parameters():
            weight.mul_(0.5)


def _in_another_process(module: nn.Module, start: str) -> None:
    module.share_memory()
    child = multiprocessing.get_context(start).Process(target=_halve_data, args=(module,))
    child.start()
    child.join(120)
    assert child.exitcode == 0


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "load_state_dict": lambda m: m.load_state_dict({n: w / 2 for n, w in m.state_dict().items()}),
    "assign": lambda m: m.load_state_dict(
        {n: w / 2 for n, w in m.state_dict().items()}, assign=True
    ),
    "write to .data": _halve_data,
    "new .data": _new_data,
    "numpy": _through_numpy,
    "view": _through_a_view,
    "optimizer": lambda m: _optimizer_step(m, foreach=False),
    "foreach optimizer": lambda m: _optimizer_step(m, foreach=True),
    "fused optimizer": lambda m: _optimizer_step(m, fused=True),
    "inference mode": _in_inference_mode,
    "another process": lambda m: _in_another_process(m, "fork"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_changed_weight_is_used_by_the_next_call(
    backend: str, device: str, module: str, change: str, training: bool
) -> None:
    """Also where no version counter tells: by .data, by numpy, by another process."""
    if device != "cpu" and change in ("numpy", "another process"):
        pytest.skip("only the CPU's memory is written so")
    case = Case(module, hx=True, device=device)
    ours, _ = case.twins()
    ours.train(training)
    fresh = case.make(rnnkit)
    fresh.load_state_dict({name: weight / 2 for name, weight in ours.state_dict().items()})
    arguments = case.arguments(case.leaves())
    with torch.set_grad_enabled(training):
        expected = named_results(case, fresh(*arguments))
        for _ in range(2):
            before = named_results(case, ours(*arguments))
        CHANGES[change](ours)
        after = named_results(case, ours(*arguments))
    for name, result in after.items():
        assert torch.equal(result, expected[name])
        assert not torch.equal(result, before[name])


def test_weights_shared_with_a_spawned_process(backend: str) -> None:
    case = Case("lstm", hx=True)
    ours, _ = case.twins()
    before = run(case, ours, case.leaves())["output"]
    _in_another_process(ours, "spawn")
    after = run(case, ours, case.leaves())["output"]
    _optimizer_step(ours)
    assert not torch.equal(after, before)
    assert not torch.equal(run(case, ours, case.leaves())["output"], after)


# torch.fx


class Tagger(torch.nn.Module):
    """A layer with and without states, and a cell."""

    def __init__(self, package: Any) -> None:
        super().__init__()
        self.layer, self.cell = package.LSTM(3, 4), package.GRUCell(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        output, states = self.layer(x)
        again, _ = self.layer(x, states)
        return self.cell(output[-1] + again[0])


def test_traced_by_fx_as_torch_s_layers_are() -> None:
    graphs = []
    for package in (torch.nn, rnnkit):
        torch.manual_seed(0)
        model = Tagger(package)
        traced = torch.fx.symbolic_trace(model)
        graphs.append([(node.op, node.target) for node in traced.graph.nodes])
        x = torch.randn(5, 2, 3)
        torch.testing.assert_close(traced(x), model(x), rtol=0, atol=0)
    assert graphs[0] == graphs[1]
    assert ("call_module", "layer") in graphs[1] and ("call_module", "cell") in graphs[1]
