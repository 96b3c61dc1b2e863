"""What a roofline allows: the least time that a case's products, and reads of its recurrent weights, can take.

A call takes at least its operations over the peak of the units that multiply and add, and at least as long as it
takes to read the recurrent weights once a step, in training twice, from the cache that holds a thread's part of them.
"""

from collections.abc import Mapping
from typing import Any

from benchmarks.cases import GATES, Case
from benchmarks.figures import significant

LEVELS = ("L1", "L2", "L3")
ASSUMED_BYTES = (32 * 1024, 1024 * 1024, 32 * 1024 * 1024)  # where the system does not tell
LARGEST_READ = 64 * 1024 * 1024  # of one thread
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}

#: By level: its `cache` bytes, the bytes that each thread `read` and what all of them read, in bytes `per_second`.
Bandwidth = dict[str, dict[str, float]]


def reads(caches: Mapping[str, int], threads: int) -> dict[str, int]:
    """Bytes that each thread reads to measure a level: half of L1 or L2, for L3 several times what L2 holds."""
    l1, l2, l3 = (caches[level] for level in LEVELS)
    beyond = max(2 * l2, min(4 * l2, l3 // (2 * threads), LARGEST_READ))
    return dict(zip(LEVELS, (l1 // 2, l2 // 2, beyond), strict=True))


def measure(extension: Any, threads: int, seconds: float) -> Bandwidth:
    """By rnnkit's compiled extension, each level for `seconds`."""
    told = [
        size or assumed
        for size, assumed in zip(extension.cache_sizes(), ASSUMED_BYTES, strict=True)
    ]
    caches = dict(zip(LEVELS, told, strict=True))
    found: Bandwidth = {}
    for level, size in reads(caches, threads).items():
        rate = significant(extension.read_bandwidth(size, threads, seconds))
        found[level] = {"cache": caches[level], "read": size, "per_second": rate}
    return found


def recurrent_bytes(case: Case) -> int:
    """Of the recurrent weights of one layer in one direction, projection included."""
    products = GATES[case.cell] * case.H * case.output_size + case.projection * case.H
    return products * BYTES[case.dtype]


def level_of(case: Case, threads: int, bandwidth: Bandwidth) -> str:
    """The first cache that holds a thread's part of a layer's recurrent weights; else the last."""
    part = recurrent_bytes(case) / threads
    return next((level for level in LEVELS if part <= bandwidth[level]["cache"]), LEVELS[-1])


def bounds(case: Case, threads: int, gflops: float, bandwidth: Bandwidth) -> dict[str, Any]:
    """Shares of the peak, `gflops`, that reading from each level allows, and the `level` that applies."""
    steps = max(case.lengths) * case.layers * case.directions
    read = recurrent_bytes(case) * steps * (2 if case.trains else 1)
    least = case.flops / gflops / 1e9
    shares = {
        level: significant(min(1.0, least * bandwidth[level]["per_second"] / read))
        for level in LEVELS
    }
    return {"level": level_of(case, threads, bandwidth), **shares}
