"""Weights of Keras's and haste's layers, loaded into rnnkit's or torch.nn's layers and cells, and written for them.

Both libraries have transposed matrices, [I, G*H] and [H, G*H], and gate orders of their own. Their LSTMs have one bias
where torch's has two.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rnnkit import parameters, sharding, update_gate

Module = TypeVar("Module", bound=nn.Module)

#: For each kind of module, a library's order of torch's gates (LSTM i, f, g, o; GRU r, z, n). Each order exchanges at
#: most two gates, so that it also turns the library's order into torch's.
_KERAS = {"RNN": (0,), "LSTM": (0, 1, 2, 3), "GRU": (1, 0, 2)}
_HASTE = {"LSTM": (0, 2, 1, 3), "GRU": (1, 0, 2)}


def from_keras(module: Module, weights: Sequence[Any]) -> Module:
    """Load the weights of Keras's layers (Keras 3 or tf.keras) into a layer or cell, in place.

    A SimpleRNN's weights fit an RNN, an LSTM's an LSTM and a GRU's a GRU; those of a Bidirectional layer with
    `merge_mode="concat"` fit a layer with `bidirectional=True`. Keras's input is [N, T, I], as with `batch_first=True`.

    The weights do not tell how the Keras layer computes. It must have Keras's defaults: activation tanh (a SimpleRNN:
    the module's `nonlinearity`) and recurrent_activation sigmoid. A GRU with `reset_after=False` fits rnnkit's with
    `reset="before"`, one with `reset_after=True`, the default, any other. Their biases have different shapes, so that a
    mistake is an error; if there are none, it cannot be noticed.

    With FSDP2 every process has to call this. After a forward pass FSDP2's root module keeps its parameters unsharded,
    as plain tensors, and what is written to these is lost when it shards them again: call `reshard()` of the model
    first.

    Args:
        module: an RNN, LSTM, GRU or cell of rnnkit or torch.nn. Its parameters stay the same objects, with their dtype
            and device.
        weights: arrays or tensors, as the Keras layer's `get_weights()` returns them: for each layer and direction
            kernel [I, G*H], recurrent_kernel [H, G*H] and, if `module` has biases, bias [G*H] (in a GRU with
            `reset_after=True` [2, 3*H], of the input and of the recurrent part). Gate order i, f, c, o (LSTM) or z, r,
            h (GRU). The forward direction comes before the backward one. For several layers join their lists,
            `first + second`, as the `get_weights()` of a keras.Sequential of them does.

    Returns:
        `module`. Where Keras has one bias it is now `bias_ih`, and `bias_hh` is zero.

    Raises:
        TypeError: `module` is no layer or cell, or `weights` no list of arrays.
        ValueError: the number of arrays or a shape does not fit, or the biases are of a GRU with the other
            `reset_after`. Or `module` has a projection or is on the meta device.
        RuntimeError: a parametrization or hook computes a weight of `module`.

    Source: keras/src/layers/rnn/simple_rnn.py, lstm.py and gru.py.
    """
    kind = _checked_kind(module, "Keras", _KERAS)
    if not isinstance(weights, list | tuple):
        raise TypeError(
            f"expected weights to be a list of arrays, as get_weights() returns, got {type(weights).__name__}"
        )
    expected = _as_keras(module, kind)
    if len(weights) != len(expected):
        arrays = "kernel, recurrent_kernel, bias" if module.bias else "kernel, recurrent_kernel"
        raise ValueError(
            f"expected weights to be {len(expected)} arrays ({arrays} of each layer and direction) for a module with "
            f"bias={module.bias}, got {len(weights)}"
        )
    given = [_as_tensor(f"weights[{k}]", value) for k, value in enumerate(weights)]
    for k, (value, like) in enumerate(zip(given, expected, strict=True)):
        if kind == "GRU" and like.shape in (value.shape[1:], (2, *value.shape)):
            after = value.dim() == 2
            raise ValueError(
                f"expected weights[{k}], the bias, of shape {tuple(like.shape)}, got {tuple(value.shape)}: the GRU has "
                f"reset_after={after}, and so fits a rnnkit.GRU with reset={'after' if after else 'before'!r}"
            )
        _check_shape(f"weights[{k}]", value, like)
    per_direction = 3 if module.bias else 2
    loaded = []
    for start in range(0, len(given), per_direction):
        kernel, recurrent_kernel, *bias = given[start : start + per_direction]
        biases = [pair for b in bias for pair in (b if b.dim() == 2 else (b, torch.zeros_like(b)))]
        loaded.append([kernel, recurrent_kernel, *biases])
    return _load(module, _KERAS[kind], loaded)


def to_keras(module: nn.Module) -> list[Any]:
    """Write a layer's or cell's weights for Keras, in the form that `from_keras` reads.

    Args:
        module: an RNN, LSTM, GRU or cell of rnnkit or torch.nn.

    Returns:
        Numpy arrays for `set_weights()` of the Keras layer; for several layers, of a keras.Sequential of them. They are
        copies, float32 for bfloat16. Where Keras has one bias it is the sum of `bias_ih` and `bias_hh`. A GRU with
        `reset="before"` is one with `reset_after=False`.

    Raises:
        TypeError: `module` is no layer or cell.
        ValueError: `module` has a projection or is on the meta device.
        RuntimeError: numpy is not installed.

    Source: keras/src/layers/rnn/simple_rnn.py, lstm.py and gru.py.
    """
    return [
        array.cpu().numpy() for array in _as_keras(module, _checked_kind(module, "Keras", _KERAS))
    ]


def from_haste(module: Module, weights: Mapping[str, Any]) -> Module:
    """Load the weights of a haste_pytorch LSTM or GRU into a layer or cell, in place.

    haste's layers have one layer and one direction, and biases. Those of its LayerNormLSTM and LayerNormGRU fit a layer
    with `layer_norm=True`. Its IndRNN computes something else, and the weights do not tell of zoneout and DropConnect:
    haste's `zoneout=p, dropout=q` are `zoneout=(p, 0)` of an LSTM or `zoneout=p` of a GRU, and `weight_dropout=q`.

    With FSDP2 every process has to call this, after `reshard()` of the model if a forward pass has run, as with
    `from_keras`.

    Args:
        module: an LSTM, GRU or cell of rnnkit or torch.nn. Its parameters stay the same objects, with their dtype and
            device.
        weights: `state_dict()` of the haste layer: kernel [I, G*H], recurrent_kernel [H, G*H], bias [G*H] and, in a
            GRU, recurrent_bias [3*H]; with layer normalization gamma [2, G*H] and, in an LSTM, gamma_h and beta_h [H].
            Gate order i, g, f, o (LSTM) or z, r, g (GRU).

    Returns:
        `module`. In an LSTM, haste's bias is now `bias_ih`, and `bias_hh` is zero.

    Raises:
        TypeError: `module` is no layer or cell, or `weights` no mapping of names to arrays.
        ValueError: a name is missing or unknown, or a shape does not fit. Or `module` is an RNN, has no biases, several
            layers, two directions or a projection, or is on the meta device.
        RuntimeError: a parametrization or hook computes a weight of `module`.

    Source: frameworks/pytorch/lstm.py and gru.py of https://github.com/lmnt-com/haste.
    """
    kind = _checked_kind(module, "haste", _HASTE)
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"expected weights to be a dict, as state_dict() returns, got {type(weights).__name__}"
        )
    expected = to_haste(module)
    if weights.keys() != expected.keys():
        raise ValueError(
            f"expected weights of a haste {kind} to be {', '.join(expected)}, got {', '.join(map(str, weights))}"
        )
    given = {name: _as_tensor(f"weights[{name!r}]", weights[name]) for name in expected}
    for name, like in expected.items():
        _check_shape(f"weights[{name!r}]", given[name], like)
    given.setdefault("recurrent_bias", torch.zeros_like(given["bias"]))
    in_order = [given[name] for name in ("kernel", "recurrent_kernel", "bias", "recurrent_bias")]
    if "gamma" in given:
        of_c = [given[name] for name in ("gamma_h", "beta_h") if name in given]
        in_order += [*given["gamma"], *of_c]
    return _load(module, _HASTE[kind], [in_order])


def to_haste(module: nn.Module) -> dict[str, Tensor]:
    """Write the weights of an LSTM, GRU or cell for haste_pytorch, in the form that `from_haste` reads.

    Args:
        module: an LSTM, GRU or cell of rnnkit or torch.nn, with biases, one layer and one direction.

    Returns:
        Tensors for `load_state_dict()` of the haste layer. They are copies of `module`'s dtype and device. In an LSTM,
        bias is the sum of `bias_ih` and `bias_hh`.

    Raises:
        TypeError: `module` is no layer or cell.
        ValueError: `module` is an RNN, has no biases, several layers, two directions or a projection, or is on the meta
            device.

    Source: frameworks/pytorch/lstm.py and gru.py of https://github.com/lmnt-com/haste.
    """
    kind = _checked_kind(module, "haste", _HASTE)
    if not module.bias or len(parameters.names(module)) > 1:
        raise ValueError(
            f"expected module to have biases, one layer and one direction, as haste's layers do, got {module}"
        )
    ((kernel, recurrent_kernel, *biases),) = _written(module, _HASTE[kind])
    biases, norms = biases[:2], biases[2:]
    written = {"kernel": kernel, "recurrent_kernel": recurrent_kernel}
    if kind == "GRU":
        written |= {"bias": biases[0], "recurrent_bias": biases[1]}
    else:
        written |= {"bias": biases[0] + biases[1]}
    if norms:
        written |= {"gamma": torch.stack(norms[:2])}
        written |= dict(zip(("gamma_h", "beta_h"), norms[2:], strict=False))
    return written


def _checked_kind(module: nn.Module, library: str, orders: Mapping[str, Sequence[int]]) -> str:
    """Checks that `library` has such layers; returns the kind of the module, a key of `orders`."""
    kind = parameters.cell_of(module)
    if not kind:
        raise TypeError(
            f"expected module to be a layer or cell of rnnkit or torch.nn, got {type(module).__name__}"
        )
    if kind not in orders:
        raise ValueError(
            f"expected module to be a kind that {library} has, {' or '.join(orders)}, got {kind}"
        )
    if getattr(module, "proj_size", 0):
        raise ValueError(
            f"expected module to have no projection, as {library}'s layers, got proj_size={module.proj_size}"
        )
    if library == "haste" and update_gate.resets_before(module):
        raise ValueError(
            "expected module to have reset='after', as haste's GRU, got reset='before'"
        )
    if library == "Keras" and getattr(module, "layer_norm", False):
        raise ValueError(
            "expected module to have no layer_norm, as Keras's layers, got one with it"
        )
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ValueError(
            "expected module to have values, got one on the meta device: call module.to_empty(device=...) first"
        )
    return kind


def _reordered(name: str, weight: Tensor, order: Sequence[int]) -> Tensor:
    """The gates' blocks of rows of the parameter `name` in another order."""
    if name.startswith("norm_c"):  # it has one row for each unit
        return weight
    blocks = weight.chunk(len(order))
    return torch.cat([blocks[k] for k in order])


