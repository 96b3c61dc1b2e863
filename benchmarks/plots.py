"""The pictures of a results file: speed-up of each case, share of the peak, time against T and H."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.cases import GATES, HIDDEN_SIZES, TIME_STEPS, Case
from benchmarks.figures import Figure
from benchmarks.goals import ENGINES

Document = dict[str, Any]
Row = dict[str, Any]
#: Values of a colour's bars, by case.
Series = dict[str, dict[Case, Figure]]

MODES = {"inference": "inference", "training": "training step"}
COLORS = {
    "inference of torch.nn": "#7fb2d9",
    "training step of torch.nn": "#1f5a8c",
    "inference of the fastest other": "#f0b77d",
    "training step of the fastest other": "#b3631a",
    "inference": "#7fb2d9",
    "training step": "#1f5a8c",
}
AXES = {"T": "T, steps (N 4, H 128)", "H": "H, hidden units (T 50, N 16)"}
CELL_COLORS = {"RNN": "#5b8c3a", "LSTM": "#1f5a8c", "GRU": "#b3631a"}
REFERENCES = ("as fast as rnnkit", "the machine's peak")
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
GREY, RED = "#555555", "#b03030"


def ordinary(document: Document) -> Iterator[tuple[Case, Row]]:
    """The float32 cases with full batches, that rnnkit has right."""
    for row in document["lines"]:
        case = Case(**row["case"])
        plain = case.dtype == "float32" and not case.ragged
        if row["group"] == "cases" and plain and "ratios" in row:
            yield case, row


def speedups(document: Document, cell: str) -> Series:
    series: Series = {name: {} for name in COLORS if " of " in name}
    for case, row in ordinary(document):
        if case.cell != cell:
            continue
        title, ratios = MODES[case.mode], row["ratios"]
        if "torch" in ratios:
            series[f"{title} of torch.nn"][case] = Figure.read(ratios["torch"])
        others = [Figure.read(ratios[name]) for name in ENGINES if name in ratios]
        if others:
            best = min(others, key=lambda figure: figure.median)
            series[f"{title} of the fastest other"][case] = best
    return series


def shares(document: Document, cell: str) -> Series:
    series: Series = {title: {} for title in MODES.values()}
    for case, row in ordinary(document):
        if case.cell == cell and "share" in row:
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
    panel.margins(x=0.01)
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


def legend(picture: Any, panel: Any) -> None:
    """Above all panels, bars before lines."""
    handles, labels = panel.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda index: labels[index] in REFERENCES)
    handles, labels = [handles[i] for i in order], [labels[i] for i in order]
    columns = min(len(labels), 3)
    picture.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)


def speed(document: Document) -> Any:
    picture, panels = by_cell(document, speedups, "{:.1f}", 1)
    for panel in panels:
        panel.set_yscale("log")
    low, high = panels[0].get_ylim()
    low, high = low / 1.1, high * 1.15
    ticks = [tick for tick in TICKS if low <= tick <= high]
    for panel in panels:
        panel.set_ylim(low, high)
        panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.minorticks_off()
        panel.set_ylabel("time over rnnkit's")
        panel.axhline(1, color=RED, linewidth=1.2, linestyle="--", label=REFERENCES[0])
    legend(picture, panels[0])
    return picture


def peak(document: Document) -> Any:
    picture, panels = by_cell(document, shares, "{:.0f}", 0)
    for panel in panels:
        panel.set_ylim(0, 112)
        panel.set_ylabel("% of the brgemm peak")
        panel.axhline(100, color=RED, linewidth=1.2, linestyle="--", label=REFERENCES[1])
    legend(picture, panels[0])
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
    legend(picture, max(grid.flat, key=lambda panel: len(panel.lines)))
    return picture


def pictures(document: Document) -> dict[str, Callable[[Document], Any]]:
    """By file name, those that the document has figures for."""
    rows = [row for _, row in ordinary(document)]
    found: dict[str, Callable[[Document], Any]] = {}
    if any(row["ratios"] for row in rows):
        found["speed.png"] = speed
    if any("share" in row for row in rows):
        found["peak.png"] = peak
    if any(row["group"] in ("T", "H") for row in document["lines"]):
        found["scaling.png"] = scaling
    return found


def draw(document: Document, digest: str, folder: Path, caption: str) -> list[Path]:
    """Writes the pictures, `caption` below; `digest` goes into the files, for --check."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in pictures(document).items():
        picture = make(document)
        picture.supxlabel(caption.replace("; ", "\n"), fontsize=7.5, color=GREY)
        picture.savefig(folder / name, metadata={"Source": digest})
    return [folder / name for name in pictures(document)]
