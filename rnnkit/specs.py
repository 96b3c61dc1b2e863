"""The cells: each one's step in plain PyTorch, and what layers and kernels need to know of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Step = Callable[..., tuple[Tensor, ...]]

#: The weights of one direction: w_ih [G*H, I], w_hh [R*H, P], b_ih [G*H], b_hh [R*H], w_hr [P, H]. R is G but for some
#: registered cells.
WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")

#: What follows them in a layer with layer normalization: the factors of the normalized x W_ih^T and h W_hh^T, norm_ih
#: and norm_hh [G*H]; of an LSTM's normalized c, norm_c [H], and what is added to it, norm_c_bias [H].
NORMS = ("norm_ih", "norm_hh", "norm_c", "norm_c_bias")

#: What follows the `WEIGHTS` of a registered cell with parameters: [U, H].
UNIT = "unit"

#: What layer normalization adds to a variance, as torch.nn.functional.layer_norm does by default.
NORM_EPSILON = 1e-5


@dataclass(frozen=True)
class CellSpec:
    """What layers and kernels need to know of a cell.

    Attributes:
        name: the cell's name in ops and kernels.
        gates: G, the number of blocks of H rows in w_ih and w_hh.
        states: the number of states that go from step to step; the first is h, the output.
        saved: the number of values that a kernel keeps in the reserve, for each hidden unit and step.
        input_grads: for each gate, the gradient column of its input part. A kernel writes several gradients of each
            hidden unit, in columns: 0 to G-1 are those of the gates' recurrent parts. Where the input part of a gate
            has the same gradient, it points to that column; the GRU's n gate has a column of its own, 3.
        step: (input part of each gate, recurrent part of each gate, states) -> new states, all [N, H]. A cell that
            `has_source` takes as a fourth argument what to do with it before h' is made of it.
        has_source: whether h' is made of another new state, its source, which layer normalization normalizes in
            between: the second state, c of an LSTM.
        projects: whether the cell supports a projection of h (w_hr). `uses_h` and `uses_previous_h` of its C++ struct
            must then be false: the cell never reads h. The recurrent product reads the projected h.
        recurrent_gates: R, the number of blocks of H rows in w_hh, if it is not G; 0 for a cell without a recurrent
            product, w_hh and b_hh. The cell's `step` then gets so many recurrent parts, and the first gradient
            columns, 0 to R-1, are theirs.
        parameters: U, the number of vectors of one value for each hidden unit. A cell that has any gets them as a
            fourth argument of `step`, each [H].
        uses_h: whether the kernel's backward pass reads h; by default, if it saves nothing else.
        late: how many recurrent gates, the last ones, have a recurrent part made of the second operand in place of h. A
            cell that has any does not project.
        operand: (input parts, recurrent parts of the other gates, states, parameters) -> the second operand, [N, H],
            and what `step` of such a cell takes as `known`: values that need not be computed again.
    """

    name: str
    gates: int
    states: int
    saved: int
    input_grads: tuple[int, ...]
    step: Step
    projects: bool = False
    has_source: bool = False
    recurrent_gates: int | None = None
    parameters: int = 0
    uses_h: bool | None = None
    late: int = 0
    operand: Callable[..., tuple[Tensor, Any]] | None = None

    @property
    def recurrent(self) -> int:
        """R, the number of recurrent gates."""
        return self.gates if self.recurrent_gates is None else self.recurrent_gates

    @property
    def reads_h(self) -> bool:
        """Whether the kernel's backward pass reads the h that a step gave."""
        return self.saved == 0 if self.uses_h is None else self.uses_h

    @property
    def norms(self) -> tuple[str, ...]:
        """The weights of layer normalization, see `NORMS`."""
        return NORMS if self.has_source else NORMS[:2]

    @property
    def grad_columns(self) -> int:
        """W, the number of gradients that a kernel writes for each hidden unit and step."""
        return max(*self.input_grads, self.recurrent - 1) + 1


def _rnn(activation: Callable[[Tensor], Tensor]) -> Step:
    """h' = activation(x + h), where x is the input part and h the recurrent part."""

    def step(
        x: Sequence[Tensor], h: Sequence[Tensor], states: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        return (activation(x[0] + h[0]),)

    return step


def _lstm(
    x: Sequence[Tensor],
    h: Sequence[Tensor],
    states: Sequence[Tensor],
    normalized: Callable[[Tensor], Tensor] = lambda c: c,
) -> tuple[Tensor, ...]:
    """i, f, o = σ(x + h); g = tanh(x + h); c' = f⊙c + i⊙g; h' = o⊙tanh(c'); gate order i, f, g, o."""
    i, f, o = (torch.sigmoid(x[k] + h[k]) for k in (0, 1, 3))
    g = torch.tanh(x[2] + h[2])
    c = f * states[1] + i * g
    return o * torch.tanh(normalized(c)), c


def _gru(writes: bool) -> Step:
    """r, z = σ(x + h); n = tanh(x + r⊙h); h' = (1 - z)⊙n + z⊙h, or if z `writes` z⊙n + (1 - z)⊙h; order r, z, n."""

    def step(
        x: Sequence[Tensor], h: Sequence[Tensor], states: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        r, z = (torch.sigmoid(x[k] + h[k]) for k in (0, 1))
        n = torch.tanh(x[2] + r * h[2])
        return (z * n + (1 - z) * states[0] if writes else (1 - z) * n + z * states[0],)

    return step


#: All cells. Fakes, kernels and tests iterate over it.
CELLS = {
    spec.name: spec
    for spec in (
        CellSpec("rnn_tanh", gates=1, states=1, saved=0, input_grads=(0,), step=_rnn(torch.tanh)),
        CellSpec("rnn_relu", gates=1, states=1, saved=0, input_grads=(0,), step=_rnn(torch.relu)),
        CellSpec(
            "lstm",
            gates=4,
            states=2,
            saved=5,
            input_grads=(0, 1, 2, 3),
            step=_lstm,
            projects=True,
            has_source=True,
        ),
        CellSpec("gru", gates=3, states=1, saved=4, input_grads=(0, 1, 3), step=_gru(writes=False)),
        CellSpec(
            "gru_writes", gates=3, states=1, saved=4, input_grads=(0, 1, 3), step=_gru(writes=True)
        ),
    )
}

#: Cells that are not built in, by name: `_C.register_cell` has their functions. They have no layer normalization.
REGISTERED: dict[str, CellSpec] = {}


def of(cell: str) -> CellSpec:
    """The `CellSpec` of a cell by its name in ops: a name in `CELLS` or `REGISTERED`, or a graph's JSON.

    Raises:
        RuntimeError: there is no such cell.
    """
    spec = CELLS.get(cell) or REGISTERED.get(cell)
    if spec is None:
        if not cell.startswith("{"):
            raise RuntimeError(f"expected cell to be the name of a cell, got '{shown(cell)}'")
        from rnnkit.graph.kernels import spec_of

        spec = REGISTERED[cell] = spec_of(cell)
    return spec


def shown(cell: str) -> str:
    """A cell's name in the text of an error; of a graph's JSON the beginning."""
    return cell if len(cell) <= 60 else f"{cell[:60]}..."
