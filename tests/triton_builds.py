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
from kernel_cases import Case, call
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rnnkit import gpu
from rnnkit.ops import Keep
from rnnkit.reference import CELLS
from rnnkit.triton import kernels, scan

TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
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


@dataclass(frozen=True)
class Build:
    """A kernel as compiled.

    Attributes:
        case: the call it is launched by.
        kernel: `forward`, `backward` or `unprojected`.
        plan: a name in `plan.TRITON_KERNELS`.
        registers: of a thread.
        spilled, shared: bytes, of a thread and of a program.
        products: instructions for the matrix units.
        barriers: between the last of a step's stores and the next step.
    """

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


class ScanOfAllStates:
    """`scan` that is asked for the states at all steps, too."""

    def forward(self, call: gpu.Call, *arguments: Any) -> None:
        self.states = [
            call.input.new_empty(call.rows, call.directions * call.hidden)
            for _ in range(call.spec.states - 1)
        ]
        scan.forward(call, *arguments, all_states=self.states)

    def backward(self, *arguments: Any) -> torch.Tensor | None:
        return scan.backward(*arguments, grad_all_states=self.states)


def builds(case: Case, target: GPUTarget, all_states: bool = False) -> Iterator[Build]:
    """Every kernel that a call's forward and backward pass launch."""
    found: dict[str, Build] = {}

    def recorder(name: str) -> Recorder:
        def done(built: Any, options: dict) -> None:
            registers, spilled = resources(built)
            text = built.asm.get("ptx") or built.asm["amdgcn"]
            found[name] = Build(
                str(case) + "-allstates" * all_states,
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
    given = (arguments.input, arguments.states, arguments.weights, arguments.batch_sizes)
    scans = ScanOfAllStates() if all_states else scan
    with (
        mock.patch.object(gpu, "scans", lambda _: scans),
        mock.patch.object(kernels, "forward", recorder("forward")),
        mock.patch.object(kernels, "backward", recorder("backward")),
        mock.patch.object(kernels, "unprojected", recorder("unprojected")),
    ):
        output, _, reserve = gpu.layer_forward(case.cell, *given, Keep.EVERYTHING)
        gpu.layer_backward(case.cell, arguments.grads, *given, output, reserve, arguments.all_needs)
        if case.projected:
            scan.unprojected(gpu.Call(case.cell, *given), reserve)
    yield from found.values()


def cases() -> Iterator[tuple[Case, bool, bool]]:
    """Every cell and dtype with either plan, dense and ragged, projected, and without this and that.

    With each whether float32 is multiplied as TF32, and whether the states at all steps are asked for.
    """
    for cell in CELLS:
        for at, (hidden, batch, dtype, tf32) in enumerate(SIZES):
            case = Case(cell, (2, batch, 4, hidden), 1 + at % 2, dtype=dtype)
            if at % 2:
                case = replace(case, lengths=tuple(2 if n < 2 else 1 for n in range(batch)))
            yield replace(case, states=at % 3 != 0, bias=at % 3 != 1), tf32, False
        if CELLS[cell].states > 1:
            yield Case(cell, (2, 3, 4, 100), projected=33), True, False
            yield Case(cell, (2, 3, 4, 40), 2), False, True
            yield Case(cell, (2, 40, 4, 650), bias=False, dtype=torch.bfloat16), True, True


def main(backend: str, architecture: str, every: str = "1") -> None:
    scan.TARGET = backend
    arch = int(architecture) if backend == "cuda" else architecture
    target = GPUTarget(backend, arch, 32 if backend == "cuda" else 64)
    for case, tf32, all_states in [*cases()][:: int(every)]:
        torch.backends.cudnn.allow_tf32 = tf32
        for build in builds(case, target, all_states):
            print(json.dumps(asdict(build)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
