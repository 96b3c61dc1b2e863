"""Random configurations beside torch.nn, and random malformed calls: `make fuzz N=10000`.

    python tests/fuzz.py 10000 --seed 1         # configurations: numbers
    python tests/fuzz.py --malformed 2000       # malformed calls
    python tests/fuzz.py --seed 1 --only 4711   # one configuration again, in this process, for a debugger
    python tests/fuzz.py --malformed --only 17  # one malformed call again

Everything is drawn by its seed and number. The draws run in child processes, so that one that ends its process
counts as a failure and the next goes on. Each failure is printed as a line that can be run again; the last line
counts them, and the exit status is 1 if there were any.

Configurations: every result and gradient of rnnkit's module, beside torch.nn's of the same values in the same
dtype. The truth is torch.nn in float64. By the rule of `tolerances.py` rnnkit's error, norm over norm, may be twice
torch.nn's own, or a few roundings of the dtype, `FLOOR_ROUNDINGS`. To these roundings come, for each value, four of
the smallest normal numbers, since the kernels take what is below for 0; in low precision, four of the smallest
numbers that there are. In float64 the error may be what the table there allows. What is beyond is looked at again
in `SECOND_LOOK` more draws of other values, taken together: of a few values torch.nn's error is chance. So is the
side that a ReLU next to zero falls to, and with it a gradient: of these the better half of the draws counts. Last, the
error may be as large as the result changes in float64 where every input and weight is a rounding off: a gate z next to
1, of which 1 - z is taken, and a chaotic recurrence make much of one. A gradient that torch.nn leaves out may be zero.
Where torch.nn raises, rnnkit raises an exception of the same type, and the reverse.

Malformed calls: of the modules, of the ops in `torch.ops.rnnkit` and of the fast path in `rnnkit._C`, with one to
three things wrong. Each must raise, or give what torch.nn or the reference gives. Failures are an end of the process,
no end in time, more than 2 GB of memory, a result with NaN of finite arguments (memory that was never written:
torch fills fresh memory with NaN here), another result than the reference's, and an error whose text is of the
inside. An end of the process in torch.nn or in the reference counts for nothing.

`make fuzz-sanitize` runs the malformed calls on the build of `make sanitize`, under AddressSanitizer and
UndefinedBehaviorSanitizer. By hand: as in the Makefile, from build/sanitize, with libasan preloaded.
"""

import argparse
import faulthandler
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Read by OpenMP as torch loads it; threads that spin are slow on a machine that does other things too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

#: Seconds for one draw; ten times as long under a sanitizer.
TIME_LIMIT = 60
SANITIZED = "asan" in os.environ.get("LD_PRELOAD", "")

#: Bytes that a draw may add to the process's memory, and that it is stopped at.
MEMORY_LIMIT, ADDRESS_LIMIT = 2 << 30, 6 << 30

KINDS = ("numbers", "malformed")

#: Told of an event in a draw, "call" or "compare", and what there is to say of it.
Tell = Callable[[str, str], None]


@dataclass
class Tally:
    """What came of the draws: the text of each failure by its number."""

    done: int = 0
    failures: dict[int, str] = field(default_factory=dict)


def check(kind: str, seed: int, number: int, tell: Tell) -> str:
    """What is wrong with one draw; "" for nothing.

    It tells "call" and what the draw is before rnnkit is called, and "compare" before only others are.
    """
    if kind == "malformed":
        import fuzz_malformed

        before = _resident()
        wrong = fuzz_malformed.check(seed, number, tell)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        if grown > MEMORY_LIMIT and not SANITIZED:
            return wrong or f"{grown >> 20} MiB of memory"
        return wrong
    import fuzz_numbers

    return fuzz_numbers.check(seed, number, tell)


def prepare() -> None:
    """The process is to fill fresh memory with NaN, and to have the extension."""
    import torch

    from rnnkit import backends

    if backends.EXTENSION is None:
        raise SystemExit(f"no C++ kernels: {backends.EXTENSION_REASON}")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def _resident() -> int:
    """Bytes of this process's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def work(kind: str, seed: int, first: int, end: int) -> int:
    """A child's part: draws these, and tells of each as it begins, compares and ends."""
    prepare()
    faulthandler.enable()
    told = os.fdopen(os.dup(1), "w", buffering=1)  # what torch prints is not for the parent
    os.dup2(2, 1)
    if not SANITIZED:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_LIMIT,) * 2)
    for number in range(first, end):

        def tell(event: str, words: str) -> None:
            told.write(f"{event} {' '.join(words.split())}\n")

        tell("begin", "")
        faulthandler.dump_traceback_later(TIME_LIMIT * (10 if SANITIZED else 1), exit=True)
        wrong = check(kind, seed, number, tell)
        faulthandler.cancel_dump_traceback_later()
        tell("end", wrong)
        # The most that it ever held hides what later draws hold: they get a new process.
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > MEMORY_LIMIT:
            return 0
    return 0


