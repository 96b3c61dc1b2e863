"""The launch plan of the CUDA kernels, which is plain arithmetic: what fits, what is chosen, what is forced."""

import re
import threading
from dataclasses import replace
from itertools import pairwise, product

import pytest

from rnnkit import instances, plan
from rnnkit.plan import Gpu, Plan, Scan, choose, forced
from rnnkit.specs import CELLS

H100 = Gpu(132, 232_448, (9, 0))
DEVICES = {
    "H100": H100,
    "B200": Gpu(148, 232_448, (10, 0)),
    "RTX 5090": Gpu(170, 101_376, (12, 0)),
    "A100": Gpu(108, 166_912, (8, 0)),
    "RTX 3070": Gpu(46, 101_376, (8, 6)),
    "RTX A6000": Gpu(84, 101_376, (8, 6)),
    "L4": Gpu(58, 101_376, (8, 9)),
    "one processor": Gpu(1, 101_376, (8, 9)),
}
#: More than any device has.
BOUNDLESS = Gpu(5000, 2**40, (9, 0))

each_device = pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
each_cell = pytest.mark.parametrize("cell", CELLS)


def scan(cell: str = "lstm", hidden: int = 128, batch: int = 16, **fields: int | bool) -> Scan:
    fields = {"element_bytes": 2, "backward": False, "directions": 1, "projected": hidden} | fields
    return Scan(cell, hidden=hidden, batch=batch, **fields)


HIDDEN = (1, 3, 8, 17, 64, 100, 256, 511, 512, 650, 1024, 1500, 2047, 4096, 5000)
BATCHES = (1, 5, 8, 9, 33, 64, 100, 1000)


def scans(cell: str) -> list[Scan]:
    """Every kind of scan at sizes around those of blocks, slices and tiles."""
    return [
        scan(cell, hidden, batch, element_bytes=size, backward=backward, directions=directions)
        for hidden, batch in product(HIDDEN, BATCHES)
        for size, backward, directions in product((2, 4), (False, True), (1, 2))
    ]


def plans_of(it: Scan, device: Gpu) -> list[Plan]:
    """Every plan for one launch of all steps."""
    return [*plan.persistent_plans(it, device), *plan.cluster_plans(it, device)]


def assert_fits(it: Scan, one: Plan, device: Gpu) -> None:
    """Blocks that wait for each other are on the device at once, and every unit of every row belongs to just one."""
    assert 0 < one.shared_bytes <= device.shared_bytes
    assert (one.blocks - 1) * one.units < it.hidden <= one.blocks * one.units
    assert (one.slices - 1) * one.batch_tile < it.batch <= one.slices * one.batch_tile
    assert one.batch_tile > 0 and one.batch_tile % 8 == 0
    assert one.microseconds > 0
    sizes = (one.units, one.tiles, one.batch_tile, one.shared_bytes)
    assert one.arguments == (*sizes, one.kernel == "cluster")
    built = instances.units_of(one.kernel, it.backward, CELLS[it.cell].gates)
    assert one.tiles in built[one.units]
    if one.kernel == "cluster":
        assert device.capability >= (9, 0)
        # More than 16 there are nowhere, and more than 8 only on GPUs for data centres.
        assert one.blocks <= (16 if device.capability in ((9, 0), (10, 0)) else 8)
        assert one.workspace_bytes == 0
    else:
        assert one.kernel == "persistent"
        assert it.directions * one.blocks * one.slices <= device.processors
        assert one.workspace_bytes % 4 == 0


@each_device
@each_cell
def test_every_plan_fits(cell: str, device: Gpu) -> None:
    for it in scans(cell):
        plans = plans_of(it, device)
        for one in plans:
            assert_fits(it, one, device)
        shapes = [(one.kernel, one.units, one.batch_tile) for one in plans]
        assert len(set(shapes)) == len(shapes)


@each_device
@each_cell
def test_the_fastest_is_chosen(cell: str, device: Gpu) -> None:
    """Of the plans of a kernel that is forced, and of all kernels; each choice has a reason."""
    for it in scans(cell):
        chosen, found = choose(it, device), {}
        plans = plans_of(it, device)
        for kernel in plan.KERNELS:
            with forced(kernel):
                found[kernel] = choose(it, device)
            times = [one.microseconds for one in plans if one.kernel == kernel]
            if times:
                assert found[kernel].kernel == kernel
                assert found[kernel].microseconds == min(times)
            else:
                assert found[kernel].kernel == "stepwise"
        if chosen.kernel != "stepwise":
            assert chosen == replace(found[chosen.kernel], reason=chosen.reason)
            assert chosen.microseconds == min(one.microseconds for one in plans)
        assert chosen.reason
        assert str(chosen).startswith(f"{chosen.kernel}: ")
        assert chosen.reason in str(chosen)
        assert choose(it, device) is chosen
        assert choose(replace(it), replace(device)) == chosen


@each_cell
def test_what_a_plan_says_of_itself(cell: str) -> None:
    it = scan(cell, 256, 20)
    for one in plans_of(it, H100):
        numbers = [int(number) for number in re.findall(r"\d+", str(one))]
        of_block = [one.units, one.batch_tile, 8 * one.tiles, one.shared_bytes]
        said = [one.slices, one.blocks, *of_block]
        assert numbers == said
        assert len(str(one)) < 200 and "\n" not in str(one)


