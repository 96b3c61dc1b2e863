"""Which CUDA kernel runs a scan, and how it is split into blocks: plain arithmetic, tested without a GPU.

The persistent kernels keep the recurrent weights in shared memory for the whole sequence: a block owns some
hidden units for a slice of the batch, and what the blocks of a slice exchange each step goes through the shared
memory of a cluster of blocks, or through global memory with all blocks running at once. Where neither fits, or a
matrix product a step is faster, the scan goes step by step. docs/cuda.md tells how each works.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

from rnnkit import instances
from rnnkit.specs import CELLS

KERNELS = (*instances.KERNELS, "stepwise")
#: Kernels of rnnkit/triton/scan.py.
TRITON_KERNELS = ("sequence", "stepwise")

WARPS = 8
#: Bytes of a fragment, what a warp loads at once: 64 bytes of each of 8 rows.
FRAGMENT = 512
#: 32-bit words between the flags of two blocks.
FLAG_STRIDE = 4

_forced = threading.local()


@dataclass(frozen=True)
class Gpu:
    """What the plan needs to know of a GPU.

    Attributes:
        processors: its multiprocessors.
        shared_bytes: shared memory that one block can have.
        capability: compute capability, as (9, 0).
    """

    processors: int
    shared_bytes: int
    capability: tuple[int, int]

    @property
    def cluster_blocks(self) -> int:
        """Blocks in the largest cluster; 1 where there are none."""
        if self.capability[0] < 9:
            return 1
        return 16 if self.capability[0] in (9, 10) else 8

    def clusters(self, blocks: int) -> int:
        """Clusters of so many blocks that run at once; not every processor has a place in one."""
        return max(1, int(0.85 * self.processors / blocks))


@dataclass(frozen=True)
class Scan:
    """The scan of one layer.

    Attributes:
        cell: its name in ops.
        element_bytes: of what is multiplied: 2 for bfloat16 and float16, 4 for float32, 8 for float64.
        backward: whether this is the backward pass.
        precise: whether float32 is multiplied as such, not as TF32.
        hidden, projected, batch, directions: H, P, N, D.
        normalizes: whether there is layer normalization.
        heads: how many of the D directions go forward.
    """

    cell: str
    element_bytes: int
    backward: bool
    hidden: int
    projected: int
    batch: int
    directions: int
    precise: bool = False
    normalizes: bool = False
    heads: int = 1


@dataclass(frozen=True)
class Plan:
    """A kernel and its launch.

    Attributes:
        kernel: a name in `KERNELS`.
        reason: why this one.
        units: hidden units of a block.
        tiles: groups of 8 rows of the batch that a block multiplies at a time.
        batch_tile: rows of the batch that a block owns, a slice; a multiple of 8.
        blocks, slices: of each direction.
        shared_bytes: shared memory of a block.
        workspace_bytes: global memory for what the blocks exchange, and their flags.
        microseconds: what a step is expected to take.
    """

    kernel: str
    reason: str
    units: int = 0
    tiles: int = 0
    batch_tile: int = 0
    blocks: int = 0
    slices: int = 0
    shared_bytes: int = 0
    workspace_bytes: int = 0
    microseconds: float = 0.0

    @property
    def arguments(self) -> tuple[int, int, int, int, bool]:
        """What the extension's ops take of a plan: units, tiles, batch_tile, shared_bytes, cluster."""
        cluster = self.kernel == "cluster"
        return self.units, self.tiles, self.batch_tile, self.shared_bytes, cluster

    def __str__(self) -> str:
        if self.kernel == "stepwise":
            return f"stepwise: {self.reason}"
        return (
            f"{self.kernel}: {self.slices} x {self.blocks} blocks a direction, each {self.units} units x "
            f"{self.batch_tile} rows in tiles of {8 * self.tiles}, {self.shared_bytes} bytes of shared memory; "
            f"{self.reason}"
        )


@contextmanager
def forced(kernel: str, **choice: int) -> Iterator[None]:
    """Run every scan that this thread launches in this block on `kernel`, wherever it can run there.

    Args:
        kernel: a name in `KERNELS`, or of those that run on Triton in `TRITON_KERNELS`.
        choice: `units`, `batch_tile`: only plans with these.

    A backward pass that autograd runs is launched by a thread of its own, which this does not reach.

    Raises:
        ValueError: there is no such kernel.
    """
    names = dict.fromkeys((*KERNELS, *TRITON_KERNELS))
    if kernel not in names:
        raise ValueError(f"expected kernel to be one of {', '.join(names)}, got {kernel!r}")
    previous = getattr(_forced, "choice", None)
    _forced.choice = (kernel, tuple(sorted(choice.items())))
    try:
        yield
    finally:
        _forced.choice = previous


