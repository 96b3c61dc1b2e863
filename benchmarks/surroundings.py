"""On what a run was made: device, versions, revision, environment, as the results file has them."""

import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import rnnkit
from benchmarks import isa
from benchmarks.base import ROOT, git
from rnnkit import __main__ as command
from rnnkit import backends

SOURCES = ("rnnkit", "csrc", "*.py", "benchmarks/*.py", "benchmarks/providers", "benchmarks/gpu")


def revision() -> dict[str, Any] | None:
    """The commit of the rnnkit that is timed and whether sources differ from it, if it is this checkout's."""
    if Path(rnnkit.__file__).resolve().parents[1] != ROOT:
        return None
    try:
        changed = git("status", "--porcelain", "--", *SOURCES)
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return None


def driver() -> str:
    """NVIDIA's, as its own tool tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return told.stdout.split("\n")[0].strip()


def device(kind: str, about: dict[str, Any]) -> dict[str, Any]:
    if kind == "cuda":
        major, minor = torch.cuda.get_device_capability()
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {
            "kind": kind,
            "name": torch.cuda.get_device_name(),
            "capability": f"{major}.{minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory GiB": round(properties.total_memory / 2**30, 1),
            "driver": driver(),
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
        }
    return {
        "kind": kind,
        "name": about["cpu"]["name"],
        "capability": about["cpu"]["capability in torch"],
        "features": about["cpu"]["features"],
        "cores": about["cpu"]["logical cores"],
    }


def capability() -> str:
    """The ISA of rnnkit's kernels in use, as isa.ISAS has it; without kernels torch's."""
    if backends.EXTENSION is not None:
        return str(backends.EXTENSION.capability())
    return isa.of_torch(torch.backends.cpu.get_cpu_capability())


def surroundings(kind: str) -> dict[str, Any]:
    about: dict[str, Any] = dict(command.info())
    backend = str(about["serving"][kind])
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device(kind, about),
        "backend": f"{backend}, {about['backends'][backend]}".replace("loaded: ", ""),
        "versions": {
            "python": about["versions"]["Python"],
            "torch": about["versions"]["torch"],
            "triton": about["versions"]["triton"],
            "rnnkit": about["versions"]["rnnkit"],
            "git": revision(),
        },
        "environment": about["environment"],
    }
