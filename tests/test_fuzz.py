"""The program `fuzz.py`: a small sample of it passes, and it notices what goes wrong."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import fuzz
import pytest
import torch

from rnnkit import autograd, backends

pytestmark = pytest.mark.skipif(
    backends.EXTENSION is None, reason=f"no C++ kernels: {backends.EXTENSION_REASON}"
)


def test_sample_of_configurations(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["60", "--seed", "3"]) == 0, capsys.readouterr().out
    assert capsys.readouterr().out == "seed 3: 60 configurations, 0 failures\n"


def test_sample_of_malformed_calls(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--malformed", "60", "--seed", "5"]) == 0, capsys.readouterr().out
    assert capsys.readouterr().out == "seed 5: 60 malformed calls, 0 failures\n"


def test_a_planted_fault_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A result that is off by a hundredth of a thousandth, in one part of many."""
    right = autograd.run

    def wrong(*args: Any, **options: Any) -> Any:
        outputs, finals = right(*args, **options)
        return [output * (1 + 1e-5) for output in outputs], finals

    monkeypatch.setattr(backends, "fast_path", lambda name: None)
    monkeypatch.setattr(autograd, "run", wrong)
    threads = torch.get_num_threads()
    try:
        assert fuzz.main(["12", "--here"]) == 1
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"seed 0: 12 configurations, {len(lines) - 1} failures"
    command, words = lines[0].split("  # ")
    assert command.startswith("python tests/fuzz.py --seed 0 --only ") and "error" in words
    number = command.split()[-1]
    assert fuzz.main(["--seed", "0", "--only", number]) == 1
    assert words.split(" in 9 draws")[0].split(": ", 1)[1] in capsys.readouterr().out


def test_a_malformed_call_with_a_result_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Memory that was never written, in place of what `layer_forward` gives."""
    import fuzz_malformed

    def unwritten(it: fuzz_malformed.Call) -> Any:
        return torch.empty(3)

    drawn = fuzz_malformed.malformed

    def planted(seed: int, number: int) -> fuzz_malformed.Call:
        it = drawn(seed, number)
        it.call, it.arguments, it.defined, it.words = lambda: unwritten(it), [], True, "planted"
        return it

    monkeypatch.setattr(fuzz_malformed, "malformed", planted)
    assert fuzz.main(["--malformed", "3", "--here"]) == 1
    assert "planted: a result that was not written" in capsys.readouterr().out


CHILD = """
import os, signal, sys
for number in range(int(sys.argv[1]), int(sys.argv[2])):
    print("begin", flush=True)
    print(f"call draw {number}", flush=True)
    if number == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 2:
        print("compare", flush=True)
        os._exit(3)
    print("end " + "wrong" * (number == 3), flush=True)
"""


def test_a_child_that_ends_is_a_failure_and_the_next_draws_go_on(tmp_path: Path) -> None:
    program = tmp_path / "child.py"
    program.write_text(CHILD)
    found = list(fuzz.attend(lambda *span: [sys.executable, str(program), *map(str, span)], 5))
    assert [drawn for drawn, _ in found] == [f"draw {number}" for number in range(5)]
    assert [wrong for _, wrong in found] == ["", "the process ended with -11: ", "", "wrong", ""]


def test_a_child_that_cannot_run_ends_the_program() -> None:
    with pytest.raises(SystemExit, match="ended with 2"):
        list(fuzz.attend(lambda *span: [sys.executable, "-c", "raise SystemExit(2)"], 5))


def test_the_exit_status_is_the_program_s() -> None:
    ended = subprocess.run(
        [sys.executable, fuzz.__file__, "--nonsense"], capture_output=True, text=True
    )
    assert ended.returncode == 2 and "usage" in ended.stderr
