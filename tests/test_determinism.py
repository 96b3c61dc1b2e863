"""The same bits for any number of threads, from run to run, and beside other calls."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from kernel_cases import Case, assert_case_matches_reference, assert_same_bits, call

from rnnkit import backends
from rnnkit.call import Keep
from rnnkit.specs import CELLS

pytestmark = pytest.mark.skipif(
    backends.EXTENSION is None, reason=f"no C++ kernels: {backends.EXTENSION_REASON}"
)

#: Sizes that threads share in every way there is, all with work enough for several: not at all; hidden units,
#: meeting after each step, with weights packed and read as they lie; rows of the batch, many and few; directions,
#: alone and with either of these; more rows than a block; uneven lengths, where a thread's rows end early, and are
#: shared anew for each chunk.
SHARED = (
    {"sizes": (200, 1, 3, 64)},
    {"sizes": (40, 3, 30, 260)},
    {"sizes": (12, 3, 70, 260)},
    {"sizes": (6, 50, 33, 65)},
    {"sizes": (60, 7, 20, 40)},
    {"sizes": (2, 260, 3, 40)},
    {"sizes": (1, 7, 300, 260)},
    {"sizes": (12, 3, 17, 200), "directions": 2},
    {"sizes": (12, 17, 5, 64), "directions": 2, "bias": False, "states": False},
    {"sizes": (0, 0, 20, 260), "lengths": (9, 9, 4, 1)},
    {"sizes": (0, 0, 20, 130), "lengths": (30,) + (1,) * 40},
    {"sizes": (0, 0, 20, 130), "lengths": (30,) + (1,) * 40, "directions": 2},
    {"sizes": (0, 0, 9, 40), "lengths": tuple(range(60, 0, -1)), "directions": 2},
)
PROJECTED = (
    {"sizes": (12, 3, 20, 200), "projected": 130},
    {"sizes": (6, 40, 20, 65), "projected": 17, "directions": 2},
    {"sizes": (0, 0, 20, 130), "projected": 33, "lengths": (30, 9, 4, 1)},
)
CASES = [
    Case(cell, dtype=dtype, **options)
    for dtype in (torch.float32, torch.float64, torch.bfloat16)
    for cell in CELLS
    for options in SHARED + PROJECTED * CELLS[cell].projects
]
on_cases = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@on_cases
def test_any_number_of_threads(case: Case) -> None:
    it = call(case)
    torch.set_num_threads(1)
    assert_case_matches_reference(case)
    alone, recomputed = it.run(), it.run(Keep.STATES)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert_same_bits(it.run(), alone)
        assert_same_bits(it.run(Keep.STATES), recomputed)


@on_cases
def test_run_to_run(case: Case) -> None:
    it = call(case)
    torch.set_num_threads(2)
    first = it.run()
    for _ in range(5):
        assert_same_bits(it.run(), first)


@pytest.mark.parametrize("cell", CELLS)
def test_beside_other_calls(cell: str) -> None:
    """Calls at the same time from several Python threads share nothing."""
    calls = [call(Case(cell, (6, 2 + n, 20, 100 + n), 1 + n % 2), seed=n) for n in range(6)]
    alone = [it.run() for it in calls]
    with ThreadPoolExecutor(4) as pool:
        for results, expected in zip(
            pool.map(lambda it: it.run(), calls * 4), alone * 4, strict=True
        ):
            assert_same_bits(results, expected)


def digest() -> str:
    """Of every result of every case, to compare processes by."""
    found = hashlib.sha256()
    for case in CASES:
        for result in call(case).run().values():
            found.update(result.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def test_omp_num_threads() -> None:
    """The same in processes that start with another number of threads."""
    torch.set_num_threads(2)
    for threads in ("1", "3"):
        run = subprocess.run(
            [sys.executable, "-c", "import test_determinism; print(test_determinism.digest())"],
            env={
                **os.environ,
                "OMP_NUM_THREADS": threads,
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
            },
            capture_output=True,
            text=True,
        )
        assert run.stdout.strip() == digest(), run.stderr[-4000:]
