"""Text printed from graphs, compiled: C++ beside csrc/cells, Triton beside rnnkit/triton/cells.py, bit for bit.

Of cells that have no hand-written form, the numbers are autograd's. Lane functions are held to longer arithmetic.
"""

import ctypes
import functools
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import interpreter
import pytest
import torch
from graph_cells import BUILTIN, CELLS
from test_graph import Leaves, saved
from torch import Tensor

from rnnkit import specs
from rnnkit.graph import Derived, cpp, derive, run
from rnnkit.graph import triton as printer
from rnnkit.graph.derive import run_backward
from rnnkit.graph.trace import OPERATIONS, evaluate

CSRC = Path(__file__).parents[1] / "csrc"
FLAGS = ["-std=c++20", "-O2", "-g0", "-fwrapv", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]

#: Flags of lanes for this machine; those of the ISAs are setup.py's.
LANES = {"scalar": ["-DRNNKIT_SCALAR"], "baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        LANES["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        LANES["avx512"] = [*LANES["avx2"], "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]

TYPES = {torch.float32: "float", torch.float64: "double"}
FUNCTIONS = ("exp", "log1p", "softplus", "logsigmoid", "abs", "relu", "sigmoid", "tanh")
#: The hand-written structs by the cells' names.
STRUCTS = {
    name: struct
    for struct, name in re.findall(r'X\((\w+), "(\w+)"\)', (CSRC / "cells/all.h").read_text())
}
VALUES = 4096  # a multiple of every lane count, and a power of two, as Triton's tiles are

#: Loops over the values of arrays [array, VALUES], a lane type at a time.
HARNESS = """
template <class T>
#if defined(RNNKIT_SCALAR)
using Lane = T;
#else
using Lane = Vector<T>;
#endif
template <class V>
__attribute__((noinline)) void read(V* to, const Element<V>* from, int arrays, long at) {
  for (int k = 0; k < arrays; ++k) std::memcpy(to + k, from + k * VALUES + at, sizeof(V));
}
template <class V>
__attribute__((noinline)) void write(Element<V>* to, const V* from, int arrays, long at) {
  for (int k = 0; k < arrays; ++k) std::memcpy(to + k * VALUES + at, from + k, sizeof(V));
}
template <class Cell, int kParameters, class T>
void forward(const T* x_, const T* h_, const T* p_, T* state_, T* save_, T* output_) {
  using V = Lane<T>;
  for (long at = 0; at < VALUES; at += sizeof(V) / sizeof(T)) {
    V x[9], h[9], p[9], state[9], save[9] = {};
    read(x, x_, 4, at), read(h, h_, 4, at), read(p, p_, 4, at), read(state, state_, 8, at);
    V output;
    if constexpr (kParameters > 0)
      Cell::forward(x, h, state, save, p), output = Cell::output(save, p);
    else
      Cell::forward(x, h, state, save), output = Cell::output(save);
    write(state_, state, 8, at), write(save_, save, Cell::saved, at), write(output_, &output, 1, at);
  }
}
template <class Cell, int kParameters, class T>
void backward(const T* save_, const T* h_, const T* p_, T* grad_state_, T* grad_, T* whole_) {
  using V = Lane<T>;
  for (long at = 0; at < VALUES; at += sizeof(V) / sizeof(T)) {
    V save[9], h[2], p[9], grad_state[9], whole[9], grad[9] = {};
    read(save, save_, Cell::saved, at), read(h, h_, 2, at), read(p, p_, 4, at);
    read(grad_state, grad_state_, 8, at), read(whole, grad_state_, 8, at);
    if constexpr (kParameters > 0) {
      if constexpr (Cell::states > 1) Cell::grad_states(save, whole, p);
      Cell::backward(save, h[0], h[1], grad_state, grad, p);
    } else {
      if constexpr (Cell::states > 1) Cell::grad_states(save, whole);
      Cell::backward(save, h[0], h[1], grad_state, grad);
    }
    write(grad_state_, grad_state, 8, at), write(whole_, whole, 8, at);
    write(grad_, grad, Cell::grads + kParameters, at);
  }
}
"""

CELL = """
extern "C" void {name}_forward_{T}(const {T}* x, const {T}* h, const {T}* p, {T}* state, {T}* save, {T}* output) {{
  forward<{struct}, {parameters}>(x, h, p, state, save, output);
}}
extern "C" void {name}_backward_{T}(const {T}* save, const {T}* h, const {T}* p, {T}* state, {T}* grad, {T}* whole) {{
  backward<{struct}, {parameters}>(save, h, p, state, grad, whole);
}}
"""

HAND = """
extern "C" void {name}_numbers(int* to) {{
  for (int number : {{{struct}::gates, {struct}::states, {struct}::units, {struct}::saved, {struct}::grads,
                     int({struct}::uses_h), int({struct}::uses_previous_h)}}) *to++ = number;
  for (int column : {struct}::input_grad) *to++ = column;
}}
"""

FUNCTION = """
extern "C" void function_{name}_{T}(const {T}* from, {T}* to, long count) {{
  for (long at = 0; at < count; at += sizeof(Lane<{T}>) / sizeof({T})) {{
    Lane<{T}> x;
    std::memcpy(&x, from + at, sizeof x);
    x = rnnkit::RNNKIT_CAPABILITY::{name}(x);
    std::memcpy(to + at, &x, sizeof x);
  }}
}}
"""

OF_TWO = """
extern "C" void function_{name}_{T}(const {T}* a, const {T}* b, {T}* to) {{
  for (long at = 0; at < VALUES; at += sizeof(Lane<{T}>) / sizeof({T})) {{
    Lane<{T}> x[2];
    read(x, a, 1, at), read(x + 1, b, 1, at);
    x[0] = {name}(x[0], x[1]);
    write(to, x, 1, at);
  }}
}}
"""


def projects(name: str) -> bool:
    return name == "peephole_lstm" or (name in specs.CELLS and specs.CELLS[name].projects)


def derived_of(name: str) -> Derived:
    return derive(CELLS[name].graph(), projects(name))


def source() -> str:
    """A file with the hand-written cells, all printed cells, and the lane functions."""
    parts = ["#include <cstring>\n#include <initializer_list>\n", '#include "cells/all.h"\n']
    parts += ["namespace rnnkit::RNNKIT_CAPABILITY {\n", HARNESS, "namespace printed {\n"]
    parts += [cpp.struct(derived_of(name), name) for name in CELLS]
    parts.append("}  // namespace printed\n")
    for type in TYPES.values():
        for name in CELLS:
            count = len(CELLS[name].parameters.split())
            parts.append(
                CELL.format(name=name, T=type, struct=f"printed::{name}", parameters=count)
            )
        for name, struct in STRUCTS.items():
            parts.append(CELL.format(name=f"hand_{name}", T=type, struct=struct, parameters=0))
        parts += [FUNCTION.format(name=name, T=type) for name in FUNCTIONS]
        parts += [OF_TWO.format(name=name, T=type) for name in ("maximum", "minimum")]
    for name, struct in STRUCTS.items():
        parts.append(HAND.format(name=f"hand_{name}", struct=struct))
        parts.append(HAND.format(name=name, struct=f"printed::{name}"))
    return "".join([*parts, "}  // namespace rnnkit\n"])


@functools.cache
def library(folder: Path, lanes: str) -> ctypes.CDLL:
    text, target = folder / "cells.cpp", folder / f"{lanes}.so"
    text.write_text(source())
    command = ["g++", *FLAGS, *LANES[lanes], f"-DVALUES={VALUES}L", "-DRNNKIT_CAPABILITY=lanes"]
    subprocess.run([*command, f"-I{CSRC}", str(text), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("printed")


@pytest.fixture(params=LANES)
def compiled(request: pytest.FixtureRequest, folder: Path) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return library(folder, request.param)


each_cell = pytest.mark.parametrize("name", CELLS)
each_builtin = pytest.mark.parametrize("name", BUILTIN)
each_dtype = pytest.mark.parametrize("dtype", TYPES, ids=str)


def call(lib: ctypes.CDLL, name: str, *arrays: Tensor) -> None:
    assert all(array.is_contiguous() for array in arrays)
    getattr(lib, name)(*(ctypes.c_void_p(array.data_ptr()) for array in arrays))


def rows(tensors: Sequence[Tensor], count: int, dtype: torch.dtype) -> Tensor:
    """[count, VALUES], of which the first rows are the tensors."""
    array = torch.zeros(count, VALUES, dtype=dtype)
    for row, tensor in zip(array, tensors, strict=False):
        row.copy_(tensor)
    return array


def forward(lib: ctypes.CDLL, name: str, leaves: Leaves) -> tuple[Tensor, Tensor, Tensor]:
    """The results of the step [8, VALUES], what it saves, and the output made again of it."""
    dtype = leaves[0][0].dtype
    x, h, state, p = (rows(of_kind, 8, dtype) for of_kind in leaves)
    save, output = (torch.zeros(8, VALUES, dtype=dtype) for _ in range(2))
    call(lib, f"{name}_forward_{TYPES[dtype]}", x, h, p, state, save, output)
    return state, save, output[0]


def backward(
    lib: ctypes.CDLL, name: str, save: Tensor, h: Tensor, grads: Tensor, parameters: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the states before the step, of the gates, and whole gradients of the states after it."""
    state, p = grads.clone(), rows(parameters, 8, grads.dtype)
    grad, whole = torch.zeros_like(state), torch.zeros_like(state)
    call(lib, f"{name}_backward_{TYPES[grads.dtype]}", save, h, p, state, grad, whole)
    return state, grad, whole


def values(name: str, dtype: torch.dtype, special: bool = False) -> Leaves:
    """Leaves [VALUES]: random ones of several sizes, and special numbers in every place."""
    generator = torch.Generator().manual_seed(1)
    cell = CELLS[name]
    leaves = []
    for names in (cell.inputs, cell.recurrent, cell.states, cell.parameters):
        of_kind = []
        for _ in names.split():
            leaf = torch.randn(VALUES, generator=generator, dtype=dtype)
            leaf *= torch.tensor([0.01, 1.0, 3.0, 40.0], dtype=dtype)[
                torch.randint(4, (VALUES,), generator=generator)
            ]
            if special:
                info = torch.finfo(dtype)
                numbers = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.0, -1.0, 20.0]
                numbers += [info.max, -info.max, info.tiny, -info.tiny, info.tiny / 8, info.eps]
                places = torch.randint(3 * len(numbers), (VALUES,), generator=generator)
                extended = torch.tensor(numbers, dtype=dtype)[places % len(numbers)]
                leaf = torch.where(places < len(numbers), extended, leaf)
            of_kind.append(leaf)
        leaves.append(of_kind)
    return leaves


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    """Equal bits, where any NaN is as good as another."""
    bits = torch.int32 if a.dtype == torch.float32 else torch.int64
    same = (a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())
    assert same.all(), f"{(~same).sum()} of {same.numel()} differ"


@each_builtin
@each_dtype
@pytest.mark.parametrize("special", [False, True])
def test_printed_structs_are_the_hand_written(
    compiled: ctypes.CDLL, name: str, dtype: torch.dtype, special: bool
) -> None:
    leaves = values(name, dtype, special)
    printed, hand = (forward(compiled, n, leaves) for n in (name, f"hand_{name}"))
    for a, b in zip(printed, hand, strict=True):
        assert_same_bits(a, b)
    state, save, _ = printed
    h = torch.stack([state[0], leaves[2][0]])
    grads = rows([leaf * 0.5 for leaf in leaves[0] + leaves[1]], 8, dtype)
    grads[len(leaves[2]) :] = 0
    printed, hand = (backward(compiled, n, save, h, grads, []) for n in (name, f"hand_{name}"))
    for a, b in zip(printed, hand, strict=True):
        assert_same_bits(a, b)


@each_builtin
def test_numbers_of_printed_structs_are_the_hand_written(compiled: ctypes.CDLL, name: str) -> None:
    printed, hand = (torch.full((11,), -1, dtype=torch.int32) for _ in range(2))
    call(compiled, f"{name}_numbers", printed)
    call(compiled, f"hand_{name}_numbers", hand)
    assert printed.equal(hand)


@each_cell
@each_dtype
def test_printed_structs_compute_the_graph(
    compiled: ctypes.CDLL, name: str, dtype: torch.dtype
) -> None:
    """Against the graph in float64, which test_graph.py holds to autograd."""
    leaves = [[leaf.clamp(-2, 2) for leaf in of_kind] for of_kind in values(name, dtype)]
    leaves[2] = [state.abs() + 0.5 for state in leaves[2]]
    derived, count = derived_of(name), len(CELLS[name].states.split())
    close = (
        {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-12}
    )
    state, save, output = forward(compiled, name, leaves)
    exact = [[leaf.double() for leaf in of_kind] for of_kind in leaves]
    results = run(derived.graph, *exact)
    for a, e in zip(state, results, strict=False):
        torch.testing.assert_close(a.double(), e, **close)
    if derived.projects:
        torch.testing.assert_close(output.double(), results[0], **close)
    generator = torch.Generator().manual_seed(2)
    grads = torch.randn(8, VALUES, generator=generator, dtype=torch.float64)
    previous = exact[2][0]
    h = torch.stack([state[0], leaves[2][0]])
    of_states, columns, whole = backward(compiled, name, save, h, grads.to(dtype), leaves[3])
    grads = grads.to(dtype).double()
    of_saved = saved(derived, exact)
    expected = run_backward(derived, of_saved, results[0], previous, list(grads), exact[3])
    for a, e in zip([*of_states[:count], *columns], [*expected[0], *expected[1]], strict=False):
        torch.testing.assert_close(a.double(), e, **close)
    if count > 1:
        known = dict(zip(derived.saved, of_saved, strict=True))
        of_leaves = {"grad": list(grads), "parameter": exact[3]}
        exact_whole = evaluate(derived.nodes, derived.grad_states, of_leaves, previous, known)
        for a, e in zip(whole, exact_whole, strict=False):
            torch.testing.assert_close(a.double(), e, **close)


#: The largest error of the lane functions, in units in the last place.
MOST_UNITS = {"exp": 1.0, "log1p": 0.9, "softplus": 1.7, "logsigmoid": 1.7}


@pytest.mark.parametrize("function", MOST_UNITS)
@each_dtype
def test_lane_functions(compiled: ctypes.CDLL, function: str, dtype: torch.dtype) -> None:
    np = pytest.importorskip("numpy")
    if np.finfo(np.longdouble).eps > 1e-18:
        pytest.skip("needs arithmetic longer than double")
    exact: dict[str, Callable[[Any], Any]] = {
        "exp": np.exp,
        "log1p": np.log1p,
        "softplus": lambda x: np.where(x > 20, x, np.log1p(np.exp(np.minimum(x, 21)))),
        "logsigmoid": lambda x: np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x))),
    }
    x = arguments(dtype)
    y = torch.empty_like(x)
    compute = getattr(compiled, f"function_{function}_{TYPES[dtype]}")
    compute(*(ctypes.c_void_p(t.data_ptr()) for t in (x, y)), ctypes.c_long(len(x)))
    with np.errstate(all="ignore"):
        wanted = exact[function](x.numpy().astype(np.longdouble))
        rounded = wanted.astype(y.numpy().dtype)
        unit = np.maximum(np.spacing(np.abs(rounded)), np.finfo(rounded.dtype).smallest_subnormal)
        error = np.abs(y.numpy().astype(np.longdouble) - wanted) / unit
    same = (y.numpy() == rounded) | (np.isnan(y.numpy()) & np.isnan(rounded))
    assert not (~np.isfinite(error) & ~same).any()
    assert np.where(same, 0, error).max() < MOST_UNITS[function]


def arguments(dtype: torch.dtype) -> Tensor:
    """Numbers of every size, the ends of what functions distinguish, and special ones."""
    generator = torch.Generator().manual_seed(3)
    info = torch.finfo(dtype)
    count, most = 1 << 16, torch.tensor(info.max, dtype=torch.float64).log()

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64) * (high - low) + low

    signs = torch.randint(2, (count,), generator=generator) * 2 - 1
    sizes = (uniform(-1, 1) * most).exp() * signs
    parts = [
        uniform(-1, 1),
        uniform(-25, 25),
        uniform(-1.1, 1.1) * most,
        sizes,
        uniform(-37, 0).exp() - 1,
    ]
    special = [
        0.0,
        -0.0,
        torch.inf,
        -torch.inf,
        torch.nan,
        -1.0,
        -1.5,
        info.max,
        -info.max,
        info.tiny,
    ]
    special += [-info.tiny, info.tiny / 4, -info.tiny / 4, info.tiny * info.eps, 20.0, 20.00001]
    special += [float(most), float(-most), 88.7, 88.8, -103.9, -104.1, 709.7, 709.8, -745.1, -745.2]
    numbers = torch.cat([*parts, torch.tensor(special, dtype=torch.float64)]).to(dtype)
    return torch.nn.functional.pad(numbers, (0, -len(numbers) % 64))


@each_dtype
def test_abs_maximum_and_zeros_of_lane_functions(compiled: ctypes.CDLL, dtype: torch.dtype) -> None:
    x = arguments(dtype)
    for name, keeps in {"abs": False, "log1p": True}.items():
        y = torch.empty_like(x)
        compute = getattr(compiled, f"function_{name}_{TYPES[dtype]}")
        compute(*(ctypes.c_void_p(t.data_ptr()) for t in (x, y)), ctypes.c_long(len(x)))
        zeros = x == 0
        assert (
            y[zeros]
            .signbit()
            .equal(x[zeros].signbit() if keeps else torch.zeros_like(zeros[zeros]))
        )
        if name == "abs":
            assert_same_bits(y, x.abs())


@each_dtype
def test_maximum_and_minimum_of_lanes(compiled: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Also of special numbers: NaN where either is."""
    (a, b), *_ = values("every_operation", dtype, special=True)
    for name in ("maximum", "minimum"):
        result = torch.empty_like(a)
        call(compiled, f"function_{name}_{TYPES[dtype]}", a, b, result)
        expected = OPERATIONS[name].on_tensors(a, b)
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


interpreted = pytest.mark.skipif(
    bool(interpreter.why_not()), reason=interpreter.why_not() or "it can run"
)


def imported(text: str, path: Path) -> Any:
    """The module of this text."""
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


#: A kernel for each function of a cell: it loads tuples of arrays and stores tuples of results.
KERNELS = """
import triton
from triton import language as tl


@triton.jit
def load(arrays, COUNT: tl.constexpr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tiles = ()
    for k in tl.static_range(COUNT):
        tiles = tiles + (tl.load(arrays + k * SIZE + place),)
    return tiles


@triton.jit
def store(arrays, tiles, SIZE: tl.constexpr):
    for k in tl.static_range(len(tiles)):
        tl.store(arrays + k * SIZE + tl.arange(0, SIZE), tiles[k])


@triton.jit
def apply(a, b, result, F: tl.constexpr, OPERANDS: tl.constexpr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    if OPERANDS == 1:
        tl.store(result + place, F(tl.load(a + place)))
    else:
        tl.store(result + place, F(tl.load(a + place), tl.load(b + place)))


@triton.jit
def forward(x, h, state, p, new, save, output, F: tl.constexpr, O: tl.constexpr, X: tl.constexpr, H: tl.constexpr,
            S: tl.constexpr, P: tl.constexpr, SIZE: tl.constexpr):
    arguments = load(x, X, SIZE), load(h, H, SIZE), load(state, S, SIZE)
    if P > 0:
        results, kept = F(arguments[0], arguments[1], arguments[2], load(p, P, SIZE))
    else:
        results, kept = F(arguments[0], arguments[1], arguments[2])
    store(new, results, SIZE)
    store(save, kept, SIZE)
    if O is not None:
        if P > 0:
            store(output, (O(kept, load(p, P, SIZE)),), SIZE)
        else:
            store(output, (O(kept),), SIZE)


@triton.jit
def backward(save, h, p, grads, state, columns, whole, F: tl.constexpr, W: tl.constexpr, K: tl.constexpr,
             S: tl.constexpr, P: tl.constexpr, SIZE: tl.constexpr):
    of_h = load(h, 2, SIZE)
    kept, given = load(save, K, SIZE), load(grads, S, SIZE)
    if P > 0:
        of_states, of_gates = F(kept, of_h[0], of_h[1], given, load(p, P, SIZE))
    else:
        of_states, of_gates = F(kept, of_h[0], of_h[1], given)
    store(state, of_states, SIZE)
    store(columns, of_gates, SIZE)
    if W is not None:
        if P > 0:
            store(whole, W(kept, given, load(p, P, SIZE)), SIZE)
        else:
            store(whole, W(kept, given), SIZE)
"""


@pytest.fixture(scope="module")
def kernels(folder: Path) -> Any:
    return imported(KERNELS, folder / "graph_kernels.py")


@pytest.fixture
def module(folder: Path) -> Iterator[Callable[[str], Any]]:
    names = []

    def of(name: str) -> Any:
        names.append(f"printed_{name}")
        return imported(printer.source(derived_of(name), name), folder / f"printed_{name}.py")

    yield of
    for name in names:
        del sys.modules[name]


def in_triton(
    kernels: Any, functions: Sequence[Any], derived: Derived, leaves: Leaves
) -> tuple[Tensor, ...]:
    """Everything that a cell's functions return: forward, output, backward, grad_states."""
    step, output, back, whole = functions
    dtype, graph = leaves[0][0].dtype, derived.graph
    x, h, state, p = (rows(of_kind, 8, dtype) for of_kind in leaves)
    results = [torch.zeros(8, VALUES, dtype=dtype) for _ in range(6)]
    new = results[0]
    counts = [len(of) for of in (graph.inputs, graph.recurrent, graph.states, graph.parameters)]
    arrays = [a.flatten() for a in (x, h, state, p)]
    flat = [a.view(-1) for a in results]
    kernels.forward[(1,)](*arrays, *flat[:3], step, output, *counts, SIZE=VALUES)
    of_h = torch.stack([new[0], leaves[2][0]]).flatten()
    grads = rows([leaf * 0.5 for leaf in (leaves[0] + leaves[1]) * 4], 8, dtype).flatten()
    count = len(graph.results)
    kernels.backward[(1,)](
        *(flat[1], of_h, arrays[3], grads, *flat[3:]),
        *(back, whole, len(derived.saved), count, counts[3]),
        SIZE=VALUES,
    )
    return (*results, grads.view(8, VALUES))


def of_module(module: Any, name: str) -> list[Any]:
    return [
        getattr(module, f"{name}_{part}", None)
        for part in ("forward", "output", "backward", "grad_states")
    ]


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of special numbers
@each_dtype
@pytest.mark.parametrize(
    "function", ["log1p", "softplus", "logsigmoid", "relu", "maximum", "minimum"]
)
def test_functions_of_tiles(kernels: Any, function: str, dtype: torch.dtype) -> None:
    """Beside torch's, in float64: a few roundings, also next to 0 and of special numbers."""
    a = arguments(dtype)
    a = torch.nn.functional.pad(a, (0, (1 << len(a).bit_length()) - len(a)))
    b, result = a.roll(1), torch.empty_like(a)
    operation = OPERATIONS[function]
    operands = [a, b][: len(operation.takes)]
    of_tiles = getattr(importlib.import_module("rnnkit.triton.functions"), function)
    kernels.apply[(1,)](a, b, result, of_tiles, len(operands), SIZE=len(a))
    exact = operation.on_tensors(*(operand.double() for operand in operands)).to(dtype)
    info = torch.finfo(dtype)
    torch.testing.assert_close(result, exact, rtol=8 * info.eps, atol=info.tiny, equal_nan=True)


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of special numbers
@each_builtin
@each_dtype
@pytest.mark.parametrize("special", [False, True])
def test_printed_triton_is_the_hand_written(
    kernels: Any, module: Callable[[str], Any], name: str, dtype: torch.dtype, special: bool
) -> None:
    hand = importlib.import_module("rnnkit.triton.cells").TRITON_CELLS[name]
    leaves, derived = values(name, dtype, special), derived_of(name)
    functions = [hand.forward, hand.output, hand.backward, hand.grad_states]
    expected = in_triton(kernels, functions, derived, leaves)
    for a, b in zip(
        in_triton(kernels, of_module(module(name), name), derived, leaves), expected, strict=True
    ):
        assert_same_bits(a, b)


@interpreted
@each_cell
@each_dtype
def test_printed_triton_computes_the_graph(
    kernels: Any, module: Callable[[str], Any], name: str, dtype: torch.dtype
) -> None:
    leaves = [[leaf.clamp(-2, 2) for leaf in of_kind] for of_kind in values(name, dtype)]
    leaves[2] = [state.abs() + 0.5 for state in leaves[2]]
    derived = derived_of(name)
    new, save, made, of_states, columns, whole, grads = in_triton(
        kernels, of_module(module(name), name), derived, leaves
    )
    close = (
        {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-12}
    )
    exact = [[leaf.double() for leaf in of_kind] for of_kind in leaves]
    results, grads = run(derived.graph, *exact), list(grads.double())
    of_saved = saved(derived, exact)
    of_leaves = {"grad": grads, "parameter": exact[3]}
    expected = run_backward(derived, of_saved, results[0], exact[2][0], grads, exact[3])
    known = dict(zip(derived.saved, of_saved, strict=True))
    pairs = [(new, results), (save, of_saved), (of_states, expected[0]), (columns, expected[1])]
    if len(derived.graph.states) > 1:
        exact_whole = evaluate(derived.nodes, derived.grad_states, of_leaves, exact[2][0], known)
        pairs.append((whole, exact_whole))
    if derived.projects:
        pairs.append((made, results[:1]))
    for actual, wanted in pairs:
        for a, e in zip(actual, wanted, strict=False):
            torch.testing.assert_close(a.double(), e, **close)


def test_text_is_the_same_each_time() -> None:
    for name in CELLS:
        texts = {
            (cpp.struct(d, name), printer.source(d, name)) for d in map(derived_of, [name] * 3)
        }
        assert len(texts) == 1
