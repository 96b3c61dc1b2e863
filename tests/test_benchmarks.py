"""benchmarks/speed.py and report.py at a tiny size: the file, the table, the picture; no figure is judged."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import report
import speed

TINY = ["--case", "3,2,5", "--rounds", "1", "--threads", "1"]
README = f"# Title\n\nbefore\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n"


@pytest.fixture(autouse=True)
def short_samples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(speed, "SAMPLE_SECONDS", 0.001)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "results" / "tiny.json"
    assert speed.main([*TINY, "--cells", "lstm", "gru", "--output", str(path)]) == 0
    return path


def wrong_gru(*sizes: int) -> nn.Module:
    """A GRU whose gradients are wrong and whose outputs are right."""
    layer = nn.GRU(*sizes)
    layer.weight_hh_l0.register_hook(lambda gradient: 1.001 * gradient)
    return layer


def run_report(folder: Path, *arguments: str) -> int:
    places = [
        "--readme",
        str(folder / "README.md"),
        "--picture",
        str(folder / "docs" / "speed.png"),
    ]
    return report.main([str(folder / "results" / "tiny.json"), *places, *arguments])


def test_results_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "tiny.json"
    assert speed.main([*TINY, "--output", str(results)]) == 0
    document = json.loads(results.read_text())
    assert document["format"] == report.FORMAT and not document["complete"]
    assert document["threads"] == 1
    assert document["device"]["name"] and document["device"]["capability"]
    assert document["versions"]["torch"] == torch.__version__
    assert {(row["cell"], row["mode"]) for row in document["results"]} == {
        (cell, mode) for cell in ("RNN", "LSTM", "GRU") for mode in ("inference", "training")
    }
    for row in document["results"]:
        assert row["case"] == {"T": 3, "N": 2, "I": 5, "H": 5}
        for figure in (*row["ms"].values(), row["speedup"]):
            assert 0 < figure["quartiles"][0] <= figure["median"] <= figure["quartiles"][1]
        assert row["noisy"], "one round tells no spread"
        assert row["target"] is None and row["met"] is None
    output = capsys.readouterr()
    assert "timing 6/6: GRU training T3 N2 H5" in output.err and "s left" in output.err
    assert "noisy" in output.out and str(results) in output.out


def test_a_wrong_result_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(speed.PROVIDERS, "rnnkit", SimpleNamespace(GRU=wrong_gru))
    path = tmp_path / "wrong.json"
    assert speed.main([*TINY, "--cells", "gru", "--output", str(path)]) == 1
    assert "rnnkit: relative error of grad_weight_hh_l0" in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.parametrize("times, noisy", [([1.0] * 5, False), ([1.0, 1.0, 1.0, 1.3, 1.3], True)])
def test_verdicts(times: list[float], noisy: bool) -> None:
    contest = speed.Contest("GRU", "training", speed.CASES[0], {}, {}, 0.0, {}, 1)
    row = speed.result(contest, {"torch": times, "rnnkit": [t / 2.6 for t in times]})
    assert (row["met"], row["noisy"]) == (True, noisy)
    assert speed.verdict(row) == ("met, noisy" if noisy else "met")
    slower = speed.result(contest, {"torch": times, "rnnkit": [t / 2.4 for t in times]})
    assert speed.verdict(slower).startswith("missed")


@pytest.mark.parametrize("arguments", [["--case", "3,2"], ["--case", "3,0,5"], ["--cells", "sru"]])
def test_wrong_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        speed.main(arguments)
    assert exit.value.code == 2


def test_report(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    readme.write_text(README, "utf-8")
    assert run_report(tmp_path, "--check") == 1
    assert run_report(tmp_path) == 0
    text = readme.read_text("utf-8")
    assert (
        text.startswith("# Title\n\nbefore\n")
        and text.endswith("\n\nafter\n")
        and "old" not in text
    )
    assert "[tiny.json](results/tiny.json)" in text
    table = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 2 and {len(line) for line in table} == {2 + 2 * 3}
    document: dict[str, Any] = json.loads(results.read_text())
    assert f"{document['results'][1]['speedup']['median']:.2f}" in table[2][7]
    assert (tmp_path / "docs" / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert run_report(tmp_path, "--check") == 0
    readme.write_text(text.replace("×", "x"), "utf-8")
    assert run_report(tmp_path, "--check") == 1


def test_check_sees_a_picture_of_other_results(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "README.md").write_text(README, "utf-8")
    assert run_report(tmp_path) == 0
    document = json.loads(results.read_text())
    results.write_text(json.dumps(document | {"environment": {}, "targets": {}}))
    assert run_report(tmp_path, "--check") == 1


def test_newest_is_complete_and_latest(tmp_path: Path) -> None:
    with pytest.raises(report.ReportError, match="no complete results"):
        report.newest(tmp_path)
    for name, date, complete in (
        ("a", "2026-02", True),
        ("b", "2026-01", True),
        ("c", "2026-03", False),
    ):
        document = {"format": report.FORMAT, "date": date, "complete": complete}
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    assert report.newest(tmp_path).name == "a.json"


def test_readme_without_markers(results: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Title\n")
    assert run_report(tmp_path) == 2


def test_readme_of_the_repository() -> None:
    readme = report.ROOT / "README.md"
    if not readme.exists() or report.BEGIN not in readme.read_text("utf-8"):
        pytest.skip("README.md has no table of speed")
    assert report.main(["--check"]) == 0
