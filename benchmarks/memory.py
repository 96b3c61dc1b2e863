"""Memory of one call above what it is given and what it returns, from Linux's high-water mark.

Runs in a process of its own, whose allocator gives freed memory back at once: `ENVIRONMENT`.
"""

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.providers import Computation, Unsupported

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "16384"}
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"


def give_back() -> None:
    """Returns what is free inside glibc's heap, too; another C library keeps it."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident(field: str) -> int:
    """Bytes of `VmRSS` or of its high-water mark, `VmHWM`."""
    found = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    if not found:
        raise Unsupported(f"{STATUS} has no {field}")
    return 1024 * int(found[1])


def peaks(computation: Computation, calls: int) -> list[int]:
    """Bytes that each of `calls` calls needed at its worst moment, less those of its results.

    Raises:
        Unsupported: the system keeps no high-water mark that can be reset.
    """
    returned = sum(array.nbytes for array in computation.once().values())
    return [max(peak(computation.call)[0] - returned, 0) for _ in range(calls)]


def peak(call: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes that a call needed at its worst moment, with its result, and the result.

    Raises:
        Unsupported: the system keeps no high-water mark that can be reset.
    """
    give_back()
    try:
        CLEAR.write_text(RESET_PEAK)
        before = resident("VmRSS")
    except OSError as error:
        raise Unsupported(f"{error.filename}: {error.strerror}") from error
    result = call()
    return resident("VmHWM") - before, result
