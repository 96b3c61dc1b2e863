"""`python -m rnnkit info`: what is installed, what loaded and what did not, for bug reports.

`python -m rnnkit info --check` also runs small layers on every backend that is here, beside the reference.
`python -m rnnkit clear-cache` removes the compiled cells of one's own.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

import rnnkit
from rnnkit import backends

Facts = dict[str, str | int | bool | list[str]]

#: CPU features that decide how fast the kernels can be, by their names in /proc/cpuinfo.
_FEATURES = (
    *("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"),
    *("avx_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16"),
    *("asimd", "asimdhp", "bf16", "sve", "sve2"),
)

#: Prefixes of environment variables that change what is loaded or how it runs.
_VARIABLES = (
    *("RNNKIT_", "OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "ATEN_CPU_CAPABILITY"),
    *("CUDA_", "TORCH_CUDA_ARCH_LIST", "LD_PRELOAD", "TORCH_COMPILE_DISABLE", "TRITON_"),
)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> Facts:
    """The CPU's name and features from /proc/cpuinfo; without that file only the name that Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        told.setdefault(key.strip().lower(), value.strip())
    flags = told.get("flags", told.get("features", "")).split()
    return {
        "name": told.get("model name") or platform.processor() or platform.machine(),
        "capability in torch": torch.backends.cpu.get_cpu_capability(),
        "features": [feature for feature in _FEATURES if feature in flags],
        "logical cores": os.cpu_count() or 0,
        "threads in torch": torch.get_num_threads(),
    }


def _driver() -> str:
    """The version of NVIDIA's driver, from /proc."""
    try:
        told = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "none"
    version = re.search(r"\b\d+(\.\d+)+\b", told)
    return version[0] if version else "unknown"


def _gpu() -> Facts:
    facts: Facts = {"CUDA in torch": torch.version.cuda or "none"}
    reason = getattr(backends, "CUDA_REASON", "not built")
    facts["CUDA library"] = f"not available: {reason}" if reason else "loaded"
    facts["Triton kernels"] = (
        f"not available: {backends.TRITON_REASON}" if backends.TRITON_REASON else "available"
    )
    facts["CUDA provider"] = backends.provider()
    facts["driver"] = _driver()
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        facts[f"device {index}"] = (
            f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} SMs, "
            f"{gpu.total_memory / 2**30:.0f} GiB"
        )
    return facts


def _built() -> Facts:
    """The contents of rnnkit/_build.py, which setup.py writes; a checkout that was never built has none."""
    try:
        build = importlib.import_module("rnnkit._build")
    except ModuleNotFoundError:
        return {"note": "none: rnnkit was not installed, or not by its setup.py"}
    return {
        "torch": build.TORCH_VERSION or "none",
        "compiler": build.COMPILER or "none",
        "CPU capabilities": list(build.CAPABILITIES),
        # A _build.py written before the CUDA library existed lacks these two names.
        "nvcc": getattr(build, "CUDA_COMPILER", "") or "none",
        "GPU architectures": list(getattr(build, "CUDA_ARCHITECTURES", ())),
    }


def _backends() -> Facts:
    """For each backend, whether it loaded, and if not, why."""
    facts: Facts = {
        name: f"not available: {reason}" if (reason := backends.unavailable(name)) else "loaded"
        for name in backends.BACKENDS
    }
    if backends.EXTENSION is None:  # "cpp" means the CPU here; the CUDA library has its own line
        facts["cpp"] = f"not available: {backends.EXTENSION_REASON}"
    else:
        facts["cpp"] = f"loaded: {backends.EXTENSION.capability()} kernels"
    return facts


def _serving() -> Facts:
    """The backend that serves each device type; the warning about the reference is suppressed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {kind: backends.serving(torch.device(kind)) for kind in ("cpu", "cuda")}


def _own_cells() -> Facts:
    """Where compiled cells of one's own are kept, and what compiles them."""
    if backends.EXTENSION is None:
        return {"note": "none: the C++ extension runs them"}
    from rnnkit.graph import compiled

    return {
        "folder": str(compiled.folder()),
        "compiled": len(compiled.cells()),
        "compiler": compiled.compiler_told(),
    }


def info() -> dict[str, Facts]:
    """Everything that `python -m rnnkit info` prints, by section."""
    return {
        "versions": {
            "rnnkit": rnnkit.__version__,
            "location": str(Path(rnnkit.__file__).parent),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "Python": platform.python_version(),
            "platform": platform.platform(),
        },
        "cpu": _cpu(),
        "gpu": _gpu(),
        "built with": _built(),
        "backends": _backends(),
        "own cells": _own_cells(),
        "serving": _serving(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_VARIABLES) and value
        },
    }


def _text(sections: dict[str, Facts]) -> str:
    lines = []
    for section, facts in sections.items():
        lines.append(section)
        for name, value in facts.items():
            shown = " ".join(value) if isinstance(value, list) else str(value)
            lines.append(f"  {name:20} {shown or 'none'}")
        if not facts:
            lines.append("  none")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments`, by default the process's own; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m rnnkit", description=rnnkit.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("info", help="what is installed and what loaded, for bug reports")
    command.add_argument("--json", action="store_true", help="the same for programs")
    command.add_argument(
        "--check",
        action="store_true",
        help="run small layers on each backend, beside the reference; 1 if one is wrong",
    )
    commands.add_parser("clear-cache", help="removes the compiled cells of one's own")
    options = parser.parse_args(arguments)
    if options.command == "clear-cache":
        from rnnkit.graph import compiled

        print(f"removed {compiled.clear()} compiled cells from {compiled.folder()}")
        return 0
    sections = info()
    checks = []
    if options.check:
        from rnnkit import checking

        checks = [*checking.checks()]
        sections["checks"] = {check.what: str(check) for check in checks}
    print(json.dumps(sections, indent=2) if options.json else _text(sections))
    return int(any(check.passed is False for check in checks))


if __name__ == "__main__":
    sys.exit(main())
