"""The measuring process from outside: a kernel that hangs or crashes costs its row, not the run."""

import multiprocessing
import time
from typing import Any

from benchmarks.gpu.clock import Protocol
from benchmarks.gpu.grid import TIMED, Task
from benchmarks.gpu.worker import Row, serve

START_SECONDS = 180  # imports and the CUDA context, from a slow disk
END_SECONDS = 20  # for the driver to end what a killed process has on the device


class StartError(Exception):
    """The measuring process did not come up."""


class Silent(Exception):
    """No answer came; the message says whether the process ended or hung."""


class Supervisor:
    """Sends tasks to a process of worker.py and starts a new one where that one is lost."""

    def __init__(self, device: str, protocol: Protocol) -> None:
        self.given = device, protocol
        self.context = multiprocessing.get_context("spawn")
        self.surroundings: dict[str, Any] = {}
        self.start()

    def __enter__(self) -> "Supervisor":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        self.profiled = False
        self.connection, other = self.context.Pipe()
        self.process = self.context.Process(target=serve, args=(other, *self.given), daemon=True)
        self.process.start()
        other.close()
        try:
            self.surroundings = self.receive(START_SECONDS)["surroundings"]
        except Silent as error:
            self.stop()
            raise StartError(f"the measuring process did not start: {error}") from error

    def restart(self) -> None:
        self.process.kill()
        self.stop()
        self.start()

    def stop(self) -> None:
        self.connection.close()
        self.process.join(5)
        self.process.kill()
        self.process.join(END_SECONDS)

    def receive(self, seconds: float) -> dict[str, Any]:
        """Raises Silent."""
        try:
            if self.connection.poll(max(seconds, 0)):
                message: dict[str, Any] = self.connection.recv()
                return message
        except (EOFError, OSError):
            self.process.join(5)
            raise Silent(f"its process ended with status {self.process.exitcode}") from None
        raise Silent("no answer")

    def row(self, task: Task, seconds: float) -> Row:
        """The task's row; a failed one, and a new process, where none came within `seconds`."""
        if self.profiled and task.kind in TIMED:
            self.restart()  # the profiler slows its process down for good
        self.profiled = self.profiled or task.kind == "kernels"
        doing, until = "", time.monotonic() + seconds
        try:
            self.connection.send(task)
            while "row" not in (message := self.receive(until - time.monotonic())):
                doing = message["doing"]
        except (Silent, OSError) as error:
            told = f"no answer in {seconds:.0f} s" if str(error) == "no answer" else str(error)
            told += f", in {doing}" if doing else ""
            message = {"row": failed(task, told, doing), "broken": True}
        if message["broken"]:
            self.restart()
        row: Row = message["row"]
        return row


def failed(task: Task, reason: str, doing: str) -> Row:
    """The row of a task whose process was lost while `doing` was at work; the others are not to blame."""
    entries: Row = {
        key: {"failed" if doing in (key, "") else "lost": reason} for key in task.providers
    }
    base = {"part": task.part, "kind": task.kind, "case": task.case.document()}
    return base | {"ratios": {}, "entries": entries}
