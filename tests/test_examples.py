"""The examples, a few steps at a time: agreement, checkpoints, Ctrl-C, wrong arguments."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from programs import load

from rnnkit.__main__ import info

PROGRAM = Path(__file__).parents[1] / "examples" / "char_rnn.py"
STEPS = 14
TINY = ["--hidden", "12", "--bptt", "6", "--batch", "3", "--threads", "1"]


@pytest.fixture(scope="module")
def char_rnn() -> ModuleType:
    return load(PROGRAM)


@pytest.mark.parametrize("model", ["LSTM", "GRU", "RNN"])
def test_word_language_model_has_the_losses_of_torch(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    program = load(PROGRAM.with_name("word_language_model.py"))
    sizes = "--steps 200 --size 24 --bptt 5 --batch 4 --lr 1"
    assert program.main(["--model", model, "--text", "text.txt", *sizes.split()]) == 0
    assert "over 200 steps" in capsys.readouterr().out


def test_vanishing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    program = load(PROGRAM.with_name("vanishing.py"))
    drawn: list[Any] = []
    draw = program.draw
    monkeypatch.setattr(program, "draw", lambda *given: drawn.append(draw(*given)) or drawn[0])
    sizes = "--steps 30 --hidden 4 --batch 2 --seconds 1 --plot picture.png"
    assert program.main(sizes.split()) == 0
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    networks = [network.name for network in program.networks()]
    told = capsys.readouterr().out
    assert all(told.count(f"  {name} ") == 2 for name in networks)
    for axes in drawn[0].axes:
        assert axes.get_xlabel() and axes.get_ylabel() and axes.get_title()
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert [label.split(":")[0] for label in labels] == networks
    assert [axes.get_yscale() for axes in drawn[0].axes] == ["log", "linear", "log", "log"]


@pytest.mark.parametrize("wrong", [["--steps", "20"], ["--seconds", "0"]])
def test_vanishing_wrong_arguments(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        load(PROGRAM.with_name("vanishing.py")).main(wrong)
    assert exit.value.code == 2


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
def test_ppo_has_one_loss_in_all_ways(
    cell: str, dtype: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = load(PROGRAM.with_name("recurrent_ppo.py"))
    sizes = "--steps 20 --environments 3 --hidden 6 --passes 2 --updates 3 --threads 1"
    options = [*sizes.split(), "--cell", cell, "--dtype", dtype]
    assert program.main(options) == 0
    told = capsys.readouterr().out
    difference = float(told.split("in 3 updates:")[1].split()[0])
    assert difference < {"float32": 1e-6, "float64": 1e-13}[dtype]
    assert all(f"\n{way:<6} success " in told for way in program.WAYS)

    def never(layer: Any, x: Any, states: Any, begins: torch.Tensor) -> Any:
        return program.step_by_step(layer, x, states, torch.zeros_like(begins))

    monkeypatch.setitem(program.WAYS, "loop", (torch.nn, never))
    assert program.main(options) == 1


def test_ppo_learns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program = load(PROGRAM.with_name("recurrent_ppo.py"))
    monkeypatch.setattr(program, "LONGEST", 4)
    sizes = "--hidden 32 --steps 32 --updates 40 --threads 1"
    assert program.main(["--way", "reset", *sizes.split()]) == 0
    assert float(capsys.readouterr().out.split("success")[1].split("%")[0]) > 90


@pytest.mark.parametrize("wrong", [["--way", "both"], ["--steps", "0"], ["--threads", "0"]])
def test_ppo_wrong_arguments(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        load(PROGRAM.with_name("recurrent_ppo.py")).main(wrong)
    assert exit.value.code == 2


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder but for text.txt, of which STEPS steps read more than one pass."""
    words = random.Random(0).choices(["one", "two", "three,", "four.\n", "fünf", "\x1b[1m"], k=50)
    (tmp_path / "text.txt").write_text(" ".join(words), "utf-8")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture
def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