def attend(worker: Callable[[int, int], list[str]], count: int) -> Iterator[tuple[str, str]]:
    """Draws 0 to `count` in children, a new one where one ends early: (what it is, what is wrong) of each.

    `worker` gives the command that draws the numbers from one to below another.
    """
    number = 0
    while number < count:
        event = drawn = ""
        with tempfile.TemporaryFile("w+", errors="replace") as errors:
            with subprocess.Popen(
                worker(number, count), stdout=subprocess.PIPE, stderr=errors, text=True
            ) as child:
                for line in child.stdout or ():
                    event, _, words = line.rstrip("\n").partition(" ")
                    if event == "call":
                        drawn = words
                    if event == "end":
                        yield drawn, words
                        number += 1
            errors.seek(0)
            text = errors.read()
        if event not in ("begin", "call", "compare"):
            if child.returncode != 0 or not event:
                raise SystemExit(f"the draws' process ended with {child.returncode}:\n{text}")
            continue
        # Before and after its call a draw is torch's own.
        yield drawn, _ended(child.returncode, text) if event == "call" else ""
        number += 1


def _ended(status: int, errors: str) -> str:
    """How a child came to its end, in a line."""
    lines = errors.splitlines()
    at = next((line.strip() for line in lines if "/rnnkit/" in line and " File " in line), "")
    if any(line.startswith("Timeout (") for line in lines):
        return f"no end in time {at}"
    words = ("SUMMARY: ", "runtime error", "terminate called", "what():", "Error: ")
    report = [line.strip() for line in lines if any(word in line for word in words)]
    return f"the process ended with {status}: {' '.join([*report, at])[:400]}"


def run(kind: str, count: int, seed: int, here: bool) -> Tally:
    """Draws, and prints each failure as it is found."""
    tally = Tally()

    def worker(first: int, end: int) -> list[str]:
        draws = [f"--work={kind}", f"--seed={seed}", f"--first={first}", str(end)]
        return [sys.executable, "-W", "ignore", __file__, *draws]

    def drawn_here() -> Iterator[tuple[str, str]]:
        prepare()
        told = {}
        for number in range(count):
            wrong = check(kind, seed, number, told.__setitem__)
            yield told["call"], wrong

    for number, (drawn, wrong) in enumerate(drawn_here() if here else attend(worker, count)):
        tally.done += 1
        if wrong:
            tally.failures[number] = wrong
            flag = "--malformed " if kind == "malformed" else ""
            again = f"python tests/fuzz.py {flag}--seed {seed} --only {number}"
            print(f"{again}  # {drawn}: {wrong}", flush=True)
    return tally


def once(kind: str, seed: int, number: int) -> int:
    """One draw, in this process."""
    prepare()
    if not faulthandler.is_enabled():
        faulthandler.enable()
    wrong = check(kind, seed, number, lambda event, words: print(f"{event}: {words}", flush=True))
    print(wrong or "as it should be")
    return bool(wrong)


def main(arguments: list[str] | None = None) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("count", type=int, nargs="?", help="configurations")
    parser.add_argument("--malformed", type=int, nargs="?", const=2000, help="malformed calls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one draw")
    parser.add_argument("--here", action="store_true", help="without child processes")
    parser.add_argument("--work", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.work:
        return work(given.work, given.seed, given.first, given.count)
    if given.only is not None:
        return once("numbers" if given.malformed is None else "malformed", given.seed, given.only)
    counts = {"numbers": given.count or 0, "malformed": given.malformed or 0}
    if not any(counts.values()):
        counts["numbers"] = 10_000
    tallies = {
        kind: run(kind, count, given.seed, given.here) for kind, count in counts.items() if count
    }
    names = {"numbers": "configurations", "malformed": "malformed calls"}
    parts = [f"{t.done} {names[kind]}, {len(t.failures)} failures" for kind, t in tallies.items()]
    print(f"seed {given.seed}: {'; '.join(parts)}")
    return int(any(tally.failures for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
