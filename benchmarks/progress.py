"""How far a run is: a bar that changes on a terminal, elsewhere a line for each thing measured."""

import sys
import time

WIDTH = 24


class Progress:
    """Tells on stderr what is measured now and how long the rest will take, by what the costs so far took."""

    def __init__(self, costs: list[float]) -> None:
        self.costs, self.done = costs, 0
        self.started = time.perf_counter()

    def left(self) -> str:
        spent = sum(self.costs[: self.done])
        if not spent:
            return ""
        seconds = (time.perf_counter() - self.started) * sum(self.costs[self.done :]) / spent
        told = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
        return f", about {told} left"

    def step(self, text: str) -> None:
        """Begins the next thing."""
        number = f"{self.done + 1}/{len(self.costs)}"
        if sys.stderr.isatty():
            filled = WIDTH * self.done // len(self.costs)
            bar = "#" * filled + "-" * (WIDTH - filled)
            self._write(f"\r\033[K[{bar}] {number} {text}{self.left()}"[:200])
        else:
            self._write(f"{number} {text}{self.left()}\n")
        self.done += 1

    def clear(self) -> None:
        """Takes the bar away, for a line on stdout or for good."""
        if sys.stderr.isatty():
            self._write("\r\033[K")

    @staticmethod
    def _write(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()
