"""rnnkit: torch.nn's recurrent layers and cells on fused kernels, as a drop-in replacement."""

from typing import TYPE_CHECKING, Any

from rnnkit import init
from rnnkit.backends import backend
from rnnkit.cells import GRUCell, LSTMCell, RNNCell
from rnnkit.converting import convert, patch, revert
from rnnkit.definition import Cell, cell
from rnnkit.explaining import explain
from rnnkit.flow import gradient_flow
from rnnkit.foreign_calls import flashrnn
from rnnkit.foreign_weights import from_haste, from_keras, to_haste, to_keras
from rnnkit.freezing import freeze
from rnnkit.interop import decompositions
from rnnkit.layers import GRU, LSTM, RNN
from rnnkit.packing import pack_padded_sequence, pad_packed_sequence
from rnnkit.readout import Readout
from rnnkit.recurrent import Recurrent, RecurrentCell

if TYPE_CHECKING:
    from rnnkit import library

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Cell",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Readout",
    "Recurrent",
    "RecurrentCell",
    "backend",
    "cell",
    "convert",
    "decompositions",
    "explain",
    "flashrnn",
    "freeze",
    "from_haste",
    "from_keras",
    "gradient_flow",
    "init",
    "library",
    "pack_padded_sequence",
    "pad_packed_sequence",
    "patch",
    "revert",
    "to_haste",
    "to_keras",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """`rnnkit.library`, imported when it is used: a program without its cells does not wait for them."""
        if name == "library":
            import importlib

            return importlib.import_module("rnnkit.library")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
