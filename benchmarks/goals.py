"""The goals that rnnkit's speed and memory are held to, and what a results file says of each."""

import math
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from benchmarks import readout
from benchmarks.cases import FROZEN, GATES, ONE_THREAD, TIME_STEPS, Case
from benchmarks.figures import Figure, significant

Document = dict[str, Any]
Row = dict[str, Any]
#: By case; None where rnnkit has no right result to be timed.
Figures = dict[str, Figure | None]

MET, MISSED, NOISY, NOT_MEASURED = "met", "missed", "noisy", "not measured"
ENGINES = ("onnxruntime", "openvino", "jax")
GRU_AND_RNN = ("GRU", "RNN")
FORMS = {"×": "{:.2f}", " %": "{:.0f}", " µs": "{:.3g}"}  # by unit
NAMED = 3  # cases without a right result; the others are counted
BFLOAT16_FEATURES = {"avx512_bf16", "amx_bf16", "bf16"}


class Goal(NamedTuple):
    """A row of the table.

    figures: what is judged, from the results.
    every: bound of each case, if there is one; `at_most` says on which side.
    mean: least geometric mean.
    optimistic: judge by the better quartile, where the bound is a tie that only noise decides.
    noise: the share of cases that may be noisy, and are left out, before the verdict is.
    """

    what: str
    figures: Callable[[Document], Figures]
    every: float | None = None
    mean: float | None = None
    at_most: bool = False
    optimistic: bool = False
    unit: str = "×"
    noise: float = 0.0

    def bound(self) -> str:
        every = f"{'≤' if self.at_most else '≥'} {self.every:g}{self.unit}" if self.every else ""
        if self.mean is None:
            return every
        mean = f"geometric mean ≥ {self.mean:g}{self.unit}"
        return f"{mean}, every case {every}" if every else mean

    def text(self, value: float) -> str:
        return (FORMS[self.unit] + self.unit).format(value)

    def judged(self, figure: Figure) -> float:
        if not self.optimistic:
            return figure.median
        return figure.low if self.at_most else figure.high

    def holds(self, value: float) -> bool:
        if self.every is None:
            return True
        shown = round(value, 2)
        return shown <= self.every if self.at_most else shown >= self.every


def rows(document: Document, group: str, **wanted: Any) -> Iterator[tuple[Case, Row]]:
    for row in document["lines"]:
        case = Case(**row["case"])
        if row["group"] == group and all(getattr(case, k) == v for k, v in wanted.items()):
            yield case, row


def right(row: Row, entry: str = "rnnkit") -> bool:
    """Whether it has a result; an entry that was not asked for lacks none."""
    return "ms" in row["entries"].get(entry, {} if entry == "rnnkit" else {"ms": None})


def ratios(
    entry: str,
    group: str = "cases",
    least: tuple[int, int] = (0, 0),
    cells: Collection[str] = tuple(GATES),
    **wanted: Any,
) -> Callable[[Document], Figures]:
    """Times of `entry` over rnnkit's, of ordinary float32 cases unless `wanted` says other; least N and H."""
    wanted = {"dtype": "float32", "ragged": False} | wanted

    def figures(document: Document) -> Figures:
        found: Figures = {}
        for case, row in rows(document, group, **wanted):
            if least[0] > case.N or least[1] > case.H or case.cell not in cells:
                continue
            if not right(row):
                found[str(case)] = None
            elif entry in row["ratios"]:
                found[str(case)] = Figure.read(row["ratios"][entry])
        return found

    return figures


def held(document: Document, provider: str) -> bool:
    """Whether it was held to the run's ISA, or nothing was."""
    return provider not in (document.get("held") or {}).get("not held", {})


def engine_ratios(document: Document, row: Row) -> dict[str, Figure]:
    """Times of the inference engines that were held to the run's ISA over rnnkit's.

    Of engines that pack weights ahead, over those of rnnkit with weights packed ahead.
    """
    found = row.get("ratios", {}) | row.get("frozen", {})
    return {e: Figure.read(found[e]) for e in ENGINES if e in found and held(document, e)}


def over_best_engine(document: Document) -> Figures:
    """Ratios to the fastest of the engines that have the case right; none of files without frozen layers."""
    found: Figures = {}
    if not any("frozen" in row for row in document["lines"]):
        return found
    for case, row in rows(document, "cases", mode="inference", dtype="float32", ragged=False):
        present = engine_ratios(document, row)
        if not (right(row) and right(row, FROZEN)):
            found[str(case)] = None
        elif present:
            found[str(case)] = min(present.values(), key=lambda figure: figure.median)
    return found


def shares(mode: str) -> Callable[[Document], Figures]:
    """Share of the peak of the units that multiply and add at H ≥ 256, N ≥ 16, in percent.

    None of files without rooflines, whose peak is another.
    """

    def figures(document: Document) -> Figures:
        return {
            str(case): Figure.read(row["share"]).scaled(100)
            for case, row in rows(document, "cases", mode=mode, dtype="float32", ragged=False)
            if case.N >= 16 and case.H >= 256 and "roofline" in row
        }

    return figures


