"""The devices that tests run on: the CPU and, marked `gpu`, the current CUDA device."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import pytest

#: The CPU leaves no trace in a test's name (a pytest before 8.4 knows no nameless parameters).
DEVICES = (
    pytest.param("cpu", id=getattr(pytest, "HIDDEN_PARAM", "cpu")),
    pytest.param("cuda", marks=pytest.mark.gpu),
)


def on_each_device(cases: Iterable[Any]) -> list[Any]:
    """The cases as they are, and again with "cuda" for their `device`."""
    cases = list(cases)
    return [*cases, *on_gpu(cases)]


def on_gpu(cases: Iterable[Any]) -> list[Any]:
    """The cases with "cuda" for their `device`."""
    return [
        pytest.param(dataclasses.replace(case, device="cuda"), marks=pytest.mark.gpu)
        for case in cases
    ]
