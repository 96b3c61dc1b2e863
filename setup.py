"""Builds rnnkit: `rnnkit._C` from csrc/ where there are torch and a C++ compiler, else pure Python.

The kernels (csrc/cpu/kernels/) are compiled once per CPU capability into the one module, which chooses
at run time. The CUDA kernels become a second library (build_cuda.py), where torch has CUDA and nvcc is there.
What was built, or why it was not, is written to rnnkit/_build.py for rnnkit/backends.py.

Environment:
    RNNKIT_CPU=0          do not build the extension
    RNNKIT_CPU=1          fail where it cannot be built, instead of going on without it
    RNNKIT_CUDA=0, =1     likewise for the CUDA library; 1 builds it beside a torch without CUDA, too
    RNNKIT_SANITIZE=...   value of -fsanitize, for example address,undefined
    CC, CXX, MAX_JOBS     compilers and parallel jobs, as everywhere
    CUDA_HOME, CUDA_PATH  the CUDA toolkit; without them that of the nvcc on PATH, or /usr/local/cuda
    TORCH_CUDA_ARCH_LIST  GPUs to build for, such as '8.0;9.0+PTX'. Without it, in place (editable installations
                          too) those in sight; else, or where there are none, 8.0 to 10.0 and PTX: minutes
"""

import os
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

try:
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension

    TORCH_VERSION, TORCH_ABSENT = torch.__version__, ""
except (ImportError, OSError) as error:
    from setuptools.command.build_ext import build_ext as BuildExtension

    TORCH_VERSION, TORCH_ABSENT = "", str(error)

SANITIZE = os.environ.get("RNNKIT_SANITIZE", "")

#: Flags for each CPU capability, in ascending order; the names are C++ namespaces.
CAPABILITIES: dict[str, list[str]] = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    CAPABILITIES["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    CAPABILITIES["avx512"] = [
        *CAPABILITIES["avx2"],
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    ]
    CAPABILITIES["avx512_bf16"] = [*CAPABILITIES["avx512"], "-mavx512bf16"]

FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fopenmp",
    "-fvisibility=hidden",
    "-fwrapv",  # Python's own flags have it on some systems; the kernels are measured with it
    "-Wall",
    "-Wextra",
]
LINK_FLAGS = ["-fopenmp"]
if SANITIZE:
    # vptr needs the type information of classes that torch does not export.
    sanitize = [f"-fsanitize={SANITIZE}", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
    # Contracting a * b + c as in the ordinary build, for the tests' tolerances hold for that one.
    FLAGS += ["-O1", "-fexpensive-optimizations", "-g1", "-fno-omit-frame-pointer", *sanitize]
    FLAGS += ["-fno-wrapv"]  # it defines signed overflow, which then goes unreported
    LINK_FLAGS += sanitize


def sources(directory: str) -> list[str]:
    """The C++ files in `directory`, relative to the project as setuptools wants them."""
    return sorted(path.as_posix() for path in Path(directory).glob("*.cpp"))


def kernels(capability: str, files: list[str]) -> list[str]:
    """Those of `files` that are compiled for it: bfloat16's own instructions serve bfloat16 alone."""
    if capability.endswith("_bf16"):
        return [file for file in files if file.endswith(("/bfloat16.cpp", "/peak.cpp"))]
    return [file for file in files if not file.endswith("/bfloat16.cpp")]


def extension() -> Extension:
    """`rnnkit._C`; what depends on torch is left out where there is none, and then not built."""
    module = Extension(
        "rnnkit._C", sources("csrc/cpu"), depends=sources("csrc/cpu/kernels"), language="c++"
    )
    if not TORCH_ABSENT:
        module.include_dirs = [os.path.abspath("csrc")]
        module.libraries = ["c10", "torch", "torch_cpu", "torch_python"]
        module.library_dirs = cpp_extension.library_paths()
        module.extra_compile_args = list(FLAGS)
        module.extra_link_args = list(LINK_FLAGS)
    return module


def why_not(switch: str) -> str:
    """Why the extension of this `switch` will not be built; empty when it is to be tried."""
    if os.environ.get(switch) == "0":
        return f"it was built with {switch}=0"
    if TORCH_ABSENT:
        return (
            f"torch could not be imported when rnnkit was built ({TORCH_ABSENT}); install torch "
            "first, then rnnkit with `pip install --no-build-isolation`"
        )
    if sys.platform != "linux":
        return f"it is built on Linux only, and this is {sys.platform}"
    return ""


def compiler_version() -> str:
    """The first line that the C++ compiler says of itself.

    Raises:
        RuntimeError: there is no compiler, or it does not run.
    """
    name = cpp_extension.get_cxx_compiler()
    try:
        done = subprocess.run([*name.split(), "--version"], capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"no C++ compiler: {name}: {error.strerror}") from error
    if done.returncode or not done.stdout:
        raise RuntimeError(f"no C++ compiler: `{name} --version` failed")
    return done.stdout.splitlines()[0]


@contextmanager
def compiler_output() -> Iterator[list[str]]:
    """Collects what is written to stdout in the block; in the end the compiler's part goes to stderr."""
    lines: list[str] = []
    sys.stdout.flush()
    saved = os.dup(1)
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        os.dup2(file.fileno(), 1)
        try:
            yield lines
        finally:
            sys.stdout.flush()
            os.dup2(saved, 1)
            os.close(saved)
            file.seek(0)
            progress = re.compile(r"\[\d+/\d+\] |ninja: |running |building |copying |creating ")
            lines += [line for line in file.read().splitlines() if not progress.match(line)]
            print(*lines, sep="\n", end="\n" if lines else "", file=sys.stderr, flush=True)


class BuildKernels(BuildExtension):  # type: ignore[misc, valid-type]
    """Builds the extension if it can be built, and writes _build.py beside it in any case."""

    def finalize_options(self) -> None:
        """Keeps objects in one folder per kind of build: pip's own is temporary, so never up to date."""
        super().finalize_options()
        kind = [sysconfig.get_platform(), sys.implementation.cache_tag, TORCH_VERSION, SANITIZE]
        self.build_temp = str(Path("build", "-".join(re.sub(r"\W", "_", k) for k in kind if k)))

    def run(self) -> None:
        """Build, or note the reason why not."""
        target = Path(self.get_ext_fullpath(self.extensions[0].name))
        target.parent.mkdir(parents=True, exist_ok=True)
        reason, compiler = self.build_cpu(target)
        cuda_reason, nvcc, architectures = self.build_cuda(target.with_name("_cuda.so"))
        target.with_name("_build.py").write_text(
            '"""How this copy of rnnkit was built; written by setup.py."""\n\n'
            "#: Why there is no C++ extension; empty when there is one.\n"
            f"REASON: str = {reason!r}\n"
            f"TORCH_VERSION: str = {TORCH_VERSION!r}\n"
            f"COMPILER: str = {compiler!r}\n"
            f"CAPABILITIES: tuple[str, ...] = {() if reason else tuple(CAPABILITIES)!r}\n\n"
            "#: Why there is no CUDA library; empty when there is one.\n"
            f"CUDA_REASON: str = {cuda_reason!r}\n"
            f"CUDA_COMPILER: str = {nvcc!r}\n"
            f"CUDA_ARCHITECTURES: tuple[str, ...] = {architectures!r}\n"
        )

    def build_cpu(self, target: Path) -> tuple[str, str]:
        """Builds `rnnkit._C` as `target`; why it was not built, and the compiler."""
        inplace, required = self.inplace, os.environ.get("RNNKIT_CPU") == "1"
        compiler, output = "", []
        reason = why_not("RNNKIT_CPU")
        if not reason:
            try:
                compiler = compiler_version()
                with compiler_output() as output:
                    super().run()
            except Exception as error:
                if required:
                    raise
                fault = next((line for line in output if "error:" in line), str(error))
                reason = " ".join(fault.replace(os.getcwd() + os.sep, "").split())
            self.inplace = inplace
        elif required:
            raise RuntimeError(reason)
        if reason:
            print(f"rnnkit: pure Python, without the C++ extension: {reason}", file=sys.stderr)
            target.unlink(missing_ok=True)
            self.extensions = []
        return reason, compiler

    def build_cuda(self, target: Path) -> tuple[str, str, tuple[str, ...]]:
        """Builds the CUDA library `target`; why it was not built, nvcc's version and the architectures."""
        required = os.environ.get("RNNKIT_CUDA") == "1"
        reason = why_not("RNNKIT_CUDA")
        if not reason:
            import build_cuda  # imports torch

            reason = build_cuda.why_not()
        if not reason:
            try:
                return "", *build_cuda.build(target, bool(self.inplace))
            except Exception as error:
                if required:
                    raise
                reason = " ".join(str(error).split())
                print(f"rnnkit: without the CUDA library: {reason}", file=sys.stderr)
        elif required:
            raise RuntimeError(reason)
        target.unlink(missing_ok=True)
        return reason, "", ()

    def build_extension(self, ext: Extension) -> None:
        """Compiles the kernels with each capability's flags beside the module's ordinary sources.

        Of an inline function that several objects hold, the linker keeps the first one's: ordinary
        sources first and capabilities ascending, code for a newer CPU is reached on such a CPU only.
        """
        compile = self.compiler.compile
        names = [name for name in CAPABILITIES if name != "baseline"]
        # Kernels see no torch header, and warnings in torch's are not ours.
        include = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
        sets = [("", ext.sources, [*include, *(f"-DRNNKIT_HAS_{name.upper()}" for name in names)])]
        for name, flags in CAPABILITIES.items():
            sets.append((name, kernels(name, ext.depends), [f"-DRNNKIT_CAPABILITY={name}", *flags]))

        def compile_sets(
            sources: list[str], output_dir: str, extra_postargs: list[str], **options: Any
        ) -> list[str]:
            def compile_set(part: tuple[str, list[str], list[str]]) -> list[str]:
                name, files, flags = part
                folder = str(Path(output_dir, name))
                return compile(
                    files, output_dir=folder, extra_postargs=extra_postargs + flags, **options
                )

            # Without ninja the compiler object is changed while it runs: one set at a time.
            jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1) if self.use_ninja else 1
            with ThreadPoolExecutor(jobs) as pool:
                return [obj for objects in pool.map(compile_set, sets) for obj in objects]

        self.compiler.compile = compile_sets
        super().build_extension(ext)


# A build by pip does not look for modules here.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

# ninja, installed beside this Python, is found even where the environment is not activated.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])

setup(ext_modules=[extension()], cmdclass={"build_ext": BuildKernels})
