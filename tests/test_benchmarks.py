"""The benchmarks at tiny sizes, through real workers; verdicts and the report on results made by hand."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.append(
    str(Path(__file__).resolve().parents[1])
)  # last, so that an installed rnnkit is the one imported

import rnnkit
from benchmarks import __main__ as command_line
from benchmarks import (
    cases,
    goals,
    isa,
    measure,
    memory,
    page,
    readout,
    report,
    results,
    roofline,
    run,
    summary,
    truth,
)
from benchmarks.cases import Case, Entry, Line
from benchmarks.figures import Figure
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import goals as gpu_goals
from benchmarks.gpu import grid, layers, tables, worker
from benchmarks.gpu.clock import Protocol, precision
from benchmarks.gpu.contender import inputs
from benchmarks.gpu.grid import LOOP, TRITON, Task
from benchmarks.gpu.supervisor import Supervisor, failed
from benchmarks.pool import Job, Pool
from benchmarks.progress import Progress
from benchmarks.providers import Computation
from benchmarks.providers.torch_layers import TorchLayers
from rnnkit import plan

TINY = Case("GRU", "training", 3, 2, 5, 5)
PROTOCOL = measure.Protocol(0.001, line_seconds=0, rest_seconds=0.001, memory_calls=1)
WRONG = """
from torch.nn import GRU as Right
class GRU(Right):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight_hh_l0.register_hook(lambda gradient: 1.001 * gradient)
"""
DYING = """
import os
class GRU:
    def __init__(self, *args, **kwargs):
        os._exit(3)
