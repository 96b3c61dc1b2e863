"""What is measured on a GPU: every task once, in parts, the most important first."""

from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.cases import GATES, Case

T_SHORT, T_LONG = 64, 512  # the times of both give that of a step
PARTS = ("main", "extra", "accuracy", "kernels", "triton", "odd", "half", "rnn", "large", "rest")
#: In this order a beginning of a part has every cell, dtype and mode, at sizes far apart.
DTYPES = ("bfloat16", "tf32", "float16", "float32")
HIDDEN = (512, 1024, 256, 650, 128, 2048)
BATCHES = (16, 64, 1, 256)
CELLS = ("LSTM", "GRU", "RNN")
LAYOUTS = ((1, 1), (2, 2))  # layers, directions
MODES = ("inference", "training")
ACCURACY = ((256, 650, 1024), 64, 16)  # H, T, N
QUICK = 24  # tasks
TRITON_HIDDEN = (64, 128, 256, 512, 1024)
TRITON_BATCHES = (1, 16, 64)
GRAPH = (512, 16)  # H, N

LOOP, TRITON = "torch[loop]", "rnnkit[triton]"  # torch.nn without cuDNN; rnnkit forced on Triton
#: Who takes turns in a row of each kind; the last is judged, torch.nn's results are what all are compared with.
PROVIDERS = {
    **dict.fromkeys(("time", "error", "kernels"), ("torch", "rnnkit")),
    "triton": ("torch", LOOP, "rnnkit", TRITON),
    "graph": (TRITON,),
}
TIMED = ("time", "triton", "graph")

SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


class Task(NamedTuple):
    """What makes a row.

    kind: `error` is at the case's T, all others are at both, of which the case has the longer; `triton` are times
        beside rnnkit's Triton kernels, `graph` those of their stepwise design in a CUDA graph.
    """

    part: str
    kind: str
    case: Case

    @property
    def providers(self) -> tuple[str, ...]:
        return PROVIDERS[self.kind]

    def __str__(self) -> str:
        return name(self.case) if self.kind == "time" else f"{self.kind} {name(self.case)}"


def name(case: Case) -> str:
    """What --only is matched with, and the tables call a case: no T, since a row has two."""
    parts = [case.cell, SHORT.get(case.dtype, case.dtype), f"H{case.H}", f"N{case.N}"]
    parts += [f"{case.layers}x{case.directions}"] if case.layers * case.directions > 1 else []
    parts += [f"P{case.projection}"] if case.projection else []
    parts += ["ragged"] if case.ragged else []
    return " ".join([*parts, case.mode])


def part(case: Case) -> str:
    """Of the grid's cases."""
    if case.dtype == "float32" or (case.H == 128 and case.dtype != "float16"):
        return "rest"
    if case.N > 64 or case.H > 1024:
        return "large"
    if case.cell == "RNN":
        return "rnn"
    if case.dtype == "float16":
        return "half"
    return "odd" if case.H % 128 or case.layers > 1 else "main"


def grid() -> Iterator[Case]:
    """Sizes along the diagonals of H and N, so that no beginning has one of them alone."""
    for shift in range(len(BATCHES)):
        for place, H in enumerate(HIDDEN):
            N = BATCHES[(place + shift) % len(BATCHES)]
            for layers, directions in LAYOUTS:
                for dtype in DTYPES:
                    for cell in CELLS:
                        for mode in MODES:
                            yield Case(cell, mode, T_LONG, N, H, H, layers, directions, 0, dtype)


def extra() -> Iterator[Case]:
    """Ragged batches and projections."""
    for mode in MODES:
        for cell in ("LSTM", "GRU"):
            yield Case(cell, mode, T_LONG, 64, 512, 512, dtype="bfloat16", ragged=True)
        for N in (16, 64):
            yield Case("LSTM", mode, T_LONG, N, 512, 512, projection=256, dtype="bfloat16")


def accuracy() -> Iterator[Case]:
    sizes, T, N = ACCURACY
    for H in sizes:
        for dtype in DTYPES:
            for cell in GATES:
                yield Case(cell, "training", T, N, H, H, dtype=dtype)


def kernels() -> Iterator[Case]:
    """Whose recurrent kernels have a goal."""
    for H in (256, 512, 1024):
        for N in (16, 64):
            for dtype in ("bfloat16", "tf32"):
                for mode in MODES:
                    yield Case("LSTM", mode, T_LONG, N, H, H, dtype=dtype)


def triton() -> Iterator[Case]:
    """Every size in bfloat16, every other one in one more dtype: each dtype is a compilation of its own."""
    for shift, other in enumerate(("tf32", "float16", "float32")):
        for place, H in enumerate(TRITON_HIDDEN):
            N = TRITON_BATCHES[(place + shift) % len(TRITON_BATCHES)]
            for dtype in ("bfloat16", other)[: 2 - (place + shift) % 2]:
                for cell in CELLS:
                    for mode in MODES:
                        yield Case(cell, mode, T_LONG, N, H, H, dtype=dtype)


def graphs() -> Iterator[Case]:
    """Where the launches of a step are to cost little."""
    H, N = GRAPH
    for cell in CELLS:
        for mode in MODES:
            yield Case(cell, mode, T_LONG, N, H, H, dtype="bfloat16")


def tasks() -> list[Task]:
    """All, by importance."""
    found = [Task(part(case), "time", case) for case in grid()]
    found += [Task("extra", "time", case) for case in extra()]
    found += [Task("accuracy", "error", case) for case in accuracy()]
    found += [Task("kernels", "kernels", case) for case in kernels()]
    found += [Task("triton", "graph", case) for case in graphs()]
    found += [Task("triton", "triton", case) for case in triton()]
    return sorted(found, key=lambda task: PARTS.index(task.part))