def single_steps(records: bool) -> Callable[[Document], Figures]:
    """torch.nn's times over rnnkit's of one step of one row, by layers and by cells, with gradients or without."""

    def figures(document: Document) -> Figures:
        return {
            str(case): (Figure.read(row["ratios"]["torch"]) if right(row) else None)
            for group in ("cases", "streaming")
            for case, row in rows(document, group, T=1, N=1, dtype="float32", records=records)
            if not right(row) or "torch" in row["ratios"]
        }

    return figures


def ragged(group: str) -> Callable[[Document], Figures]:
    """Time over that of the dense batch, times the part of the rows that is filled."""

    def figures(document: Document) -> Figures:
        dense = ratios("rnnkit dense", group, ragged=True)(document)
        filled = {str(c): c.rows / (c.T * c.N) for c, _ in rows(document, group, ragged=True)}
        return {
            case: figure and figure.scaled(filled[case]).inverse() for case, figure in dense.items()
        }

    return figures


def over_none(group: str) -> Callable[[Document], Figures]:
    """Time with what the group is about over that without."""
    without = ratios("rnnkit without", group)
    return lambda document: {
        case: figure and figure.inverse() for case, figure in without(document).items()
    }


def linearity(document: Document) -> Figures:
    """Time of a step among many over that among the fewest."""
    found: Figures = {}
    for T in TIME_STEPS[1:]:
        for case, figure in ratios(f"rnnkit T{T}", group="T")(document).items():
            if figure:
                figure = figure.scaled(TIME_STEPS[0] / T)
            found[case.replace(f"T{TIME_STEPS[0]}", f"T{T}")] = figure
    return found


def memory(entry: str) -> Callable[[Document], Figures]:
    """Peak bytes of `entry` over torch.nn's."""

    def figures(document: Document) -> Figures:
        found: Figures = {}
        for case, row in rows(document, "memory"):
            pair = [row.get("memory", {}).get(name, {}).get("bytes") for name in (entry, "torch")]
            if all(pair) and pair[1]["median"]:
                own, torch = map(Figure.read, pair)
                found[str(case)] = own.scaled(1 / torch.median)
        return found

    return figures


def of_readout(kind: str) -> Callable[[Document], Figures]:
    """What `Readout.loss` takes over what linear and cross_entropy with all logits take."""

    def figures(document: Document) -> Figures:
        told = document.get("readout", {})
        if kind not in told:  # not asked for, or not enough memory for all logits
            return {}
        return {told["case"]: Figure.read(told[kind][readout.OWN]["ratio"])}

    return figures


def multiplies_bfloat16(document: Document) -> bool:
    return bool(BFLOAT16_FEATURES & set(document["device"].get("features", ())))


def bfloat16_over(entry: str) -> Callable[[Document], Figures]:
    """Ratios in bfloat16 at H ≥ 256; none on CPUs without its instructions."""
    figures = ratios(entry, least=(0, 256), dtype="bfloat16")
    return lambda document: figures(document) if multiplies_bfloat16(document) else {}


#: Of what rnnkit has beyond torch.nn, over what does without.
OF_FEATURES = (
    Goal(
        'GRU training, update_gate "writes" over "keeps"',
        ratios("rnnkit update_gate", "features"),
        1.02,
        at_most=True,
    ),
    Goal(
        "training with grad_clip over without",
        ratios("rnnkit grad_clip", "features"),
        1.03,
        at_most=True,
    ),
    Goal(
        "training step under gradient_flow over without",
        ratios("rnnkit gradient_flow", "features"),
        1.2,
        at_most=True,
    ),
    Goal(
        "LSTM training with all_states over without",
        ratios("rnnkit all_states", "features"),
        1.1,
        at_most=True,
    ),
    Goal(
        "training with learn_initial_state over without",
        ratios("rnnkit learn_initial_state", "features"),
        1.03,
        at_most=True,
    ),
    *(
        Goal(
            f"training with {name} over without",
            ratios(f"rnnkit {name}", "features"),
            1.25,
            at_most=True,
        )
        for name in ("weight_dropout", "recurrent_dropout", "zoneout")
    ),
    Goal("training with 3 % resets over without", over_none("resets"), 1.05, at_most=True),
    Goal("a loop over torch.nn's cells over resets", ratios("torch loop", "resets"), 3.0),
    Goal("torch.nn on split segments over resets", ratios("torch split", "resets"), 1.5),
    Goal("training with layer_norm over without", over_none("layer_norm"), 1.6, at_most=True),
    Goal("a loop of torch's functions over layer_norm", ratios("torch loop", "layer_norm"), 4.0),
    Goal("`lengths` over its part of the dense time", ragged("lengths"), 1.15, at_most=True),
    Goal("Readout.loss over all logits, time", of_readout("ms"), 1.1, at_most=True),
    Goal("Readout.loss over all logits, memory", of_readout("MiB"), 0.125, at_most=True),
)
FEATURE_GOALS = frozenset(goal.what for goal in OF_FEATURES)

