"""A figure: the median of what the rounds gave and its quartiles, and whether it can be trusted."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

TRUSTED_ROUNDS = 5  # the quartiles of fewer say little
NOISE_LIMIT = 0.15  # quartiles that lie further apart, as a share of the median, are not trusted


def significant(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


class Figure(NamedTuple):
    """A median, its quartiles and of how many rounds they are."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))

    @classmethod
    def ratio(cls, above: Sequence[float], below: Sequence[float]) -> "Figure":
        """Of the quotients round by round, so that what slowed a whole round cancels."""
        return cls.of([a / b for a, b in zip(above, below, strict=True)])

    @classmethod
    def read(cls, document: dict[str, Any]) -> "Figure":
        low, high = document["quartiles"]
        return cls(document["median"], low, high, document["rounds"])

    def document(self) -> dict[str, Any]:
        low, median, high = map(significant, (self.low, self.median, self.high))
        return {"median": median, "quartiles": [low, high], "rounds": self.rounds}

    @property
    def spread(self) -> float:
        return (self.high - self.low) / abs(self.median) if self.median else float("inf")

    @property
    def noisy(self) -> bool:
        return self.rounds < TRUSTED_ROUNDS or self.spread > NOISE_LIMIT

    def scaled(self, factor: float) -> "Figure":
        return Figure(self.median * factor, self.low * factor, self.high * factor, self.rounds)

    def less(self, other: "Figure") -> "Figure":
        low, high = self.low - other.high, self.high - other.low
        return Figure(self.median - other.median, low, high, min(self.rounds, other.rounds))

    def inverse(self) -> "Figure":
        return Figure(1 / self.median, 1 / self.high, 1 / self.low, self.rounds)

    def text(self, form: str) -> str:
        """The median by the format `form`; "noisy" in its place where it cannot be trusted."""
        return "noisy" if self.noisy else form.format(self.median)
