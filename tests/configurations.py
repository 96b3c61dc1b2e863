"""What the tests of layers and cells iterate: rnnkit's modules beside torch.nn's, and cases to run both on.

A `Case` is one module and one call of it. `run` gives its results and gradients by name, `compare` holds
rnnkit's against torch.nn's in the same dtype and in float64.
"""

import copy
import dataclasses
import itertools
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from tolerances import assert_close_to_truth
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnkit

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

#: Sizes beside and across the lanes, panels and blocks of any kernel.
SIZES = (1, 3, 17, 65, 130)

#: Layers and cells by name: the class in rnnkit and in torch.nn, and its options.
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
}
CELLS = {f"{name}_cell": (f"{cls}Cell", options) for name, (cls, options) in LAYERS.items()}
MODULES = LAYERS | CELLS


@dataclass(frozen=True)
class Case:
    """One module and one call; a cell leaves what only layers have at its default.

    Attributes:
        module: a name in `MODULES`.
        steps, batch: T and N; no N for an unbatched input.
        lengths: of each sequence, if the input is packed; in no order.
        hx: whether the initial states are given.
        off_kink: whether every ReLU stays on its side of zero also in float32.
    """

    module: str
    steps: int = 5
    batch: int | None = 3
    input_size: int = 4
    hidden_size: int = 6
    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    bidirectional: bool = False
    proj_size: int = 0
    lengths: tuple[int, ...] | None = None
    hx: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    off_kink: bool = False

    def __str__(self) -> str:
        """Its test's name: the module and every field that is not at its default."""
        fields = (field.name for field in dataclasses.fields(self) if field.name != "module")
        given = {name: getattr(self, name) for name in fields}
        given = {name: value for name, value in given.items() if value != getattr(Case, name)}
        if self.lengths is not None:
            given["lengths"] = "packed"
        words = [f"{name}={str(value).removeprefix('torch.')}" for name, value in given.items()]
        return " ".join([self.module, *words])

    @property
    def is_cell(self) -> bool:
        return self.module in CELLS

    @property
    def avoids_kink(self) -> bool:
        """Whether every unit stays on its side of the ReLU's kink, for rounding must not decide on it."""
        return "relu" in self.module and (self.off_kink or self.dtype.itemsize < 4)

    def on(self, device: str) -> "Case":
        return dataclasses.replace(self, device=device)

    def make(self, package: ModuleType, **options: Any) -> nn.Module:
        """The module of `package`, rnnkit or torch.nn, with initial values of its own."""
        names = ["input_size", "hidden_size", "bias", "dtype", "device"]
        if not self.is_cell:
            names += ["num_layers", "batch_first", "bidirectional"]
            names += ["proj_size"] if self.proj_size else []
        cls, own_options = MODULES[self.module]
        given = {name: getattr(self, name) for name in names}
        return getattr(package, cls)(**(given | own_options | options))

    def twins(self, **options: Any) -> tuple[nn.Module, nn.Module]:
        """rnnkit's and torch.nn's module with the same weights.

        These give pre-activations of about 1 whatever the sizes, so that no gate saturates or stays idle.
        """
        ours, theirs = self.make(rnnkit, **options), self.make(nn, **options)
        with torch.no_grad():
            for weight in theirs.parameters():
                bound = weight.size(-1) ** -0.5 if weight.dim() > 1 else 0.5
                if self.avoids_kink:
                    weight.uniform_(0, bound**2)[1::2].neg_()
                else:
                    weight.uniform_(-bound, bound)
        ours.load_state_dict(theirs.state_dict())
        return ours, theirs

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of "input", and of "hx" and "cx" where there are such states."""
        batch = () if self.batch is None else (self.batch,)
        stack = self.num_layers * (2 if self.bidirectional else 1)
        leading = [] if self.is_cell else [stack]
        time = [] if self.is_cell else [self.steps]
        shape = [*batch, *time] if self.batch_first else [*time, *batch]
        shapes = {"input": (*shape, self.input_size)}
        shapes["hx"] = (*leading, *batch, self.proj_size or self.hidden_size)
        if "lstm" in self.module:
            shapes["cx"] = (*leading, *batch, self.hidden_size)
        return shapes

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Fresh input and states, the same at every call, rounded to the case's dtype; they require grad."""
        generator = torch.Generator().manual_seed(1)
        leaves = {}
        for name, shape in self.shapes().items():
            values = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)
            values = values.abs() if self.avoids_kink else values
            leaves[name] = values.to(self.device, dtype or self.dtype).requires_grad_()
        return leaves if self.hx else {"input": leaves["input"]}

    def arguments(self, leaves: Mapping[str, Tensor]) -> list[Any]:
        """`leaves` as a module takes them."""
        input: Tensor | PackedSequence = leaves["input"]
        if self.lengths is not None:
            input = pack_padded_sequence(
                leaves["input"], torch.tensor(self.lengths), self.batch_first, enforce_sorted=False
            )
        if not self.hx:
            return [input]
        return [input, (leaves["hx"], leaves["cx"]) if "cx" in leaves else leaves["hx"]]


#: Each layer with all that a stack has, and the LSTM with a projection.
STACKED = [
    Case(name, num_layers=2, bidirectional=True, hx=True, proj_size=proj_size)
    for name in LAYERS
    for proj_size in ((0, 2) if name == "lstm" else (0,))
]