def _names(module: nn.Module) -> list[list[str]]:
    """The names of the parameters of each layer and direction, those of layer normalization last."""
    return [[*own.values(), *parameters.norms(module, own)] for own in parameters.names(module)]


def _as_keeping(module: nn.Module, name: str, weight: Tensor) -> Tensor:
    """The module's parameter for an update gate that keeps, as theirs does; or theirs for the module's."""
    if update_gate.writes(module) and name in update_gate.names_of_z(module):
        return update_gate.with_other_gate(weight)
    return weight


def _written(module: nn.Module, order: Sequence[int]) -> list[list[Tensor]]:
    """Copies in a library's order of each layer and direction: kernel, recurrent_kernel, biases, norms."""
    written = []
    for names in _names(module):
        arrays = []
        for name in names:
            weight = getattr(module, name)
            if weight is None:
                raise ValueError(f"expected {name} to be a tensor, got None")
            weight = _as_keeping(module, name, sharding.whole(weight.detach()))
            arrays.append(
                _reordered(name, weight, order).t().clone(memory_format=torch.contiguous_format)
            )
        written.append(arrays)
    return written


def _as_keras(module: nn.Module, kind: str) -> list[Tensor]:
    """The list that `get_weights()` would return, as tensors."""
    arrays = []
    for written in _written(module, _KERAS[kind]):
        # numpy has no bfloat16.
        kernel, recurrent_kernel, *biases = (
            weight.float() if weight.dtype == torch.bfloat16 else weight for weight in written
        )
        arrays += [kernel, recurrent_kernel]
        if biases:
            after = kind == "GRU" and not update_gate.resets_before(module)
            arrays.append(torch.stack(biases) if after else biases[0] + biases[1])
    return arrays


def _as_tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    if str(getattr(value, "dtype", "")) == "bfloat16":  # an array of ml_dtypes, which torch refuses
        value = value.astype("float32")
    try:
        return torch.tensor(value)  # unlike as_tensor does not warn of an array that is read-only
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"expected {name} to be an array or a tensor, got {type(value).__name__}: {error}"
        ) from error


def _check_shape(name: str, value: Tensor, like: Tensor) -> None:
    if value.shape != like.shape:
        raise ValueError(f"expected {name} of shape {tuple(like.shape)}, got {tuple(value.shape)}")


def _load(module: Module, order: Sequence[int], given: Sequence[Sequence[Tensor]]) -> Module:
    """Writes kernel, recurrent_kernel, biases and norms of each layer and direction into the module's parameters."""
    state = {}
    for names, weights in zip(_names(module), given, strict=True):
        for name, weight in zip(names, weights, strict=True):
            held = parameters.held(module, name)
            values = _as_keeping(module, name, _reordered(name, weight.t(), order))
            state[name] = sharding.sharded_like(held, values)
    # Not all that a subclass may add is given. A frozen layer packs its weights again.
    module.load_state_dict(state, strict=False)
    return module
