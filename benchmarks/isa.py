"""Instruction sets (ISAs) that a run can be held to, and how each library is held to them.

    python -m benchmarks.isa avx2 make demo    runs a command with every library held to AVX2

Libraries look at the environment when they are loaded, so this module loads none. What each switch does was
tried: a product's GFLOP/s, and an LSTM's, fall below the peak of the ISA that the library is held to.
"""

import argparse
import os
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Isa(NamedTuple):
    """An instruction set, by the name of rnnkit's kernels for it.

    needs: what /proc/cpuinfo calls the instructions.
    aten, onednn, mkl, xla: its names there.
    """

    title: str
    needs: tuple[str, ...]
    aten: str
    onednn: str
    mkl: str
    xla: str

    def environment(self, given: Mapping[str, str]) -> dict[str, str]:
        """The variables that hold libraries to it; flags for XLA are added to those in `given`."""
        # YNNPACK, which XLA multiplies with, has no switch; without it XLA uses Eigen, which uses oneDNN.
        flags = [f"--xla_cpu_max_isa={self.xla}", "--xla_cpu_experimental_ynn_fusion_type="]
        kept = [flag for flag in given.get("XLA_FLAGS", "").split() if flag not in flags]
        return {
            "ATEN_CPU_CAPABILITY": self.aten,
            "ONEDNN_MAX_CPU_ISA": self.onednn,
            "MKL_ENABLE_INSTRUCTIONS": self.mkl,
            "XLA_FLAGS": " ".join([*kept, *flags]),
        }


_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
#: In ascending order.
ISAS = {
    "baseline": Isa("baseline", (), "default", "SSE41", "SSE4_2", "SSE4_2"),
    "avx2": Isa("AVX2", ("avx2", "fma", "f16c"), "avx2", "AVX2", "AVX2", "AVX2"),
    "avx512": Isa(
        "AVX-512",
        ("avx2", "fma", "f16c", *_AVX512),
        *("avx512", "AVX512_CORE_BF16", "AVX512", "AVX512_BF16"),
    ),
}
#: By provider.
HELD = {
    "rnnkit": "ATEN_CPU_CAPABILITY",
    "torch": "ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, MKL_ENABLE_INSTRUCTIONS",
    "jax": "XLA_FLAGS, which also turn off YNNPACK, and ONEDNN_MAX_CPU_ISA",
    "openvino": "ONEDNN_MAX_CPU_ISA",
}
NOT_HELD = {"onnxruntime": "its MLAS has no switch"}


class IsaError(Exception):
    """The run cannot be held to an ISA; the message says why."""


def features() -> set[str]:
    """The CPU's instructions by Linux's names; nothing where they are not told."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return set()
    found = (line.partition(":") for line in lines)
    return {
        name
        for key, _, told in found
        if key.strip() in ("flags", "Features")
        for name in told.split()
    }


def lacking(name: str) -> list[str]:
    """What the CPU would need for it."""
    present = features()
    return [needed for needed in ISAS[name].needs if needed not in present]


def of_torch(name: str) -> str:
    """The ISA that torch calls `name`."""
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(name, "baseline")


def best() -> str:
    """The last that this CPU has all of."""
    return [name for name in ISAS if not lacking(name)][-1]


def hold(name: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Holds the libraries that are loaded from now on, here and in child processes.

    Raises:
        IsaError: there is no such ISA, or the CPU lacks it.
    """
    if name not in ISAS:
        raise IsaError(f"--isa {name}: expected one of {', '.join(ISAS)}")
    if missing := lacking(name):
        raise IsaError(f"--isa {name}: this CPU lacks {', '.join(missing)}")
    environment.update(ISAS[name].environment(environment))


def require_held(name: str) -> None:
    """Raises IsaError if this process is not held to it, since its libraries may have been loaded before."""
    wanted = ISAS[name].environment(os.environ)
    if any(os.environ.get(variable) != value for variable, value in wanted.items()):
        raise IsaError(f"--isa {name} holds new processes only: python -m benchmarks --isa {name}")


def document(name: str) -> dict[str, Any]:
    """What a results file says of it."""
    environment = ISAS[name].environment({})
    return {"environment": environment, "providers": HELD, "not held": NOT_HELD}


def from_command_line(arguments: Sequence[str]) -> None:
    """`hold` as the option --isa among `arguments` says; raises IsaError."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--isa")
    options, _ = parser.parse_known_args(arguments)
    if options.isa:
        hold(options.isa)


def main(arguments: Sequence[str]) -> int:
    if len(arguments) < 2 or arguments[0].startswith("-"):
        print(f"usage: python -m benchmarks.isa {{{','.join(ISAS)}}} COMMAND ...", file=sys.stderr)
        return 2
    try:
        hold(arguments[0])
        os.execvp(arguments[1], list(arguments[1:]))
    except (IsaError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
