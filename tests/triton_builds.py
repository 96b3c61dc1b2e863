"""Compiles the Triton kernels without a GPU, as they would be launched, and prints what became of them.

A program of its own, since Triton's interpreter, which tests run on where there is no GPU, takes the compiler's place
in its process: `python triton_builds.py cuda 90` prints a line of JSON for each kernel; `cuda 90 4` for every fourth.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from graph_cells import CELLS as GRAPH_CELLS
from kernel_cases import Case, call
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rnnkit import Cell, gpu, library, specs
from rnnkit.call import Keep
from rnnkit.specs import CELLS
from rnnkit.triton import kernels, scan

TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.bool: "*i1",
}

#: Hidden sizes, batches, dtypes and whether float32 is multiplied as TF32: in whole vectors and odd, of one program
#: and of several.
SIZES = (
    (40, 3, torch.float32, False),
    (256, 16, torch.bfloat16, True),
    (100, 5, torch.float16, True),
    (512, 64, torch.float32, False),
    (650, 40, torch.bfloat16, True),
    (512, 256, torch.float16, True),
    (33, 5, torch.float64, True),
    (512, 64, torch.float64, True),
    (128, 16, torch.float32, True),
    (650, 64, torch.float32, True),
)

#: The integers that a kernel may be compiled for: another value of the others compiles nothing.
OF_THE_MODEL = ("hidden", "projected")


#: Cells that are printed, by their names here: of the library, and with what few cells have.
#: Of the library those that Triton has kernels for.
PRINTED = {
    cell.name: cell.op_name
    for cell in vars(library).values()
    if isinstance(cell, Cell) and not cell.graph.late
}
PRINTED |= {
    name: GRAPH_CELLS[name].graph().to_json()
    for name in ("odd_states", "choice", "infinite_constants", "every_operation")
}

#: What printed cells are compiled with, in turn.
VARIANTS: tuple[dict, ...] = (
    {},
    {"heads": 3, "multiplies": False},
    {"lengths": (2, 2, 1), "resets": 0.3, "operand_mask": True, "zoneout": (0.3, 0.2)},
    {"expects": True, "zoneout": (0.3, 0.2), "grad_clip": 0.1, "grad_cut": 2, "states": False},
)


@dataclass(frozen=True)
class Build:
    """A kernel as compiled.

    Attributes:
        cell: the name of its cell.
        case: the call it is launched by.
        kernel: `forward`, `backward` or `unprojected`.
        plan: a name in `plan.TRITON_KERNELS`.
        registers: of a thread.
        spilled, shared: bytes, of a thread and of a program.
        products: instructions for the matrix units.
        barriers: between the last of a step's stores and the next step.
    """

    cell: str
    case: str
    kernel: str
    plan: str
    registers: int
    spilled: int
    shared: int
    products: int
    barriers: int


class Recorder:
    """In the place of a kernel: compiles what it would launch."""

    def __init__(self, kernel: Any, target: GPUTarget, done: Callable[[Any, dict], None]) -> None:
        self.kernel, self.target, self.done = kernel, target, done

    def __getitem__(self, grid: Callable) -> Callable:
        return self.launch

    def launch(self, *arguments: Any, **given: Any) -> None:
        names = self.kernel.arg_names
        bound = dict(zip(names, arguments, strict=False))
        for parameter in self.kernel.params:
            if isinstance(bound.get(parameter.name), int) and parameter.name not in OF_THE_MODEL:
                assert parameter.do_not_specialize, f"{parameter.name} may cause a compilation"
        constants = {name: given.pop(name) for name in names[len(arguments) :]}
        signature: dict[str, Any] = dict.fromkeys(constants, "constexpr")
        values = {(names.index(name),): value for name, value in constants.items()}
        divisible = []

        def signed(value: Any, place: tuple[int, ...]) -> Any:
            """The type of an argument, or of an entry of a tuple, and what the compiler is told of it beside."""
            if isinstance(value, tuple):
                return tuple(signed(entry, (*place, at)) for at, entry in enumerate(value))
            if value is None:
                values[place] = None
                return "constexpr"
            if isinstance(value, torch.Tensor):
                divisible.extend([place] * (value.data_ptr() % 16 == 0))
                return TYPES[value.dtype]
            divisible.extend([place] * (value % 16 == 0 and names[place[0]] not in kernels.SIZES))
            return "i32"

        for name, value in bound.items():
            signature[name] = signed(value, (names.index(name),))
        source = ASTSource(
            self.kernel,
            {name: signature[name] for name in names},
            values,
            {place: [["tt.divisibility", 16]] for place in divisible},
        )
        self.done(triton.compile(source, target=self.target, options=given), given)


def barriers(ttgir: str) -> int:
    """How many barriers of a program's threads stand at the end of the loop over steps, behind its last store."""
    ends = [part for part in ttgir.split("scf.yield")[:-1] if "tt.store" in part]
    behind = ends[0].rsplit("tt.store", 1)[1] if ends else ""
    return len(re.findall(r"\b(?:gpu|ttg)\.(?:local_)?barrier\b", behind))


