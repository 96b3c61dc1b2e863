"""`gradient_flow`: how large the gradients of the states are at each step, recorded while a backward pass runs.

The backward passes of layers and cells (`autograd.gradients`) `find` out whether to hand over the gradients of their
states, which `layer_backward` then returns besides those that autograd asked for.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rnnkit import backends, parameters, specs
from rnnkit.call import BackwardCall, Keep
from rnnkit.interop import Interop
from rnnkit.update_gate import CELLS, UpdateGate

#: The gates of each cell, in the order of its weights; and those that are a tanh, where the others are sigmoids.
GATES = {"rnn_tanh": "h", "rnn_relu": "h", "lstm": "ifgo", "gru": "rzn", "gru_writes": "rzn"}
_TANH = "ghn"

#: At most so many rows are looked at for the share of saturated gates.
_SAMPLE = 128
#: Gradients that shrink by this factor to the far end of a sequence vanish; that grow by it on the way, explode.
_FACTOR = 1e3

_WHY_NOT = (
    "none ran, or in a compiled graph, or with weights that are not the module's own (FSDP2, functional_call), or on "
    "the reference backend after a forward pass outside the block"
)

_lock = threading.Lock()
_recording: list["gradient_flow"] = []


def records() -> bool:
    """Whether a block is active in this process; autograd runs a GPU's backward passes in another thread."""
    return bool(_recording)


def find(w_hh: Tensor | None) -> "tuple[gradient_flow, _Place] | None":
    """The innermost block whose model has the layer of this weight, and its place there."""
    if w_hh is None:
        return None
    recorders = _recording[::-1]
    if any(id(w_hh) in recorder.places for recorder in recorders):
        leaves = {id(w_hh)}
    else:
        leaves = {id(leaf) for leaf in _leaves(w_hh)}
    for recorder in recorders:
        places = {recorder.places[leaf] for leaf in leaves if leaf in recorder.places}
        if len(places) == 1:  # more if a weight is computed of several layers' parameters
            return recorder, places.pop()
    return None


@dataclass(frozen=True)
class _Place:
    """One layer's or cell's place in a model."""

    module: str
    layer: int


@dataclass
class _Call:
    """One call of one layer."""

    order: int  # of its forward pass
    norms: list[Tensor]  # of each state, [D, T]
    saturated: Tensor | None  # [D, gates]


@dataclass(frozen=True)
class ModuleFlow:
    """The gradient flow of one layer or cell; L layers, D directions, T steps.

    Attributes:
        cell: the cell's name in `specs.CELLS`, or that of a cell of one's own.
        h: [L, D, T], the norm over batch and units of dL/dh after each time step, in float64.
        c: [L, D, T], the same for a second state, as an LSTM's c; None for other cells.
        saturated: gate -> [L, D], the share of its values that are saturated: below 0.1 or above 0.9 of a sigmoid,
            above 0.9 in size of a tanh, 0 of a ReLU. An estimate from at most 128 rows; empty if no gates
            are kept, with `recompute`, on the reference and for a cell of one's own.
    """

    cell: str
    h: Tensor
    c: Tensor | None
    saturated: dict[str, Tensor]
    _gates: Sequence[str] = field(repr=False)
    _weights: list[list[Tensor]] = field(repr=False)

    @property
    def spectral_norms(self) -> dict[str, Tensor]:
        """gate -> [L, D], the largest singular value of its recurrent matrix. Computed when asked for.

        NaN for layers whose backward pass was not seen.
        """
        gates = self._gates
        unseen = self.h.new_full((len(gates), self.h.size(1)), torch.nan)
        of_layers = [
            torch.stack([_spectral_norms(w_hh, len(gates)) for w_hh in of_layer], -1)
            if of_layer
            else unseen
            for of_layer in self._weights
        ]
        return dict(zip(gates, torch.stack(of_layers, 1), strict=True))  # of [gates, L, D]


