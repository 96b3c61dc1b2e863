"""The goals that rnnkit's speed on a GPU is held to, as rows like those of benchmarks/goals.py."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from benchmarks.cases import Case
from benchmarks.figures import TRUSTED_ROUNDS, Figure
from benchmarks.goals import Document, Figures, Goal, judge
from benchmarks.gpu.grid import GRAPH, LOOP, PROVIDERS, T_LONG, T_SHORT, TRITON, name

Row = dict[str, Any]
Wanted = Callable[[Case], bool]

NOISE = 0.25  # of hundreds of cases some are always disturbed
#: µs of a step of LSTM's recurrent kernel in bfloat16, forward and backward, by H and the largest N.
STEP_GOALS: dict[tuple[int, int], tuple[float, float | None]] = {
    (256, 16): (1.5, 2.0),
    (256, 64): (1.8, 2.8),
    (512, 16): (1.8, 2.6),
    (512, 64): (2.5, 5.0),
    (1024, 16): (2.3, 5.0),
    (1024, 64): (5.0, None),  # backward is stepwise there
}
#: How much longer a dtype may take.
STEP_FACTORS = {"bfloat16": 1.0, "tf32": 2.0}


def rows(document: Document, kind: str) -> Iterator[tuple[Case, Row]]:
    for row in document["rows"]:
        if row["kind"] == kind:
            yield Case(**row["case"]), row


def right(row: Row, provider: str = "") -> bool:
    """Whether rnnkit has a result, or no room for one where torch.nn has none either, or does not run here.

    provider: which rnnkit, if not the one that rows of this kind judge.
    """
    own = row["entries"][provider or PROVIDERS[row["kind"]][-1]]
    peer = row["entries"].get("torch", {})
    return "wrong" not in own and "failed" not in own and ("memory" not in own or "memory" in peer)


def speedups(wanted: Wanted, peer: str = "") -> Callable[[Document], Figures]:
    """torch.nn's whole time over rnnkit's, at either T; nothing where memory or torch.nn itself fails.

    peer: in its place one of those timed beside rnnkit's Triton kernels, over these.
    """

    def figures(document: Document) -> Figures:
        found: Figures = {}
        for case, row in rows(document, "triton" if peer else "time"):
            if not wanted(case):
                continue
            ratios = row["ratios"].get(peer, {}) if peer else row["ratios"]
            for T in (T_SHORT, T_LONG):
                if not right(row):
                    found[f"{name(case)} T{T}"] = None
                elif figure := ratios.get(str(T)):
                    found[f"{name(case)} T{T}"] = Figure.read(figure)
        return found

    return figures


def slowdowns(wanted: Wanted, peer: str) -> Callable[[Document], Figures]:
    """The Triton kernels' time over a peer's."""

    def figures(document: Document) -> Figures:
        found = speedups(wanted, peer)(document)
        return {case: figure and figure.inverse() for case, figure in found.items()}

    return figures


def replays(backward: bool) -> Callable[[Document], Figures]:
    """µs of a step in a CUDA graph; backward is what training takes beyond inference."""

    def figures(document: Document) -> Figures:
        found: Figures = {}
        graphs = dict(rows(document, "graph"))
        for case, row in graphs.items():
            if case.mode != ("training" if backward else "inference"):
                continue
            parts = [row]
            if backward:
                parts += [graphs.get(replace(case, mode="inference"), row)]
            taken = [step(part, TRITON) for part in parts]
            if not all(map(right, parts)):
                found[name(case)] = None
            elif (figure := difference(taken)) and figure.median > 0:
                found[name(case)] = figure
        return found

    return figures


def difference(figures: list[Figure | None]) -> Figure | None:
    """The first figure less the others; None where one is not there."""
    first, *others = figures
    for other in others:
        first = first and other and first.less(other)
    return first


def step_goal(case: Case, backward: bool) -> float | None:
    """µs; None where there is no goal."""
    factor = STEP_FACTORS.get(case.dtype)
    if factor is None or case.cell != "LSTM" or not plain(case):
        return None
    bounds = {N: goal for (H, N), goal in STEP_GOALS.items() if case.H == H and case.N <= N}
    goal = bounds[min(bounds)][backward] if bounds else None
    return goal and factor * goal


def steps(backward: bool) -> Callable[[Document], Figures]:
    """Time of a recurrent step over its goal; backward is what training takes beyond inference."""

    def figures(document: Document) -> Figures:
        found: Figures = {}
        profiled = dict(rows(document, "kernels"))
        for case, row in profiled.items():
            goal = step_goal(case, backward)
            if goal is None or case.mode != ("training" if backward else "inference"):
                continue
            parts = [row]
            if backward:
                parts += [profiled.get(replace(case, mode="inference"), row)]
            taken = [part["entries"]["rnnkit"].get("recurrent_us", 0) for part in parts]
            value = (taken[0] - sum(taken[1:])) / goal
            if not all(map(right, parts)):
                found[name(case)] = None
            elif value > 0:  # not where the profiler saw nothing
                found[name(case)] = exactly(value)
        return found

    return figures


def step(row: Row | None, provider: str = "rnnkit") -> Figure | None:
    """µs of one."""
    told = row["entries"][provider].get("us", {}).get("step") if row else None
    return Figure.read(told) if told else None


def errors(document: Document) -> Figures:
    """rnnkit's error against float64 over cuDNN's."""
    found: Figures = {}
    for case, row in rows(document, "error"):
        if not right(row):
            found[f"error of {name(case)}"] = None
        for what, ratio in row["ratios"].items():
            if ratio != 0:
                right_one = not math.isnan(ratio)
                found[f"{what} of {name(case)}"] = exactly(ratio) if right_one else None
    return found


def exactly(value: float) -> Figure:
    """Of what has no rounds."""
    return Figure(value, value, value, TRUSTED_ROUNDS)


def plain(case: Case) -> bool:
    return case.layers * case.directions == 1 and not case.ragged and not case.projection


def low(case: Case) -> bool:
    return case.dtype in ("bfloat16", "tf32")


def persistent(case: Case) -> bool:
    """Of the sizes that cuDNN runs step by step and rnnkit need not."""
    return 192 < case.H <= 1024 and case.N <= 64


def of_mode(mode: str) -> Wanted:
    def wanted(case: Case) -> bool:
        dense = not case.ragged and not case.projection
        return case.mode == mode and dense and low(case) and persistent(case)

    return wanted


def uncommon(case: Case) -> bool:
    if case.dtype == "float32" or not persistent(case):
        return False
    return case.cell == "GRU" or case.layers > 1 or case.H % 128 != 0 or case.ragged


def half(case: Case) -> bool:
    """What cuDNN has a persistent kernel for."""
    fits = case.H <= 1024 and case.H % 128 == 0 and case.N <= 64
    return case.dtype == "float16" and plain(case) and fits


def large(case: Case) -> bool:
    return case.N >= 256 and case.H >= 1024


def every(case: Case) -> bool:
    return True


def small(case: Case) -> bool:
    """What cuDNN runs step by step, of the sizes that one Triton program can run."""
    return case.dtype == "bfloat16" and case.H <= 256


REGIME = "192 < H ≤ 1024, N ≤ 64"
GOALS = (
    Goal(f"bf16 and TF32, {REGIME}, forward", speedups(of_mode("inference")), 1, 2, noise=NOISE),
    Goal(f"bf16 and TF32, {REGIME}, training", speedups(of_mode("training")), 1, 1.7, noise=NOISE),
    Goal(f"GRU, 2 layers × 2, odd H, ragged, {REGIME}", speedups(uncommon), mean=2, noise=NOISE),
    Goal("fp16, 1 layer, H % 128 = 0, N ≤ 64", speedups(half), 0.9, noise=NOISE),
    Goal("N 256, H ≥ 1024", speedups(large), 1, noise=NOISE),
    Goal(
        "recurrent step, LSTM, forward, over its goal",
        steps(backward=False),
        1.5,
        at_most=True,
        noise=NOISE,
    ),
    Goal(
        "recurrent step, LSTM, backward, over its goal",
        steps(backward=True),
        1.5,
        at_most=True,
        noise=NOISE,
    ),
    Goal("error against float64 over cuDNN's", errors, 2, at_most=True),
)


GRAPHED = f"Triton step by step in a CUDA graph, bf16, H {GRAPH[0]}, N {GRAPH[1]}, a step"
TRITON_GOALS = (
    Goal(
        "Triton over ATen's loop (torch.nn without cuDNN)",
        speedups(every, LOOP),
        1.5,
        3,
        noise=NOISE,
    ),
    Goal(
        "Triton's time over cuDNN's, bf16, H ≤ 256",
        slowdowns(small, "torch"),
        1.5,
        at_most=True,
        noise=NOISE,
    ),
    Goal(f"{GRAPHED} forward", replays(backward=False), 10, at_most=True, unit=" µs"),
    Goal(f"{GRAPHED} backward", replays(backward=True), 10, at_most=True, unit=" µs"),
)


def judge_all(document: Document) -> list[Row]:
    """Those of Triton only where the document has its rows: older ones have not."""
    has_triton = any(row["part"] == "triton" for row in document["rows"])
    return [judge(goal, document) for goal in GOALS + (TRITON_GOALS if has_triton else ())]
