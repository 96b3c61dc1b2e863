"""Calls of the ops for the kernels' tests: a `Case` says the sizes, a `Call` holds the tensors and runs them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from tolerances import assert_close_to_truth
from torch import Tensor

from rnnkit import ops, plan, reference, specs
from rnnkit.call import BackwardCall, Keep, LayerCall, Results
from rnnkit.specs import CELLS

#: Names of a cell's states in results.
STATES = ("h", "c", "s2", "s3", "s4", "s5")

#: Cells that differ from another one in their formula alone: what a scan does with them is tested with that one.
TWINS = ("gru_writes",)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """The shape of one call.

    Attributes:
        cell: its name in ops.
        sizes: T, N, I, H.
        directions: D.
        lengths: of each sequence of a packed batch, longest first; T and N are then read from them.
        projected: P, or 0 for no w_hr.
        bias: whether there are b_ih and b_hh.
        states: whether initial states are given.
        dtype, device: of every tensor.
        off_kink: whether every ReLU stays on its side of zero, where rounding does not decide on it.
        all_states: whether every state is an output.
        grad_clip, grad_cut: see `LayerCall`.
        resets: the share of rows at whose boundary the states are put back; 0 for no mask.
        reset_states: whether the states to put back to are given.
        operand_mask: whether the recurrent operand is masked.
        zoneout: the probability of the first two states (further ones have one of their own), and `expects`: whether
            for the expectation, without masks.
        norm: whether the layer has layer normalization.
        heads: of each direction; H and P are those of a head.
        multiplies: whether there are w_ih; else the input has the width that this needs, whatever I.
    """

    cell: str
    sizes: tuple[int, int, int, int] = (3, 2, 5, 4)
    directions: int = 1
    lengths: tuple[int, ...] = ()
    projected: int = 0
    bias: bool = True
    states: bool = True
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    off_kink: bool = False
    all_states: bool = False
    grad_clip: float = 0.0
    grad_cut: int = 0
    resets: float = 0.0
    reset_states: bool = False
    operand_mask: bool = False
    zoneout: tuple[float, float] = (0.0, 0.0)
    expects: bool = False
    norm: bool = False
    heads: int = 1
    multiplies: bool = True

    def scan(self, backward: bool, precise: bool = True) -> plan.Scan:
        """What decides how its scan runs."""
        hidden = self.sizes[3]
        return plan.Scan(
            self.cell,
            self.dtype.itemsize,
            backward,
            hidden,
            self.projected or hidden,
            len(self.lengths) or self.sizes[1],
            self.directions * self.heads,
            precise and self.dtype == torch.float32,
            self.norm,
            self.heads,
        )

    @property
    def as_torchs(self) -> bool:
        """Whether torch.nn's layers compute the same: they have none of what is set back here."""
        return self == replace(
            self,
            all_states=False,
            grad_clip=0.0,
            grad_cut=0,
            resets=0.0,
            operand_mask=False,
            zoneout=(0.0, 0.0),
            norm=False,
            heads=1,
            multiplies=True,
        )

    def __str__(self) -> str:
        steps, batch, inputs, hidden = self.sizes
        ragged = f"ragged{len(self.lengths)}x{self.lengths[0]}" if self.lengths else ""
        parts = [self.cell, ragged or f"T{steps}N{batch}", f"I{inputs}H{hidden}D{self.directions}"]
        parts += [f"P{self.projected}"] * bool(self.projected)
        parts += (
            ["all"] * self.all_states
            + ["norm"] * self.norm
            + ["nobias"] * (not self.bias)
            + ["nostates"] * (not self.states)
            + [f"clip{self.grad_clip}"] * (self.grad_clip > 0)
            + [f"cut{self.grad_cut}"] * (self.grad_cut > 0)
            + [f"resets{self.resets}"] * (self.resets > 0)
            + ["resetstates"] * self.reset_states
            + ["masked"] * self.operand_mask
            + [f"heads{self.heads}"] * (self.heads > 1)
            + ["given"] * (not self.multiplies)
            + [f"{'expects' if self.expects else 'zone'}{self.zoneout}"] * any(self.zoneout)
        )
        parts += [str(self.dtype).removeprefix("torch."), *[self.device] * (self.device != "cpu")]
        return "-".join(parts)


