"""What the compiler made of the CUDA kernels, without a GPU: registers, spills, shared memory, tensor cores.

Reads the reports that the build leaves in build/cuda (build_cuda.py), and the machine code in the objects there.
"""

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest

FOLDER = Path(__file__).parents[1] / "build/cuda"
#: Objects of the persistent kernels, and all that hold machine code of the GPU.
SCANS = ["_".join(it) for it in product(("backward", "forward"), ("bfloat16", "float", "half"))]
OBJECTS = ["launch", "step", *SCANS]

#: Of every kernel's blocks (kThreads), and of a multiprocessor.
THREADS, REGISTERS = 256, 65_536

ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'")
SPILLS = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
)
USED = re.compile(r"Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+)(?:\+\d+)? bytes smem)?")


class Resources(NamedTuple):
    """Of one kernel on one architecture; `spilled` and `shared` in bytes."""

    source: str
    name: str
    architecture: str
    stack: int
    spilled: int
    registers: int
    shared: int


@lru_cache
def resources() -> tuple[Resources, ...]:
    """Of every kernel on every architecture it was built for."""
    found = []
    for report in sorted(FOLDER.glob("*.ptxas.txt")):
        # What follows a kernel's name up to the next one's is its own.
        for text in re.split("(?=Compiling entry function)", report.read_text())[1:]:
            entry, spills, used = (part.search(text) for part in (ENTRY, SPILLS, USED))
            assert entry and spills and used, f"{report.name}: {text}"
            found.append(
                Resources(
                    report.name.removesuffix(".ptxas.txt"),
                    entry["name"],
                    entry["architecture"],
                    int(spills["stack"]),
                    int(spills["stores"]) + int(spills["loads"]),
                    int(used["registers"]),
                    int(used["shared"] or 0),
                )
            )
    return tuple(found)


@lru_cache
def cuobjdump() -> str:
    """The program that shows machine code; empty where there is none."""
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [Path(home) / "bin/cuobjdump" for home in (*homes, "/usr/local/cuda") if home]
    triton = find_spec("triton")
    if triton and triton.origin:
        places.append(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    found = shutil.which("cuobjdump") or next((str(p) for p in places if p.exists()), "")
    return found


def listing(*arguments: str | Path) -> Iterator[str]:
    """The lines that cuobjdump writes."""
    with subprocess.Popen([cuobjdump(), *arguments], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout
        yield from running.stdout
    assert running.returncode == 0


needs_reports = pytest.mark.skipif(
    not list(FOLDER.glob("*.ptxas.txt")),
    reason="the CUDA kernels were not built here: no build/cuda/*.ptxas.txt",
)
needs_cuobjdump = pytest.mark.skipif(
    not cuobjdump(), reason="no cuobjdump: not on PATH, in the CUDA toolkit or in triton"
)


@needs_reports
def test_every_object_has_a_report() -> None:
    """Those that hold kernels hold them for the same architectures."""
    assert {f"{name}.ptxas.txt" for name in OBJECTS} == {
        report.name for report in FOLDER.glob("*.ptxas.txt")
    }
    of_source = {source: set() for source in ("step", *SCANS)}
    for kernel in resources():
        of_source[kernel.source].add(kernel.architecture)
    assert all(of_source.values())
    assert len({frozenset(architectures) for architectures in of_source.values()}) == 1, of_source


@needs_reports
def test_nothing_is_spilled() -> None:
    """Nor is a thread's array in memory because an index into it is not known ahead."""
    assert not [kernel for kernel in resources() if kernel.spilled or kernel.stack]


@needs_reports
def test_registers_suffice_for_a_block() -> None:
    """They are given out by eights."""
    assert not [k for k in resources() if -(-k.registers // 8) * 8 * THREADS > REGISTERS]


@needs_reports
def test_no_shared_memory_but_what_the_plan_counts() -> None:
    """What the kernels declare adds to what a launch asks for."""
    assert not [kernel for kernel in resources() if kernel.shared]


def is_persistent(name: str) -> bool:
    return "persistent_kernel" in name


def is_empty(name: str, architecture: str) -> bool:
    """Whether it exchanges through a cluster's memory, where there are no clusters: it is never launched."""
    return "ELb1EEEE" in name and int(re.sub(r"\D", "", architecture)) < 90


@needs_reports
def test_as_many_persistent_kernels_on_every_architecture() -> None:
    counts = Counter(k.architecture for k in resources() if is_persistent(k.name))
    assert len(set(counts.values())) == 1, counts


@needs_reports
@needs_cuobjdump
@pytest.mark.slow
@pytest.mark.parametrize("source", SCANS)
def test_persistent_kernels_multiply_on_tensor_cores(source: str) -> None:
    """And nothing of them waits in local memory."""
    products: dict[tuple[str, str], int] = {}
    architecture = name = ""
    local = []
    for line in listing("-sass", FOLDER / f"{source}.o"):
        if match := re.match(r"\s*Function : (\w+)|\s*arch = (\w+)", line):
            name, architecture = match[1] or "", match[2] or architecture
            if is_persistent(name):
                products[name, architecture] = 0
        elif is_persistent(name):
            products[name, architecture] += " HMMA." in line
            if re.search(r"\b(LDL|STL)\b", line):
                local.append((name, architecture, line.strip()))
    persistent = [k for k in resources() if k.source == source and is_persistent(k.name)]
    assert products.keys() == {(k.name, k.architecture) for k in persistent}
    assert not local
    without = {kernel for kernel, count in products.items() if count == 0}
    assert without == {kernel for kernel in products if is_empty(*kernel)}
