"""The workers from outside: starts them, asks them, starts one again that died."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
IDLE_SHARE = 0.1  # of one CPU; threads that wait for work by spinning use all of one
LONGEST_REST = 0.5  # seconds


@dataclass(frozen=True)
class Job:
    """How a worker is started.

    provider: as `providers.load` knows it.
    package: the folder from which it imports rnnkit.
    environment: variables beside this process's own.
    """

    provider: str
    threads: int
    device: str
    package: Path
    environment: Mapping[str, str] = field(default_factory=dict)


class Worker:
    """A running process of worker.py."""

    def __init__(self, job: Job, log: IO[str]) -> None:
        threads = str(job.threads)
        counts = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        command = [sys.executable, "-m", "benchmarks.worker", job.provider, "--device", job.device]
        self.process = subprocess.Popen(
            [*command, "--threads", threads, "--package", str(job.package)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
            env={**os.environ, **counts, **job.environment},
        )
        assert self.process.stdin and self.process.stdout
        self.requests, self.answers = self.process.stdin, self.process.stdout

    def greeting(self) -> dict[str, Any]:
        """What it says unasked when the provider is loaded: to be received first, and once."""
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        if line := self.answers.readline():
            answer: dict[str, Any] = json.loads(line)
            return answer
        return {"failed": f"its process ended with status {self.process.wait()}"}

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """The answer; it has "failed" where the process ended instead."""
        try:
            self.requests.write(json.dumps({"command": command, **arguments}) + "\n")
            self.requests.flush()
        except BrokenPipeError:
            pass  # reading tells the status
        return self._receive()

    def rest(self, seconds: float) -> None:
        """Waits until the process has used hardly any CPU for `seconds`, for its threads spin a while."""
        waited, before = 0.0, self._cpu_seconds()
        while waited < LONGEST_REST:
            time.sleep(seconds)
            waited += seconds
            before, used = self._cpu_seconds(), before
            if before - used <= IDLE_SHARE * seconds:
                return

    def _cpu_seconds(self) -> float:
        """Of all threads; 0 where the system does not tell."""
        total = 0
        for path in Path(f"/proc/{self.process.pid}/task").glob("*/schedstat"):
            try:
                total += int(path.read_text().split()[0])
            except (OSError, IndexError):
                continue  # the thread has ended
        return total / 1e9

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        if self.alive:
            self.requests.close()
            self.process.wait()
        self.answers.close()


class Pool:
    """Workers by name. What their libraries print goes to `log`.

    providers: what each said when it started: versions, or why it is unavailable.
    """

    def __init__(self, jobs: Mapping[str, Job], log: IO[str]) -> None:
        self.jobs, self.log = jobs, log
        self.workers = {name: Worker(job, log) for name, job in jobs.items()}
        self.providers = {name: worker.greeting() for name, worker in self.workers.items()}

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.workers.values():
            worker.close()

    def has(self, name: str) -> bool:
        return "versions" in self.providers.get(name, {})

    def ask(self, name: str, command: str, **arguments: Any) -> dict[str, Any]:
        return self.workers[name].ask(command, **arguments)

    def ask_in_turn(self, name: str, command: str, rest: float, **arguments: Any) -> dict[str, Any]:
        """`ask`, and wait until the worker's threads have gone to sleep: `Worker.rest`."""
        answer = self.ask(name, command, **arguments)
        self.workers[name].rest(rest)
        return answer

    def forget(self) -> None:
        """Drops all that is prepared; a process that ended is started again."""
        for name, worker in self.workers.items():
            if not self.has(name):
                continue
            if "failed" in worker.ask("forget"):
                worker.close()
                self.workers[name] = Worker(self.jobs[name], self.log)
                self.workers[name].greeting()
