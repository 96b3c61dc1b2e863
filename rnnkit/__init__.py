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
    from rnnkit.foreign_cells import from_torchrecurrent

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
    "from_torchrecurrent",
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
        """The library and what belongs to it, imported when it is used: a program without does not wait for it."""
        if name in ("library", "from_torchrecurrent"):
            import importlib

            module = "library" if name == "library" else "foreign_cells"
            found = importlib.import_module(f"rnnkit.{module}")
            return found if name == "library" else getattr(found, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