"""
MIB = 2**20
TEXT = f"# Title\n\nbefore\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n"


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """A worker for each provider, and for two packages that pass themselves off as rnnkit."""
    own = Path(rnnkit.__file__).resolve().parents[1]
    jobs = {name: Job(name, 1, "cpu", own) for name in ("rnnkit", *cases.PEERS)}
    jobs |= {f"memory {n}": Job(n, 1, "cpu", own, memory.ENVIRONMENT) for n in measure.MEMORY}
    jobs[measure.TRUTH] = Job("torch", 1, "cpu", own)
    for name, source in (("wrong", WRONG), ("dying", DYING)):
        folder = tmp_path_factory.mktemp(name)
        (folder / "rnnkit").mkdir()
        (folder / "rnnkit" / "__init__.py").write_text(source)
        jobs[f"rnnkit@{name}"] = Job("rnnkit", 1, "cpu", folder)
    with open(tmp_path_factory.mktemp("log") / "log", "w") as log, Pool(jobs, log) as pool:
        yield pool


@pytest.fixture
def meter(pool: Pool, tmp_path: Path) -> measure.Meter:
    return measure.Meter(pool, PROTOCOL, tmp_path / "line")


def of(case: Case, *workers: str) -> Line:
    return Line("cases", case, {worker: Entry(worker, case) for worker in workers})


VARIANTS = [
    {"layers": 2, "directions": 2, "I": 4},
    {"dtype": "bfloat16"},
    {"dtype": "float64"},
    {"ragged": True},
]


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("cell", cases.GATES)
def test_rnnkit_and_torch(
    meter: measure.Meter, cell: str, variant: dict[str, Any], mode: str
) -> None:
    row = meter.row(of(replace(TINY, cell=cell, mode=mode, **variant), "rnnkit", "torch"))
    for told in row["entries"].values():
        low, high = told["ms"]["quartiles"]
        assert 0 < low <= told["ms"]["median"] <= high
    assert row["ratios"].keys() == {"torch"}


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("cell", cases.GATES)
@pytest.mark.parametrize("peer", [name for name in cases.PEERS if name != "torch"])
def test_peers(pool: Pool, meter: measure.Meter, peer: str, cell: str, mode: str) -> None:
    if not pool.has(peer):
        pytest.skip(f"{peer}: {pool.providers[peer]}")
    told = meter.row(of(replace(TINY, cell=cell, mode=mode, I=4, layers=2, directions=2), peer))
    if mode == "training" and peer != "jax":
        assert told["entries"][peer] == {"unsupported": "inference only"}
    else:
        assert told["entries"][peer]["ms"]["median"] > 0


def test_projection_in_jax(pool: Pool, meter: measure.Meter) -> None:
    if not pool.has("jax"):
        pytest.skip(f"jax: {pool.providers['jax']}")
    case = replace(TINY, cell="LSTM", projection=2)
    assert "ms" in meter.row(of(case, "jax"))["entries"]["jax"]


@pytest.mark.parametrize("mode", cases.MODES[2:])
@pytest.mark.parametrize("cell", cases.GATES)
def test_single_steps(meter: measure.Meter, cell: str, mode: str) -> None:
    row = meter.row(cases.beside_torch("streaming", Case(cell, mode, 1, 1, 4, 5)))
    assert "ms" in row["entries"]["rnnkit"] and "torch" in row["ratios"]


@pytest.mark.parametrize("cell", cases.GATES)
def test_features(meter: measure.Meter, cell: str) -> None:
    row = meter.row(cases.with_features(replace(TINY, cell=cell, mode="training")))
    expected = [feature for feature, cells in cases.FEATURES.items() if cell in cells]
    assert list(row["ratios"]) == [f"rnnkit {feature}" for feature in expected]


@pytest.mark.parametrize("cell", cases.GATES)
def test_resets(meter: measure.Meter, cell: str) -> None:
    """All ways have the same results, and so do padded sequences with their lengths."""
    row = meter.row(cases.resetting(Case(cell, "training", 40, 3, 2, 5)))
    assert [*row["ratios"]] == ["rnnkit without", "torch loop", "torch split"]
    row = meter.row(cases.with_lengths(Case(cell, "training", 9, 5, 2, 5)))
    assert [*row["ratios"]] == ["rnnkit packed", "rnnkit dense"]


def test_features_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    provider = TorchLayers("rnnkit", 1, "cpu")
    seen: list[Any] = []

    def used(feature: str) -> Any:
        case = replace(TINY, cell="GRU", mode="training", feature=feature)
        arrays = truth.inputs(case)
        provider.prepare(case, arrays).once()
        return provider.module(case, {name: torch.from_numpy(a) for name, a in arrays.items()})

    assert used("update_gate").update_gate == "writes" and used("").update_gate == "keeps"
    assert used("grad_clip").grad_clip == 1e6 and used("").grad_clip is None
    assert used("learn_initial_state").learn_initial_state
    for name in ("weight_dropout", "recurrent_dropout", "zoneout"):
        assert getattr(used(name), name) > 0 == getattr(used(""), name)
    block = rnnkit.gradient_flow
    monkeypatch.setattr(
        rnnkit, "gradient_flow", lambda module: seen.append(module) or block(module)
    )
    used("gradient_flow")
    assert len(seen) == 1


def test_readout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # its processes find the packages from anywhere
    sizes = {"steps": 3, "batch": 2, "hidden": 4, "classes": 7, "rounds": 5, "threads": 1}
    told = readout.measured([f"--{name}={size}" for name, size in sizes.items()])
    assert told.keys() == readout.KINDS.keys()
    assert told["ms"][readout.OWN]["figure"]["rounds"] == 5
    assert told["ms"][readout.ALL]["ratio"]["median"] == 1
    lines = readout.text("sizes", told).splitlines()
    assert [line[:16].strip() for line in lines] == ["sizes", *2 * [readout.ALL, readout.OWN]]


def test_engines_are_compared_with_frozen_layers(pool: Pool, meter: measure.Meter) -> None:
    case = replace(TINY, mode="inference", cell="LSTM")
    line = cases.compared(case)
    assert line.entries[cases.FROZEN] == Entry("rnnkit", replace(case, frozen=True))
    row = meter.row(line)
    assert "ms" in row["entries"][cases.FROZEN] and "error" in row["entries"][cases.FROZEN]
    present = {name for name in cases.PACKING if pool.has(name)}
    assert row.get("frozen", {}).keys() == present
    assert cases.FROZEN not in cases.compared(replace(case, mode="training")).entries


def test_torch_cannot_freeze(meter: measure.Meter) -> None:
    case = replace(TINY, mode="inference", frozen=True)
    told = meter.row(of(case, "torch"))["entries"]["torch"]
    assert told == {"unsupported": "no `freeze`"}


def test_peak_and_bandwidth(meter: measure.Meter) -> None:
    from rnnkit import backends

    if backends.EXTENSION is None:
        pytest.skip("no C++ extension")
    meter.protocol = replace(PROTOCOL, bandwidth_seconds=0.01)
    meter.measure_bandwidth()
    assert meter.bandwidth is not None and tuple(meter.bandwidth) == roofline.LEVELS
    read = [told["read"] for told in meter.bandwidth.values()]
    assert read == sorted(read) and all(
        told["per_second"] > 1e8 for told in meter.bandwidth.values()
    )
    row = meter.row(of(TINY, "rnnkit", "torch"))
    assert row["peak"]["median"] > 1 and 0 < row["share"]["median"] < 1
    assert row["roofline"]["level"] == "L1"
    assert all(0 < row["roofline"][level] <= 1 for level in roofline.LEVELS)
    for dtype in (torch.float32, torch.float64):
        assert backends.EXTENSION.peak_gflops(dtype, 2, 0.01) > 1
    with pytest.raises(RuntimeError, match="expected dtype"):
        backends.EXTENSION.peak_gflops(torch.int8, 1, 0.01)
    with pytest.raises(RuntimeError, match="expected threads"):
        backends.EXTENSION.read_bandwidth(4096, 0, 0.01)


BANDWIDTH: roofline.Bandwidth = {
    "L1": {"cache": 32 * 1024, "read": 16 * 1024, "per_second": 400e9},
    "L2": {"cache": 1024**2, "read": 512 * 1024, "per_second": 100e9},
    "L3": {"cache": 32 * 1024**2, "read": 4 * 1024**2, "per_second": 20e9},
}


def test_roofline() -> None:
    case = Case("LSTM", "inference", 10, 4, 256, 256)
    assert roofline.recurrent_bytes(case) == 4 * 256 * 256 * 4  # 1 MiB
    assert roofline.level_of(case, 1, BANDWIDTH) == roofline.level_of(case, 2, BANDWIDTH) == "L2"
    assert roofline.level_of(replace(case, H=32), 2, BANDWIDTH) == "L1"
    assert roofline.level_of(replace(case, H=4096), 1, BANDWIDTH) == "L3"
    # 42 MFLOP at 100 GFLOP/s take 0.419 ms; 10 MiB from L1 0.026, from L2 0.105, from L3 0.524.
    assert roofline.bounds(case, 2, 100, BANDWIDTH) == {
        **{"level": "L2", "L1": 1.0, "L2": 1.0},
        "L3": pytest.approx(0.8, rel=1e-3),
    }
    training = roofline.bounds(replace(case, mode="training"), 2, 100, BANDWIDTH)
    assert training["L3"] == 1.0, "three times the operations, weights read twice"
    two = replace(case, layers=2, directions=2, N=1)
    assert roofline.bounds(two, 2, 100, BANDWIDTH)["L3"] < 0.3
    projected = replace(case, projection=64)
    assert roofline.recurrent_bytes(projected) == 4 * (4 * 256 * 64 + 64 * 256)


def test_roofline_where_the_system_tells_no_caches() -> None:
    class Extension:
        def cache_sizes(self) -> list[int]:
            return [0, 0, 0]

        def read_bandwidth(self, bytes: int, threads: int, seconds: float) -> float:
            return bytes / seconds

    found = roofline.measure(Extension(), 2, 0.5)
    assert [told["cache"] for told in found.values()] == list(roofline.ASSUMED_BYTES)
    assert found["L1"] == {"cache": 32 * 1024, "read": 16 * 1024, "per_second": 32770}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc/self/clear_refs")
def test_memory(meter: measure.Meter) -> None:
    def call() -> Any:
        assert np.ones(64 * MIB, np.uint8).all()
        return np.ones(MIB, np.uint8)

    (found,) = memory.peaks(Computation(call, lambda result: {"result": result}), 1)
    assert 62 * MIB <= found <= 66 * MIB
    row = meter.row(cases.recomputing(Case("GRU", "training", 100, 16, 128, 128)))
    for name in ("torch", "rnnkit"):
        assert 0 < row["memory"][name]["bytes"]["median"] < 64 * MIB


def test_a_wrong_result_is_reported_and_not_timed(meter: measure.Meter) -> None:
    told = meter.row(of(TINY, "rnnkit@wrong", "torch"))["entries"]
    assert "relative error of grad_weight_hh_l0" in told["rnnkit@wrong"]["wrong"]
    assert "ms" not in told["rnnkit@wrong"] and "ms" in told["torch"]


def test_a_process_that_ends_is_started_again(meter: measure.Meter) -> None:
    for _ in range(2):
        told = meter.row(of(TINY, "rnnkit@dying", "torch"))["entries"]
        assert told["rnnkit@dying"] == {"failed": "its process ended with status 3"}
        assert "ms" in told["torch"]


def test_without_a_truth_nothing_is_timed(
    meter: measure.Meter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pool, "ask", lambda *given, **arguments: {"failed": "no memory"})
    monkeypatch.setattr(Pool, "forget", lambda self: None)
    told = meter.row(of(TINY, "torch"))["entries"]["torch"]
    assert told.keys() == {"failed"} and "no memory" in told["failed"]


def test_a_provider_that_is_absent_has_no_entry(meter: measure.Meter) -> None:
    assert meter.row(of(TINY, "torch", "tensorflow"))["entries"].keys() == {"torch"}


def test_noisy_lines_are_timed_again(meter: measure.Meter, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = iter([1.0] * 8 + [2.0] * 4 + [1.0] * 12)
    ask = Pool.ask

    def sampled(self: Pool, name: str, command: str, **arguments: Any) -> dict[str, Any]:
        if command == "peak":
            return {"gflops": 2 * TINY.flops / 1e9}
        if command == "sample":
            return {"seconds": next(samples) if name == "torch" else 1.0}
        return ask(self, name, command, **arguments)

    monkeypatch.setattr(Pool, "ask", sampled)
    meter.protocol = replace(PROTOCOL, least_rounds=12, most_rounds=12, again_seconds=60)
    row = meter.row(of(TINY, "rnnkit", "torch"))
    assert row["attempts"] == 2 and row["ratios"]["torch"]["quartiles"] == [1.0, 1.0]
    assert row["share"]["median"] == 0.5


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.json"
    arguments = ["--case", "3,2,4,5", "--cells", "gru", "--providers", "torch", "--threads", "1"]
    assert run.main([*arguments, "--rounds", "1", "--output", str(path)]) == 0
    document, _ = results.load(path)
    assert not document["complete"] and document["threads"] == 1
    assert document["isa"] in isa.ISAS and document["held"] is None
    assert document["device"]["name"] and document["device"]["capability"]
    assert document["providers"]["torch"]["versions"] == {"torch": torch.__version__}
    assert [row["case"]["mode"] for row in document["lines"]] == ["inference", "training"]
    assert document["lines"][0]["case"] == Case("GRU", "inference", 3, 2, 4, 5).document()
    output = capsys.readouterr()
    assert "2/2 GRU training T3 N2 I4 H5" in output.err and "left" in output.err
    assert "rnnkit noisy, torch noisy" in output.out, "one round tells no spread"
    assert str(path) in output.out


def test_isa_environment() -> None:
    held = isa.ISAS["avx2"].environment({"XLA_FLAGS": "--xla_dump_to=x"})
    assert held["ATEN_CPU_CAPABILITY"] == "avx2" and held["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert held["XLA_FLAGS"].startswith("--xla_dump_to=x --xla_cpu_max_isa=AVX2 ")
    assert isa.ISAS["avx2"].environment(held) == held, "held twice is held once"
    assert set(isa.HELD) | set(isa.NOT_HELD) == {"rnnkit", *cases.PEERS}


def test_isa_that_the_cpu_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(isa, "features", lambda: {"avx2", "fma", "f16c", "avx512f"})
    assert isa.best() == "avx2"
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--isa", "avx512"])
    assert command_line.main() == 2
    expected = "--isa avx512: this CPU lacks avx512bw, avx512vl, avx512dq"
    assert expected in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--isa", "avx3"])
    assert command_line.main() == 2
    assert "expected one of baseline, avx2, avx512" in capsys.readouterr().err


def test_isa_holds_new_processes_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--isa", "baseline", "--case", "3,2,5"]) == 2
    assert "holds new processes only" in capsys.readouterr().err


@pytest.mark.parametrize("name", isa.ISAS)
def test_isa_of_a_run(tmp_path: Path, name: str) -> None:
    if isa.lacking(name):
        pytest.skip(f"this CPU lacks {isa.lacking(name)}")
    path = tmp_path / "held.json"
    arguments = ["--isa", name, "--case", "2,1,3", "--cells", "rnn", "--providers", "torch"]
    arguments += ["--threads", "1", "--rounds", "1", "--output", str(path)]
    package = str(Path(rnnkit.__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": package}
    command = [sys.executable, "-m", "benchmarks", *arguments]
    done = subprocess.run(command, cwd=report.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document, _ = results.load(path)
    assert document["isa"] == name == isa.of_torch(document["device"]["capability"])
    assert document["held"]["environment"]["ATEN_CPU_CAPABILITY"] == isa.ISAS[name].aten
    assert document["held"]["not held"] == isa.NOT_HELD


def test_isa_of_a_command(capfd: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "benchmarks.isa", "baseline"]
    show = [sys.executable, "-c", "import os; print(os.environ['ATEN_CPU_CAPABILITY'])"]
    assert subprocess.run([*command, *show], cwd=report.ROOT).returncode == 0
    assert capfd.readouterr().out == "default\n"
    assert subprocess.run(command, cwd=report.ROOT).returncode == 2
    assert "usage: python -m benchmarks.isa" in capfd.readouterr().err


def test_lines_below_the_best_isa() -> None:
    every, lower = list(cases.lines()), list(cases.lines(lower=True))
    groups = {"cases", "streaming", "features", "resets", "lengths", "layer_norm"}
    assert {line.group for line in lower} == groups
    assert {line.case.dtype for line in lower} == {"float32", "float64"}
    assert [line for line in every if line in lower] == lower
    steps = {(line.case.cell, line.case.mode) for line in lower if line.group == "streaming"}
    assert steps == {(cell, mode) for cell in cases.GATES for mode in cases.MODES[2:]}
    assert {"T30 N128 H512", "T64 N24 I96 H192", "T77 N13 I65 H130"} <= {
        line.case.sizes() for line in lower
    }


@pytest.mark.parametrize(
    "arguments", [["--case", "3,2"], ["--case", "3,0,5"], ["--cells", "sru"], ["--modes", "fly"]]
)
def test_wrong_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        run.main(arguments)
    assert exit.value.code == 2


def test_filters() -> None:
    options = run.parse(["--cells", "gru", "--modes", "train", "--only", "N16 H512"])
    found = list(run.wanted(options))
    assert found and {line.case.cell for line in found} == {"GRU"}
    assert {line.case.mode for line in found} == {"training"}
    assert all("N16 H512" in str(line.case) for line in found)


def test_progress_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress([1.0, 1.0])
    progress.step("one")
    progress.step("two")
    progress.clear()
    text = capsys.readouterr().err
    assert "\r" in text and "\n" not in text
    assert "[############------------] 2/2 two, about 0 s left" in text


QUIET, NOISY = 0.02, 0.4  # spreads
SHAPES = [(100, 16, 512, 512), (200, 8, 64, 64)]


def figure(value: float, spread: float = QUIET) -> dict[str, Any]:
    half = value * spread / 2
    return Figure(value, value - half, value + half, 9).document()


def line(case: Case, torch_ratio: float, spread: float = QUIET) -> dict[str, Any]:
    entries = {"rnnkit": {"ms": figure(2.0), "error": 1e-7}, "torch": {"ms": figure(9.0)}}
    entries["openvino"] = {"unsupported": "inference only"}
    ratios = {"torch": figure(torch_ratio, spread), "jax": figure(2.0)}
    row = {"group": "cases", "case": case.document(), "entries": entries, "ratios": ratios}
    row |= {"peak": figure(100.0), "share": figure(0.9), "attempts": 1}
    return row | {"roofline": {"level": "L2", "L1": 1.0, "L2": 0.95, "L3": 0.4}}


def made(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    document: dict[str, Any] = {
        "format": results.FORMAT,
        "isa": "avx2",
        "held": None,
        "date": "2026-01-02T03:04:05+00:00",
        "complete": True,
        "threads": 2,
        "device": {"kind": "cpu", "name": "A CPU", "capability": "AVX2", "cores": 2},
        "backend": "cpp, avx2 kernels",
        "versions": {"python": "3.11", "torch": "2.13", "rnnkit": "0.1", "git": None},
        "providers": {"jax": {"versions": {"jax": "0.10"}}},
        "bandwidth": BANDWIDTH,
        "lines": list(rows),
    }
    document |= changes
    return document | {"goals": goals.judge_all(document)}


def training(first: float, second: float, spread: float = QUIET, **changes: Any) -> dict[str, Any]:
    """GRU training at both shapes; `spread` is of the second."""
    both = [Case("GRU", "training", *shape) for shape in SHAPES]
    return made(line(both[0], first), line(both[1], second, spread), **changes)


def judged(
    document: dict[str, Any], what: str = "GRU and RNN training over torch.nn"
) -> dict[str, Any]:
    return next(row for row in document["goals"] if row["what"] == what)


@pytest.mark.parametrize(
    "document, verdict",
    [
        (training(4.0, 9.0), "met"),
        (training(2.0, 2.0), "missed"),  # the mean
        (training(20.0, 1.2), "missed"),  # the worst
        (training(4.0, 9.0, NOISY), "noisy"),
        (training(1.2, 9.0, NOISY), "missed"),  # whatever the noisy one is
        (made(), "not measured"),
    ],
)
def test_verdicts(document: dict[str, Any], verdict: str) -> None:
    assert judged(document)["verdict"] == verdict


def test_goal_names_the_worst_case() -> None:
    row = judged(training(4.0, 9.0))
    assert row["figure"] == "geometric mean 6.00×; worst 4.00×: GRU training T100 N16 H512"
    assert judged(training(9.0, 4.0, NOISY))["figure"].endswith("1 of 2 noisy")


def test_a_wrong_result_misses_the_goal() -> None:
    document = training(4.0, 9.0)
    document["lines"][1]["entries"]["rnnkit"] = {"wrong": "relative error"}
    row = next(row for row in goals.judge_all(document) if "GRU and RNN tr" in row["what"])
    assert row["verdict"] == "missed" and row["wrong"] == ["GRU training T200 N8 H64"]
    assert "GRU training T200 N8 H64 has no right result" in "\n".join(page.misses([row]))


def test_every_miss_is_told() -> None:
    row = judged(training(1.1, 1.2))
    assert row["missed"] == {
        "GRU training T100 N16 H512": "1.10×",
        "GRU training T200 N8 H64": "1.20×",
    }
    assert page.misses([row]) == [
        "- GRU and RNN training over torch.nn: GRU training T100 N16 H512 1.10×; GRU training T200 N8 H64 1.20×"
    ]
    row = judged(training(2.0, 2.0))
    assert page.misses([row]) == ["- GRU and RNN training over torch.nn: the mean alone"]


def inference(**ratios: float) -> dict[str, Any]:
    """A line in which torch.nn and the engines take so many times as long as rnnkit, frozen half as long."""
    row = line(Case("LSTM", "inference", *SHAPES[0]), 2.0)
    row["entries"][cases.FROZEN] = {"ms": figure(1.0)}
    row["ratios"] = {name: figure(value) for name, value in ratios.items()}
    row["frozen"] = {name: figure(2 * ratios[name]) for name in cases.PACKING if name in ratios}
    return row


def test_engines_over_frozen_layers() -> None:
    what = "inference over the best of ONNX Runtime, OpenVINO, JAX"
    row = inference(torch=2.0, jax=1.5, onnxruntime=0.6, openvino=0.7)
    assert judged(made(row), what)["worst"]["value"] == 1.2
    held = {"not held": {"onnxruntime": "no switch"}}
    assert judged(made(row, held=held), what)["worst"]["value"] == 1.4
    row["entries"][cases.FROZEN] = {"wrong": "relative error"}
    assert judged(made(row), what)["verdict"] == "missed"
    assert judged(training(4.0, 9.0), what)["verdict"] == "not measured"


def test_single_step_goals() -> None:
    rows = [
        line(Case("RNN", "inference", 1, 1, 128, 128), 3.0),
        line(Case("RNN", "training", 1, 1, 128, 128), 1.1),
        line(Case("GRU", "cell", 1, 1, 128, 128), 1.5) | {"group": "streaming"},
        line(Case("GRU", "cell recording", 1, 1, 128, 128), 1.3) | {"group": "streaming"},
        line(Case("GRU", "inference", 2, 1, 128, 128), 0.1),
    ]
    without, with_gradients = (
        judged(made(*rows), f"one step, one row, {kind} gradients, over torch.nn")
        for kind in ("without", "with")
    )
    assert without["verdict"] == "met" and without["cases"] == 2
    assert with_gradients["missed"] == {"RNN training T1 N1 H128": "1.10×"}


def test_goals_beside_ratios() -> None:
    ragged = Case("GRU", "inference", 128, 32, 128, 128, ragged=True)
    rows = [line(ragged, 3.0), line(Case("GRU", "training", *SHAPES[0]), 4.0)]
    rows[0]["ratios"]["rnnkit dense"] = figure(1.6)  # half the rows in 1 / 1.6 of the time
    steps = line(Case("GRU", "training", 100, 4, 128, 128), 1.0) | {"group": "T"}
    steps["ratios"] = {"rnnkit T1000": figure(9.0), "rnnkit T10000": figure(120.0)}
    kept = line(Case("GRU", "training", *SHAPES[0]), 1.0) | {"group": "memory"}
    kept["memory"] = {name: {"bytes": figure(b)} for name, b in (("torch", 100), ("rnnkit", 60))}
    document = made(*rows, steps, kept)
    found = {row["what"]: row for row in document["goals"] if row["worst"]}
    assert found["ragged batch over its part of the dense time"]["worst"]["value"] == pytest.approx(
        1.25, rel=0.01
    )
    assert found["share of the FMA peak, training, H ≥ 256, N ≥ 16"]["figure"].startswith(
        "worst 90 %"
    )
    linear = found["time of a step, T 1 000 and 10 000 over 100"]
    assert linear["verdict"] == "missed" and linear["worst"]["value"] == 1.2
    assert found["peak memory of a training step over torch.nn's"]["worst"]["value"] == 0.6
    assert judged(document, "the same with recompute")["verdict"] == "not measured"


def test_goals_of_features() -> None:
    row = line(Case("GRU", "training", *SHAPES[0]), 1.0) | {"group": "features"}
    found = {"update_gate": 1.01, "grad_clip": 1.05, "gradient_flow": 1.1}
    row["ratios"] = {f"rnnkit {feature}": figure(ratio) for feature, ratio in found.items()}
    both = (readout.OWN, readout.ALL)
    told = {
        kind: {name: {"ratio": figure(ratio), "figure": figure(100 * ratio)} for name in both}
        for kind, ratio in (("ms", 0.9), ("MiB", 0.2))
    }
    document = made(row, readout={"case": "T1", **told})
    verdicts = {row["what"]: row["verdict"] for row in document["goals"] if row["cases"]}
    assert verdicts == {
        'GRU training, update_gate "writes" over "keeps"': "met",
        "training with grad_clip over without": "missed",
        "training step under gradient_flow over without": "met",
        "Readout.loss over all logits, time": "met",
        "Readout.loss over all logits, memory": "missed",
    }
    text = "\n".join(page.feature_section(document, "results/file.json"))
    assert "| 100, 16, 512, 512 | GRU | 2 | 1.01× | 1.05× | 1.10× | – |" in text
    assert "- training with grad_clip over without: GRU training T100 N16 H512 1.05×" in text
    assert "grad_clip" not in "\n".join(page.section(document, "results/file.json"))
    assert "T1: Readout.loss 90 ms, 20 MiB; all logits 90 ms, 20 MiB." in text
    failed = made(readout={"case": "T1", "failed": "exit status 9"})
    assert judged(failed, "Readout.loss over all logits, time")["verdict"] == "not measured"
    assert "not measured, exit status 9" in "\n".join(page.feature_section(failed, "file.json"))


def test_goals_of_resets() -> None:
    case = Case("GRU", "training", *cases.RESET_SHAPE, resets=True)
    reset = line(case, 1.0) | {"group": "resets"}
    found = {"rnnkit without": 0.9, "torch loop": 5.0, "torch split": 1.4}
    reset["ratios"] = {name: figure(ratio) for name, ratio in found.items()}
    reset["entries"] = dict.fromkeys(("rnnkit", *found), reset["entries"]["rnnkit"])
    ragged = Case("GRU", "training", 100, 32, 128, 128, ragged=True)
    padded = line(ragged, 1.0) | {"group": "lengths"}
    padded["ratios"] = {"rnnkit dense": figure(1.9)}
    document = made(reset, padded, readout={"case": "T1", "failed": "exit status 9"})
    verdicts = {row["what"]: row["verdict"] for row in document["goals"] if row["cases"]}
    assert verdicts == {
        "training with 3 % resets over without": "missed",  # 1 / 0.9
        "a loop over torch.nn's cells over resets": "met",
        "torch.nn on split segments over resets": "missed",
        "`lengths` over its part of the dense time": "met",
    }
    text = "\n".join(page.feature_section(document, "results/file.json"))
    told = "rnnkit without 0.90×, torch loop 5.00×, torch split 1.40×"
    assert f"| 128, 32, 256, 256, resets, `reset` | GRU | 2 | {told} |" in text


def test_noisy_in_place_of_a_figure() -> None:
    document = training(4.0, 9.0, NOISY)
    assert Figure.read(figure(4.0, NOISY)).text("{:.1f}") == "noisy"
    text = "\n".join(page.section(document, "results/file.json"))
    assert "| 200, 8, 64, 64 | GRU | 2 | noisy | 2.00× | 100 / **95** / 40 | 90 |" in text
    case = Case(**document["lines"][1]["case"])
    told = run.text(Line("cases", case, {}), document["lines"][1])
    assert "torch noisy" in told and "openvino –" in told
    assert "90 % of peak, 95 % allowed" in told


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text(TEXT, "utf-8")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "performance.md").write_text(TEXT, "utf-8")
    results.write(training(4.0, 9.0), tmp_path / "results" / "made.json")
    return tmp_path


def run_report(folder: Path, *arguments: str, names: Sequence[str] = ("made.json",)) -> int:
    places = ["--readme", str(folder / "README.md"), "--pictures", str(folder / "docs")]
    places += ["--page", str(folder / "docs" / "performance.md")]
    files = [str(folder / "results" / name) for name in names]
    return report.main([*files, *places, *arguments])


def test_report(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    readme, performance = folder / "README.md", folder / "docs" / "performance.md"
    assert run_report(folder, "--check") == 1
    assert run_report(folder) == 0
    text = readme.read_text("utf-8")
    assert text.startswith("# Title\n\nbefore\n") and text.endswith("\n\nafter\n")
    assert "old" not in text and "](docs/speed.png)" in text
    assert "| AVX2 | GRU | 6.00× (4.00–9.00) | – | 2.00× (2.00–2.00) | – |" in text
    assert "rnnkit is ahead in all 4 comparisons." in text
    assert "[docs/performance.md](docs/performance.md)" in text
    told = performance.read_text("utf-8")
    assert told.startswith("# Title\n\nbefore\n") and told.endswith("\n\nafter\n")
    assert "[made.json](../results/made.json)" in told and "Peak: float32 100 GFLOP/s." in told
    assert "L2 (1,024 KiB) 100 GB/s" in told
    assert "| 100, 16, 512, 512 | GRU | 2 | 4.00× | 2.00× | 100 / **95** / 40 | 90 |" in told
    assert "| geometric mean 6.00×; worst 4.00×: GRU training T100 N16 H512 | met |" in told
    for name in ("speed.png", "peak.png"):
        assert (folder / "docs" / name).read_bytes().startswith(b"\x89PNG")
    assert run_report(folder, "--check") == 0
    for path, content in ((performance, told), (readme, text)):
        path.write_text(content.replace("4.00", "4.01"), "utf-8")
        assert run_report(folder, "--check") == 1
        path.write_text(content, "utf-8")


def test_report_of_two_isas_and_an_older_cpu(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    best = training(3.0, 0.9, isa="avx512", device={**made()["device"], "capability": "AVX512"})
    results.write(best, folder / "results" / "best.json")
    held = {"providers": {"jax": "XLA_FLAGS"}, "not held": {"torch": "no switch"}}
    results.write(training(4.0, 0.9, held=held), folder / "results" / "made.json")
    device = {"kind": "cpu", "name": "Old CPU", "capability": "AVX2"}
    old = training(2.0, 2.0, device=device, date="2025-12-31T00:00:00+00:00")
    del old["isa"], old["held"], old["bandwidth"]
    results.write(old, folder / "results" / "old.json")
    found = [path.name for path in results.newest_of_each(folder / "results")]
    assert found == ["best.json", "made.json", "old.json"]
    assert run_report(folder, names=found) == 0
    text = (folder / "README.md").read_text("utf-8")
    assert "| AVX-512 | GRU | 1.64× (0.90–3.00) |" in text and "Old CPU" not in text
    assert (
        "rnnkit is not ahead in 2 of 8 comparisons: 1 with torch.nn (worst 0.90×); "
        "1 with torch.nn, which runs on all the CPU's instructions here, not held to AVX2 as the others "
        "(worst 0.90×)." in text
    )
    told = (folder / "docs" / "performance.md").read_text("utf-8")
    assert "### A CPU (2 cores), 2 threads, AVX-512" in told and "### Old CPU, 2 threads" in told
    assert "Held to AVX2: JAX by XLA_FLAGS. **Not held**" in told and "torch.nn, since no" in told


def test_table_has_at_most_nine_rows() -> None:
    names = ["A", "A", "A", "B"]
    documents = [
        training(2.0, 2.0, device={**made()["device"], "name": name}, isa=isa)
        for name, isa in zip(names, ["avx512", "avx2", "baseline", "avx2"], strict=True)
    ]
    assert len(summary.table(summary.latest(documents))) == 2 + summary.MOST_ROWS
    two = summary.latest(documents[1:])
    assert two == documents[1:] and summary.table(two)[2].startswith("| A, AVX2 | LSTM |")


def test_noisy_comparisons_are_counted_apart() -> None:
    told = summary.not_ahead([training(0.8, 0.8, NOISY)])
    assert told == (
        "rnnkit is not ahead in 1 of 3 comparisons (1 more are too noisy to tell): "
        "1 with torch.nn (worst 0.80×)."
    )


def test_check_sees_a_picture_of_other_results(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    assert run_report(folder) == 0
    document = json.loads((folder / "results" / "made.json").read_text())
    results.write(document | {"environment": {}}, folder / "results" / "made.json")
    assert run_report(folder, "--check") == 1


def test_newest_is_complete_and_latest(tmp_path: Path) -> None:
    with pytest.raises(results.ResultsError, match="no complete results"):
        results.newest(tmp_path)
    for name, date, complete in (("a", "2026-02", 1), ("b", "2026-01", 1), ("c", "2026-03", 0)):
        document = {"format": results.FORMAT, "date": date, "complete": bool(complete)}
        results.write(document, tmp_path / f"{name}.json")
    assert results.newest(tmp_path).name == "a.json"


def test_newest_of_each_cpu_and_isa(tmp_path: Path) -> None:
    with pytest.raises(results.ResultsError, match="no complete results"):
        results.newest_of_each(tmp_path)
    told = [
        ("a", "2026-02-01", "avx2", True),
        ("b", "2026-01-01", "avx2", True),
        ("c", "2026-01-15", "avx512", True),
        ("d", "2026-03-01", "baseline", False),
    ]
    for name, date, instructions, complete in told:
        document = made(date=date, isa=instructions, complete=complete)
        results.write(document, tmp_path / f"{name}.json")
    assert [path.name for path in results.newest_of_each(tmp_path)] == ["c.json", "a.json"]


def test_results_file_is_named_for_its_isa() -> None:
    path = results.default_path(made())
    assert path.name == "cpu-a-cpu-2-threads-avx2-2026-01-02.json"


@pytest.mark.parametrize("name", ["README.md", "docs/performance.md"])
def test_text_without_markers(folder: Path, name: str) -> None:
    (folder / name).write_text("# Title\n")
    assert run_report(folder) == 2


def test_readme_of_the_repository() -> None:
    try:
        results.newest(results.FOLDER)
    except results.ResultsError as error:
        pytest.skip(str(error))
    assert report.main(["--check"]) == 0


ON_GPU = Case("LSTM", "training", 512, 2, 5, 5)
SPARING = Protocol(sample_seconds=0, rounds=1)


def as_task(kind: str = "time", **changes: Any) -> Task:
    return Task("main", kind, replace(ON_GPU, **changes))


@pytest.fixture(scope="module")
def bench() -> Iterator[worker.Bench]:
    yield worker.Bench("cpu", SPARING)
    torch.backends.cudnn.allow_tf32 = True  # as torch begins


def test_gpu_tasks_by_importance(capsys: pytest.CaptureFixture[str]) -> None:
    tasks = grid.tasks()
    assert len(set(tasks)) == len(tasks)
    assert [t.part for t in tasks] == sorted((t.part for t in tasks), key=grid.PARTS.index)
    sizes = len(grid.HIDDEN) * len(grid.BATCHES) * len(grid.DTYPES) * len(grid.CELLS)
    of_grid = [t for t in tasks if t.kind == "time" and t.part != "extra"]
    assert len(of_grid) == sizes * len(grid.LAYOUTS) * len(grid.MODES) == 1152
    first = [task.case for task in tasks[: grid.QUICK]]
    assert {case.cell for case in first} == {"LSTM", "GRU"}
    assert {case.dtype for case in first} == {"bfloat16", "tf32"}
    assert {case.mode for case in first} == set(grid.MODES)
    assert {case.H for case in first} == {256, 512, 1024} and {c.N for c in first} == {1, 16, 64}
    assert gpu.main(["--list", "--part", "extra", "--only", "GRU .*ragged"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "extra     GRU bf16 H512 N64 ragged inference",
        "extra     GRU bf16 H512 N64 ragged training",
    ]


@pytest.mark.parametrize("mode", grid.MODES)
@pytest.mark.parametrize(
    "changes", [{"dtype": "tf32"}, {"ragged": True}, {"layers": 2, "directions": 2}], ids=str
)
def test_gpu_row(bench: worker.Bench, changes: dict[str, Any], mode: str) -> None:
    row = bench.row(as_task(mode=mode, **changes))
    for told in row["entries"].values():
        times = {what: told["us"][what]["median"] for what in ("64", "512", "step")}
        assert times["step"] == pytest.approx(
            (times["512"] - times["64"]) / 448, rel=0.01, abs=0.01
        )
    assert row["ratios"].keys() >= {"64", "512"} and "wrong" not in row["entries"]["rnnkit"]
    assert tables.line(row).startswith(grid.name(Case(**row["case"])))


def test_gpu_step() -> None:
    times = worker.with_step({64: [1.0, 2.0], 512: [449.0, 898.0]})
    assert times == {"64": [1.0, 2.0], "512": [449.0, 898.0], "step": [1.0, 2.0]}


def test_gpu_errors_and_kernels(bench: worker.Bench) -> None:
    row = bench.row(as_task("error", T=8, dtype="bfloat16"))
    for told in row["entries"].values():
        assert told.keys() == set(worker.COMPARED) and all(0 < e < 0.05 for e in told.values())
    assert row["ratios"].keys() == set(worker.COMPARED)
    row = bench.row(as_task("kernels"))
    assert all(told["launches"]["512"] and told["longest"] for told in row["entries"].values())


def test_gpu_exceptions_are_recorded(bench: worker.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def __init__(self, error: Exception) -> None:
            self.error = error

        def module(self, *given: Any) -> Any:
            raise self.error

        device = torch.device("cpu")

    own = bench.providers["rnnkit"]
    monkeypatch.setitem(bench.providers, "rnnkit", Failing(RuntimeError("no kernel\nat all")))
    row = bench.row(as_task())
    assert row["entries"]["rnnkit"] == {"failed": "RuntimeError: no kernel"}
    assert "us" in row["entries"]["torch"] and row["ratios"] == {}
    monkeypatch.setitem(bench.providers, "rnnkit", own)
    monkeypatch.setitem(bench.providers, "torch", Failing(torch.OutOfMemoryError()))
    row = bench.row(as_task())
    assert row["entries"]["torch"] == {"memory": "more than 24 GiB"}
    assert "us" in row["entries"]["rnnkit"] and gpu_goals.right(row)


def test_gpu_result_unlike_torchs_is_wrong() -> None:
    right = [torch.ones(3)]
    assert "wrong" not in worker.compared(ON_GPU, right, right)
    for value in (1.1, float("nan")):
        assert "wrong" in worker.compared(ON_GPU, right, [value * torch.ones(3)])


def test_gpu_precision(bench: worker.Bench) -> None:
    for dtype, allowed in (("tf32", True), ("float32", False), ("bfloat16", False)):
        with precision(dtype):
            assert torch.backends.cudnn.allow_tf32 is allowed
            assert torch.backends.cuda.matmul.allow_tf32 is allowed
    assert not torch.backends.cudnn.allow_tf32


def test_gpu_tasks_on_triton(capsys: pytest.CaptureFixture[str]) -> None:
    cases = [task.case for task in grid.tasks() if task.kind == "triton"]
    sizes = [(H, N) for H in grid.TRITON_HIDDEN for N in grid.TRITON_BATCHES]
    assert sorted({(c.H, c.N) for c in cases if c.dtype == "bfloat16"}) == sizes
    assert {(case.cell, case.dtype, case.mode) for case in cases} == {
        (cell, dtype, mode) for cell in grid.CELLS for dtype in grid.DTYPES for mode in grid.MODES
    }
    for dtype in grid.DTYPES:  # there are two designs
        of_dtype = {case.H for case in cases if case.dtype == dtype}
        assert min(of_dtype) <= 128 and max(of_dtype) >= 512
    assert gpu.main(["--list", "--part", "triton", "--only", "graph LSTM"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "triton    graph LSTM bf16 H512 N16 inference",
        "triton    graph LSTM bf16 H512 N16 training",
    ]


@pytest.mark.parametrize("kind", ["triton", "graph"])
def test_gpu_rows_without_triton_say_why(
    bench: worker.Bench, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(rnnkit.backends, "TRITON_REASON", "triton is not installed")
    row = bench.row(as_task(kind))
    (told,) = row["entries"].values()
    assert "'triton'" in told["unsupported"] and row["ratios"] == {}
    assert gpu_goals.right(row)
    assert tables.line(row).endswith(f"; {TRITON} {told['unsupported']}")
    document = made_on_gpu(row | {"part": "triton"})
    judged = gpu_goals.judge_all(document)
    assert len(judged) == len(gpu_goals.GOALS + gpu_goals.TRITON_GOALS)
    assert {row["verdict"] for row in judged} == {"not measured"}


@pytest.fixture
def as_if_on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is forced on Triton runs on what is there."""
    monkeypatch.setattr(rnnkit, "backend", lambda name: nullcontext())


