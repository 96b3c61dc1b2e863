"""The part of docs/performance.md that is written from results: goals, misses and every case of each file."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from benchmarks import readout
from benchmarks.cases import FEATURES, FROZEN, Case
from benchmarks.figures import NOISE_LIMIT, Figure
from benchmarks.goals import FEATURE_GOALS, MISSED, judge_all
from benchmarks.gpu import goals as gpu_goals
from benchmarks.gpu import tables as gpu_tables
from benchmarks.roofline import LEVELS
from benchmarks.tables import (
    TITLES,
    Document,
    Row,
    folded,
    isa_title,
    machine,
    markdown,
    milliseconds,
    ratio,
    where,
)

READING = (
    "Times are medians of rounds in which all take turns. Under a name stands its time over rnnkit's: above 1 rnnkit "
    "is faster. ONNX Runtime and OpenVINO pack weights ahead and stand over rnnkit's frozen layer, all others over the "
    f"ordinary one. float32 where nothing else is said. A figure whose quartiles lie over {NOISE_LIMIT:.0%} of the "
    "median apart is called noisy and not judged."
)
ROOFLINE = (
    "*Bound* is what a roofline allows, as a share of the peak of the units that multiply and add: a call takes at "
    "least its operations over that peak, and at least the time of reading the recurrent weights once a step, in "
    "training twice. It is told for weights that come from L1, L2 and L3, at the bandwidth that all threads together "
    "read from each; the bold one is the first that holds a thread's part of a layer's weights. *Reached* is rnnkit's "
    "share of the same peak, which is measured in the same rounds."
)


def held(document: Document) -> str:
    """What held each library to the ISA, and what could not be held."""
    told = document.get("held")
    if not told:
        return "Each library uses what the CPU has."
    by = [f"{TITLES.get(name, name)} by {how}" for name, how in told["providers"].items()]
    not_held = [f"{TITLES[name]}, since {why}" for name, why in told["not held"].items()]
    return (
        f"Held to {isa_title(document)}: {'; '.join(by)}. **Not held**, so that it uses all that the CPU has, and not "
        f"judged: {'; '.join(not_held)}. What is no comparison with others, and bfloat16, is measured on the CPU's "
        "best ISA alone."
    )


def machine_limits(document: Document) -> str:
    """The peak of the units and the caches' bandwidth, where they were measured."""
    if not document.get("bandwidth"):
        return ""
    peaks: dict[str, list[float]] = {}
    for row in document["lines"]:
        if "peak" in row:
            peaks.setdefault(row["case"]["dtype"], []).append(row["peak"]["median"])
    of_dtypes = [f"{dtype} {median(values):.0f} GFLOP/s" for dtype, values in peaks.items()]
    of_levels = [
        f"{level} ({told['cache'] / 2**10:,.0f} KiB) {told['per_second'] / 1e9:.0f} GB/s"
        for level, told in document["bandwidth"].items()
    ]
    return f" Peak: {', '.join(of_dtypes)}. Read by all threads: {', '.join(of_levels)}."


def goal_table(judged: Sequence[Row]) -> list[str]:
    lines = [["goal", "bound", "measured", "verdict"]]
    lines += [[row["what"], row["goal"], row["figure"], row["verdict"]] for row in judged]
    return markdown(lines, left=4)


def misses(judged: Sequence[Row]) -> list[str]:
    """Every case that misses its bound, by goal."""
    lines = []
    for row in judged:
        if row["verdict"] == MISSED:
            told = [f"{case} {value}" for case, value in row["missed"].items()]
            told += [f"{case} has no right result" for case in row["wrong"]]
            lines.append(f"- {row['what']}: {'; '.join(told) or 'the mean alone'}")
    return lines


def sizes(case: Case) -> str:
    return case.sizes(f"{case.T}, {case.N}, {case.I}, {case.H}")