def tensors_of(results: Any) -> list[Tensor]:
    """The tensors in what a module returns, a packed sequence's data for it."""
    if isinstance(results, Tensor):
        return [results]
    if isinstance(results, PackedSequence):
        return [results.data]
    return [tensor for result in results for tensor in tensors_of(result)]


def named_results(case: Case, results: Any) -> dict[str, Tensor]:
    """`tensors_of`, by name."""
    names = ("h_1", "c_1") if case.is_cell else ("output", "h_n", "c_n")
    return dict(zip(names, tensors_of(results), strict=False))


def backward(results: Iterable[Tensor]) -> None:
    """Gradients for cotangents from 0.5 to 1.5, the same at every call and in every dtype.

    They are positive so that gradients, sums of many terms, seldom cancel.
    """
    generator = torch.Generator().manual_seed(2)
    tensors = [result for result in results if result.requires_grad]
    cotangents = [
        (torch.rand(t.shape, generator=generator) + 0.5).to(torch.bfloat16).to(t.device, t.dtype)
        for t in tensors
    ]
    torch.autograd.backward(tensors, cotangents)


def run(case: Case, module: nn.Module, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Results and every gradient of one call, by name."""
    module.zero_grad()
    results = named_results(case, module(*case.arguments(leaves)))
    backward(results.values())
    wanted = {**leaves, **dict(module.named_parameters())}
    gradients = {f"grad {name}": t.grad for name, t in wanted.items() if t.grad is not None}
    return {name: result.detach() for name, result in results.items()} | gradients


def run_on_cpu(case: Case, module: nn.Module) -> dict[str, Tensor]:
    """The same with a copy of the module there, of torch.nn's where cuDNN's is another."""
    case = case.on("cpu")
    return run(case, copy.deepcopy(module).cpu(), case.leaves())


def compare(
    case: Case,
    ours: nn.Module | None = None,
    theirs: nn.Module | None = None,
    *,
    tf32: bool = False,
) -> None:
    """rnnkit's results and gradients against torch.nn's, by the rule of `tolerances`; the truth is the CPU's."""
    if ours is None or theirs is None:
        ours, theirs = case.twins()
    exact, on_cpu = copy.deepcopy(theirs).to("cpu", torch.float64), case.on("cpu")
    actual, expected = (run(case, module, case.leaves()) for module in (ours, theirs))
    truth = run(on_cpu, exact, on_cpu.leaves(torch.float64))
    assert actual.keys() == expected.keys() == truth.keys()
    for name, result in actual.items():
        gradient = name.startswith("grad")
        if gradient and result.numel() < 8 and case.dtype.itemsize < 4:
            continue  # so few sums may all but cancel, and leave nothing but rounding
        assert_close_to_truth(
            result, expected[name], truth[name], gradient=gradient, tf32=tf32, name=name
        )


def sequence_lengths(steps: int, batch: int, rng: random.Random) -> tuple[int, ...]:
    """Lengths for a packed sequence, the longest of them `steps`, in no order."""
    lengths = [rng.randint(1, steps) for _ in range(batch)]
    lengths[rng.randrange(batch)] = steps
    return tuple(lengths)


def valid_case(packed: bool, rng: random.Random, **fields: Any) -> Case:
    """The case of `fields`, less what does not go together."""
    case = Case(**fields)
    if case.is_cell:
        names = {"module", "batch", "input_size", "hidden_size", "bias", "hx", "dtype", "device"}
        return Case(**{name: value for name, value in fields.items() if name in names})
    if "lstm" not in case.module or case.proj_size >= case.hidden_size:
        case = dataclasses.replace(case, proj_size=0)
    if packed and case.batch:
        lengths = sequence_lengths(case.steps, case.batch, rng)
        case = dataclasses.replace(case, lengths=lengths)
    return case


def covering_cases(modules: Iterable[str]) -> list[Case]:
    """A few cases in which every pair of values meets, of any two of the axes below."""
    rng = random.Random(0)
    axes: dict[str, tuple[Any, ...]] = {
        "module": tuple(modules),
        "dtype": DTYPES,
        "steps": (1, 3, 17),
        "batch": (None, 1, 3, 17, 65),
        "input_size": (1, 3, 17, 65),
        "hidden_size": (1, 3, 17, 65, 130),
        "num_layers": (1, 2, 3),
        "bidirectional": (False, True),
        "bias": (True, False),
        "batch_first": (False, True),
        "proj_size": (0, 2),
        "hx": (False, True),
        "packed": (False, True),
    }

    def pairs(case: Case) -> set[Any]:
        values = {**dataclasses.asdict(case), "lengths": case.lengths is not None}
        del values["device"], values["off_kink"]
        return set(itertools.combinations(values.items(), 2))

    def draw() -> Case:
        return valid_case(rng=rng, **{axis: rng.choice(values) for axis, values in axes.items()})

    cases: list[Case] = []
    covered: set[Any] = set()
    while True:
        candidates = [(pairs(case), case) for case in (draw() for _ in range(300))]
        met, case = max(candidates, key=lambda candidate: len(candidate[0] - covered))
        if met <= covered:
            return cases
        covered |= met
        cases.append(case)
