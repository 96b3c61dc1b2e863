"""`python -m rnnkit info --check`: what it says of backends that are there, that are not, and that are wrong."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import rnnkit
from rnnkit import __main__ as command
from rnnkit import backends, checking

extension = pytest.mark.skipif(
    backends.EXTENSION is None, reason=f"no C++ kernels ({backends.EXTENSION_REASON})"
)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("RNNKIT_CACHE", str(tmp_path_factory.mktemp("cells")))


@extension
def test_everything_that_is_there_is_right() -> None:
    program = [sys.executable, "-m", "rnnkit", "info", "--check", "--json"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["checks"]
    assert told["C++ on the CPU"].startswith("ok: LSTM, GRU, RNN: relative error")
    assert told["interpreted cells"].startswith("ok: nbr: relative error")
    assert not any(line.startswith("FAILED") for line in told.values())


def test_without_it_nothing_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["info", "--json"]) == 0
    assert "checks" not in json.loads(capsys.readouterr().out)


@extension
def test_a_wrong_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(layer: nn.Module, x: torch.Tensor) -> Any:
        found = right(layer, x)
        if x.dtype == torch.float32:
            found[-1] = found[-1] * 1.01
        return found

    right = checking._results
    monkeypatch.setattr(checking, "_results", wrong)
    assert command.main(["info", "--check"]) == 1
    assert (
        "FAILED: LSTM, GRU, RNN: relative error 1.0e-02, at most 0.0001" in capsys.readouterr().out
    )


@extension
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_result_that_is_no_number(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    right = checking._results
    monkeypatch.setattr(
        checking,
        "_results",
        lambda layer, x: [
            t.fill_(value) if x.dtype == torch.float32 else t for t in right(layer, x)
        ],
    )
    assert checking._layers("C++", "cpp", "cpu").passed is False


@extension
def test_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(checking, "_results", broken)
    found = list(checking.checks())
    assert str(found[0]) == "FAILED: RuntimeError: no kernel image"
    assert len(found) >= 4


def test_what_is_absent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends, "EXTENSION", None)
    monkeypatch.setattr(backends, "EXTENSION_REASON", "not built")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["info", "--check"]) == 0
    printed = capsys.readouterr().out
    assert "absent: not built: install g++ 11 or clang 19 or later and rnnkit again" in printed
    assert printed.count("absent: ") == 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "CUDA_REASON", "not built")
    monkeypatch.setattr(backends, "TRITON_REASON", "triton is not installed")
    told = [str(check) for check in checking.checks()][1:]
    assert told == [
        "absent: not built: see docs/cuda.md",
        "absent: triton is not installed: pip install triton",
    ]


@extension
def test_random_numbers_and_variables_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("RNNKIT_COMPILE", "0")
    state = torch.get_rng_state()
    found = {check.what: str(check) for check in checking.checks()}
    assert torch.equal(torch.get_rng_state(), state)
    assert os.environ["RNNKIT_COMPILE"] == "0"
    if rnnkit.library.mgu.op_name not in _registered():
        assert found["compiled cells"].startswith("absent: not used: RNNKIT_COMPILE=0")


def _registered() -> dict[str, str]:
    from rnnkit.graph import kernels

    return {name: kind for name, kind in kernels._kinds.items() if kind == "compiled"}
