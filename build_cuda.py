"""Builds rnnkit/_cuda.so, the CUDA kernels, from csrc/cuda/; called by setup.py, which tells the environment.

No source sees more of torch than its stable ABI, and that in register.cpp alone. So the library is no Python
module, one file serves every torch from 2.10 on, and it can be built beside a torch that has no CUDA.
"""

import hashlib
import os
import platform
import re
import shutil
from itertools import product
from pathlib import Path
from runpy import run_path
from typing import NamedTuple

import torch

from build_objects import Part, compile_all, run, write_generated

#: Built by default, as far as nvcc knows them. A GPU runs the code of its major version up to its minor one,
#: and one newer than all of these compiles the PTX of the newest.
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0")

CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
CXX_FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v"]
NVCC_FLAGS += ["-Xcompiler=-fPIC,-fvisibility=hidden"]


class Built(NamedTuple):
    """What setup.py notes of a library that was built."""

    compiler: str
    architectures: tuple[str, ...]


def why_not() -> str:
    """Why the library will not be built although torch is there; empty when it is to be tried."""
    if os.environ.get("RNNKIT_CUDA") == "1":
        return ""
    if os.environ.get("RNNKIT_SANITIZE"):
        return "it was built with RNNKIT_SANITIZE"
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} has no CUDA, so it was not built (RNNKIT_CUDA=1 builds it)"
        )
    return ""


def toolkit() -> Path:
    """The folder of the CUDA toolkit: a variable's, nvcc's where that is no wrapper elsewhere, the usual one.

    Raises:
        RuntimeError: there is none, or none where a variable says.
    """

    def complete(root: Path) -> bool:
        return (root / "bin/nvcc").exists() and (root / "include/cuda_runtime.h").exists()

    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if value := os.environ.get(variable):
            if complete(Path(value)):
                return Path(value)
            raise RuntimeError(f"no bin/nvcc and include/cuda_runtime.h in {variable}={value}")
    nvcc = shutil.which("nvcc")
    places = [Path(nvcc).resolve().parents[1]] if nvcc else []
    for root in (*places, Path("/usr/local/cuda")):
        if complete(root):
            return root
    raise RuntimeError("no CUDA toolkit: nvcc is not on PATH, and CUDA_HOME is not set")


def architectures(nvcc: str, inplace: bool) -> tuple[str, ...]:
    """What to build for, such as ("8.0", "9.0+PTX").

    TORCH_CUDA_ARCH_LIST says; without it an in-place build, which stays on this machine, is for the GPUs in
    sight, where there are any, and others are for all of `ARCHITECTURES`.

    Raises:
        RuntimeError: TORCH_CUDA_ARCH_LIST is not understood, or names only GPUs older than 8.0.
    """
    if asked := os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip():
        names = tuple(dict.fromkeys(re.split(r"[;,\s]+", asked.strip(";,"))))
        for name in names:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
                raise RuntimeError(
                    f"expected TORCH_CUDA_ARCH_LIST such as '8.0;9.0+PTX', got {asked!r}"
                )
        # Images for many packages list GPUs that have not the instructions the kernels need.
        names = tuple(name for name in names if int(name.partition(".")[0]) >= 8)
        if not names:
            raise RuntimeError(
                f"the kernels need 8.0 or newer, and TORCH_CUDA_ARCH_LIST is {asked!r}"
            )
        return names
    supported = re.findall(r"compute_(\d+)(\d)\b", run([nvcc, "--list-gpu-arch"]))
    known = [".".join(version) for version in supported]
    if inplace and torch.cuda.is_available():
        gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        names = tuple(f"{major}.{minor}" for major, minor in sorted(set(gpus)))
        if gpus and min(gpus) >= (8, 0) and set(names) <= set(known):
            return names
    names = tuple(name for name in ARCHITECTURES if name in known)
    if not names:
        raise RuntimeError(f"{nvcc} knows none of {', '.join(ARCHITECTURES)}")
    return (*names[:-1], f"{names[-1]}+PTX")


def generate_code(name: str) -> list[str]:
    """nvcc's flags for one architecture, such as "9.0a" or "8.0+PTX"."""
    version, _, ptx = name.partition("+")
    number = version.replace(".", "")
    codes = [f"sm_{number}", *([f"compute_{number}"] if ptx else [])]
    return [f"-gencode=arch=compute_{number},code={code}" for code in codes]


def build(target: Path, inplace: bool) -> Built:
    """Builds the library `target`; build/cuda is then a link to its objects and reports of resources.

    Raises:
        RuntimeError: it could not be built, and why.
    """
    from torch.utils import cpp_extension  # brings setuptools' distutils with it

    root = toolkit()
    nvcc, cxx = str(root / "bin/nvcc"), cpp_extension.get_cxx_compiler().split()
    release = re.search(r"release.*", run([nvcc, "--version"]))
    version = f"nvcc {release[0] if release else 'of unknown release'}"
    names = architectures(nvcc, inplace)

    host = [f"-ccbin={cxx[0]}"] if os.environ.get("CXX") and len(cxx) == 1 else []
    nvcc_command = [nvcc, *NVCC_FLAGS, *host, *(f for name in names for f in generate_code(name))]
    kind = [version, *nvcc_command, run([*cxx, "--version"]), *CXX_FLAGS, platform.machine()]
    folder = Path("build", f"cuda-{hashlib.sha256(repr(kind).encode()).hexdigest()[:12]}")

    torch_folder = folder / re.sub(r"\W", "_", f"torch_{torch.__version__}")
    include = [*cpp_extension.include_paths(), str(root / "include")]
    cxx_command = [*cxx, *CXX_FLAGS, *(flag for path in include for flag in ("-isystem", path))]
    write_generated(folder / "instances.inc", run_path("rnnkit/instances.py")["header"]())

    def part(command: list[str], source: str, target: Path) -> Part:
        return Part([*command, "-Icsrc"], Path("csrc/cuda", source), target, version)

    parts = [part(nvcc_command, f"{name}.cu", folder / f"{name}.o") for name in ("launch", "step")]
    for backward, element in product((True, False), ("BFloat16", "float", "Half")):
        defines = [
            f"-I{folder}",
            f"-DRNNKIT_BACKWARD={int(backward)}",
            f"-DRNNKIT_ELEMENT={element}",
        ]
        name = f"{'backward' if backward else 'forward'}_{element.lower()}"
        parts.append(part([*nvcc_command, *defines], "persistent.cu", folder / f"{name}.o"))
    parts.append(part([*cxx, *CXX_FLAGS], "stepwise.cpp", folder / "stepwise.o"))
    parts.append(part(cxx_command, "register.cpp", torch_folder / "register.o"))
    objects = compile_all(parts)

    # libtorch.so brings in what the torch at hand has, libtorch_cuda.so too; loaded before this library, it
    # is found by its name alone. Nothing of CUDA's runtime in here is seen from outside.
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries += ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
    libraries += [f"-L{path}" for path in (root / "lib64", root / "lib") if path.is_dir()]
    libraries += ["-lcudart_static", "-lrt", "-ldl", "-lpthread", "-Wl,--exclude-libs,ALL"]
    unfinished = target.with_suffix(".unfinished.so")
    run([*cxx, "-shared", "-fvisibility=hidden", *objects, *libraries, "-o", str(unfinished)])
    unfinished.replace(target)

    newest = Path("build/cuda")
    newest.unlink(missing_ok=True)
    newest.symlink_to(folder.name)
    return Built(version, names)