def forced_kernel() -> str:
    """The kernel that `forced` asks for; empty if none."""
    choice: tuple[str, object] | None = getattr(_forced, "choice", None)
    return choice[0] if choice else ""


def choose(scan: Scan, device: Gpu) -> Plan:
    """The plan that is expected to be fastest, or the one that `forced` asks for."""
    return _choose(scan, device, getattr(_forced, "choice", None))


@lru_cache(maxsize=4096)
def _choose(
    scan: Scan, device: Gpu, wanted: tuple[str, tuple[tuple[str, int], ...]] | None
) -> Plan:
    kernel, choice = wanted or ("", ())
    stepwise = Plan("stepwise", "", microseconds=_stepwise_microseconds(scan))
    if kernel == "stepwise":
        return replace(stepwise, reason="forced")
    if reason := _never_persistent(scan, device):
        return replace(stepwise, reason=reason)
    plans = [
        plan
        for plan in (*persistent_plans(scan, device), *cluster_plans(scan, device))
        if kernel in ("", plan.kernel)
        and all(getattr(plan, name) == value for name, value in choice)
    ]
    if not plans:
        what = (
            f"no {kernel} kernel has such blocks and room in shared memory"
            if kernel
            else "the weights do not fit in shared memory"
        )
        return replace(stepwise, reason=what)
    best = min(plans, key=lambda plan: plan.microseconds)
    if kernel:
        return replace(best, reason="forced")
    if stepwise.microseconds < best.microseconds:
        return replace(stepwise, reason="a matrix product a step is expected to be faster")
    return best


def _never_persistent(scan: Scan, device: Gpu) -> str:
    if device.capability < (8, 0):
        return "the persistent kernel needs compute capability 8.0"
    if scan.element_bytes == 8:
        return "the persistent kernel has no float64"
    if scan.projected != scan.hidden:
        return "the persistent kernel has no projection"
    if scan.normalizes:
        return "the persistent kernel has no layer normalization"
    return ""


def _units_of(scan: Scan, kernel: str) -> dict[int, tuple[int, ...]]:
    return instances.units_of(kernel, scan.backward, CELLS[scan.cell].gates)


