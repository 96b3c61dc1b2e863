"""What every test runs under: poisoned memory, a fixed seed, each backend that is there."""

import os
from collections.abc import Iterator

# Read by OpenMP as torch loads it. Threads that wait by spinning make torch.nn a hundred times slower
# while anything else runs on the machine, such as other tests.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, torch sees none"))


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


@pytest.fixture(params=AVAILABLE_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once on each backend that is available here."""
    with rnnkit.backend(request.param):
        yield request.param