@dataclass(frozen=True, eq=False)
class Call(LayerCall):
    """A call of both ops. `grads` belongs to each output and each final state."""

    grads: list[Tensor | None] = field(default_factory=list)

    @property
    def all_needs(self) -> list[bool]:
        return [tensor is not None for tensor in self.tensors]

    def every_tensor(self) -> list[Tensor]:
        """Of the call and its gradients."""
        masks = [self.reset, self.operand_mask, self.kept]
        every = [*self.tensors, self.batch_sizes, *masks, *self.grads]
        return [tensor for tensor in every if tensor is not None]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Call":
        """The same call with every tensor changed."""

        def changed(tensors: Sequence[Tensor | None]) -> list:
            return [None if t is None else change(t) for t in tensors]

        given = self.batch_sizes, self.reset, self.operand_mask, self.kept
        batch_sizes, reset, mask, kept = changed(given)
        others = replace(
            self,
            batch_sizes=batch_sizes,
            reset=reset,
            operand_mask=mask,
            kept=kept,
            grads=changed(self.grads),
        )
        return others.with_tensors(changed(self.tensors))

    def to(self, dtype: torch.dtype) -> "Call":
        return self.map(lambda t: t.to(dtype) if t.is_floating_point() else t)

    def on(self, device: str | torch.device) -> "Call":
        """The same call there; the batch sizes stay on the CPU."""
        return replace(self.map(lambda t: t.to(device)), batch_sizes=self.batch_sizes)

    def forward(self, keep: Keep = Keep.EVERYTHING) -> Results:
        """The op: outputs, final states, reserve."""
        return ops.layer_forward(self, None, keep)

    def backward_call(
        self,
        outputs: Sequence[Tensor],
        reserve: Tensor,
        needs: list[bool] | None = None,
        keep: Keep = Keep.EVERYTHING,
        flow: bool = False,
    ) -> BackwardCall:
        """The backward pass of this call, by default for all gradients."""
        needs = self.all_needs if needs is None else needs
        return BackwardCall(self, self.grads, outputs[0], reserve, keep, needs, flow)

    def backward(self, *arguments: Any, **options: Any) -> list[Tensor]:
        """The op: the gradients that are needed. Takes what `backward_call` takes."""
        return ops.layer_backward(self.backward_call(*arguments, **options))

    def run(self, keep: Keep = Keep.EVERYTHING, flow: bool = False) -> dict[str, Tensor]:
        """Every result of both ops by name."""
        outputs, finals, reserve = self.forward(keep)
        return self.named(outputs, finals, self.backward(outputs, reserve, keep=keep, flow=flow))

    def reference(self, flow: bool = False) -> dict[str, Tensor]:
        """What `run` should return, by plain PyTorch.

        On the CPU, where many small ops are fastest, unless the products are large.
        """
        heavy = self.rows * sum(w.numel() for w in self.weights if w is not None) > 2**30
        it = self if heavy else self.on("cpu")
        outputs, finals = reference.run(it)
        back = it.backward_call(outputs, it.input.new_empty(0), flow=flow)
        found, of_states = ops.differentiable_backward(back, create_graph=False)
        grads = [*(grad for grad in found if grad is not None), *of_states]
        results = self.named(outputs, finals, grads)
        return {name: result.to(self.input.device) for name, result in results.items()}

    def gradient_names(self) -> list[str]:
        """Names of the gradients that are returned when all are needed."""
        ends = [f" of head {head}" * (self.heads > 1) for head in range(self.heads)]
        suffixes = [way + end for way in ("", "_reverse") for end in ends][: self.directions]
        weights = [name + suffix for suffix in suffixes for name in self.kinds]
        states = [f"{name}_0" for name in STATES[: len(self.initial_states)]]
        states += [f"{name} reset to" for name in STATES[: len(self.reset_states)]]
        names = ["input", *states, *weights]
        return [f"grad {name}" for name, need in zip(names, self.all_needs, strict=True) if need]

    def named(
        self, outputs: list[Tensor], finals: list[Tensor], grads: list[Tensor]
    ) -> dict[str, Tensor]:
        """Results of both ops by name. `grads` may end with the gradients of the states at all steps."""
        assert len(finals) == self.spec.states
        names = ["output", *(f"{name} at all steps" for name in STATES[1 : self.outputs])]
        names += [f"{name}_n" for name in STATES[: len(finals)]]
        names += self.gradient_names()
        of_states = [f"grad {name} at all steps" for name in STATES[: self.spec.states]]
        count = len(self.gradient_names())
        assert len(grads) in (count, count + len(of_states))
        names += of_states[: len(grads) - count]
        # Sums are compared as what they are sums of.
        grads = [*grads[:count], *(grad.to(self.input.dtype) for grad in grads[count:])]
        return dict(zip(names, [*outputs, *finals, *grads], strict=True))


