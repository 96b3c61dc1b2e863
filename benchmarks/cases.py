"""What is measured: the table of cases, and the lines that compare providers, threads or sizes on them."""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}
MODES = (
    *("inference", "training", "streaming", "recording"),
    *("cell", "cell recording", "cell training"),
)
#: What lines are for, see `lines`.
GROUPS = (
    *("cases", "streaming", "features", "resets", "lengths", "layer_norm"),
    *("memory", "compiled", "T", "H"),
)
#: The groups whose peak memory is measured, too.
WITH_MEMORY = ("memory", "features", "layer_norm")
PEERS = ("torch", "jax", "onnxruntime", "openvino")
ONE_THREAD = "rnnkit 1 thread"
FROZEN = "rnnkit frozen"
PACKING = ("onnxruntime", "openvino")  # these pack weights ahead, as FROZEN does
#: rnnkit's features whose cost in training is measured, and the cells that have them.
FEATURES = {
    "update_gate": ("GRU",),  # "writes" in place of "keeps"
    "grad_clip": tuple(GATES),  # to a limit that no gradient reaches
    "gradient_flow": tuple(GATES),  # a block around each step
    "all_states": ("LSTM",),  # c after each step as well
    "learn_initial_state": tuple(GATES),
    "weight_dropout": tuple(GATES),  # all dropouts with so small a p that no element is met
    "recurrent_dropout": tuple(GATES),
    "zoneout": tuple(GATES),
}
#: A batch with resets in torch.nn: instead of a loop over cells, segments that are split, padded and packed.
SPLIT = "split"
#: Padded sequences with `lengths` instead of a PackedSequence.
LENGTHS = "lengths"


