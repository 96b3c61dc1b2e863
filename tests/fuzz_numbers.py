"""Random modules and calls for `fuzz.py`: rnnkit's results and gradients beside torch.nn's and float64's.

A `Configuration` is one module and one call, drawn by its number; `check` runs it and tells what is wrong.
"""

import copy
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from configurations import CELLS, LAYERS, Case, backward, named_results, sequence_lengths
from tolerances import FLOOR_ROUNDINGS, FORWARD, GRADIENT
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkit

#: Draws of other values that a result beyond the limit is looked at with again.
SECOND_LOOK = 8

Results = dict[str, Tensor]
#: Of one result: rnnkit's, torch.nn's, and the truth.
Triple = tuple[Tensor, Tensor, Tensor]


def _strided(tensor: Tensor) -> Tensor:
    """Every second element of every dimension of a larger tensor."""
    room = tensor.new_full([2 * size + 1 for size in tensor.shape], math.nan)
    return room[(slice(1, None, 2),) * tensor.dim()].copy_(tensor)


def _turned(tensor: Tensor) -> Tensor:
    """Dimensions in memory the other way round."""
    back = tuple(reversed(range(tensor.dim())))
    return tensor.permute(back).contiguous().permute(back)


def _expanded(tensor: Tensor) -> Tensor:
    """The first of the first dimension for all, with a stride of zero."""
    return tensor[:1].expand_as(tensor)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "strided": _strided,
    "turned": _turned,
    "expanded": _expanded,
}


@dataclass(frozen=True)
class Configuration:
    """What `Case` does not say of a call.

    Attributes:
        case: the module, its sizes and its dtype.
        scale: of input and states, whose values are else normal.
        weight_scale: of the weights, which else give pre-activations of about 1.
        layout: in `LAYOUTS`, of input and states.
        sorted: whether a packed sequence was sorted by its caller.
        mode: "gradients", "no_grad", "inference" or "frozen".
        wanting: what needs a gradient, by the beginnings of names; "" for all.
        cotangents: results that get one.
        recompute: the layer's option.
        threads: for torch and rnnkit.
        wrong: what does not fit, or "".
    """

    case: Case
    scale: float
    weight_scale: float
    layout: str
    sorted: bool
    mode: str
    wanting: tuple[str, ...]
    cotangents: tuple[str, ...]
    recompute: bool
    threads: int
    wrong: str

    def __str__(self) -> str:
        words = [str(self.case), self.mode, f"threads={self.threads}", f"scale={self.scale:g}"]
        words += [f"weight_scale={self.weight_scale:g}"] * (self.weight_scale != 1)
        words += [self.layout] * (self.layout != "contiguous") + ["sorted"] * self.sorted
        words += ["recompute"] * self.recompute + [f"wrong={self.wrong}"] * bool(self.wrong)
        if self.mode == "gradients":
            words.append(f"of={','.join(self.cotangents)}")
            words += [f"wanting={','.join(self.wanting)}"] * (self.wanting != ("",))
        return " ".join(words)


WRONG = ("input size", "hidden size", "batch size", "input dtype", "hx dtype", "input rank")