GOALS = (
    Goal(
        "LSTM training over torch.nn", ratios("torch", cell="LSTM", mode="training"), 1.0, mean=1.3
    ),
    Goal(
        "LSTM inference over torch.nn",
        ratios("torch", cell="LSTM", mode="inference"),
        1.0,
        mean=1.2,
    ),
    Goal(
        "GRU and RNN training over torch.nn",
        ratios("torch", cells=GRU_AND_RNN, mode="training"),
        1.3,
        mean=2.5,
    ),
    Goal(
        "GRU and RNN inference over torch.nn",
        ratios("torch", cells=GRU_AND_RNN, mode="inference"),
        1.2,
        mean=2.0,
    ),
    Goal(
        "inference over the best of ONNX Runtime, OpenVINO, JAX", over_best_engine, 0.95, mean=1.2
    ),
    Goal("training over JAX", ratios("jax", mode="training"), 1.2),
    Goal("share of the FMA peak, inference, H ≥ 256, N ≥ 16", shares("inference"), 85, unit=" %"),
    Goal("share of the FMA peak, training, H ≥ 256, N ≥ 16", shares("training"), 80, unit=" %"),
    Goal("one step, one row, without gradients, over torch.nn", single_steps(records=False), 1.2),
    Goal("one step, one row, with gradients, over torch.nn", single_steps(records=True), 1.2),
    Goal("bfloat16 over rnnkit's float32, H ≥ 256", bfloat16_over("rnnkit float32"), 1.6),
    Goal("bfloat16 over torch.nn's, H ≥ 256", bfloat16_over("torch"), 1.2),
    Goal("ragged batch over its part of the dense time", ragged("cases"), 1.15, at_most=True),
    Goal("all threads over one, H ≥ 256", ratios(ONE_THREAD, least=(0, 256)), 1.7),
    Goal("all threads over one, every case", ratios(ONE_THREAD), 1, optimistic=True),
    Goal("time of a step, T 1 000 and 10 000 over 100", linearity, 1.1, at_most=True),
    Goal("peak memory of a training step over torch.nn's", memory("rnnkit"), 0.7, at_most=True),
    Goal("the same with recompute", memory("rnnkit recompute"), 0.3, at_most=True),
    Goal(
        "compiled call over the eager one",
        ratios("rnnkit compiled", "compiled"),
        1.05,
        at_most=True,
    ),
    Goal("time with recompute", ratios("rnnkit recompute", "memory"), 1.5, at_most=True),
    *OF_FEATURES,
)


def judge(goal: Goal, document: Document) -> Row:
    """The goal's row: figures of the cases that can be trusted, and the verdict on all of them."""
    figures = goal.figures(document)
    wrong = [case for case, figure in figures.items() if figure is None]
    noisy = [case for case, figure in figures.items() if figure and figure.noisy]
    trusted = {c: figure for c, figure in figures.items() if figure and not figure.noisy}
    told: Row = {"what": goal.what, "goal": goal.bound(), "cases": len(figures)}
    told |= {"noisy": noisy, "wrong": wrong, "mean": None, "worst": None, "missed": {}}
    missed = bool(wrong)
    uncertain = len(noisy) > goal.noise * len(figures)
    if trusted:
        values = {case: goal.judged(figure) for case, figure in trusted.items()}
        worst = (max if goal.at_most else min)(values, key=values.__getitem__)
        told["worst"] = {"case": worst, "value": significant(values[worst])}
        missing = {case: value for case, value in values.items() if not goal.holds(value)}
        told["missed"] = {case: goal.text(value) for case, value in missing.items()}
        missed = missed or bool(missing)
        mean = math.exp(sum(math.log(f.median) for f in trusted.values()) / len(trusted))
        if goal.mean is not None:
            told["mean"] = significant(mean)
            missed = missed or (not uncertain and mean < goal.mean)
    told["verdict"] = MISSED if missed else NOISY if uncertain else MET if trusted else NOT_MEASURED
    told["figure"] = figure_text(goal, told)
    return told


def figure_text(goal: Goal, told: Row) -> str:
    """What was measured, in words; the worst case beside it."""
    parts = []
    if told["mean"] is not None:
        parts.append(f"geometric mean {goal.text(told['mean'])}")
    if worst := told["worst"]:
        parts.append(f"worst {goal.text(worst['value'])}: {worst['case']}")
    if told["noisy"]:
        parts.append(f"{len(told['noisy'])} of {told['cases']} noisy")
    if told["wrong"]:
        more = len(told["wrong"]) - NAMED
        names = told["wrong"][:NAMED] + ([f"{more} more"] if more > 0 else [])
        parts.append(f"rnnkit has no right result: {', '.join(names)}")
    return "; ".join(parts) or "–"


def judge_all(document: Document) -> list[Row]:
    return [judge(goal, document) for goal in GOALS]
