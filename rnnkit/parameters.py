"""The parameters of a layer or cell, of rnnkit or torch.nn: their names, and whether something else computes them.

`init`, `convert_update_gate`, `gradient_flow` and the weights of other libraries find them here.
"""

from collections.abc import Mapping

from torch import nn

from rnnkit.specs import CELLS

#: The names of a cell's parameters. A layer's have a suffix for layer and direction. Only an LSTM layer has weight_hr.
KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")

#: torch.nn's cells as they were when rnnkit was imported: `rnnkit.patch` replaces them in torch.nn.
_CELLS = {nn.RNNCell: "RNN", nn.LSTMCell: "LSTM", nn.GRUCell: "GRU"}


def cell_of(module: nn.Module) -> str:
    """RNN, LSTM or GRU if the module is such a layer or cell, of rnnkit or torch.nn, or of a subclass; else empty."""
    if isinstance(module, nn.RNNBase):
        cell = module.mode.partition("_")[0]
        return cell if cell in _CELLS.values() else ""  # a Recurrent has a cell of its own
    return next((cell for cls, cell in _CELLS.items() if isinstance(module, cls)), "")


def names(module: nn.Module) -> list[dict[str, str]]:
    """For each layer and in it each direction, or for a cell: a name in `KINDS` -> the parameter's, in this order."""
    if isinstance(module, nn.RNNBase):
        suffixes = [own[0].removeprefix("weight_ih") for own in module._all_weights]
        return [
            {name.removesuffix(suffix): name for name in own}
            for suffix, own in zip(suffixes, module._all_weights, strict=True)
        ]
    return [{name: name for name in KINDS[: 4 if module.bias else 2]}]


def norms(module: nn.Module, own: Mapping[str, str]) -> list[str]:
    """The parameters of layer normalization in the direction whose other parameters are `own`; empty for none."""
    if not getattr(module, "layer_norm", False):
        return []
    suffix = own["weight_ih"].removeprefix("weight_ih")
    return [kind + suffix for kind in CELLS[module._cell].norms]  # type: ignore[index]


def held(module: nn.Module, name: str) -> nn.Parameter | None:
    """The module's parameter of this name, or the None in its place.

    Raises:
        RuntimeError: a parametrization or hook computes the weight.
    """
    if name not in module._parameters:
        raise RuntimeError(
            f"expected {name} to be a parameter, got a weight that a parametrization or hook computes: remove it first"
        )
    return module._parameters[name]