def call(case: Case, seed: int = 0) -> Call:
    """Random tensors for a case: weights as torch.nn draws them, factors around 0.4, all else normal."""
    random = torch.Generator().manual_seed(seed)
    steps, batch, inputs, hidden = case.sizes
    batch_sizes = None
    rows: tuple[int, ...] = (steps, batch)
    if case.lengths:
        batch = len(case.lengths)
        batch_sizes = torch.tensor(
            [sum(length > t for length in case.lengths) for t in range(case.lengths[0])]
        )
        rows = (sum(case.lengths),)
    spec, projected = specs.of(case.cell), case.projected or hidden
    directions = case.directions * case.heads
    if not case.multiplies:
        inputs = directions * spec.gates * hidden
    of_input, recurrent = spec.gates * hidden, spec.recurrent * hidden
    shapes = [(of_input, inputs) if case.multiplies else None]
    shapes += [(recurrent, projected) if spec.recurrent else None]
    shapes += [(of_input,) if case.bias else None]
    shapes += [(recurrent,) if case.bias and spec.recurrent else None]
    shapes += [(projected, hidden) if case.projected else None]
    shapes += [(spec.parameters, hidden)] * (spec.parameters > 0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(case.dtype)

    off_kink = case.off_kink and case.cell == "rnn_relu"

    def given(*shape: int) -> Tensor:
        return normal(*shape).abs() if off_kink else normal(*shape)

    def weight(*shape: int) -> Tensor:
        bound = max(hidden, 1) ** -0.5
        uniform = torch.rand(shape, generator=random, dtype=torch.float64)
        if off_kink:
            uniform /= shape[-1] if len(shape) > 1 else 2
            uniform[1::2].neg_()
            return uniform.to(case.dtype)
        return (uniform * 2 * bound - bound).to(case.dtype)

    def weights() -> list[Tensor | None]:
        """Of a direction."""
        found = [s and weight(*s) for s in shapes]
        if case.norm:
            # Factors of 1 would let rounding errors grow from step to step.
            gates = [0.4 + normal(spec.gates * hidden) / 8 for _ in range(2)]
            of_c = [0.4 + normal(hidden) / 8, normal(hidden) / 8] if spec.has_source else [None] * 2
            found += [*gates, *of_c]
        return found

    widths = [projected, *[hidden] * (spec.states - 1)]
    state_shapes = [(directions, batch, width) for width in widths]
    output_widths = widths if case.all_states else widths[:1]
    output_shapes = [(*rows, directions * width) for width in output_widths]
    zoneout = (*case.zoneout, 0.25, 0.15, 0.1, 0.2)[: spec.states]
    zoneout = zoneout if any(case.zoneout[: spec.states]) else ()

    def coins(p: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=random) < p

    mask = coins(0.7, *state_shapes[0]) / 0.7 if case.operand_mask else None
    kept = [coins(p, *rows, directions * hidden) for p in zoneout if p > 0]
    twice = 2 if case.resets and case.reset_states else 1
    return Call(
        cell=case.cell,
        input=given(*rows, inputs) / (1 if case.multiplies else 2),  # a product is smaller
        states=[given(*shape) for shape in twice * state_shapes if case.states],
        weights=[w for _ in range(directions) for w in weights()],
        batch_sizes=batch_sizes,
        all_states=case.all_states,
        grad_clip=case.grad_clip,
        grad_cut=case.grad_cut,
        reset=coins(case.resets, *rows) if case.resets else None,
        operand_mask=None if mask is None else mask.to(case.dtype),
        zoneout=zoneout,
        kept=torch.stack(kept) if kept and not case.expects else None,
        heads=case.heads,
        grads=[normal(*shape) for shape in [*output_shapes, *state_shapes]],
    ).on(case.device)


def assert_matches_reference(it: Call, results: dict[str, Tensor] | None = None) -> None:
    """The results, by default of the ops, are as close to the float64 truth as the tolerances ask for."""
    results = it.run() if results is None else results
    _assert_close(results, it.reference(), it.to(torch.float64).reference())


def assert_case_matches_reference(case: Case, keep: Keep = Keep.EVERYTHING) -> None:
    """The same for a case.

    In low precision a ReLU next to zero falls to either side by chance, and its gradient with it; there
    the results of several draws are taken together.
    """
    low = case.dtype in (torch.bfloat16, torch.float16)
    by_chance = case.cell == "rnn_relu" and low and not case.off_kink
    calls = [call(case, seed) for seed in range(4 if by_chance else 1)]

    def together(draws: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([draw[name] for draw in draws]) for name in draws[0]}

    flow = (
        case.directions == 2 or case.grad_cut > 0
    )  # also the gradients of the states at all steps
    _assert_close(
        together([it.run(keep, flow) for it in calls]),
        together([it.reference(flow) for it in calls]),
        together([it.to(torch.float64).reference(flow) for it in calls]),
    )


def _assert_close(
    results: dict[str, Tensor], baseline: dict[str, Tensor], truth: dict[str, Tensor]
) -> None:
    assert results.keys() == truth.keys()
    for name, result in results.items():
        assert_close_to_truth(
            result, baseline[name], truth[name], gradient=name.startswith("grad"), name=name
        )


def assert_same_bits(
    actual: dict[str, Tensor] | list[Tensor], expected: dict[str, Tensor] | list[Tensor]
) -> None:
    """The same results to the last bit; NaN is NaN."""
    if isinstance(actual, dict):
        assert isinstance(expected, dict) and actual.keys() == expected.keys()
        actual, expected = list(actual.values()), list(expected.values())
    torch.testing.assert_close(actual, list(expected), rtol=0, atol=0, equal_nan=True)


#: T, N, I, H: what is odd, below, at and above the widths of lanes, tiles and panels.
SIZES = (
    (1, 1, 1, 1),
    (1, 17, 65, 3),
    (2, 130, 3, 17),
    (3, 5, 200, 200),
    (3, 17, 65, 130),
    (4, 64, 128, 64),
    (5, 2, 17, 128),
    (5, 33, 1, 16),
    (6, 4, 130, 65),
    (17, 3, 3, 17),
    (65, 1, 5, 20),
    (70, 2, 16, 16),
    (3, 70, 9, 33),
    (30, 9, 70, 130),
    (130, 7, 9, 20),
)

#: Sequences that are put back: many and few, to zeros and to given states, also where gradients are cut.
RESETS: tuple[dict, ...] = (
    {"resets": 0.5},
    {"resets": 0.3, "states": False},
    {"resets": 0.3, "reset_states": True, "lengths": (9,) * 8 + (4,) * 9 + (1,) * 16},
    {"resets": 0.3, "reset_states": True, "grad_clip": 0.1, "grad_cut": 2},
    {"resets": 0.02, "reset_states": True, "lengths": tuple(range(45, 0, -1))},
)

#: Recurrent dropout and zoneout.
NOISE: tuple[dict, ...] = (
    {"operand_mask": True, "lengths": (9,) * 8 + (4,) * 9 + (1,) * 16},
    {"zoneout": (0.3, 0.2), "lengths": (5, 3, 3, 1)},
    {"operand_mask": True, "zoneout": (0.3, 0.2), "resets": 0.3, "reset_states": True},
    {"operand_mask": True, "zoneout": (0.1, 0.4), "expects": True, "states": False},
    {"zoneout": (0.2, 0.4), "expects": True, "grad_clip": 0.1, "grad_cut": 2},
    {"operand_mask": True, "zoneout": (0.0, 0.4), "lengths": tuple(range(45, 0, -1))},
)

#: Noise of few sequences, with resets and cuts in ragged batches, and with a state that has no zoneout.
NOISE_OF_FEW: tuple[dict, ...] = (
    *({**noise, "lengths": (4, 3, 3, 1)} if "lengths" in noise else noise for noise in NOISE),
    {
        **{"operand_mask": True, "zoneout": (0.4, 0.3), "lengths": (4, 3, 3, 1)},
        **{"resets": 0.4, "reset_states": True, "grad_clip": 0.1, "grad_cut": 2},
    },
    {"zoneout": (0.4, 0.0), "grad_cut": 2},
    {"zoneout": (0.4, 0.0), "expects": True, "resets": 0.4, "lengths": (5, 4, 2, 1)},
)

#: All of it at once. `cases` has it with more rows than a block of products, in one thread, and wider than a panel.
RESETS_AND_NOISE: dict[str, Any] = {
    "resets": 0.4,
    "reset_states": True,
    "operand_mask": True,
    "zoneout": (0.3, 0.2),
}

#: Layer normalization.
NORMS: tuple[dict, ...] = (
    {"norm": True},
    {"norm": True, "lengths": (5, 3, 3, 1), "states": False},
    {"norm": True, "lengths": (9,) * 8 + (4,) * 9 + (1,) * 16, "bias": False},
    {"norm": True, "grad_clip": 0.1, "grad_cut": 2},
    {"norm": True, "zoneout": (0.2, 0.4), "expects": True},
    {"norm": True, "lengths": tuple(range(45, 0, -1)), **RESETS_AND_NOISE},
)

#: The same with several heads, and of inputs that are products already.
NORMS_OF_HEADS: tuple[dict, ...] = (
    {"norm": True, "heads": 2, "lengths": (5, 3, 3, 1)},
    {"norm": True, "heads": 2, "multiplies": False},
)

#: The same of a cell with several states that may be projected.
NORMS_OF_LSTM: tuple[dict, ...] = (
    {"norm": True, "all_states": True, "zoneout": (0.0, 0.3), "lengths": (5, 3, 3, 1)},
    {"norm": True, "projected": 30, "lengths": (6, 5, 2)},
    {"norm": True, "projected": 15, "bias": False, "states": False},
)

#: Layer normalization of few sequences, and with all that may vary at once.
NORMS_OF_FEW: tuple[dict, ...] = (
    *({**norm, "lengths": (4, 3, 3, 1)} if "lengths" in norm else norm for norm in NORMS),
    {"norm": True, "operand_mask": True, "resets": 0.4, "grad_clip": 0.1, "lengths": (5, 4, 2, 1)},
    {"norm": True, "bias": False, "states": False},
)

#: Several heads, in one direction (every case also runs in two), and inputs that are products already.
HEADS: tuple[dict, ...] = (
    {"heads": 3},
    {"heads": 2, "lengths": (5, 3, 3, 1), "states": False},
    {"multiplies": False, "lengths": (9,) * 8 + (4,) * 9 + (1,) * 16},
    {"heads": 3, "multiplies": False, "bias": False},
    {"heads": 4, "multiplies": False, "grad_clip": 0.1, "grad_cut": 2, "lengths": (5, 4, 2, 1)},
    {"heads": 2, **RESETS_AND_NOISE, "lengths": tuple(range(45, 0, -1))},
)

#: What may vary beside the sizes.
_VARIANTS: tuple[dict, ...] = (
    {"lengths": (5, 3, 3, 1)},
    {"bias": False, "states": False},
    {"lengths": (1, 1, 1)},
    {"lengths": (4,)},
    {"lengths": tuple(range(19, 0, -1)), "states": False},
    {"lengths": (9,) * 8 + (4,) * 9 + (1,) * 16, "bias": False},
    {"lengths": tuple(range(45, 0, -1))},
    {"bias": False},
    {"states": False},
    {"grad_clip": 0.05, "lengths": (5, 3, 3, 1)},
    {"grad_clip": 0.1, "grad_cut": 3, "lengths": (9,) * 8 + (4,) * 9 + (1,) * 16},
    {"grad_clip": 0.1},
    {"grad_cut": 2},
    *RESETS,
    *NOISE,
    *HEADS,
)
_ALL_STATES: tuple[dict, ...] = (
    {"all_states": True, "lengths": (5, 3, 3, 1)},
    {"all_states": True},
    {"all_states": True, "grad_clip": 0.1, "grad_cut": 2, "lengths": (5, 3, 3, 1)},
    {"all_states": True, "resets": 0.4, "reset_states": True, "lengths": (5, 3, 3, 1)},
)
_PROJECTIONS: tuple[dict, ...] = (
    {"projected": 3, "lengths": (6, 5, 2)},
    {"projected": 1},
    {"projected": 1, "all_states": True, "states": False, "lengths": (6, 5, 2)},
    {"projected": 4, "grad_clip": 0.1, "grad_cut": 2, "lengths": (6, 5, 2)},
    {"projected": 15, "bias": False, "states": False},
    {"projected": 3, "resets": 0.4, "reset_states": True, "lengths": (6, 5, 2)},
    {"projected": 3, "operand_mask": True, "zoneout": (0.0, 0.3), "lengths": (6, 5, 2)},
    {"projected": 3, "heads": 2, "multiplies": False, "all_states": True, "resets": 0.4},
)


def variants(case: Case, few: bool = False) -> list[Case]:
    """What may vary beside the sizes: the case, packed, without this and that, and projected if it can be."""
    changes = _VARIANTS[:2] if few else _VARIANTS
    if specs.of(case.cell).states > 1:
        changes += _ALL_STATES[:1] if few else _ALL_STATES
    if specs.of(case.cell).projects:
        projections = _PROJECTIONS[:1] if few else _PROJECTIONS
        changes += tuple(p for p in projections if p["projected"] < case.sizes[3])
    return [case, *(replace(case, **change) for change in changes)]


def cases() -> list[Case]:
    """Every cell, dtype and direction at every size, and every variant at one of two more; few of `TWINS`."""
    found = []
    for cell, dtype, directions in product(CELLS, DTYPES, (1, 2)):
        several = SIZES[:: 5 if cell in TWINS else 1]
        found += [Case(cell, sizes, directions, dtype=dtype) for sizes in several]
        for k, sizes in enumerate(((3, 2, 3, 17), (2, 18, 34, 64))):
            of_size = variants(Case(cell, sizes, directions, dtype=dtype), few=cell in TWINS)
            found += of_size if cell in TWINS else [of_size[0], *of_size[1 + k :: 2]]
        # Over many steps, and with few values, torch's own errors grow beyond the tolerances.
        normalized = [sizes for sizes in SIZES if sizes[0] < 20][2 :: 4 if cell in TWINS else 2]
        found += [Case(cell, sizes, directions, dtype=dtype, norm=True) for sizes in normalized]
        wide = Case(cell, (2, 18, 34, 64), directions, dtype=dtype)
        found += [replace(wide, **n) for n in (*NORMS, *NORMS_OF_HEADS) if cell not in TWINS]
        if CELLS[cell].has_source:
            found += [replace(wide, **norm) for norm in NORMS_OF_LSTM]
        for sizes, projected in (((3, 70, 2, 9), 7), ((3, 6, 5, 130), 70)):
            of_all = Case(cell, sizes, directions, dtype=dtype, **RESETS_AND_NOISE)
            of_all = replace(of_all, norm=projected == 70)
            found += [] if cell in TWINS else [of_all]
            if CELLS[cell].projects:
                found.append(replace(of_all, projected=projected, zoneout=(0.0, 0.2)))
    return found


def small_cases(dtype: torch.dtype = torch.float32) -> list[Case]:
    """Every cell in a few variants, small."""
    found = []
    for cell in CELLS:
        if cell in TWINS:
            continue
        found.append(Case(cell, dtype=dtype))
        found += variants(Case(cell, directions=2, dtype=dtype), few=True)
        # Few values of an LSTM's c can be nearly equal, and are then divided by a small deviation.
        found.append(Case(cell, (3, 4, 5, 65), directions=2, dtype=dtype, norm=True))
    return found
