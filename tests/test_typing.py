"""What a type checker knows of rnnkit in a user's script."""

import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import rnnkit

pytest.importorskip("mypy", reason="mypy is not installed")

SCRIPT = """
from typing import assert_type

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import rnnkit

x = torch.randn(2, 1, 3)
packed = pack_sequence([x[0]])
Pair = tuple[Tensor, Tensor]

lstm = rnnkit.LSTM(3, 4, num_layers=2, proj_size=1, recompute=True)
assert_type(lstm(x), tuple[Tensor, Pair])
assert_type(lstm(packed), tuple[PackedSequence, Pair])
assert_type(lstm.forward(packed, None), tuple[PackedSequence, Pair])
for layer in (rnnkit.GRU(3, 4, bidirectional=True), rnnkit.RNN(3, 4, nonlinearity="relu")):
    assert_type(layer(x), Pair)
    assert_type(layer(packed), tuple[PackedSequence, Tensor])
assert_type(rnnkit.LSTMCell(3, 4)(x[0]), Pair)
assert_type(rnnkit.GRUCell(3, 4)(x[0]), Tensor)
assert_type(rnnkit.RNNCell(3, 4)(x[0], x[0]), Tensor)
assert_type(rnnkit.init.chrono_(rnnkit.LSTM(3, 4, init="keras"), t_max=100), rnnkit.LSTM)
rnnkit.GRUCell(3, 4, init=rnnkit.init.orthogonal_)
readout = rnnkit.Readout(4, 5)
assert_type(readout(x), Tensor)
assert_type(readout.predict(packed), PackedSequence)
assert_type(readout.loss(x, x.long()), Tensor)
assert_type(rnnkit.convert(nn.Sequential(lstm)).exchanged, dict[str, str])
with rnnkit.patch(), rnnkit.backend("reference"):
    pass
"""

WRONG = """import rnnkit
rnnkit.GRU(3, 4)("x")
rnnkit.LSTMCell(3, 4)([1.0])
rnnkit.convert(rnnkit.GRU(3, 4)).swapped
rnnkit.GRU(3, 4, bidirectionl=True)
rnnkit.LSTM("x", 4)
rnnkit.Readout(3, 4).predict("x")
"""


def test_a_script_is_checked_as_it_runs(tmp_path: Path) -> None:
    """Every line of SCRIPT is right, every line of WRONG wrong."""
    path, wrong = tmp_path / "script.py", tmp_path / "wrong.py"
    path.write_text(SCRIPT)
    wrong.write_text(WRONG)
    options = ["--strict", "--python-version", "3.11", "--follow-imports", "silent"]
    options += ["--config-file", "", "--cache-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(path), str(wrong)],
        cwd=Path(rnnkit.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=500,
    )
    errors = [
        line.partition("wrong.py:")[2] for line in done.stdout.splitlines() if "error:" in line
    ]
    assert [error[0] for error in errors] == ["2", "3", "4", "5", "6", "7"], (
        done.stdout + done.stderr
    )
    assert "No overload variant" in errors[0]
    assert "Argument 1" in errors[1]
    assert "has no attribute" in errors[2]
    assert "Unexpected keyword" in errors[3]
    assert "Argument 1" in errors[4]
    assert "No overload variant" in errors[5]


def test_the_package_says_that_it_is_typed() -> None:
    assert files("rnnkit").joinpath("py.typed").is_file()