def bound(row: Row) -> str:
    """Percent of the peak by level, the level that applies in bold."""
    if "roofline" not in row:
        return "–"
    told = row["roofline"]
    shares = {level: f"{100 * told[level]:.0f}" for level in LEVELS}
    return " / ".join(f"**{s}**" if told["level"] == level else s for level, s in shares.items())


def reached(row: Row) -> str:
    """Percent of the peak; none of files whose peak is another."""
    if "roofline" not in row:
        return "–"
    return Figure.read(row["share"]).scaled(100).text("{:.0f}")


def engine(row: Row, name: str) -> str:
    """Over the frozen layer; in files that have none, over the ordinary one."""
    return ratio(row, name, "frozen" if FROZEN in row["entries"] else "ratios")


def case_tables(document: Document) -> Iterator[list[str]]:
    """All cases: inference, then training."""
    roofline = [f"bound {' / '.join(LEVELS)}, %", "reached, %"]
    head = ["T, N, I, H", "cell", "ms", "torch.nn", "JAX"]
    tables = {
        "inference": [[*head, "frozen, ms", "ONNX Runtime", "OpenVINO", *roofline]],
        "training": [[*head, *roofline]],
    }
    for row in document["lines"]:
        if row["group"] != "cases":
            continue
        case = Case(**row["case"])
        line = [sizes(case), case.cell, milliseconds(row), ratio(row, "torch"), ratio(row, "jax")]
        if case.mode == "inference":
            line += [milliseconds(row, FROZEN), engine(row, "onnxruntime"), engine(row, "openvino")]
        tables[case.mode].append([*line, bound(row), reached(row)])
    for lines in tables.values():
        yield markdown(lines, left=2)


def step_table(document: Document) -> list[str]:
    """Single steps of layers and cells."""
    lines = [["cell", "mode", "ms", "torch.nn"]]
    for row in document["lines"]:
        if row["group"] == "streaming":
            case = Case(**row["case"])
            lines.append([case.cell, case.mode, milliseconds(row), ratio(row, "torch")])
    return markdown(lines, left=2)


def feature_table(document: Document) -> list[str]:
    """Training steps with each feature, as times over the plain step's."""
    lines = [["T, N, I, H", "cell", "ms", *FEATURES]]
    for row in document["lines"]:
        if row["group"] == "features":
            case = Case(**row["case"])
            told = [ratio(row, f"rnnkit {feature}") for feature in FEATURES]
            lines.append([sizes(case), case.cell, milliseconds(row), *told])
    return markdown(lines, left=2)


def feature_memory_table(document: Document) -> list[str]:
    """Peak memory of training steps with each feature, over that without; empty if it was not measured."""
    lines = []
    for row in document["lines"]:
        told = row.get("memory", {}) if row["group"] == "features" else {}
        bytes_of = {name: each["bytes"]["median"] for name, each in told.items() if "bytes" in each}
        if "rnnkit" not in bytes_of:
            continue
        case, plain = Case(**row["case"]), bytes_of["rnnkit"]
        names = [f"rnnkit {feature}" for feature in FEATURES]
        ratios = [f"{bytes_of[n] / plain:.2f}×" if n in bytes_of else "–" for n in names]
        lines.append([sizes(case), case.cell, f"{plain / 2**20:.1f}", *ratios])
    return markdown([["T, N, I, H", "cell", "MiB", *FEATURES], *lines], left=2) if lines else []


#: Groups whose lines are beside other ways to compute the same, and the argument or option that each is about.
OTHER_WAYS = {"resets": "`reset`", "lengths": "`lengths`", "layer_norm": "`layer_norm`"}


def other_ways_table(document: Document) -> list[str]:
    """Training steps of `OTHER_WAYS`, each beside the other ways to compute the same."""
    lines = [["T, N, I, H", "cell", "ms", "beside it"]]
    for row in document["lines"]:
        if row["group"] in OTHER_WAYS:
            case = Case(**row["case"])
            told = [f"{name} {ratio(row, name)}" for name in row["entries"] if name != "rnnkit"]
            shape = f"{sizes(case)}, {OTHER_WAYS[row['group']]}"
            lines.append([shape, case.cell, milliseconds(row), ", ".join(told)])
    return markdown(lines, left=2)