class gradient_flow:
    """Records how large the gradients of hidden states are at each step of a backward pass.

        with rnnkit.gradient_flow(model) as flow:
            loss.backward()
        print(flow.summary())
        flow["encoder.lstm"].h  # [L, D, T]

    dL/dh_t and dL/dc_t are the whole gradients, of the outputs at time t and of all later steps (in the reverse
    direction, all earlier ones), after `grad_clip` and `grad_cut`. Gradients do not change. If a layer or cell runs
    several times, its calls are joined along T in the order of the forward passes. A layer that several blocks know is
    recorded by the innermost one. Entered again, a block forgets what it has recorded.

    The forward pass may have run before the block, except on the reference backend. Not seen are backward passes in a
    graph of torch.compile, of layers that FSDP2 has sharded, and of batched gradients (`is_grads_batched`).

    Args:
        model: a module that contains layers or cells of rnnkit, or one of them.

    Raises:
        TypeError: `model` is no module.
        ValueError: it contains no layer or cell of rnnkit.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
        self._modules = {
            name: module for name, module in model.named_modules() if isinstance(module, Interop)
        }
        if not self._modules:
            raise ValueError(
                f"expected model to contain a layer or cell of rnnkit, got {type(model).__name__} without any"
            )
        self._calls: dict[_Place, list[_Call]] = {}
        self._weights: dict[_Place, list[Tensor]] = {}  # copies of w_hh, one for each direction
        #: The place of each parameter that a w_hh is or is computed of, by its id; of tied weights, the first.
        self.places: dict[int, _Place] = {}

    def __enter__(self) -> "gradient_flow":
        self._calls, self._weights, self.places = {}, {}, {}
        for name, module in self._modules.items():
            for layer, leaves in enumerate(_recurrent_leaves(module)):
                for leaf in leaves:
                    self.places.setdefault(id(leaf), _Place(name, layer))
        with _lock:
            _recording.append(self)
            _tell_extension()
        return self

    def __exit__(self, *_: object) -> None:
        with _lock:
            _recording.remove(self)
            _tell_extension()

    def add(
        self, place: _Place, back: BackwardCall, flow: Sequence[Tensor], has_reserve: bool
    ) -> None:
        """Records one call's gradients of its states, as `layer_backward` returns them.

        `has_reserve`: whether kernels filled the reserve; the reference leaves zeros in it.
        """
        call = back.call
        # Autograd numbers its nodes in the order of the forward passes.
        node = torch._C._current_autograd_node()
        with torch.no_grad():
            norms = [_norms(back, k, of_state.detach()) for k, of_state in enumerate(flow)]
            found = _Call(
                0 if node is None else node._sequence_nr(), norms, _saturated(back, has_reserve)
            )
            weights = []
            if place not in self._weights:
                weights = [w.detach().clone() for w in call.of_kind("w_hh") if w is not None]
            if call.heads > 1:  # [heads, R*H, P] of each direction
                weights = [
                    torch.stack(weights[k : k + call.heads])
                    for k in range(0, len(weights), call.heads)
                ]
        with _lock:
            self._calls.setdefault(place, []).append(found)
            self._weights.setdefault(place, weights)

    def __getitem__(self, name: str) -> ModuleFlow:
        """The flow of the module of this name in the model; "" is the model itself.

        Of a layer whose backward pass was not seen, norms are NaN.

        Raises:
            KeyError: there is no such layer or cell, or no backward pass of it was seen.
            RuntimeError: its layers ran different numbers of steps.
        """
        if name not in self._modules:
            known = ", ".join(map(repr, self._modules))
            raise KeyError(f"expected the name of a layer or cell, {known}, got {name!r}")
        module = self._modules[name]
        places = [_Place(name, layer) for layer in range(int(getattr(module, "num_layers", 1)))]
        calls = [sorted(self._calls.get(p, []), key=lambda call: call.order) for p in places]
        seen = [of_layer for of_layer in calls if of_layer]
        if not seen:
            raise KeyError(f"no backward pass of {name!r} was seen in the block: {_WHY_NOT}")
        cell = str(module._cell)
        states = []
        count = specs.of(cell).states - getattr(module, "_has_output", False)
        for k in range(min(count, 2)):
            joined = [torch.cat([c.norms[k] for c in of_layer], 1) for of_layer in seen]
            if len({norms.size(1) for norms in joined}) > 1:
                steps = [norms.size(1) for norms in joined]
                raise RuntimeError(f"expected as many steps in each layer of {name!r}, got {steps}")
            unseen = torch.full_like(joined[0], torch.nan)
            remaining = iter(joined)
            states.append(torch.stack([next(remaining) if of else unseen for of in calls]))
        shares: dict[str, Tensor] = {}
        saturated = [[c.saturated for c in of if c.saturated is not None] for of in calls]
        if all(saturated):
            mean = torch.stack([torch.stack(of_layer).mean(0) for of_layer in saturated])
            shares = dict(zip(_gates(cell), mean.unbind(-1), strict=True))
        weights = [self._weights.get(p, []) for p in places]
        gates = _gates(cell)
        if own := getattr(module, "cell", None):
            cell, gates = own.name, own.recurrent
        elif isinstance(module, UpdateGate) and module.reset == "before":
            cell = CELLS[module.update_gate]
        c = states[1] if len(states) > 1 else None
        return ModuleFlow(cell, states[0], c, shares, gates, weights)

    def __iter__(self) -> Iterator[str]:
        """The names of the layers and cells whose backward pass was seen."""
        seen = {place.module for place in self._calls}
        return iter([name for name in self._modules if name in seen])

    def summary(self) -> str:
        """What vanishes, explodes or saturates, in words, with cures to try.

        Gradients vanish if they are smaller by a factor of 1000 at the far end of the sequence than where they begin,
        and explode if they grow by it on the way. Those of an LSTM are judged by the larger of dL/dh and dL/dc. A block
        should have one backward pass, with a loss of the last step: calls are joined, and a loss at every step hides
        what arrives from far away. Initializers are for the next training: they overwrite weights.
        """
        lines = []
        for name in self:
            of_module = self[name]
            for layer, direction, where in _lines(name, of_module):
                if not bool(of_module.h[layer, direction].isnan().all()):
                    lines += _verdict(self._modules[name], of_module, layer, direction, where)
        return "\n".join(lines) or f"no backward pass was seen in the block: {_WHY_NOT}"

    def plot(self) -> Any:
        """Draws the norms of dL/dh against the distance from the loss's end of the sequence, one line a layer.

        Those of an LSTM's dL/dc are a dashed line. The distance is counted in steps from the last step of each
        direction's scan.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        for name in self:
            of_module = self[name]
            for layer, direction, where in _lines(name, of_module):
                norms = _by_distance(of_module.h[layer, direction], direction)
                (line,) = axes.plot(range(norms.numel()), norms.tolist(), label=where)
                if of_module.c is not None:
                    norms = _by_distance(of_module.c[layer, direction], direction)
                    steps, color = range(norms.numel()), line.get_color()
                    axes.plot(steps, norms.tolist(), "--", color=color, label=f"{where}, c")
        axes.set_yscale("log")
        axes.set_xlabel("distance from the last step [steps]")
        axes.set_ylabel("norm of dL/dh and, dashed, of dL/dc")
        axes.grid(alpha=0.3)
        axes.legend()
        return figure


