"""`UpdateGate`: the base of GRU and GRUCell that knows what their gates do: `update_gate` and `reset`."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from rnnkit import parameters, sharding

#: What z = 1 means -> the cell's name in `specs.CELLS`: the unit keeps its state, or it writes the new value.
CELLS = {"keeps": "gru", "writes": "gru_writes"}

Module = TypeVar("Module", bound="UpdateGate")


class UpdateGate(nn.Module):
    """Has `reset`, `update_gate` and the conversion between the latter's two values."""

    _cell = CELLS["keeps"]
    _resets_before = False

    def _set_gates(self, update_gate: str, reset: str) -> None:
        _check(update_gate)
        if reset not in ("after", "before"):
            raise ValueError(f"expected reset to be 'after' or 'before', got {reset!r}")
        if reset == "before":
            self._resets_before = True
        cell = self._cells[update_gate]
        if cell != self._cell:
            self._cell = cell

    @property
    def _cells(self) -> Mapping[str, str]:
        """What z = 1 means -> the cell's name in ops."""
        if not self._resets_before:
            return CELLS
        from rnnkit.graph.builtin import RESET_BEFORE

        return RESET_BEFORE

    @property
    def reset(self) -> str:
        """Where the reset gate is: `"after"` the product, r⊙(W_hn h + b_hn), or `"before"`, W_hn (r⊙h) + b_hn."""
        return "before" if self._resets_before else "after"

    @property
    def update_gate(self) -> str:
        """`"keeps"`, h' = (1 - z)⊙n + z⊙h, or `"writes"`, h' = z⊙n + (1 - z)⊙h."""
        return "keeps" if self._cell == self._cells["keeps"] else "writes"

    def convert_update_gate(self: Module, to: str) -> Module:
        """Changes `update_gate`, and the weights with it, so that the module computes the same as before.

        z becomes 1 - z: since 1 - σ(a) = σ(-a), the rows of z in every weight and bias are negated, in place; with
        `layer_norm` those in the factors of the normalized products, not in the weights. What an optimizer has
        gathered for these rows (momentum) is not.

        With FSDP2 every process has to call this. After a forward pass FSDP2's root module keeps its parameters
        unsharded, as plain tensors, and what is written to these is lost when it shards them again: call `reshard()`
        of the model first.

        Args:
            to: `"keeps"` or `"writes"`.

        Returns:
            The module.

        Raises:
            ValueError: `to` is neither.
            RuntimeError: a parametrization or hook computes a weight.
        """
        _check(to)
        if to == self.update_gate:
            return self
        weights = [parameters.held(self, name) for name in names_of_z(self)]
        with torch.no_grad():
            for weight in {id(weight): weight for weight in weights}.values():  # tied ones once
                if weight is not None:
                    values = with_other_gate(sharding.whole(weight))
                    weight.copy_(sharding.sharded_like(weight, values))
        self._cell = self._cells[to]
        vars(self).pop("_packed", None)  # packed weights of a frozen layer
        return self

    def extra_repr(self) -> str:
        """The other options, followed by `update_gate` if the gate writes and `reset` if that gate comes before."""
        before = ", reset=before" * self._resets_before
        return super().extra_repr() + ", update_gate=writes" * writes(self) + before


def writes(module: nn.Module) -> bool:
    """Whether it is a GRU or GRUCell with `update_gate="writes"`."""
    return isinstance(module, UpdateGate) and module.update_gate == "writes"


def resets_before(module: nn.Module) -> bool:
    """Whether it is a GRU or GRUCell with `reset="before"`."""
    return isinstance(module, UpdateGate) and module._resets_before


def names_of_z(module: nn.Module) -> list[str]:
    """The names of the parameters in which z has rows that decide on its sign: of normalized products the factors."""
    found = []
    for own in parameters.names(module):
        norms = parameters.norms(module, own)
        found += [name for kind, name in own.items() if not norms or kind.startswith("bias")]
        found += norms
    return found


def with_other_gate(weight: torch.Tensor) -> torch.Tensor:
    """A GRU's weight or bias for the other `update_gate`: the rows of z negated."""
    r, z, n = weight.chunk(3)
    return torch.cat([r, -z, n])


def _check(update_gate: Any) -> None:
    if update_gate not in CELLS:
        raise ValueError(f"expected update_gate to be 'keeps' or 'writes', got {update_gate!r}")
