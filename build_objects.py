"""Compiles files in parallel, as many at once as cores and memory allow, for setup.py and build_cuda.py.

An object is compiled again if its command, the compiler or a file that the compiler read has changed.
"""

import os
import re
import subprocess
import sys
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

#: The memory to plan for each compiler, in bytes. No file of csrc/cpu/ takes more.
MEMORY_OF_COMPILER = 2**30

#: Lines of `-Xptxas=-v` about a kernel's resources; they go to a report beside the object.
RESOURCES = re.compile(r"ptxas info|\s+\d+ bytes stack frame")

#: What gcc and clang print if a process of theirs got SIGKILL. A shell returns 137 for it.
KILLED = re.compile(r"Killed signal terminated|unable to execute command: Killed")


class Part(NamedTuple):
    """One object: `command` compiles `source` to `target`; `compiler` is the compiler's version."""

    command: list[str]
    source: Path
    target: Path
    compiler: str


def run(command: list[str]) -> str:
    """Runs `command` and returns its stdout and stderr.

    Raises:
        RuntimeError: the command failed. The message is the line that says why; 20 lines from there go to stderr.
    """
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise RuntimeError(f"{command[0]}: {error.strerror}") from error
    if done.returncode in (-9, 137) or (done.returncode and KILLED.search(done.stdout)):
        raise RuntimeError(
            "the compiler was killed, probably because memory ran out: set MAX_JOBS=1"
        )
    if done.returncode:
        lines = done.stdout.splitlines()
        first = next((i for i, line in enumerate(lines) if re.search(r"error|fatal", line)), 0)
        print(*lines[first : first + 20], sep="\n", file=sys.stderr)
        status = f"{command[0]} failed ({done.returncode})"
        raise RuntimeError(lines[first].strip() if lines else status)
    return done.stdout


def cgroup_memory(root: Path = Path("/")) -> list[int]:
    """The bytes free in each of this process's control groups that limit memory. Page cache counts as free."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    free = []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, limit, keys = "", "memory.max", ("anon", "shmem")
        elif "memory" in controllers.split(","):
            mount, limit, keys = "memory", "memory.limit_in_bytes", ("total_rss", "total_shmem")
        else:
            continue
        # In a container the path may be the host's, while the container sees its own group as the root.
        parts = Path(path).parts[1:]
        for depth in range(len(parts), -1, -1):
            group = Path(root, "sys/fs/cgroup", mount, *parts[:depth])
            try:
                most = int((group / limit).read_text())
                told = dict(
                    line.split() for line in (group / "memory.stat").read_text().splitlines()
                )
            except (OSError, ValueError):  # no such group, or "max"
                continue
            free.append(most - sum(int(told.get(key, 0)) for key in keys))
    return free


def free_memory(root: Path = Path("/")) -> int | None:
    """The bytes that are free on this machine, or fewer if a container limits them; None if unknown."""
    free = cgroup_memory(root)
    try:
        told = re.search(r"MemAvailable:\s+(\d+)", (root / "proc/meminfo").read_text())
    except OSError:
        told = None
    if told:
        free.append(int(told[1]) * 1024)
    return min(free, default=None)


def jobs() -> int:
    """How many compilers run at once: MAX_JOBS, or one for each core, as far as memory allows."""
    if asked := os.environ.get("MAX_JOBS"):
        if not asked.isdecimal():
            raise RuntimeError(f"expected MAX_JOBS to be a number, got {asked!r}")
        return max(1, int(asked))
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    free = free_memory()
    return cores if free is None else max(1, min(cores, free // MEMORY_OF_COMPILER))


def record(part: Part) -> str:
    """The text that is written beside an object: the compiler and the command that made it."""
    return "\n".join([part.compiler, *part.command])


def up_to_date(part: Part) -> bool:
    """Whether the object was made by this command, and is newer than all files that the compiler read."""
    try:
        if part.target.with_suffix(".command").read_text() != record(part):
            return False
        made = part.target.stat().st_mtime
        read = part.target.with_suffix(".d").read_text().replace("\\\n", " ").partition(": ")[2]
        files = [file.replace("\\ ", " ") for file in re.split(r"(?<!\\)\s+", read.strip())]
        return all(Path(file).stat().st_mtime < made for file in files)
    except OSError:
        return False


def compile(part: Part) -> None:
    """Compiles an object unless it is up to date; ptxas's report of resources goes beside it.

    Raises:
        RuntimeError: the source does not compile. The message is the line that says why.
    """
    if up_to_date(part):
        return
    source, target = part.source, part.target
    target.parent.mkdir(parents=True, exist_ok=True)
    # The object gets its name only when it is finished, and the time at which the compiler started: so neither an
    # interrupted compiler nor a source edited meanwhile leaves an object that looks up to date.
    started = time.time()
    unfinished = target.with_suffix(".unfinished.o")
    dependencies = ["-MD", "-MF", str(target.with_suffix(".d"))]
    try:
        output = run([*part.command, *dependencies, "-c", str(source), "-o", str(unfinished)])
    except RuntimeError as error:
        place = "" if str(source) in str(error) else f"{source}: "
        raise RuntimeError(f"{place}{error}") from error
    lines = output.splitlines(keepends=True)
    if source.suffix == ".cu":
        report = [line for line in lines if RESOURCES.match(line)]
        target.with_suffix(".ptxas.txt").write_text("".join(report))
    sys.stderr.write("".join(line for line in lines if not RESOURCES.match(line)))
    print(f"rnnkit: {target}: {time.time() - started:.0f} s", file=sys.stderr, flush=True)
    os.utime(unfinished, (started, started))
    unfinished.replace(target)
    target.with_suffix(".command").write_text(record(part))


def write_generated(path: Path, text: str) -> None:
    """Writes a header if its text has changed, so that files that include it are not compiled again for nothing."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def compile_all(parts: list[Part]) -> list[str]:
    """Compiles the objects that are not up to date. Returns the paths of all of them, in the order of `parts`.

    Raises:
        RuntimeError: a source does not compile. The message is the line that says why.
    """
    with ThreadPoolExecutor(jobs()) as pool:
        futures = [pool.submit(compile, part) for part in parts]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(cancel_futures=True)
    for future in futures:
        if not future.cancelled():
            future.result()
    return [str(part.target) for part in parts]