def configuration(seed: int, number: int) -> Configuration:
    """That of this number."""
    rng = random.Random(f"{seed} {number}")
    case = _case(rng)
    precise = case.dtype == torch.float64
    modes = ["gradients"] * 6 + ["no_grad", "inference"] + ["frozen"] * (not case.is_cell)
    mode = rng.choice(modes)
    wide = case.dtype.itemsize > 2
    large = [10.0, 100.0] if not precise else []
    tiny = [1e-20, 1e-8] if wide else []
    every = ("input", "hx", "cx", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    wanting = tuple(name for name in every if rng.random() < 0.5) or ("input",)
    names = ("h_1", "c_1") if case.is_cell else ("output", "h_n", "c_n")
    names = names if "lstm" in case.module else names[:-1]
    some = tuple(name for name in names if rng.random() < 0.6) or (rng.choice(names),)
    return Configuration(
        case,
        scale=rng.choice([1.0] * 6 + [1e-3, 0.1] + large + tiny),
        weight_scale=rng.choice([1.0] * 6 + [0.1] + ([] if precise or "relu" in case.module else [3.0])),
        layout=rng.choice(["contiguous", "contiguous", *LAYOUTS]),
        sorted=case.lengths is not None and list(case.lengths) == sorted(case.lengths, reverse=True),
        mode=mode,
        wanting=("",) if rng.random() < 0.6 else wanting,
        cotangents=names if rng.random() < 0.5 else some,
        recompute=not case.is_cell and rng.random() < 0.25,
        threads=rng.choice((1, 2)),
        wrong=rng.choice(WRONG) if rng.random() < 0.03 else "",
    )  # fmt: skip


def _case(rng: random.Random) -> Case:
    """Its sizes are even, odd and 1 in turn, small more often than large."""

    def size(most: int) -> int:
        found = rng.choice((1, rng.randint(1, 9), rng.randint(1, most), rng.randint(1, most)))
        return found if rng.random() < 0.5 else max(found // 2 * 2, 1)

    module = rng.choice([*LAYERS, *LAYERS, *CELLS])
    large = rng.random() < 0.04
    hidden = rng.randint(100, 400) if large else size(100)
    batch: int | None = None if rng.random() < 0.12 else size(16 if large else 70)
    if rng.random() < 0.01:
        batch = 0
    fields: dict[str, Any] = {
        "batch": batch,
        "input_size": size(300 if large else 100),
        "hidden_size": hidden,
        "bias": rng.random() < 0.7,
        "hx": rng.random() < 0.5,
        "dtype": rng.choice([torch.float32] * 5 + [torch.float64, torch.bfloat16, torch.float16]),
        "off_kink": rng.random() < 0.5,
    }
    if module in CELLS:
        return Case(module, **fields)
    steps = 0 if rng.random() < 0.005 else size(8 if large else 40)
    projects = module == "lstm" and hidden > 1 and rng.random() < 0.3
    lengths = None
    if batch and steps and rng.random() < 0.3:
        lengths = sequence_lengths(steps, batch, rng)
        lengths = tuple(sorted(lengths, reverse=True)) if rng.random() < 0.5 else lengths
    return Case(
        module,
        steps=steps,
        num_layers=rng.choice((1, 1, 1, 2, 3)),
        batch_first=rng.random() < 0.3,
        bidirectional=rng.random() < 0.4,
        proj_size=rng.randint(1, hidden - 1) if projects else 0,
        lengths=lengths,
        **fields,
    )


def leaves_of(it: Configuration, draw: int, dtype: torch.dtype | None = None) -> Results:
    """Input and states, rounded to the case's dtype, in its layout; then of `dtype`."""
    case, layout = it.case, LAYOUTS[it.layout]
    generator = torch.Generator().manual_seed(draw)
    leaves = {}
    for name, shape in case.shapes().items():
        shape = _wrong_shape(it.wrong, name, list(shape))
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * it.scale
        values = (values.abs() if case.avoids_kink else values).to(case.dtype)
        if it.wrong == f"{'input' if name == 'input' else 'hx'} dtype":
            values = values.to(torch.float64 if case.dtype == torch.float32 else torch.float32)
        leaves[name] = layout(values.to(dtype or values.dtype)).detach()
    return leaves if case.hx else {"input": leaves["input"]}


def _wrong_shape(wrong: str, name: str, shape: list[int]) -> list[int]:
    if wrong == "input size" and name == "input":
        shape[-1] += 1
    if wrong == "hidden size" and name != "input":
        shape[-1] += 1
    if wrong == "batch size" and name != "input" and len(shape) > 1:
        shape[-2] += 1
    return [*shape, 1] if wrong == "input rank" and name == "input" else shape


def arguments(it: Configuration, leaves: Mapping[str, Tensor]) -> list[Any]:
    """`leaves` as the module takes them."""
    found = it.case.arguments(leaves)
    if it.sorted and it.case.lengths is not None:
        found[0] = pack_padded_sequence(
            leaves["input"], torch.tensor(it.case.lengths), it.case.batch_first
        )
    return found


def run(it: Configuration, module: nn.Module, leaves: Mapping[str, Tensor]) -> Results:
    """Results and the gradients that are wanted, by name."""
    named = {**leaves, **dict(module.named_parameters())}
    for name, tensor in named.items():
        tensor.requires_grad_(it.mode == "gradients" and name.startswith(it.wanting))
        tensor.grad = None
    modes = {"gradients": torch.enable_grad, "inference": torch.inference_mode}
    with modes.get(it.mode, torch.no_grad)():
        results = named_results(it.case, module(*arguments(it, leaves)))
    if it.mode == "gradients":
        given = [results[name] for name in it.cotangents]
        if any(result.requires_grad for result in given):
            backward(given)
    gradients = {f"grad {name}": t.grad for name, t in named.items() if t.grad is not None}
    return {name: result.detach() for name, result in results.items()} | gradients


def attempt(
    it: Configuration, module: nn.Module, leaves: Mapping[str, Tensor]
) -> Results | Exception:
    try:
        return run(it, module, leaves)
    except Exception as error:
        return error


def triples(it: Configuration, seed: int) -> tuple[dict[str, Triple], str]:
    """Each result three times, for values of this seed; or what is wrong before numbers count."""
    torch.manual_seed(seed)
    ours, theirs = it.case.twins()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.mul_(it.weight_scale)
    ours.load_state_dict(theirs.state_dict())
    if it.recompute:
        ours.recompute = True  # type: ignore[assignment]
    if it.mode == "frozen":
        ours = rnnkit.freeze(ours)
    actual = attempt(it, ours, leaves_of(it, seed))
    if _documented(it, actual):  # torch.nn might write beyond its memory
        return {}, ""
    expected = attempt(it, theirs, leaves_of(it, seed))
    if isinstance(actual, Exception) or isinstance(expected, Exception):
        if type(actual) is type(expected):
            return {}, ""
        told = [
            f"{type(r).__name__}({str(r)[:90]!r})" if isinstance(r, Exception) else "a result"
            for r in (actual, expected)
        ]
        return {}, f"rnnkit: {told[0]}, torch.nn: {told[1]}"
    truth = run(it, copy.deepcopy(theirs).double(), leaves_of(it, seed, torch.float64))
    for name in actual.keys() ^ expected.keys():
        if name in expected or not name.startswith("grad") or actual.pop(name).any():
            return {}, f"{name} is of {'torch.nn' if name in expected else 'rnnkit'} alone"
    for name, result in actual.items():
        ours_is, theirs_is = (f"{r.dtype} {tuple(r.shape)}" for r in (result, expected[name]))
        if ours_is != theirs_is:
            return {}, f"{name}: {ours_is}, torch.nn's is {theirs_is}"
    return {name: (result, expected[name], truth[name]) for name, result in actual.items()}, ""


def _documented(it: Configuration, error: Results | Exception) -> bool:
    """Whether torch.nn is known to do something else, or to end the process, where rnnkit raises `error`.

    Its LSTM leaves a packed call unchecked, as in test_errors.py. Its other layers put the states in the order of a
    packed sequence before they look at their size, and so leave out rows of no sequence.
    """
    packed = it.case.lengths is not None
    unchecked = it.wrong == "batch size" or ("lstm" in it.case.module and it.wrong != "")
    return packed and unchecked and isinstance(error, ValueError | RuntimeError)


def excess(name: str, triple: Triple) -> tuple[float, str]:
    """rnnkit's error over what it may be, and both in words; more than 1 is too much, and so is NaN."""
    actual, expected, truth = (t.double() for t in triple)
    dtype = triple[0].dtype
    gradient = name.startswith("grad")
    error, torch_error = (
        float(torch.linalg.vector_norm(t - truth)) if t.numel() else 0.0 for t in (actual, expected)
    )
    if not math.isfinite(torch_error):  # it overflows in torch.nn, and may here
        return 0.0, ""
    size, room = float(torch.linalg.vector_norm(truth)), torch.finfo(dtype)
    if dtype == torch.float64:  # the truth itself has as large an error
        floor = (GRADIENT if gradient else FORWARD)[dtype] * size
    else:
        floor = FLOOR_ROUNDINGS[dtype][gradient] * room.eps * size
    # Numbers below the smallest normal one are 0 to the kernels, or rounded as coarsely as that one.
    flushed = room.tiny if dtype.itemsize > 2 else room.eps * room.tiny
    floor += 4 * flushed * max(truth.numel(), 1) ** 0.5
    limit = max(2 * torch_error, floor)
    words = f"{name}: error {error:.2e}, torch.nn's {torch_error:.2e}, allowed {limit:.2e} of {size:.2e}"
    return error / limit if math.isfinite(error) else math.inf, words


def check(seed: int, number: int, tell: Callable[[str, str], None]) -> str:
    """What is wrong with the configuration of this number; "" for nothing."""
    it = configuration(seed, number)
    tell("call", str(it))
    torch.set_num_threads(it.threads)
    first = random.Random(f"values {seed} {number}").getrandbits(40)
    found, wrong = triples(it, first)
    if wrong:
        return wrong
    suspects = [name for name, triple in found.items() if not excess(name, triple)[0] <= 1]
    if not suspects:
        return ""
    draws = [found] + [triples(it, first + 1 + draw)[0] for draw in range(SECOND_LOOK)]
    for name in suspects:
        over, words = excess(name, _together(it, name, [draw[name] for draw in draws]))
        error = float(torch.linalg.vector_norm(found[name][0].double() - found[name][2]))
        if not over <= 1 and not error <= sensitivity(it, first)[name]:
            return f"{words} in {len(draws)} draws; {excess(name, found[name])[1]} in the first"
    return ""


def sensitivity(it: Configuration, seed: int) -> dict[str, float]:
    """How far off torch.nn's results are, in float64, where each value that enters is a rounding off: most of 8."""
    torch.manual_seed(seed)
    theirs, eps = it.case.twins()[1], torch.finfo(it.case.dtype).eps
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.mul_(it.weight_scale)
    theirs = theirs.double()
    truth, most = run(it, theirs, leaves_of(it, seed, torch.float64)), {}
    for _ in range(8):
        near, leaves = copy.deepcopy(theirs), leaves_of(it, seed, torch.float64)
        with torch.no_grad():
            for tensor in near.parameters():
                tensor.mul_(1 + eps * (2 * torch.rand_like(tensor) - 1))
        leaves = {n: t * (1 + eps * (2 * torch.rand_like(t) - 1)) for n, t in leaves.items()}
        for name, result in run(it, near, leaves).items():
            off = float(torch.linalg.vector_norm(result - truth[name]))
            most[name] = max(most.get(name, 0.0), off)
    return most


def _together(it: Configuration, name: str, draws: list[Triple]) -> Triple:
    """One result of all draws; where a ReLU may fall to either side of zero, of the better half of them."""
    if "relu" in it.case.module and name.startswith("grad") and not it.case.avoids_kink:
        draws = sorted(draws, key=lambda draw: excess(name, draw)[0])[: len(draws) // 2]
    actual, expected, truth = (
        torch.cat([t.flatten() for t in part]) for part in zip(*draws, strict=True)
    )
    return actual, expected, truth
