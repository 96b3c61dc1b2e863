"""What Triton makes of the kernels, without a GPU: that each compiles, its registers, spills and shared memory."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from rnnkit import Cell, library
from rnnkit.specs import CELLS

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.timeout(600),
]

#: Bytes that a thread of any kernel may spill: a few in the largest tiles; twice as many where h is masked, and
#: with layer normalization.
SPILLED = 144


def builds(target: tuple[str, ...]) -> list[dict]:
    """Every kernel of `triton_builds.cases`."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), *sys.path])
    run = subprocess.run(
        [sys.executable, str(HERE / "triton_builds.py"), *target],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize(
    "target", [("cuda", "90", "3"), ("hip", "gfx942", "3"), ("hip", "gfx90a", "3")], ids="-".join
)
def test_every_kernel_compiles(target: tuple[str, ...]) -> None:
    """Both passes of every cell with both plans: on matrix units, with a barrier between two steps.

    The compiler sees no integer argument other than the model's sizes, so that a new T or N compiles nothing. Of
    printed cells a third of the cases is compiled; without a recurrent part a cell has no products.
    """
    built = builds(target)
    scans = [b for b in built if b["kernel"] != "unprojected"]
    found = {(b["cell"], b["kernel"], b["plan"]) for b in scans if b["cell"] in CELLS}
    assert len(found) == 4 * len(CELLS), found
    printed = {b["cell"]: b["products"] > 0 for b in scans if b["cell"] not in CELLS}
    assert len(printed) > 10 and set(printed.values()) == {True, False}
    cells = vars(library).values()
    alone = {cell.name for cell in cells if isinstance(cell, Cell) and not cell.recurrent}
    assert {b["cell"] for b in scans if b["products"] == 0} <= alone
    assert not [b for b in scans if b["barriers"] != 1]
    cuda = target[0] == "cuda"
    assert not cuda or len(scans) < len(built), "no case has a projection"
    most = SPILLED if cuda else 4 * SPILLED
    assert not [
        b
        for b in built
        if b["spilled"] > most * (1 + ("masked" in b["case"] or "norm" in b["case"]))
    ]
    # An RTX's programs have 99 KB, an MI300's 64.
    assert not [b for b in built if b["shared"] > (99 if cuda else 64) * 1024]
