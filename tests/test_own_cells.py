"""Cells of one's own on the CPU: compiled and interpreted, and what becomes of a call where no compiler works."""

import copy
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from graph_cells import (
    BUILTIN,
    CELLS,
    LATE,
    Cell,
    coupled_lstm,
    ind_rnn,
    janet,
    light_gru,
    peephole_lstm,
    xlstm,
)
from kernel_cases import (
    DTYPES,
    NOISE_OF_FEW,
    RESETS_AND_NOISE,
    SIZES,
    Case,
    assert_case_matches_reference,
    assert_matches_reference,
    assert_same_bits,
    call,
    variants,
)
from test_graph import NUMBERS, program
from test_registered import cases_like_built_in
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkit
from rnnkit import __main__ as command
from rnnkit import backends, specs
from rnnkit.call import Keep
from rnnkit.graph import compiled, kernels
from rnnkit.graph.trace import LEAVES, evaluate

pytestmark = pytest.mark.skipif(
    backends.EXTENSION is None or shutil.which("c++") is None,
    reason=f"no C++ kernels ({backends.EXTENSION_REASON}), or no compiler",
)

KINDS = ("compiled", "interpreted")


def two_to_one(x, r, s):
    f, n = torch.sigmoid(x.f + r.a), torch.tanh(x.n + r.a)
    return (f * s.h + (1 - f) * n,)


#: Cells that are not built in.
OTHERS = {
    "peephole_lstm": Cell(peephole_lstm, "i f g o", "i f g o", "h c", 5, "i f o"),
    "coupled_lstm": Cell(coupled_lstm, "f g o", "f g o", "h c", 4),
    "janet": Cell(janet, "f g", "f g", "h", 2),
    "light_gru": Cell(light_gru, "z n", "z n", "h", 2),
    "ind_rnn": Cell(ind_rnn, "h", "", "h", 0, "u"),
    "xlstm": Cell(xlstm, "i f z o", "i f z o", "h c n m", 7),
    "two_to_one": Cell(two_to_one, "f n", "a", "h", 3),
} | LATE


