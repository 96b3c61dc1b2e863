"""The error table: every bad argument, the exception it raises, and the name that the message gives it.

Each row is put to torch.nn too: the exception is of the same type, and where torch.nn raises it in Python
the text is the same, word for word. A row that differs says what torch.nn does instead.
"""

import linecache
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from configurations import CELLS, LAYERS, Case
from torch import nn, randn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnkit

DROPOUT = r"dropout should be a number in range \[0, 1\]"
#: Arguments of a layer's constructor -> exception and text.
BAD_LAYERS: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((0, 4), {}, ValueError, "input_size must be greater than zero"),
    ((-1, 4), {}, ValueError, "input_size must be greater than zero"),
    ((3, 0), {}, ValueError, "hidden_size must be greater than zero"),
    ((3.0, 4), {}, TypeError, "input_size should be of type int, got: float"),
    ((3, "4"), {}, TypeError, "hidden_size should be of type int, got: str"),
    ((3,), {}, TypeError, "hidden_size"),
    ((), {}, TypeError, "input_size"),
    ((3, 4, 0), {}, ValueError, "num_layers must be greater than zero"),
    ((3, 4, 1.5), {}, TypeError, "float"),
    ((3, 4), {"bias": 1}, TypeError, "bias should be of type bool, got: int"),
    ((3, 4), {"bias": None}, TypeError, "bias should be of type bool, got: NoneType"),
    ((3, 4), {"batch_first": 1}, TypeError, "batch_first should be of type bool, got: int"),
    ((3, 4), {"dropout": 1.5}, ValueError, DROPOUT),
    ((3, 4), {"dropout": -0.1}, ValueError, DROPOUT),
    ((3, 4), {"dropout": True}, ValueError, DROPOUT),
    ((3, 4), {"dropout": float("nan")}, ValueError, DROPOUT),
    ((3, 4), {"mode": "LSTM"}, TypeError, "mode"),
    ((3, 4), {"size": 1}, TypeError, "size"),
    ((3, 4), {"dtype": torch.int64}, RuntimeError, "floating point"),
    ((3, 4), {"device": "nowhere"}, RuntimeError, "nowhere"),
]
NO_PROJECTION = (ValueError, "proj_size argument is only supported for LSTM, not RNN or GRU")
BAD_CONSTRUCTIONS = [
    *((name, *row) for name in ("RNN", "LSTM", "GRU") for row in BAD_LAYERS),
    *(
        ("LSTM", (3, 4), {"proj_size": size}, ValueError, "proj_size has to be smaller")
        for size in (4, 9)
    ),
    (
        "LSTM",
        (3, 4),
        {"proj_size": -1},
        ValueError,
        "proj_size should be a positive integer or zero",
    ),
    ("RNN", (3, 4), {"proj_size": 2}, *NO_PROJECTION),
    ("GRU", (3, 4), {"proj_size": 0}, *NO_PROJECTION),
    ("RNN", (3, 4), {"nonlinearity": "gelu"}, ValueError, "Unknown nonlinearity 'gelu'"),
    ("RNN", (3, 4, 1, True), {}, ValueError, "Unknown nonlinearity 'True'"),
    ("RNN", (3, 4, 1, "relu"), {"nonlinearity": "relu"}, TypeError, "nonlinearity"),
    ("LSTM", (3, 4), {"nonlinearity": "relu"}, TypeError, "nonlinearity"),
    ("GRU", (3, 4), {"nonlinearity": "relu"}, TypeError, "nonlinearity"),
    *((name, (3,), {}, TypeError, "hidden_size") for name in ("RNNCell", "LSTMCell", "GRUCell")),
    *((name, (3, -1), {}, RuntimeError, "negative") for name in ("RNNCell", "LSTMCell", "GRUCell")),
    *((name, (3.0, 4), {}, TypeError, "float") for name in ("RNNCell", "LSTMCell", "GRUCell")),
]


@pytest.mark.parametrize(("name", "args", "kwargs", "error", "text"), BAD_CONSTRUCTIONS, ids=str)
def test_constructor(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception], text: str
) -> None:
    raised = []
    for package in (rnnkit, nn):
        with pytest.raises(error, match=text) as caught:
            getattr(package, name)(*args, **kwargs)
        raised.append((caught.type, str(caught.value)))
    assert raised[0] == raised[1]


@dataclass(frozen=True)
class Bad:
    """A bad call of modules of 4 inputs and 6 hidden units.

    Attributes:
        modules: names in `LAYERS` and `CELLS`.
        what: is wrong.
        arguments: of the call; made with a function like torch.randn that makes a state, for an LSTM a pair.
        error, text: the exception's type and a pattern in its text.
        instead: torch.nn's exception, or None if it raises none, where it is of another type.
    """

    modules: Iterable[str]
    what: str
    arguments: Callable[[Callable[..., Any]], tuple[Any, ...]]
    error: type[Exception]
    text: str
    instead: type[Exception] | None = Exception


