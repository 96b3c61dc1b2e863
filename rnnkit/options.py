"""rnnkit's own options of a layer: arguments of its constructor, and attributes, that torch.nn's layers do not have."""

import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        default: the value of a layer that was made without it.
        check: takes a name and a value; raises a TypeError or ValueError if an option cannot have it.
        like_torchs: whether a layer with another value than the default computes the same as torch.nn's.
    """

    default: Any
    check: Callable[[str, Any], None]
    like_torchs: bool = False


def _flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"expected {name} to be a bool, got {value!r}")


def _limit(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"expected {name} to be a number or None, got {value!r}")
    if not value > 0:
        raise ValueError(f"expected {name} to be positive, got {value}")


def _steps(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"expected {name} to be a number of steps or None, got {value!r}")
    if value < 1:
        raise ValueError(f"expected {name} to be at least 1, got {value}")


def _probability(name: str, value: Any) -> None:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:  # a ValueError in any case, as for torch.nn's dropout
        raise ValueError(f"expected {name} to be a number from 0 to 1, got {value!r}")


def _probabilities(name: str, value: Any) -> None:
    for p in value if isinstance(value, tuple | list) else [value]:
        _probability(name, p)


OPTIONS = {
    "recompute": Option(False, _flag, like_torchs=True),
    "frozen": Option(False, _flag, like_torchs=True),
    "grad_clip": Option(None, _limit),
    "grad_cut": Option(None, _steps),
    "weight_dropout": Option(0.0, _probability),
    "recurrent_dropout": Option(0.0, _probability),
    "zoneout": Option(0.0, _probabilities),
}

#: The options with which a layer computes something else than torch.nn's.
CHANGING = frozenset(name for name, option in OPTIONS.items() if not option.like_torchs)


def check(values: Mapping[str, Any]) -> None:
    """Checks values of options by their names; raises the TypeError or ValueError of the first that cannot be."""
    for name, value in values.items():
        OPTIONS[name].check(name, value)


def changed(module: Any) -> dict[str, Any]:
    """The options of a module that differ from their defaults; empty for a module that has none."""
    found = {}
    for name, option in OPTIONS.items():
        value = getattr(module, name, option.default)
        if value != option.default and value != (0, 0):  # of zoneout's pair
            found[name] = value
    return found
