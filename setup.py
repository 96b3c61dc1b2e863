"""Builds rnnkit: the extension `rnnkit._C` from csrc/, or on request pure Python.

The kernels (csrc/cpu/kernels/) are compiled once for each ISA into one module, which chooses at run time. On Linux it
is an error if the extension cannot be built; elsewhere rnnkit is pure Python. If torch has CUDA and there is an nvcc,
the CUDA kernels become a second library (build_cuda.py). rnnkit/_build.py records for rnnkit/backends.py what was
built, or why not.

Environment:
    RNNKIT_CPU=0          do not build the extension: pure Python, which needs neither torch nor a compiler
    RNNKIT_CPU=1          fail if the extension is not built, also on other systems than Linux
    RNNKIT_CUDA=0         do not build the CUDA library
    RNNKIT_CUDA=1         fail if the CUDA library cannot be built; build it also with a torch without CUDA
    RNNKIT_NATIVE=1       build the CPU kernels only for the ISAs that this CPU runs
    RNNKIT_SANITIZE=...   value of -fsanitize, for example address,undefined; has the effect of RNNKIT_NATIVE=1
    CC, CXX               the compilers
    MAX_JOBS              compilers that run at once; by default at most one for each core and GiB of free memory
    CUDA_HOME, CUDA_PATH  the CUDA toolkit; by default that of the nvcc on PATH, or /usr/local/cuda
    TORCH_CUDA_ARCH_LIST  GPUs to build for, such as '8.0;9.0+PTX'; by default 8.0 to 10.0 and PTX, which takes
                          minutes, or, in place and in editable installations, the GPUs of this machine if any
"""

import os
import platform
import re
import sys
import sysconfig
from pathlib import Path
from typing import Any

import setuptools
from setuptools import Extension, setup

if int(setuptools.__version__.partition(".")[0]) < 77:
    sys.exit(
        f"rnnkit: setuptools {setuptools.__version__} is too old: pip install 'setuptools>=77'"
    )

from setuptools.command.bdist_wheel import bdist_wheel

# In a build by pip, sys.path does not contain this folder.
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import build_objects

try:
    import torch
    from torch.utils import cpp_extension

    # torch's ninja build has only one set of flags for all files.
    BuildExtension = cpp_extension.BuildExtension.with_options(use_ninja=False)
    TORCH_VERSION, TORCH_ABSENT = torch.__version__, ""
except (ImportError, OSError) as error:
    from setuptools.command.build_ext import build_ext as BuildExtension

    TORCH_VERSION, TORCH_ABSENT = "", " ".join(str(error).split())

SANITIZE = os.environ.get("RNNKIT_SANITIZE", "")

#: The flags for each ISA, in ascending order; the names are C++ namespaces.
CAPABILITIES: dict[str, list[str]] = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    CAPABILITIES["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    CAPABILITIES["avx512"] = [
        *CAPABILITIES["avx2"],
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    ]
    CAPABILITIES["avx512_bf16"] = [*CAPABILITIES["avx512"], "-mavx512bf16"]

if (SANITIZE or os.environ.get("RNNKIT_NATIVE") == "1") and sys.platform == "linux":
    has = Path("/proc/cpuinfo").read_text().split()
    CAPABILITIES = {
        name: flags
        for name, flags in CAPABILITIES.items()
        if name == "baseline" or name in has or f"{name}f" in has  # avx512f is the least of avx512
    }

FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fopenmp",
    "-fvisibility=hidden",
    "-fwrapv",  # some Pythons add it to extensions' flags; the kernels are measured with it
    "-Wall",
    "-Wextra",
]
LINK_FLAGS = ["-fopenmp"]
#: The flags and, in csrc/, the headers with which a cell of one's own is compiled (rnnkit/graph/compiled.py): those of
#: the kernels, so that it computes the same bits.
CELL_FLAGS = [flag for flag in FLAGS if flag.startswith(("-std", "-O", "-g", "-fwrapv"))]
CELL_HEADERS = ("common/dtypes.h", "common/lanes.h", "cpu/compiled_cell.h", "cpu/pointwise.h")
if SANITIZE:
    # vptr needs the type information of classes that torch does not export.
    sanitize = [f"-fsanitize={SANITIZE}", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
    # -fexpensive-optimizations contracts a * b + c to FMAs, as the ordinary build does; the tests' tolerances need it.
    FLAGS += ["-O1", "-fexpensive-optimizations", "-g1", "-fno-omit-frame-pointer", *sanitize]
    FLAGS += ["-fno-wrapv"]  # -fwrapv would hide signed overflow from UBSan
    LINK_FLAGS += sanitize


def sources(directory: str) -> list[str]:
    """The C++ files in `directory`, relative to the project as setuptools wants them."""
    return sorted(path.as_posix() for path in Path(directory).glob("*.cpp"))


def kernels(capability: str, files: list[str]) -> list[str]:
    """Those of `files` that are compiled for an ISA: with bfloat16 instructions, only the kernels of bfloat16."""
    if capability.endswith("_bf16"):
        return [file for file in files if file.endswith(("/bfloat16.cpp", "/peak.cpp"))]
    return [file for file in files if not file.endswith("/bfloat16.cpp")]


def extension() -> Extension:
    """The extension `rnnkit._C`. Without torch it lacks flags and libraries, and is not built."""
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


#: What to type if the extension was not built, or built for another torch; `.` may also be git+URL.
INSTALL = "pip install --no-build-isolation --force-reinstall --no-deps --no-cache-dir ."

NEEDED = "install g++ 11 or clang 19, or later"
PURE = "RNNKIT_CPU=0 installs pure Python, which is slow"


def why_not(switch: str) -> str:
    """Why the extension that `switch` turns off is not to be built; empty if it is."""
    if os.environ.get(switch) == "0":
        return f"it was built with {switch}=0"
    if sys.platform != "linux":
        return f"it is built on Linux only, and this is {sys.platform}"
    if TORCH_ABSENT:
        return f"torch could not be imported when rnnkit was built ({TORCH_ABSENT})"
    return ""


def compiler_version() -> str:
    """The first line of the C++ compiler's `--version`.

    Raises:
        RuntimeError: there is no compiler, or it does not run.
    """
    name = cpp_extension.get_cxx_compiler()
    try:
        lines = build_objects.run([*name.split(), "--version"]).splitlines()
    except RuntimeError as error:
        raise RuntimeError(f"no C++ compiler ({error})") from error
    if not lines:
        raise RuntimeError(f"no C++ compiler (`{name} --version` says nothing)")
    return lines[0]


def check_requirements() -> None:
    """Exits at once, before anything else is done or printed, if the extension cannot be compiled."""
    commands = {"bdist_wheel", "editable_wheel", "build", "build_ext", "install", "develop"}
    if sys.platform != "linux" or os.environ.get("RNNKIT_CPU") == "0" or not commands & {*sys.argv}:
        return
    if TORCH_ABSENT:
        sys.exit(
            "rnnkit: the kernels are built for the torch that is installed, and this build cannot import it "
            f"({TORCH_ABSENT}; pip builds in an environment of its own unless told otherwise): install torch and "
            f"`pip install 'setuptools>=77,<82'`, then `{INSTALL}`; {PURE}"
        )
    try:
        compiler_version()
    except RuntimeError as error:
        sys.exit(f"rnnkit: {error}: {NEEDED}; {PURE}")


class BuildWheel(bdist_wheel):
    """Tags the wheel for every Python and system if nothing was compiled."""

    def run(self) -> None:
        """Builds first, because only the build tells whether anything is compiled."""
        if not self.skip_build:
            self.run_command("build")
        self.skip_build = True
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


class BuildKernels(BuildExtension):  # type: ignore[misc, valid-type]
    """Builds the extensions that are wanted, and writes _build.py beside them in any case."""

    def finalize_options(self) -> None:
        """Keeps objects in one folder for each kind of build: pip's is temporary, so that nothing would be reused.

        Those of the kernels are the same for every Python and torch.
        """
        super().finalize_options()
        python, compiler = sys.implementation.cache_tag, os.environ.get("CXX", "")
        self.force = True  # always link; build_objects decides what is compiled

        def folder(*kind: str) -> str:
            return str(Path("build", "-".join(re.sub(r"\W", "_", k) for k in kind if k)))

        self.kernels_temp = folder(sysconfig.get_platform(), "kernels", SANITIZE, compiler)
        self.build_temp = folder(
            sysconfig.get_platform(), python, TORCH_VERSION, SANITIZE, compiler
        )

    def run(self) -> None:
        """Builds, and writes to _build.py what was built, or why not."""
        target = Path(self.get_ext_fullpath(self.extensions[0].name))
        target.parent.mkdir(parents=True, exist_ok=True)
        reason, compiler = self.build_cpu(target)
        cuda_reason, nvcc, architectures = self.build_cuda(target.with_name("_cuda.so"))
        cell_flags = {} if reason else {n: [*CELL_FLAGS, *f] for n, f in CAPABILITIES.items()}
        if reason and cuda_reason:
            self.distribution.ext_modules = []
        target.with_name("_build.py").write_text(
            '"""How this copy of rnnkit was built; written by setup.py."""\n\n'
            "#: Why there is no C++ extension; empty when there is one.\n"
            f"REASON: str = {reason!r}\n"
            f"TORCH_VERSION: str = {TORCH_VERSION!r}\n"
            f"COMPILER: str = {compiler!r}\n"
            f"CAPABILITIES: tuple[str, ...] = {() if reason else tuple(CAPABILITIES)!r}\n"
            f"CELL_FLAGS: dict[str, list[str]] = {cell_flags!r}\n\n"
            "#: Why there is no CUDA library; empty when there is one.\n"
            f"CUDA_REASON: str = {cuda_reason!r}\n"
            f"CUDA_COMPILER: str = {nvcc!r}\n"
            f"CUDA_ARCHITECTURES: tuple[str, ...] = {architectures!r}\n"
        )

    def build_cpu(self, target: Path) -> tuple[str, str]:
        """Builds `rnnkit._C` as `target`. Returns why it was not built (empty if it was), and the compiler."""
        if reason := why_not("RNNKIT_CPU"):
            if os.environ.get("RNNKIT_CPU") == "1":
                sys.exit(f"rnnkit: {reason}")
            print(f"rnnkit: pure Python, without the C++ extension: {reason}", file=sys.stderr)
            target.unlink(missing_ok=True)
            self.extensions = []
            again = f"; without it `{INSTALL}` builds it" if sys.platform == "linux" else ""
            return reason + again, ""
        try:
            self.compiler_version = compiler_version()
            super().run()
        except Exception as error:
            fault = " ".join(str(error).replace(os.getcwd() + os.sep, "").split())
            sys.exit(f"rnnkit: {fault}" + ("" if "MAX_JOBS" in fault else f": {NEEDED}; {PURE}"))
        for header in CELL_HEADERS:
            copy = target.with_name("include") / header
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(Path("csrc", header).read_bytes())
        return "", self.compiler_version

    def build_cuda(self, target: Path) -> tuple[str, str, tuple[str, ...]]:
        """Builds the CUDA library `target`. Returns why it was not built (empty if it was), nvcc and architectures."""
        required = os.environ.get("RNNKIT_CUDA") == "1"
        reason = why_not("RNNKIT_CUDA")
        if not reason:
            import build_cuda  # imports torch

            reason = build_cuda.why_not()
        if not reason:
            try:
                return "", *build_cuda.build(target, bool(self.inplace))
            except Exception as error:
                reason = " ".join(str(error).split())
                if required:
                    sys.exit(f"rnnkit: {reason}")
                print(f"rnnkit: without the CUDA library: {reason}", file=sys.stderr)
        elif required:
            sys.exit(f"rnnkit: {reason}")
        target.unlink(missing_ok=True)
        return reason, "", ()

    def build_extension(self, ext: Extension) -> None:
        """Compiles the ordinary sources, and the kernels once with each ISA's flags, into one module.

        Code for a newer CPU must never run on an older one. If several objects contain the same inline function, the
        linker keeps the first object's: therefore ordinary sources come first and ISAs in ascending order.
        """
        names = [name for name in CAPABILITIES if name != "baseline"]
        # -isystem silences warnings in torch's headers. The kernels include no header of torch.
        include = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
        # One header for each operator of torch takes half the memory and time of the one with all operators.
        ordinary = [*include, "-DAT_PER_OPERATOR_HEADERS"]
        if "clang" not in self.compiler_version:
            ordinary += ["--param=ggc-min-expand=30"]  # makes gcc take less memory
        ordinary += [f"-DRNNKIT_HAS_{name.upper()}" for name in names]
        cxx = cpp_extension.get_cxx_compiler().split()
        of_kernels = [*cxx, "-fPIC", "-DNDEBUG", f"-I{os.path.abspath('csrc')}", *FLAGS]

        def compile_sets(
            sources: list[str],
            output_dir: str,
            macros: list[tuple[str, str]] | None = None,
            include_dirs: list[str] | None = None,
            extra_postargs: list[str] | None = None,
            **options: Any,
        ) -> list[str]:
            _, objects, _, preprocessor, _ = self.compiler._setup_compile(
                output_dir, macros, include_dirs, ext.sources, [], extra_postargs
            )
            command = [*cxx, *self.compiler.compiler_so[1:], *preprocessor]
            command += [*(extra_postargs or []), *ordinary]
            found = [(command, *pair) for pair in zip(ext.sources, objects, strict=True)]
            for name, flags in CAPABILITIES.items():
                command = [*of_kernels, f"-DRNNKIT_CAPABILITY={name}", *flags]
                for source in kernels(name, ext.depends):
                    target = Path(self.kernels_temp, name, source).with_suffix(".o")
                    found.append((command, source, target))
            return build_objects.compile_all(
                [
                    build_objects.Part(
                        [*command], Path(source), Path(target), self.compiler_version
                    )
                    for command, source, target in found
                ]
            )

        self.compiler.compile = compile_sets
        super().build_extension(ext)


check_requirements()

setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": BuildWheel},
)