@pytest.mark.parametrize("capability", ((8, 0), (9, 0)), ids=str)
@each_cell
def test_a_larger_device_is_no_slower(cell: str, capability: tuple[int, int]) -> None:
    """Nor has it fewer kernels, whatever it has more of."""
    processors, memories = (1, 28, 46, 84, 108, 132, 144, 170), (49_152, 101_376, 166_912, 232_448)
    steps = [(n, memories[-1]) for n in processors], [(132, m) for m in memories]
    for it, sizes, kernel in product(scans(cell), steps, ("", "cluster", "persistent")):
        if it.element_bytes == 4 and it.directions == 2:
            continue
        found = []
        for size in sizes:
            device = Gpu(*size, capability)
            if kernel:
                with forced(kernel):
                    found.append(choose(it, device))
            else:
                found.append(choose(it, device))
        for small, large in pairwise(found):
            if small.kernel != "stepwise":
                assert large.kernel != "stepwise", (it, small, large)
                assert large.microseconds <= small.microseconds, (it, small, large)


@each_cell
def test_workspace_holds_two_exchanges_and_the_flags(cell: str) -> None:
    """Of every slice: a value for each unit and row, twice; in the backward pass one for each gate."""
    for it in scans(cell):
        values = it.hidden * (CELLS[cell].gates if it.backward else 1)
        for one in plan.persistent_plans(it, H100):
            exchanged = 2 * values * one.batch_tile * it.element_bytes
            flags = one.blocks * plan.FLAG_STRIDE * 4
            assert one.workspace_bytes >= it.directions * one.slices * (exchanged + flags)


@each_cell
def test_shared_memory_holds_the_weights(cell: str) -> None:
    """In a cluster two exchanges, too."""
    for it in scans(cell):
        values = it.hidden * (CELLS[cell].gates if it.backward else 1)
        for one in plans_of(it, H100):
            weights = one.units * CELLS[cell].gates * it.hidden * it.element_bytes
            exchanged = 2 * values * one.batch_tile * it.element_bytes
            assert one.shared_bytes >= weights + (exchanged if one.kernel == "cluster" else 0)


# Choice


@pytest.mark.parametrize(
    ("it", "device", "reason"),
    [
        (scan(element_bytes=8), H100, "float64"),
        (scan(projected=64), H100, "projection"),
        (replace(scan(), normalizes=True), H100, "layer normalization"),
        (scan(), Gpu(80, 98_304, (7, 0)), "capability"),
        (scan(), Gpu(40, 65_536, (7, 5)), "capability"),
        (scan(hidden=20_000), H100, "shared memory"),
        (scan(hidden=256, element_bytes=4), DEVICES["one processor"], "shared memory"),
    ],
)
def test_where_the_steps_cannot_be_one_launch(it: Scan, device: Gpu, reason: str) -> None:
    """Not even where it is forced; and the plan says why."""
    assert choose(it, device).kernel == "stepwise"
    for kernel in ("persistent", "cluster"):
        with forced(kernel):
            found = choose(it, device)
        assert found.kernel == "stepwise"
        assert reason in str(found)


def test_each_kernel_is_chosen_somewhere() -> None:
    """A cluster where it holds the weights, all of the device where that does, neither where products are large."""
    assert choose(scan(hidden=128, batch=8), H100).kernel == "cluster"
    assert choose(scan(hidden=128, batch=8), DEVICES["A100"]).kernel == "persistent"
    assert choose(scan(hidden=1024, batch=8), H100).kernel == "persistent"
    assert choose(scan(hidden=2048, batch=1000, backward=True), H100).kernel == "stepwise"


def test_no_clusters_where_there_are_none() -> None:
    with forced("cluster"):
        assert choose(scan(), H100).kernel == "cluster"
        assert choose(scan(), DEVICES["A100"]).kernel == "stepwise"
        assert choose(scan(), DEVICES["L4"]).kernel == "stepwise"


# Forcing


def test_forced_cuts() -> None:
    """Only plans of so many units and rows of the batch; the stepwise kernel where there are none."""
    it = scan(batch=90)
    for one in plans_of(it, H100):
        with forced(one.kernel, units=one.units, batch_tile=one.batch_tile):
            assert choose(it, H100) == replace(one, reason="forced")
        with forced(one.kernel, units=7):
            assert choose(it, H100).kernel == "stepwise"


def test_forced_blocks_nest_and_end() -> None:
    it = scan()
    free = choose(it, H100)
    with forced("persistent", units=16):
        with forced("stepwise"):
            assert choose(it, H100).kernel == "stepwise"
        assert choose(it, H100).units == 16
    with pytest.raises(KeyError), forced("stepwise"):
        raise KeyError
    assert choose(it, H100) == free


def test_forced_in_one_thread_only() -> None:
    found = []
    with forced("stepwise"):
        thread = threading.Thread(target=lambda: found.append(choose(scan(batch=8), H100)))
        thread.start()
        thread.join()
    assert found == [choose(scan(batch=8), H100)]


@pytest.mark.parametrize("kernel", ("Persistent", "", None))
def test_no_such_kernel(kernel: object) -> None:
    with (
        pytest.raises(
            ValueError,
            match=f"expected kernel to be one of {', '.join(plan.KERNELS)}, sequence, got",
        ),
        forced(kernel),  # type: ignore[arg-type]
    ):
        pytest.fail("the block was entered")