def run(module: ModuleType, *arguments: object, steps: int = STEPS) -> int:
    common = [*TINY, "--text", "text.txt", "--steps", str(steps)]
    status: int = module.main([*common, *map(str, arguments)])
    return status


def losses(checkpoint: str) -> dict[str, list[float]]:
    trainings = torch.load(checkpoint, weights_only=True)["trainings"]
    return {name: training["losses"] for name, training in trainings.items()}


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.usefixtures("no_matplotlib")
def test_curves_agree(
    char_rnn: ModuleType, capsys: pytest.CaptureFixture[str], cell: str, dtype: str, layers: int
) -> None:
    arguments = ["--cell", cell, "--dtype", dtype, "--layers", layers, "--save", "run.pt"]
    assert run(char_rnn, *arguments) == 0
    curves = losses("run.pt")
    assert len(curves["torch"]) == STEPS
    tolerance = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 2e-2}[dtype]
    assert curves["rnnkit"] == pytest.approx(curves["torch"], abs=tolerance, rel=0)
    output = capsys.readouterr().out
    assert "The curves agree" in output
    assert "Unigram entropy of the text: 2." in output
    assert "Speed-up of rnnkit over torch.nn:" in output and "ms a step" in output
    about = info()
    assert f"On {about['cpu']['name']}: torch.nn on {about['cpu']['capability in torch']}" in output
    assert "Text from the rnnkit model:" in output


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.usefixtures("no_matplotlib")
def test_learns_more_than_the_unigrams(
    char_rnn: ModuleType, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    arguments = ["--only", "torch", "--save", "run.pt", "--dtype", dtype, "--lr", 0.5]
    assert run(char_rnn, *arguments, steps=150) == 0
    entropy = float(capsys.readouterr().out.split("Unigram entropy of the text:")[1].split()[0])
    assert max(losses("run.pt")["torch"][-10:]) < entropy - 0.5


@pytest.mark.usefixtures("no_matplotlib")
def test_curves_that_differ_are_reported(
    char_rnn: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = char_rnn.Training.step

    def wrong_step(training: Any, index: int) -> Any:
        wrong = training.name == "rnnkit" and index == 4
        return step(training, index) * (torch.nan if wrong else 1)

    monkeypatch.setattr(char_rnn.Training, "step", wrong_step)
    assert run(char_rnn) == 1
    assert "The curves DO NOT AGREE" in capsys.readouterr().out


@pytest.mark.usefixtures("no_matplotlib")
def test_divergence_is_reported(char_rnn: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(char_rnn, "--lr", 1e30) == 1
    output = capsys.readouterr().out
    assert "The curves DO NOT AGREE" in output
    assert "the training has diverged" in output


@pytest.mark.usefixtures("no_matplotlib")
def test_one_implementation_alone(
    char_rnn: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(char_rnn, "--save", "both.pt") == 0
    assert run(char_rnn, "--only", "rnnkit", "--save", "rnnkit.pt") == 0
    monkeypatch.setitem(sys.modules, "rnnkit", None)
    assert run(char_rnn, "--only", "torch", "--save", "torch.pt") == 0
    both = losses("both.pt")
    assert losses("torch.pt") == {"torch": both["torch"]}
    assert losses("rnnkit.pt") == {"rnnkit": both["rnnkit"]}
    capsys.readouterr()
    assert run(char_rnn) == 2
    assert "--only torch" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--cell", "lstm", "--layers", "2"],
        ["--cell", "gru"],
        ["--cell", "rnn", "--dtype", "bfloat16"],
    ],
)
@pytest.mark.usefixtures("no_matplotlib")
def test_resumed_run_is_the_same_run(
    char_rnn: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert run(char_rnn, *arguments, "--save", "whole.pt") == 0
    text_of_whole = capsys.readouterr().out.partition("Text from")
    assert run(char_rnn, *arguments, "--save", "part.pt", steps=6) == 0
    capsys.readouterr()
    resumed = ["--resume", "part.pt", "--save", "part.pt", "--steps", str(STEPS)]
    assert char_rnn.main(resumed) == 0
    assert losses("part.pt") == losses("whole.pt")
    assert capsys.readouterr().out.partition("Text from")[1:] == text_of_whole[1:]
    assert char_rnn.main(["--resume", "whole.pt"]) == 0  # nothing is left to train
    assert capsys.readouterr().out.partition("Text from")[1:] == text_of_whole[1:]


@pytest.mark.usefixtures("no_matplotlib")
def test_resume_refuses_another_model_or_text(
    char_rnn: ModuleType, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    assert run(char_rnn, "--save", "run.pt") == 0
    for option, value in [
        ("--cell", "gru"),
        ("--layers", "2"),
        ("--hidden", "13"),
        ("--bptt", "7"),
        ("--batch", "4"),
        ("--lr", "0.5"),
        ("--seed", "1"),
        ("--dtype", "float64"),
        ("--only", "torch"),
        ("--steps", str(STEPS)),
    ]:
        capsys.readouterr()
        assert char_rnn.main(["--resume", "run.pt", option, value]) == 2
        assert f"error: {option} {value}: the checkpoint run.pt" in capsys.readouterr().err
    (folder / "text.txt").write_text("another text " * 20)
    assert char_rnn.main(["--resume", "run.pt", "--steps", "20"]) == 2
    assert "another text" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", None])
def test_resume_refuses_other_files(
    char_rnn: ModuleType, capsys: pytest.CaptureFixture[str], folder: Path, content: bytes | None
) -> None:
    if content is None:
        torch.save({"weights": torch.zeros(2)}, "other.pt")
    else:
        (folder / "other.pt").write_bytes(content)
    assert char_rnn.main(["--resume", "other.pt"]) == 2
    message = "error: --resume other.pt: not a checkpoint of this program"
    assert message in capsys.readouterr().err


def half_written(checkpoint: object, file: Any) -> None:
    file.write(b"half")
    raise OSError("no space left")


@pytest.mark.usefixtures("no_matplotlib")
def test_failed_save_leaves_the_old_checkpoint(
    char_rnn: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
) -> None:
    assert run(char_rnn, "--save", "run.pt", steps=3) == 0
    before = (folder / "run.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half_written)
        assert char_rnn.main(["--resume", "run.pt", "--save", "run.pt", "--steps", "9"]) == 1
    assert "--save run.pt: not written: no space left" in capsys.readouterr().err
    assert (folder / "run.pt").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["run.pt", "text.txt"]


@pytest.mark.usefixtures("no_matplotlib")
def test_saves_now_and_then(char_rnn: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    save = torch.save

    def recorded(checkpoint: dict[str, Any], file: Any) -> None:
        saved.append(len(checkpoint["trainings"]["rnnkit"]["losses"]))
        save(checkpoint, file)

    monkeypatch.setattr(torch, "save", recorded)
    monkeypatch.setattr(char_rnn, "SAVE_SECONDS", 0.0)
    assert run(char_rnn, "--save", "run.pt") == 0
    assert saved == [5, 10, 14, 14]


def interrupt_at(char_rnn: ModuleType, step: int) -> Callable[[Any, int], Any]:
    """`Training.step`, with Ctrl-C pressed in the middle of the rnnkit model's step `step`."""
    original = char_rnn.Training.step

    def interrupted(training: Any, index: int) -> Any:
        if training.name == "rnnkit" and index == step:
            signal.raise_signal(signal.SIGINT)
        return original(training, index)

    return interrupted


@pytest.mark.usefixtures("no_matplotlib")
def test_interrupted_run_saves_and_goes_on(
    char_rnn: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(char_rnn, "--save", "whole.pt") == 0
    handler = signal.getsignal(signal.SIGINT)
    save = torch.save

    def interrupted_save(checkpoint: object, file: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        save(checkpoint, file)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(char_rnn.Training, "step", interrupt_at(char_rnn, step=6))
        patch.setattr(torch, "save", interrupted_save)
        assert run(char_rnn) == 130
    file = char_rnn.INTERRUPTED_FILE
    assert f"--resume {file}" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(losses(file)["rnnkit"]) == 7
    assert len(losses(file)["torch"]) in (5, 10)
    assert char_rnn.main(["--resume", file, "--save", "resumed.pt"]) == 0
    assert losses("resumed.pt") == losses("whole.pt")


def test_interrupt_from_the_keyboard(folder: Path) -> None:
    command = [sys.executable, str(PROGRAM), *TINY, "--text", "text.txt", "--steps", "1000000"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [*command, "--save", "run.pt"], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if " left, " in line:
                break
        process.send_signal(signal.SIGINT)
        time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        messages = process.stderr.read()
        assert process.wait(timeout=60) == 130
    assert "Go on with: --resume run.pt" in messages
    assert "Traceback" not in messages
    assert len(losses("run.pt")["rnnkit"]) >= 5
    assert sorted(path.name for path in folder.iterdir()) == ["run.pt", "text.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cell", "sru"], "argument --cell: invalid choice: 'sru'"),
        (["--layers", "0"], "argument --layers: expected a positive integer, got '0'"),
        (["--hidden", "many"], "argument --hidden: expected a positive integer, got 'many'"),
        (["--lr", "nan"], "argument --lr: expected a positive number, got 'nan'"),
        (["--seed", "-1"], "argument --seed: expected a positive integer or 0, got '-1'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--only", "jax"], "argument --only: invalid choice: 'jax'"),
        (["--device", "abacus"], "error: --device abacus: "),
        (["--text", "none.txt"], "error: --text none.txt: No such file or directory"),
        (["--text", "."], "error: --text .: "),
        (["--text", "empty.txt"], "error: --text empty.txt: the file is empty"),
        (["--batch", "100"], "--batch 100 streams of --bptt 6 characters need at least 601"),
        (["--resume", "none.pt"], "error: --resume none.pt: No such file or directory"),
        (["--save", "nowhere/run.pt"], "error: --save nowhere/run.pt: no such folder"),
        (["--save", "."], "error: --save .: this is a folder"),
        (["--plot", "nowhere/run.png"], "error: --plot nowhere/run.png: no such folder"),
    ],
)
def test_wrong_arguments_are_named(
    char_rnn: ModuleType,
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    arguments: list[str],
    message: str,
) -> None:
    (folder / "empty.txt").touch()
    try:
        status: object = run(char_rnn, *arguments)
    except SystemExit as stop:  # argparse's own errors
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_draws_a_png(
    char_rnn: ModuleType, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib, which draws the PNG, is not installed")
    assert run(char_rnn, "--plot", "curves.png") == 0
    assert "Plot: curves.png" in capsys.readouterr().out
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.usefixtures("no_matplotlib")
def test_says_how_to_get_the_png(
    char_rnn: ModuleType, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    assert run(char_rnn, "--plot", "curves.png") == 0
    assert "No curves.png: matplotlib is not installed" in capsys.readouterr().out
    assert not (folder / "curves.png").exists()


def test_default_text_is_the_standard_library(char_rnn: ModuleType) -> None:
    text = char_rnn.Text(char_rnn.read_text(None), batch=2, bptt=8, device="cpu")
    assert 1_000_000 < len(text.codes) <= char_rnn.DEFAULT_TEXT_LENGTH
    assert len(text.symbols) <= 100
    assert 2.5 < text.unigram_entropy() < 3.7


def test_windows_read_the_streams_in_order(char_rnn: ModuleType) -> None:
    text = char_rnn.Text("abcdefghijklmno\x07", batch=2, bptt=3, device="cpu")
    read = []
    for step in range(4):
        inputs, targets, anew = text.window(step)
        read.append(
            (
                ["".join(text.symbols[code] for code in stream) for stream in inputs.t()],
                ["".join(text.symbols[code] for code in stream) for stream in targets.t()],
                anew,
            )
        )
    first, second = (["abc", "hij"], ["bcd", "ijk"], True), (["def", "klm"], ["efg", "lmn"], False)
    assert read == [first, second, first, second]
    assert text.codes[-1] == 0  # a control character is a rare one