@dataclass(frozen=True)
class Case:
    """A computation.

    mode: `inference` is a forward pass; `training` forward and backward, with gradients of the input and all
        weights; `recording` a forward pass that records what gradients need; `streaming` one step that carries the
        state from call to call. `cell` is streaming with LSTMCell and its like, `cell recording` and `cell training`
        as said.
    ragged: a PackedSequence that fills half of the T × N rows, longest first.
    recompute: rnnkit's option that keeps less for the backward pass.
    compiled: called through torch.compile, in one graph.
    frozen: weights packed ahead by rnnkit.freeze.
    feature: one of FEATURES, SPLIT or LENGTHS, which leave inputs and results as they are; empty for none.
    resets: states are put back to zeros before 3 % of the steps.
    norm: with layer normalization.
    """

    cell: str
    mode: str
    T: int
    N: int
    I: int  # noqa: E741
    H: int
    layers: int = 1
    directions: int = 1
    projection: int = 0
    dtype: str = "float32"
    ragged: bool = False
    recompute: bool = False
    compiled: bool = False
    frozen: bool = False
    feature: str = ""
    resets: bool = False
    norm: bool = False

    @property
    def plain(self) -> "Case":
        """The same inputs and results, without a choice of how they are computed."""
        return dataclasses.replace(self, recompute=False, compiled=False, frozen=False, feature="")

    @property
    def of_cell(self) -> bool:
        """Whether RNNCell, LSTMCell or GRUCell computes it, not a layer."""
        return self.mode.startswith("cell")

    @property
    def trains(self) -> bool:
        return self.mode.endswith("training")

    @property
    def records(self) -> bool:
        """Whether it keeps what gradients need."""
        return self.trains or self.mode.endswith("recording")

    @property
    def lengths(self) -> list[int]:
        """Of the N sequences, longest first."""
        T, N = self.T, self.N
        return [max(1, T * (2 * (N - n) - 1) // (2 * N)) if self.ragged else T for n in range(N)]

    @property
    def rows(self) -> int:
        """Of the input: steps of all sequences."""
        return sum(self.lengths)

    @property
    def batch_sizes(self) -> list[int]:
        """Of a PackedSequence, step by step."""
        present = [sum(length > t for length in self.lengths) for t in range(self.T)]
        return [size for size in present if size]

    @property
    def output_size(self) -> int:
        """Of one direction."""
        return self.projection or self.H

    def suffixes(self) -> Iterator[tuple[str, int]]:
        """What torch.nn's parameters of each layer and direction end in, and the layer's input size."""
        for layer in range(self.layers):
            size = self.directions * self.output_size if layer else self.I
            for end in ("", "_reverse")[: self.directions]:
                yield f"_l{layer}{end}", size

    @property
    def flops(self) -> int:
        """Of the matrix products."""
        products = sum(
            GATES[self.cell] * self.H * (size + self.output_size) + self.H * self.projection
            for _, size in self.suffixes()
        )
        return 2 * self.rows * products * (3 if self.trains else 1)

    def sizes(self, form: str = "T{} N{} {}H{}") -> str:
        """The sizes and what is not ordinary; I only where it is not H."""
        parts = [form.format(self.T, self.N, "" if self.I == self.H else f"I{self.I} ", self.H)]
        parts += [f"{self.layers} layers"] if self.layers > 1 else []
        parts += [f"{self.directions} directions"] if self.directions > 1 else []
        parts += [f"projection {self.projection}"] if self.projection else []
        parts += [self.dtype] if self.dtype != "float32" else []
        parts += ["ragged"] if self.ragged else []
        parts += ["resets"] if self.resets else []
        parts += ["layer norm"] if self.norm else []
        return ", ".join(parts)

    def __str__(self) -> str:
        return f"{self.cell} {self.mode} {self.sizes()}"

    def document(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Entry(NamedTuple):
    """One of those that take turns: what the worker `worker` computes."""

    worker: str
    case: Case


class Line(NamedTuple):
    """What is timed together: `entries` by name; ratios are to the one called rnnkit."""

    group: str
    case: Case
    entries: dict[str, Entry]


#: T, N, I, H
SHAPES = (
    (100, 1, 128, 128),
    (100, 32, 128, 128),
    (50, 64, 256, 256),
    (100, 16, 512, 512),
    (200, 8, 64, 64),
    (35, 20, 650, 650),
    (1000, 4, 256, 256),
    (1, 1, 128, 128),
    (100, 64, 512, 512),
    (30, 128, 512, 512),
    (64, 24, 96, 192),
    (150, 10, 300, 384),
    (400, 2, 40, 320),
    (77, 13, 65, 130),
)
#: Shapes beside the ordinary: in other dtypes, ragged, with a projection.
BFLOAT16 = (SHAPES[1], SHAPES[2], SHAPES[3], SHAPES[5])
FLOAT64 = (SHAPES[1],)
RAGGED = (SHAPES[1], SHAPES[2])
PROJECTED = (SHAPES[3],)
HIDDEN_SIZES = (32, 64, 128, 256, 512, 1024)  # at T 50, N 16
TIME_STEPS = (100, 1000, 10_000)  # at N 4, H 128
MEMORY_SHAPES = ((100, 64, 512, 512), (200, 32, 256, 256))
COMPILED_SHAPES = (SHAPES[7], SHAPES[1], SHAPES[5])
RESET_SHAPE = (128, 32, 256, 256)
NORM_SHAPES = ((100, 32, 256, 256), (100, 16, 512, 512), (200, 8, 64, 64))
FEATURE_SHAPES = (SHAPES[1], SHAPES[3], SHAPES[4])
QUICK_SHAPES = (SHAPES[7], SHAPES[1], SHAPES[3])


def table(quick: bool = False, bfloat16: bool = True) -> Iterator[Case]:
    """The cases that all providers are compared on; `quick` is the part for a first look."""
    for cell in GATES:
        for mode in ("inference", "training"):
            for shape in QUICK_SHAPES if quick else SHAPES:
                yield Case(cell, mode, *shape)
            if quick:
                continue
            yield Case(cell, mode, *SHAPES[3], layers=2, directions=2)
            for shape in FLOAT64:
                yield Case(cell, mode, *shape, dtype="float64")
    for cell in ("LSTM",) if quick else GATES:
        for mode in ("inference", "training"):
            for shape in (BFLOAT16[2:3] if quick else BFLOAT16) if bfloat16 else ():
                yield Case(cell, mode, *shape, dtype="bfloat16")
            for shape in RAGGED[:1] if quick else RAGGED:
                yield Case(cell, mode, *shape, ragged=True)
    if not quick:
        for mode in ("inference", "training"):
            yield from (Case("LSTM", mode, *shape, projection=128) for shape in PROJECTED)


def compared(case: Case) -> Line:
    """All providers on `case`, and rnnkit in other ways where that tells.

    That is with weights packed ahead, as inference engines have them, on one thread, on the dense batch, in float32.
    """
    entries = {name: Entry(name, case) for name in ("rnnkit", *PEERS)}
    if case.mode == "inference" and not (case.ragged or case.projection or case.dtype == "float64"):
        entries[FROZEN] = Entry("rnnkit", dataclasses.replace(case, frozen=True))
    if case.ragged:
        entries["rnnkit dense"] = Entry("rnnkit", dataclasses.replace(case, ragged=False))
    elif case.dtype == "float32":
        entries[ONE_THREAD] = Entry(ONE_THREAD, case)
    elif case.dtype == "bfloat16":
        entries["rnnkit float32"] = Entry("rnnkit", dataclasses.replace(case, dtype="float32"))
    return Line("cases", case, entries)


def beside_torch(group: str, case: Case) -> Line:
    return Line(group, case, {name: Entry(name, case) for name in ("rnnkit", "torch")})


def over_time(cell: str, mode: str) -> Line:
    """Every number of time steps in one line, so that they take turns; the least is what rnnkit is called."""
    entries = {}
    for T in TIME_STEPS:
        case = Case(cell, mode, T, 4, 128, 128)
        for name in ("rnnkit", "torch"):
            entries[name if TIME_STEPS[0] == T else f"{name} T{T}"] = Entry(name, case)
    return Line("T", entries["rnnkit"].case, entries)


def recomputing(case: Case) -> Line:
    again = dataclasses.replace(case, recompute=True)
    entries = {"rnnkit": Entry("rnnkit", case), "rnnkit recompute": Entry("rnnkit", again)}
    return Line("memory", case, entries)


def compiling(case: Case) -> Line:
    compiled = dataclasses.replace(case, compiled=True)
    entries = {"rnnkit": Entry("rnnkit", case), "rnnkit compiled": Entry("rnnkit", compiled)}
    return Line("compiled", case, entries)


def with_features(case: Case) -> Line:
    """Every feature of the cell beside the call without any."""
    entries = {"rnnkit": Entry("rnnkit", case)}
    for feature, cells in FEATURES.items():
        if case.cell in cells:
            using = dataclasses.replace(case, feature=feature)
            entries[f"rnnkit {feature}"] = Entry("rnnkit", using)
    return Line("features", case, entries)


def resetting(case: Case) -> Line:
    """Resets beside the call without, and beside the two ways to have them with torch.nn."""
    reset = dataclasses.replace(case, resets=True)
    entries = {
        "rnnkit": Entry("rnnkit", reset),
        "rnnkit without": Entry("rnnkit", case),
        "torch loop": Entry("torch", reset),
        "torch split": Entry("torch", dataclasses.replace(reset, feature=SPLIT)),
    }
    return Line("resets", reset, entries)


def with_lengths(case: Case) -> Line:
    """Padded sequences with `lengths` beside the PackedSequence of the same, and the dense batch."""
    padded = dataclasses.replace(case, ragged=True, feature=LENGTHS)
    entries = {
        "rnnkit": Entry("rnnkit", padded),
        "rnnkit packed": Entry("rnnkit", padded.plain),
        "rnnkit dense": Entry("rnnkit", case),
    }
    return Line("lengths", padded.plain, entries)


def normalizing(case: Case) -> Line:
    """Layer normalization beside the call without, and beside a loop over torch's functions."""
    norm = dataclasses.replace(case, norm=True)
    entries = {
        "rnnkit": Entry("rnnkit", norm),
        "rnnkit without": Entry("rnnkit", case),
        "torch loop": Entry("torch", norm),
    }
    return Line("layer_norm", norm, entries)


def single_steps() -> Iterator[Line]:
    """Of every layer and cell, without gradients and with them; layers' training is among the cases."""
    for cell in GATES:
        for mode in MODES[2:]:
            yield beside_torch("streaming", Case(cell, mode, 1, 1, 128, 128))


def lines(quick: bool = False, lower: bool = False) -> Iterator[Line]:
    """Everything `make bench` measures, or `make bench-quick`.

    lower: the run is held to an ISA below the CPU's best. What is not a comparison with others is then left out,
        and bfloat16, whose instructions come with the best.
    """
    yield from map(compared, table(quick, bfloat16=not lower))
    yield from single_steps()
    for shape in FEATURE_SHAPES[:1] if quick else FEATURE_SHAPES:
        for cell in GATES:
            yield with_features(Case(cell, "training", *shape))
    for cell in ("GRU",) if quick else ("LSTM", "GRU"):
        yield resetting(Case(cell, "training", *RESET_SHAPE))
        for shape in RAGGED[:1] if quick else RAGGED:
            yield with_lengths(Case(cell, "training", *shape))
    for shape in NORM_SHAPES[:1] if quick else NORM_SHAPES:
        for cell in ("GRU",) if quick else GATES:
            yield normalizing(Case(cell, "training", *shape))
    if lower:
        return
    for cell in ("GRU",) if quick else GATES:
        for shape in MEMORY_SHAPES[1:] if quick else MEMORY_SHAPES:
            yield recomputing(Case(cell, "training", *shape))
    if quick:
        return
    for shape in COMPILED_SHAPES:
        for cell in GATES:
            for mode in ("inference", "training"):
                yield compiling(Case(cell, mode, *shape))
    for cell in ("LSTM", "GRU"):
        for mode in ("inference", "training"):
            yield over_time(cell, mode)
            for H in HIDDEN_SIZES:
                yield beside_torch("H", Case(cell, mode, 50, 16, H, H))


def of_sizes(shapes: Iterable[tuple[int, int, int, int]]) -> Iterator[Line]:
    """Lines at sizes of one's own."""
    for shape in shapes:
        for cell in GATES:
            for mode in ("inference", "training"):
                yield compared(Case(cell, mode, *shape))