def packed(*shape: int, dtype: torch.dtype = torch.float32) -> PackedSequence:
    lengths = torch.tensor([5, 4, 3])
    return pack_padded_sequence(randn(shape, dtype=dtype), lengths)


def with_sizes(rows: int, *batch_sizes: int) -> PackedSequence:
    return PackedSequence(randn(rows, 4), torch.tensor(batch_sizes))


LSTM, LSTM_CELL = ("lstm",), ("lstm_cell",)
OTHERS = [name for name in LAYERS if name != "lstm"]
OTHER_CELLS = [name for name in CELLS if name != "lstm_cell"]
X, H = randn(5, 3, 4), randn(1, 3, 6)
Runtime, Value = RuntimeError, ValueError

# fmt: off
BAD_CALLS = [
    Bad(LAYERS, "input of rank 1", lambda hx: (X[0, 0],), Value, "input to be 2D or 3D, got 1D"),
    Bad(LAYERS, "input of rank 4", lambda hx: (X[None],), Value, "input to be 2D or 3D, got 4D"),
    Bad(LAYERS, "input in float64", lambda hx: (X.double(),), Value, r"input dtype \(torch.float64\)"),
    Bad(LAYERS, "input of integers", lambda hx: (X.long(),), Value, r"input dtype \(torch.int64\)"),
    Bad(LAYERS, "input size", lambda hx: (randn(5, 3, 7),), Runtime, "input_size. Expected 4, got 7"),
    Bad(LAYERS, "input size unbatched", lambda hx: (randn(5, 7),), Runtime, "input_size. Expected 4, got 7"),
    Bad(LAYERS, "no steps", lambda hx: (X[:0],), Runtime, "sequence length to be larger than 0"),
    Bad(LAYERS, "no steps, no batch", lambda hx: (X[:0, :0],), Runtime, "sequence length to be larger than 0"),
    Bad(LAYERS, "input elsewhere", lambda hx: (X.to("meta"),), Runtime, "input tensor at meta"),
    Bad(LAYERS, "input a list", lambda hx: (X.tolist(),), AttributeError, "list"),
    Bad(LAYERS, "no input", lambda hx: (), TypeError, "input"),
    Bad(LAYERS, "too many arguments", lambda hx: (X, None, None), TypeError, "positional argument"),
    Bad(LAYERS, "hx of rank 2", lambda hx: (X, hx(1, 6)), Runtime, "hx .*also be 3-D but got .?2-D"),
    Bad(LAYERS, "hx of rank 4", lambda hx: (X, hx(1, 1, 3, 6)), Runtime, "hx .*also be 3-D but got .?4-D"),
    Bad(LAYERS, "hx batched", lambda hx: (X[0], hx(1, 3, 6)), Runtime, "hx .*also be 2-D but got .?3-D"),
    Bad(LAYERS, "hidden size", lambda hx: (X, hx(1, 3, 7)), Runtime, r"hidden.* \(1, 3, 6\), got \[1, 3, 7\]"),
    Bad(LAYERS, "hidden size unbatched", lambda hx: (X[0], hx(1, 7)), Runtime, r"hidden.*, got \[1, 1, 7\]"),
    Bad(LAYERS, "batch size", lambda hx: (X, hx(1, 2, 6)), Runtime, r"hidden.* \(1, 3, 6\), got \[1, 2, 6\]"),
    Bad(LAYERS, "number of states", lambda hx: (X, hx(2, 3, 6)), Runtime, r"hidden.*, got \[2, 3, 6\]"),
    Bad(LAYERS, "hx in float64", lambda hx: (X, hx(1, 3, 6, dtype=torch.float64)), Runtime, "hidden tensor with"),
    Bad(LAYERS, "hx elsewhere", lambda hx: (X, hx(1, 3, 6, device="meta")), Runtime, "hidden tensor at meta"),
    Bad(OTHERS, "hx a tuple", lambda hx: (X, (H, H)), AttributeError, "hx to be a Tensor, got tuple"),
    Bad(OTHERS, "hx a number", lambda hx: (X, 3), AttributeError, "hx to be a Tensor, got int"),
    Bad(LSTM, "hx one state", lambda hx: (X, (H,)), IndexError, r"hx to be a pair .*got 1"),
    Bad(LSTM, "hx three states", lambda hx: (X, (H, H, H)), Runtime, "hx to be a pair .*got 3"),
    Bad(LSTM, "hx of None", lambda hx: (X, (H, None)), AttributeError, "hx to be a pair .*NoneType"),
    Bad(LSTM, "hx an array", lambda hx: (X, H.numpy()), AttributeError, "hx to be a pair"),
    # torch.nn takes the tensor for a pair, and its exception is of what it then finds.
    Bad(LSTM, "hx a tensor", lambda hx: (X, H), TypeError, "hx to be a pair", IndexError),
    Bad(LSTM, "c's size", lambda hx: (X, (H, randn(1, 3, 7))), Runtime, r"hidden\[1\].*, got \[1, 3, 7\]"),
    Bad(LSTM, "c's rank", lambda hx: (X, (H, H[0])), Runtime, r"hx and cx .*\(3-D, 2-D\)"),
    Bad(LSTM, "c in float64", lambda hx: (X, (H, H.double())), Runtime, "hidden tensor with torch.float64"),
    Bad(LAYERS, "packed input size", lambda hx: (packed(5, 3, 7),), Runtime, "input_size. Expected 4, got 7"),
    Bad(LAYERS, "packed rank", lambda hx: (packed(5, 3, 4, 2),), Runtime, "input must have 2 dim.*, got 3"),
    Bad(LAYERS, "packed hidden size", lambda hx: (packed(5, 3, 4), hx(1, 3, 7)), Runtime, r"got \[1, 3, 7\]"),
    Bad(LAYERS, "packed batch size", lambda hx: (packed(5, 3, 4), hx(1, 2, 6)), Runtime, r"got \[1, 2, 6\]"),
    Bad(LAYERS, "packed states", lambda hx: (packed(5, 3, 4), hx(2, 3, 6)), Runtime, r"got \[2, 3, 6\]"),
    Bad(OTHERS, "packed hx rank", lambda hx: (packed(5, 3, 4), hx(3, 6)), Runtime, r"got \[3, 6\]"),
    Bad(OTHERS, "packed float64", lambda hx: (packed(5, 3, 4, dtype=torch.float64),), Value, "input dtype"),
    # torch.nn.LSTM leaves a packed input unchecked, and fails somewhere below.
    Bad(LSTM, "packed hx rank", lambda hx: (packed(5, 3, 4), hx(3, 6)), Runtime, r"got \[3, 6\]", IndexError),
    Bad(LSTM, "packed float64", lambda hx: (packed(5, 3, 4, dtype=torch.float64),), Value, "input dtype", Runtime),
    Bad(LAYERS, "packed no steps", lambda hx: (with_sizes(0),), Runtime, "sequence length to be l", IndexError),
    Bad(LAYERS, "packed too few rows", lambda hx: (with_sizes(3, 3, 2),), Runtime, "sum .*3"),
    Bad(LAYERS, "packed too many rows", lambda hx: (with_sizes(7, 3, 2),), Runtime, "sum .*7", None),
    Bad(LAYERS, "packed increasing sizes", lambda hx: (with_sizes(5, 2, 3),), Runtime, "increase|size of tensor"),
    Bad(LAYERS, "packed negative size", lambda hx: (with_sizes(3, 5, -2),), Runtime, "got .*-2"),
    Bad(CELLS, "input of rank 0", lambda hx: (X[0, 0, 0],), Value, "input to be 1D or 2D, got 0D"),
    Bad(CELLS, "input of rank 3", lambda hx: (X,), Value, "input to be 1D or 2D, got 3D"),
    Bad(CELLS, "input size", lambda hx: (randn(3, 7),), Runtime, "input_size: got 7 expected 4"),
    Bad(CELLS, "input size unbatched", lambda hx: (randn(7),), Runtime, "input_size: got 7 expected 4"),
    Bad(CELLS, "input in float64", lambda hx: (X[0].double(),), Runtime, "input tensor with torch.float64"),
    Bad(CELLS, "input of integers", lambda hx: (X[0].long(),), Runtime, "input tensor with torch.int64"),
    Bad(CELLS, "input packed", lambda hx: (packed(5, 3, 4),), AttributeError, "PackedSequence"),
    Bad(CELLS, "no input", lambda hx: (), TypeError, "input"),
    Bad(CELLS, "hx of rank 3", lambda hx: (X[0], hx(1, 3, 6)), Value, "(hidden|hx.0.) to be 1D or 2D, got 3D"),
    Bad(CELLS, "hidden size", lambda hx: (X[0], hx(3, 7)), Runtime, "hidden0 .*got 7, expected 6"),
    Bad(CELLS, "hidden size unbatched", lambda hx: (X[0, 0], hx(7)), Runtime, "hidden0 .*got 7, expected 6"),
    Bad(CELLS, "batch size", lambda hx: (X[0], hx(2, 6)), Runtime, "batch size 3 .*hidden0 batch size 2"),
    Bad(CELLS, "hx unbatched", lambda hx: (X[0], hx(6)), Runtime, "hidden0"),
    Bad(CELLS, "hx in float64", lambda hx: (X[0], hx(3, 6, dtype=torch.float64)), Runtime, "hidden tensor with"),
    Bad(OTHER_CELLS, "hx a tuple", lambda hx: (X[0], (H[0],)), AttributeError, "hx to be a Tensor, got tuple"),
    Bad(LSTM_CELL, "hx one state", lambda hx: (X[0], (H[0],)), Runtime, "hx to be a pair .*got 1"),
    Bad(LSTM_CELL, "hx three states", lambda hx: (X[0], (H[0],) * 3), Runtime, "hx to be a pair .*got 3"),
    Bad(LSTM_CELL, "hx of None", lambda hx: (X[0], (None, None)), AttributeError, "hx to be a pair .*NoneType"),
    Bad(LSTM_CELL, "hx a tensor", lambda hx: (X[0], H[0]), TypeError, "hx to be a pair"),
    Bad(LSTM_CELL, "c's size", lambda hx: (X[0], (H[0], randn(3, 7))), Runtime, "hidden1 .*got 7, expected 6"),
    Bad(LSTM_CELL, "c's rank", lambda hx: (X[0], (H[0], H)), Value, r"hx\[1\] to be 1D or 2D, got 3D"),
    # torch.nn promotes where its cell is made of pointwise ops.
    Bad(LSTM_CELL, "c in float64", lambda hx: (X[0], (H[0], H[0].double())), Runtime, "hidden tensor with", None),
]
# fmt: on