def readout_line(document: Document) -> str:
    """What Readout.loss and its gradients took, beside all logits."""
    told = document["readout"]
    if "failed" in told:
        return f"`Readout.loss`, {told['case']}: not measured, {told['failed']}."
    ways = []
    for name in (readout.OWN, readout.ALL):
        figures = [
            (Figure.read(told[kind][name]["figure"]), readout.KINDS[kind]) for kind in readout.KINDS
        ]
        ways.append(f"{name} {', '.join(figure.text(form) for figure, form in figures)}")
    return f"Loss and gradients of an output layer, {told['case']}: {'; '.join(ways)}."


def section(document: Document, link: str) -> list[str]:
    """All of a results file, which is at `link`."""
    judged = [
        row for row in judge_all(document) if row["cases"] and row["what"] not in FEATURE_GOALS
    ]
    name = link.rsplit("/", 1)[-1]
    about = f"{where(document)}, [{name}]({link}). {held(document)}{machine_limits(document)}"
    missed = misses(judged)
    if not any("frozen" in row for row in document["lines"]):
        about += " Without frozen layers: engines stand over the ordinary one, and are not judged."
    inference, training = case_tables(document)
    lines = [
        f"### {machine(document)}, {isa_title(document)}",
        "",
        about,
        "",
        *goal_table(judged),
        "",
    ]
    lines += [*folded("Every miss", missed), ""] if missed else ["No goal is missed.", ""]
    lines += [*folded("Every case, inference", inference), ""]
    lines += [*folded("Every case, training", training), ""]
    if any(row["group"] == "streaming" for row in document["lines"]):
        lines += [*folded("One step of one row", step_table(document)), ""]
    return lines


def feature_section(document: Document, link: str) -> list[str]:
    """What rnnkit's own features cost, of a results file that has them."""
    judged = [row for row in judge_all(document) if row["what"] in FEATURE_GOALS]
    name = link.rsplit("/", 1)[-1]
    title = f"### What features cost: {machine(document)}, {isa_title(document)}"
    lines = [title, "", f"{where(document)}, [{name}]({link}).", ""]
    lines += [*goal_table(judged), "", "Times over those of a plain training step:", ""]
    lines += [*feature_table(document), ""]
    if memory := feature_memory_table(document):
        about = (
            "Their peak memory over a plain training step's, beside inputs, outputs and parameters:"
        )
        lines += [about, "", *memory, ""]
    if any(row["group"] in OTHER_WAYS for row in document["lines"]):
        about = "with 3 % resets, with `lengths` and with `layer_norm`"
        lines += [f"Times of other ways over rnnkit's {about}:", ""]
        lines += [*other_ways_table(document), ""]
    lines += [readout_line(document), ""]
    missed = misses(judged)
    return [*lines, *folded("Every miss", missed), ""] if missed else lines


def gpu_section(document: Document | None, link: str) -> list[str]:
    if document is None:
        return ["### GPU", "", "Not yet run on one (`python -m benchmarks.gpu`)."]
    name = link.rsplit("/", 1)[-1]
    about = f"{gpu_tables.where(document)}, [{name}]({link}). {gpu_tables.about(document)}"
    calls = markdown(gpu_tables.call_table(document), left=1)
    lines = [f"### {document['device']['name']}", "", about, ""]
    return [*lines, *goal_table(gpu_goals.judge_all(document)), "", *folded("Every call", calls)]


def text(
    documents: Mapping[str, Document],
    gpu: Document | None,
    gpu_link: str,
    features: Mapping[str, Document],
) -> str:
    """What stands between the markers; documents by their files' paths from the page's folder."""
    lines = [READING, "", ROOFLINE, ""]
    for link, document in documents.items():
        lines += section(document, link)
    for link, document in features.items():
        lines += feature_section(document, link)
    return "\n".join([*lines, *gpu_section(gpu, gpu_link)])