@pytest.mark.usefixtures("as_if_on_triton")
@pytest.mark.parametrize("mode", grid.MODES)
def test_gpu_row_on_triton(bench: worker.Bench, mode: str) -> None:
    row = bench.row(as_task("triton", mode=mode))
    assert list(row["entries"]) == ["torch", LOOP, "rnnkit", TRITON]
    for key, told in row["entries"].items():
        assert told["us"].keys() == {"64", "512", "step"} and "wrong" not in told
        assert ("difference" in told) == (key != "torch")
        assert ("kernel" in told) == key.startswith("rnnkit")
    assert list(row["ratios"]) == ["torch", LOOP, "rnnkit"]
    assert all(ratios.keys() >= {"64", "512"} for ratios in row["ratios"].values())
    assert f"; {LOOP} " in tables.line(row)


@pytest.mark.usefixtures("as_if_on_triton")
@pytest.mark.parametrize("mode", grid.MODES)
def test_gpu_row_of_a_graph(
    bench: worker.Bench, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    forced = []

    def captured(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
        forced.append(plan.forced_kernel())
        return call

    monkeypatch.setattr("benchmarks.gpu.contender.captured", captured)
    row = bench.row(as_task("graph", mode=mode))
    assert forced == ["stepwise", "stepwise"] and not plan.forced_kernel()
    (told,) = row["entries"].values()
    assert told.keys() == {"difference", "kernel", "us"} and gpu_goals.step(row, TRITON)
    assert " µs/step; " in tables.line(row)


def test_gpu_loop_is_torch_without_cudnn() -> None:
    """And no less precise for it."""
    provider = layers.Layers(LOOP, torch.get_num_threads(), "cpu")
    tensors, before = inputs(TINY, provider.device), torch.backends.cudnn.enabled
    with precision("tf32"):
        for mode in grid.MODES:
            case = replace(TINY, mode=mode)
            module = provider.module(case, tensors)
            with provider.computation(case, module, tensors).around():
                assert not torch.backends.cudnn.enabled and torch.backends.cudnn.allow_tf32
                assert torch.is_inference_mode_enabled() == (mode == "inference")
            assert torch.backends.cudnn.enabled == before
    assert isinstance(module, torch.nn.GRU)


def test_gpu_time_limit() -> None:
    done: list[dict[str, Any]] = []

    def ask(task: Task, seconds: float) -> dict[str, Any]:
        assert 0 < seconds <= gpu.CASE_SECONDS
        time.sleep(0.2)
        return {"task": task, "ratios": {}}

    todo = [as_task(H=H) for H in (3, 4, 5)]
    assert gpu.measure(todo, ask, time.monotonic() + 0.3, done.append) == 1
    assert [row["task"] for row in done] == todo[:2]


def hanging(connection: Any, device: str, protocol: Protocol) -> None:
    """In place of worker.serve: hangs, ends or answers, by the case's H."""
    connection.send({"surroundings": {}})
    while True:
        H = connection.recv().case.H
        connection.send({"doing": "rnnkit"})
        if H == 1:
            time.sleep(60)
        if H == 2:
            os._exit(3)
        connection.send({"row": {"H": H}, "broken": False})


def test_gpu_process_that_hangs_or_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.supervisor.serve", hanging)
    fork = multiprocessing.get_context("fork")  # spawned, it would import this file
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: fork)
    with Supervisor("cpu", SPARING) as supervisor:
        for H, told in ((1, "no answer in 1 s"), (2, "its process ended with status 3")):
            row = supervisor.row(as_task(H=H), 1)
            assert row["entries"]["rnnkit"] == {"failed": f"{told}, in rnnkit"}
            assert "failed" not in row["entries"]["torch"]
            assert supervisor.row(as_task(H=3), 10) == {"H": 3}


def test_gpu_process_lost_with_others_to_judge() -> None:
    entries = failed(as_task("triton"), "no answer", LOOP)["entries"]
    told = {"failed": "no answer"}
    lost = {key: {"lost": "no answer"} for key in ("torch", "rnnkit", TRITON)}
    assert entries == lost | {LOOP: told}
    assert failed(as_task("graph"), "no answer", "")["entries"] == {TRITON: told}


def on_gpu(case: Case, value: float, kind: str = "time") -> dict[str, Any]:
    """A row in which torch.nn takes `value` times as long, errs as much, or rnnkit's step takes `value` µs."""
    ratios = {what: figure(value) for what in ("64", "512", "step")}
    told = {"us": {"step": figure(2.0)}, "recurrent_us": value}
    row = {"part": "main", "kind": kind, "case": case.document(), "ratios": ratios}
    row["entries"] = {"torch": {"us": {"step": figure(2 * value)}}, "rnnkit": told}
    return row | ({"ratios": {"output": value}} if kind == "error" else {})


def made_on_gpu(*rows: dict[str, Any]) -> dict[str, Any]:
    document = made() | {"format": results.GPU_FORMAT, "complete": False, "rows": list(rows)}
    return document | {"device": {"kind": "cuda", "name": "A GPU", "multiprocessors": 132}}


def gpu_rows() -> list[dict[str, Any]]:
    low = Case("LSTM", "inference", 512, 16, 512, 512, dtype="bfloat16")
    odd = replace(low, cell="GRU", H=650, I=650)
    half = replace(low, dtype="float16")
    large = replace(low, N=256, H=2048, I=2048)
    training = replace(low, mode="training")
    rows = [on_gpu(low, 4.0), on_gpu(odd, 1.0), on_gpu(half, 0.8), on_gpu(large, 1.1)]
    rows += [on_gpu(low, 1.8, "kernels"), on_gpu(training, 1.8 + 2.6 * 1.6, "kernels")]
    return [*rows, on_gpu(replace(training, T=64), 1.9, "error")]


def test_gpu_goals() -> None:
    judged = {row["what"].split(",")[0]: row for row in gpu_goals.judge_all(made_on_gpu())}
    assert all(row["verdict"] == "not measured" for row in judged.values())
    told = gpu_goals.judge_all(made_on_gpu(*gpu_rows()))
    assert [(row["verdict"], row["cases"]) for row in told] == [
        ("met", 4),  # forward: 2× in the mean, each at both T
        ("not measured", 0),
        ("missed", 2),  # the GRU of odd H
        ("missed", 2),  # fp16
        ("met", 2),
        ("met", 1),
        ("missed", 1),  # backward at 1.6 times its goal
        ("met", 1),
    ]
    assert told[0]["figure"].startswith("geometric mean 2.00×; worst 1.00×: GRU bf16 H650 N16")
    failed = gpu_rows()
    failed[0]["entries"]["rnnkit"] = {"failed": "no answer"}
    assert gpu_goals.judge_all(made_on_gpu(*failed))[0]["verdict"] == "missed"


def on_triton(case: Case, cudnn: float, loop: float) -> dict[str, Any]:
    """A row in which torch.nn takes so many times as long as the Triton kernels, with cuDNN and without."""
    peers = {"torch": cudnn, LOOP: loop, "rnnkit": 0.5}
    ratios = {
        peer: {what: figure(value) for what in ("64", "512", "step")}
        for peer, value in peers.items()
    }
    entries = {key: {"us": {"step": figure(2.0)}} for key in (*peers, TRITON)}
    row = {"part": "triton", "kind": "triton", "case": case.document()}
    return row | {"ratios": ratios, "entries": entries}


def in_graph(case: Case, microseconds: float) -> dict[str, Any]:
    entries = {TRITON: {"us": {"step": figure(microseconds)}}}
    row = {"part": "triton", "kind": "graph", "case": case.document()}
    return row | {"ratios": {}, "entries": entries}


def triton_rows() -> list[dict[str, Any]]:
    small = Case("LSTM", "inference", 512, 16, 256, 256, dtype="bfloat16")
    large = replace(small, H=512, I=512)
    rows = [on_triton(small, 0.8, 2.0), on_triton(large, 0.4, 8.0)]
    rows += [on_triton(replace(small, dtype="float16"), 0.1, 4.0), in_graph(large, 9.0)]
    return [*rows, in_graph(replace(large, mode="training"), 20.0)]


def test_gpu_goals_of_triton() -> None:
    assert len(gpu_goals.judge_all(made_on_gpu(*gpu_rows()))) == len(gpu_goals.GOALS)
    told = gpu_goals.judge_all(made_on_gpu(*triton_rows()))
    assert all(row["verdict"] == "not measured" for row in told[: len(gpu_goals.GOALS)])
    judged = told[len(gpu_goals.GOALS) :]
    assert [(row["verdict"], row["cases"]) for row in judged] == [
        ("met", 6),  # 4× in the mean, each at both T
        ("met", 2),  # bf16 of H 256 alone
        ("met", 1),
        ("missed", 1),  # backward takes 20 - 9 µs
    ]
    assert [row["figure"] for row in judged] == [
        "geometric mean 4.00×; worst 2.00×: LSTM bf16 H256 N16 inference T64",
        "worst 1.25×: LSTM bf16 H256 N16 inference T64",
        "worst 9 µs: LSTM bf16 H512 N16 inference",
        "worst 11 µs: LSTM bf16 H512 N16 training",
    ]


@pytest.mark.parametrize("refused", ["wrong", "failed"])
def test_gpu_goals_without_a_result_on_triton(refused: str) -> None:
    rows = triton_rows()
    for row in rows:
        row["entries"][TRITON] = {refused: "so"}
        assert not gpu_goals.right(row)
    judged = gpu_goals.judge_all(made_on_gpu(*rows))[len(gpu_goals.GOALS) :]
    assert {row["verdict"] for row in judged} == {"missed"}
    others = triton_rows()
    others[0]["entries"]["rnnkit"] = others[0]["entries"][LOOP] = {refused: "so"}
    assert gpu_goals.right(others[0]) and not gpu_goals.right(others[0], "rnnkit")


def test_gpu_parts_are_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    rows = gpu_rows()
    again = on_gpu(Case(**rows[0]["case"]), 5.0)
    results.write(made_on_gpu(*rows[:2]), first)
    results.write(made_on_gpu(again, *rows[2:]), second)
    assert gpu.merged([first, second]) == [again, *rows[1:]]
    other = made_on_gpu() | {"device": {"kind": "cuda", "name": "Another"}}
    results.write(other, second)
    with pytest.raises(results.ResultsError, match="another device"):
        gpu.merged([first, second])
    assert gpu.main(["--show", str(first)]) == 0
    output = capsys.readouterr().out
    assert re.search("LSTM bf16 H512 N16 inference +2.00 +8.00 +4.00 ", output)
    assert re.search("main +LSTM bfloat16 +inference +4.00 +4.00 +4.00", output)
    assert TRITON not in output


def test_gpu_rows_on_triton_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "triton.json"
    results.write(made_on_gpu(*triton_rows()), path)
    assert gpu.main(["--show", str(path)]) == 0
    output = capsys.readouterr().out
    for found in (
        "triton LSTM bf16 H256 N16 inference +2.00 µs/step; torch 0.80× 0.80× 0.80×; torch.loop. 2.00×",
        "graph LSTM bf16 H512 N16 inference +9.00 µs/step",
        r"torch\[loop\] LSTM bfloat16 +inference +4.00 +4.00 +4.00",
        "Triton over ATen's loop .*met",
    ):
        assert re.search(found, output), found


def test_gpu_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    given = ["--device", "cpu", "--output", str(path), "--revision", "abc-dirty"]
    assert gpu.main([*given, "--only", "error RNN fp32 H256"]) == 0
    document, _ = results.load(path, results.GPU_FORMAT)
    assert document["versions"]["git"] == {"revision": "abc", "dirty": True}
    assert len(document["rows"]) == 1 and not document["complete"]
    assert document["versions"]["triton"]
    assert "error against float64" in capsys.readouterr().out


def test_report_tells_of_the_gpu(folder: Path) -> None:
    pytest.importorskip("matplotlib")

    def told(*rows: dict[str, Any]) -> tuple[str, str]:
        if rows:
            results.write(made_on_gpu(*rows), folder / "results" / "gpu.json")
        assert run_report(folder) == 0
        performance = folder / "docs" / "performance.md"
        return (folder / "README.md").read_text("utf-8"), performance.read_text("utf-8")

    short, text = told()
    assert "On a GPU: not yet measured." in short
    assert "Not yet run on one (`python -m benchmarks.gpu`)." in text
    short, text = told(*gpu_rows())
    assert (
        "On a GPU (A GPU) torch.nn, which is cuDNN there, takes 2.00 times as long forward" in short
    )
    assert "Triton" not in text
    assert "A GPU (132 SMs)" in text and "[gpu.json](../results/gpu.json)" in text
    assert "| H, N | GRU bf16 inference | LSTM bf16 inference |" in text
    assert "| 512, 16 | – | – (4.00, 4.00) |" in text and "| N 256, H ≥ 1024 | ≥ 1× |" in text
    _, both = told(*gpu_rows(), *triton_rows())
    assert "| Triton over ATen's loop (torch.nn without cuDNN) | geometric mean ≥ 3×" in both
    assert [line for line in both.splitlines() if line.startswith("| 512, 16 |")] == [
        line for line in text.splitlines() if line.startswith("| 512, 16 |")
    ]
