"""The pictures of results files: speed-up by cell and ISA, share of the peak, time against T and H."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import GATES, HIDDEN_SIZES, TIME_STEPS, Case
from benchmarks.figures import Figure
from benchmarks.results import isa_of
from benchmarks.summary import CELLS, latest, over
from benchmarks.tables import Document, Row, isa_title, machine, where

#: Values of a colour's bars, by case.
Series = dict[str, dict[Case, Figure]]

MODES = {"inference": "inference", "training": "training step"}
COLORS = {"inference": "#7fb2d9", "training step": "#1f5a8c"}
ISA_COLORS = {"avx512": "#1f5a8c", "avx2": "#7fb2d9", "baseline": "#f0b77d"}
AXES = {"T": "T, steps (N 4, H 128)", "H": "H, hidden units (T 50, N 16)"}
CELL_COLORS = {"RNN": "#5b8c3a", "LSTM": "#1f5a8c", "GRU": "#b3631a"}
RANGE = "worst to best case"
REFERENCES = (RANGE, "as fast as torch.nn", "the machine's peak")
TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100)
GREY, RED = "#555555", "#b03030"


def ordinary(document: Document) -> Iterator[tuple[Case, Row]]:
    """The float32 cases with full batches, that rnnkit has right."""
    for row in document["lines"]:
        case = Case(**row["case"])
        plain = case.dtype == "float32" and not case.ragged
        if row["group"] == "cases" and plain and "ratios" in row:
            yield case, row


def shares(document: Document, cell: str) -> Series:
    series: Series = {title: {} for title in MODES.values()}
    for case, row in ordinary(document):
        if case.cell == cell and "roofline" in row:
            series[MODES[case.mode]][case] = Figure.read(row["share"]).scaled(100)
    return series


def label(case: Case) -> str:
    return case.sizes("T{} N{}\n{}H{}").replace(", ", ",\n")


def bars(panel: Any, series: Series, form: str, base: float) -> None:
    """For each case a bar a series from `base`, its quartiles and value; where it is noisy, the word alone."""
    labels = list(dict.fromkeys(label(case) for values in series.values() for case in values))
    width = 0.84 / len(series)
    above = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "fontsize": 7}
    for index, (name, values) in enumerate(series.items()):
        shift = (index - (len(series) - 1) / 2) * width
        places = {case: labels.index(label(case)) + shift for case in values}
        quiet = {places[case]: figure for case, figure in values.items() if not figure.noisy}
        heights = [figure.median - base for figure in quiet.values()]
        panel.bar(list(quiet), heights, 0.94 * width, base, color=COLORS[name], label=name)
        for at, figure in quiet.items():
            panel.plot([at, at], [figure.low, figure.high], color="#222222", linewidth=1)
            panel.annotate(figure.text(form), (at, max(figure.high, base)), **above)
        for case, figure in values.items():
            if figure.noisy:
                panel.annotate("noisy", (places[case], base), rotation=90, **above)
    panel.set_xticks(range(len(labels)), labels, fontsize=8)
    panel.set_xlim(-0.5, len(labels) - 0.5)
    panel.spines[["top", "right"]].set_visible(False)


def by_cell(
    document: Document, series: Callable[[Document, str], Series], form: str, base: float
) -> tuple[Any, list[Any]]:
    """A picture with a panel of bars for each cell."""
    from matplotlib.figure import Figure as Picture

    of_cells = {cell: series(document, cell) for cell in GATES}
    of_cells = {cell: found for cell, found in of_cells.items() if any(found.values())}
    count = max(len({label(c) for v in found.values() for c in v}) for found in of_cells.values())
    size = (max(7.5, 1.3 * count + 1), 2.9 * len(of_cells) + 1)
    picture = Picture(figsize=size, dpi=120, layout="constrained")
    panels = list(picture.subplots(len(of_cells), 1, sharey=True, squeeze=False)[:, 0])
    for panel, (cell, found) in zip(panels, of_cells.items(), strict=True):
        bars(panel, {name: values for name, values in found.items() if values}, form, base)
        panel.set_title(cell, fontsize=11, loc="left")
    return picture, panels


def legend(picture: Any, panels: Sequence[Any]) -> None:
    """Of all panels, above them, bars before lines."""
    named: dict[str, Any] = {}
    for panel in panels:
        named |= dict(zip(*panel.get_legend_handles_labels()[::-1], strict=True))
    labels, handles = list(named), list(named.values())
    order = sorted(range(len(labels)), key=lambda index: labels[index] in REFERENCES)
    handles, labels = [handles[i] for i in order], [labels[i] for i in order]
    columns = min(len(labels), 3)
    picture.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)


def machine_bars(panel: Any, documents: Sequence[Document]) -> None:
    """A bar for each cell and ISA of one machine: the geometric mean, and a line from the worst case to the best."""
    width = 0.8 / len(documents)
    for index, document in enumerate(documents):
        shift = (index - (len(documents) - 1) / 2) * width
        label, color = isa_title(document), ISA_COLORS[isa_of(document)]
        for place, cell in enumerate(CELLS):
            if spread := over(document, "torch", cell, "training"):
                at = place + shift
                panel.bar(at, spread.mean - 1, 0.9 * width, 1, color=color, label=label)
                ends = [spread.worst, spread.best]
                panel.plot([at, at], ends, color="#222222", linewidth=1, label=RANGE)
                panel.annotate(
                    f"{spread.mean:.1f}×",
                    (at, max(spread.mean, 1)),
                    xytext=(-4, 3),
                    textcoords="offset points",
                    ha="right",
                )
                label = ""
    panel.set_xticks(range(len(CELLS)), CELLS)
    panel.set_title(machine(documents[0]), fontsize=10, loc="left")
    panel.spines[["top", "right"]].set_visible(False)


def speed(documents: Sequence[Document]) -> Any:
    """The training step over torch.nn's, of the CPU measured last."""
    from matplotlib.figure import Figure as Picture

    machines: dict[str, list[Document]] = {}
    for document in latest(documents):
        machines.setdefault(machine(document), []).append(document)
    picture = Picture(figsize=(max(6.5, 5 * len(machines)), 3.6), dpi=120, layout="constrained")
    panels = list(picture.subplots(1, len(machines), sharey=True, squeeze=False)[0])
    for panel, of_machine in zip(panels, machines.values(), strict=True):
        machine_bars(panel, of_machine)
        panel.set_yscale("log")
        panel.axhline(1, color=RED, linewidth=1.2, linestyle="--", label=REFERENCES[1])
    low, high = panels[0].get_ylim()
    low, high = low / 1.05, high * 1.2
    ticks = [tick for tick in TICKS if low <= tick <= high]
    for panel in panels:
        panel.set_ylim(low, high)
        panel.set_yticks(ticks, [f"{tick:g}×" for tick in ticks])
        panel.minorticks_off()
    panels[0].set_ylabel("torch.nn's training step over rnnkit's")
    legend(picture, panels)
    return picture


