"""`from_torchrecurrent`: layers and cells of torchrecurrent as cells of `rnnkit.library`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rnnkit import library
from rnnkit.definition import Cell
from rnnkit.recurrent import Recurrent, RecurrentCell

Weights = dict[str, Tensor]


class _Form(NamedTuple):
    """How a cell of torchrecurrent is written here.

    Attributes:
        cell: makes the cell of theirs, which has numbers as attributes.
        weights: their cell -> the parameters here that are not the weights and biases of the same names.
        act, gate_act: the activations that theirs must have, by the names of torch.nn's classes.
    """

    cell: Callable[[Any], Cell]
    weights: Callable[[Any], Weights] = lambda theirs: {}
    act: str = "Tanh"
    gate_act: str = "Sigmoid"


def _always(cell: Cell) -> Callable[[Any], Cell]:
    return lambda theirs: cell


def _janet(theirs: Any) -> Cell:
    if theirs.beta.item() != 1:
        raise ValueError(f"expected beta of a JANET to be 1, got {theirs.beta.item()}")
    return library.janet


def _stacked(matrix: str, bias: str) -> Callable[[Any], Weights]:
    """Their second recurrent matrix and its bias, below the first."""

    def weights(theirs: Any) -> Weights:
        second = getattr(theirs, matrix)
        of_second = getattr(theirs, bias, second.new_zeros(len(second)))
        return {
            "weight_hh": torch.cat([theirs.weight_hh, second]),
            "bias_hh": torch.cat([theirs.bias_hh, of_second]),
        }

    return weights


def _in_parts(*names: str) -> Callable[[Any], Weights]:
    """Their vector `weight_hh` as parameters of units; the biases beside it, which are added to `bias_ih`."""

    def weights(theirs: Any) -> Weights:
        bias = theirs.bias_ih.clone()
        bias[: len(theirs.bias_hh)] += theirs.bias_hh
        return {
            **dict(zip(names, theirs.weight_hh.chunk(len(names)), strict=True)),
            "bias_ih": bias,
        }

    return weights


def _unicornn(theirs: Any) -> Weights:
    return {**_in_parts("w")(theirs), "c": theirs.weight_ch}


def _ind_rnn(theirs: Any) -> Weights:
    return {"u": theirs.vector_u, "bias_ih": theirs.bias_ih + theirs.bias_hh}


def _gated_antisymmetric(theirs: Any) -> Weights:
    zeros = torch.zeros_like(theirs.bias_hh)  # their bias is not in the gate
    return {"bias_ih": theirs.bias_ih + torch.cat([zeros, theirs.bias_hh]), "bias_hh": zeros}


def _ran(theirs: Any) -> Weights:
    return {
        "bias_ih": torch.cat(
            [torch.zeros_like(theirs.bias_hh[: theirs.hidden_size]), theirs.bias_ih]
        )
    }


def _peepholes(theirs: Any) -> Weights:
    return dict(zip(("p_i", "p_f", "p_o"), theirs.weight_ph.chunk(3), strict=True))


def _scalars(*names: str) -> Callable[[Any], Weights]:
    """Their numbers of all units, for each unit."""
    return lambda theirs: {name: getattr(theirs, name).expand(theirs.hidden_size) for name in names}


def _fast_grnn(theirs: Any) -> Weights:
    biases = (theirs.bias_ih + theirs.bias_hh).chunk(2)
    zeros = torch.zeros_like(biases[0])
    own = {"b_z": biases[0], "b_n": biases[1], "bias_ih": zeros, "bias_hh": zeros}
    return own | _scalars("zeta", "nu")(theirs)


def _trnn(theirs: Any) -> Weights:
    """z of a minGRU is 1 - f: σ(-a) = 1 - σ(a)."""
    latent, f = theirs.weight_ih.chunk(2)
    of_latent, of_f = theirs.bias_ih.chunk(2)
    return {"weight_ih": torch.cat([-f, latent]), "bias_ih": torch.cat([-of_f, of_latent])}


#: The cells by the names of torchrecurrent's layers.
_FORMS = {
    "ATR": _Form(_always(library.atr)),
    "AntisymmetricRNN": _Form(lambda of: library.antisymmetric_rnn(of.epsilon, of.gamma)),
    "BR": _Form(_always(library.br), _in_parts("w_a", "w_c")),
    "CFN": _Form(_always(library.cfn)),
    "FastGRNN": _Form(_always(library.fast_grnn), _fast_grnn, act="Sigmoid"),
    "FastRNN": _Form(_always(library.fast_rnn), _scalars("alpha", "beta")),
    "GatedAntisymmetricRNN": _Form(
        lambda of: library.gated_antisymmetric_rnn(of.epsilon, of.gamma), _gated_antisymmetric
    ),
    "IndRNN": _Form(_always(library.ind_rnn), _ind_rnn, act="ReLU"),
    "JANET": _Form(_janet),
    "LightRU": _Form(_always(library.light_ru)),
    "LiGRU": _Form(_always(library.light_gru), act="ReLU"),
    "MGU": _Form(_always(library.mgu)),
    "MUT1": _Form(_always(library.mut1)),
    "MinimalRNN": _Form(_always(library.minimal_rnn), _stacked("weight_mm", "bias_mm")),
    "MultiplicativeLSTM": _Form(
        _always(library.multiplicative_lstm), _stacked("weight_mh", "bias_mh")
    ),
    "NAS": _Form(_always(library.nas)),
    "NBR": _Form(_always(library.nbr)),
    "OriginalLSTM": _Form(_always(library.lstm_without_forget_gate)),
    "PeepholeLSTM": _Form(_always(library.peephole_lstm), _peepholes),
    "RAN": _Form(_always(library.ran), _ran),
    "SGRN": _Form(_always(library.sgrn)),
    "STAR": _Form(_always(library.star)),
    "TRNN": _Form(_always(library.min_gru), _trnn),
    "UGRNN": _Form(_always(library.ugrnn)),
    "UnICORNN": _Form(lambda of: library.unicornn(of.dt, of.alpha), _unicornn),
    "coRNN": _Form(
        lambda of: library.cornn(of.dt, of.gamma, of.epsilon), _stacked("weight_ch", "bias_ch")
    ),
}


def from_torchrecurrent(module: nn.Module) -> Recurrent | RecurrentCell:
    """Make a layer or cell of `rnnkit.library` of one of torchrecurrent, with its weights.

    ATR, AntisymmetricRNN, BR, CFN, FastGRNN, FastRNN, GatedAntisymmetricRNN, IndRNN, JANET, LightRU, LiGRU, MGU, MUT1,
    MinimalRNN, MultiplicativeLSTM, NAS, NBR, OriginalLSTM, PeepholeLSTM, RAN, SGRN, STAR, TRNN, UGRNN, UnICORNN, coRNN,
    as layers and as cells. What is one number for all units there is one for each here; JANET's two states, which are
    equal, are one here. An IndRNN must have `nonlinearity="relu"` and a FastGRNN `"sigmoid"`, as in their papers, which
    is not torchrecurrent's default, and a JANET the beta 1. Biases that theirs do not have are zero and not learned.

    Args:
        module: a layer or cell of torchrecurrent.

    Returns:
        A new `Recurrent` or `RecurrentCell`, with copies of the weights.

    Raises:
        TypeError: `module` is no layer or cell of torchrecurrent.
        ValueError: it is one that the library does not have, or it has other activations than its paper.

    Source: https://github.com/MartinuzziFrancesco/torchrecurrent, version 0.2.5.
    """
    name = type(module).__name__
    if not type(module).__module__.startswith("torchrecurrent."):
        raise TypeError(f"expected module to be a layer or cell of torchrecurrent, got {name}")
    is_cell = name.endswith("Cell")
    form = _FORMS.get(name.removesuffix("Cell"))
    if form is None:
        known = ", ".join(_FORMS)
        raise ValueError(f"expected module to be one that rnnkit.library has, {known}, got {name}")
    cells: list[Any] = [module] if is_cell else list(module.cells)  # type: ignore[arg-type]
    first = cells[0]
    for kind in ("act", "gate_act"):
        expected, activation = getattr(form, kind), type(getattr(first, kind, None)).__name__
        if activation not in (expected, "NoneType"):
            raise ValueError(
                f"expected {kind} of {name} to be torch.nn.{expected}, got {activation}"
            )
    cell, like = form.cell(first), first.weight_ih
    made: Recurrent | RecurrentCell
    if is_cell:
        made = RecurrentCell(cell, first.input_size, first.hidden_size)
    else:
        given = {key: getattr(module, key) for key in ("num_layers", "batch_first", "dropout")}
        made = Recurrent(cell, first.input_size, first.hidden_size, **given)
    made.to(like)
    state = {}
    for k, theirs in enumerate(cells):
        suffix = "" if is_cell else f"_l{k}"
        with torch.no_grad():
            changed = form.weights(theirs)
        for own in _names(made, suffix):
            weight = changed[own] if own in changed else getattr(theirs, own)
            state[own + suffix] = weight.detach()
    made.load_state_dict(state)
    for name, parameter in made.named_parameters():
        theirs = cells[0 if is_cell else int(name.rpartition("_l")[2])]
        own = name if is_cell else name.rpartition("_l")[0]
        parameter.requires_grad_(getattr(getattr(theirs, own, None), "requires_grad", True))
    return made.train(module.training)


def _names(made: nn.Module, suffix: str) -> list[str]:
    """The names of one layer's parameters, without suffix."""
    return [
        name.removesuffix(suffix) for name, _ in made.named_parameters() if name.endswith(suffix)
    ]
