"""Cells of one's own beside other ways to run them.

Training steps of `rnnkit.Recurrent`, of a loop in Python, of that loop under torch.compile, of JAX's lax.scan, and of
the packages that have an sLSTM.

    python -m benchmarks.own_cells [--output FILE] [--only NAME] [--rounds 7] [--threads 2]

The ways take turns in one process; times are medians. All of them multiply the whole input at once. What is not
installed is left out: jax; xlstm and tirex-ts for the sLSTM. A loop that is not compiled within five minutes is left
out, too.
"""

import argparse
import importlib
import importlib.metadata
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import rnnkit
from benchmarks import results
from benchmarks.figures import Figure
from benchmarks.surroundings import surroundings
from benchmarks.tables import markdown
from rnnkit.graph.builtin import GRAPHS
from rnnkit.graph.trace import order

OWN, BUILT_IN = "rnnkit", "built-in"
LOOP, COMPILED, JAX = "loop", "compiled loop", "jax"
TIME_LIMIT = 300.0  # seconds that torch.compile may take

Run = Callable[[], Any]


#: Cells that are built in, for which `rnnkit.Recurrent` has the same equations as a cell of one's own.
BUILT_INS = {"lstm": rnnkit.LSTM, "gru": rnnkit.GRU}


@dataclass(frozen=True)
class Case:
    """A training step of a cell: of `rnnkit.library`, or one of BUILT_INS. I = H."""

    cell: str
    T: int
    N: int
    H: int
    heads: int = 1

    def __str__(self) -> str:
        heads = f", {self.heads} heads" * (self.heads > 1)
        return f"{self.cell} T{self.T} N{self.N} H{self.H}{heads}"


CASES = (
    *(Case(cell, *size) for cell in BUILT_INS for size in ((100, 32, 128), (100, 16, 512))),
    *(
        Case(cell, *size)
        for cell in ("peephole_lstm", "mgu", "light_gru")
        for size in ((100, 32, 128), (100, 16, 512))
    ),
    *(Case("slstm", 512, batch, 512, 4) for batch in (1, 8)),
)


def layer(case: Case) -> rnnkit.Recurrent:
    """The case's layer."""
    if case.cell in BUILT_INS:
        cell = rnnkit.Cell(case.cell, GRAPHS[case.cell])
    else:
        cell = getattr(rnnkit.library, case.cell)
    torch.manual_seed(0)
    return rnnkit.Recurrent(cell, case.H, case.H, heads=case.heads)


def step(run: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor, wanted: Sequence[Tensor]) -> Run:
    """A training step of what makes the output of x."""
    return lambda: torch.autograd.grad(run(x), [x, *wanted], grad)


