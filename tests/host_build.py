"""Builds the CUDA kernels' host build, their source compiled for the CPU, and puts it in the place of the ops.

One lane after the other it computes what the blocks of a GPU compute (csrc/cuda/host.h), so that errors of splitting,
tails, masks, layout and order show without a GPU. `ops` runs `torch.ops.rnnkit` on CPU tensors this way.
"""

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from devices import OpsOfGpu
from torch.utils import cpp_extension

from rnnkit import cuda, gpu, instances, plan

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"

#: The ops get a namespace of their own: the CUDA extension, where it is loaded, defines them in rnnkit's.
NAMESPACE = "rnnkit_host"

FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
FLAGS += ["-DRNNKIT_HOST", f"-Drnnkit={NAMESPACE}"]

#: What the kernels multiply; float64 goes stepwise.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

#: An H100, as far as a plan knows it.
DEVICE = plan.Gpu(processors=132, shared_bytes=232448, capability=(9, 0))


def why_not() -> str:
    """Why the host build cannot be made here; empty when it can."""
    compiler = cpp_extension.get_cxx_compiler()
    if sys.platform != "linux":
        return (
            f"the host build of the CUDA kernels is made on Linux only, and this is {sys.platform}"
        )
    if shutil.which(compiler.split()[0]) is None:
        return f"no C++ compiler: {compiler} is not there"
    return ""


@functools.lru_cache
def library() -> Path:
    """The library, compiled unless an earlier run left it in build/ and no source changed since.

    Raises:
        subprocess.CalledProcessError: it does not compile.
    """
    compiler = cpp_extension.get_cxx_compiler().split()
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True)
    kind = hashlib.sha256(
        repr([torch.__version__, version.stdout, FLAGS, str(CSRC), instances.header()]).encode()
    )
    for path in sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".inc")):
        if "cpu" not in path.relative_to(CSRC).parts:
            kind.update(path.read_bytes())
    folder = ROOT / "build/host"
    target = folder / f"{kind.hexdigest()[:16]}.so"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one worker compiles, the others wait for it
        if not target.exists():
            _compile(compiler, target)
    return target


def _compile(compiler: list[str], target: Path) -> None:
    (target.parent / "instances.inc").write_text(instances.header())
    include = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    sources = [CSRC / "cuda" / f"{name}.cpp" for name in ("host", "register", "stepwise")]
    objects = [target.with_suffix(f".{index}.o") for index in range(len(sources))]

    def run(command: list[str | Path]) -> None:
        subprocess.run(command, check=True)

    def compile_source(source: Path, to: Path) -> None:
        run(
            [*compiler, *FLAGS, f"-I{CSRC}", f"-I{target.parent}", *include, "-c", source, "-o", to]
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_source, sources, objects))
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries += ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    unfinished = target.with_suffix(".unfinished.so")
    run([*compiler, "-shared", *objects, *libraries, "-o", unfinished])
    unfinished.replace(target)
    for path in objects:
        path.unlink()


@contextmanager
def ops(device: plan.Gpu = DEVICE) -> Iterator[None]:
    """In this block `torch.ops.rnnkit` runs on CPU tensors what it would run on `device`."""
    torch.ops.load_library(library())
    with (
        mock.patch.object(torch.ops, "rnnkit", OpsOfGpu(getattr(torch.ops, NAMESPACE))),
        mock.patch.object(gpu, "scans", lambda _: cuda),
        mock.patch.object(cuda, "device_of", lambda index: device),
    ):
        yield