def raised_in_python(error: BaseException) -> bool:
    """Whether a `raise` statement raised it, rather than a call into C++."""
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    return (
        linecache.getline(frame.tb_frame.f_code.co_filename, frame.tb_lineno)
        .strip()
        .startswith("raise")
    )


def moved(arguments: Any, device: str) -> Any:
    """What is on the CPU, there."""
    if type(arguments) is tuple:
        return tuple(moved(argument, device) for argument in arguments)
    if isinstance(arguments, PackedSequence):
        return arguments._replace(data=arguments.data.to(device))
    on_cpu = isinstance(arguments, torch.Tensor) and arguments.device.type == "cpu"
    return arguments.to(device) if on_cpu else arguments


@pytest.mark.parametrize(
    ("module", "bad"),
    [
        pytest.param(module, bad, id=f"{module}-{bad.what}")
        for bad in BAD_CALLS
        for module in bad.modules
    ],
)
def test_call(backend: str, device: str, module: str, bad: Bad) -> None:
    """On a GPU only rnnkit's side of the table: cuDNN leaves more unchecked."""

    def hx(*shape: int, **options: Any) -> Any:
        state = randn(*shape, **options)
        return (state, state) if "lstm" in module else state

    ours, theirs = Case(module, device=device).twins()
    arguments = moved(bad.arguments(hx), device)
    with pytest.raises(bad.error, match=bad.text) as caught:
        ours(*arguments)
    if device != "cpu":
        return
    if bad.instead is None:
        theirs(*arguments)
        return
    with pytest.raises(bad.error if bad.instead is Exception else bad.instead) as expected:
        theirs(*arguments)
    if raised_in_python(expected.value) and bad.instead is Exception:
        assert str(caught.value) == str(expected.value)


@pytest.mark.parametrize("nonlinearity", ["gelu", None])
def test_a_cell_looks_at_its_nonlinearity_in_forward(nonlinearity: str | None) -> None:
    texts = []
    for package in (rnnkit, nn):
        cell = package.RNNCell(4, 6, nonlinearity=nonlinearity)
        with pytest.raises(RuntimeError, match="Unknown nonlinearity") as caught:
            cell(X[0])
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


def test_a_module_with_its_weights_elsewhere_or_in_another_dtype(backend: str, device: str) -> None:
    """One of the weights, as a partial conversion leaves it; the message says which kind of tensor."""
    for change in ({"dtype": torch.float64}, {"device": "meta"}):
        for module in (*LAYERS, *CELLS):
            case = Case(module, device=device)
            ours, _ = case.twins()
            name = list(ours._parameters)[1]
            setattr(ours, name, nn.Parameter(getattr(ours, name).to(**change)))
            with pytest.raises(RuntimeError, match=r"parameter tensor (with|at)"):
                ours(*case.arguments(case.leaves()))
