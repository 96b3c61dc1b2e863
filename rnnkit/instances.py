"""The CUDA kernels for a scan in one launch that are built: those that were the fastest somewhere.

`rnnkit.plan` chooses among them. The build, which does not import the package, runs this file and writes what
`header` returns for csrc/cuda/instances.h.
"""

from itertools import product

KERNELS = ("cluster", "persistent")


def units_of(kernel: str, backward: bool, gates: int) -> dict[int, tuple[int, ...]]:
    """Hidden units of a block -> tiles, groups of 8 rows of the batch that it multiplies at a time.

    More sums do not fit in registers. A cell of several gates has as many rows of weights a unit in the forward pass.
    """
    if kernel == "cluster":
        return {16: (1,)}
    if backward:
        return {8: (1, 2), 16: (1, 2, 4, 8)}
    if gates == 1:
        return {16: (1, 2, 4, 8)}
    return {4: (1, 2), 8: (1, 2, 4, 8), 16: (1, 2, 4)}


def header() -> str:
    """The table for C++: RNNKIT_INSTANCE(backward, several gates, cluster, units, tiles)."""
    lines = [
        f"RNNKIT_INSTANCE({int(backward)}, {int(gates > 1)}, {int(kernel == 'cluster')}, {units}, {tiles})\n"
        for kernel, backward, gates in product(KERNELS, (False, True), (1, 2))
        for units, built in units_of(kernel, backward, gates).items()
        for tiles in built
    ]
    return "".join(lines)