def persistent_plans(scan: Scan, device: Gpu) -> Iterator[Plan]:
    """Every way of splitting the scan into blocks that can be on the device together."""
    for units, built in _units_of(scan, "persistent").items():
        blocks = -(-scan.hidden // units)
        at_once = device.processors // (scan.directions * blocks)
        for tiles, batch_tile in _batch_tiles(scan, range(1, at_once + 1), built):
            slices = -(-scan.batch // batch_tile)
            expected = _microseconds(
                scan, units, tiles, batch_tile, scan.directions * blocks * slices
            )
            yield from _fitting(
                scan, device, "persistent", units, tiles, batch_tile, blocks, slices, expected
            )


def cluster_plans(scan: Scan, device: Gpu) -> Iterator[Plan]:
    """Every way of splitting the scan into clusters; they need not all be on the device together."""
    for units, built in _units_of(scan, "cluster").items():
        blocks = -(-scan.hidden // units)
        if blocks > min(device.cluster_blocks, device.processors) or device.cluster_blocks == 1:
            continue
        at_once = device.clusters(blocks)
        for tiles, batch_tile in _batch_tiles(
            scan, range(1, at_once // scan.directions + 2), built
        ):
            slices = -(-scan.batch // batch_tile)
            expected = _cluster_microseconds(scan, units, tiles, batch_tile)
            expected *= -(-slices * scan.directions // at_once)
            yield from _fitting(
                scan, device, "cluster", units, tiles, batch_tile, blocks, slices, expected
            )


def _batch_tiles(scan: Scan, slices: range, built: tuple[int, ...]) -> list[tuple[int, int]]:
    """For each number of slices, tiles and the rows of the batch that a block owns: whole groups of tiles."""
    found: dict[tuple[int, int], None] = {}
    for n in slices:
        eights = -(-scan.batch // (8 * n))
        tiles = next((t for t in built if t >= eights), built[-1])
        found[tiles, -(-eights // tiles) * tiles * 8] = None
    return list(found)


def _fitting(
    scan: Scan,
    device: Gpu,
    kernel: str,
    units: int,
    tiles: int,
    batch_tile: int,
    blocks: int,
    slices: int,
    microseconds: float,
) -> Iterator[Plan]:
    """The plan, if a block's shared memory holds what it must."""
    cluster = kernel == "cluster"
    shared = _shared_bytes(scan, units, tiles, batch_tile, cluster)
    if shared <= device.shared_bytes:
        workspace = 0 if cluster else _workspace_bytes(scan, blocks, slices, batch_tile)
        yield Plan(
            kernel,
            "expected to be fastest",
            units,
            tiles,
            batch_tile,
            blocks,
            slices,
            shared,
            workspace,
            microseconds,
        )


def _weight_rows(scan: Scan, units: int) -> int:
    """Rows of weights of a block."""
    return units if scan.backward else units * CELLS[scan.cell].gates


def _exchange_gates(scan: Scan) -> int:
    """Values of each unit that the blocks exchange: h, or the gradients of its gates."""
    return CELLS[scan.cell].gates if scan.backward else 1


def _slabs(scan: Scan) -> int:
    """Slabs of 64 bytes in a row of weights, and of an exchange."""
    return -(-scan.hidden * scan.element_bytes // 64) * _exchange_gates(scan)


def _shared_bytes(scan: Scan, units: int, tiles: int, batch_tile: int, cluster: bool) -> int:
    """Shared memory of a block, which a launch holds to what the kernel needs (csrc/cuda/persistent.h)."""
    rows = _weight_rows(scan, units)
    row_blocks = -(-rows // 8)
    sums = WARPS * row_blocks * 8 * (tiles * 8 + 4)
    states = CELLS[scan.cell].states * units * batch_tile
    exchanged = 0
    if cluster:
        exchanged = 2 * _slabs(scan) * (batch_tile // 8) * FRAGMENT
        exchanged += _exchange_gates(scan) * batch_tile * units * scan.element_bytes
    return row_blocks * _slabs(scan) * FRAGMENT + exchanged + 4 * (sums + states)


def _workspace_bytes(scan: Scan, blocks: int, slices: int, batch_tile: int) -> int:
    exchanged = 2 * _slabs(scan) * (batch_tile // 8) * FRAGMENT
    return scan.directions * slices * (exchanged + blocks * FLAG_STRIDE * 4)


def _work(scan: Scan, units: int, tiles: int, batch_tile: int) -> tuple[float, ...]:
    """Of a block in a step: bytes it loads, products of tensor cores, bytes of sums, items, groups of rows."""
    row_blocks = -(-_weight_rows(scan, units) // 8)
    groups = batch_tile // (8 * tiles)
    loaded = _slabs(scan) * (batch_tile // 8) * FRAGMENT
    products = -(-row_blocks // 2) * (batch_tile // 8) * _slabs(scan) * 2
    sums = 2 * WARPS * row_blocks * 8 * batch_tile * 4
    items = -(-units * 8 * tiles // 256) * groups
    return loaded, products, sums, items, groups


# Fitted to times on an H100 (docs/cuda.md): within 13 % of the persistent kernel's, 7 % of the cluster's.


def _microseconds(scan: Scan, units: int, tiles: int, batch_tile: int, grid: int) -> float:
    """Expected time of a persistent step: exchange, loads of all blocks, products, sums and items of a block."""
    loaded, products, sums, items, groups = _work(scan, units, tiles, batch_tile)
    weights = -(-_weight_rows(scan, units) // 8) * _slabs(scan) * FRAGMENT * groups
    return (
        1.0
        + 0.57 * groups
        + 0.45e-7 * grid * loaded
        + (11.8e-3 if scan.precise else 2.35e-3) * products
        + 0.41e-5 * weights
        + 0.61e-5 * sums
        + (0.026 + 0.037 * CELLS[scan.cell].gates) * items
    )


def _cluster_microseconds(scan: Scan, units: int, tiles: int, batch_tile: int) -> float:
    """Expected time of a step whose exchange stays in a cluster, where each block writes its part to all."""
    loaded, products, sums, items, groups = _work(scan, units, tiles, batch_tile)
    return (
        0.77
        + 0.1 * groups
        + 3.46e-5 * loaded
        + (13.5e-3 if scan.precise else 3.38e-3) * products
        + 0.98e-5 * sums
        + (0.30 + 0.014 * CELLS[scan.cell].gates) * items
    )


def _stepwise_microseconds(scan: Scan) -> float:
    """Expected time of a stepwise step: two launches, or a product that reads the weights anew."""
    weights = CELLS[scan.cell].gates * scan.hidden * scan.projected
    rate = {2: 4e8, 4: 3.5e7 if scan.precise else 1.3e8, 8: 2e7}[scan.element_bytes]
    product = 5.0 + 2.0 * scan.batch * weights / rate + weights * scan.element_bytes / 3e6
    return scan.directions * max(14.0, product)