def _tell_extension() -> None:
    if backends.EXTENSION is not None:
        backends.EXTENSION.record_flow(bool(_recording))


def _recurrent_leaves(module: nn.Module) -> list[list[Tensor]]:
    """For each layer, the parameters that its w_hh are or are computed of."""
    names = [of_direction.get("weight_hh", "") for of_direction in parameters.names(module)]
    directions = 1 + bool(getattr(module, "bidirectional", False))
    known = dict(module.named_parameters())

    def leaves(name: str) -> list[Tensor]:
        prefixes = (f"parametrizations.{name}.original", f"{name}_")
        exact: list[Tensor] = [known[name]] if name in known else []
        return exact or [p for n, p in known.items() if n.startswith(prefixes)]

    return [
        [leaf for name in names[k : k + directions] for leaf in leaves(name)]
        for k in range(0, len(names), directions)
    ]


def _leaves(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor if it needs no gradient, else the leaves of its graph: autocast and parametrizations compute weights.

    A leaf that hooks of saved tensors have replaced is found, too: its node knows the leaf itself.
    """
    if not tensor.requires_grad:
        yield tensor if tensor._base is None else tensor._base  # heads are views of a parameter
        return
    waiting, seen = [torch.autograd.graph.get_gradient_edge(tensor).node], set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [following for following, _ in node.next_functions if following is not None]


def _norms(back: BackwardCall, state: int, flow: Tensor) -> Tensor:
    """The norm at each time step, [D, T], in float64: the squares of small gradients are not in float32's range."""
    call = back.call
    directions = call.directions // call.heads
    of_rows = flow.reshape(*flow.shape[:-1], directions, call.heads * call.state_width(state))
    if call.batch_sizes is None:
        # of [T, N, D, width]
        norms: Tensor = torch.linalg.vector_norm(of_rows, dim=(1, 3), dtype=torch.float64)
        return norms.t()
    squares = of_rows.double().square().sum(-1)  # [rows, D]
    times = torch.arange(call.steps).repeat_interleave(call.batch_sizes).to(flow.device)
    sums = squares.new_zeros(call.steps, directions).index_add_(0, times, squares)
    return sums.sqrt().t()


def _gates(cell: str) -> Sequence[str]:
    """The names of a cell's gates in the order of its saved values; empty for cells of one's own."""
    if cell.startswith("{"):
        from rnnkit.graph.builtin import RESET_BEFORE

        return GATES["gru"] if cell in RESET_BEFORE.values() else ()
    return GATES.get(cell, ())


def _spectral_norms(w_hh: Tensor, gates: int) -> Tensor:
    """The spectral norm of each gate's matrix in w_hh, [gates]; of several heads the largest."""
    norms: Tensor = torch.linalg.matrix_norm(w_hh.double().unflatten(-2, (gates, -1)), 2)
    return norms if norms.dim() == 1 else norms.amax(0)


def _saturated(back: BackwardCall, has_reserve: bool) -> Tensor | None:
    """The share of saturated values of each gate, [D, gates]; None if they were not kept or there are none."""
    call, gates = back.call, _gates(back.call.cell)
    if call.empty or not gates:
        return None
    if call.spec.saved == 0:
        of_rows = back.output.reshape(call.rows, call.directions, 1, call.projected).transpose(0, 1)
    elif has_reserve and back.keep == Keep.EVERYTHING:
        of_rows = back.reserve[:, :, : len(gates)]
    else:
        return None
    stride = -(-call.rows // _SAMPLE)
    while math.gcd(stride, call.batch) > 1:  # else the sample would be of few sequences
        stride += 1
    values = of_rows[:, ::stride].float()  # [D, rows, gates, H]
    if call.cell == "rnn_relu":
        shares: Tensor = (values <= 0).float().mean((1, 3))
        return shares
    ranges = [(0.0, 0.9) if gate in _TANH else (0.5, 0.4) for gate in gates]
    middle, reach = values.new_tensor(ranges).t().unsqueeze(-1)
    shares = (values - middle).abs_().gt_(reach).mean((1, 3))
    return shares


def _lines(name: str, of_module: ModuleFlow) -> Iterator[tuple[int, int, str]]:
    """Each layer and direction with its description."""
    layers, directions, _ = of_module.h.shape
    for layer in range(layers):
        for direction in range(directions):
            where = name or of_module.cell
            where += f" layer {layer}" * (layers > 1)
            where += (", reverse" if direction else ", forward") * (directions > 1)
            yield layer, direction, where


def _by_distance(norms: Tensor, direction: int) -> Tensor:
    """The norms [T] from the last step of the direction's scan back to its first."""
    return norms.flip(0) if direction == 0 else norms


def _verdict(
    module: nn.Module, of_module: ModuleFlow, layer: int, direction: int, where: str
) -> list[str]:
    largest, what = of_module.h, "|dL/dh|"
    if of_module.c is not None:
        largest, what = torch.maximum(of_module.h, of_module.c), "the larger of |dL/dh| and |dL/dc|"
    norms = _by_distance(largest[layer, direction], direction).double()
    there = (norms != 0).nonzero()
    if there.numel() == 0:
        return [f"{where}: no gradient arrives"]
    start, end = int(there[0]), norms.numel() - 1
    near, far, peak = float(norms[start]), float(norms[end]), float(norms.max())
    line = f"{where}: {what} is {near:.1e} {_steps_before(start)}"
    if start == end:
        return [f"{line}, the first of the sequence: there is no way back to follow"]
    line += f", {far:.1e} {_steps_before(end)}"
    # A layer below gets gradients of the layer above at every step, the far ones, too: these are not its own growth.
    above = largest[layer + 1 :].max().nan_to_num() if layer + 1 < len(largest) else 0.0
    if not bool(norms.isfinite().all()) or peak > _FACTOR * max(near, float(above)):
        cures = ["torch.nn.utils.clip_grad_norm_", "rnnkit.init.orthogonal_"]
        takes_clip = isinstance(module, nn.RNNBase) and getattr(module, "grad_clip", None) is None
        cures += ["grad_clip="] * takes_clip
        top = "" if peak == far else f" ({peak:.1e} between them)"
        line += f"{top}: it explodes; try {', '.join(cures)}"
        if not bool(norms.isfinite().all()):
            line += "; look whether the states themselves overflow, too"
    elif far * _FACTOR < near and getattr(module, "grad_cut", None) is not None:
        line += f": grad_cut={module.grad_cut} cuts it"
    elif far == 0 and float(norms[there[-1]]) * _FACTOR > near:
        line += (
            f": a reset, or units that pass nothing, cut it off {_steps_before(int(there[-1]) + 1)}"
        )
    elif far * _FACTOR < near:
        cures = _cures_of_vanishing(module, of_module.cell)
        line += ": it vanishes" + f"; try {', '.join(cures)}" * bool(cures)
    else:
        line += ": it neither vanishes nor explodes"
    lines = [line]
    for gate, share in of_module.saturated.items():
        if float(share[layer, direction]) > 0.5 and of_module.cell != "rnn_relu":
            lines.append(
                f"{where}: {share[layer, direction]:.0%} of gate {gate} is saturated; try smaller initial weights, "
                "such as rnnkit.init.xavier_, a smaller learning rate or normalized inputs"
            )
    return lines


def _cures_of_vanishing(module: nn.Module, cell: str) -> list[str]:
    """Empty for a cell of one's own, whose gates the initializers do not know."""
    if not parameters.cell_of(module):
        return []
    if cell.startswith("rnn"):
        return ["an LSTM or GRU", "rnnkit.init.identity_ with relu"]
    if not module.bias:  # the initializers below set biases
        return ["a layer with biases and rnnkit.init.chrono_"]
    return ["rnnkit.init.chrono_"] + ["rnnkit.init.forget_bias_"] * (cell == "lstm")


def _steps_before(distance: int) -> str:
    return "at the last step" if distance == 0 else f"{distance} steps before it"
