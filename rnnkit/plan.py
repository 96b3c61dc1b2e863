"""Which CUDA kernel runs a scan, and how it is cut into blocks: plain arithmetic, tested without a GPU.

The persistent kernel keeps the recurrent weights in shared memory for the whole sequence: a block owns some
hidden units for a slice of the batch, and all blocks run at once. Where that does not fit, or a matrix product a
step is faster, the scan goes step by step. docs/cuda.md tells how either works.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

from rnnkit.reference import CELLS

KERNELS = ("persistent", "stepwise")

WARPS = 8
#: Bytes that a warp loads at once, in 32 vectors.
PIECE = 512
#: 32-bit words between the flags of two blocks.
FLAG_STRIDE = 4

_forced = threading.local()


@dataclass(frozen=True)
class Device:
    """What the plan needs to know of a GPU.

    Attributes:
        processors: its multiprocessors.
        shared_bytes: shared memory that one block can have.
        capability: compute capability, as (9, 0).
    """

    processors: int
    shared_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Scan:
    """The scan of one layer.

    Attributes:
        cell: a name in `reference.CELLS`.
        element_bytes: of what is multiplied: 2 for bfloat16 and float16, 4 for float32, 8 for float64.
        backward: whether this is the backward pass.
        precise: whether float32 is multiplied as such, not as TF32.
        hidden, projected, batch, directions: H, P, N, D.
    """

    cell: str
    element_bytes: int
    backward: bool
    hidden: int
    projected: int
    batch: int
    directions: int
    precise: bool = False


@dataclass(frozen=True)
class Plan:
    """A kernel and its launch.

    Attributes:
        kernel: a name in `KERNELS`.
        reason: why this one.
        units: hidden units of a block.
        tiles: groups of 8 rows of the batch that a block multiplies at a time.
        columns: rows of the batch in a slice, a multiple of 8.
        blocks, slices: of each direction.
        shared_bytes: shared memory of a block.
        workspace_bytes: global memory for what the blocks exchange, and their flags.
        microseconds: what a step is expected to take.
    """

    kernel: str
    reason: str
    units: int = 0
    tiles: int = 0
    columns: int = 0
    blocks: int = 0
    slices: int = 0
    shared_bytes: int = 0
    workspace_bytes: int = 0
    microseconds: float = 0.0

    def __str__(self) -> str:
        if self.kernel == "stepwise":
            return f"stepwise: {self.reason}"
        return (
            f"persistent: {self.slices} x {self.blocks} blocks a direction, each {self.units} units x "
            f"{self.columns} rows in tiles of {8 * self.tiles}, {self.shared_bytes} bytes of shared memory; {self.reason}"
        )


@contextmanager
def forced(kernel: str, **choice: int) -> Iterator[None]:
    """Run every scan that this thread launches in this block on `kernel`, wherever it can run there.

    Args:
        kernel: a name in `KERNELS`.
        choice: `units`, `columns`: only persistent plans with these.

    Raises:
        ValueError: there is no such kernel.
    """
    if kernel not in KERNELS:
        raise ValueError(f"expected kernel to be one of {', '.join(KERNELS)}, got {kernel!r}")
    previous = getattr(_forced, "choice", None)
    _forced.choice = (kernel, tuple(sorted(choice.items())))
    try:
        yield
    finally:
        _forced.choice = previous


def choose(scan: Scan, device: Device) -> Plan:
    """The plan that is expected to be fastest, or the one that `forced` asks for."""
    return _choose(scan, device, getattr(_forced, "choice", None))


@lru_cache(maxsize=4096)
def _choose(
    scan: Scan, device: Device, wanted: tuple[str, tuple[tuple[str, int], ...]] | None
) -> Plan:
    kernel, choice = wanted or ("", ())
    stepwise = Plan("stepwise", "", microseconds=_stepwise_microseconds(scan))
    if kernel == "stepwise":
        return Plan("stepwise", "forced")
    if reason := _never_persistent(scan, device):
        return Plan("stepwise", reason)
    plans = [
        plan
        for plan in persistent_plans(scan, device)
        if all(getattr(plan, name) == value for name, value in choice)
    ]
    if not plans:
        return Plan("stepwise", "the weights do not fit in the multiprocessors' shared memory")
    best = min(plans, key=lambda plan: plan.microseconds)
    if kernel != "persistent" and stepwise.microseconds < best.microseconds:
        return Plan("stepwise", "a matrix product a step is expected to be faster")
    return best


def _never_persistent(scan: Scan, device: Device) -> str:
    if device.capability < (8, 0):
        return "the persistent kernel needs compute capability 8.0"
    if scan.element_bytes == 8:
        return "the persistent kernel has no float64"
    if scan.projected != scan.hidden:
        return "the persistent kernel has no projection"
    return ""


def units_of(scan: Scan) -> dict[int, tuple[int, ...]]:
    """The kernels that are built: hidden units of a block -> tiles (csrc/cuda/instances.h)."""
    if scan.backward:
        return {8: (2, 4, 8), 16: (2, 4, 8)}
    if CELLS[scan.cell].gates == 1:
        return {16: (2, 4, 8)}
    return {4: (2, 4, 8), 8: (2, 4, 8), 16: (2, 4)}


def persistent_plans(scan: Scan, device: Device) -> Iterator[Plan]:
    """Every way of cutting the scan into blocks that can be on the device together."""
    for units, built in units_of(scan).items():
        blocks = -(-scan.hidden // units)
        seen = set()
        for wanted in range(1, device.processors // (scan.directions * blocks) + 1):
            columns = -(-scan.batch // (8 * wanted)) * 8
            if columns in seen:
                continue
            seen.add(columns)
            tiles = next((t for t in built if 8 * t >= columns), built[-1])
            shared = _shared_bytes(scan, units, tiles, columns)
            if shared > device.shared_bytes:
                continue
            slices = -(-scan.batch // columns)
            yield Plan(
                "persistent",
                "expected to be fastest",
                units,
                tiles,
                columns,
                blocks,
                slices,
                shared,
                _workspace_bytes(scan, blocks, slices, columns),
                _microseconds(scan, units, tiles, columns, scan.directions * blocks * slices),
            )


def _rows(scan: Scan, units: int) -> int:
    """Rows of weights of a block."""
    return units if scan.backward else units * CELLS[scan.cell].gates


def _chunks(scan: Scan) -> int:
    """Pieces of 8 rows of weights: 64 bytes of each row."""
    parts = CELLS[scan.cell].gates if scan.backward else 1
    return -(-scan.hidden * scan.element_bytes // 64) * parts


def _shared_bytes(scan: Scan, units: int, tiles: int, columns: int) -> int:
    rows = _rows(scan, units)
    row_blocks = -(-rows // 8)
    sums = WARPS * row_blocks * 8 * (tiles * 8 + 4)
    biases = 0 if scan.backward else 2 * rows
    states = CELLS[scan.cell].states * units * columns
    return row_blocks * _chunks(scan) * PIECE + 4 * (sums + biases + states)


def _workspace_bytes(scan: Scan, blocks: int, slices: int, columns: int) -> int:
    exchanged = 2 * _chunks(scan) * (columns // 8) * PIECE
    return scan.directions * slices * (exchanged + blocks * FLAG_STRIDE * 4)


def _microseconds(scan: Scan, units: int, tiles: int, columns: int, grid: int) -> float:
    """Of a step: the exchange's latency, what each block and all blocks load, multiply and add up."""
    clock = 1700.0  # cycles in a microsecond
    row_blocks = -(-_rows(scan, units) // 8)
    loaded = _chunks(scan) * (columns // 8) * PIECE
    padded = -(-columns // (8 * tiles)) * tiles
    products = -(-row_blocks // 2) * padded * _chunks(scan) * (6 if scan.precise else 2)
    weights = row_blocks * _chunks(scan) * PIECE * -(-columns // (8 * tiles))
    sums = 2 * WARPS * row_blocks * 8 * padded * 8 * 4
    return (
        1.6
        + loaded / 48.0 / clock
        + grid * loaded / 4.0e6
        + products * 1.2 / clock
        + (weights + sums) / 100.0 / clock
        + 0.3 * -(-columns // (8 * tiles))
    )


def _stepwise_microseconds(scan: Scan) -> float:
    gates = CELLS[scan.cell].gates
    operations = 2.0 * scan.batch * scan.hidden * scan.projected * gates
    rate = {2: 3e8, 4: 3e7 if scan.precise else 1.5e8, 8: 2e7}[scan.element_bytes]
    return scan.directions * (12.0 + operations / rate)
