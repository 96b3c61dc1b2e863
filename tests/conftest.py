"""What every test runs under: poisoned memory, a fixed seed, each device and backend that is there."""

import os
from collections.abc import Iterator
from pathlib import Path

# Read by OpenMP as torch loads it. Threads that wait by spinning make torch.nn a hundred times slower
# while anything else runs on the machine, such as other tests.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Each of several workers (pytest -n) gets its share of the processors.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // workers, 1)))
# Cells of one's own that tests compile are not the user's.
os.environ.setdefault("RNNKIT_CACHE", str(Path(__file__).parents[1] / "build/cells"))
# Without it cuBLAS is not deterministic, and torch warns of that in its deterministic mode.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import hypothesis
import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which must be known before triton is loaded.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from devices import DEVICES

import rnnkit
from rnnkit import backends

AVAILABLE_BACKENDS = [name for name in backends.BACKENDS if not backends.unavailable(name)]

for _profile, _options in {
    "rnnkit": {"derandomize": True, "max_examples": 60},
    # `pytest --hypothesis-profile=thorough` looks where no run has looked before.
    "thorough": {"max_examples": 1000},
}.items():
    hypothesis.settings.register_profile(
        _profile,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        **_options,
    )
hypothesis.settings.load_profile("rnnkit")


def pytest_report_header() -> list[str]:
    absent = [
        f"no {n}: {backends.unavailable(n)}" for n in backends.BACKENDS if backends.unavailable(n)
    ]
    return [f"torch {torch.__version__}, rnnkit backends: {', '.join(AVAILABLE_BACKENDS + absent)}"]


def _no_gpu() -> str:
    """Why tests cannot run on a GPU here; empty when they can."""
    if not torch.cuda.is_available():
        return "needs a CUDA GPU, torch sees none"
    if backends.CUDA_REASON and backends.TRITON_REASON:
        return f"no CUDA kernels: {backends.CUDA_REASON}; {backends.TRITON_REASON}"
    return ""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--one-in",
        type=int,
        default=0,
        metavar="N",
        help="run one in N of each test's cases; by default all, but one in 3 of tests marked `thinned`",
    )


def _left_out(config: pytest.Config, items: list[pytest.Item]) -> list[pytest.Item]:
    """What --one-in leaves out."""
    of_test: dict[tuple[Path, str], int] = {}
    found = []
    for item in items:
        thinned = item.get_closest_marker("thinned") and not item.get_closest_marker("gpu")
        test = item.path, getattr(item, "originalname", item.name)
        of_test[test] = of_test.get(test, -1) + 1
        if of_test[test] % (config.getoption("one_in") or (3 if thinned else 1)) != 0:
            found.append(item)
    return found


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """GPU tests run where there is a GPU, and on rnnkit's kernels alone: the reference is as on the CPU.

    Triton's kernels are for a GPU only. Of thinned tests some cases run, see --one-in.
    """
    gpu = [item for item in items if item.get_closest_marker("gpu")]

    def backend_of(item: pytest.Item) -> str:
        return item.callspec.params.get("backend", "") if hasattr(item, "callspec") else ""

    doubled = {item for item in gpu if backend_of(item) == "reference"}
    doubled |= {item for item in items if backend_of(item) == "triton"} - set(gpu)

    def leave_out(left: set[pytest.Item]) -> None:
        if left:
            config.hook.pytest_deselected(items=list(left))
            items[:] = [item for item in items if item not in left]

    leave_out(doubled)
    leave_out(set(_left_out(config, items)))
    if reason := _no_gpu():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fills what `at::empty` and its Python kin allocate with NaN, so that no kernel reads it unwritten.

    torch does so in its deterministic mode, for Python and C++ alike (not for `at::detail::empty_cpu`).
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = before[2]


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def true_float32() -> Iterator[None]:
    """On a GPU float32 is multiplied as such, not as TF32, by torch.nn and by rnnkit."""
    switches = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield
    for switch, allowed in zip(switches, before, strict=True):
        switch.allow_tf32 = allowed


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """The test runs on the CPU and, where there is one, on a GPU."""
    return request.param


@pytest.fixture(params=AVAILABLE_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once on each backend that is available here."""
    with rnnkit.backend(request.param):
        yield request.param
