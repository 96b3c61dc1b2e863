"""Every kind of write to a weight is seen by the next call, whether kernels pack weights or read them as they lie."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from configurations import LAYERS, MODULES, Case, backward, named_results
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

#: Long and broad enough for weights to be packed; a single row, for which they never are.
SIZES = ({"steps": 20, "batch": 6}, {"steps": 1, "batch": 1})
HIDDEN = 20

Call = Callable[..., Any]


def _halve(module: nn.Module, write: Callable[[Tensor], Any]) -> nn.Module:
    for weight in module.parameters():
        write(weight)
    return module


def _halve_in_place(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        return _halve(module, lambda weight: weight.mul_(0.5))


def _halve_data(module: nn.Module) -> nn.Module:
    return _halve(module, lambda weight: weight.data.copy_(weight.data * 0.5))


def _halve_by_numpy(module: nn.Module) -> nn.Module:
    def write(weight: Tensor) -> None:
        weight.detach().numpy()[...] = weight.detach().numpy() * 0.5

    return _halve(module, write)


def _other_data(module: nn.Module) -> nn.Module:
    for weight in module.parameters():
        weight.data = weight.data * 0.5
    return module


def _new_parameters(module: nn.Module) -> nn.Module:
    for name, weight in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(weight.detach() * 0.5))
    return module


def _step(module: nn.Module) -> nn.Module:
    for weight in module.parameters():
        weight.grad = weight.detach().clone()
    torch.optim.SGD(module.parameters(), lr=0.5).step()
    module.zero_grad()
    return module


def _load(module: nn.Module) -> nn.Module:
    module.load_state_dict({name: weight / 2 for name, weight in module.state_dict().items()})
    return module


def _functional(module: nn.Module) -> Call:
    halves = {name: (w.detach() / 2).requires_grad_() for name, w in module.named_parameters()}
    return lambda *args: torch.func.functional_call(module, halves, args)


class _Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def _parametrized(module: nn.Module) -> nn.Module:
    for name, _ in list(module.named_parameters()):
        parametrize.register_parametrization(module, name, _Halved())
    return module


def _cached(module: nn.Module) -> Call:
    """As for an inference of many steps: the parametrization's value is computed once."""

    def call(*args: Any) -> Any:
        with parametrize.cached():
            module(*args)
            return module(*args)

    _parametrized(module)
    return call


WRITES: dict[str, Callable[[nn.Module], Call]] = {
    "optimizer": _step,
    "load_state_dict": _load,
    "in place": _halve_in_place,
    "data.copy_": _halve_data,
    "data = other": _other_data,
    "numpy": _halve_by_numpy,
    "new Parameter": _new_parameters,
    "functional_call": _functional,
    "parametrize": _parametrized,
    "parametrize, cached": _cached,
}


def results_of(case: Case, call: Call, training: bool) -> dict[str, Tensor]:
    """Results and, in training, the input's and states' gradients, which read the weights, too."""
    leaves = case.leaves()
    with torch.set_grad_enabled(training):
        results = named_results(case, call(*case.arguments(leaves)))
    if not training:
        return results
    backward(results.values())
    gradients = {f"grad {name}": leaf.grad for name, leaf in leaves.items()}
    return {name: result.detach() for name, result in results.items()} | gradients


def assert_written(
    actual: dict[str, Tensor], expected: dict[str, Tensor], before: dict[str, Tensor]
) -> None:
    assert actual.keys() == expected.keys()
    for name, result in actual.items():
        torch.testing.assert_close(result, expected[name], rtol=1e-4, atol=2e-5, msg=name)
        assert not torch.allclose(result, before[name], rtol=1e-3, atol=1e-3), name


in_either_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])


def cases_of(module: str, backend: str, **fields: Any) -> list[Case]:
    """One with each of `SIZES`, of which the reference, which packs nothing, needs but one."""
    sizes_of = SIZES if backend == "cpp" else SIZES[1:]
    return [Case(module, hidden_size=HIDDEN, hx=True, **fields, **sizes) for sizes in sizes_of]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("module", MODULES)
