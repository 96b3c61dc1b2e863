"""Compiles the Triton kernels without a GPU, as they would be launched, and prints what became of them.

A program of its own, since Triton's interpreter, which tests run on where there is no GPU, takes the compiler's place
in its process: `python triton_builds.py cuda 90` prints a line of JSON for each kernel.
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

#: Hidden sizes, batches and dtypes: in whole vectors and odd, of one program and of several.
SIZES = (
    (40, 3, torch.float32),
    (256, 16, torch.bfloat16),
    (100, 5, torch.float16),
    (512, 16, torch.float32),
    (650, 40, torch.bfloat16),
    (512, 256, torch.float16),
    (33, 5, torch.float64),
    (512, 64, torch.float64),
)


@dataclass(frozen=True)
class Build:
    """A kernel as compiled.

    Attributes:
        case: the call it is launched by.
        kernel: `forward` or `backward`.
        design: a name in `plan.TRITON_KERNELS`.
        registers: of a thread.
        spilled, shared: bytes, of a thread and of a program.
        products: instructions for the matrix units.
        barriers: those of a program's threads.
    """

    case: str
    kernel: str
    design: str
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
        constants = {name: given.pop(name) for name in names[len(arguments) :]}
        constants |= {name: value for name, value in bound.items() if value is None}
        signature = dict.fromkeys(constants, "constexpr")
        divisible = []
        for name, value in bound.items():
            if isinstance(value, torch.Tensor):
                signature[name] = TYPES[value.dtype]
                divisible += [name] * (value.data_ptr() % 16 == 0)
            elif value is not None:
                signature[name] = "i32"
                divisible += [name] * (value % 16 == 0 and name not in kernels.SIZES)
        source = ASTSource(
            self.kernel,
            {name: signature[name] for name in names},
            {(names.index(name),): value for name, value in constants.items()},
            {(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
        )
        self.done(triton.compile(source, target=self.target, options=given), given)


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


def builds(case: Case, target: GPUTarget, keep: Keep = Keep.EVERYTHING) -> Iterator[Build]:
    """Every kernel that a call's forward and backward pass launch."""
    found: dict[str, Build] = {}

    def recorder(name: str) -> Recorder:
        def done(built: Any, options: dict) -> None:
            registers, spilled = resources(built)
            text = built.asm.get("ptx") or built.asm["amdgcn"]
            found[name] = Build(
                str(case),
                name,
                scan.choose(it.scan(name == "backward")).kernel,
                registers,
                spilled,
                built.metadata.shared,
                len(re.findall(r"\b(mma\.sync|wgmma|v_mfma)", text)),
                len(re.findall(r"\b(bar\.sync|barrier\.sync|s_barrier)\b", text)),
            )

        return Recorder(getattr(kernels, name), target, done)

    arguments = call(case)
    it = gpu.Call(
        case.cell, arguments.input, arguments.states, arguments.weights, arguments.batch_sizes
    )
    with (
        mock.patch.object(gpu, "scans", lambda _: scan),
        mock.patch.object(kernels, "forward", recorder("forward")),
        mock.patch.object(kernels, "backward", recorder("backward")),
    ):
        given = (arguments.input, arguments.states, arguments.weights, arguments.batch_sizes)
        output, _, reserve = gpu.layer_forward(case.cell, *given, keep)
        gpu.layer_backward(case.cell, arguments.grads, *given, output, reserve, arguments.all_needs)
    yield from found.values()


def cases() -> Iterator[Case]:
    """Every cell and dtype in either design, dense and ragged, projected, and without this and that."""
    for cell in CELLS:
        for at, (hidden, batch, dtype) in enumerate(SIZES):
            case = Case(cell, (2, batch, 4, hidden), 1 + at % 2, dtype=dtype)
            if at % 2:
                case = replace(case, lengths=tuple(2 if n < 2 else 1 for n in range(batch)))
            yield replace(case, states=at % 3 != 0, bias=at % 3 != 1)
        if CELLS[cell].states > 1:
            yield Case(cell, (2, 3, 4, 100), projected=33)


def main(backend: str, architecture: str) -> None:
    scan.TARGET = backend
    arch = int(architecture) if backend == "cuda" else architecture
    target = GPUTarget(backend, arch, 32 if backend == "cuda" else 64)
    for case in cases():
        for build in builds(case, target):
            print(json.dumps(asdict(build)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
