"""The part of README.md that is written from results: a picture, a table, what rnnkit is not ahead in, the GPU."""

import statistics
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from benchmarks import goals
from benchmarks.cases import Case
from benchmarks.figures import Figure
from benchmarks.goals import judge
from benchmarks.gpu import goals as gpu_goals
from benchmarks.tables import TITLES, Document, isa_title, machine, markdown

CELLS = ("LSTM", "GRU", "RNN")  # the ones used most first
MOST_ROWS = 9


class Spread(NamedTuple):
    """Ratios of several cases: geometric mean, worst and best."""

    mean: float
    worst: float
    best: float

    @classmethod
    def of(cls, figures: Collection[Figure | None]) -> "Spread | None":
        """Of those that can be trusted."""
        values = [figure.median for figure in figures if figure and not figure.noisy]
        if not values:
            return None
        return cls(statistics.geometric_mean(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.mean:.2f}× ({self.worst:.2f}–{self.best:.2f})"


def over(document: Document, peer: str, cell: str, mode: str) -> Spread | None:
    """A peer's time over rnnkit's, in ordinary float32 cases."""
    return Spread.of(goals.ratios(peer, cell=cell, mode=mode)(document).values())


def over_engines(document: Document, cell: str) -> Spread | None:
    found = goals.over_best_engine(document)
    return Spread.of([f for case, f in found.items() if case.startswith(f"{cell} ")])


def latest(documents: Sequence[Document]) -> list[Document]:
    """Those of the CPU measured last, and of others of that day, as the table has room for; `documents` in order."""
    first = documents[0]
    days: dict[str, str] = {}
    for document in documents:
        days.setdefault(machine(document), document["date"][:10])
        days[machine(document)] = max(days[machine(document)], document["date"][:10])
    shown = [d for d in documents if days[machine(d)] == days[machine(first)]]
    return shown[: MOST_ROWS // len(CELLS)]


def table(documents: Sequence[Document]) -> list[str]:
    head = ["", "", "training over torch.nn", "inference over torch.nn"]
    lines = [[*head, "training over JAX", "inference over the fastest engine"]]
    several = len({machine(document) for document in documents}) > 1
    for document in documents:
        name = f"{document['device']['name']}, " if several else ""
        for cell in CELLS:
            spreads = [over(document, "torch", cell, mode) for mode in ("training", "inference")]
            spreads += [over(document, "jax", cell, "training"), over_engines(document, cell)]
            told = [str(spread) if spread else "–" for spread in spreads]
            lines.append([f"{name}{isa_title(document)}", cell, *told])
    return markdown(lines, left=2)


def comparisons(document: Document) -> Iterator[tuple[str, Figure]]:
    """Every peer's time over rnnkit's, of engines that pack ahead over the frozen layer, with who it is and how."""
    for row in document["lines"]:
        if row["group"] not in ("cases", "streaming"):
            continue
        case = Case(**row["case"])
        dtype = "" if case.dtype == "float32" else f" in {case.dtype}"
        ratios = row.get("ratios", {}) | row.get("frozen", {})
        for peer in TITLES.keys() & ratios.keys():
            isa = isa_title(document)
            unheld = (
                ""
                if goals.held(document, peer)
                else f", which runs on all the CPU's instructions here, not held to {isa} as the others"
            )
            yield f"{TITLES[peer]}{dtype}{unheld}", Figure.read(ratios[peer])


def not_ahead(documents: Sequence[Document]) -> str:
    """The sentence on the comparisons in which rnnkit is slower: how many, and the worst, for each peer."""
    found = [pair for document in documents for pair in comparisons(document)]
    trusted = [(kind, figure) for kind, figure in found if not figure.noisy]
    behind: dict[str, list[float]] = {}
    for kind, figure in trusted:
        if figure.median < 1:
            behind.setdefault(kind, []).append(figure.median)
    noisy = len(found) - len(trusted)
    beside = f" ({noisy} more are too noisy to tell)" if noisy else ""
    if not behind:
        return f"rnnkit is ahead in all {len(trusted)} comparisons{beside}."
    told = [
        f"{len(ratios)} with {kind} (worst {min(ratios):.2f}×)"
        for kind, ratios in sorted(behind.items(), key=lambda k: (min(k[1]), k[0]))
    ]
    total = sum(map(len, behind.values()))
    return (
        f"rnnkit is not ahead in {total} of {len(trusted)} comparisons{beside}: {'; '.join(told)}."
    )


def sizes(documents: Sequence[Document]) -> str:
    """The range of the cases' sizes."""
    cases = [
        Case(**row["case"]) for d in documents for row in d["lines"] if row["group"] == "cases"
    ]
    ranges = {
        "steps": [case.T for case in cases],
        "rows": [case.N for case in cases],
        "hidden units": [case.H for case in cases],
    }
    return ", ".join(
        f"{min(values)} to {max(values)} {what}" for what, values in ranges.items() if values
    )


def gpu_line(document: Document | None) -> str:
    if document is None:
        return "On a GPU: not yet measured."
    forward, training = (judge(goal, document)["mean"] for goal in gpu_goals.GOALS[:2])
    told = [
        f"{mean:.2f} times as long {what}"
        for what, mean in (("forward", forward), ("in training", training))
        if mean is not None
    ]
    if not told:
        return f"On a GPU ({document['device']['name']}): no sizes that goals are set for."
    return (
        f"On a GPU ({document['device']['name']}) torch.nn, which is cuDNN there, takes {' and '.join(told)} "
        f"(geometric means; bf16 and TF32, {gpu_goals.REGIME})."
    )


def text(documents: Sequence[Document], gpu: Document | None, picture: str, page: str) -> str:
    """What stands between the markers; `picture` and `page` are paths from the README's folder.

    documents: of each CPU and ISA, the CPU measured last first.
    """
    shown = latest(documents)
    measured = {machine(document): document["date"][:10] for document in reversed(shown)}
    where = "; ".join(f"{name}, {day}" for name, day in measured.items())
    about = (
        "How many times as long as rnnkit others take: the geometric mean, and in parentheses the worst and the best "
        f"case, in float32, {sizes(shown)} ({where})."
    )
    parts = [f"![Training step, torch.nn's time over rnnkit's]({picture})", about]
    parts += ["\n".join(table(shown)), not_ahead(shown), gpu_line(gpu)]
    parts += [
        f"Every case and goal, met or missed, is in [{page}]({page}); `make bench` measures your machine."
    ]
    return "\n\n".join(parts)