def resources(built: Any) -> tuple[int, int]:
    """Registers and bytes spilled."""
    if "cubin" not in built.asm:
        text = built.asm["amdgcn"]
        spilled = int(re.search(r"\.private_segment_fixed_size: (\d+)", text)[1])
        return int(re.search(r"\.vgpr_count: *(\d+)", text)[1]), spilled
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [tools / "cuobjdump", "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", told))
    return int(used["REG"]), int(used["STACK"]) + int(used["LOCAL"])


def builds(case: Case, target: GPUTarget) -> Iterator[Build]:
    """Every kernel that a call's forward and backward pass launch."""
    found: dict[str, Build] = {}
    cell = next((name for name, printed in PRINTED.items() if printed == case.cell), case.cell)

    def recorder(name: str) -> Recorder:
        def done(built: Any, options: dict) -> None:
            registers, spilled = resources(built)
            text = built.asm.get("ptx") or built.asm["amdgcn"]
            found[name] = Build(
                cell,
                str(replace(case, cell=cell)),
                name,
                scan.choose(case.scan(name == "backward")).kernel,
                registers,
                spilled,
                built.metadata.shared,
                len(re.findall(r"\b(mma\.sync|wgmma|tcgen05\.mma|v_mfma|v_wmma)", text)),
                barriers(built.asm["ttgir"]),
            )

        return Recorder(getattr(kernels, name), target, done)

    arguments = call(case)
    with (
        mock.patch.object(gpu, "scans", lambda _: scan),
        mock.patch.object(kernels, "forward", recorder("forward")),
        mock.patch.object(kernels, "backward", recorder("backward")),
        mock.patch.object(kernels, "unprojected", recorder("unprojected")),
    ):
        (output, *_), _, reserve = gpu.layer_forward(arguments, None, Keep.EVERYTHING)
        gpu.layer_backward(arguments.backward_call([output], reserve))
    yield from found.values()


def cases() -> Iterator[tuple[Case, bool]]:
    """Every cell and dtype with either plan, dense and ragged, projected, with all states, and without this and that.

    Also with noise, with resets and, where one program has all units, with layer normalization. With each whether
    float32 is multiplied as TF32.
    """
    for cell in CELLS:
        for at, (hidden, batch, dtype, tf32) in enumerate(SIZES):
            case = Case(cell, (2, batch, 4, hidden), 1 + at % 2, dtype=dtype)
            if at % 2:
                case = replace(case, lengths=tuple(2 if n < 2 else 1 for n in range(batch)))
            yield replace(case, states=at % 3 != 0, bias=at % 3 != 1), tf32
            normalized = replace(case, states=at % 3 == 0, norm=True)
            if not scan.why_not(normalized.scan(backward=False)):
                yield normalized, tf32
        if CELLS[cell].projects:
            yield Case(cell, (2, 3, 4, 100), projected=33), True
            noise = {"operand_mask": True, "zoneout": (0.0, 0.2)}
            yield Case(cell, (2, 3, 4, 100), projected=33, **noise), True
            yield Case(cell, (2, 3, 4, 100), projected=33, norm=True), True
        noise = {"operand_mask": True, "zoneout": (0.3, 0.2)}
        resets = {"resets": 0.3, "reset_states": True, "lengths": (2, 2, 1)}
        yield Case(cell, (2, 3, 4, 40), 2, **resets, **noise), False
        wide = {"sizes": (2, 40, 4, 650), "bias": False, "dtype": torch.bfloat16}
        yield Case(cell, expects=True, **wide, **noise), True
        if CELLS[cell].states > 1:
            all_states = Case(cell, (2, 3, 4, 40), 2, all_states=True)
            yield all_states, False
            yield replace(all_states, directions=1, **wide), True


def cases_of_printed() -> Iterator[tuple[Case, bool]]:
    """Every printed cell at two sizes, each with one of the variants; projected where it can be."""
    for at, cell in enumerate(PRINTED.values()):
        for k in range(2):
            hidden, batch, dtype, tf32 = SIZES[(3 * at + 5 * k) % len(SIZES)]
            variant = VARIANTS[(at + 2 * k) % len(VARIANTS)]
            case = Case(cell, (2, batch, 4, hidden), 1 + at % 2, dtype=dtype, **variant)
            spec = specs.of(cell)
            yield replace(case, all_states=k == 1 and spec.states > 1), tf32
        if spec.projects:
            yield Case(cell, (2, 3, 4, 100), projected=33), True


def main(backend: str, architecture: str, every: str = "1") -> None:
    scan.TARGET = backend
    arch = int(architecture) if backend == "cuda" else architecture
    target = GPUTarget(backend, arch, 32 if backend == "cuda" else 64)
    for case, tf32 in [*cases(), *cases_of_printed()][:: int(every)]:
        torch.backends.cudnn.allow_tf32 = tf32
        for build in builds(case, target):
            print(json.dumps(asdict(build)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