def loop(of: rnnkit.Recurrent) -> Callable[..., Tensor]:
    """The layer as its users would write it: one product for the input, then a step after the other."""
    cell, heads = of.cell, of.heads
    gates, recurrent, early = len(cell.gates), len(cell.recurrent), cell.graph.early

    def run(
        x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, *own: Tensor
    ) -> Tensor:
        batch, hidden = x.size(1), of.hidden_size
        products = functional.linear(x, w_ih, b_ih).unflatten(-1, (heads, gates, -1))
        states = [x.new_zeros(batch, hidden) for _ in cell.states]
        w = w_hh.view(heads, recurrent, -1, hidden // heads)  # [heads, R, H/heads, H/heads]
        bias = b_hh.view(heads, recurrent, -1)
        every = [range(early), range(early, recurrent)]
        of_gates = [
            (w[:, g.start : g.stop].flatten(1, 2).transpose(1, 2), bias[:, g.start : g.stop])
            for g in every
        ]

        def parts_of(value: Tensor, which: int) -> list[Tensor]:
            matrix, biases = of_gates[which]
            by_head = value.view(batch, heads, -1).transpose(0, 1)
            product = torch.bmm(by_head, matrix).transpose(0, 1)
            parts = product.unflatten(-1, (len(every[which]), -1)) + biases
            return [gate.flatten(1) for gate in parts.unbind(2)]

        found = []
        for product in products.unbind(0):
            of_x, r = [gate.flatten(1) for gate in product.unbind(2)], parts_of(states[0], 0)
            others: dict[str, Any] = {}
            if cell.spec.operand is not None:
                operand, others["known"] = cell.spec.operand(
                    of_x, r, states, *([own] if own else [])
                )
                r = r + parts_of(operand, 1)
            states = list(cell.spec.step(of_x, r, states, *([own] if own else []), **others))
            found.append(states[0])
        return torch.stack(found)

    return run


def jax_step(of: rnnkit.Recurrent, x: Tensor, grad: Tensor) -> Run:
    """The loop as lax.scan under jit, from the cell's graph; of one head."""
    import jax
    from jax import lax
    from jax import numpy as jnp

    graph = of.cell.graph
    names = {"sub": "subtract", "mul": "multiply", "div": "divide", "neg": "negative"}
    names |= {"lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal"}
    names |= {"eq": "equal", "ne": "not_equal", "logsigmoid": "log_sigmoid"}

    def apply(op: str, *arguments: Any) -> Any:
        name = names.get(op, op)
        place = jnp if hasattr(jnp, name) else jax.nn
        return getattr(place, name)(*arguments)

    def evaluated(leaves: dict[str, Any], roots: Sequence[int]) -> list[Any]:
        values: dict[int, Any] = {}
        for number in order(graph.nodes, roots, values):
            node = graph.nodes[number]
            if node.op == "constant":
                values[number] = float(node.of)
            elif node.args:
                values[number] = apply(node.op, *(values[a] for a in node.args))
            else:
                values[number] = leaves[node.op][int(node.of)]
        return [values[number] for number in roots]

    def run(x: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any, *own: Any) -> Any:
        products = x @ w_ih.T + b_ih
        rows = graph.early * of.hidden_size

        def one(states: Any, product: Any) -> Any:
            leaves = {
                "x": jnp.split(product, len(graph.inputs), -1),
                "r": jnp.split(states[0] @ w_hh[:rows].T + b_hh[:rows], graph.early, -1),
                "state": states,
                "parameter": own,
            }
            if graph.operand is not None:
                (operand,) = evaluated(leaves, [graph.operand])
                leaves["r"] += jnp.split(operand @ w_hh[rows:].T + b_hh[rows:], graph.late, -1)
            new = tuple(evaluated(leaves, graph.results))
            return new, new[0]

        zeros = jnp.zeros((x.shape[1], of.hidden_size), x.dtype)
        return lax.scan(one, (zeros,) * len(graph.states), products)[1]

    @jax.jit
    def training_step(grad: Any, *given: Any) -> Any:
        output, pull = jax.vjp(run, *given)
        return output, pull(grad)

    given = [jnp.asarray(t.detach().numpy()) for t in (grad, x, *of.parameters())]
    return lambda: jax.block_until_ready(training_step(*given))


def packages(case: Case, with_compiled: bool) -> dict[str, Run]:
    """The sLSTM of xlstm and of TiRex, eager and compiled; each over products that are there already."""
    found: dict[str, Run] = {}
    cells: dict[str, Callable[[], Any]] = {}
    with suppress(ImportError):
        xlstm = importlib.import_module("xlstm.blocks.slstm.cell")
        config = xlstm.sLSTMCellConfig(
            hidden_size=case.H, num_heads=case.heads, backend="vanilla", dtype="float32"
        )
        cells["xlstm"] = lambda: xlstm.sLSTMCell(config)
    with suppress(ImportError):
        tirex = importlib.import_module("tirex.models.slstm.cell")
        cells["TiRex"] = lambda: tirex.sLSTMCell(
            tirex.sLSTMBlockConfig(case.H, case.heads), "torch"
        )
    products = torch.randn(case.N, case.T, 4 * case.H, requires_grad=True)
    for name, make in cells.items():
        cell = make()
        for parameter in cell.parameters():
            torch.nn.init.uniform_(parameter, -0.05, 0.05)
        grad = torch.randn(case.N, case.heads, case.T, case.H // case.heads)

        def run(given: Tensor, cell: Any = cell) -> Tensor:
            output: Tensor = cell(given, None)[0]
            return output

        parameters = list(cell.parameters())
        found[name] = step(run, products, grad, parameters)
        if with_compiled and (compiled := compiled_in_time(run, products)) is not None:
            found[f"{name} compiled"] = step(compiled, products, grad, parameters)

        def patched(plain: Run = found[name], package: str = name.lower()) -> Any:
            with rnnkit.patch(package):
                return plain()

        found[f"{name} patched"] = patched
    return found


def compiled_in_time(run: Callable[..., Tensor], *given: Tensor) -> Callable[..., Tensor] | None:
    """The function under torch.compile; None if its first training step takes more than TIME_LIMIT, or fails."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not compiled within {TIME_LIMIT:.0f} s")

    compiled, start = torch.compile(run), time.perf_counter()
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(int(TIME_LIMIT))
    try:
        compiled(*given).sum().backward()
    except Exception as error:  # torch.compile may wrap the one above
        print(f"  torch.compile: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        return None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    print(f"  compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return compiled


def ways(case: Case, with_compiled: bool) -> dict[str, Run]:
    """A training step of each way to run the case."""
    of = layer(case)
    x = torch.randn(case.T, case.N, case.H, requires_grad=True)
    grad = torch.randn(case.T, case.N, case.H)
    weights = list(of.parameters())
    found = {OWN: step(lambda x: of(x)[0], x, grad, weights)}
    if case.cell in BUILT_INS:
        built_in = BUILT_INS[case.cell](case.H, case.H)
        built_in.load_state_dict(of.state_dict())
        theirs = list(built_in.parameters())
        return found | {BUILT_IN: step(lambda x: built_in(x)[0], x, grad, theirs)}
    eager = loop(of)
    torch.testing.assert_close(eager(x, *weights), of(x)[0], rtol=1e-3, atol=1e-4)
    found[LOOP] = step(lambda x: eager(x, *weights), x, grad, weights)
    if with_compiled and (compiled := compiled_in_time(eager, x, *weights)) is not None:
        found[COMPILED] = step(lambda x: compiled(x, *weights), x, grad, weights)
    if case.heads == 1:
        with suppress(ImportError):
            found[JAX] = jax_step(of, x, grad)
    return found | (packages(case, with_compiled) if case.cell == "slstm" else {})


def measured(case: Case, rounds: int, with_compiled: bool) -> dict[str, Any]:
    """Milliseconds of each way, and how often rnnkit's time they take."""
    runs = ways(case, with_compiled)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()  # while threads of the way before still look for work
            start = time.perf_counter()
            run()
            samples[name].append(1e3 * (time.perf_counter() - start))
    return {
        name: {"ms": Figure.of(of).document(), "ratio": Figure.ratio(of, samples[OWN]).document()}
        for name, of in samples.items()
    }


def text(entries: dict[str, Any]) -> str:
    """The times of a case, and the others' over rnnkit's."""
    parts = []
    for name, told in entries.items():
        ratio = Figure.read(told["ratio"]).text("{:.2f}×")
        parts.append(f"{name} {Figure.read(told['ms']).text('{:.3g} ms')} {ratio}".strip())
    return ", ".join(parts)


def section(document: dict[str, Any], link: str) -> list[str]:
    """A results file's table, which is at `link`."""
    versions = ", ".join(f"{name} {version}" for name, version in document["packages"].items())
    about = f"{document['device']['name']}, {document['isa']}, {document['threads']} threads, "
    about += f"torch {document['versions']['torch']}, {versions}, {document['date'][:10]}"
    lines = [["a training step", "ms", "the others' time over it"]]
    for row in document["cases"]:
        entries = row["entries"]
        others = [
            f"{name} {Figure.read(told['ratio']).text('{:.2f}')}"
            for name, told in entries.items()
            if name != OWN
        ]
        own = Figure.read(entries[OWN]["ms"]).text("{:.3g}")
        lines.append([row["case"], own, ", ".join(others)])
    name = link.rsplit("/", 1)[-1]
    title = "### Cells of one's own"
    told = "A loop, compiled or not, multiplies the whole input at once, as `rnnkit.Recurrent` and JAX's scan do; "
    told += "xlstm and TiRex get that product. A patched one is the same cell under `rnnkit.patch`."
    return [title, "", f"{about}, [{name}]({link}). {told}", "", *markdown(lines, left=1)]


def installed() -> dict[str, str]:
    """The versions of the packages that are compared with."""
    found = {}
    for name in ("jax", "xlstm", "tirex-ts"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="a results file to write")
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--without-compiled", action="store_true", help="no torch.compile")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch._dynamo.config.recompile_limit = 64
    document = {"format": results.OWN_CELLS_FORMAT, **surroundings("cpu"), "threads": given.threads}
    document |= {"isa": results.isa_of(document), "packages": installed(), "cases": []}
    for case in CASES:
        if given.only in str(case):
            entries = measured(case, given.rounds, not given.without_compiled)
            document["cases"].append({"case": str(case), "entries": entries})
            print(f"{case!s:36} {text(entries)}", flush=True)
    if given.output:
        results.write(document, given.output)


if __name__ == "__main__":
    main()