@pytest.fixture(scope="module", autouse=True)
def cache_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache that is not the user's, unless RNNKIT_CACHE says which."""
    with pytest.MonkeyPatch.context() as patch:
        if "RNNKIT_CACHE" not in os.environ:
            patch.setenv("RNNKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("RNNKIT_COMPILE", raising=False)
        yield


def op_name(cell: Cell, suffix: str) -> str:
    """A cell's name in ops. With another suffix it is another cell, which computes the same."""
    graph = cell.graph()
    return replace(graph, inputs=tuple(f"{name}_{suffix}" for name in graph.inputs)).to_json()


@cache
def registered(name: str, kind: str) -> str:
    """The name in ops of a cell whose functions are compiled, or interpreted."""
    found = op_name((OTHERS | CELLS)[name], kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RNNKIT_COMPILE", "01"[kind == "compiled"])
        assert kernels.register(found) == kind
    return found


def of_cell(name: str, suffix: str) -> Any:
    """The same cell for `Recurrent`."""
    from rnnkit.graph import Graph

    return rnnkit.Cell(name, Graph.from_json(op_name((OTHERS | CELLS)[name], suffix)))


# test_registered.py has all of these cases, with a struct written by hand.
@pytest.mark.parametrize("keep", [Keep.EVERYTHING, Keep.STATES], ids=["everything", "states"])
@pytest.mark.parametrize("case", cases_like_built_in()[::5], ids=str)
def test_compiled_has_the_bits_of_built_in(case: Case, keep: Keep) -> None:
    built_in = call(case)
    own = replace(built_in, cell=registered(case.cell, "compiled"))
    if case.dtype == torch.bfloat16 and backends.EXTENSION.multiplies_bfloat16():  # type: ignore[union-attr]
        pytest.skip("cells of one's own multiply bfloat16 as float")
    if case.expects:  # what is multiplied by probabilities is rounded where a cell's function ends
        assert_matches_reference(own, own.run(keep))
        return
    flow = case.directions == 2
    assert_same_bits(own.run(keep, flow), built_in.run(keep, flow))


def cases_of(name: str) -> list[Case]:
    """Odd sizes, and every variant; of built-in cells fewer."""
    cell = op_name((OTHERS | CELLS)[name], "case")
    specs.of(cell)
    few = name in BUILTIN
    found = []
    for dtype in (torch.float64, torch.float32):
        several = SIZES[:: 3 if few else 1]
        found += [Case(cell, sizes, 1 + k % 2, dtype=dtype) for k, sizes in enumerate(several)]
        found += [Case(cell, (4, 3, 13, hidden), 2, dtype=dtype) for hidden in (1, 33, 70)]
        found += variants(Case(cell, (3, 18, 34, 64), 2, dtype=dtype), few=few)
        found += [Case(cell, (4, 3, 5, 33), 2, dtype=dtype, **noise) for noise in NOISE_OF_FEW[::2]]
        found.append(Case(cell, (3, 70, 9, 130), 2, dtype=dtype, **RESETS_AND_NOISE))
    found += [Case(cell, (5, 6, 9, 24), 2, dtype=dtype) for dtype in DTYPES[2:]]
    return found


def every_case() -> list[Any]:
    """Of every cell a third of the cases compiled, and another third interpreted, which cell by cell are others."""
    found = []
    for part, kind in enumerate(KINDS):
        for at, name in enumerate([*OTHERS, *(BUILTIN if kind == "interpreted" else ())]):
            for case in cases_of(name)[(part + at) % 3 :: 3]:
                named = f"{kind}-{replace(case, cell=name)}"
                found.append(pytest.param(name, kind, case, id=named))
    return found


@pytest.mark.parametrize("name, kind, case", every_case())
def test_against_reference(name: str, kind: str, case: Case) -> None:
    case = replace(case, cell=registered(name, kind))
    keep = Keep.STATES if sum(case.sizes) % 2 else Keep.EVERYTHING
    if name == "rnn_relu" and case.dtype in DTYPES[2:]:
        pytest.skip("by chance, see kernel_cases")
    assert_case_matches_reference(case, keep)


@pytest.mark.parametrize("name", ["reset_before", "multiplicative_lstm", "minimal_rnn"])
@pytest.mark.parametrize("keep", [Keep.EVERYTHING, Keep.STATES], ids=["everything", "states"])
@pytest.mark.parametrize("rows", [1, 2])
def test_threads_that_share_the_units_of_late_gates(name: str, keep: Keep, rows: int) -> None:
    """Many steps of few rows, between whose two parts all threads have to meet: the bits of one thread."""
    cell = registered(name, "compiled")
    case = Case(cell, (60, rows, 40, 400), zoneout=(0.2,) * specs.of(cell).states)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(call(case).run(keep, True))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_same_bits(other, found[0])


def draw(name: str) -> tuple[Cell, list[list[Tensor]]] | None:
    """A random cell and values for it, with a late gate or without; None if some value in it is large."""
    random = Random(name)
    cell = program(random, late=int(name) % 2 == 1)
    of_each = [
        [random.choice(NUMBERS) if k % 2 else random.gauss(0, 1) for k in range(35)]
        for _ in range(6)
    ]
    a, b, c, h, other, v = torch.tensor(of_each, dtype=torch.float64).view(6, 7, 5)
    graph = cell.graph()
    of_r = [c[:1].expand(7, 5), c[1:2].expand(7, 5)][: len(graph.recurrent)]
    leaves = [[a, b], of_r, [h, other], [v[0]]]
    every = evaluate(
        graph.nodes, range(len(graph.nodes)), dict(zip(LEAVES, leaves, strict=False)), a
    )
    large = any((value.double().abs() > 100).any() or value.isnan().any() for value in every)
    return None if large or not graph.parameters else (cell, leaves)


RANDOM = [name for name in map(str, range(300)) if draw(name) is not None]


@pytest.mark.parametrize(
    "kind, name",
    [("interpreted", name) for name in RANDOM] + [("compiled", name) for name in RANDOM[::15]],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_random_graphs(kind: str, name: str, dtype: torch.dtype) -> None:
    """A step of a layer whose products are the values: W_ih is the identity, W_hh is 0, b_hh is the recurrent part.

    With a late gate W_hh is random, so that the second operand has a gradient.
    """
    drawn = draw(name)
    assert drawn is not None
    cell, leaves = drawn
    own = op_name(cell, kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RNNKIT_COMPILE", "01"[kind == "compiled"])
        assert kernels.register(own) == kind
    (a, b), of_r, states, (v,) = [[t.to(dtype) for t in of_kind] for of_kind in leaves]
    generator = torch.Generator().manual_seed(0)
    w_hh = torch.zeros(5 * len(of_r), 5, dtype=dtype)
    if len(of_r) > 1:
        w_hh.uniform_(-0.1, 0.1, generator=generator)
    weights = [torch.eye(10, dtype=dtype), w_hh]
    weights += [
        torch.zeros(10, dtype=dtype),
        torch.cat([c[0] for c in of_r]),
        None,
        v[None].clone(),
    ]
    it = call(Case("lstm"))
    grads = [torch.randn(1, 7, 5, generator=generator, dtype=dtype) for _ in range(3)]
    it = replace(
        it,
        cell=own,
        input=torch.cat([a, b], 1)[None],
        states=[state[None] for state in states],
        weights=weights,
        grads=grads,
    )
    tolerance = 1e-9 if dtype == torch.float64 else 2e-3
    for name, expected in it.reference().items():
        actual = it.run()[name]
        torch.testing.assert_close(
            actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max() + 1e-2)
        )


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_more_values_than_fit_l1_in_whole_rows(dtype: torch.dtype) -> None:
    def step(x: Any, r: Any, s: Any) -> Any:
        total = r.a * s.h
        for k in range(300):  # the first operand waits for the second
            total = torch.tanh(x.a * (k / 300)) / 300 - total
        return (total,)

    own = op_name(Cell(step, "a", "a", "h", 0), "interpreted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RNNKIT_COMPILE", "0")
        assert kernels.register(own) == "interpreted"
    assert_case_matches_reference(Case(own, (3, 5, 4, 70), 2, dtype=dtype))


def twins(name: str, dtype: torch.dtype, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A layer of rnnkit, and one of a cell of one's own with the same weights."""
    made: dict[str, Any] = {
        "lstm": rnnkit.LSTM,
        "gru": rnnkit.GRU,
        "rnn_tanh": rnnkit.RNN,
    }
    torch.manual_seed(0)
    built_in = made[name](5, 33, num_layers=2, bidirectional=True, dtype=dtype, **options)
    own = rnnkit.Recurrent(
        of_cell(name, "compiled"), 5, 33, num_layers=2, bidirectional=True, dtype=dtype, **options
    )
    own.load_state_dict(built_in.state_dict())
    return built_in, own


def results(
    module: nn.Module, *arguments: Any, all_states: bool = False, **options: Any
) -> list[Tensor]:
    """The outputs, final states and gradients of a call in training."""
    torch.manual_seed(1)
    module.zero_grad()
    output, finals = module(*arguments, **options)
    output = output.data if hasattr(output, "data") else output
    found = [output, *([finals] if isinstance(finals, Tensor) else finals)]
    sum(
        (one.double() * torch.arange(one.numel()).view(one.shape).cos()).sum() for one in found
    ).backward()
    return [*found, *(p.grad for p in module.parameters())]


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "recompute": {"recompute": True},
    "recurrent_dropout": {"recurrent_dropout": 0.3},
    "weight_dropout": {"weight_dropout": 0.3},
    "zoneout": {"zoneout": 0.2},
    "grad_clip": {"grad_clip": 0.01, "grad_cut": 3},
    "learned": {"learn_initial_state": True},
}


@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_tanh"])
def test_layers_have_the_bits_of_built_in(name: str, dtype: torch.dtype, options: dict) -> None:
    if dtype == torch.bfloat16 and backends.EXTENSION.multiplies_bfloat16():  # type: ignore[union-attr]
        pytest.skip("cells of one's own multiply bfloat16 as float")
    built_in, own = twins(name, dtype, **options)
    assert rnnkit.explain(own, torch.zeros(1, 1, 5)).kernel == "compiled"
    input = torch.randn(9, 4, 5).to(dtype)
    assert_same_bits(results(own, input), results(built_in, input))
    packed = pack_padded_sequence(input, [9, 6, 6, 1])
    assert_same_bits(results(own, packed), results(built_in, packed))
    reset = torch.rand(9, 4) < 0.3
    assert_same_bits(results(own, input, reset=reset), results(built_in, input, reset=reset))
    lengths = torch.tensor([3, 9, 1, 5])
    assert_same_bits(
        results(own, input, lengths=lengths), results(built_in, input, lengths=lengths)
    )
    with torch.no_grad():
        frozen = [rnnkit.freeze(module.eval())(input)[0] for module in (own, built_in)]
    assert_same_bits(frozen[:1], frozen[1:])


numbers = count()


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Makes layers of cells that no process has seen, with an empty cache and nothing remembered of compilers."""
    monkeypatch.setenv("RNNKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled, "_failed", False)
    monkeypatch.setattr(compiled, "_warned", False)
    compiled.version.cache_clear()

    def layer() -> Any:
        return rnnkit.Recurrent(of_cell("ind_rnn", f"fresh{next(numbers)}"), 3, 4)

    return layer


def works(layer: Any) -> str:
    """The kind of kernel that a layer runs on; checks its results."""
    torch.manual_seed(0)
    input = torch.randn(4, 2, 3)
    found = results(layer, input)
    with rnnkit.backend("reference"):
        expected = results(layer, input)
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e)
    return kernels._kinds[layer._cell]


@contextmanager
def one_warning(words: str) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts = [str(one.message) for one in caught]
    assert len(texts) == 1 and words in texts[0], texts
    assert "rnnkit interprets cells of one's own" in texts[0]
    assert caught[0].filename == __file__


def compiler_that(tmp_path: Path, script: str) -> str:
    """A compiler that says its version, and otherwise notes it and does as the script says: `$real` is a real one."""
    path = tmp_path / "compiler"
    real = shutil.which("c++")
    begin = f"""#!/bin/sh
real={real}
[ "$1" = --version ] && exec $real "$@"
echo once >> {tmp_path}/compiled
for out; do :; done
"""
    path.write_text(f"{begin}{script}\n")
    path.chmod(0o755)
    return str(path)


def times_compiled(tmp_path: Path) -> int:
    return len((tmp_path / "compiled").read_text().splitlines())


def libraries(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").glob("*.so"))


def test_compiled_once(fresh: Callable[[], Any], tmp_path: Path) -> None:
    layer = fresh()
    assert not libraries(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert works(layer) == "compiled"
    (library,) = libraries(tmp_path)
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [library.name, "lock"]
    made = library.stat().st_mtime_ns
    same = fresh()  # of other names, so another cell in ops, and the same text in C++
    assert works(same) == "compiled"
    assert libraries(tmp_path) == [library] and library.stat().st_mtime_ns == made


TROUBLES = {
    "error": (
        "echo 'cell.cpp:1: error: no such thing'; exit 1",
        "error: no such thing: install g++",
    ),
    "nothing printed": ("exit 3", "failed (3): install g++"),
    "killed": ("echo half > $out; kill -9 $$", "failed (-9): install g++"),
    "no output": ("exit 0", "No such file or directory"),
    "garbage": ("echo half > $out", "set RNNKIT_CACHE"),
    "full disk": ("echo 'as: error: No space left on device'; exit 1", "set RNNKIT_CACHE"),
}


@pytest.mark.parametrize("what", TROUBLES)
def test_a_compiler_that_fails(
    what: str, fresh: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, words = TROUBLES[what]
    monkeypatch.setenv("CXX", compiler_that(tmp_path, script))
    with one_warning(words):
        assert works(fresh()) == "interpreted"
        assert works(fresh()) == "interpreted"  # without a second warning
    assert times_compiled(tmp_path) == 1
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["lock"]


def test_a_compiler_that_hangs(
    fresh: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f"sleep 100 & echo $! > {tmp_path}/child; wait"
    monkeypatch.setenv("CXX", compiler_that(tmp_path, script))
    compiled.version(compiled.compiler())  # which may take its time
    monkeypatch.setattr(compiled, "TIME_LIMIT", 1.0)
    begin = time.monotonic()
    with one_warning("took longer than 1 s: set CXX to another compiler"):
        assert works(fresh()) == "interpreted"
        assert works(fresh()) == "interpreted"
    assert time.monotonic() - begin < 60
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "status")
    assert not child.exists() or "State:\tZ" in child.read_text()


def test_no_compiler(
    fresh: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/no/compiler")
    with one_warning("CXX is /no/compiler, which is not there: install g++ 11 or clang 19"):
        assert works(fresh()) == "interpreted"
    monkeypatch.setattr(compiled, "_warned", False)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with one_warning("there is no C++ compiler: install g++ 11 or clang 19, or later, or set CXX"):
        assert works(fresh()) == "interpreted"
    monkeypatch.setattr(compiled, "_warned", False)
    silent = tmp_path / "c++"
    silent.write_text("#!/bin/sh\n")
    silent.chmod(0o755)
    with one_warning("c++ --version` says nothing: install g++"):
        assert works(fresh()) == "interpreted"


def test_folders_that_others_can_write_to(
    fresh: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert works(fresh()) == "compiled"
    folder = tmp_path / "cache"
    for mode in (0o770, 0o707):
        folder.chmod(mode)
        monkeypatch.setattr(compiled, "_warned", False)
        with one_warning(f"other users can write to {folder}: `chmod go-w {folder}`"):
            assert works(fresh()) == "interpreted"
    folder.chmod(0o755)
    libraries(tmp_path)[0].chmod(0o666)
    monkeypatch.setattr(compiled, "_warned", False)
    with one_warning("other users can write to"):
        assert works(fresh()) == "interpreted"
    libraries(tmp_path)[0].chmod(0o755)
    assert works(fresh()) == "compiled"
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    monkeypatch.setattr(compiled, "_warned", False)
    with one_warning("belongs to another user, from whom no code is loaded: set RNNKIT_CACHE"):
        assert works(fresh()) == "interpreted"


def test_a_umask_that_lets_a_group_write(fresh: Callable[[], Any]) -> None:
    """The library is written so that later processes load it."""
    before = os.umask(0o002)
    try:
        for _ in range(2):
            kernels.register(fresh()._cell)
    finally:
        os.umask(before)
    assert compiled.cells()
    assert all(path.stat().st_mode & 0o077 == 0 for path in compiled.cells())


def test_only_cells_are_removed(fresh: Callable[[], Any]) -> None:
    kernels.register(fresh()._cell)
    other = compiled.folder() / "other.so"
    other.touch()
    assert compiled.clear() == 1 and other.exists() and not compiled.cells()


def test_folders_that_cannot_be_written_to(
    fresh: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RNNKIT_CACHE", "/proc/rnnkit")
    with one_warning("'/proc/rnnkit': set RNNKIT_CACHE to a folder of your own"):
        assert works(fresh()) == "interpreted"


@pytest.mark.parametrize("error", [(28, "No space left on device"), (30, "Read-only file system")])
def test_disks_that_cannot_be_written_to(
    error: tuple[int, str], fresh: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any, **options: Any) -> Any:
        raise OSError(*error)

    monkeypatch.setattr(compiled.tempfile, "TemporaryDirectory", fails)
    with one_warning(f"{error[1]}: set RNNKIT_CACHE to a folder of your own, with room to write"):
        assert works(fresh()) == "interpreted"


def test_a_library_that_is_cut_off(
    fresh: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh().cell.build()
    (library,) = libraries(tmp_path)
    other = tmp_path / "other"  # of which this process has loaded nothing
    other.mkdir()
    (other / library.name).write_bytes(b"")
    monkeypatch.setenv("RNNKIT_CACHE", str(other))
    assert works(fresh()) == "compiled"
    assert len((other / library.name).read_bytes()) == len(library.read_bytes())


def test_compiling_is_turned_off(
    fresh: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RNNKIT_COMPILE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = fresh()
        assert works(layer) == "interpreted"
    assert rnnkit.explain(layer, torch.zeros(1, 1, 3)).kernel == "interpreted"
    assert str(rnnkit.explain(layer, torch.zeros(1, 1, 3))) == "cpp on cpu, interpreted"
    assert not libraries(tmp_path)


def test_another_compiler_or_version_compiles_again(
    fresh: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh().cell.build()
    monkeypatch.setattr(rnnkit, "__version__", "99")
    fresh().cell.build()
    assert len(libraries(tmp_path)) == 2
    monkeypatch.setattr(compiled, "version", lambda command: "other")
    fresh().cell.build()
    assert len(libraries(tmp_path)) == 3


def test_build_compiles_ahead(fresh: Callable[[], Any], tmp_path: Path) -> None:
    layer = fresh()
    layer.cell.build()
    assert len(libraries(tmp_path)) == 1 and kernels._kinds[layer._cell] == "compiled"


def test_info_and_clear_cache(
    fresh: Callable[[], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh().cell.build()
    (tmp_path / "cache" / "unfinished-x").mkdir()
    told = command.info()["own cells"]
    assert told["folder"] == str(tmp_path / "cache")
    assert told["compiled"] == 1
    assert "(" in str(told["compiler"]) or "clang" in str(told["compiler"])
    assert command.main(["clear-cache"]) == 0
    assert capsys.readouterr().out == f"removed 1 compiled cells from {tmp_path}/cache\n"
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["lock"]
    assert command.main(["clear-cache"]) == 0


def test_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RNNKIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert compiled.folder() == Path("/x/rnnkit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/a")
    assert compiled.folder() == Path("/home/a/.cache/rnnkit")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:rnnkit interprets cells")
def test_threads_that_call_first_at_once(
    kind: str, fresh: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    then = {"compiled": 'exec $real "$@"', "interpreted": "exit 1"}[kind]
    monkeypatch.setenv("CXX", compiler_that(tmp_path, f"sleep 0.5; {then}"))
    layer, input = fresh(), torch.randn(4, 2, 3)
    found: list[Tensor] = []
    barrier = threading.Barrier(4)

    def run() -> None:
        barrier.wait()
        found.append(layer(input)[0])

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(one.equal(found[0]) for one in found)
    assert times_compiled(tmp_path) == 1
    assert kernels._kinds[layer._cell] == kind


def leaky_sum(x: Any, r: Any, s: Any) -> Any:
    h = torch.tanh(x.a + r.a)
    return {"h": h, "c": 0.9 * s.c + h * s.c + h}


def one_for_both(x: Any, r: Any, s: Any) -> Any:
    c = torch.tanh(x.a + r.a) + 0.5 * s.c
    return {"h": c, "c": c}


@pytest.mark.parametrize("zoneout", [0.0, (0.3, 0.0), (0.0, 0.3)], ids=str)
@pytest.mark.parametrize("compile", ["0", "1"])
@pytest.mark.parametrize("step", [leaky_sum, one_for_both])
def test_flow_through_states_of_one_step(
    step: Callable[..., Any], compile: str, zoneout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of h has what passes to it from another state that is made of it."""
    monkeypatch.setenv("RNNKIT_COMPILE", compile)
    cell = rnnkit.cell(step, gates=f"a b{compile}", recurrent=f"a b{compile}", states="h c")
    layer = rnnkit.Recurrent(cell, 3, 5, zoneout=zoneout, bidirectional=True).double().eval()
    x, found = torch.randn(4, 2, 3, dtype=torch.float64), []
    for backend in ("cpp", "reference"):
        with rnnkit.backend(backend), rnnkit.gradient_flow(layer) as flow:
            output, (_, c) = layer(x)
            (output.square().sum() + c.sin().sum()).backward()
        found.append(flow[""])
    torch.testing.assert_close(found[0].h, found[1].h)
    torch.testing.assert_close(found[0].c, found[1].c)


def test_copies(fresh: Callable[[], Any]) -> None:
    layer, input = fresh(), torch.randn(4, 2, 3)
    again = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    expected = layer(input)[0]
    assert all(one(input)[0].equal(expected) for one in again)


def test_compiled_graphs(fresh: Callable[[], Any]) -> None:
    layer, input = fresh(), torch.randn(4, 2, 3)
    torch.compiler.reset()
    module = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = results(module, input)
    assert_same_bits(found, results(layer, input))


IN_ANOTHER_PROCESS = """
import pickle, sys, torch, rnnkit
kind, path = sys.argv[1:]
input, expected = torch.load(f"{path}/tensors.pt")
if kind == "pickle":
    module = pickle.load(open(f"{path}/layer.pickle", "rb"))
else:
    module = torch.export.load(f"{path}/program.pt2").module()
assert module(input)[0].equal(expected)
from rnnkit.graph import kernels
assert list(kernels._kinds.values()) == ["compiled"]
"""


@pytest.mark.parametrize("kind", ["pickle", "export"])
def test_another_process(kind: str, fresh: Callable[[], Any], tmp_path: Path) -> None:
    layer, input = fresh().eval(), torch.randn(4, 2, 3)
    if kind == "pickle":
        (tmp_path / "layer.pickle").write_bytes(pickle.dumps(layer))
    else:
        torch.export.save(torch.export.export(layer, (input,)), tmp_path / "program.pt2")
    torch.save((input, layer(input)[0].detach()), tmp_path / "tensors.pt")
    run_python(IN_ANOTHER_PROCESS, kind, str(tmp_path))


def run_python(code: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", code, *arguments], check=True)


BUILDS = """
import sys, time, pathlib, rnnkit
@rnnkit.cell(gates="a", states="h", recurrent=())
def one(x, r, s):
    return (x.a + 0.5 * s.h,)
from rnnkit.graph import kernels
go = pathlib.Path(sys.argv[1], "go")
pathlib.Path(sys.argv[1], f"ready{sys.argv[2]}").touch()
while not go.exists():
    time.sleep(0.01)
one.build()
assert list(kernels._kinds.values()) == ["compiled"]
"""


def start(tmp_path: Path, name: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-W", "error", "-c", BUILDS, str(tmp_path), name])


def wait_for(path: Path) -> None:
    until = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_two_processes_at_once(
    fresh: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler_that(tmp_path, 'sleep 1; exec $real "$@"'))
    processes = [start(tmp_path, name) for name in "ab"]
    for name in "ab":
        wait_for(tmp_path / f"ready{name}")
    (tmp_path / "go").touch()
    assert [process.wait(120) for process in processes] == [0, 0]
    assert times_compiled(tmp_path) == 1
    assert len(libraries(tmp_path)) == 1


def test_a_process_that_is_killed_while_compiling(
    fresh: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f"echo half > $out; touch {tmp_path}/compiling; sleep 3"
    monkeypatch.setenv("CXX", compiler_that(tmp_path, script))
    (tmp_path / "go").touch()
    process = start(tmp_path, "a")
    wait_for(tmp_path / "compiling")
    process.kill()
    process.wait()
    assert not libraries(tmp_path)
    compiler_that(tmp_path, 'exec $real "$@"')
    assert start(tmp_path, "b").wait(120) == 0
    assert len(libraries(tmp_path)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_tell_long_names_apart(kind: str) -> None:
    names = [registered(name, kind) for name in ("janet", "light_gru")]
    its = [call(replace(Case("lstm", (40, 9, 13, 70)), cell=name)) for name in names]
    packed = torch.ops.rnnkit.pack_weights(names[0], its[0].weights)
    its[0] = replace(its[0])
    assert rnnkit.ops.layer_forward(its[0], packed, Keep.NOTHING)[0][0].equal(
        its[0].forward()[0][0]
    )
    with pytest.raises(RuntimeError, match="expected packed to be"):
        rnnkit.ops.layer_forward(its[1], packed, Keep.NOTHING)


def test_cells_that_are_too_large() -> None:
    def five(x: Any, r: Any, s: Any) -> Any:
        return tuple(x.a + state for state in s)

    cell = rnnkit.cell(five, gates="a", states="h b c d e", recurrent=())
    layer, input = rnnkit.Recurrent(cell, 2, 3), torch.zeros(2, 1, 2)
    with pytest.raises(RuntimeError, match=r"to have 1 to 4 states, got 5: it runs under `with"):
        layer(input)
    with rnnkit.backend("reference"):
        assert layer(input)[0].shape == (2, 1, 3)


def test_headers_are_those_of_the_kernels() -> None:
    sources = Path(__file__).parents[1] / "csrc"
    headers = [*compiled.INCLUDE.rglob("*.h")]
    assert len(headers) == 4
    if sources.exists():
        for header in headers:
            of_source = sources / header.relative_to(compiled.INCLUDE)
            assert header.read_text() == of_source.read_text(), "build again"


def test_no_such_graph() -> None:
    it = replace(call(Case("lstm")), cell='{"inputs":[]}')
    with pytest.raises(RuntimeError, match="expected cell to be the name of a cell or a graph"):
        torch.ops.rnnkit.layer_forward(*it.arguments, None, 0)