@in_either_mode
def test_a_write_is_seen(
    backend: str, device: str, module: str, training: bool, write: str
) -> None:
    if device != "cpu" and write == "numpy":
        pytest.skip("only the CPU's memory is written so")
    for case in cases_of(module, backend, device=device):
        ours, theirs = case.twins()
        before = results_of(case, ours, training)
        call = WRITES[write](ours)
        expected = results_of(case, _halve_in_place(theirs), training)
        assert_written(results_of(case, call, training), expected, before)


@pytest.mark.parametrize(
    ("module", "proj_size"), [*((module, 0) for module in LAYERS), ("lstm", 4)]
)
@in_either_mode
def test_a_write_to_one_weight_is_seen(
    backend: str, device: str, module: str, proj_size: int, training: bool
) -> None:
    """Each weight alone, of every layer and direction."""
    stack = {"num_layers": 2, "bidirectional": True, "proj_size": proj_size, "device": device}
    for case in cases_of(module, backend, **stack):
        ours, theirs = case.twins()
        results = results_of(case, ours, training)
        for name, weight in ours.named_parameters():
            before = results
            for written in (weight, getattr(theirs, name)):
                written.data.mul_(-0.5)
            results, expected = (results_of(case, twin, training) for twin in (ours, theirs))
            torch.testing.assert_close(results, expected, rtol=1e-4, atol=2e-5, msg=name)
            assert any(not torch.equal(results[key], before[key]) for key in results), name


@pytest.mark.parametrize("module", MODULES)
@in_either_mode
def test_a_write_to_a_weight_s_norm_is_seen(
    backend: str, device: str, module: str, training: bool
) -> None:
    """weight_norm: the weight is computed at every call, here from a norm that was halved."""
    for case in cases_of(module, backend, device=device):
        ours, theirs = case.twins()
        results = []
        for twin in (ours, theirs):
            name = next(n for n, _ in twin.named_parameters() if n.startswith("weight_hh"))
            parametrizations.weight_norm(twin, name)
            before = results_of(case, twin, training)
            with torch.no_grad():
                getattr(twin.parametrizations, name).original0.mul_(0.5)
            results.append(results_of(case, twin, training))
        assert_written(*results, before)


# Another process writes while this one has the module

SHARED = 4096  # floats, as many as any case's weights need

#: Halves the weights in a file for each line of its standard input, and says so.
WRITER = """
    import sys, torch
    weights = torch.from_file(sys.argv[1], shared=True, size=int(sys.argv[2]))
    for line in sys.stdin:
        weights.mul_(0.5)
        print("written", flush=True)
"""


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A file of `SHARED` floats, and a function that has another process halve them all."""
    path = tmp_path_factory.mktemp("shared") / "weights"
    torch.from_file(str(path), shared=True, size=SHARED).fill_(1)
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path), str(SHARED)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None

        def halve() -> None:
            process.stdin.write("halve\n")
            process.stdin.flush()
            assert process.stdout.readline() == "written\n"

        yield path, halve
        process.stdin.close()


@pytest.mark.parametrize("module", MODULES)
@in_either_mode
def test_a_write_by_another_process_is_seen(
    backend: str, module: str, training: bool, writer: tuple[Path, Callable[[], None]]
) -> None:
    """Weights in memory that both processes have mapped: nothing in this one tells of the write."""
    path, halve = writer
    shared = torch.from_file(str(path), shared=True, size=SHARED)
    for case in cases_of(module, backend):
        ours, theirs = case.twins()
        taken = 0
        for weight in ours.parameters():
            place = shared[taken : taken + weight.numel()].view_as(weight)
            weight.data = place.copy_(weight.data)
            taken += weight.numel()
        for _ in range(2):
            before = results_of(case, ours, training)
            halve()
            actual = results_of(case, ours, training)
            expected = results_of(case, _halve_in_place(theirs), training)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)
            assert all(not torch.equal(actual[name], before[name]) for name in actual)