def peak(document: Document) -> Any:
    picture, panels = by_cell(document, shares, "{:.0f}", 0)
    for panel in panels:
        panel.set_ylim(0, 112)
        panel.set_ylabel("% of the FMA peak")
        panel.axhline(100, color=RED, linewidth=1.2, linestyle="--", label=REFERENCES[2])
    legend(picture, panels)
    return picture


def points(document: Document, group: str, cell: str, mode: str) -> dict[str, dict[int, float]]:
    """Milliseconds of rnnkit and torch.nn over T or H, from the figures that can be trusted."""
    found: dict[str, dict[int, float]] = {}
    for row in document["lines"]:
        case = Case(**row["case"])
        if (row["group"], case.cell, case.mode) != (group, cell, mode):
            continue
        for name, told in row["entries"].items():
            provider, _, steps = name.partition(" T")
            if "ms" in told and not (figure := Figure.read(told["ms"])).noisy:
                size = int(steps or case.T) if group == "T" else case.H
                found.setdefault(provider, {})[size] = figure.median
    return found


def curves(panel: Any, document: Document, group: str, mode: str) -> None:
    """A line for each cell and provider, on log axes."""
    for cell, color in CELL_COLORS.items():
        for provider, values in points(document, group, cell, mode).items():
            style = "o-" if provider == "rnnkit" else "s--"
            name = f"{cell}, {'rnnkit' if provider == 'rnnkit' else 'torch.nn'}"
            x = sorted(values)
            panel.loglog(x, [values[at] for at in x], style, color=color, label=name)
    ticks = TIME_STEPS if group == "T" else HIDDEN_SIZES
    panel.set_xticks(ticks, [f"{tick:,}".replace(",", " ") for tick in ticks])
    panel.minorticks_off()
    panel.set_xlabel(AXES[group])
    panel.set_ylabel("ms")
    panel.set_title(MODES[mode], fontsize=11, loc="left")
    panel.grid(True, color="#dddddd", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def scaling(document: Document) -> Any:
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(10, 8), dpi=120, layout="constrained")
    grid = picture.subplots(len(MODES), len(AXES), squeeze=False)
    for line, mode in zip(grid, MODES, strict=True):
        for panel, group in zip(line, AXES, strict=True):
            curves(panel, document, group, mode)
    legend(picture, list(grid.flat))
    return picture


def pictures(documents: Sequence[Document]) -> dict[str, Callable[[], Any]]:
    """By file name, those that there are figures for; the first document has the pictures of one run alone."""
    first = documents[0]
    found: dict[str, Callable[[], Any]] = {"speed.png": lambda: speed(documents)}
    if any("roofline" in row for _, row in ordinary(first)):
        found["peak.png"] = lambda: captioned(peak(first), first)
    if any(row["group"] in ("T", "H") for row in first["lines"]):
        found["scaling.png"] = lambda: captioned(scaling(first), first)
    return found


def captioned(picture: Any, document: Document) -> Any:
    picture.supxlabel(where(document).replace("; ", "\n"), fontsize=7.5, color=GREY)
    return picture


def draw(documents: Sequence[Document], digest: str, folder: Path) -> list[Path]:
    """Writes the pictures; `digest` goes into the files, for --check."""
    folder.mkdir(parents=True, exist_ok=True)
    made = pictures(documents)
    for name, picture in made.items():
        picture().savefig(folder / name, metadata={"Source": digest})
    return [folder / name for name in made]
